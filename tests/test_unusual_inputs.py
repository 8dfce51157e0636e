"""Unusual inputs that are right: thirty rows, and names that a shell would stumble over, go through a whole run."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from helpers import train_recipe
from helpers.checks import describe_model
from helpers.conversation import Task, write_answer
from helpers.data import describe_problem, read_row
from helpers.detection import to_record
from helpers.parsing import parse_answer
from helpers.runs import RunFolder
from helpers.tiny.packages import draw_package

BOX = [0.25, 0.1, 0.75, 0.5]  # y_min, x_min, y_max, x_max
PICTURE = draw_package(0)[0].resize((60, 40))
GREY = np.linspace(0, 65535, 60 * 40).reshape(40, 60)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> dict:
    """An image as a dataset stores it."""
    image.save(buffer := io.BytesIO(), file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def turned(orientation: int) -> dict:
    """A photograph of 60 x 40 pixels, stored as a camera held otherwise does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PICTURE, "JPEG", exif=exif)


FRAMES = {"save_all": True, "append_images": [PICTURE.rotate(90)], "duration": 100}
IMAGES = {  # width and height when upright
    "8 bits grey": (encode(PICTURE.convert("L")), (60, 40)),
    "16 bits grey": (encode(Image.fromarray(GREY.astype(np.uint16))), (60, 40)),
    "16 bits grey, TIFF": (encode(Image.fromarray(GREY.astype(np.uint16)), "TIFF"), (60, 40)),
    "32 bits grey, TIFF": (encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"), (60, 40)),
    "1 bit": (encode(PICTURE.convert("1")), (60, 40)),
    "grey with transparency": (encode(PICTURE.convert("LA")), (60, 40)),
    "RGBA": (encode(PICTURE.convert("RGBA")), (60, 40)),
    "palette": (encode(PICTURE.convert("P")), (60, 40)),
    "palette with transparency": (encode(PICTURE.convert("P"), transparency=0), (60, 40)),
    "CMYK": (encode(PICTURE.convert("CMYK"), "JPEG"), (60, 40)),
    "progressive JPEG": (encode(PICTURE, "JPEG", progressive=True), (60, 40)),
    "BMP": (encode(PICTURE, "BMP"), (60, 40)),
    "animated GIF": (encode(PICTURE, "GIF", **FRAMES), (60, 40)),
    "animated WEBP": (encode(PICTURE, "WEBP", **FRAMES), (60, 40)),
    **{f"turned, EXIF {n}": (turned(n), (60, 40) if n < 5 else (40, 60)) for n in range(1, 9)},
    "1 x 1": (encode(PICTURE.resize((1, 1))), (1, 1)),
    "200 times as wide as high": (encode(PICTURE.resize((2000, 10))), (2000, 10)),
    "200 times as high as wide": (encode(PICTURE.resize((10, 2000))), (10, 2000)),
    "without objects": (encode(PICTURE), (60, 40)),
}
LABELS = ["Nährwert 表", 'so-called "logo"', "l'étiquette", r"$\alpha \beta$", "a, b", "[x] (y)", "%s > 3", "日本語"]


def to_row(name: str) -> dict:
    """An image of the table with a box, as a row of a dataset: ids are numbers, and there are columns of one's own."""
    objects = [] if name == "without objects" else [BOX]
    known = {"image_id": [*IMAGES].index(name), "image": IMAGES[name][0], "note": name, "meta": "not a barcode"}
    return known | {"objects": {"bbox": objects, "category_name": ["nutrition-table"] * len(objects), "area": [1.0]}}


@pytest.mark.parametrize("name", IMAGES)
def test_an_unusual_image_is_read_as_it_is_displayed(name):
    row, size = to_row(name), IMAGES[name][1]
    assert describe_problem(row) is None
    decoded = row | {"image": ImageFeature().decode_example(row["image"])}
    image, boxes, _ = read_row(decoded)
    assert (image.mode, image.size) == ("RGB", size)
    assert boxes == (
        []
        if name == "without objects"
        else [pytest.approx([0.1 * size[0], 0.25 * size[1], 0.5 * size[0], 0.75 * size[1]])]
    )
    assert to_record(decoded, Task(""))["group"] is None
    if "grey" in name or "CMYK" in name:  # not white, which is what Pillow makes of 16 bits
        assert 60 < np.asarray(image).mean() < 220


@pytest.mark.parametrize("label", LABELS)
def test_an_unusual_label_comes_back_out_of_an_answer(label):
    answer = write_answer(PICTURE, [[6, 10, 30, 30]], [label], Task(""))
    assert [found for found, _ in parse_answer(answer).objects] == [label]


@pytest.fixture(scope="module")
def unusual_place(base, tmp_path_factory) -> Path:
    """A folder with an awkward name; in it a link to the base, and all the images above as a dataset."""
    place = tmp_path_factory.mktemp("unusual") / "l'été $x 表"
    place.mkdir()
    (place / "model link").symlink_to(base, target_is_directory=True)
    rows = [to_row(name) for name in IMAGES]
    for row, label in zip(rows, LABELS, strict=False):
        row["objects"]["category_name"] = [label]
    train = Dataset.from_list(rows).cast_column("image", ImageFeature())
    splits = DatasetDict({"train": train, "val": train.select(range(4))})
    for name, split in splits.items():
        (place / "my data/data").mkdir(parents=True, exist_ok=True)
        split.to_parquet(place / f"my data/data/{name}-00000-of-00001.parquet")
    return place


def test_a_link_with_spaces_and_quotes_is_a_model(unusual_place):
    assert describe_model(str(unusual_place / "model link"), 50176) == []


@pytest.mark.slow
def test_all_of_it_goes_through_a_whole_run(unusual_place, monkeypatch, capsys):
    monkeypatch.chdir(unusual_place)
    Path("my settings.yaml").write_text("LEARNING_RATES: {r1-llm-only: 1e-3}\nNUM_EPOCHS: 1\nMAX_STEPS: 1\n")
    places = ["--model-id", "model link", "--dataset-id", "my data", "--output-dir", "my 'results'"]
    numbers = ["--batch-size", "30", "--micro-batch-size", "8", "--validation-samples", "2", "--evaluations", "1"]
    numbers += ["--max-pixels", str(66 * 28 * 28), "--max-new-tokens", "64"]
    argv = ["--recipe", "r1", "--parameters", "my settings.yaml", "--report-to", "none", *places, *numbers]
    assert train_recipe.main(argv) == 0
    run = RunFolder(Path("my 'results'/r1-llm-only"))
    assert run.read_recipe()["learning_rate"] == 0.001
    assert run.read_recipe()["steps"] == 1
    assert set(run.read_task().labels) == {*LABELS, "nutrition-table"}
    assert [record["id"] for record in run.read_records()] == [0, 1, 2, 3]
