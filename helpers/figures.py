"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

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
    figure, grid = plt.subplots(lines, columns, figsize=size, dpi=80, squeeze=False, layout="constrained")
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


def plot_losses(folders: Iterable[Path]) -> plt.Figure:
    """Training loss over optimiser steps, from the `trainer_state.json` of every folder."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for folder in folders:
        log = [
            entry
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], label=folder.name)
    axes.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def load_records(folder: Path) -> list[dict]:
    """The lines of a `predictions.jsonl`."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def plot_iou_distribution(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Share of pictures with at least a given IoU, one line per model: the further up and right, the better."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for name, records in records_by_name.items():
        ious = np.sort([record["iou"] for record in records])[::-1]
        axes.step(ious, np.arange(1, len(ious) + 1) / len(ious), label=name, where="post")
    axes.set(xlabel="IoU", ylabel="share of pictures with at least this IoU", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure
