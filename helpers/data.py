"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from helpers.boxes import flip_horizontally, to_grid
from helpers.conversation import format_answer, to_conversation


def load_rows(dataset_id: str, split: str, samples: int | None, seed: int) -> Dataset:
    """Load `samples` random rows (all when None) of one split from a hub id or a local folder.

    Raises FileNotFoundError when the dataset cannot be found and ValueError when it is not a detection dataset of the
    expected form; both messages say what to do.
    """
    dataset = open_dataset(dataset_id)
    if split not in dataset:
        raise ValueError(
            f"{dataset_id} has no split {split!r}: set TRAIN_SPLIT / EVAL_SPLIT to one of {list(dataset)}."
        )
    rows = dataset[split]
    check_columns(rows, dataset_id)
    return rows if samples is None else rows.shuffle(seed=seed).select(range(min(samples, len(rows))))


def open_dataset(dataset_id: str) -> DatasetDict:
    """`load_dataset` whose error says what to do. Raises FileNotFoundError."""
    try:
        return load_dataset(dataset_id)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"No dataset {dataset_id!r}: there is no such folder below {Path.cwd()}, and the hub did not give one of "
            "that name. Set DATASET_ID to an existing folder or hub id, and check the network for the latter "
            "(the tiny dataset is drawn by `python -m helpers.tiny.packages outputs/tiny_dataset`)."
        ) from error


def check_columns(rows: Dataset, dataset_id: str) -> None:
    """Raise ValueError unless `rows` has the columns image_id, image and objects{bbox, category_name}."""
    missing = [name for name in ("image_id", "image", "objects") if name not in rows.column_names]
    if not missing:
        objects = rows.features["objects"]
        fields = objects if isinstance(objects, dict) else objects.feature
        missing = [f"objects.{name}" for name in ("bbox", "category_name") if name not in fields]
    if missing:
        raise ValueError(
            f"{dataset_id} has no column {', '.join(missing)} (it has {', '.join(rows.column_names)}). Rename its "
            "columns as in openfoodfacts/nutrition-table-detection: image_id, image, objects{bbox, category_name}."
        )


def find_bad_rows(rows: Dataset) -> dict[int, str]:
    """Row number -> what is wrong with it, for pictures that cannot be decoded and boxes that cannot be."""
    raw = rows.cast_column("image", ImageFeature(decode=False))
    problems = {}
    for number, row in enumerate(tqdm(raw, desc="checking rows", unit="row", mininterval=1)):
        problem = describe_box_problem(row["objects"]["bbox"]) or describe_picture_problem(row["image"])
        if problem:
            problems[number] = f"{row['image_id']}: {problem}"
    return problems


def describe_box_problem(boxes: Sequence[Sequence[float]]) -> str | None:
    """What is wrong with boxes `[y_min, x_min, y_max, x_max]` in 0..1, or None."""
    if len(boxes) == 0:
        return "no box"
    for box in boxes:
        y_min, x_min, y_max, x_max = box
        if not (0 <= y_min < y_max <= 1 and 0 <= x_min < x_max <= 1):
            return f"box {list(box)} is not 0 <= min < max <= 1"
    return None


def describe_picture_problem(encoded: dict) -> str | None:
    """Why an undecoded picture (`{"bytes", "path"}`) cannot be read, or None."""
    try:
        image = Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"]))
        image.draft("RGB", (256, 256))  # a JPEG is read to its end, but unpacked at a fraction of its size: faster
        image.load()
    except UnidentifiedImageError:
        return "picture cannot be decoded (not a picture, or of an unknown format)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"picture cannot be decoded ({error})"
    return None


def drop_bad_rows(rows: Dataset) -> Dataset:
    """The rows that can be used; the others are printed. Raises ValueError when none is left."""
    problems = find_bad_rows(rows)
    for problem in problems.values():
        print(f"left out: {problem}")
    print(f"{len(rows) - len(problems)} of {len(rows)} rows are usable")
    if len(problems) == len(rows):
        raise ValueError("No usable row is left: mend the rows listed above, or set DATASET_ID to another dataset.")
    return rows.select([number for number in range(len(rows)) if number not in problems])


def read_row(row: dict) -> tuple[Image.Image, list[list[float]], list[str]]:
    """A dataset row as upright RGB picture, its boxes `[x1, y1, x2, y2]` in pixels, and their labels."""
    image = ImageOps.exif_transpose(row["image"]).convert("RGB")
    width, height = image.size
    boxes = [
        [x_min * width, y_min * height, x_max * width, y_max * height]
        for y_min, x_min, y_max, x_max in row["objects"]["bbox"]
    ]
    return image, boxes, list(row["objects"]["category_name"])


def to_training_dataset(rows: Dataset, prompt: str, flip_probability: float) -> Dataset:
    """The rows as lazily built `{"image", "messages"}` examples; pictures are mirrored with `flip_probability`."""

    def transform(batch: dict[str, list]) -> dict[str, list]:
        examples = [to_training_example(dict(zip(batch, row, strict=True)), prompt, flip_probability)
                    for row in zip(*batch.values(), strict=True)]  # fmt: skip
        return {key: [example[key] for example in examples] for key in ("image", "messages")}

    return rows.with_transform(transform)


def to_training_example(row: dict, prompt: str, flip_probability: float) -> dict:
    """One dataset row as picture and conversation, mirrored with `flip_probability`."""
    image, boxes, labels = read_row(row)
    if torch.rand(()) < flip_probability:  # torch's generator is seeded anew in every worker of a data loader
        image, boxes = flip_horizontally(image, boxes)
    answer = format_answer(labels, [to_grid(box, *image.size) for box in boxes])
    return {"image": image, "messages": to_conversation(prompt, answer)}
