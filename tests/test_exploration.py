"""What is said about a dataset before training: sizes as displayed, copies, overlaps, boxes that deserve a look."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFilter

from helpers.data import describe_boxes, read_row
from helpers.exploration import (
    add_shapes,
    count_shared_barcodes,
    cover_map,
    describe_images,
    find_doubtful_boxes,
    find_near_duplicates,
    find_overlaps,
    hash_image,
    hash_images,
)

BOX = [0.25, 0.1, 0.75, 0.5]  # y_min, x_min, y_max, x_max


def encode(image, **options):
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(*images_and_boxes):
    features = Features(
        image_id=Value("string"),
        image=ImageFeature(),
        objects={"bbox": List(List(Value("float32"), length=4)), "category_name": List(Value("string"))},
    )
    rows = [
        {
            "image_id": f"image-{number}",
            "image": image,
            "objects": {"bbox": boxes, "category_name": ["nutrition-table"] * len(boxes)},
        }
        for number, (image, boxes) in enumerate(images_and_boxes)
    ]
    return Dataset.from_list(rows, features=features)


def on_its_side(image):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    return encode(image, exif=exif)


IMAGE = encode(Image.new("RGB", (40, 80), "white"))


def test_images_are_described_as_displayed():
    rows = rows_of((IMAGE, [BOX]), (on_its_side(Image.new("RGB", (40, 80))), [BOX, BOX]))
    images = describe_images(rows)
    assert images.orientation.tolist() == [1, 6]
    assert images.width.tolist() == [40, 80] == [read_row(row)[0].width for row in rows]
    assert images.height.tolist() == [80, 40]
    assert images.boxes.tolist() == [1, 2]
    assert images.barcode.tolist() == [None, None]
    assert images.image_id.tolist() == ["image-0", "image-1"]


def test_boxes_are_described_as_displayed():
    rows = rows_of((IMAGE, [BOX]), (on_its_side(Image.new("RGB", (40, 80))), [BOX]))
    boxes = add_shapes(describe_boxes(rows), describe_images(rows))
    assert boxes.width.tolist() == pytest.approx([0.4, 0.4])
    assert boxes.height.tolist() == pytest.approx([0.5, 0.5])
    assert boxes.aspect.tolist() == pytest.approx([16 / 40, 32 / 20])  # pixels: 16 x 40 upright, 32 x 20 turned


def test_cover_map_has_rows_from_the_top():
    boxes = pd.DataFrame({"x1": [0.5, 0.0], "y1": [0.0, 0.0], "x2": [1.0, 1.0], "y2": [0.5, 1.0]})
    assert cover_map(boxes, cells=2).tolist() == [[0.5, 1.0], [0.5, 0.5]]


def test_barcodes_within_and_between_splits():
    table = count_shared_barcodes({"train": ["1", "1", "2", None, None], "val": ["1", "2", "3"], "test": [None]})
    assert table.loc["train"].tolist() == [1, 2, 0]  # only 1 is there twice; rows without a barcode are no package
    assert table.loc["val"].tolist() == [2, 0, 0]
    assert table.loc["test"].tolist() == [0, 0, 0]


def pattern(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((240, 240), Image.Resampling.BICUBIC)


def test_copies_have_like_hashes_and_others_do_not():
    image = pattern(0)
    copy = image.resize((120, 120)).filter(ImageFilter.GaussianBlur(1))
    assert (hash_image(image) != hash_image(copy)).sum() <= 4
    assert (hash_image(image) != hash_image(pattern(1))).sum() > 15


def test_hashes_are_those_of_upright_images():
    lying = on_its_side(pattern(0).transpose(Image.Transpose.ROTATE_90))
    hashes = hash_images(rows_of((encode(pattern(0)), [BOX]), (lying, [BOX])))
    assert hashes.shape == (2, 64)
    assert (hashes[0] != hashes[1]).sum() <= 4


def test_near_duplicates_nearest_first():
    hashes = np.zeros((4, 64), dtype=bool)
    hashes[1, :3], hashes[2, :1], hashes[3, 20:] = True, True, True
    pairs = find_near_duplicates(hashes, limit=2)
    assert pairs.to_numpy().tolist() == [[0, 2, 1], [1, 2, 2]]


def boxes_of(*lines):
    boxes = pd.DataFrame(lines, columns=["image", "x1", "y1", "x2", "y2"])
    boxes = boxes.assign(category="nutrition-table", area=(boxes.x2 - boxes.x1) * (boxes.y2 - boxes.y1))
    return add_shapes(boxes, pd.DataFrame({"width": [100] * 100, "height": [100] * 100}))


def test_overlaps_are_shares_of_the_smaller_box_in_one_image():
    boxes = boxes_of((0, 0, 0, 1, 1), (0, 0.1, 0.1, 0.2, 0.2), (1, 0.1, 0.1, 0.2, 0.2), (1, 0.16, 0.1, 0.26, 0.2))
    assert find_overlaps(boxes).to_numpy().tolist() == [[0, 1, pytest.approx(1)]]
    assert find_overlaps(boxes, limit=0.3).covered.tolist() == pytest.approx([1, 0.4])
    assert find_overlaps(boxes.iloc[:1]).empty


def test_each_reason_names_its_box():
    usual = [(number, 0.2, 0.2, 0.6 + number / 1000, 0.6 - number / 2000) for number in range(50)]
    odd = {
        50: (50, 0.1, 0.1, 0.15, 0.15),
        51: (51, 0, 0, 1, 1),
        52: (52, 0, 0, 0.4, 0.4),
        53: (53, 0.1, 0.4, 0.9, 0.5),
        54: (54, 0.2, 0.2, 0.6, 0.6),
        55: (54, 0.3, 0.3, 0.7, 0.7),
    }
    found = find_doubtful_boxes(boxes_of(*usual, *odd.values())).groupby("box").reason.apply(set)
    assert found.to_dict() == {
        50: {"under 1 % of the image", "unusual size for its label"},
        51: {"the whole image", "unusual size for its label"},
        52: {"touches 2 or 3 borders"},
        53: {"over 6 times as long as wide", "unusual size for its label", "unusual shape for its label"},
        54: {"over half of it in another box"},
        55: {"over half of it in another box"},
    }


def test_nothing_is_doubtful_about_usual_boxes():
    boxes = boxes_of(*[(number, 0.2, 0.2, 0.6 + number / 500, 0.6) for number in range(50)])
    assert find_doubtful_boxes(boxes).empty
