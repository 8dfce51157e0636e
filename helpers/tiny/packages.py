"""Draws labelled pictures of food packages in the schema of the hub dataset openfoodfacts/nutrition-table-detection.

A label is printed with a nutrition table and other objects (`surface.py`), wrapped around a package and seen by a
camera (`views.py`, `photographs.py`). A mask of object ids goes through the same warp, so that boxes follow the
objects by themselves.

    python -m helpers.tiny.packages outputs/tiny_dataset --train 2400 --validation 128 --seed 0
"""

import argparse
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from numpy.random import Generator
from PIL import Image
from scipy import ndimage, special
from tqdm.auto import tqdm

from helpers.tiny import marks, tables, texts
from helpers.tiny.colors import as_color, ink_on, mix, vivid
from helpers.tiny.photographs import photograph
from helpers.tiny.printing import BOLD, SANS, Box, Point, Size, Style, fit, pick
from helpers.tiny.surface import Corner, Rectangle, Surface
from helpers.tiny.views import View, choose_view, to_label, visible_shares

Objects = list[tuple[str, Box]]  # label and box of each object, pixels of the picture

TABLE_LABEL = "nutrition-table"
# what draws an object; its smallest and largest width and height as fractions of the picture's shorter side
OBJECTS = {
    "barcode": (marks.draw_barcode, (0.22, 0.5), (0.14, 0.34)),
    "ingredients": (texts.draw_ingredients, (0.26, 0.7), (0.13, 0.4)),
    "logo": (marks.draw_logo, (0.14, 0.36), (0.14, 0.36)),
    "brand-name": (texts.draw_brand_name, (0.3, 0.8), (0.12, 0.26)),
    "recycling-mark": (marks.draw_recycling_mark, (0.12, 0.2), (0.12, 0.2)),
    "allergen-note": (texts.draw_allergen_note, (0.26, 0.55), (0.12, 0.22)),
    "best-before": (texts.draw_best_before, (0.24, 0.45), (0.12, 0.2)),
    "price-table": (tables.draw_price_table, (0.26, 0.6), (0.16, 0.4)),
}
LABELS = tuple(OBJECTS)  # in this order: `rng.permutation` depends on it
CLUTTER = (texts.draw_text_block, marks.draw_badge, marks.draw_food_picture, texts.draw_text_block)
FACES = (SANS, SANS, *BOLD)  # half of the packages are printed with the first
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
# Drawn food packages with labelled objects

{train} training and {validation} validation pictures in the schema of openfoodfacts/nutrition-table-detection. No
photographs: every picture was drawn by

    python -m helpers.tiny.packages FOLDER --train {train} --validation {validation} --seed {seed} --labels {labels}

`objects.bbox` holds [y_min, x_min, y_max, x_max] as fractions of the picture. Barcodes are made up.
"""


def draw_package(seed: int) -> tuple[Image.Image, Objects]:
    """Draw one picture.

    Returns the RGB picture (long side 448 px) and its labelled objects [(label, (x1, y1, x2, y2))] in pixels of the
    picture, nutrition tables first. The same seed gives the same pixels.
    """
    attempt, objects = 0, []
    while not any(name == TABLE_LABEL for name, _ in objects):  # once in a few hundred the only table is out of sight
        picture, objects = draw_once(np.random.default_rng([seed, attempt]))
        attempt += 1
    return picture, objects


def draw_once(rng: Generator) -> tuple[Image.Image, Objects]:
    """One picture and its labelled objects, as `draw_package` returns them; there may be no table among them."""
    size = PICTURE_SIZES[rng.choice(len(PICTURE_SIZES), p=PICTURE_SHARES)]
    wanted = table_sizes(rng, size)
    view = choose_view(rng, size, wanted)
    surface = Surface(rng, view, choose_style(rng))
    print_tables(surface, view, wanted)
    print_objects(surface, min(size))
    print_clutter(surface, min(size))
    picture, seen = photograph(surface, view)
    return picture, labelled_boxes(seen, visible_shares(view, surface.ids), surface.names)


def choose_style(rng: Generator) -> Style:
    """Colours, font and language of one package: light papers most often, then kraft, dark and colourful ones."""
    chance = rng.random()
    light = as_color(rng.integers(222, 256, 3))
    kraft = mix((196, 160, 118), (228, 205, 170), rng.random())
    dark = as_color(rng.integers(5, 60, 3))
    paper = light if chance < 0.36 else kraft if chance < 0.43 else dark if chance < 0.55 else vivid(rng)
    ink = ink_on(rng, paper)
    face, language = pick(rng, FACES), pick(rng, texts.LANGUAGES)
    return Style(paper, ink, vivid(rng), face, language)


# ---- what is printed where -----------------------------------------------------------------------------------------


def table_sizes(rng: Generator, size: Size) -> list[Point]:
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


def flat_size(wanted: Point, angle: float) -> Size:
    """Size of a rectangle whose extent is `wanted` (width, height) after a rotation by `angle` radians."""
    cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
    width = (wanted[0] * cos - wanted[1] * sin) / (cos**2 - sin**2)
    height = (wanted[1] * cos - wanted[0] * sin) / (cos**2 - sin**2)
    return max(int(width), int(wanted[0] * 0.55), 24), max(int(height), int(wanted[1] * 0.55), 20)


def draw_patch(rng: Generator, label: str, size: Size, style: Style) -> Image.Image:
    """One object inside `size`; drawn larger first where it is small, so that its letters stay letters."""
    draw = tables.draw_nutrition_table if label == TABLE_LABEL else OBJECTS[label][0]
    scale = float(np.clip(300 / max(size), 1, 2.5))
    patch = draw(rng, (int(size[0] * scale), int(size[1] * scale)), style)
    return fit(patch, size, 1.5 if label == TABLE_LABEL else 1.3)


def print_tables(surface: Surface, view: View, wanted: list[Point]) -> None:
    """Print nutrition tables of the `wanted` extents: the first where the camera looks, others where there is room."""
    for extent in wanted:
        patch = draw_patch(surface.rng, TABLE_LABEL, flat_size(extent, view.angle), surface.style)
        corner = surface.free_corner(patch.size) if surface.names else central_corner(surface.rng, view, patch.size)
        if corner:
            surface.place(patch, corner, TABLE_LABEL)
            if surface.rng.random() < 0.6:
                align_texts(surface, (*corner, *patch.size))


def central_corner(rng: Generator, view: View, patch_size: Size) -> Corner:
    """Upper left corner on the label for a table: inside the picture, rarely a little over its edge."""
    size = view.size
    spare = [max(size[k] - patch_size[k], 0) / 2 + (8 if rng.random() < 0.1 else 0) for k in (0, 1)]
    middle = [[size[k] / 2 + rng.uniform(-1, 1) * spare[k] * rng.uniform(0.4, 1) for k in (0, 1)]]
    corner = [int(v - patch_size[k] / 2) for k, v in enumerate(to_label(view, np.array(middle))[0])]
    return tuple(int(np.clip(c, 2, max(view.label_size[k] - patch_size[k] - 2, 2))) for k, c in enumerate(corner))


def align_texts(surface: Surface, table: Rectangle) -> None:
    """Set text close to the table (x, y, width, height) and flush with it, as printers do: above, below, beside."""
    rng, style, (x, y, width, height) = surface.rng, surface.style, table
    gap, tall, wide = int(rng.integers(3, 16)), int(rng.uniform(28, 110)), int(rng.uniform(50, 160))
    above, below = (x, y - gap - tall, width, tall), (x, y + height + gap, width, tall)
    left, right = (x - gap - wide, y, wide, height), (x + width + gap, y, wide, height)
    for x, y, width, height in rng.permutation([above, below, left, right])[: int(rng.integers(1, 5))].tolist():
        if min(width, height) < 24 or not surface.is_free((x, y, x + width, y + height)):
            continue
        if "ingredients" not in surface.names and rng.random() < 0.6:
            surface.place(draw_patch(rng, "ingredients", (width, height), style), (x, y), "ingredients")
        else:
            surface.place(texts.draw_text_block(rng, (width, height), style), (x, y))


def print_objects(surface: Surface, short: int) -> None:
    """Print some of the other labelled objects; `short` is the picture's shorter side."""
    chosen = surface.rng.permutation(LABELS)[: int(surface.rng.integers(3, 9))].tolist()
    for name in [name for name in chosen if name not in surface.names]:
        print_object(surface, name, short)


def print_object(surface: Surface, name: str, short: int) -> None:
    """Print one object where there is room, at most twice made smaller; without room it is left out."""
    ranges = [[low * short, high * short] for low, high in OBJECTS[name][1:]]
    slot = tuple(int(surface.rng.uniform(low, high)) for low, high in ranges)
    for _ in range(3):
        corner = surface.free_corner(slot)
        if corner:
            surface.place(draw_patch(surface.rng, name, slot, surface.style), corner, name)
            return
        slot = tuple(int(max(side * 0.75, low)) for side, (low, _) in zip(slot, ranges, strict=True))


def print_clutter(surface: Surface, short: int) -> None:
    """Print unlabelled things into the room that is left."""
    rng = surface.rng
    for _ in range(int(rng.integers(1, 8))):
        slot = (int(rng.uniform(0.12, 0.5) * short), int(rng.uniform(0.06, 0.3) * short))
        corner = surface.free_corner(slot)
        if corner:
            surface.place(pick(rng, CLUTTER)(rng, slot, surface.style), corner)


def labelled_boxes(seen: np.ndarray, shares: np.ndarray, names: list[str]) -> Objects:
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

TEXT, NUMBER, FRACTION = Value("string"), Value("int64"), Value("float32")
FEATURES = Features(
    {
        "image_id": TEXT,
        "image": ImageFeature(),
        "width": NUMBER,
        "height": NUMBER,
        "meta": {"barcode": TEXT, "off_image_id": TEXT, "image_url": TEXT},
        "objects": {"bbox": List(List(FRACTION)), "category_id": List(NUMBER), "category_name": List(TEXT)},
    }
)


def dataset_row(seed: int, labels: Sequence[str]) -> dict:
    """One row of the hub's schema, with boxes of these labels; `seed` also makes the barcode, which is its own."""
    picture, objects = draw_package(seed)
    rng = np.random.default_rng([seed, 1])
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(60, 93)))
    width, height = picture.size
    objects = [(label, box) for label, box in objects if label in labels]
    bbox = [[y1 / height, x1 / width, y2 / height, x2 / width] for _, (x1, y1, x2, y2) in objects]
    names = [label for label, _ in objects]
    barcode = marks.with_check_digit(f"{2 * 10**11 + seed:012d}")
    return {
        "image_id": f"{barcode}_1",
        "image": {"bytes": buffer.getvalue(), "path": f"{barcode}_1.jpg"},
        "width": width,
        "height": height,
        "meta": {"barcode": barcode, "off_image_id": "1", "image_url": ""},
        "objects": {"bbox": bbox, "category_id": [*map(labels.index, names)], "category_name": names},
    }


def write_split(path: Path, seeds: range, labels: Sequence[str], spread: Callable) -> None:
    """Draw one parquet file; it gets its name when it is whole. `spread` is `map`, or that of a pool of processes."""
    pictures = spread(partial(dataset_row, labels=labels), seeds)
    rows = list(tqdm(pictures, total=len(seeds), desc=path.name, unit="picture"))
    partial_file = path.with_suffix(".partial")
    Dataset.from_list(rows, features=FEATURES).to_parquet(partial_file)
    partial_file.replace(path)


def draw_dataset(folder: Path, train: int, validation: int, seed: int = 0, labels=(TABLE_LABEL,)) -> None:
    """Draw `train` + `validation` pictures into `folder`, which `datasets.load_dataset` then reads like the hub's.

    `labels` are any of LABELS and TABLE_LABEL; a table is on every picture, the others are not. Picture k of a seed is
    the same however many pictures or processes there are; the two splits share none.
    """
    if train < 1 or validation < 1 or seed < 0:
        raise ValueError(f"train and validation must be at least 1, seed at least 0: {train}, {validation}, {seed}")
    if max(train, validation) > SEEDS_PER_SPLIT:
        raise ValueError(f"at most {SEEDS_PER_SPLIT} pictures a split, got {train} and {validation}")
    data = Path(folder) / "data"
    data.mkdir(parents=True, exist_ok=True)
    workers = min(os.cpu_count() or 1, train // 8 + 1)  # a process takes seconds to start
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext() as pool:
        for index, (name, count) in enumerate((("train", train), ("val", validation))):
            first = (2 * seed + index) * SEEDS_PER_SPLIT
            spread = partial(pool.map, chunksize=4) if pool else map
            write_split(data / f"{name}-00000-of-00001.parquet", range(first, first + count), labels, spread)
    card = DATASET_CARD.format(train=train, validation=validation, seed=seed, labels=" ".join(labels))
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw a dataset of food packages with labelled nutrition tables.")
    parser.add_argument("folder", type=Path, help="where to write data/*.parquet and README.md")
    parser.add_argument("--train", type=int, default=600, help="number of training pictures")
    parser.add_argument("--validation", type=int, default=128, help="number of validation pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures")
    kinds = (TABLE_LABEL, *LABELS)
    parser.add_argument("--labels", nargs="+", choices=kinds, default=[TABLE_LABEL], help="objects that get boxes")
    options = parser.parse_args()
    draw_dataset(options.folder, options.train, options.validation, options.seed, options.labels)


if __name__ == "__main__":
    main()
