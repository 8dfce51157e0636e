"""Figures: what they show, not how they look."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from helpers import plots
from helpers.generation import Answer
from helpers.runs import RunFolder


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def record(iou, id="a"):
    """A table of 10 x 10 pixels of which the box found covers the part `iou`."""
    truth, prediction = ([{"label": "t", "box": [0, 0, x, 10]}] for x in (10, 10 * iou))
    return {"id": id, "truth": truth, "prediction": prediction, "iou": iou}


def outlines(axes, colour):
    """Boxes [x1, y1, x2, y2] that are outlined in a colour."""
    patches = [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == colour]
    return [patch.get_bbox().extents.tolist() for patch in patches]


def test_images_with_true_and_predicted_boxes():
    images = [Image.new("RGB", (20, 10))] * 3
    figure = plots.plot_images(
        images, [[[1, 2, 5, 6]]] * 3, [[], [[2, 2, 6, 6]], []], titles=["a", "b", "c"], columns=2
    )
    axes = figure.axes
    assert len(axes) == 4  # 2 x 2, the last one empty
    assert [ax.get_title() for ax in axes] == ["a", "b", "c", ""]
    assert outlines(axes[1], plots.TRUTH_COLOUR) == [[1, 2, 5, 6]]
    assert outlines(axes[1], plots.PREDICTION_COLOUR) == [[2, 2, 6, 6]]
    assert outlines(axes[0], plots.PREDICTION_COLOUR) == []


def test_jpeg_is_a_jpeg_and_closes_its_figure():
    figure = plots.plot_images([Image.new("RGB", (20, 10))], [[]], columns=1)
    shown = plots.to_jpeg(figure, dpi=50)
    assert shown.data[:3] == b"\xff\xd8\xff"
    assert plt.get_fignums() == []


def test_digits_of_an_answer_are_orange():
    answer = Answer("a(1<|im_end|>", ends=[1, 2, 3, 13], probabilities=[0.9, 1.0, 0.4, 0.8])
    axes = plots.plot_token_probabilities({"one": answer}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.9, 1.0, 0.4, 0.8]
    assert [to_hex(bar.get_facecolor()) == plots.ORANGE for bar in axes.patches] == [False, False, True, False]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "(", "1", "im_end"]


def test_training_curves_come_from_the_log(tmp_path):
    log = [{"step": 0, "eval_mean_iou": 0.1}, {"step": 5, "loss": 1.5}, {"step": 5, "eval_mean_iou": 0.3}]
    run = RunFolder(tmp_path / "r4-joint")
    run.path.mkdir()
    (run.path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    left, right = plots.plot_training([run], same_box=0.33).axes
    assert left.lines[0].get_xydata().tolist() == [[5, 1.5]]
    assert right.lines[0].get_xydata().tolist() == [[0, 0.1], [5, 0.3]]
    assert right.lines[1].get_ydata() == [0.33, 0.33]
    assert right.lines[0].get_color() == plots.MODEL_COLOURS["r4-joint"]


def test_models_keep_their_colours_and_means():
    records = {"base": [record(0.2), record(0.4, "b")], "r1-llm-only": [record(0.6), record(1.0, "b")]}
    left, right = plots.plot_comparison(records).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([0.3, 0.8])
    assert [text.get_text() for text in left.texts] == ["0.30", "0.80"]
    assert right.lines[1].get_xdata().tolist() == pytest.approx([1.0, 0.6])
    assert [line.get_color() for line in right.lines] == ["grey", "C0"]


def test_differences_within_the_noise_are_grey():
    ids = "abcdefgh"
    same, other = [record(0.5, id) for id in ids], [record(0.9, id) for id in ids]
    axes = plots.plot_differences({"x": same, "y": other, "z": same}, [("x", "y"), ("x", "z")]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["+0.400 better", "+0.000 no difference seen"]
    assert [text.get_color() for text in axes.texts] == ["black", "grey"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x -> y", "x -> z"]


def test_prior_shows_the_median_box():
    boxes = pd.DataFrame({"x1": [0.1], "y1": [0.2], "x2": [0.5], "y2": [0.6], "area": [0.16]})
    left, right = plots.plot_prior(boxes, [0.1, 0.2, 0.5, 0.6]).axes
    assert sum(bar.get_height() for bar in left.patches) == 1
    assert outlines(right, plots.PREDICTION_COLOUR) == [pytest.approx([0.1, 0.2, 0.5, 0.6])]


def test_steps_are_joined_from_left_to_right():
    axes = plots.plot_steps([["a", "b", "c"], ["d", "e"]]).axes[0]
    texts = {text.get_text(): text.get_position() for text in axes.texts if text.get_text()}
    assert texts == {"a": (0, 0), "b": (1, 0), "c": (2, 0), "d": (0, -1), "e": (1, -1)}
    arrows = [(text.xyann, text.xy) for text in axes.texts if not text.get_text()]
    assert arrows == [((0, 0), (1, 0)), ((1, 0), (2, 0)), ((0, -1), (1, -1))]
