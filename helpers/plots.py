"""Images with boxes, diagrams, curves and comparisons.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image as DisplayImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from helpers.generation import Answer
from helpers.metrics import bootstrap_intervals, compare_records
from helpers.recipes import CATALOGUE
from helpers.runs import RunFolder

BLUE = "#4575b4"
ORANGE = "#f28e2b"
LIGHT = "#e8eef6"
TRUTH_COLOUR = "#1a9850"
PREDICTION_COLOUR = "#d73027"


def plot_steps(rows: Sequence[Sequence[str]]) -> plt.Figure:
    """Rows of texts in boxes, joined by arrows from left to right."""
    figure, axes = plt.subplots(figsize=(13, 1.2 * len(rows)), layout="constrained")
    style = {"ha": "center", "va": "center", "fontsize": 9}
    style["bbox"] = {"boxstyle": "round,pad=0.6", "fc": LIGHT, "ec": BLUE}
    for y, texts in enumerate(rows):
        drawn = [axes.text(x, -y, text, **style) for x, text in enumerate(texts)]
        for x, patches in enumerate(pairwise(text.get_bbox_patch() for text in drawn)):
            ends = dict(zip(("patchA", "patchB"), patches, strict=True))
            axes.annotate("", (x + 1, -y), (x, -y), arrowprops={"arrowstyle": "-|>"} | ends)
    axes.set(xlim=(-0.5, max(map(len, rows)) - 0.5), ylim=(0.5 - len(rows), 0.5))
    axes.axis("off")
    return figure


def draw_boxes(axes: plt.Axes, boxes: Iterable[Sequence[float]], colour: str, linestyle: str) -> None:
    """Outline boxes `[x1, y1, x2, y2]` (pixels) on an image."""
    for x1, y1, x2, y2 in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=3.5, alpha=0.6))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2, ls=linestyle))


def plot_images(images: Sequence[Image.Image], truths, predictions=None, titles=None, columns: int = 4) -> plt.Figure:
    """A grid of images, their true boxes (dashed), and if given predicted boxes (solid) and titles, one list each.

    Boxes are `[x1, y1, x2, y2]` in pixels.
    """
    lines = math.ceil(len(images) / columns)
    size = (3.4 * columns, 3.7 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    kinds = {"truth": (truths, TRUTH_COLOUR, "--"), "prediction": (predictions, PREDICTION_COLOUR, "-")}
    kinds = {name: kind for name, kind in kinds.items() if kind[0] is not None}
    for number, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(image)
        axes.set_title(titles[number] if titles is not None else "", fontsize=10, parse_math=False)
        for boxes, colour, linestyle in kinds.values():
            draw_boxes(axes, boxes[number], colour, linestyle)
    for axes in grid.flat:
        axes.axis("off")
    handles = [Line2D([], [], color=colour, ls=style, lw=2, label=name) for name, (_, colour, style) in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def to_jpeg(figure: plt.Figure, dpi: int = 110) -> DisplayImage:
    """The figure for display as JPEG, which takes a fifth of the space of PNG where there are photographs."""
    buffer = BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=dpi, pil_kwargs={"quality": 82})
    plt.close(figure)
    return DisplayImage(buffer.getvalue(), format="jpeg")


def plot_prior(boxes: pd.DataFrame, median: Sequence[float]) -> plt.Figure:
    """Area of the boxes of `describe_boxes`, and where they lie, with the median box `[x1, y1, x2, y2]` in 0..1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.hist(boxes.area, bins=np.linspace(0, 1, 26), color=BLUE)
    left.set(xlabel="area of the box / area of the image", ylabel="boxes", title="Size")
    for x1, y1, x2, y2 in boxes[["x1", "y1", "x2", "y2"]].head(300).to_numpy():
        right.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fc=BLUE, alpha=0.01))
    draw_boxes(right, [median], PREDICTION_COLOUR, "-")
    right.set(xlabel="x / width", ylabel="y / height", title="Place; red: always this", xlim=(0, 1), ylim=(1, 0))
    return figure


def plot_token_probabilities(answers: dict[str, Answer]) -> plt.Figure:
    """Answers token by token, one row each: the bar is the probability that the model gave its choice."""
    figure, grid = plt.subplots(len(answers), 1, figsize=(12, 2.2 * len(answers)), layout="constrained", squeeze=False)
    for axes, (name, answer) in zip(grid.flat, answers.items(), strict=True):
        texts = [answer.text[a:b] for a, b in zip([0, *answer.ends], answer.ends, strict=False)]
        colours = [ORANGE if text.isdigit() else BLUE for text in texts]
        axes.bar(range(len(texts)), answer.probabilities, color=colours)
        marks = [text.replace("<|", "").replace("|>", "") for text in texts]
        axes.set_xticks(range(len(texts)), marks, rotation=60, ha="right", fontsize=7, parse_math=False)
        axes.set(ylim=(0, 1.05), ylabel="probability", title=name)
    return figure


# the same in every figure; runs with other names take the colours in turn
MODEL_COLOURS = {"same-box": "black", "base": "grey"} | {name: f"C{n}" for n, name in enumerate(CATALOGUE)}


def plot_training(runs: Iterable[RunFolder], same_box: float) -> plt.Figure:
    """Loss, and IoU on the validation split, over optimiser steps; one line per run, dashed the same-box detector."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for run in runs:
        style = {"label": run.path.name, "color": MODEL_COLOURS.get(run.path.name)}
        left.plot(run.read_log("loss"), **style)
        right.plot(run.read_log("eval_mean_iou"), marker="o", **style)
    right.axhline(same_box, color="black", ls="--", lw=1, label="same box")
    left.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title="Training loss", ylim=(0, None))
    right.set(xlabel="optimiser step", ylabel="mean IoU", title="IoU on the validation split", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    return figure


def plot_comparison(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Mean IoU as bars with 95 % intervals, and the share of images with at least a given IoU as lines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for number, (name, records) in enumerate(records_by_name.items()):
        ious = np.sort([record["iou"] for record in records if record["iou"] is not None])[::-1]
        mean, (low, high) = ious.mean(), bootstrap_intervals(records)["mean_iou"]
        colour = MODEL_COLOURS.get(name)
        left.bar(name, mean, yerr=[[max(0, mean - low)], [max(0, high - mean)]], capsize=4, color=colour)
        left.text(number, high + 0.02, f"{mean:.2f}", ha="center", fontweight="bold")
        right.step(ious, np.arange(1, len(ious) + 1) / len(ious), label=name, where="post", color=colour)
    left.set(ylabel="mean IoU, 95 % interval", ylim=(0, 1.08), title="Mean IoU")
    left.tick_params(axis="x", labelsize=7)
    right.set(xlabel="IoU", ylabel="share of images with at least this IoU", xlim=(0, 1), ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    return figure


def plot_differences(records_by_name: dict[str, Sequence[dict]], pairs: Sequence[tuple[str, str]]) -> plt.Figure:
    """Paired differences in mean IoU (second minus first of each pair) with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(pairs) + 1.1), layout="constrained")
    for number, (one, other) in enumerate(pairs):
        result = compare_records(records_by_name[one], records_by_name[other])
        colour = "grey" if result["verdict"] == "no difference seen" else "black"
        axes.plot([result["low"], result["high"]], [number, number], color=colour, lw=2)
        axes.plot(result["difference"], number, "o", color=colour)
        text = f"{result['difference']:+.3f} {result['verdict']}"
        axes.text(1.02, number, text, va="center", color=colour, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(pairs)), [f"{one} -> {other}" for one, other in pairs])
    axes.axvline(0, color="grey", lw=1)
    axes.set(xlabel="difference in mean IoU", title="Is it more than noise?")
    axes.invert_yaxis()
    return figure
