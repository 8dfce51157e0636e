"""Drawn packages: the same seed draws the same picture, boxes are tight, the folder reads like the hub's dataset."""

import hashlib
import json
import pickle
from dataclasses import replace

import datasets
import numpy as np
import PIL
import pytest
from PIL import Image

from helpers.tiny import marks, packages, photographs, views
from helpers.tiny.printing import Style
from helpers.tiny.surface import CELL, Surface

SEEDS = range(200)
STYLE = Style((255, 255, 255), (0, 0, 0), (200, 0, 0), "DejaVuSans", "en")
# of pixels and objects; five seeds that together run through most of the drawing code, and look the same to numpy's
# code for old and for new processors
DIGESTS = {
    32: "caa4cb6ba6fec945970bfa0f575e422fad6cceea60586cf9a9828fea75ec3d5c",
    63: "b898d2921fb494f85a02d962fe9bfc5e0afe67f5433cde19f9e7a67871f1708f",
    78: "d7b4fabcb90c08a90edcd8a8da42329051b91ded4f1e986a05249908d0e6027d",
    82: "022bf68eedcb3d71138d6053201e3db10f5a79da89a23b609bacdbfae75ab2dd",
    97: "3b3163bf372239e72b174ad2127c549cbfd351d895d50ad06f148a5612a7a401",
}
DRAWN_WITH = "Pillow 13.0.0, numpy 2.4.6"


@pytest.fixture(scope="module")
def drawn():
    """Size and objects of 200 packages."""
    results = []
    for seed in SEEDS:
        picture, objects = packages.draw_package(seed)
        results.append((picture.size, objects))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn")
    packages.draw_dataset(path, train=3, validation=2, seed=0)
    return path


def test_same_seed_same_pixels():
    first, objects = packages.draw_package(7)
    second, same_objects = packages.draw_package(7)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
    assert objects == same_objects
    assert first.tobytes() != packages.draw_package(8)[0].tobytes()


@pytest.mark.parametrize("seed", DIGESTS)
def test_the_drawings_are_those_that_the_base_knows(seed):
    picture, objects = packages.draw_package(seed)
    digest = hashlib.sha256(picture.tobytes() + json.dumps(objects).encode()).hexdigest()
    assert digest == DIGESTS[seed], (
        "These are not the drawings that helpers/tiny/base was pretrained on and that the figures were measured on. "
        "If that is wanted: pretrain (python -m helpers.tiny.pretrain), measure, write the new digests. If no drawing "
        f"was changed, look at the libraries: {DRAWN_WITH} then, Pillow {PIL.__version__}, numpy {np.__version__} now."
    )


def test_draw_package_can_be_sent_to_workers():
    assert pickle.loads(pickle.dumps(packages.draw_package)) is packages.draw_package


def test_sizes_suit_the_patches_of_the_vision_tower(drawn):
    for (width, height), _ in drawn:
        assert max(width, height) == 448
        assert width % 28 == 0
        assert height % 28 == 0


def test_boxes_lie_in_the_picture(drawn):
    for (width, height), objects in drawn:
        for _, (x1, y1, x2, y2) in objects:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height


def test_labels(drawn):
    counts = {label: 0 for label in (packages.TABLE_LABEL, *packages.LABELS)}
    for _, objects in drawn:
        names = [label for label, _ in objects]
        assert 1 <= names.count(packages.TABLE_LABEL) <= 3
        assert all(names.count(label) <= 1 for label in packages.LABELS)
        for name in names:
            counts[name] += 1
    assert min(counts.values()) >= 40
    assert 2.5 <= (sum(counts.values()) - counts[packages.TABLE_LABEL]) / len(SEEDS) <= 5


def test_tables_are_as_large_as_the_hubs(drawn):
    areas = []
    for (width, height), objects in drawn:
        boxes = [box for label, box in objects if label == packages.TABLE_LABEL]
        areas += [(x2 - x1) * (y2 - y1) / (width * height) for x1, y1, x2, y2 in boxes]
    assert 0.13 <= np.median(areas) <= 0.27
    assert min(areas) < 0.05
    assert max(areas) > 0.8


def plain_view(side=112, angle=0.0, radius=0.0):
    """A label of 100x80 in the middle of a square picture."""
    middle = (side / 2, side / 2)
    return views.View((side, side), (100, 80), middle, angle, (0.0, 0.0), radius, np.zeros((0, 4)), "fill")


def warped_box(view, rectangle=(10, 20, 40, 60)):
    """Box of a rectangle of the label, as `draw_package` finds it."""
    ids = Image.new("L", view.label_size, 0)
    ids.paste(1, rectangle)
    seen = np.asarray(ids.transform(view.size, Image.MESH, views.warp_mesh(view, (0, 0)), Image.NEAREST))
    ((label, box),) = packages.labelled_boxes(seen, views.visible_shares(view, ids), [packages.TABLE_LABEL])
    assert label == packages.TABLE_LABEL
    return box


def test_boxes_are_tight():
    # the label's corner lies at (56 - 50, 56 - 40) = (6, 16)
    assert warped_box(plain_view()) == (16.0, 36.0, 46.0, 76.0)


def test_boxes_follow_a_quarter_turn():
    # clockwise about (56, 56): (x, y) goes to (112 - y, x)
    assert warped_box(plain_view(angle=np.pi / 2)) == (36.0, 16.0, 76.0, 46.0)


def test_boxes_follow_a_cylinder():
    view = replace(plain_view(side=448, radius=200.0), label_size=(400, 80))
    x1, _, x2, _ = warped_box(view, (40, 20, 160, 60))
    # label x 40..160 is 160..40 left of the axis: 200 sin(-160/200) = -143.5, 200 sin(-40/200) = -39.7
    assert x1 == pytest.approx(224 - 143.5, abs=2)
    assert x2 == pytest.approx(224 - 39.7, abs=2)


def test_objects_under_a_hand_are_left_out():
    seen = np.array([[1, 1, 2, 2, 2]], np.uint8)
    hand = np.array([[False, True, True, False, False]])
    assert photographs.without_covered(seen, hand).tolist() == [[0, 0, 2, 2, 2]]


def test_patches_are_tight():
    for label in (packages.TABLE_LABEL, *packages.LABELS):
        patch = packages.draw_patch(np.random.default_rng(0), label, (120, 60), STYLE)
        assert patch.getbbox() == (0, 0, *patch.size)
        assert patch.width <= 121
        assert patch.height <= 61


def test_barcode_check_digit():
    assert marks.with_check_digit("400638133393") == "4006381333931"
    assert len(marks.ean13_bars("4006381333931")) == 95
    assert marks.ean13_bars("4006381333931").startswith("1010001101")  # guard, then 0 in the left code


@pytest.fixture
def surface():
    """An empty label of 20 x 20 cells, of which the left half is taken."""
    surface = Surface(np.random.default_rng(0), replace(plain_view(), label_size=(20 * CELL, 20 * CELL)), STYLE)
    surface.taken[:] = False
    surface.taken[:, :10] = True
    return surface


def test_free_corner(surface):
    x, y = surface.free_corner((30, 30))
    assert x >= 10 * CELL
    assert 0 <= y <= 20 * CELL - 30
    assert surface.free_corner((70, 70)) is None


def test_what_is_placed_takes_its_room(surface):
    patch = Image.new("RGBA", (30, 20), (200, 0, 0, 255))
    rectangle = (70, 40, 100, 60)
    assert surface.is_free(rectangle)
    surface.place(patch, (70, 40), "logo")
    assert not surface.is_free(rectangle)
    assert surface.names == ["logo"]
    assert surface.ids.getbbox() == rectangle
    assert surface.image.getpixel((70, 40)) == (200, 0, 0)


def test_clutter_is_no_object(surface):
    surface.place(Image.new("RGBA", (30, 20), (200, 0, 0, 255)), (70, 40))
    assert not surface.is_free((70, 40, 100, 60))
    assert surface.names == []
    assert surface.ids.getbbox() is None


def test_folder_reads_like_the_hubs(folder, tmp_path):
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 3, "val": 2}
    assert loaded["train"].features == packages.FEATURES
    assert list(loaded["train"].features) == ["image_id", "image", "width", "height", "meta", "objects"]
    for row in (*loaded["train"], *loaded["val"]):
        assert row["image"].size == (row["width"], row["height"])
        assert row["image"].format == "JPEG"
        assert marks.with_check_digit(row["meta"]["barcode"][:12]) == row["meta"]["barcode"]
        assert 1 <= len(row["objects"]["bbox"]) <= 3
        assert set(row["objects"]["category_name"]) == {"nutrition-table"}
        assert set(row["objects"]["category_id"]) == {0}
        for y_min, x_min, y_max, x_max in row["objects"]["bbox"]:
            assert 0 <= y_min < y_max <= 1
            assert 0 <= x_min < x_max <= 1


def test_boxes_of_the_folder_are_y_first(folder, tmp_path):
    row = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))["train"][0]
    picture, objects = packages.draw_package(0)
    tables = [box for label, box in objects if label == packages.TABLE_LABEL]
    expected = [
        [y1 / picture.height, x1 / picture.width, y2 / picture.height, x2 / picture.width] for x1, y1, x2, y2 in tables
    ]
    assert np.allclose(row["objects"]["bbox"], expected, atol=1e-6)


def test_splits_share_nothing(folder, tmp_path):
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    for value in (lambda row: row["meta"]["barcode"], lambda row: hashlib.sha256(row["image"].tobytes()).hexdigest()):
        train, val = ({value(row) for row in loaded[name]} for name in ("train", "val"))
        assert len(train) == 3
        assert len(val) == 2
        assert not train & val


def test_nothing_half_written(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["README.md", "data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"]


@pytest.mark.slow
def test_processes_draw_what_one_process_draws(tmp_path):
    packages.draw_dataset(tmp_path, train=16, validation=1)  # enough for a second process
    path = tmp_path / "data/train-00000-of-00001.parquet"
    written = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert written["image_id"] == [packages.dataset_row(seed, ["nutrition-table"])["image_id"] for seed in range(16)]
    raw = written.cast_column("image", datasets.Image(decode=False))[5]["image"]["bytes"]
    assert raw == packages.dataset_row(5, ["nutrition-table"])["image"]["bytes"]


def test_empty_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        packages.draw_dataset(tmp_path, train=0, validation=2)
