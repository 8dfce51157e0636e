"""Boxes from more than one look: means of digits, mirrored copies, enlarged crops."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.conversation import Task
from helpers.data import load_rows
from helpers.detection import evaluate_detector
from helpers.evaluation import read_line
from helpers.generation import Answer, Detector
from helpers.ladder import (
    choose_surer,
    crop_around,
    evaluate_rungs,
    fuse,
    mean_by_place,
    mean_nearby,
    to_rung_record,
    write_means,
)
from helpers.loading import load_model, load_processor, pixel_budget

SURE = np.eye(10)


def box(*corners, score=0.5, label="table"):
    return {"label": label, "box": list(corners), "score": score}


def test_means_of_digits():
    doubtful = np.array([SURE[4], 0.5 * SURE[3] + 0.5 * SURE[4], SURE[7]])  # 437 or, with unknown units, 44x
    assert mean_by_place("437", doubtful) == pytest.approx(442.0)  # 400 + 35 + 7
    assert mean_nearby("437", doubtful) == pytest.approx(440.75)  # between 437 and 444.5
    carry = np.array([0.5 * SURE[3] + 0.5 * SURE[4], SURE[0], SURE[1]])  # 399 or 401
    assert mean_by_place("401", carry) == pytest.approx(351.0)
    assert mean_nearby("401", carry) == pytest.approx(401.0)
    assert mean_nearby("7", SURE[[8]]) == 7.0
    assert mean_nearby("1000", SURE[[1, 0, 0, 2]]) == pytest.approx(1002.0)


def test_means_take_the_place_of_numbers_in_boxes_and_nothing_else():
    tokens = [
        "<|object_ref_start|>",
        "a",
        "7",
        "<|object_ref_end|>",
        "<|box_start|>(",
        *"12,30),(500,600",
        ")<|box_end|>",
    ]
    ends = np.cumsum([*map(len, tokens)]).tolist()
    probabilities = [0.5 if token.isdigit() else 1.0 for token in tokens]
    answer = Answer("".join(tokens), ends, probabilities)
    written = write_means(answer, np.tile(SURE[1], (len(tokens), 1)), lambda number, digits: float(number) + 0.25)
    assert written.text == "<|object_ref_start|>a7<|object_ref_end|><|box_start|>(12.2,30.2),(500.2,600.2)<|box_end|>"
    start, old = written.text.index("(12.2"), answer.text.index("(12")
    assert written.score(start, len(written.text)) == pytest.approx(answer.score(old, len(answer.text)))


def test_the_surer_answer_counts_and_boxes_that_agree_are_averaged():
    answer, other = [box(0, 0, 10, 10, score=0.6), box(50, 50, 60, 60, score=0.6)], [box(0, 0, 10, 12, score=0.2)]
    fused = [labelled["box"] for labelled in fuse(other, answer)]
    assert fused == [pytest.approx([0, 0, 10, 10.5]), [50, 50, 60, 60]]
    assert fuse([], other) == other
    assert fuse([], []) == []
    assert fuse([box(0, 0, 10, 10)], [box(80, 80, 90, 90, score=0.4)]) == [box(0, 0, 10, 10)]


def test_a_second_look_shows_the_surroundings_enlarged():
    image = Image.new("RGB", (100, 80))
    crop, cut = crop_around(image, [40, 30, 60, 50], 6400)
    assert (cut, crop.size) == ([30, 20, 71, 61], (80, 80))
    assert crop_around(image, [0, 0, 100, 80], 3200)[1] == [0, 0, 100, 80]
    assert crop_around(image, [0, 40, 100, 40.1], 6400)[1] == [0, 35, 100, 46]  # no sliver
    first = box(0, 0, 10, 10)
    assert choose_surer(first, [box(1, 0, 10, 10, score=0.7), box(70, 70, 80, 80, score=0.9)])["box"] == [1, 0, 10, 10]
    assert choose_surer(first, [box(1, 0, 10, 10, score=0.3)]) == choose_surer(first, []) == first


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_what_a_rung_found_is_written_as_an_answer_that_can_be_measured(family):
    detector = Detector(None, None, Task("", ["table"], family))
    known = {
        "id": "1",
        "width": 200,
        "height": 100,
        "resized": [200, 100],
        "truth": [{"label": "table", "box": [0, 0, 9, 9]}],
    }
    found = [box(100, 50, 150, 80, score=0.9), box(20.04, 10, 60, 40, score=0.4)]
    record = to_rung_record(known, found, detector)
    assert [labelled["score"] for labelled in record["prediction"]] == [0.4, 0.9]  # from the top left
    assert record["prediction"][0]["box"] == pytest.approx([20.04, 10, 60, 40])
    assert "100.2" in record["raw"]
    assert read_line(json.dumps(record).encode(), "line 1", family)["prediction"] == record["prediction"]


@pytest.mark.slow
def test_the_first_rung_is_the_detector_and_others_differ(base, dataset_folder):
    processor = load_processor(str(base), 10**9)
    task = Task("Detect every barcode.", ["barcode"], pixel_budget=pixel_budget(processor))
    detector = Detector(load_model(str(base), False, torch.float32).eval(), processor, task, 40, 4)
    rows = load_rows(str(dataset_folder), "val", 4, 0)
    found = evaluate_rungs(detector, rows, ["greedy", "mirrored, mean nearby"], show_progress=False)
    greedy, best = ([record["prediction"] for record in rung["records"]] for rung in found.values())
    assert greedy == [record["prediction"] for record in evaluate_detector(detector, rows, show_progress=False)]
    assert best != greedy
    assert all(rung["seconds"] > 0 for rung in found.values())
