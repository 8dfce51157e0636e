"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from helpers.metrics import (
    bin_scores,
    bootstrap_intervals,
    calibration_error,
    collect_scores,
    compute_precision,
    count_errors,
)

TRUTH_COLOUR = "#1a9850"
PREDICTION_COLOUR = "#d73027"


def draw_boxes(axes: plt.Axes, boxes: Iterable[Sequence[float]], colour: str, linestyle: str) -> None:
    """Outline boxes `[x1, y1, x2, y2]` (pixels) on a picture."""
    for x1, y1, x2, y2 in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=3.5, alpha=0.6))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2, ls=linestyle))


def show_pictures(
    images: Sequence[Image.Image],
    truths: Sequence[Sequence[Sequence[float]]],
    predictions: Sequence[Sequence[Sequence[float]]] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> plt.Figure:
    """A grid of pictures with true boxes (dashed) and, if given, predicted boxes (solid), all in pixels."""
    lines = -(-len(images) // columns)
    size = (3 * columns, 3.3 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, dpi=60, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for number, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(image)
        draw_boxes(axes, truths[number], TRUTH_COLOUR, "--")
        if predictions is not None:
            draw_boxes(axes, predictions[number], PREDICTION_COLOUR, "-")
        axes.set_title(titles[number] if titles is not None else "", fontsize=9)
    handles = [Line2D([], [], color=TRUTH_COLOUR, ls="--", lw=2, label="truth")]
    if predictions is not None:
        handles.append(Line2D([], [], color=PREDICTION_COLOUR, ls="-", lw=2, label="prediction"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


BAR_COLOUR = "#4575b4"
# the same in every figure; runs with other names take the colours in turn
MODEL_COLOURS = {
    "base": "grey",
    "r1-llm-only": "C0",
    "r2-vision-only": "C1",
    "r3-two-stage": "C2",
    "r4-joint": "C3",
}


def plot_boxes(boxes: pd.DataFrame) -> plt.Figure:
    """How many, how large, of what shape, and where: six panels about the lines of `describe_boxes`."""
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    per_picture = boxes.groupby("picture").size().value_counts().sort_index()
    bars = grid[0, 0].bar(per_picture.index.astype(str), per_picture, color=BAR_COLOUR)
    grid[0, 0].bar_label(bars)
    grid[0, 0].margins(y=0.12)
    grid[0, 0].set(title="Boxes in a picture", xlabel="boxes", ylabel="pictures")
    for axes, name in zip(grid.flat[1:4], ["area", "width", "height"], strict=True):
        axes.hist(boxes[name], bins=np.linspace(0, 1, 26), color=BAR_COLOUR)
        axes.set(title=f"Box {name}", xlabel=f"share of the picture's {name}", ylabel="boxes")
    grid[1, 1].hist(boxes.aspect, bins=np.geomspace(0.1, 10, 31), color=BAR_COLOUR)
    grid[1, 1].set(title="Box shape", xlabel="width / height", ylabel="boxes", xscale="log", xlim=(0.1, 10))
    heat = grid[1, 2].imshow(cover_map(boxes), extent=(0, 1, 1, 0), cmap="viridis", vmin=0, vmax=1)
    grid[1, 2].set(title="Where boxes lie", xlabel="x / width", ylabel="y / height")
    figure.colorbar(heat, ax=grid[1, 2], label="share of boxes that cover it")
    return figure


def cover_map(boxes: pd.DataFrame, cells: int = 50) -> np.ndarray:
    """Share of the boxes that cover each of `cells` x `cells` points of the picture, rows from top to bottom."""
    points = (np.arange(cells) + 0.5) / cells
    inside_x = (boxes.x1.to_numpy()[:, None] <= points) & (points < boxes.x2.to_numpy()[:, None])
    inside_y = (boxes.y1.to_numpy()[:, None] <= points) & (points < boxes.y2.to_numpy()[:, None])
    return np.einsum("ny,nx->yx", inside_y.astype(float), inside_x.astype(float)) / len(boxes)


def plot_trained_tokens(batches: dict[str, dict[str, torch.Tensor]], tokenizer, per_line: int = 14) -> plt.Figure:
    """The first row of one batch per collator as a strip of tokens, coloured where the loss looks."""
    figure, grid = plt.subplots(len(batches), 1, figsize=(12, 3.4 * len(batches)), layout="constrained", squeeze=False)
    for axes, (variant, batch) in zip(grid.flat, batches.items(), strict=True):
        cells = list_token_cells(batch, tokenizer)
        for number, (text, trained) in enumerate(cells):
            x, y = number % per_line, -(number // per_line)
            colour = TRUTH_COLOUR if trained else "#eeeeee"
            axes.add_patch(Rectangle((x + 0.03, y + 0.1), 0.94, 0.8, color=colour))
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6.5,
                      color="white" if trained else "black")  # fmt: skip
        axes.set(xlim=(0, per_line), ylim=(-((len(cells) - 1) // per_line), 1))
        axes.set_title(
            f"{variant}: {sum(trained for _, trained in cells)} of {len(cells)} cells are trained", loc="left"
        )
        axes.axis("off")
    return figure


def list_token_cells(batch: dict[str, torch.Tensor], tokenizer) -> list[tuple[str, bool]]:
    """Text and "has a label" of each token in the batch's first row; a run of picture tokens is one cell."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    cells = []
    for token, label, previous in zip(ids, labels, [None, *ids], strict=False):
        if token == tokenizer.pad_token_id or token == previous == image:
            continue
        text = tokenizer.decode([token]).replace("\n", "\\n").replace("<|", "").replace("|>", "")
        cells.append((f"{ids.count(image)} x {text}" if token == image else text, label != -100))
    return cells


def read_log(folder: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged number, from the `trainer_state.json` in `folder`."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def plot_training(folders: Iterable[Path]) -> plt.Figure:
    """Loss and IoU on the pictures held back, over optimiser steps; one line per run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for folder in folders:
        style = {"label": folder.name, "color": MODEL_COLOURS.get(folder.name)}
        left.plot(*read_log(folder, "loss"), **style)
        right.plot(*read_log(folder, "eval_mean_iou"), marker="o", **style)
    left.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title="Training loss")
    right.set(xlabel="optimiser step", ylabel="mean IoU", title="IoU on the pictures held back", ylim=(0, 1))
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    return figure


def plot_gradient_norms(folders: Sequence[Path]) -> plt.Figure:
    """Gradient norm (after clipping at 1) of the two towers over optimiser steps, one line per run."""
    figure, grid = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    for axes, (area, title) in zip(grid, {"visual": "Vision tower", "language_model": "Language model"}.items(),
                                   strict=True):  # fmt: skip
        for folder in folders:
            steps, norms = read_log(folder, f"grad_norm_{area}")
            if steps:
                axes.plot(steps, norms, label=folder.name, color=MODEL_COLOURS.get(folder.name))
        axes.set(title=title, xlabel="optimiser step", ylabel="gradient norm, clipped at 1", ylim=(0, 1.3))
        axes.legend(loc="upper center", ncols=3, frameon=False)
    return figure


def plot_comparison(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Mean IoU as bars with 95 % intervals, and the share of pictures with at least a given IoU as lines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for number, (name, records) in enumerate(records_by_name.items()):
        ious = np.sort([record["iou"] for record in records])[::-1]
        mean, (low, high) = ious.mean(), bootstrap_intervals(records)["mean_iou"]
        colour = MODEL_COLOURS.get(name)
        left.bar(name, mean, yerr=[[max(0, mean - low)], [max(0, high - mean)]], capsize=4, color=colour)
        left.text(number, high + 0.02, f"{mean:.2f}", ha="center", fontweight="bold")
        right.step(ious, np.arange(1, len(ious) + 1) / len(ious), label=name, where="post", color=colour)
    left.set(ylabel="mean IoU, interval of 95 %", ylim=(0, 1), title="Mean IoU")
    left.tick_params(axis="x", labelsize=8)
    right.set(xlabel="IoU", ylabel="share of pictures with at least this IoU", xlim=(0, 1), ylim=(0, 1.02))
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    return figure


def plot_against(records: dict[str, Sequence[dict]], reference: str) -> plt.Figure:
    """IoU of each picture under every other model against its IoU under `reference`; above the line is better."""
    others = [name for name in records if name != reference]
    figure, grid = plt.subplots(1, len(others), figsize=(3.2 * len(others), 3.4), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, others, strict=True):
        pairs = [[record["iou"] for record in records[model]] for model in (reference, name)]
        axes.scatter(*pairs, s=14, alpha=0.5, linewidths=0, color=BAR_COLOUR)
        axes.plot([0, 1], [0, 1], color="grey", lw=1)
        axes.set(xlabel=f"IoU, {reference}", ylabel=f"IoU, {name}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
    return figure


def plot_card(records: Sequence[dict], title: str) -> plt.Figure:
    """Precision-recall curves, IoU histogram, reliability diagram and kinds of error of one model."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
    plot_precision_recall(axes[0], records)
    axes[1].hist([record["iou"] for record in records], bins=np.linspace(0, 1, 21), color=BAR_COLOUR)
    axes[1].set(title="IoU of the pictures", xlabel="IoU", ylabel="pictures", xlim=(0, 1))
    plot_reliability(axes[2], records)
    errors = count_errors(records)
    bars = axes[3].barh(list(errors), list(errors.values()), color=BAR_COLOUR)
    axes[3].bar_label(bars, padding=2)
    axes[3].invert_yaxis()
    axes[3].margins(x=0.15)
    axes[3].set(title="Boxes by kind", xlabel="boxes")
    figure.suptitle(title)
    return figure


def plot_precision_recall(axes: plt.Axes, records: Sequence[dict]) -> None:
    """COCO's precision-recall curves for an IoU of 0.5 and of 0.75."""
    precision = compute_precision(records)
    for index, threshold in ((0, 0.5), (5, 0.75)) if precision is not None else ():
        axes.plot(np.linspace(0, 1, 101), precision[index].mean(axis=1), label=f"IoU {threshold}")
    axes.set(title="Precision and recall", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower left")


def plot_reliability(axes: plt.Axes, records: Sequence[dict]) -> None:
    """Share of hits against the score, in ten bins; the size of a point tells how many boxes there are."""
    table = bin_scores(*collect_scores(records))
    axes.plot([0, 1], [0, 1], color="grey", lw=1)
    axes.scatter(table.score, table.hits, s=300 * table.boxes / max(1, table.boxes.sum()) + 10, color=BAR_COLOUR)
    error = calibration_error(records)
    title = "Reliability" if error is None else f"Reliability: error {error:.2f}"
    axes.set(title=title, xlabel="score", ylabel="share of hits", xlim=(0, 1), ylim=(0, 1.02))
