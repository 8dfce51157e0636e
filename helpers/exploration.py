"""What a detection dataset holds: sizes, places, copies, doubtful labels.

Printed from notebooks/01_dataset_exploration.py: edit that, then run `make sync`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from helpers.data import open_encoded, read_barcodes, read_headers


def describe_images(rows: Dataset) -> pd.DataFrame:
    """One line per image: size when upright (pixels), EXIF orientation (1: stored upright), boxes, barcode, id."""
    boxes = [len(objects["bbox"]) for objects in rows["objects"]]
    others = {"boxes": boxes, "barcode": read_barcodes(rows), "image_id": list(rows["image_id"])}
    return pd.DataFrame(read_headers(rows), columns=["width", "height", "orientation"]).assign(**others)


def add_shapes(boxes: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """`describe_boxes` with width and height as fractions of the image, and `aspect` as displayed (width / height)."""
    width, height = boxes.x2 - boxes.x1, boxes.y2 - boxes.y1
    shape_of_image = (images.width / images.height).loc[boxes.image].to_numpy()
    return boxes.assign(width=width, height=height, aspect=width / height * shape_of_image)


def cover_map(boxes: pd.DataFrame, cells: int = 50) -> np.ndarray:
    """Share of the boxes that cover each of `cells` x `cells` points of the image, rows from top to bottom."""
    points = (np.arange(cells) + 0.5) / cells
    inside_x = (boxes.x1.to_numpy()[:, None] <= points) & (points < boxes.x2.to_numpy()[:, None])
    inside_y = (boxes.y1.to_numpy()[:, None] <= points) & (points < boxes.y2.to_numpy()[:, None])
    return np.einsum("ny,nx->yx", inside_y.astype(float), inside_x.astype(float)) / len(boxes)


def count_shared_barcodes(barcodes: dict[str, Sequence[str | None]]) -> pd.DataFrame:
    """Barcodes that each two splits share; on the diagonal those with several images in the split itself."""
    counts = {split: pd.Series(values, dtype=object).dropna().value_counts() for split, values in barcodes.items()}
    table = pd.DataFrame(0, index=list(counts), columns=list(counts))
    for one in counts:
        for other in counts:
            shared = (
                counts[one][counts[one] > 1] if one == other else counts[one].index.intersection(counts[other].index)
            )
            table.loc[one, other] = len(shared)
    return table


def hash_image(image: Image.Image) -> np.ndarray:
    """Difference hash of the upright image: 64 bits that change little when it is scaled, brightened, compressed."""
    small = ImageOps.exif_transpose(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=int)
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def hash_images(rows: Dataset) -> np.ndarray:
    """`hash_image` of every row, (rows, 64). JPEGs are unpacked at a fraction of their size, which is faster."""
    hashes = []
    for row in rows.select_columns("image").cast_column("image", ImageFeature(decode=False)):
        image = open_encoded(row["image"])
        image.draft("RGB", (72, 64))
        hashes.append(hash_image(image))
    return np.array(hashes).reshape(-1, 64)


def find_near_duplicates(hashes: np.ndarray, limit: int) -> pd.DataFrame:
    """Pairs `one` < `other` of images whose hashes differ in at most `limit` bits, nearest first."""
    signs = hashes * 2.0 - 1
    distances = ((64 - signs @ signs.T) / 2).round().astype(int)
    one, other = np.where(np.triu(distances <= limit, k=1))
    pairs = pd.DataFrame({"one": one, "other": other, "bits": distances[one, other]})
    return pairs.sort_values("bits", kind="stable", ignore_index=True)


def find_overlaps(boxes: pd.DataFrame, limit: float = 0.5) -> pd.DataFrame:
    """Pairs of boxes in one image, by their index in `boxes`, of which more than `limit` of the smaller is covered."""
    lines = []
    for _, group in boxes[boxes.duplicated("image", keep=False)].groupby("image"):
        corners = group[["x1", "y1", "x2", "y2"]].to_numpy()
        low, high = np.maximum(corners[:, None, :2], corners[:, :2]), np.minimum(corners[:, None, 2:], corners[:, 2:])
        area = group.area.to_numpy()
        covered = np.clip(high - low, 0, None).prod(axis=2) / np.minimum(area[:, None], area)
        for i, j in zip(*np.where(np.triu(covered > limit, k=1)), strict=True):
            lines.append({"one": group.index[i], "other": group.index[j], "covered": covered[i, j]})
    return pd.DataFrame(lines, columns=["one", "other", "covered"])


def is_unusual(values: pd.Series, limit: float = 4.0) -> pd.Series:
    """Whether a logarithm is over `limit` robust standard deviations (of the median) away from the median."""
    away = (np.log(values) - np.log(values).median()).abs()
    return away > limit * 1.4826 * away.median()


def find_doubtful_boxes(boxes: pd.DataFrame, edge: float = 0.003) -> pd.DataFrame:
    """One line per box of `add_shapes` and reason to look at it: `box` (its index), `image`, `reason`.

    A side within `edge` of the image's border touches it.
    """
    touched = (boxes[["x1", "y1"]] <= edge).sum(axis=1) + (boxes[["x2", "y2"]] >= 1 - edge).sum(axis=1)
    overlapping = find_overlaps(boxes)
    by_category = boxes.groupby("category")
    reasons = {
        "under 1 % of the image": boxes.area < 0.01,
        "the whole image": boxes.area > 0.97,
        "touches 2 or 3 borders": (touched >= 2) & (touched <= 3) & (boxes.area <= 0.97),
        "over 6 times as long as wide": np.maximum(boxes.aspect, 1 / boxes.aspect) > 6,
        "over half of it in another box": boxes.index.isin([*overlapping.one, *overlapping.other]),
        "unusual size for its label": by_category.area.transform(is_unusual),
        "unusual shape for its label": by_category.aspect.transform(is_unusual),
    }
    found = [boxes.loc[mask, ["image"]].assign(reason=reason) for reason, mask in reasons.items()]
    return pd.concat(found).rename_axis("box").reset_index()
