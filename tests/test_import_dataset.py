"""COCO, YOLO and VOC give the same dataset; what cannot be used is named, and nothing that was written is lost."""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from helpers import evaluation, train_recipe
from helpers.data import load_splits
from helpers.import_dataset import main
from helpers.tiny.packages import draw_package

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["barcode", "logo"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures of two classes: name -> size, objects with whole pixels; four of them without objects."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for number in range(24):
        image, objects = draw_package(number)
        objects = [] if number % 6 == 5 else [(label, [*map(int, box)]) for label, box in objects if label in NAMES]
        image.save(folder / f"{number:02d}.jpg")
        found[f"{number:02d}.jpg"] = image.size, objects
    return folder, found


def as_coco(folder, found):
    images = [
        {"id": n, "file_name": name, "width": w, "height": h} for n, (name, ((w, h), _)) in enumerate(found.items())
    ]
    annotations = [
        {"id": 100 * n + k, "image_id": n, "category_id": 7 + NAMES.index(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for n, (_, objects) in enumerate(found.values())
        for k, (label, (x1, y1, x2, y2)) in enumerate(objects)
    ]
    categories = [{"id": 7 + n, "name": name} for n, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root, source, found, **changes):
    (root / "annotations.json").write_text(json.dumps(as_coco(source, found) | changes))
    return ["--coco", str(root / "annotations.json"), "--images", str(source)]


def write_yolo(root, source, found):
    (root / "images").mkdir()
    (root / "labels").mkdir()
    (root / "data.yaml").write_text(yaml.safe_dump({"names": NAMES, "train": "images"}))
    for name, ((width, height), objects) in found.items():
        (root / "images" / name).write_bytes((source / name).read_bytes())
        lines = []
        for label, (x1, y1, x2, y2) in objects:
            box = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            lines.append(" ".join(map(str, [NAMES.index(label), *box])))
        if lines:
            (root / "labels" / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return ["--yolo", str(root)]


def write_voc(root, source, found):
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    for name, ((width, height), objects) in found.items():
        (root / "JPEGImages" / name).write_bytes((source / name).read_bytes())
        annotation = ElementTree.Element("annotation")
        ElementTree.SubElement(annotation, "filename").text = name
        size = ElementTree.SubElement(annotation, "size")
        ElementTree.SubElement(size, "width").text, ElementTree.SubElement(size, "height").text = (
            str(width),
            str(height),
        )
        for label, (x1, y1, x2, y2) in objects:
            entry = ElementTree.SubElement(annotation, "object")
            ElementTree.SubElement(entry, "name").text = label
            box = ElementTree.SubElement(entry, "bndbox")
            for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True):
                ElementTree.SubElement(box, corner).text = str(value)
        ElementTree.ElementTree(annotation).write((root / "Annotations" / name).with_suffix(".xml"))
    return ["--voc", str(root)]


def write_imagefolder(root, source, found, convention):
    lines = []
    for name, ((width, height), objects) in found.items():
        (root / name).write_bytes((source / name).read_bytes())
        boxes = {
            "xywh": [[x1, y1, x2 - x1, y2 - y1] for _, (x1, y1, x2, y2) in objects],
            "xyxy": [box for _, box in objects],
            "yxyx": [[y1 / height, x1 / width, y2 / height, x2 / width] for _, (x1, y1, x2, y2) in objects],
        }[convention]
        lines.append({"file_name": name, "objects": {"bbox": boxes, "category": [label for label, _ in objects]}})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ["--imagefolder", str(root), "--boxes", convention]


WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}


def to_plain(row):
    """Name, boxes and labels of a row, rounded."""
    boxes = [[round(v, 5) for v in box] for box in row["objects"]["bbox"]]
    return row["image_id"], boxes, row["objects"]["category_name"]


def test_the_three_formats_give_the_same_rows(pictures, tmp_path, capsys, make_settings):
    source, found = pictures
    rows = {}
    folders = {c: partial(write_imagefolder, convention=c) for c in ("xywh", "xyxy", "yxyx")}
    for name, write in (WRITERS | folders).items():
        root = tmp_path / name
        root.mkdir()
        assert main([*write(root, source, found), "--output", str(root / "out")]) == 0
        rows[name] = {
            split: list(map(to_plain, dataset)) for split, dataset in load_dataset(str(root / "out")).items()
        }
        assert (root / "out/contact_sheet.png").stat().st_size > 10_000
        assert "24 pictures kept, 0 left out" in (root / "out/report.txt").read_text()
    assert all(rows[name] == rows["coco"] for name in rows)
    everything = [row for split in rows["coco"].values() for row in split]
    assert len(everything) == 24
    assert len(rows["coco"]["val"]) == 5  # a fifth
    assert sum(not boxes for _, boxes, _ in everything) >= 4
    (width, height), objects = found["00.jpg"]
    first = next(row for row in everything if row[0] == "00.jpg")
    fractions = [[y1 / height, x1 / width, y2 / height, x2 / width] for _, (x1, y1, x2, y2) in objects]
    assert first[1] == [pytest.approx(box, abs=1e-4) for box in fractions]
    splits = load_splits(make_settings(tmp_path, dataset_id=str(tmp_path / "coco/out")))
    assert splits.labels == ("barcode", "logo")


def write_hub(root, source, found, names, of_objects):
    """A dataset as people have it on the hub: pixels as COCO's, classes as numbers, objects as a list or as lists."""
    rows = [
        {"image": str(source / name), "objects": [{"bbox": [x1, y1, x2 - x1, y2 - y1], "category": names.index(label)}
         for label, (x1, y1, x2, y2) in objects]}
        for name, (_, objects) in found.items()
    ]  # fmt: skip
    parts = {"bbox": List(Value("float64")), "category": ClassLabel(names=names)}
    kinds = [parts] if of_objects else {name: List(kind) for name, kind in parts.items()}
    if not of_objects:
        rows = [row | {"objects": {name: [o[name] for o in row["objects"]] for name in parts}} for row in rows]
    features = Features({"image": ImageFeature(), "objects": kinds})
    for split, some in {"train": rows[:16], "test": rows[16:]}.items():
        (root / "data").mkdir(exist_ok=True, parents=True)
        Dataset.from_list(some, features=features).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("of_objects", [False, True])
def test_a_hub_dataset_is_streamed_and_converted(pictures, tmp_path, of_objects):
    source, found = pictures
    write_hub(tmp_path / "hub", source, found, NAMES, of_objects)
    options = ["--hub", str(tmp_path / "hub"), "--boxes", "xywh", "--output", str(tmp_path / "out")]
    assert main(options) == 0
    rows = load_dataset(str(tmp_path / "out"))
    assert {split: len(some) for split, some in rows.items()} == {"train": 16, "val": 8}  # test is to evaluate on
    (width, height), objects = found["00.jpg"]
    first = to_plain(rows["train"][0])
    assert first[2] == [label for label, _ in objects]
    x1, y1, x2, y2 = objects[0][1]
    assert first[1][0] == pytest.approx([y1 / height, x1 / width, y2 / height, x2 / width], abs=1e-4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.png", "data", "report.txt"]


def test_only_so_many_rows_of_a_stream_are_read(pictures, tmp_path):
    write_hub(tmp_path / "hub", *pictures, NAMES, of_objects=False)
    options = ["--hub", str(tmp_path / "hub"), "--boxes", "xywh", "--output", str(tmp_path / "out"), "--limit", "4"]
    assert main(options) == 0
    assert [len(rows) for rows in load_dataset(str(tmp_path / "out")).values()] == [4, 4]


def test_a_split_to_test_on_is_passed_over_aloud(pictures, tmp_path, capsys):
    source, found = pictures
    options = write_yolo(tmp_path, source, found)
    config = {"names": NAMES, "train": "images", "val": "images", "test": "images"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    main([*options, "--output", str(tmp_path / "out")])
    assert "split 'test' is passed over" in capsys.readouterr().out


def write_coco_folder(root, source, found):
    """The layout of the COCO dataset itself."""
    (root / "annotations").mkdir()
    names = list(found)
    for split, some in {"train2017": names[:16], "val2017": names[16:]}.items():
        (root / split).mkdir()
        for name in some:
            (root / split / name).write_bytes((source / name).read_bytes())
        part = as_coco(source, {name: found[name] for name in some})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(part))
        (root / "annotations" / f"person_keypoints_{split}.json").write_text("{}")


@pytest.mark.parametrize("write", [write_coco_folder, write_yolo, write_voc])
def test_dataset_id_points_straight_at_a_folder(pictures, tmp_path, write):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", *pictures)
    made = train_recipe.prepare(str(tmp_path / "mine"), tmp_path / "out")
    assert made == str(tmp_path / "out/dataset")
    sizes = {split: len(rows) for split, rows in load_dataset(made).items()}
    assert sizes == ({"train": 16, "val": 8} if write is write_coco_folder else {"train": 19, "val": 5})
    (tmp_path / "out/dataset/report.txt").write_text("kept")
    assert train_recipe.prepare(str(tmp_path / "mine"), tmp_path / "out") == made
    assert (tmp_path / "out/dataset/report.txt").read_text() == "kept"  # it is not made again
    next(path for path in (tmp_path / "mine").rglob("*") if path.suffix in (".json", ".txt", ".xml")).unlink()
    with pytest.raises(ValueError, match=r"out/dataset is not what .*mine is now .*: delete it"):
        train_recipe.prepare(str(tmp_path / "mine"), tmp_path / "out")
    assert train_recipe.prepare(made, tmp_path / "other") == made
    assert train_recipe.prepare("me/a-hub-dataset", tmp_path / "other") == "me/a-hub-dataset"


def test_a_given_split_is_kept(pictures, tmp_path):
    source, found = pictures
    halves = [dict(list(found.items())[:16]), dict(list(found.items())[16:])]
    files = []
    for name, half in zip(("train", "val"), halves, strict=True):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(as_coco(source, half)))
    main(["--coco", *map(str, files), "--images", str(source), "--output", str(tmp_path / "out")])
    dataset = load_dataset(str(tmp_path / "out"))
    assert [dataset[name]["image_id"] for name in ("train", "val")] == [list(half) for half in halves]


def test_pictures_that_belong_together_stay_together(pictures, tmp_path):
    source, found = pictures
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in found:
        (copies / name).write_bytes((source / f"{int(name[:2]) % 8:02d}.jpg").read_bytes())  # three of each
    same = {name: found[f"{int(name[:2]) % 8:02d}.jpg"] for name in found}
    main([*write_coco(tmp_path, copies, same), "--output", str(tmp_path / "out")])
    dataset = load_dataset(str(tmp_path / "out"))
    groups = [{int(name[:2]) % 8 for name in dataset[split]["image_id"]} for split in ("train", "val")]
    assert not groups[0] & groups[1]
    assert len(dataset["val"]) == 6
    main([*write_coco(tmp_path, source, found), "--output", str(tmp_path / "byname"), "--group", r"(\d)"])
    tens = [
        {name[0] for name in load_dataset(str(tmp_path / "byname"))[split]["image_id"]} for split in ("train", "val")
    ]
    assert not tens[0] & tens[1]


# The road of README: from a folder to a table


def read_readme_commands():
    """The three commands under "Your own pictures", as lists of arguments without `python -m`."""
    text = (ROOT / "README.md").read_text()
    block = text[text.index("**Your own pictures**") :].split("```bash\n")[1].split("```")[0]
    return [shlex.split(line)[2:] for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_three_commands_lead_from_a_folder_to_a_table(pictures, base, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    importing, training, measuring = read_readme_commands()
    source = WRITERS[name](tmp_path, *pictures)
    assert main([*source, *importing[importing.index("--output") :]]) == 0
    small = ["--model-id", str(base), "--max-steps", "2", "--evaluations", "1", "--batch-size", "4"]
    small += ["--validation-samples", "2", "--max-new-tokens", "60", "--report-to", "none"]
    assert train_recipe.main([*training[1:], *small]) == 0
    capsys.readouterr()
    evaluation.main(measuring[1:])
    printed = capsys.readouterr().out
    assert "5 pictures; hits from IoU 0.5 on; labels: multi-class" in printed
    assert re.search(r"\nbarcode +\d\.\d{3} ", printed)
    assert re.search(r"\nlogo +\d\.\d{3} ", printed)
    made = json.loads((tmp_path / "outputs/mine/r1-llm-only/recipe.json").read_text())
    assert made["labels"] == ["barcode", "logo"]
    assert made["question"].startswith("Detect every barcode and logo.")


# Bad input: one line each, exit code 2 where nothing can be done, and nothing that is there is touched


def change_annotation(**changes):
    def change(coco):
        coco["annotations"][0].update(changes)

    return change


def rename(coco):
    coco["images"][0]["file_name"] = "missing.jpg"


def repeat_id(coco):
    coco["images"][1]["id"] = coco["images"][0]["id"]


def resize(coco):
    coco["images"][0]["width"] = 9


def forget_picture(coco):
    coco["annotations"][0]["image_id"] = 999


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename, "missing.jpg: there is no such file"),
        (change_annotation(bbox=[-50, 0, 20, 20]), "box [-50.0, 0.0, -30.0, 20.0] is outside of the picture"),
        (change_annotation(bbox=[0, 0, 5000, 20]), "is outside of the picture of"),
        (change_annotation(bbox=[-0.9, 5, 0.8, 20]), "has no area"),  # none that is in the picture
        (change_annotation(bbox=[5, 5, 0, 20]), "box [5.0, 5.0, 5.0, 25.0] has no area"),
        (change_annotation(bbox=[5, 5, -4, 20]), "has no area"),
        (change_annotation(bbox=[float("nan"), 5, 4, 20]), "bbox [nan, 5, 4, 20] is not [x, y, width, height]"),
        (change_annotation(bbox=[1, 2, 3]), "bbox [1, 2, 3] is not [x, y, width, height]"),
        (change_annotation(bbox=None), "bbox None is not [x, y, width, height]"),
        (change_annotation(category_id=3), "category_id 3 is not listed under categories"),
        (repeat_id, "the id 0 belongs to 2 pictures"),
        (resize, "its annotation is for (9, "),
        (forget_picture, "annotations of picture 999, which is not listed under images"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_and_left_out(pictures, tmp_path, capsys, change, reason):
    source, found = pictures
    coco = as_coco(source, found)
    change(coco)
    (tmp_path / "bad.json").write_text(json.dumps(coco))
    command = ["--coco", str(tmp_path / "bad.json"), "--images", str(source), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert any(reason in line for line in lines)
    assert lines == [line for line in (tmp_path / "out/report.txt").read_text().splitlines() if "left out: " in line]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2 0.5 0.5 0.1 0.1", "00.txt, line 1: class 2 is beyond names"),
        ("0 0.5 0.5 0.1", "00.txt, line 1 is not `class x y width height`"),
        ("0 0.5 nan 0.1 0.1", "is not finite"),
        ("0 50 60 100 100", "is outside of the picture"),
        ("cat 0.5 0.5 0.1 0.1", "00.txt, line 1 is not `class x y width height`"),
    ],
)
def test_a_line_of_yolo_that_cannot_be_read_is_named(pictures, tmp_path, capsys, line, reason):
    command = write_yolo(tmp_path, *pictures)
    (tmp_path / "labels/00.txt").write_text(line)
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert reason in capsys.readouterr().out


def test_a_line_of_metadata_that_cannot_be_read_is_named(pictures, tmp_path, capsys):
    command = write_imagefolder(tmp_path, *pictures, "xywh")
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    lines[0], lines[1], lines[2] = (
        "{",
        '{"objects": 1}',
        '{"file_name": "02.jpg", "objects": {"bbox": [[1, 2, 3, 4]]}}',
    )
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "metadata.jsonl, line 1: not an object with file_name and objects (JSONDecodeError)" in printed
    assert "metadata.jsonl, line 2: not an object with file_name and objects (KeyError)" in printed
    assert "line 3: 1 boxes, 0 labels" in printed


def test_damaged_files_are_named(pictures, tmp_path, capsys):
    command = write_voc(tmp_path, *pictures)
    (tmp_path / "Annotations/00.xml").write_text("<annotation>")
    (tmp_path / "JPEGImages/01.jpg").write_bytes((tmp_path / "JPEGImages/01.jpg").read_bytes()[:500])
    Image.new("RGB", (2000, 10)).save(tmp_path / "JPEGImages/03.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(tmp_path / "JPEGImages/02.jpg").resize((336, 448)).save(tmp_path / "JPEGImages/02.jpg", exif=exif)
    size = "<size><width>336</width><height>448</height></size>"
    (tmp_path / "Annotations/02.xml").write_text(f"<annotation><filename>02.jpg</filename>{size}</annotation>")
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "00.xml: not XML" in printed
    assert "01.jpg: the picture cannot be decoded (OSError)" in printed
    assert "03.jpg: one side of (2000, 10) pixels is more than 199 times the other" in printed
    assert "02.jpg: its annotation is for (336, 448) pixels, it has (448, 336) as stored; it is turned" in printed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "has no list images, annotations, categories: export it as COCO JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no picture"),
        ('{"images": [1], "annotations": [], "categories": []}', "hold objects in COCO JSON"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}', "a category has no id or no name"),
        (
            '{"images": [{"id": 1, "file_name": "00.jpg"}], "annotations": [], "categories": []}',
            "no picture is left for train",
        ),
    ],
)
def test_a_file_that_is_no_dataset_is_refused(pictures, tmp_path, capsys, content, reason):
    (tmp_path / "a.json").write_text(content)
    command = ["--coco", str(tmp_path / "a.json"), "--images", str(pictures[0]), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out/data").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--yolo", "nowhere"], "nowhere/data.yaml cannot be read"),
        (["--voc", "nowhere"], "nowhere holds no Annotations/*.xml"),
        (["--coco", "nowhere.json", "--images", "."], "nowhere.json cannot be read"),
        (["--coco", "a.json"], "--coco needs --images FOLDER"),
        (["--imagefolder", "."], "say what the numbers of bbox are: --boxes xywh, xyxy or yxyx"),
        (["--hub", "."], "say what the numbers of bbox are: --boxes xywh, xyxy or yxyx"),
        (["--yolo", ".", "--limit", "9"], "--limit 9: it belongs to --hub, and is at least 2"),
        (["--hub", "me/nothing-there", "--boxes", "xywh"], "is neither a folder nor"),
        (["--imagefolder", "nowhere", "--boxes", "xywh"], "nowhere holds no metadata.jsonl with lines"),
        (["--yolo", ".", "--validation", "1.5"], "--validation 1.5 is not a share"),
        (["--yolo", ".", "--group", "("], "--group ( is not a regular expression"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, capsys, options, reason):
    with pytest.raises(SystemExit) as stopped:
        main([*options, "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_dataset_is_not_written_over(pictures, tmp_path, capsys):
    command = [*write_coco(tmp_path, *pictures), "--output", str(tmp_path / "out")]
    main(command)
    before = (tmp_path / "out/data/train-00000-of-00001.parquet").read_bytes()
    with pytest.raises(SystemExit):
        main(command)
    assert "holds a dataset already: name another folder" in capsys.readouterr().err
    assert (tmp_path / "out/data/train-00000-of-00001.parquet").read_bytes() == before
