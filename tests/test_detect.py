"""A saved result finds objects in files: the command, and the class for Python."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import ExifTags, Image

from helpers.conversation import PROMPT, Task
from helpers.detect import Detector, main
from helpers.loading import load_processor, pixel_budget
from helpers.metrics import match_boxes
from helpers.recipes import CATALOGUE
from helpers.runs import write_json
from helpers.tiny.packages import draw_package


def write_result(base, folder):
    """The base as a result that was trained to find barcodes, in a new folder."""
    shutil.copytree(base, folder)
    budget = pixel_budget(load_processor(str(base), 10**9))
    task = Task(PROMPT.format(label="barcode"), ["barcode"], pixel_budget=budget)
    write_json(folder / "recipe.json", asdict(CATALOGUE["r2-vision-only"]) | asdict(task) | {"base": "."})
    return folder


@pytest.fixture(scope="module")
def result(base, tmp_path_factory):
    """See `write_result`."""
    return write_result(base, tmp_path_factory.mktemp("run") / "r2-vision-only")


@pytest.fixture(scope="module")
def packages():
    """Three packages with one barcode each: image, box."""
    drawn = (draw_package(seed) for seed in range(100, 200))
    labelled = ((image, [box for label, box in objects if label == "barcode"]) for image, objects in drawn)
    return [(image, boxes[0]) for image, boxes in labelled if len(boxes) == 1][:3]


@pytest.mark.slow
def test_a_result_detects_images_as_it_was_trained_to(result, packages, tmp_path):
    moved = shutil.copytree(result, tmp_path / "moved")
    detector = Detector.from_pretrained(moved, batch_size=2)
    found = detector.detect([image for image, _ in packages])
    assert [{labelled["label"] for labelled in boxes} for boxes in found] == [{"barcode"}] * 3
    ious = [
        match_boxes([box], [labelled["box"] for labelled in boxes])
        for (_, box), boxes in zip(packages, found, strict=True)
    ]
    assert sum(iou for (iou,) in ious) / 3 > 0.6


@pytest.mark.slow
def test_the_command_writes_coco_results_and_drawings(result, packages, tmp_path, capsys):
    folder = tmp_path / "with spaces é"
    folder.mkdir()
    packages[0][0].save(folder / "a.png")
    turned, exif = packages[1][0].transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise for display
    turned.save(folder / "b.jpg", exif=exif, quality=95)
    (folder / "c.jpg").write_text("not an image")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:5000])  # cut off
    Image.new("RGB", (20000, 10)).save(folder / "e.png")
    assert main([str(folder), "--model", str(result), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "c.jpg: image cannot be decoded (UnidentifiedImageError)" in printed
    assert "d.png: image cannot be decoded (OSError)" in printed
    assert "e.png: one side of 20000 x 10 pixels is more than 200 times the other" in printed
    described = json.loads((tmp_path / "out/images.json").read_text())
    assert [image["file_name"] for image in described["images"]] == [str(folder / "a.png"), str(folder / "b.jpg")]
    assert [(image["width"], image["height"]) for image in described["images"]] == [p.size for p, _ in packages[:2]]
    truth = COCO(described | {"annotations": []})
    results = truth.loadRes(str(tmp_path / "out/detections.json"))
    x, y, width, height = results.anns[2]["bbox"]
    assert match_boxes([packages[1][1]], [[x, y, x + width, y + height]])[0] > 0.5
    with Image.open(tmp_path / "out/00002-b.jpg") as drawn:
        assert drawn.size == packages[1][0].size
    assert main([str(folder), "--model", str(result), "--output", str(tmp_path / "none"), "--threshold", "1.1"]) == 0
    assert json.loads((tmp_path / "none/detections.json").read_text()) == []


@pytest.mark.slow
def test_boxes_are_marked_as_accepted_or_not(result, packages, tmp_path, capsys):
    for number, (image, _) in enumerate(packages):
        image.save(tmp_path / f"{number}.png")
    scores = [
        box["score"] for boxes in Detector.from_pretrained(result).detect([p for p, _ in packages]) for box in boxes
    ]
    command = [str(tmp_path), "--model", str(result), "--output", str(tmp_path / "out")]
    assert main([*command, "--accept-threshold", str(sorted(scores)[1])]) == 0
    written = json.loads((tmp_path / "out/detections.json").read_text())
    assert sorted((entry["score"], entry["accepted"]) for entry in written) == [
        (score, number > 0) for number, score in enumerate(sorted(scores))
    ]
    assert "2 boxes accepted; 1 pictures with another box, or none, are for a person" in capsys.readouterr().out
    for number, score in enumerate(scores, start=1):
        with Image.open(tmp_path / f"out/{number:05d}-{number - 1}.jpg") as drawn:
            pixels = np.asarray(drawn).reshape(-1, 3).astype(int)
        red, grey = (np.abs(pixels - colour).sum(axis=1).min() for colour in ([215, 48, 39], [115, 115, 115]))
        assert (red < 30) == (score > min(scores))
        assert grey < 30 or score > min(scores)


@pytest.mark.slow
def test_the_mirrored_copy_is_asked_about_too(result, packages):
    images = [image for image, _ in packages]
    detector = Detector.from_pretrained(result)
    once, twice = detector.detect(images), detector.detect(images, mirrored=True)
    assert twice != once
    ious = [match_boxes([box], [one["box"] for one in boxes]) for (_, box), boxes in zip(packages, twice, strict=True)]
    assert sum(iou for (iou,) in ious) / 3 > 0.6


@pytest.mark.parametrize(
    ("model", "pictures", "reason"),
    [
        ("nowhere", "a.png", "nowhere is not what a training of this project left"),
        ("x", "b.png", "no picture can be read"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, model, pictures, reason):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / pictures), "--model", model, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
