"""Boxes in pixels and in the coordinates that a model family writes.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

GRID = 1000  # Qwen2-VL writes coordinates as integers from 0 to 1000
GRID_FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")  # values of `config.model_type`
PIXEL_FAMILIES = ("qwen2_5_vl",)


def resized_size(
    width: int, height: int, factor: int = 28, min_pixels: int = 4 * 28 * 28, max_pixels: int = 16384 * 28 * 28
) -> tuple[int, int]:
    """Width and height in pixels to which a Qwen-VL processor resizes an image: multiples of `factor`.

    The defaults are those that Qwen2-VL and Qwen2.5-VL were published with.
    """
    height, width = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return width, height


def coordinate_range(width: int, height: int, family: str, resized: tuple[int, int] | None) -> tuple[int, int]:
    """The largest x and y that models of a family write for an image of `width` x `height` pixels.

    `resized` is (width, height) as the model saw the image; None stands for the published pixel budget. Only
    families that write pixels need it. Raises ValueError for a family whose convention is not known.
    """
    if family in GRID_FAMILIES:
        return GRID, GRID
    if family in PIXEL_FAMILIES:
        return resized or resized_size(width, height)
    raise ValueError(
        f"How {family!r} models write coordinates is not known: use a model whose config.model_type is one of "
        f"{[*GRID_FAMILIES, *PIXEL_FAMILIES]}, or find its convention out and add it to one of these two lists."
    )


def to_model_coordinates(
    box: Sequence[float], width: int, height: int, family: str, resized: tuple[int, int] | None = None
) -> list[int]:
    """Pixel box `[x1, y1, x2, y2]` -> what models of `family` write: rounded, clamped to the image.

    `family` and `resized` as in `coordinate_range`, which raises ValueError.
    """
    limits = coordinate_range(width, height, family, resized) * 2
    scaled = [v / size * limit for v, size, limit in zip(box, (width, height) * 2, limits, strict=True)]
    return [min(limit, max(0, round(v))) for v, limit in zip(scaled, limits, strict=True)]


def from_model_coordinates(
    box: Sequence[float], width: int, height: int, family: str, resized: tuple[int, int] | None = None
) -> list[float]:
    """Box `[x1, y1, x2, y2]` as written by a model of `family` -> pixels, clamped to the image.

    `family` and `resized` as in `coordinate_range`, which raises ValueError.
    """
    limits = coordinate_range(width, height, family, resized) * 2
    clamped = [min(limit, max(0, v)) for v, limit in zip(box, limits, strict=True)]
    return [v / limit * size for v, size, limit in zip(clamped, (width, height) * 2, limits, strict=True)]


def to_grid(box: Sequence[float], width: int, height: int) -> list[int]:
    """Pixel box `[x1, y1, x2, y2]` -> Qwen2-VL's grid, rounded, clamped to 0..1000."""
    return to_model_coordinates(box, width, height, "qwen2_vl")


def from_grid(box: Sequence[float], width: int, height: int) -> list[float]:
    """Box `[x1, y1, x2, y2]` on Qwen2-VL's grid -> pixels of an image of `width` x `height`, clamped to it."""
    return from_model_coordinates(box, width, height, "qwen2_vl")


def has_area(box: Sequence[float]) -> bool:
    """Whether `[x1, y1, x2, y2]` is finite, its corners are in order, and it covers something."""
    x1, y1, x2, y2 = box
    return 0 < x2 - x1 < math.inf and 0 < y2 - y1 < math.inf


def flip_horizontally(image: Image.Image, boxes: Iterable[Sequence[float]]) -> tuple[Image.Image, list[list[float]]]:
    """Mirror an image left to right, and its pixel boxes `[x1, y1, x2, y2]` with it."""
    return ImageOps.mirror(image), [[image.width - x2, y1, image.width - x1, y2] for x1, y1, x2, y2 in boxes]
