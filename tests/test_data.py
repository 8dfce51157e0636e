"""Data that people point the notebook at: what is wrong is said, named and left out, before it costs an hour."""

from io import BytesIO

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from helpers.data import (
    count_tokens,
    describe_boxes,
    describe_pictures,
    drop_bad_rows,
    drop_shared_barcodes,
    find_bad_rows,
    hold_back,
    load_rows,
    read_barcodes,
    read_headers,
    read_row,
    to_training_dataset,
)

BOX = [0.25, 0.1, 0.75, 0.5]  # y_min, x_min, y_max, x_max


def encode(image, **options):
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(*pictures_and_boxes):
    features = Features(
        image_id=Value("string"),
        image=ImageFeature(),
        objects={"bbox": List(List(Value("float32"), length=4)), "category_name": List(Value("string"))},
    )
    rows = [
        {
            "image_id": f"picture-{number}",
            "image": image,
            "objects": {"bbox": boxes, "category_name": ["nutrition-table"] * len(boxes)},
        }
        for number, (image, boxes) in enumerate(pictures_and_boxes)
    ]
    return Dataset.from_list(rows, features=features)


PICTURE = encode(Image.new("RGB", (40, 80), "white"))


def test_missing_folder():
    with pytest.raises(FileNotFoundError, match=r"No dataset 'no/such_folder'.*Set DATASET_ID to an existing folder"):
        load_rows("no/such_folder", "train", None, 0)


def save(rows, folder):
    (folder / "data").mkdir(parents=True)
    rows.to_parquet(folder / "data/train-00000-of-00001.parquet")
    return str(folder)


def test_missing_objects(tmp_path):
    dataset = save(rows_of((PICTURE, [BOX])).remove_columns("objects"), tmp_path / "d")
    with pytest.raises(ValueError, match=r"has no column objects \(it has image_id, image\)\. Rename its columns"):
        load_rows(dataset, "train", None, 0)


def test_missing_split(tmp_path):
    dataset = save(rows_of((PICTURE, [BOX])), tmp_path / "d")
    with pytest.raises(ValueError, match=r"no split 'val': set TRAIN_SPLIT / EVAL_SPLIT to one of \['train'\]"):
        load_rows(dataset, "val", None, 0)


def test_samples_are_drawn_by_seed(dataset_folder):
    chosen = [load_rows(str(dataset_folder), "train", 5, seed)["image_id"] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(load_rows(str(dataset_folder), "train", 10_000, 1)) == 24


def test_bad_rows_are_named_and_left_out(capsys):
    truncated = {"bytes": PICTURE["bytes"][:-200], "path": None}
    rows = rows_of(
        (PICTURE, [BOX]),
        (PICTURE, [[0.1, 0.1, 1.2, 0.5]]),
        ({"bytes": b"not a picture", "path": None}, [BOX]),
        (truncated, [BOX]),
        (PICTURE, []),
        (PICTURE, [BOX, [0.5, 0.5, 0.5, 0.9]]),
    )
    assert drop_bad_rows(rows)["image_id"] == ["picture-0"]
    printed = capsys.readouterr().out
    assert "left out: picture-1: box [0.10000000149011612, 0.10000000149011612, 1.2000000476837158, 0.5]" in printed
    assert "left out: picture-2: picture cannot be decoded (not a picture, or of an unknown format)" in printed
    assert "left out: picture-3: picture cannot be decoded (Truncated File Read)" in printed
    assert "left out: picture-4: no box" in printed
    assert "left out: picture-5: box [0.5, 0.5, 0.5, 0.8999999761581421]" in printed
    assert "1 of 6 rows are usable" in printed


def test_no_row_left():
    with pytest.raises(ValueError, match="No usable row is left"):
        drop_bad_rows(rows_of((PICTURE, [])))


def test_good_rows_are_all_kept(dataset_folder):
    assert find_bad_rows(load_rows(str(dataset_folder), "train", None, 0)) == {}


def test_boxes_refer_to_the_upright_picture():
    sideways = Image.new("RGB", (80, 40), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    image, boxes, labels = read_row(rows_of((encode(sideways, exif=exif), [BOX]))[0])
    assert image.size == (40, 80)
    assert image.mode == "RGB"
    assert boxes == [pytest.approx([4, 20, 20, 60])]
    assert labels == ["nutrition-table"]


def test_training_example():
    row = to_training_dataset(rows_of((PICTURE, [BOX])), "Where?", flip_probability=0.0)[0]
    assert row["image"].size == (40, 80)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][2]["content"][0]["text"] == (
        "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"
    )


def test_mirrored_training_example():
    row = to_training_dataset(rows_of((PICTURE, [BOX])), "Where?", flip_probability=1.0)[0]
    assert "(500,250),(900,750)" in row["messages"][2]["content"][0]["text"]


def test_a_picture_is_mirrored_anew_each_time():
    torch.manual_seed(0)
    dataset = to_training_dataset(rows_of((PICTURE, [BOX])), "Where?", flip_probability=0.5)
    assert len({dataset[0]["messages"][2]["content"][0]["text"] for _ in range(20)}) == 2


def test_the_tiny_dataset_is_a_dataset_dict(dataset_folder):
    assert isinstance(load_dataset(str(dataset_folder)), DatasetDict)


def with_barcodes(*barcodes):
    rows = rows_of(*[(PICTURE, [BOX])] * len(barcodes))
    return rows.add_column("meta", [{"barcode": barcode} for barcode in barcodes])


def test_packages_of_the_evaluation_split_are_not_trained_on(capsys):
    rows, others = with_barcodes("1", "2", "2", None), with_barcodes("2", "3", None)
    assert read_barcodes(drop_shared_barcodes(rows, others)) == ["1", None]
    assert capsys.readouterr().out.startswith("2 training pictures show a package of the evaluation split")
    assert read_barcodes(rows_of((PICTURE, [BOX]))) == [None]


def test_held_back_pictures_share_no_barcode_with_the_others():
    rows = with_barcodes(*[str(number // 3) for number in range(30)], None, None)
    kept, held = hold_back(rows, 6, seed=1)
    assert len(kept) + len(held) == 32
    assert 6 <= len(held) <= 18
    assert not set(read_barcodes(kept)) & (set(read_barcodes(held)) - {None})
    assert hold_back(rows, 6, seed=1)[1]["image_id"] == held["image_id"]
    with pytest.raises(ValueError, match="WATCH_SAMPLES=100 leaves nothing to train on: 32 rows in all"):
        hold_back(rows, 100, seed=1)
    with pytest.raises(ValueError, match="WATCH_SAMPLES=0: checkpoints are chosen on these pictures, hold back"):
        hold_back(rows, 0, seed=1)


def test_headers_tell_size_when_upright_and_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its right side
    turned = encode(Image.new("RGB", (40, 80)), exif=exif)
    rows = rows_of((PICTURE, [BOX]), (turned, [BOX]))
    assert read_headers(rows) == [(40, 80, 1), (80, 40, 6)]
    pictures = describe_pictures(rows)
    assert pictures.orientation.tolist() == [1, 6]
    assert pictures.width.tolist() == [40, 80] == [read_row(row)[0].width for row in rows]


def test_boxes_are_described_as_displayed():
    boxes = describe_boxes(rows := rows_of((PICTURE, [BOX, BOX])), describe_pictures(rows))
    assert boxes.picture.tolist() == [0, 0]
    assert boxes.iloc[0][["x1", "y1", "x2", "y2"]].tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75])
    assert boxes.area[0] == pytest.approx(0.4 * 0.5)
    assert boxes.aspect[0] == pytest.approx(16 / 40)  # 0.4 of 40 pixels wide, 0.5 of 80 pixels high


def test_tokens_within_a_budget():
    pictures = describe_pictures(rows_of((encode(Image.new("RGB", (400, 300))), [BOX])))
    assert count_tokens(pictures, 4 * 28**2, 16384 * 28**2).tolist() == [154]
    assert count_tokens(pictures, 4 * 28**2, 64 * 28**2)[0] <= 64
