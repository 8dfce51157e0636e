"""From answers to records: boxes in pixels, scores, what could not be read; whole datasets in batches."""

from dataclasses import replace

import pytest
import torch
from datasets import load_dataset
from PIL import Image

from helpers import detection
from helpers.conversation import PROMPT, Task
from helpers.detection import add_answer, answer_with_same_box, detect, evaluate_detector, to_record
from helpers.generation import Answer, Detector
from helpers.loading import load_model, load_processor, pixel_budget
from helpers.tiny.packages import draw_package

TASK = Task("Where is it?")


@pytest.fixture(scope="module")
def detector(base):
    """The base, asked for barcodes."""
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    processor = load_processor(str(base), 66 * 28 * 28)
    task = Task(PROMPT.format(label="barcode"), pixel_budget=pixel_budget(processor))
    return Detector(model, processor, task, max_new_tokens=40, batch_size=2)


@pytest.fixture(scope="module")
def rows(dataset_folder):
    return load_dataset(str(dataset_folder))["val"]


def row(size, *boxes, **more):
    """A dataset row of a blank image; boxes are [y_min, x_min, y_max, x_max] in 0..1."""
    objects = {"bbox": list(boxes), "category_name": ["table"] * len(boxes)}
    return {"image_id": "a", "image": Image.new("RGB", size), "objects": objects} | more


def test_record_by_hand():
    answer = Answer("table(100,100),(500,300)b(1200,0),(1300,10)c(1,2")
    record = to_record(row((200, 100), [0.1, 0.1, 0.5, 0.5], meta={"barcode": "123"}), TASK)
    assert add_answer(record, answer, TASK) == {
        "id": "a",
        "group": "123",
        "width": 200,
        "height": 100,
        "resized": [196, 112],
        "truth": [{"label": "table", "box": [20, 10, 100, 50]}],
        "raw": answer.text,
        "iou": pytest.approx(0.5),
        "prediction": [{"label": "table", "box": [20, 10, 100, 30]}],
        "unread": ["(1,2", "b[1200.0, 0.0, 1300.0, 10.0]"],  # the second is outside of the image
    }


def test_images_without_a_barcode_are_their_own_group():
    assert to_record(row((9, 9)), TASK)["group"] is None
    assert to_record(row((9, 9), meta={"barcode": ""}), TASK)["group"] is None


def test_answer_in_pixels_of_the_resized_image():
    record = to_record(row((200, 100), [0.5, 0.5, 1.0, 1.0]), TASK)
    answer = Answer('[{"bbox_2d": [98, 56, 196, 112], "label": "table"}]')
    assert add_answer(record, answer, Task("?", family="qwen2_5_vl"))["iou"] == 1


def test_record_of_an_image_without_truth():
    assert add_answer(to_record(row((9, 9)), TASK), Answer(""), TASK)["iou"] is None


def test_labels_must_agree_where_there_are_several():
    task = Task("?", ["table", "cat"])
    record = to_record(row((100, 100), [0, 0, 0.5, 0.5]), task)
    assert record["truth"] == [{"label": "table", "box": [0, 0, 50, 50], "category_id": 1}]
    for label, category, iou in [("Table", 1, 1.0), ("cat", 2, 0.0), ("dog", 0, 0.0)]:
        answered = add_answer(record, Answer(f"{label}(0,0),(500,500)"), task)
        assert answered["prediction"][0]["category_id"] == category
        assert answered["iou"] == iou
    assert add_answer(to_record(row((9, 9)), task), Answer("<|im_end|>"), task)["prediction"] == []


def test_unknown_family_is_refused():
    record = to_record(row((9, 9)), TASK)
    with pytest.raises(ValueError, match="'idefics3'"):
        add_answer(record, Answer("a(1,2),(3,4)"), Task("?", family="idefics3"))


def test_score_of_a_box_is_that_of_its_coordinates():
    answer = Answer("a(1,2),(3,4)<|im_end|>", ends=[1, 6, 12, 22], probabilities=[0.1, 0.5, 0.08, 0.9])
    record = add_answer(to_record(row((9, 9)), TASK), answer, TASK)
    assert record["prediction"][0]["score"] == pytest.approx(0.2)  # the square root of 0.5 * 0.08


def test_the_same_box_by_hand():
    records = [to_record(row((200, 100), [0.25, 0.1, 0.75, 0.5]), TASK), to_record(row((50, 50)), TASK)]
    first, second = answer_with_same_box(records, [0.1, 0.25, 0.5, 1.0], "nutrition-table")
    assert first["prediction"] == [{"label": "nutrition-table", "box": [20, 25, 100, 100]}]
    assert first["iou"] == pytest.approx(2 / 3)  # 80 x 50 of 80 x 75 pixels
    assert first["raw"] == (
        "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(100,250),(500,1000)<|box_end|>"
    )
    assert second["prediction"][0]["box"] == [5, 12.5, 25, 50]
    assert (second["iou"], first["unread"]) == (None, [])


def test_an_answer_takes_the_place_of_an_earlier_one():
    record = add_answer(to_record(row((100, 100), [0, 0, 1, 1]), TASK), Answer("no (1,2"), TASK)
    assert (record["iou"], record["unread"]) == (0, ["(1,2"])
    again = answer_with_same_box([record], [0, 0, 1, 1], "table")[0]
    assert (again["iou"], again["unread"]) == (1, [])


def test_records_of_a_model(detector, rows):
    rows = rows.select(range(3))
    records = evaluate_detector(detector, rows, show_progress=False)
    assert [record["id"] for record in records] == rows["image_id"]
    assert [record["group"] for record in records] == [meta["barcode"] for meta in rows["meta"]]
    patches = detector.processor.image_processor([image.convert("RGB") for image in rows["image"]])["image_grid_thw"]
    assert [record["resized"] for record in records] == [[14 * w, 14 * h] for _, h, w in patches.tolist()]
    assert all(record["prediction"] for record in records)
    assert all(0 < found["score"] <= 1 for record in records for found in record["prediction"])


def test_order_and_batches_do_not_change_the_records(detector, rows):
    together, alone = (evaluate_detector(replace(detector, batch_size=size), rows) for size in (None, 1))
    assert [record["id"] for record in together] == rows["image_id"]
    assert [(r["id"], r["raw"], r["iou"]) for r in together] == [(r["id"], r["raw"], r["iou"]) for r in alone]


def answer_at_most(size, asked):
    """A stand-in for `generate` that runs out of memory above a number of questions."""

    def generate(detector, questions):
        asked.append(len(questions["input_ids"]))
        if asked[-1] > size:
            raise torch.cuda.OutOfMemoryError
        return [Answer("barcode(100,200),(300,400)")] * asked[-1]

    return generate


def test_out_of_memory_halves_the_batch(detector, rows, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(detection, "generate", answer_at_most(2, asked))
    records = evaluate_detector(replace(detector, batch_size=8), rows, show_progress=False)
    assert asked == [8, 4, 2, 2, 2, 2]
    assert [record["id"] for record in records] == rows["image_id"]
    assert capsys.readouterr().out.splitlines() == [
        "out of memory with 8 images at once: going on with 4",
        "out of memory with 4 images at once: going on with 2",
    ]


def test_an_image_that_does_not_fit_alone_is_an_error(detector, rows, monkeypatch):
    monkeypatch.setattr(detection, "generate", answer_at_most(0, asked := []))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        evaluate_detector(replace(detector, batch_size=2), rows, show_progress=False)
    assert asked == [2, 1]


def test_images_of_like_size_share_a_batch(detector, rows, monkeypatch):
    sizes = []

    def generate(detector, questions):
        sizes.append(questions["image_grid_thw"].prod(dim=1).tolist())
        return [Answer("")] * len(questions["image_grid_thw"])

    monkeypatch.setattr(detection, "generate", generate)
    evaluate_detector(detector, rows, show_progress=False)
    order = [size for batch in sizes for size in batch]
    assert order == sorted(order, reverse=True)  # the largest first: memory runs out at once or never
    assert len(set(order)) > 1


def test_pixel_budget_is_the_processors(detector):
    assert pixel_budget(detector.processor) == {"factor": 28, "min_pixels": 3136, "max_pixels": 66 * 28 * 28}


def test_one_image_is_detected_upright(detector):
    image = draw_package(0)[0]
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    found = detect(image, detector)
    assert [set(labelled) for labelled in found] == [{"label", "box", "score"}]
    assert 0 < found[0]["score"] <= 1
    assert [labelled["box"] for labelled in detect(turned, detector)] == [labelled["box"] for labelled in found]
