"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageOps

GRID = 1000  # Qwen2-VL writes coordinates as integers from 0 to 1000


def to_grid(box: Sequence[float], width: int, height: int) -> list[int]:
    """Pixel box `[x1, y1, x2, y2]` -> Qwen2-VL's grid, rounded, clamped to 0..1000."""
    return [min(GRID, max(0, round(v / size * GRID))) for v, size in zip(box, (width, height) * 2, strict=True)]


def from_grid(box: Sequence[float], width: int, height: int) -> list[float]:
    """Box `[x1, y1, x2, y2]` on Qwen2-VL's grid -> pixels of a picture of `width` x `height`."""
    return [v / GRID * size for v, size in zip(box, (width, height) * 2, strict=True)]


def flip_horizontally(image: Image.Image, boxes: Iterable[Sequence[float]]) -> tuple[Image.Image, list[list[float]]]:
    """Mirror a picture left to right, and its pixel boxes `[x1, y1, x2, y2]` with it."""
    return ImageOps.mirror(image), [[image.width - x2, y1, image.width - x1, y2] for x1, y1, x2, y2 in boxes]
