"""Boxes in pixels and in the coordinates that a model family writes.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize


def box_iou(boxes: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """IoU of every box `[x1, y1, x2, y2]` with every other, (boxes, others); each has an area."""
    first, second = np.reshape(boxes, (-1, 1, 4)), np.reshape(others, (1, -1, 4))
    sides = np.minimum(first, second)[..., 2:] - np.maximum(first, second)[..., :2]
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


GRID = 1000  # the largest coordinate of a box on the grid
Box = Sequence[float]  # [x1, y1, x2, y2]
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Family:
    """How the models of a family were taught to write boxes."""

    coordinates: str  # "grid": 0..1000 in both directions; "pixels": of the image as the processor resized it
    answer: str  # "tokens": label and box between special tokens; "json": a list of bbox_2d and label


FAMILIES = {  # by `config.model_type`; from the models' cards and cookbooks (github.com/QwenLM/Qwen3-VL)
    "qwen2_vl": Family("grid", "tokens"),
    "qwen2_5_vl": Family("pixels", "json"),
    "qwen3_vl": Family("grid", "json"),
    "qwen3_vl_moe": Family("grid", "json"),
}


def get_family(model_type: str) -> Family:
    """The family by its `config.model_type`. Raises ValueError for one whose convention is not known."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"How {model_type!r} models write boxes is not known: use one whose model_type is {known}.")
    return FAMILIES[model_type]


def resized_size(width: int, height: int, factor=28, min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28) -> Size:
    """To what a Qwen-VL processor resizes an image; the defaults are those Qwen2-VL and Qwen2.5-VL came with."""
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)[::-1]


def coordinate_range(width: int, height: int, family: str, resized: Size | None) -> Size:
    """The largest x and y that models of a family write for an image of `width` x `height` pixels.

    `resized` is the size at which the model saw it; only families that write pixels need it, and None stands for
    their published pixel budget. Raises ValueError for a family whose convention is not known.
    """
    if get_family(family).coordinates == "grid":
        return GRID, GRID
    return resized or resized_size(width, height)


def to_model_coordinates(box: Box, width: int, height: int, family: str, resized: Size | None = None) -> list[int]:
    """Pixel box -> what models of `family` write: rounded, clamped to the image; see `coordinate_range`."""
    limits = coordinate_range(width, height, family, resized) * 2
    scaled = [v / size * limit for v, size, limit in zip(box, (width, height) * 2, limits, strict=True)]
    return [min(limit, max(0, round(v))) for v, limit in zip(scaled, limits, strict=True)]


def from_model_coordinates(box: Box, width: int, height: int, family: str, resized: Size | None = None) -> list[float]:
    """Box as written by a model of `family` -> pixels, clamped to the image; see `coordinate_range`."""
    limits = coordinate_range(width, height, family, resized) * 2
    clamped = [min(limit, max(0, v)) for v, limit in zip(box, limits, strict=True)]
    return [v / limit * size for v, size, limit in zip(clamped, (width, height) * 2, limits, strict=True)]


def to_grid(box: Box, width: int, height: int) -> list[int]:
    """Pixel box -> Qwen2-VL's grid, rounded, clamped to 0..1000."""
    return to_model_coordinates(box, width, height, "qwen2_vl")


def from_grid(box: Box, width: int, height: int) -> list[float]:
    """Box on Qwen2-VL's grid -> pixels of an image of `width` x `height`, clamped to it."""
    return from_model_coordinates(box, width, height, "qwen2_vl")


def has_area(box: Box) -> bool:
    """Whether a box is finite, its corners are in order, and it covers something."""
    x1, y1, x2, y2 = box
    return 0 < x2 - x1 < math.inf and 0 < y2 - y1 < math.inf


def flip_horizontally(image: Image.Image, boxes: Iterable[Box]) -> tuple[Image.Image, list[list[float]]]:
    """Mirror an image left to right, and its pixel boxes with it."""
    return ImageOps.mirror(image), [[image.width - x2, y1, image.width - x1, y2] for x1, y1, x2, y2 in boxes]
