"""Labelled pictures in the formats people have, written as the dataset folder that DATASET_ID takes.

    python -m helpers.import_dataset --coco annotations.json --images FOLDER --output FOLDER
    python -m helpers.import_dataset --coco train.json val.json --images FOLDER --output FOLDER
    python -m helpers.import_dataset --yolo FOLDER --output FOLDER      # data.yaml, images/, labels/
    python -m helpers.import_dataset --voc FOLDER --output FOLDER       # Annotations/, JPEGImages/, ImageSets/Main/
    python -m helpers.import_dataset --imagefolder FOLDER --boxes xywh --output FOLDER      # metadata.jsonl
    python -m helpers.import_dataset --hub ID --boxes xywh --output FOLDER [--limit 1000]   # columns image, objects

OUTPUT gets data/train-….parquet and data/val-….parquet, report.txt (what was kept, and every picture that was left out
with its reason), and contact_sheet.png: look at it before you train. Where the source has no split, --validation names
the share of pictures that is held back for the evaluation, whole groups at a time: pictures with the same content are
one group, and so are those whose names agree in the first parenthesis of --group, such as '(.*)_\\d+'.
Pictures without objects are kept. In a metadata.jsonl (huggingface.co/docs/datasets/image_dataset) a line has
file_name and objects, with bbox and category; a dataset of the hub (or a folder that `load_dataset` reads) has the
columns image and objects, and is streamed: --limit reads that many rows of each split, and no more. What the four
numbers of a bbox are has to be said: xywh or xyxy in pixels, or yxyx in 0..1. A split `test` is what to evaluate on
where there is no `val`; where there is one it is passed over, which is said.

The formats are read here and not by a library such as supervision: that stops at the first malformed entry, and takes
boxes outside of their picture or without an area as they are (tried with 0.31); here each is named.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash
import yaml
from datasets import ClassLabel, Features, load_dataset
from datasets import Image as ImageFeature
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image
from tqdm import tqdm

from helpers.data import to_upright_rgb
from helpers.plots import plot_images
from helpers.runs import write_json
from helpers.tiny.packages import FEATURES

TRAIN, EVALUATION = "train", "val"
SPLITS = {"train": TRAIN, "trainval": TRAIN, "val": EVALUATION, "valid": EVALUATION, "validation": EVALUATION}
NAMES = {**SPLITS, "test": EVALUATION}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
ROWS_AT_ONCE = 64
LONGEST = 199  # of the longer side to the shorter one; from 200 on Qwen's processors raise an error
STREAMED = ".streamed"  # pictures of a hub dataset on their way into the output


@dataclass(frozen=True)
class Picture:
    """A labelled picture as its source describes it. Raises nothing: what is wrong stands in `problem`."""

    path: Path
    boxes: list[list[float]] = field(default_factory=list)  # [x1, y1, x2, y2] in pixels, or in 0..1 if `relative`
    labels: list[str] = field(default_factory=list)
    split: str | None = None  # None: the source does not say
    size: tuple[int, int] | None = None  # width and height as the source states them
    relative: bool = False
    group: str = ""  # what pictures that belong together have in common
    problem: str | None = None  # why it cannot be used


def choose_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits of a source that are read, and what each is for; `test` is only where there is nothing else."""
    chosen = {name: SPLITS[name] for name in names if name in SPLITS}
    if EVALUATION not in chosen.values() and "test" in names:
        chosen["test"] = EVALUATION
    for name in sorted(set(names) - chosen.keys()):
        print(f"split {name!r} is passed over")
    return chosen


# COCO


def read_coco(files: Sequence[Path], images: Path) -> list[Picture]:
    """The pictures of one file, or of one to train on and one to evaluate on. Raises ValueError for other files."""
    splits = [None] if len(files) == 1 else [TRAIN, EVALUATION]
    return [
        picture for file, split in zip(files, splits, strict=True) for picture in read_coco_file(file, images, split)
    ]


def read_coco_file(file: Path, images: Path, split: str | None) -> Iterator[Picture]:
    """The pictures of one annotation file (cocodataset.org/#format-data): boxes are `[x, y, width, height]`."""
    content = load_json(file)
    names = {category["id"]: category["name"] for category in content["categories"]}
    boxes = {}
    for annotation in content["annotations"]:
        boxes.setdefault(annotation.get("image_id"), []).append(annotation)
    known = Counter(entry.get("id") for entry in content["images"])
    for image_id in boxes.keys() - known.keys():
        yield Picture(file, problem=f"annotations of picture {image_id!r}, which is not listed under images")
    for entry in content["images"]:
        picture = Picture(find_picture(str(entry.get("file_name")), images, file), split=split)
        if known[entry.get("id")] > 1:
            yield replace(picture, problem=f"the id {entry.get('id')!r} belongs to {known[entry['id']]} pictures")
        else:
            yield add_coco_boxes(picture, entry, boxes.get(entry.get("id"), []), names)


def find_picture(name: str, images: Path, file: Path) -> Path:
    """A picture below `images`, or in `train2017` there for `instances_train2017.json`, or beside its annotations."""
    places = [images / name, images / "images" / name, images / file.stem.removeprefix("instances_") / name]
    return next((path for path in [*places, file.parent / name] if path.is_file()), places[0])


def load_json(file: Path) -> dict:
    """The annotation file. Raises ValueError unless it looks like COCO's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give --coco an annotation file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): export it again as COCO JSON") from error
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise ValueError(f"{file} has no list {', '.join(missing)}: export it as COCO JSON for object detection")
    if not all(isinstance(entry, dict) for part in parts for entry in content[part]):
        raise ValueError(f"{file}: images, annotations and categories hold objects in COCO JSON: export it again")
    ids = [entry.get(name) for part in parts for entry in content[part] for name in ("id", "image_id", "category_id")]
    if not all(isinstance(value, str | int | float | None) for value in ids):
        raise ValueError(f"{file}: an id is neither a number nor a text: export it again")
    if not all({"id", "name"} <= category.keys() for category in content["categories"]):
        raise ValueError(f"{file}: a category has no id or no name: export it again")
    if not content["images"]:
        raise ValueError(f"{file} lists no picture: export the pictures with their annotations")
    return content


def add_coco_boxes(picture: Picture, entry: dict, annotations: Sequence[dict], names: dict[int, str]) -> Picture:
    """The picture with its boxes; crowds (`iscrowd`) are regions, not objects, and left out."""
    size = (entry["width"], entry["height"]) if entry.get("width") and entry.get("height") else None
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    for annotation in objects:
        box, category = annotation.get("bbox"), annotation.get("category_id")
        if not is_numbers(box, 4):
            return replace(picture, problem=f"bbox {box!r} is not [x, y, width, height]")
        if category not in names:
            return replace(picture, problem=f"category_id {category!r} is not listed under categories")
    boxes = [[x, y, x + width, y + height] for x, y, width, height in (o["bbox"] for o in objects)]
    return replace(picture, boxes=boxes, labels=[str(names[o["category_id"]]) for o in objects], size=size)


def is_numbers(value: object, count: int) -> bool:
    """Whether a value is a list of so many finite numbers."""
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(isinstance(v, int | float) and math.isfinite(v) for v in value)


# YOLO


def read_yolo(folder: Path) -> list[Picture]:
    """The pictures of a folder with `data.yaml` (docs.ultralytics.com/datasets/detect). Raises ValueError."""
    file = folder if folder.suffix in (".yaml", ".yml") else folder / "data.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give --yolo a folder with data.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise ValueError(f"{file} has no names: list the classes there, `names: [cat, dog]`")
    names = content["names"]
    names = names if isinstance(names, dict) else dict(enumerate(names))
    if not all(re.fullmatch(r"\d+", str(number)) for number in names):
        raise ValueError(f"{file} has names without numbers: list the classes as `0: cat`, or as `[cat, dog]`")
    listed = {name: content[name] for name in NAMES if content.get(name)}
    places = [content.get("path") or ".", *listed.values()]
    if isinstance(places[0], list) or not all(
        isinstance(v, str) for place in places for v in (place if isinstance(place, list) else [place])
    ):
        raise ValueError(f"{file}: path, train and val are names of folders, or lists of them")
    root = file.parent / places[0]
    if not listed:
        raise ValueError(f"{file} names no folder of pictures: add `train: images/train`")
    splits = choose_splits(listed)
    found = [
        read_yolo_picture(path, {int(n): str(label) for n, label in names.items()}, split)
        for name, split in splits.items()
        for place in ([listed[name]] if isinstance(listed[name], str) else listed[name])
        for path in list_pictures(find_place(root, file.parent, place), file)
    ]
    return keep_splits(found)


def keep_splits(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures with their splits, if the source has more than one of them."""
    if len({picture.split for picture in pictures} - {None}) > 1:
        return list(pictures)
    return [replace(picture, split=None) for picture in pictures]


def find_place(root: Path, beside: Path, place: str) -> Path:
    """A folder of pictures as data.yaml names it; `../train/images`, as some exports write, is beside the file."""
    candidates = [root / place, beside / place, beside / re.sub(r"^(\.\./)+", "", place)]
    return next((path for path in candidates if path.exists()), candidates[0])


def list_pictures(place: Path, file: Path) -> list[Path]:
    """The pictures in a folder, or those that a text file lists. Raises ValueError where there is neither."""
    if place.suffix == ".txt" and place.is_file():
        return [place.parent / line for line in place.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not place.is_dir():
        raise ValueError(f"{file} names {place}, which does not exist: correct the path, or add the folder")
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)


def read_yolo_picture(path: Path, names: dict[int, str], split: str) -> Picture:
    """A picture with the lines of its text file, `class x_center y_center width height` in 0..1; none: no objects."""
    parts = path.parts
    last = max((n for n, part in enumerate(parts) if part == "images"), default=None)
    parts = parts if last is None else (*parts[:last], "labels", *parts[last + 1 :])
    file, picture = Path(*parts).with_suffix(".txt"), Picture(path, split=split, relative=True)
    boxes, labels = [], []
    for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.is_file() else [], start=1):
        try:
            category, x, y, width, height = map(float, line.split())
        except ValueError:
            if line.strip():
                return replace(picture, problem=f"{file.name}, line {number} is not `class x y width height`")
            continue
        if category not in names:
            return replace(picture, problem=f"{file.name}, line {number}: class {category:g} is beyond names")
        boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        labels.append(names[int(category)])
    return replace(picture, boxes=boxes, labels=labels)


# Pascal VOC


def read_voc(folder: Path) -> list[Picture]:
    """The pictures of a folder in the layout of Pascal VOC. Raises ValueError where there are no annotations."""
    files = sorted((folder / "Annotations").glob("*.xml")) or sorted(folder.glob("*.xml"))
    if not files:
        raise ValueError(f"{folder} holds no Annotations/*.xml: give --voc a folder in the layout of Pascal VOC")
    lists = {name: folder / "ImageSets/Main" / f"{name}.txt" for name in ("train", "val", "test")}
    stems = {
        name: [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        for name, file in lists.items()
        if file.is_file()
    }
    splits = choose_splits(stems)
    split_of = {stem: split for name, split in splits.items() for stem in stems[name]}
    passed_over = {stem for name in stems.keys() - splits.keys() for stem in stems[name]} - split_of.keys()
    return [read_voc_picture(file, folder, split_of.get(file.stem)) for file in files if file.stem not in passed_over]


def read_voc_picture(file: Path, folder: Path, split: str | None) -> Picture:
    """A picture from its XML file; corners are pixels counted from 1, and belong to the box."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        return Picture(file, problem=f"not XML ({error})")
    name = root.findtext("filename") or f"{file.stem}.jpg"
    places = [folder / "JPEGImages" / name, folder / "images" / name, file.parent / name]
    picture = Picture(next((place for place in places if place.exists()), places[0]), split=split)
    boxes, labels = [], []
    for number, entry in enumerate(root.iter("object"), start=1):
        try:
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax"))
        except (TypeError, ValueError):
            return replace(picture, problem=f"{file.name}: object {number} has no bndbox of four numbers")
        if not (label := entry.findtext("name")):
            return replace(picture, problem=f"{file.name}: object {number} has no name")
        boxes.append([x1 - 1, y1 - 1, x2, y2])
        labels.append(label)
    numbers = [root.findtext(f"size/{side}") for side in ("width", "height")]
    size = tuple(int(number) for number in numbers) if all(n and n.isdigit() and int(n) for n in numbers) else None
    return replace(picture, boxes=boxes, labels=labels, size=size)


# Folders with metadata.jsonl

CONVENTIONS = ("xywh", "xyxy", "yxyx")  # of bbox; the first two in pixels, the last in 0..1
LABEL_NAMES = ("category_name", "category", "categories", "label", "labels")


def read_imagefolder(folder: Path, convention: str) -> list[Picture]:
    """The pictures of metadata.jsonl, in the folder or in one a split. Raises ValueError where there is none."""
    files = [folder / "metadata.jsonl", *sorted(folder.glob("*/metadata.jsonl"))]
    found = [
        read_metadata_line(line, f"{file}, line {number}", file.parent, convention)
        for file in files
        if file.is_file()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{folder} holds no metadata.jsonl with lines: give --imagefolder a folder that has one")
    return keep_splits(found)


def read_metadata_line(text: str, place: str, folder: Path, convention: str) -> Picture:
    """One line of metadata.jsonl."""
    try:
        line = json.loads(text)
        picture = Picture(folder / line["file_name"], split=NAMES.get(folder.name))
        return add_objects(picture, line.get("objects") or {"bbox": []}, place, convention)
    except (ValueError, KeyError, TypeError) as error:
        return Picture(Path(place), problem=f"not an object with file_name and objects ({type(error).__name__})")


def add_objects(picture: Picture, objects: dict[str, list], place: str, convention: str) -> Picture:
    """The picture with the boxes and labels of `objects`. Raises KeyError or TypeError where it has none of these."""
    boxes, labels = objects["bbox"], next((objects[name] for name in LABEL_NAMES if name in objects), [])
    wrong = [box for box in boxes if not is_numbers(box, 4)]
    if wrong or len(labels) != len(boxes):
        return replace(
            picture, problem=f"{place}: {len(boxes)} boxes, {len(labels)} labels, not four numbers: {wrong}"
        )
    corners = [to_corners(box, convention) for box in boxes]
    return replace(picture, boxes=corners, labels=[*map(str, labels)], relative=convention == "yxyx")


def to_corners(box: Sequence[float], convention: str) -> list[float]:
    """A box in one of CONVENTIONS as `[x1, y1, x2, y2]`, in the same units."""
    a, b, c, d = box
    return {"xywh": [a, b, a + c, b + d], "xyxy": [a, b, c, d], "yxyx": [b, a, d, c]}[convention]


# Datasets of the hub


def read_hub(dataset_id: str, convention: str, limit: int | None, folder: Path) -> list[Picture]:
    """Stream the rows of a dataset; each picture is saved into `folder`. Raises ValueError."""
    try:
        dataset = load_dataset(dataset_id, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"--hub {dataset_id} is neither a folder nor, as far as the network tells, a dataset"
        ) from error
    found = []
    for name, split in choose_splits(dataset).items():
        rows = dataset[name].take(limit) if limit else dataset[name]
        if not {"image", "objects"} <= set(rows.column_names or next(iter(rows))):
            raise ValueError(f"--hub {dataset_id} has no columns image and objects, but {rows.column_names}")
        encoded, names = rows.cast_column("image", ImageFeature(decode=False)), list_names(rows.features)
        for number, row in enumerate(tqdm(encoded, desc=f"reading {name}", unit="picture")):
            found.append(save_row(row, folder / f"{name}-{number:06d}", names, convention, split))
    return keep_splits(found)


def list_names(features: Features | None) -> list[str] | None:
    """The names behind the numbers of a column of classes; None where labels are words."""
    objects = features["objects"] if features else {}
    parts = getattr(objects, "feature", objects)  # a list of objects, or an object of lists
    kinds = [getattr(parts.get(name), "feature", parts.get(name)) for name in LABEL_NAMES]
    return next((kind.names for kind in kinds if isinstance(kind, ClassLabel)), None)


def save_row(row: dict, file: Path, names: list[str] | None, convention: str, split: str) -> Picture:
    """Write the picture of a row to a file, and describe it."""
    objects = row["objects"]
    if isinstance(objects, list):
        objects = {key: [entry[key] for entry in objects] for key in objects[0]} if objects else {"bbox": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.write_bytes(read_bytes(row["image"]))
        picture = add_objects(Picture(file, split=split), objects, file.name, convention)
    except (KeyError, TypeError) as error:
        return Picture(file, problem=f"no image, or objects without bbox and labels ({type(error).__name__})")
    return replace(picture, labels=[names[int(label)] for label in picture.labels]) if names else picture


def read_bytes(encoded: dict) -> bytes:
    """The content of an undecoded image, in the row or in a file of the dataset's repository."""
    if encoded["bytes"]:
        return encoded["bytes"]
    with xopen(encoded["path"], "rb") as file:
        return file.read()


# Checking


def check(picture: Picture) -> Picture:
    """The picture with boxes in pixels, or with the problem that keeps it out. Up to a pixel outside is clamped."""
    if picture.problem:
        return picture
    try:
        with Image.open(picture.path) as image:
            stored, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
            image.draft("RGB", (256, 256))
            image.load()
    except FileNotFoundError:
        return replace(picture, problem="there is no such file")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return replace(picture, problem=f"the picture cannot be decoded ({type(error).__name__})")
    if max(stored) > LONGEST * min(stored):
        return replace(picture, problem=f"one side of {stored} pixels is more than {LONGEST} times the other")
    size = stored[::-1] if orientation >= 5 else stored
    if picture.size not in (None, size):
        turned = " as stored; it is turned by its EXIF orientation: save it upright" if picture.size == stored else ""
        return replace(picture, problem=f"its annotation is for {picture.size} pixels, it has {size}{turned}")
    scale = np.array(size * 2 if picture.relative else (1, 1, 1, 1))
    boxes = np.reshape(picture.boxes, (-1, 4)) * scale
    if problem := describe_box_problem(boxes, size):
        return replace(picture, problem=problem)
    return replace(picture, boxes=boxes.clip(0, size * 2).tolist(), size=size, relative=False)


def describe_box_problem(boxes: np.ndarray, size: tuple[int, int]) -> str | None:
    """What is wrong with boxes (n, 4) in pixels of a picture of (width, height), or None."""
    for box in boxes:
        x1, y1, x2, y2 = box
        shown = [round(float(v), 1) for v in box]
        if not np.isfinite(box).all():
            return f"box {shown} is not finite"
        if min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
            return f"box {shown} is outside of the picture of {size[0]} x {size[1]} pixels"
        if min(x2, size[0]) <= max(x1, 0) or min(y2, size[1]) <= max(y1, 0):
            return f"box {shown} has no area"
    return None


# Splitting


def split_by_group(pictures: Sequence[Picture], share: float, pattern: str | None, seed: int) -> list[Picture]:
    """Pictures with group and split; where the source gives none, about `share` of them are to evaluate on."""
    pictures = [replace(picture, group=group_of(picture, pattern)) for picture in pictures]
    open_groups = sorted({picture.group for picture in pictures if picture.split is None})
    order = np.random.default_rng(seed).permutation(len(open_groups))
    counts, wanted, held = Counter(picture.group for picture in pictures), share * len(pictures), set()
    for number in order:
        if sum(counts[group] for group in held) >= wanted:
            break
        held.add(open_groups[number])
    return [
        picture if picture.split else replace(picture, split=EVALUATION if picture.group in held else TRAIN)
        for picture in pictures
    ]


def group_of(picture: Picture, pattern: str | None) -> str:
    """What pictures that belong together have in common: part of the file name, else their content."""
    if pattern and (found := re.match(pattern, picture.path.stem)):
        return found[1] if found.groups() else found[0]
    return xxhash.xxh3_64_hexdigest(picture.path.read_bytes())


# Writing


def to_row(picture: Picture, labels: Sequence[str]) -> dict:
    """A picture as a row of the dataset; the file's bytes are kept as they are."""
    (width, height), boxes = picture.size, picture.boxes
    return {
        "image_id": picture.path.name,
        "image": {"bytes": picture.path.read_bytes(), "path": picture.path.name},
        "width": width,
        "height": height,
        "meta": {"barcode": picture.group, "off_image_id": "", "image_url": ""},
        "objects": {
            "bbox": [[y1 / height, x1 / width, y2 / height, x2 / width] for x1, y1, x2, y2 in boxes],
            "category_id": [labels.index(label) for label in picture.labels],
            "category_name": picture.labels,
        },
    }


def write_split(file: Path, pictures: Sequence[Picture], labels: Sequence[str]) -> None:
    """One Parquet file, a few rows in memory at a time; it gets its name when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".partial")
    with pyarrow.parquet.ParquetWriter(unfinished, FEATURES.arrow_schema) as writer:
        for start in tqdm(range(0, len(pictures), ROWS_AT_ONCE), desc=f"writing {file.name}"):
            rows = [to_row(picture, labels) for picture in pictures[start : start + ROWS_AT_ONCE]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
    unfinished.replace(file)


def describe_import(kept: Sequence[Picture], left_out: Sequence[Picture]) -> str:
    """What was kept of which label, and every picture that was left out with its reason."""
    lines = [f"{len(kept)} pictures kept, {len(left_out)} left out"]
    for split in (TRAIN, EVALUATION):
        pictures = [picture for picture in kept if picture.split == split]
        boxes = Counter(label for picture in pictures for label in picture.labels)
        empty = sum(not picture.labels for picture in pictures)
        counted = ", ".join(f"{count} {label}" for label, count in sorted(boxes.items())) or "no boxes"
        lines.append(f"{split}: {len(pictures)} pictures, {empty} of them without objects; boxes: {counted}")
    return "\n".join([*lines, *(f"left out: {picture.path}: {picture.problem}" for picture in left_out)])


def draw_contact_sheet(pictures: Sequence[Picture], file: Path, count: int = 16) -> None:
    """Pictures from all of the list with their boxes, labels as titles."""
    chosen = [pictures[n] for n in np.unique(np.linspace(0, len(pictures) - 1, count).astype(int))]
    images = [upright(picture.path) for picture in chosen]
    scaled = [
        [[v * image.width / picture.size[0] for v in box] for box in picture.boxes]
        for image, picture in zip(images, chosen, strict=True)
    ]
    titles = [", ".join(dict.fromkeys(picture.labels)) or "no objects" for picture in chosen]
    figure = plot_images(images, scaled, titles=titles)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def upright(path: Path, side: int = 480) -> Image.Image:
    """A small copy of a picture, turned as it is displayed."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        small = to_upright_rgb(image)
    small.thumbnail((side, side))
    return small


# The command line


def import_dataset(pictures: Sequence[Picture], options: argparse.Namespace) -> str:
    """Check, split and write the pictures; returns the report. Raises ValueError where nothing can be written."""
    checked = [check(picture) for picture in tqdm(pictures, desc="checking pictures", unit="picture")]
    left_out = [picture for picture in checked if picture.problem]
    usable = [picture for picture in checked if not picture.problem]
    kept = split_by_group(usable, options.validation, options.group, options.seed) if usable else []
    report = describe_import(kept, left_out)
    labels = sorted({label for picture in kept for label in picture.labels})
    missing = [split for split in (TRAIN, EVALUATION) if split not in {picture.split for picture in kept}]
    if missing or not labels:
        reason = f"no picture is left for {missing[0]}" if missing else "no picture has a box"
        raise ValueError(f"{reason}, nothing was written. {report}")
    for split in (TRAIN, EVALUATION):
        rows = [picture for picture in kept if picture.split == split]
        write_split(options.output / "data" / f"{split}-00000-of-00001.parquet", rows, labels)
    (options.output / "report.txt").write_text(report + "\n", encoding="utf-8")
    draw_contact_sheet(kept, options.output / "contact_sheet.png")
    return report


def read_source(options: argparse.Namespace) -> list[Picture]:
    """The pictures of the source that the options name. Raises ValueError."""
    if options.coco:
        return read_coco(options.coco, options.images)
    if options.imagefolder:
        return read_imagefolder(options.imagefolder, options.boxes)
    if options.hub:
        return read_hub(options.hub, options.boxes, options.limit, options.output / STREAMED)
    return read_yolo(options.yolo) if options.yolo else read_voc(options.voc)


def prepare_dataset(dataset_id: str, output: Path) -> str:
    """`dataset_id`, or for a folder in the layout of YOLO, COCO or Pascal VOC the dataset it becomes in `output`.

    What it became there once is taken again. Raises ValueError, also where `output` was made from something else.
    """
    folder = Path(dataset_id)
    source = ["--yolo", dataset_id] if (folder / "data.yaml").is_file() else []
    source = source or (["--voc", dataset_id] if (folder / "Annotations").is_dir() else [])
    source = source or list_annotations(folder)
    if not source:
        return dataset_id
    made, now = output / "source.json", describe_folder(folder)
    if not output.exists():
        options = build_parser().parse_args([*source, "--output", str(output)])
        print(import_dataset(read_source(options), options))
        write_json(made, now)
    if not made.exists() or json.loads(made.read_text()) != now:
        raise ValueError(f"{output} is not what {folder} is now (other files, or an interrupted import): delete it")
    return str(output)


def describe_folder(folder: Path) -> dict:
    """Where a folder is, and a hash of the names, sizes and times of its files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    about = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {"folder": str(folder.resolve()), "hash": xxhash.xxh3_64_hexdigest(json.dumps(about).encode())}


def list_annotations(folder: Path) -> list[str]:
    """The options for a folder with COCO's annotation files, `*train*.json` and `*val*.json` or one alone.

    Raises ValueError for several that cannot be told apart.
    """
    found = [*folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json"), *folder.glob("*.coco.json")]
    found = [file for file in sorted(found) if file.stem.startswith("instances")] or sorted(found)
    words = re.compile(rf"(?<![a-z])({'|'.join(sorted(NAMES, key=len, reverse=True))})(?![a-z])")
    by_split = {match[1]: file for file in found if (match := words.search(str(file.relative_to(folder))))}
    splits = {split: by_split[name] for name, split in choose_splits(by_split).items()}
    files = [splits[name] for name in (TRAIN, EVALUATION) if name in splits] or found
    if len(files) > 1 and not splits:
        raise ValueError(f"{folder} holds several annotation files: import them with --coco TRAIN.json VAL.json")
    return ["--coco", *map(str, files), "--images", str(folder)] if files else []


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco", type=Path, nargs="+", metavar="FILE", help="one annotation file, or train and val")
    source.add_argument("--yolo", type=Path, metavar="FOLDER", help="a folder with data.yaml, or that file")
    source.add_argument("--voc", type=Path, metavar="FOLDER", help="a folder with Annotations/*.xml")
    source.add_argument("--imagefolder", type=Path, metavar="FOLDER", help="a folder with metadata.jsonl")
    source.add_argument("--hub", metavar="ID", help="a dataset with the columns image and objects, or its folder")
    parser.add_argument("--boxes", choices=CONVENTIONS, help="what bbox holds in a metadata.jsonl, or on the hub")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="with --hub: of each split, in its order")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="what file_name of a COCO file is relative to")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not hold a dataset yet")
    parser.add_argument("--validation", type=float, default=0.2, help="share to evaluate on, where no split is given")
    parser.add_argument("--group", metavar="REGEX", help="names that agree in its first parenthesis stay together")
    parser.add_argument("--seed", type=int, default=42, help="of the split")
    return parser


def describe_option_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, or None."""
    if options.coco and not options.images:
        return "--coco needs --images FOLDER, the folder that holds the pictures"
    if (options.imagefolder or options.hub) and not options.boxes:
        return f"say what the numbers of bbox are: --boxes {', '.join(CONVENTIONS[:-1])} or {CONVENTIONS[-1]}"
    if options.limit is not None and (options.limit < 2 or not options.hub):
        return f"--limit {options.limit}: it belongs to --hub, and is at least 2"
    if options.coco and len(options.coco) > 2:
        return "--coco takes one file, or one to train on and one to evaluate on"
    if not 0 < options.validation < 1:
        return f"--validation {options.validation} is not a share: give a number between 0 and 1"
    if options.seed < 0:
        return f"--seed {options.seed}: give a whole number, 0 or above"
    if next(path for path in [options.output, *options.output.absolute().parents] if path.exists()).is_file():
        return f"--output {options.output} is a file, or below one: name another folder"
    if list(options.output.glob("data/*.parquet")):
        return f"--output {options.output} holds a dataset already: name another folder, or delete it"
    try:
        re.compile(options.group or "")
    except re.error as error:
        return f"--group {options.group} is not a regular expression ({error})"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if problem := describe_option_problem(options):
        parser.error(problem)
    try:
        report = import_dataset(read_source(options), options)
    except ValueError as error:
        parser.error(str(error))
    finally:
        shutil.rmtree(options.output / STREAMED, ignore_errors=True)
    print(f"{report}\nLook at {options.output / 'contact_sheet.png'}, then train with DATASET_ID={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
