"""Reading answers, matching boxes and the figures in the table, against values computed by hand."""

import json

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers.conversation import PROMPT
from helpers.evaluation import generate_answers, match_boxes, parse_answer, save_comparison, save_results, summarize
from helpers.loading import load_model
from helpers.tiny.packages import draw_package


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(14,57),(991,603)<|box_end|><|im_end|>",
            [("nutrition-table", [14, 57, 991, 603])],
        ),
        ("nutrition-table(14,57),(991,603)", [("nutrition-table", [14, 57, 991, 603])]),
        ("nutrition-table<box>(265,492),(735,842)>", [("nutrition-table", [265, 492, 735, 842])]),
        ("nutrition-table ( 14 , 57.5 ) , (991, 603)", [("nutrition-table", [14, 57.5, 991, 603])]),
        ("table(991,603),(14,57)", [("table", [14, 57, 991, 603])]),  # corners swapped
        ("table(-20,57),(1400,603)", [("table", [0, 57, 1000, 603])]),  # off the grid
        ("a(1,2),(3,4)b(5,6),(7,8)", [("a", [1, 2, 3, 4]), ("b", [5, 6, 7, 8])]),
        ("a(1,2),(3,4),(5,6),(7,8)", [("a", [1, 2, 3, 4]), ("a", [5, 6, 7, 8])]),  # one label, two boxes
        ("a(5,5),(5,9)", []),  # no area
        ("a(1,2),(3", []),  # cut off
        ("There is no nutrition table.", []),
        ("", []),
    ],
)
def test_parse_answer(answer, expected):
    assert parse_answer(answer) == expected


def test_iou_by_hand():
    assert match_boxes([[0, 0, 10, 10]], [[5, 0, 15, 10]]) == pytest.approx([50 / 150])


def test_a_predicted_box_is_used_once():
    # both true boxes overlap the single prediction: the better one gets it, the other is missed
    assert match_boxes([[0, 0, 10, 10], [0, 0, 10, 20]], [[0, 0, 10, 20]]) == pytest.approx([0, 1])


def test_matching_is_best_overall_not_greedy():
    truth, prediction = [[0, 0, 10, 10], [4, 0, 14, 10]], [[3, 0, 13, 10], [8, 0, 18, 10]]
    assert match_boxes(truth, prediction) == pytest.approx([7 / 13, 6 / 14])


def test_nothing_predicted():
    assert match_boxes([[0, 0, 1, 1]], []) == [0]


def record(iou, boxes=1):
    return {"id": "a", "iou": iou, "prediction": [{"label": "t", "box": [0, 0, 1, 1]}] * boxes}


def test_summary_by_hand():
    records = [record(0.9), record(0.6), record(0.0), record(0.0, boxes=0)]
    assert summarize(records) == {
        "mean_iou": pytest.approx(0.375),
        "median_iou": pytest.approx(0.3),
        "detection_rate": 0.75,
        "iou_gt_0.5": 0.5,
        "iou_gt_0.7": 0.25,
        "n": 4,
    }


def test_summary_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="EVAL_SAMPLES must be at least 1"):
        summarize([])


def test_results_and_comparison_on_disk(tmp_path):
    for name, iou in [("r1-llm-only", 0.8), ("base", 0.1)]:
        save_results(tmp_path / name, [record(iou)])
    comparison = save_comparison(tmp_path)
    assert list(comparison) == ["base", "r1-llm-only"]
    assert json.loads((tmp_path / "comparison.json").read_text())["r1-llm-only"]["mean_iou"] == 0.8
    assert json.loads((tmp_path / "base/predictions.jsonl").read_text())["iou"] == 0.1
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *("comparison.json", "metrics.json", "metrics.json", "predictions.jsonl", "predictions.jsonl"),
    ]


def test_batched_answers_equal_those_given_one_by_one(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(base)
    images = [draw_package(seed)[0] for seed in range(6)]
    assert len({image.size for image in images}) > 1  # so that rows are padded
    prompt = PROMPT.format(label="barcode")
    together = generate_answers(model, processor, images, prompt, 40)
    assert together == [generate_answers(model, processor, [image], prompt, 40)[0] for image in images]
    assert all(answer.endswith("<|im_end|>") for answer in together)


def test_picture_of_a_unit_size_is_answered(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(base)
    assert len(generate_answers(model, processor, [Image.new("RGB", (1, 1))], "?", 4)) == 1
