"""Draws labelled pictures of food packages in the schema of the hub dataset openfoodfacts/nutrition-table-detection.

A flat label is composed of a nutrition table and other printed objects, wrapped around a package and seen by a camera
(`photographs.py`). A mask of object ids goes through the same warp, so that boxes follow the objects by themselves.

    python -m helpers.tiny.packages outputs/tiny_dataset --train 2400 --validation 128 --seed 0
"""

import argparse
import io
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from scipy import ndimage, special
from tqdm.auto import tqdm

from helpers.tiny import drawings, photographs
from helpers.tiny.drawings import Style

Box = tuple[float, float, float, float]

TABLE_LABEL = "nutrition-table"
LABELS = (
    "barcode",
    "ingredients",
    "logo",
    "brand-name",
    "recycling-mark",
    "allergen-note",
    "best-before",
    "price-table",
)
DRAW = {
    TABLE_LABEL: drawings.draw_nutrition_table,
    "barcode": drawings.draw_barcode,
    "ingredients": drawings.draw_ingredients,
    "logo": drawings.draw_logo,
    "brand-name": drawings.draw_brand_name,
    "recycling-mark": drawings.draw_recycling_mark,
    "allergen-note": drawings.draw_allergen_note,
    "best-before": drawings.draw_best_before,
    "price-table": drawings.draw_price_table,
}
# width and height as fractions of the picture's shorter side: smallest and largest
SIZES = {
    "barcode": (0.22, 0.5, 0.14, 0.34),
    "ingredients": (0.26, 0.7, 0.13, 0.4),
    "logo": (0.14, 0.36, 0.14, 0.36),
    "brand-name": (0.3, 0.8, 0.12, 0.26),
    "recycling-mark": (0.12, 0.2, 0.12, 0.2),
    "allergen-note": (0.26, 0.55, 0.12, 0.22),
    "best-before": (0.24, 0.45, 0.12, 0.2),
    "price-table": (0.26, 0.6, 0.16, 0.4),
}
PICTURE_SIZES = ((336, 448), (448, 448), (252, 448), (448, 336), (308, 448), (448, 252))
PICTURE_SHARES = (0.4, 0.17, 0.1, 0.13, 0.15, 0.05)

# extents of tables as fractions of the picture: quantiles of the hub's, a little larger because fitting loses some
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
TABLE_WIDTHS = (0.1, 0.15, 0.35, 0.53, 0.69, 0.99, 1.05)
TABLE_HEIGHTS = (0.07, 0.085, 0.32, 0.47, 0.61, 0.98, 1.05)
WIDTH_HEIGHT_CORRELATION = 0.38
FRAME_FILLING_SHARE = 0.04  # tables that are as large as the picture both ways
SEEDS_PER_SPLIT = 10**6  # pictures of one split; the next split's seeds begin after them
DATASET_CARD = """---
license: cc0-1.0
task_categories: [object-detection]
---
# Drawn food packages with labelled nutrition tables

{train} training and {validation} validation pictures in the schema of openfoodfacts/nutrition-table-detection. No
photographs: every picture was drawn by

    python -m helpers.tiny.packages FOLDER --train {train} --validation {validation} --seed {seed}

`objects.bbox` holds [y_min, x_min, y_max, x_max] as fractions of the picture. Barcodes are made up.
"""
CELL = 6  # pixels of the grid on which free places are looked for


def draw_package(seed: int) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Draw one picture.

    Returns the RGB picture (long side 448 px) and its labelled objects [(label, (x1, y1, x2, y2))] in pixels of the
    picture, nutrition tables first. The same seed gives the same pixels.
    """
    attempt, objects = 0, []
    while not any(name == TABLE_LABEL for name, _ in objects):  # once in a few hundred the only table is out of sight
        picture, objects = draw_once(np.random.default_rng([seed, attempt]))
        attempt += 1
    return picture, objects


def draw_once(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """One picture and its labelled objects, as `draw_package` returns them; there may be no table among them."""
    size = PICTURE_SIZES[rng.choice(len(PICTURE_SIZES), p=PICTURE_SHARES)]
    tables = table_sizes(rng, size)
    view = photographs.choose_view(rng, size, tables)
    style = choose_style(rng)
    label = photographs.draw_surface(rng, view.label_size, style)
    ids, names = place_objects(rng, label, view, style, size, tables)
    picture, seen = photographs.photograph(rng, label, ids, view, size, style)
    return picture, labelled_boxes(seen, visible_shares(ids, view, size), names)


def choose_style(rng: np.random.Generator) -> Style:
    """Colours, font and language of one package: light papers most often, then kraft, dark and colourful ones."""
    chance = rng.random()
    light = tuple(int(v) for v in rng.integers(222, 256, 3))
    kraft = drawings.mix((196, 160, 118), (228, 205, 170), rng.random())
    dark = tuple(int(v) for v in rng.integers(5, 60, 3))
    paper = light if chance < 0.36 else kraft if chance < 0.43 else dark if chance < 0.55 else drawings.vivid(rng)
    ink = drawings.ink_on(rng, paper)
    face, language = drawings.pick(rng, drawings.REGULAR), drawings.pick(rng, drawings.LANGUAGES)
    return Style(paper, ink, drawings.vivid(rng), face, language)


def table_sizes(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Wanted extents in the picture (width, height in pixels) of 1 to 3 tables, after the hub's quantiles."""
    count = int(rng.choice([1, 2, 3], p=[0.96, 0.03, 0.01]))
    first, second = rng.standard_normal(2)
    second = WIDTH_HEIGHT_CORRELATION * first + (1 - WIDTH_HEIGHT_CORRELATION**2) ** 0.5 * second
    width = np.interp(special.ndtr(first), QUANTILES, TABLE_WIDTHS) * size[0]
    height = np.interp(special.ndtr(second), QUANTILES, TABLE_HEIGHTS) * size[1]
    if rng.random() < FRAME_FILLING_SHARE:
        width, height = rng.uniform(0.98, 1.2) * size[0], rng.uniform(0.98, 1.2) * size[1]
    if count > 1:
        width, height = min(width, size[0] * 0.42), min(height, size[1] * 0.38)
    return [(width, height)] * count


def flat_size(wanted: tuple[float, float], angle: float) -> tuple[int, int]:
    """Size of a rectangle whose extent is `wanted` (width, height) after a rotation by `angle` radians."""
    cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
    width = (wanted[0] * cos - wanted[1] * sin) / (cos**2 - sin**2)
    height = (wanted[1] * cos - wanted[0] * sin) / (cos**2 - sin**2)
    return max(int(width), int(wanted[0] * 0.55), 24), max(int(height), int(wanted[1] * 0.55), 20)


def draw_patch(rng, label: str, size: tuple[int, int], style: Style) -> Image.Image:
    """One object inside `size`; drawn larger first where it is small, so that its letters stay letters."""
    scale = float(np.clip(300 / max(size), 1, 2.5))
    patch = DRAW[label](rng, (int(size[0] * scale), int(size[1] * scale)), style)
    return drawings.fit(patch, size, 1.5 if label == TABLE_LABEL else 1.3)


def place_objects(rng, label, view, style, size, tables) -> tuple[Image.Image, list[str]]:
    """Paste everything that is printed onto `label` (changed in place); the mask of ids and the name of each id."""
    ids, names = Image.new("L", label.size, 0), []
    taken = photographs.hidden_cells(view, size, CELL)
    for index, wanted in enumerate(tables):
        patch = draw_patch(rng, TABLE_LABEL, flat_size(wanted, view.angle), style)
        corner = table_corner(rng, view, size, patch.size, taken if index else None)
        if corner:
            paste(label, ids, patch, corner, taken, names, TABLE_LABEL, style)
            if rng.random() < 0.6:
                align_texts(rng, label, ids, taken, names, style, (*corner, *patch.size))
    short = min(size)
    wanted = [name for name in rng.permutation(LABELS)[: int(rng.integers(3, 9))] if name not in names]
    for name in wanted:
        low_w, high_w, low_h, high_h = (value * short for value in SIZES[name])
        slot = (int(rng.uniform(low_w, high_w)), int(rng.uniform(low_h, high_h)))
        add_object(rng, label, ids, taken, names, style, str(name), slot, (low_w, low_h))
    clutter(rng, label, taken, style, short)
    return ids, names


def add_object(rng, label, ids, taken, names, style, name, slot, smallest) -> None:
    """Paste one object where there is room, at most twice made smaller; without room it is left out."""
    for _ in range(3):
        corner = free_corner(rng, taken, slot)
        if corner:
            return paste(label, ids, draw_patch(rng, name, slot, style), corner, taken, names, name, style)
        slot = (int(max(slot[0] * 0.75, smallest[0])), int(max(slot[1] * 0.75, smallest[1])))
    return None


def table_corner(rng, view, size, patch_size, taken) -> tuple[int, int] | None:
    """Upper left corner on the label for a table: inside the picture, rarely a little over its edge."""
    if taken is not None:
        return free_corner(rng, taken, patch_size)
    spare = [max(size[k] - patch_size[k], 0) / 2 + (8 if rng.random() < 0.1 else 0) for k in (0, 1)]
    middle = [[size[k] / 2 + rng.uniform(-1, 1) * spare[k] * rng.uniform(0.4, 1) for k in (0, 1)]]
    x, y = photographs.to_label(view, np.array(middle))[0]
    corner = [int(v - patch_size[k] / 2) for k, v in enumerate((x, y))]
    return tuple(int(np.clip(c, 2, max(view.label_size[k] - patch_size[k] - 2, 2))) for k, c in enumerate(corner))


def free_corner(rng, taken: np.ndarray, size: tuple[int, int]) -> tuple[int, int] | None:
    """Upper left corner of a free rectangle of `size` (width, height), or None; `taken` is a grid of CELL pixels."""
    across, down = -(-size[0] // CELL) + 1, -(-size[1] // CELL) + 1
    if across >= taken.shape[1] or down >= taken.shape[0]:
        return None
    sums = np.pad(taken.cumsum(0, dtype=np.int32).cumsum(1), ((1, 0), (1, 0)))
    inside = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
    rows, columns = np.nonzero(inside == 0)
    if len(rows) == 0:
        return None
    # printers align: half of the time take the topmost, leftmost or rightmost place instead of any
    order = (rng.random(len(rows)), rows, columns, -columns, rows, -rows)[int(rng.integers(6))]
    best = int(np.argmin(order))
    return int(columns[best]) * CELL + CELL // 2, int(rows[best]) * CELL + CELL // 2


def align_texts(rng, label, ids, taken, names, style, table) -> None:
    """Set text close to the table (x, y, width, height) and flush with it, as printers do: above, below, beside."""
    x, y, width, height = table
    gap, tall, wide = int(rng.integers(3, 16)), int(rng.uniform(28, 110)), int(rng.uniform(50, 160))
    above, below = (x, y - gap - tall, width, tall), (x, y + height + gap, width, tall)
    left, right = (x - gap - wide, y, wide, height), (x + width + gap, y, wide, height)
    for place in rng.permutation([above, below, left, right])[: int(rng.integers(1, 5))].tolist():
        rectangle = (place[0], place[1], place[0] + place[2], place[1] + place[3])
        if not is_free(taken, rectangle) or min(place[2:]) < 24:
            continue
        if "ingredients" not in names and rng.random() < 0.6:
            patch = draw_patch(rng, "ingredients", tuple(place[2:]), style)
            paste(label, ids, patch, tuple(place[:2]), taken, names, "ingredients", style)
        else:
            patch = drawings.draw_text_block(rng, tuple(place[2:]), style)
            label.paste(patch, tuple(place[:2]), patch)
            occupy(taken, rectangle)


def is_free(taken: np.ndarray, rectangle: tuple[int, int, int, int]) -> bool:
    """Whether a rectangle (x1, y1, x2, y2 in pixels) lies on the label, is seen, and touches nothing."""
    x1, y1, x2, y2 = (v // CELL for v in rectangle)
    inside = x1 >= 0 and y1 >= 0 and y2 < taken.shape[0] and x2 < taken.shape[1]
    # the outer cells may be shared with the neighbour that the text is set close to
    return inside and not taken[y1 + 1 : y2, x1 + 1 : x2].any()


def paste(label, ids, patch, corner, taken, names, name, style) -> None:
    """Put a patch on the label, its rectangle into the mask, and its cells into `taken`."""
    rectangle = (*corner, corner[0] + patch.width, corner[1] + patch.height)
    below = label.crop(rectangle).resize((1, 1), Image.BOX).getpixel((0, 0))
    if abs(drawings.luminance(below) - drawings.luminance(style.ink)) < 70:
        label.paste(style.paper, rectangle)  # ink could not be read on this part of the artwork
    label.paste(patch, corner, patch)
    names.append(name)
    ids.paste(len(names), rectangle)
    occupy(taken, rectangle)


def occupy(taken: np.ndarray, rectangle: tuple[int, int, int, int]) -> None:
    """Mark the cells of a rectangle (x1, y1, x2, y2 in pixels)."""
    x1, y1, x2, y2 = (max(v // CELL, 0) for v in rectangle)
    taken[y1 : y2 + 1, x1 : x2 + 1] = True


def clutter(rng, label, taken, style, short) -> None:
    """Print unlabelled things into the room that is left."""
    kinds = (drawings.draw_text_block, drawings.draw_badge, drawings.draw_food_picture, drawings.draw_text_block)
    for _ in range(int(rng.integers(1, 8))):
        slot = (int(rng.uniform(0.12, 0.5) * short), int(rng.uniform(0.06, 0.3) * short))
        corner = free_corner(rng, taken, slot)
        if corner:
            patch = drawings.pick(rng, kinds)(rng, slot, style)
            label.paste(patch, corner, patch)
            occupy(taken, (*corner, corner[0] + slot[0], corner[1] + slot[1]))


def visible_shares(ids: Image.Image, view, size: tuple[int, int]) -> np.ndarray:
    """Share of each id's area that lies in the picture, by id (entry 0 is the background)."""
    step, reach = 6, 0.6
    xs = np.arange(-reach * size[0], (1 + reach) * size[0], step)
    ys = np.arange(-reach * size[1], (1 + reach) * size[1], step)
    points = np.stack(np.meshgrid(xs, ys), -1)
    spots = np.floor(photographs.to_label(view, points.reshape(-1, 2))).astype(int)
    on_label = ((spots >= 0) & (spots < ids.size)).all(1)
    found = np.where(on_label, np.asarray(ids)[tuple(np.clip(spots, 0, np.array(ids.size) - 1).T[::-1])], 0)
    inside = ((points >= 0) & (points < size)).all(-1).reshape(-1)
    everywhere = np.bincount(found, minlength=256)
    return np.bincount(found[inside], minlength=256) / np.maximum(everywhere, 1)


def labelled_boxes(seen: np.ndarray, shares: np.ndarray, names: list[str]) -> list[tuple[str, Box]]:
    """Extent of each id in the mask `seen`, less what is too small or too far outside the picture to be found."""
    objects, least = [], 0.07 * max(seen.shape)
    for index, (name, found) in enumerate(zip(names, ndimage.find_objects(seen, len(names)), strict=True), start=1):
        if found is None:
            continue
        (y1, y2), (x1, x2) = ((part.start, part.stop) for part in found)
        found_easily = min(y2 - y1, x2 - x1) >= least and shares[index] >= 0.65
        if shares[index] >= 0.6 if name == TABLE_LABEL else found_easily:
            objects.append((name, (float(x1), float(y1), float(x2), float(y2))))
    return objects


# ---- the dataset folder --------------------------------------------------------------------------------------------

FEATURES = Features(
    {
        "image_id": Value("string"),
        "image": ImageFeature(),
        "width": Value("int64"),
        "height": Value("int64"),
        "meta": {"barcode": Value("string"), "off_image_id": Value("string"), "image_url": Value("string")},
        "objects": {
            "bbox": List(List(Value("float32"))),
            "category_id": List(Value("int64")),
            "category_name": List(Value("string")),
        },
    }
)


def dataset_row(seed: int) -> dict:
    """One row of the hub's schema; `seed` also makes the barcode, so that no two rows share one."""
    picture, objects = draw_package(seed)
    rng = np.random.default_rng([seed, 1])
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(60, 93)))
    width, height = picture.size
    boxes = [box for label, box in objects if label == TABLE_LABEL]
    bbox = [[y1 / height, x1 / width, y2 / height, x2 / width] for x1, y1, x2, y2 in boxes]
    barcode = drawings.with_check_digit(f"{2 * 10**11 + seed:012d}")
    return {
        "image_id": f"{barcode}_1",
        "image": {"bytes": buffer.getvalue(), "path": f"{barcode}_1.jpg"},
        "width": width,
        "height": height,
        "meta": {"barcode": barcode, "off_image_id": "1", "image_url": ""},
        "objects": {"bbox": bbox, "category_id": [0] * len(boxes), "category_name": [TABLE_LABEL] * len(boxes)},
    }


def write_split(path: Path, seeds: range, workers: int) -> None:
    """Draw one parquet file with `workers` processes; it gets its name when it is whole."""
    progress = partial(tqdm, total=len(seeds), desc=path.name, unit="picture")
    if workers == 1:
        rows = list(progress(map(dataset_row, seeds)))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            rows = list(progress(pool.map(dataset_row, seeds, chunksize=4)))
    partial_file = path.with_suffix(".partial")
    Dataset.from_list(rows, features=FEATURES).to_parquet(partial_file)
    partial_file.replace(path)


def draw_dataset(folder: Path, train: int, validation: int, seed: int = 0) -> None:
    """Draw `train` + `validation` pictures into `folder`, which `datasets.load_dataset` then reads like the hub's.

    Picture k of a seed is the same however many pictures or processes there are; the two splits share none.
    """
    if train < 1 or validation < 1 or seed < 0:
        raise ValueError(
            f"train and validation must be at least 1 and seed at least 0, got {train}, {validation}, {seed}"
        )
    if max(train, validation) > SEEDS_PER_SPLIT:
        raise ValueError(f"at most {SEEDS_PER_SPLIT} pictures a split, got {train} and {validation}")
    data = Path(folder) / "data"
    data.mkdir(parents=True, exist_ok=True)
    for index, (name, count) in enumerate((("train", train), ("val", validation))):
        first = (2 * seed + index) * SEEDS_PER_SPLIT
        workers = min(os.cpu_count() or 1, count // 8 + 1)  # a process takes seconds to start
        write_split(data / f"{name}-00000-of-00001.parquet", range(first, first + count), workers)
    card = DATASET_CARD.format(train=train, validation=validation, seed=seed)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw a dataset of food packages with labelled nutrition tables.")
    parser.add_argument("folder", type=Path, help="where to write data/*.parquet and README.md")
    parser.add_argument("--train", type=int, default=600, help="number of training pictures")
    parser.add_argument("--validation", type=int, default=128, help="number of validation pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures")
    options = parser.parse_args()
    draw_dataset(options.folder, options.train, options.validation, options.seed)


if __name__ == "__main__":
    main()
