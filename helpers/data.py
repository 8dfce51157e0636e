"""Rows of a dataset: loading, checking, splitting, reading.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import xxhash
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from PIL import ExifTags, Image, ImageOps

from helpers.boxes import flip_horizontally
from helpers.conversation import Task, to_conversation, write_answer


def load_rows(dataset_id: str, split: str, samples: int | None, seed: int) -> Dataset:
    """Load `samples` random rows (all when None) of one split from a hub id or a local folder.

    Raises FileNotFoundError when the dataset cannot be found and ValueError when it is not a detection dataset of the
    expected form; both messages say what to do.
    """
    dataset = open_dataset(dataset_id)
    if split not in dataset:
        raise ValueError(f"{dataset_id} has no split {split!r}, only {list(dataset)}: set TRAIN_SPLIT / EVAL_SPLIT.")
    rows = dataset[split]
    check_columns(rows, dataset_id)
    return rows if samples is None else rows.shuffle(seed=seed).select(range(min(samples, len(rows))))


def open_dataset(dataset_id: str) -> DatasetDict:
    """`load_dataset` whose error says what to do. Raises FileNotFoundError."""
    try:
        return load_dataset(dataset_id)
    except (FileNotFoundError, ConnectionError) as error:
        where = f"neither a folder below {Path.cwd()} nor, as far as the network tells, on the hub"
        remedy = "Set DATASET_ID to one (`python -m helpers.tiny.packages outputs/tiny_dataset` draws a tiny one)."
        raise FileNotFoundError(f"No dataset {dataset_id!r}: {where}. {remedy}") from error
    except DatasetGenerationError as error:
        remedy = "Convert COCO, YOLO or VOC with `python -m helpers.import_dataset`"
        raise ValueError(f"{dataset_id} cannot be read as rows of a dataset. {remedy}.") from error


def check_columns(rows: Dataset, dataset_id: str) -> None:
    """Raise ValueError unless `rows` has the columns image_id, image and objects{bbox, category_name}."""
    wanted = {"image_id", "image", "objects.bbox", "objects.category_name"}
    if missing := ", ".join(sorted(wanted - set(rows.flatten().column_names))):
        present = ", ".join(rows.column_names)
        remedy = "Rename its columns as in openfoodfacts/nutrition-table-detection, or convert COCO, YOLO or VOC"
        remedy += " with `python -m helpers.import_dataset`"
        raise ValueError(f"{dataset_id} has no column {missing} (it has {present}). {remedy}.")


def drop_bad_rows(rows: Dataset) -> Dataset:
    """The rows that can be used; the others are printed. Raises ValueError when none is left.

    Large datasets are checked by several processes; `datasets` remembers what was found of the same rows.
    """
    raw, workers = rows.cast_column("image", ImageFeature(decode=False)), min(os.cpu_count(), len(rows) // 5000)
    find = {"function": find_problem, "remove_columns": raw.column_names, "desc": "checking rows"}
    problems = raw.map(**find, num_proc=workers if workers > 1 else None)["problem"] if len(rows) else []
    kept = [number for number, problem in enumerate(problems) if not problem]
    for image_id, problem in zip(rows["image_id"], problems, strict=True) if len(kept) < len(rows) else []:
        if problem:
            print(f"left out: {image_id}: {problem}")
    print(f"{len(kept)} of {len(rows)} rows are usable")
    if not kept:
        raise ValueError("No usable row is left: mend the rows listed above, or set DATASET_ID to another dataset.")
    return rows.select(kept)


LARGEST_RATIO = 200  # of the sides of an image, beyond which Qwen's processors raise an error


def find_problem(row: dict) -> dict[str, str]:
    """`describe_problem` as a column of a dataset, empty where there is none."""
    return {"problem": describe_problem(row) or ""}


def describe_problem(row: dict) -> str | None:
    """Why a row with an undecoded image (`{"bytes", "path"}`) cannot be used, or None."""
    if problem := describe_objects_problem(row["objects"]):
        return problem
    try:
        image = open_encoded(row["image"])
        size = image.size
        image.draft("RGB", (256, 256))  # a JPEG is read to its end, but unpacked at a fraction of its size: faster
        ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds of them
        return f"image cannot be decoded ({type(error).__name__})" if row["image"] else "there is no image"
    if image.mode == "F":
        return "the image is in floating point: save it in 8 or 16 bits"
    if max(size) > LARGEST_RATIO * min(size):
        return f"one side of {size[0]} x {size[1]} pixels is more than {LARGEST_RATIO} times the other"
    return None


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """An image as it is displayed, 8 bits a colour; of 16 bits the upper 8 are kept, where Pillow makes most white."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 256).astype(np.uint8))
    return upright.convert("RGB")


def describe_objects_problem(objects: dict[str, list]) -> str | None:
    """What is wrong with the boxes and labels of a row, or None."""
    boxes, labels = (objects or {}).get("bbox"), (objects or {}).get("category_name", [])
    if boxes is None or labels is None:
        return "there are no objects: give empty lists for an image that has none"
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            return f"box {box} is not four numbers"
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            return f"box {box} is not 0 <= min < max <= 1"
    if wrong := [v for v in labels if not isinstance(v, str) or not v.strip() or re.search(r"[<{}\x00-\x1f]", v)]:
        return f"label {wrong[0]!r} is not a text, or holds <, braces or a line break, which would not be read back"
    return None if len(labels) == len(boxes) else f"{len(boxes)} boxes, but {len(labels)} labels"


def open_encoded(encoded: dict) -> Image.Image:
    """Open an undecoded image; only its header is read until its pixels are asked for."""
    return Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"]))


@dataclass(frozen=True)
class Splits:
    """The rows to train on, to choose checkpoints with, and to evaluate the result on; the labels of their boxes."""

    train: Dataset
    validation: Dataset
    evaluation: Dataset
    labels: tuple[str, ...]


def load_splits(settings: SimpleNamespace) -> Splits:
    """Load, check and split the dataset of the settings, no barcode in two splits; bad rows are printed and left out.

    Raises FileNotFoundError and ValueError that say what to do.
    """
    s = settings
    usable = drop_bad_rows(load_rows(s.dataset_id, s.train_split, s.train_samples, s.seed))
    labels = choose_labels(usable, s.labels)
    usable = keep_labels(usable, labels)
    evaluation = drop_bad_rows(load_rows(s.dataset_id, s.eval_split, s.eval_samples, s.seed))
    evaluation = keep_labels(evaluation, labels)
    train, validation = hold_back(drop_shared_barcodes(usable, evaluation), s.validation_samples, s.seed)
    print(f"{len(train)} images to train on, {len(validation)} for validation, {len(evaluation)} to evaluate on")
    return Splits(train, validation, evaluation, labels)


def choose_labels(rows: Dataset, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """The labels of the rows, in alphabetical order, or those that are wanted. Raises ValueError for others."""
    known = sorted({label for objects in rows["objects"] for label in objects["category_name"]})
    labels = re.split(r"\s*,\s*", wanted.strip()) if isinstance(wanted, str) else list(wanted or known)
    if not labels or not set(labels) <= set(known):
        raise ValueError(f"LABELS={wanted!r}: choose from those of the training split, {known}.")
    return tuple(labels)


def keep_labels(rows: Dataset, labels: Sequence[str]) -> Dataset:
    """Rows without boxes of other labels; an image may have none left. Says how many boxes of which are left out."""
    others = pd.Series([label for row in rows["objects"] for label in row["category_name"] if label not in labels])
    if others.empty:
        return rows
    print("boxes left out:", ", ".join(f"{count} {label}" for label, count in others.value_counts().items()))

    def keep(objects: dict[str, list]) -> dict[str, dict[str, list]]:
        kept = [number for number, label in enumerate(objects["category_name"]) if label in labels]
        return {"objects": {name: [values[number] for number in kept] for name, values in objects.items()}}

    return rows.map(keep, input_columns="objects")


def read_barcode(meta: object) -> str | None:
    """The barcode in what is known of an image, None where there is none."""
    return (meta.get("barcode") or None) if isinstance(meta, dict) else None


def read_barcodes(rows: Dataset) -> list[str | None]:
    """The barcode of every row, None where the dataset gives none."""
    return [read_barcode(meta) for meta in (rows["meta"] if "meta" in rows.column_names else [None] * len(rows))]


def drop_shared_barcodes(rows: Dataset, others: Dataset) -> Dataset:
    """`rows` without the packages that are in `others` too; says how many were left out."""
    seen = set(read_barcodes(others)) - {None}
    kept = [number for number, barcode in enumerate(read_barcodes(rows)) if barcode not in seen]
    print(f"{len(rows) - len(kept)} training images show a package of the evaluation split: left out")
    return rows.select(kept)


def hold_back(rows: Dataset, samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows in two, about `samples` in the second one, all images of a barcode on the same side.

    Raises ValueError when one of the two would be empty.
    """
    groups = [barcode or number for number, barcode in enumerate(read_barcodes(rows))]
    order = np.random.default_rng(seed).permutation(len(rows))
    held = {groups[number] for number in order[:samples]}
    back = [number for number, group in enumerate(groups) if group in held]
    if not 0 < len(back) < len(rows):
        remedy = "hold back at least 1 image, by which checkpoints are chosen, and leave some to train on"
        raise ValueError(f"VALIDATION_SAMPLES={samples} of {len(rows)} rows: {remedy}.")
    return rows.select([number for number, group in enumerate(groups) if group not in held]), rows.select(back)


def read_row(row: dict) -> tuple[Image.Image, list[list[float]], list[str]]:
    """A dataset row as upright RGB image, its boxes `[x1, y1, x2, y2]` in pixels, and their labels."""
    image = to_upright_rgb(row["image"])
    fractions = np.reshape(row["objects"]["bbox"], (-1, 4))[:, [1, 0, 3, 2]]
    return image, (fractions * (image.size * 2)).tolist(), list(row["objects"]["category_name"])


def describe_boxes(rows: Dataset) -> pd.DataFrame:
    """One line per box: image number, category, corners x1, y1, x2, y2, and area, all as fractions of the image."""
    objects = pd.DataFrame(list(rows["objects"])).explode(["category_name", "bbox"]).dropna(subset="bbox")
    boxes = pd.DataFrame(objects.bbox.tolist(), columns=["y1", "x1", "y2", "x2"])
    boxes = boxes.assign(image=objects.index, category=objects.category_name.to_numpy())
    return boxes.assign(area=(boxes.x2 - boxes.x1) * (boxes.y2 - boxes.y1))


def median_box(boxes: pd.DataFrame) -> list[float]:
    """`[x1, y1, x2, y2]` as fractions of the image: the median of each corner over `describe_boxes`."""
    return boxes[["x1", "y1", "x2", "y2"]].median().tolist()


@dataclass
class Mirroring:
    """Whether an image is mirrored: by chance, but always the same in one epoch of a run, also of one that goes on."""

    probability: float = 0.0
    seed: int = 0
    epoch: int = 0

    def applies_to(self, image_id: object) -> bool:
        return xxhash.xxh3_64_intdigest(f"{self.seed} {self.epoch} {image_id}".encode()) < self.probability * 2**64


def to_training_dataset(rows: Dataset, task: Task, mirroring: Mirroring) -> Dataset:
    """The rows as lazily built `{"image", "messages"}` examples."""

    def transform(columns: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        examples = [to_training_example(row, task, mirroring.applies_to(row["image_id"])) for row in rows]
        return {key: [example[key] for example in examples] for key in ("image", "messages")}

    return rows.with_transform(transform)


def to_training_example(row: dict, task: Task, mirrored: bool = False) -> dict:
    """One dataset row as image and conversation."""
    image, boxes, labels = read_row(row)
    if mirrored:
        image, boxes = flip_horizontally(image, boxes)
    return {"image": image, "messages": to_conversation(task, write_answer(image, boxes, labels, task))}


def read_headers(rows: Dataset) -> list[tuple[int, int, int]]:
    """Width and height in pixels when upright, and EXIF orientation, of every image; no pixel is decoded."""
    headers = []
    for row in rows.select_columns("image").cast_column("image", ImageFeature(decode=False)):
        image = open_encoded(row["image"])
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        on_its_side = orientation >= 5
        headers.append((*(image.size[::-1] if on_its_side else image.size), orientation))
    return headers
