"""Coordinates change convention in two functions; half a grid unit is what a round trip may cost."""

import pytest
from PIL import Image

from helpers.boxes import flip_horizontally, from_grid, to_grid


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ([0, 0, 640, 480], (640, 480), [0, 0, 1000, 1000]),
        ([64, 48, 320, 240], (640, 480), [100, 100, 500, 500]),
        ([1, 1, 2, 2], (3, 3), [333, 333, 667, 667]),  # rounded, not cut off: 666.67 is 667
        ([-5, 0, 700, 480], (640, 480), [0, 0, 1000, 1000]),  # clamped to the picture
    ],
)
def test_pixels_to_grid(box, size, expected):
    assert to_grid(box, *size) == expected


def test_grid_to_pixels():
    assert from_grid([100, 250, 500, 1000], 640, 480) == [64, 120, 320, 480]


@pytest.mark.parametrize("size", [(448, 336), (3024, 4032), (97, 1013)])
def test_round_trip_within_half_a_grid_unit(size):
    box = [0.123 * size[0], 0.377 * size[1], 0.689 * size[0], 0.941 * size[1]]
    back = from_grid(to_grid(box, *size), *size)
    errors = [abs(a - b) / s * 1000 for a, b, s in zip(box, back, size * 2, strict=True)]
    assert max(errors) <= 0.5


def test_flip_moves_boxes_with_the_picture():
    image = Image.new("RGB", (10, 4))
    image.putpixel((1, 0), (255, 0, 0))
    mirrored, boxes = flip_horizontally(image, [[1, 0, 4, 2]])
    assert boxes == [[6, 0, 9, 2]]
    assert mirrored.getpixel((8, 0)) == (255, 0, 0)
