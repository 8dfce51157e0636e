"""Coordinates change convention in two functions; half a grid unit is what a round trip may cost."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from helpers.boxes import (
    FAMILIES,
    box_iou,
    flip_horizontally,
    from_grid,
    from_model_coordinates,
    resized_size,
    to_grid,
    to_model_coordinates,
)


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ([0, 0, 640, 480], (640, 480), [0, 0, 1000, 1000]),
        ([64, 48, 320, 240], (640, 480), [100, 100, 500, 500]),
        ([1, 1, 2, 2], (3, 3), [333, 333, 667, 667]),  # rounded, not cut off: 666.67 is 667
        ([-5, 0, 700, 480], (640, 480), [0, 0, 1000, 1000]),  # clamped to the image
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


def test_qwen2_5_vl_writes_pixels_of_the_resized_image():
    assert resized_size(300, 400) == (308, 392)  # the nearest multiples of 28
    assert to_model_coordinates([150, 100, 300, 400], 300, 400, "qwen2_5_vl") == [154, 98, 308, 392]
    assert to_model_coordinates([150, 100, 300, 400], 300, 400, "qwen2_5_vl", (28, 56)) == [14, 14, 28, 56]
    assert to_model_coordinates([150, 100, 300, 400], 300, 400, "qwen3_vl") == [500, 250, 1000, 1000]


def test_what_is_outside_is_clamped_to_the_image():
    assert from_model_coordinates([-5, 0, 1200, 500], 640, 480, "qwen2_vl") == [0, 0, 640, 240]
    assert from_model_coordinates([-5, 0, 1200, 840], 3000, 3000, "qwen2_5_vl", (1680, 1680)) == pytest.approx(
        [0, 0, 1200 / 1680 * 3000, 1500]  # 1200 is in the image here
    )


@pytest.mark.parametrize("size", [(448, 336), (3024, 4032), (97, 1013)])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_within_half_a_cell_of_the_family(family, size):
    box = [0.123 * size[0], 0.377 * size[1], 0.689 * size[0], 0.941 * size[1]]
    back = from_model_coordinates(to_model_coordinates(box, *size, family), *size, family)
    cells = (1000, 1000) if FAMILIES[family].coordinates == "grid" else resized_size(*size)
    errors = [abs(a - b) / s * n for a, b, s, n in zip(box, back, size * 2, cells * 2, strict=True)]
    assert max(errors) <= 0.5 + 1e-9


@pytest.mark.parametrize("convert", [to_model_coordinates, from_model_coordinates])
def test_unknown_family_is_refused(convert):
    with pytest.raises(ValueError, match=r"'idefics3' models .* use one whose model_type is qwen2_vl, "):
        convert([0, 0, 1, 1], 10, 10, "idefics3")


def test_flip_moves_boxes_with_the_image():
    image = Image.new("RGB", (10, 4))
    image.putpixel((1, 0), (255, 0, 0))
    mirrored, boxes = flip_horizontally(image, [[1, 0, 4, 2]])
    assert boxes == [[6, 0, 9, 2]]
    assert mirrored.getpixel((8, 0)) == (255, 0, 0)


def test_iou_of_every_box_with_every_other():
    ious = box_iou([[0, 0, 10, 10], [0, 5, 10, 15]], [[0, 2, 10, 12], [0, 0, 10, 5], [20, 0, 30, 10]])
    assert ious == pytest.approx(np.array([[8 / 12, 1 / 2, 0], [7 / 13, 0, 0]]))
    assert box_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    corners = np.random.default_rng(0).random((2, 50, 2, 2)) * 100
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=2)
    assert box_iou(*boxes) == pytest.approx(torchvision.ops.box_iou(*map(torch.tensor, boxes)).numpy())
