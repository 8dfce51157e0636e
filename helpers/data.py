"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

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
        image = open_encoded(encoded)
        image.draft("RGB", (256, 256))  # a JPEG is read to its end, but unpacked at a fraction of its size: faster
        image.load()
    except UnidentifiedImageError:
        return "picture cannot be decoded (not a picture, or of an unknown format)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"picture cannot be decoded ({error})"
    return None


def open_encoded(encoded: dict) -> Image.Image:
    """Open an undecoded picture; only its header is read until its pixels are asked for."""
    return Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"]))


def drop_bad_rows(rows: Dataset) -> Dataset:
    """The rows that can be used; the others are printed. Raises ValueError when none is left."""
    problems = find_bad_rows(rows)
    for problem in problems.values():
        print(f"left out: {problem}")
    print(f"{len(rows) - len(problems)} of {len(rows)} rows are usable")
    if len(problems) == len(rows):
        raise ValueError("No usable row is left: mend the rows listed above, or set DATASET_ID to another dataset.")
    return rows.select([number for number in range(len(rows)) if number not in problems])


def read_barcodes(rows: Dataset) -> list[str | None]:
    """The barcode of every row, None where the dataset gives none."""
    if "meta" not in rows.column_names:
        return [None] * len(rows)
    return [meta.get("barcode") or None for meta in rows["meta"]]


def drop_shared_barcodes(rows: Dataset, others: Dataset) -> Dataset:
    """`rows` without the packages that are in `others` too; says how many were left out."""
    seen = set(read_barcodes(others)) - {None}
    kept = [number for number, barcode in enumerate(read_barcodes(rows)) if barcode not in seen]
    print(f"{len(rows) - len(kept)} training pictures show a package of the evaluation split: left out")
    return rows.select(kept)


def hold_back(rows: Dataset, samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows in two, about `samples` in the second one, all pictures of a barcode on the same side.

    Raises ValueError when one of the two would be empty.
    """
    if samples < 1:
        raise ValueError(f"WATCH_SAMPLES={samples}: checkpoints are chosen on these pictures, hold back at least 1.")
    groups = {}
    for number, barcode in enumerate(read_barcodes(rows)):
        groups.setdefault(barcode or number, []).append(number)
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [number for group in order for number in list(groups.values())[group]]
    held = {barcode for barcode, members in groups.items() if set(members) & set(shuffled[:samples])}
    back = sorted(number for barcode in held for number in groups[barcode])
    if len(back) >= len(rows):
        raise ValueError(f"WATCH_SAMPLES={samples} leaves nothing to train on: {len(rows)} rows in all.")
    return rows.select(sorted(set(range(len(rows))) - set(back))), rows.select(back)


def read_row(row: dict) -> tuple[Image.Image, list[list[float]], list[str]]:
    """A dataset row as upright RGB picture, its boxes `[x1, y1, x2, y2]` in pixels, and their labels."""
    image = ImageOps.exif_transpose(row["image"]).convert("RGB")
    width, height = image.size
    boxes = [
        [x_min * width, y_min * height, x_max * width, y_max * height]
        for y_min, x_min, y_max, x_max in row["objects"]["bbox"]
    ]
    return image, boxes, list(row["objects"]["category_name"])


def describe_pictures(rows: Dataset) -> pd.DataFrame:
    """One line per picture: size when upright (pixels), EXIF orientation (1: stored upright), boxes, barcode."""
    boxes = [len(objects["bbox"]) for objects in rows["objects"]]
    others = {"boxes": boxes, "barcode": read_barcodes(rows), "image_id": list(rows["image_id"])}
    return pd.DataFrame(read_headers(rows), columns=["width", "height", "orientation"]).assign(**others)


def undecoded(rows: Dataset) -> Iterator[dict]:
    """The pictures of all rows as they are stored, `{"bytes", "path"}`."""
    return (row["image"] for row in rows.select_columns("image").cast_column("image", ImageFeature(decode=False)))


def read_headers(rows: Dataset) -> list[tuple[int, int, int]]:
    """Width and height in pixels when upright, and EXIF orientation, of every picture; no pixel is decoded."""
    headers = []
    for encoded in undecoded(rows):
        image = open_encoded(encoded)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        lies = orientation >= 5  # 5 to 8 lie on their side
        headers.append((*(image.size[::-1] if lies else image.size), orientation))
    return headers


def describe_boxes(rows: Dataset, pictures: pd.DataFrame) -> pd.DataFrame:
    """One line per box: picture number, category, corners, width, height and area in 0..1, aspect as displayed."""
    lines = []
    for number, objects in enumerate(rows["objects"]):
        for category, (y1, x1, y2, x2) in zip(objects["category_name"], objects["bbox"], strict=True):
            lines.append({"picture": number, "category": category, "x1": x1, "y1": y1, "x2": x2, "y2": y2})
    boxes = pd.DataFrame(lines)
    boxes["width"], boxes["height"] = boxes.x2 - boxes.x1, boxes.y2 - boxes.y1
    boxes["area"] = boxes.width * boxes.height
    shape = (pictures.width / pictures.height).loc[boxes.picture].to_numpy()
    return boxes.assign(aspect=boxes.width / boxes.height * shape)


def count_tokens(pictures: pd.DataFrame, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Image tokens of every line of `describe_pictures`: one for each 28 x 28 pixels of the resized picture."""
    factor = 28  # patches of 14 x 14, merged two by two
    sizes = [
        smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        for width, height in zip(pictures.width, pictures.height, strict=True)
    ]
    return np.array([height * width // factor**2 for height, width in sizes])


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
