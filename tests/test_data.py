"""Data that people point the notebook at: what is wrong is said, named and left out, before it costs an hour."""

import re
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from helpers.conversation import Task
from helpers.data import (
    Mirroring,
    Splits,
    describe_boxes,
    describe_problem,
    drop_bad_rows,
    drop_shared_barcodes,
    hold_back,
    load_rows,
    load_splits,
    median_box,
    read_barcodes,
    read_headers,
    read_row,
    to_training_dataset,
)
from helpers.tiny.packages import draw_dataset

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


IMAGE = encode(Image.new("RGB", (40, 80), "white"))


def test_missing_folder():
    with pytest.raises(FileNotFoundError, match=r"No dataset 'no/such_folder'.*Set DATASET_ID to one"):
        load_rows("no/such_folder", "train", None, 0)


def save(rows, folder):
    (folder / "data").mkdir(parents=True)
    rows.to_parquet(folder / "data/train-00000-of-00001.parquet")
    return str(folder)


def test_missing_objects(tmp_path):
    dataset = save(rows_of((IMAGE, [BOX])).remove_columns("objects"), tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"no column objects\.bbox, objects\.category_name \(it has image_id, image\)\. Rename"
    ):
        load_rows(dataset, "train", None, 0)


def test_folders_in_other_formats_are_refused_with_the_command_that_converts_them(tmp_path):
    (tmp_path / "yolo/images").mkdir(parents=True)
    (tmp_path / "yolo/images/a.jpg").write_bytes(IMAGE["bytes"])
    with pytest.raises(ValueError, match=r"no column .*python -m helpers\.import_dataset"):
        load_rows(str(tmp_path / "yolo"), "train", None, 0)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train.json").write_text('{"images": [1], "annotations": {"a": 1}, "categories": "x"}{')
    with pytest.raises(ValueError, match=r"cannot be read as rows.*python -m helpers\.import_dataset"):
        load_rows(str(tmp_path / "coco"), "train", None, 0)


def test_missing_split(tmp_path):
    dataset = save(rows_of((IMAGE, [BOX])), tmp_path / "d")
    with pytest.raises(ValueError, match=r"no split 'val', only \['train'\]: set TRAIN_SPLIT / EVAL_SPLIT"):
        load_rows(dataset, "val", None, 0)


def test_samples_are_drawn_by_seed(dataset_folder):
    chosen = [load_rows(str(dataset_folder), "train", 5, seed)["image_id"] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(load_rows(str(dataset_folder), "train", 10_000, 1)) == 24


def test_bad_rows_are_named_and_left_out(capsys):
    truncated = {"bytes": IMAGE["bytes"][:-200], "path": None}
    rows = rows_of(
        (IMAGE, [BOX]),
        (IMAGE, [[0.1, 0.1, 1.2, 0.5]]),
        ({"bytes": b"not an image", "path": None}, [BOX]),
        (truncated, [BOX]),
        (IMAGE, []),
        (IMAGE, [BOX, [0.5, 0.5, 0.5, 0.9]]),
    )
    assert drop_bad_rows(rows)["image_id"] == ["image-0", "image-4"]  # an image without objects is data, too
    printed = capsys.readouterr().out
    assert "left out: image-1: box [0.10000000149011612, 0.10000000149011612, 1.2000000476837158, 0.5]" in printed
    assert "left out: image-2: image cannot be decoded (UnidentifiedImageError)" in printed
    assert "left out: image-3: image cannot be decoded (OSError)" in printed
    assert "left out: image-5: box [0.5, 0.5, 0.5, 0.8999999761581421]" in printed
    assert "2 of 6 rows are usable" in printed


def test_no_row_left():
    with pytest.raises(ValueError, match="No usable row is left"):
        drop_bad_rows(rows_of((IMAGE, [[0, 0, 2, 2]])))


def test_good_rows_are_all_kept(dataset_folder):
    rows = load_rows(str(dataset_folder), "train", None, 0)
    assert drop_bad_rows(rows)["image_id"] == rows["image_id"]


def test_boxes_refer_to_the_upright_image():
    sideways = Image.new("RGB", (80, 40), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    image, boxes, labels = read_row(rows_of((encode(sideways, exif=exif), [BOX]))[0])
    assert image.size == (40, 80)
    assert image.mode == "RGB"
    assert boxes == [pytest.approx([4, 20, 20, 60])]
    assert labels == ["nutrition-table"]


def test_training_example():
    row = to_training_dataset(rows_of((IMAGE, [BOX])), Task("Where?"), Mirroring())[0]
    assert row["image"].size == (40, 80)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][2]["content"][0]["text"] == (
        "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"
    )


def test_mirrored_training_example():
    row = to_training_dataset(rows_of((IMAGE, [BOX])), Task("Where?"), Mirroring(1.0))[0]
    assert "(500,250),(900,750)" in row["messages"][2]["content"][0]["text"]


def test_an_image_is_mirrored_anew_in_each_epoch_and_not_within_one():
    mirroring = Mirroring(0.5)
    dataset, texts = to_training_dataset(rows_of((IMAGE, [BOX])), Task("Where?"), mirroring), {}
    for epoch in range(20):
        mirroring.epoch = epoch
        texts[epoch] = {dataset[0]["messages"][2]["content"][0]["text"] for _ in range(3)}
    assert all(len(found) == 1 for found in texts.values())
    assert len(set.union(*texts.values())) == 2
    share = np.mean([Mirroring(0.3, seed).applies_to(image_id) for seed in range(20) for image_id in range(100)])
    assert share == pytest.approx(0.3, abs=0.03)
    assert not any(Mirroring(0.0).applies_to(image_id) for image_id in range(100))
    assert all(Mirroring(1.0).applies_to(image_id) for image_id in range(100))


def test_the_tiny_dataset_is_a_dataset_dict(dataset_folder):
    assert isinstance(load_dataset(str(dataset_folder)), DatasetDict)


def with_barcodes(*barcodes):
    rows = rows_of(*[(IMAGE, [BOX])] * len(barcodes))
    return rows.add_column("meta", [{"barcode": barcode} for barcode in barcodes])


def test_packages_of_the_evaluation_split_are_not_trained_on(capsys):
    rows, others = with_barcodes("1", "2", "2", None), with_barcodes("2", "3", None)
    assert read_barcodes(drop_shared_barcodes(rows, others)) == ["1", None]
    assert capsys.readouterr().out.startswith("2 training images show a package of the evaluation split")
    assert read_barcodes(rows_of((IMAGE, [BOX]))) == [None]


def test_held_back_images_share_no_barcode_with_the_others():
    rows = with_barcodes(*[str(number // 3) for number in range(30)], None, None)
    kept, held = hold_back(rows, 6, seed=1)
    assert len(kept) + len(held) == 32
    assert 6 <= len(held) <= 18
    assert not set(read_barcodes(kept)) & (set(read_barcodes(held)) - {None})
    assert hold_back(rows, 6, seed=1)[1]["image_id"] == held["image_id"]
    with pytest.raises(ValueError, match="VALIDATION_SAMPLES=100 of 32 rows: hold back at least 1 image"):
        hold_back(rows, 100, seed=1)
    with pytest.raises(ValueError, match="VALIDATION_SAMPLES=0 of 32 rows: hold back at least 1 image"):
        hold_back(rows, 0, seed=1)


def settings_for(folder, **changes):
    names = {"dataset_id": str(folder), "train_split": "train", "eval_split": "val", "seed": 0, "labels": None}
    return SimpleNamespace(**names | {"train_samples": None, "eval_samples": None, "validation_samples": 4} | changes)


@pytest.fixture(scope="module")
def labelled_folder(tmp_path_factory):
    """Eight packages to train on and eight to evaluate on, with boxes of two kinds of objects."""
    folder = tmp_path_factory.mktemp("labelled") / "dataset"
    draw_dataset(folder, train=8, validation=8, seed=2, labels=("logo", "barcode"))
    return folder


def labels_of(rows):
    return {label for objects in rows["objects"] for label in objects["category_name"]}


def test_all_labels_are_detected_unless_some_are_chosen(labelled_folder, capsys):
    assert load_splits(settings_for(labelled_folder)).labels == ("barcode", "logo")
    assert "boxes left out" not in capsys.readouterr().out
    splits = load_splits(settings_for(labelled_folder, labels="logo"))
    assert splits.labels == ("logo",)
    assert labels_of(splits.train) == labels_of(splits.evaluation) == {"logo"}
    assert len(splits.evaluation) == 8  # those without a logo, too
    assert [] in [objects["bbox"] for objects in splits.evaluation["objects"]]
    assert re.search(r"boxes left out: \d barcode\n", capsys.readouterr().out)
    assert load_splits(settings_for(labelled_folder, labels=" logo,barcode ")).labels == ("logo", "barcode")


def test_labels_that_do_not_exist_are_refused(labelled_folder):
    with pytest.raises(ValueError, match=r"LABELS='cat': choose from .* \['barcode', 'logo'\]"):
        load_splits(settings_for(labelled_folder, labels="cat"))


def test_splits_share_no_barcode(dataset_folder, capsys):
    splits = load_splits(settings_for(dataset_folder))
    assert [len(rows) for rows in (splits.train, splits.validation, splits.evaluation)] == [20, 4, 8]
    barcodes = [set(read_barcodes(rows)) for rows in (splits.train, splits.validation, splits.evaluation)]
    assert len(set.union(*barcodes)) == sum(map(len, barcodes))
    assert "20 images to train on, 4 for validation, 8 to evaluate on\n" in capsys.readouterr().out


def test_splits_are_drawn_by_seed(dataset_folder):
    draws = [load_splits(settings_for(dataset_folder, seed=seed, train_samples=10)) for seed in (1, 1, 2)]
    first, again, other = ([rows["image_id"] for rows in (s.train, s.validation)] for s in draws)
    assert first == again != other
    assert isinstance(draws[0], Splits)
    assert len(first[0]) + len(first[1]) == 10


def test_headers_tell_size_when_upright_and_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its right side
    turned = encode(Image.new("RGB", (40, 80)), exif=exif)
    rows = rows_of((IMAGE, [BOX]), (turned, [BOX]))
    assert read_headers(rows) == [(40, 80, 1), (80, 40, 6)]
    assert [read_row(row)[0].size for row in rows] == [(40, 80), (80, 40)]


def test_boxes_are_described_as_displayed():
    boxes = describe_boxes(rows_of((IMAGE, [BOX, BOX]), (IMAGE, [BOX])))
    assert boxes.image.tolist() == [0, 0, 1]
    assert boxes.category.tolist() == ["nutrition-table"] * 3
    assert boxes.iloc[0][["x1", "y1", "x2", "y2"]].tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75])
    assert boxes.area[0] == pytest.approx(0.4 * 0.5)


def test_images_without_objects_have_no_line():
    assert describe_boxes(rows_of((IMAGE, []), (IMAGE, [BOX]), (IMAGE, []))).image.tolist() == [1]


def test_median_box_is_the_median_of_each_corner():
    boxes = [[0.0, 0.1, 0.5, 0.9], [0.2, 0.0, 0.6, 0.8], [0.1, 0.3, 1.0, 0.4]]  # y_min, x_min, y_max, x_max
    rows = rows_of(*[(IMAGE, [box]) for box in boxes])
    assert median_box(describe_boxes(rows)) == pytest.approx([0.1, 0.1, 0.8, 0.6])


def test_a_problem_is_told_of_an_undecoded_row():
    row = {"image": IMAGE, "objects": {"bbox": [BOX], "category_name": ["logo"]}}
    assert describe_problem(row) is None
    assert describe_problem(row | {"objects": {"bbox": []}}) is None
