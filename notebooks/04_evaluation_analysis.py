# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Evaluation and its analysis
#
# The story ends with a table of metrics. This notebook asks what stands behind such a table.
#
# **What you will learn**: what each metric means exactly; how many images it takes to tell two models apart; how to
# read precision-recall curves; whether the score of a box can be believed, and why not; in which ways boxes fail, and
# on which tables; what changes when labels count.
#
# **How long it takes**: one to two minutes on two CPU cores. It reads the answers that a run of the story left on disk
# (`make demo`), and asks one of the trained models again about a few images.
#
# With the defaults the models are 6-million-parameter models and the images are drawings: no number below is that of
# a 7B model. Point `RUN_DIR` and `DATASET_ID` at a run of your own, and every cell is about that.

# %% tags=["parameters"]
RUN_DIR = "outputs/demo"  # OUTPUT_DIR of the story: one folder per model, each with a predictions.jsonl
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder: the images that were evaluated
EVAL_SPLIT = "val"
PROBED = 48  # images that the best trained model is asked about again, for its token probabilities
DRAWN = 16  # packages with many kinds of objects that the base is asked about
SEED = 42

# %%
import os
import sys
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

# %%
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

# when imported on a CPU it asks for an optional package that would download kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# PEFT itself uses the old name; the new one does not exist in all versions allowed here
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from faster_coco_eval import COCO, COCOeval_faster
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from transformers.utils.logging import disable_progress_bar as disable_loading_bar

from helpers import evaluation
from helpers.data import load_rows, read_row
from helpers.deployment import as_code
from helpers.detection import add_answer, normalize_label
from helpers.generation import Answer, Detector, generate, to_questions
from helpers.loading import best_dtype, load_model, release_memory
from helpers.metrics import (
    assign_boxes,
    bootstrap_metrics,
    boxes_of,
    check_same_images,
    compare_records,
    compare_table,
    compute_ious,
    compute_metrics,
    match_boxes,
    percentile_interval,
    resample_weights,
    score_images,
    summarize,
)
from helpers.parsing import parse_answer
from helpers.plots import BLUE, MODEL_COLOURS, ORANGE, plot_differences, plot_images, to_jpeg
from helpers.runs import RunFolder, write_file
from helpers.tiny.packages import draw_package
from helpers.training import create_detector, load_detector

disable_progress_bar()
disable_loading_bar()

# %% [markdown]
# ## 1. What the metrics mean
#
# **IoU** of two boxes is the area of their intersection over the area of their union. An image may hold several true
# boxes and an answer several predicted ones, so it has to be said which belongs to which. Two readings are in use, and
# both are given:
#
# - *One to one*: each predicted box is assigned to at most one true box, so that the sum of IoU is as large as
#   possible (the Hungarian method). A true box for which none is left gets 0.
# - *Best*: each true box gets the predicted box that fits it best, whatever else that box is used for.
#
# From these come the metrics:
#
# - `mean_iou`, `median_iou`: mean over an image's true boxes of the one-to-one IoU; then the mean or median over the
#   images that have true boxes.
# - `iou_gt_0.5`, `iou_gt_0.7`: share of the images with true boxes in which that mean is above 0.5, above 0.7.
# - `mean_best_iou`: the best IoU of every true box, mean over the true boxes of all images.
# - `precision`: true positives / predicted boxes; 0 if nothing was predicted. A *true positive* is an assigned pair
#   with an IoU of at least the threshold (0.5); here boxes are assigned so that there are as many of these as can be.
# - `recall`: true positives / true boxes.
# - `f1`: 2 true positives / (predicted boxes + true boxes), the harmonic mean of precision and recall.
# - `mAP`, `mAP50`, `mAP75`: COCO's average precision (the mean precision at 101 recalls, at most 100 boxes an image),
#   as a mean over the IoU thresholds 0.50, 0.55 … 0.95; at 0.50; at 0.75. Where labels count, the mean over labels. A
#   box without a score counts as 1.0; equal scores are ranked in the order of the images.
# - `detection_rate`: share of images whose answer holds at least one readable box, right or wrong.
# - `malformed_rate`: share of images whose answer holds something that looks like a box and cannot be read: cut off,
#   three numbers, no area, outside of the image.
# - `calibration_error`: expected calibration error: the distance between score and share of true positives among boxes
#   of like score; mean over ten bins of the score, weighted by their boxes.
# - `n`: images.
#
# The *score* of a predicted box is the geometric mean of the probabilities of the tokens that write it. Predicted
# boxes in an image without true boxes count against precision and F1. What is not defined, such as a mean over no true
# boxes, is `None`, in JSON `null`.
#
# Three small images on which everything can be worked out by hand:

# %%
SQUARE, TALL = [0, 0, 10, 10], [0, 0, 10, 20]
examples = {
    "a": ([SQUARE], [[5, 0, 15, 10]]),  # intersection 50, union 150
    "b": ([SQUARE, TALL], [TALL]),  # two true boxes, one inside of the other; one predicted box
    "c": ([SQUARE], [[0, 0, 10, 8], [20, 10, 30, 20], [40, 0, 50, 10]]),  # 80 / 100, and two more boxes
}


def to_labelled(boxes: list[list[float]]) -> list[dict]:
    """Boxes as a record holds them."""
    return [{"label": "nutrition-table", "box": box} for box in boxes]


by_hand = [
    {"id": name, "truth": to_labelled(truth), "prediction": to_labelled(prediction)}
    for name, (truth, prediction) in examples.items()
]
readings = [(match_boxes(*pair), compute_ious(*map(to_labelled, pair)).max(axis=1)) for pair in examples.values()]
drawn = plot_images(
    [Image.new("RGB", (54, 24), "white")] * 3,
    [boxes_of(record, "truth") for record in by_hand],
    [boxes_of(record, "prediction") for record in by_hand],
    titles=[
        f"{name}: one to one {np.round(one, 2).tolist()}, best {best.round(2).tolist()}"
        for name, (one, best) in zip(examples, readings, strict=True)
    ],
    columns=3,
)
for axes in drawn.axes:
    axes.set(xlim=(-3, 54), ylim=(24, -3))
drawn.set_size_inches(10, 2.4)
plt.show()

# %%
pd.DataFrame({"value": summarize(by_hand)}).T.style.format(precision=3).format("{:.0f}", subset=["n"])

# %% [markdown]
# The `precision` is 2 / 5: of five predicted boxes, the one of b and the first one of c reach an IoU of 0.5. The
# `recall` is 2 / 4: so many true boxes there are. The IoU of b is (0 + 1) / 2, which is not *above* 0.5, so only c
# counts in `iou_gt_0.5`.
#
# Image b is where the readings differ. Its predicted box is the outer true box exactly, and covers half of the inner
# one. Best gives the inner one its half, one to one gives it nothing: one answer cannot be two tables. So
# `mean_iou` is the stricter reading.
#
# The two also average over different things. `mean_best_iou` is a mean over *boxes*, like recall and average
# precision: every table counts the same, wherever it is. `mean_iou` is a mean over *images*, because images are what
# is drawn at random, and so what intervals and paired comparisons need: one value per image. A table that shares its
# image with another one weighs half as much in it. For that reason `mean_best_iou` can be the smaller one of the two,
# although no best IoU is ever below the assigned one. For the run, the steps from one to the other:

# %%
folders = {file.parent.name: file.parent for file in sorted(Path(RUN_DIR).glob("*/predictions.jsonl"))}
if not folders:
    raise FileNotFoundError(f"{RUN_DIR} holds no results: run `make demo`, or give RUN_DIR the OUTPUT_DIR of a run.")
order = [name for name in MODEL_COLOURS if name in folders]
order += [name for name in folders if name not in order]
colours = {name: MODEL_COLOURS.get(name, f"C{number + 4}") for number, name in enumerate(order)}
records_by_name = {name: RunFolder(folders[name]).read_records() for name in order}
first = records_by_name[order[0]]
for records in records_by_name.values():
    check_same_images(first, records)
images_seen = len(first)


def best_ious(record: dict) -> np.ndarray:
    """For every true box the IoU with the predicted box that fits it best."""
    return compute_ious(record["truth"], record["prediction"]).max(axis=1, initial=0)


rows = {}
for name, records in records_by_name.items():
    metrics, with_truth = summarize(records), [record for record in records if record["truth"]]
    rows[name] = {
        "mean_iou: one to one, mean over images": metrics["mean_iou"],
        "best, mean over images": np.mean([best_ious(record).mean() for record in with_truth]),
        "mean_best_iou: best, mean over boxes": metrics["mean_best_iou"],
    }
several = [record for record in first if len(record["truth"]) > 1]
print(f"{images_seen} images, {len(several)} of them with several true boxes")
pd.DataFrame(rows).T.style.format(precision=3)

# %% [markdown]
# From the first column to the second the reading changes, from the second to the third what is averaged over. The
# more images hold several tables, the larger either step can be.
#
# ## 2. The table, and its noise
#
# All models on the same images, with 95 % bootstrap intervals: the images are drawn anew 2,000 times, with
# replacement, or groups of images where records have a `group` (the barcode), since two photographs of one package are
# not independent.

# %%
compare_table(records_by_name).T

# %% [markdown]
# Two models are compared on the same draws of images. The interval belongs to their *difference*: what is hard for
# both falls out of it. Nothing here is corrected for the number of comparisons: of twenty pairs of equal models, one
# is called different on average.

# %%
trained = [name for name in order if RunFolder(folders[name]).is_trained]
if not trained:
    raise FileNotFoundError(f"{RUN_DIR} holds no trained model: run `make demo`, or give RUN_DIR another folder.")
ranked = sorted(trained, key=lambda name: summarize(records_by_name[name])["mean_iou"], reverse=True)
best = ranked[0]
pairs = [(order[0], best)] + [(other, best) for other in ranked[1:]]
plot_differences(records_by_name, pairs)
plt.show()

# %% [markdown]
# **How many images would it take to see a difference of 0.02?** The half-width of an interval shrinks with the square
# root of the number of images. To find a true difference *d* in four of five evaluations, *d* has to be 1.96 + 0.84
# standard errors. The table gives the standard error of the difference on these images, what it would be if the two
# models had been asked about different images, and the number of images that follows from it.

# %%
DIFFERENCE = 0.02


def standard_errors(one: str, other: str) -> dict[str, float]:
    """Of a difference in mean IoU: on the same images, and as if the images were not the same."""
    draws = [bootstrap_metrics(records_by_name[name])["mean_iou"] for name in (one, other)]
    return {"same images": (draws[1] - draws[0]).std(), "other images": np.hypot(*(d.std() for d in draws))}


rows = {}
for one, other in pairs:
    errors = standard_errors(one, other)
    needed = {f"needed, {kind}": images_seen * (2.8 * error / DIFFERENCE) ** 2 for kind, error in errors.items()}
    rows[f"{one} -> {other}"] = {f"standard error, {kind}": error for kind, error in errors.items()} | needed
needed = pd.DataFrame(rows).T
needed.style.format("{:.3f}", subset=needed.columns[:2]).format("{:,.0f}", subset=needed.columns[2:])

# %% [markdown]
# The square root is a claim as well. It is checked by looking at fewer images: each point is the half-width of the
# interval measured on a random part of them, the line what the whole predicts for other numbers.

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
shuffled = np.random.default_rng(SEED).permutation(images_seen)
sizes = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n <= images_seen]
for one, other in pairs:
    half_widths = []
    for n in sizes:
        part = [[records_by_name[name][i] for i in shuffled[:n]] for name in (one, other)]
        result = compare_records(*part)
        half_widths.append((result["high"] - result["low"]) / 2)
    images = np.geomspace(10, 10_000, 50)
    colour = colours[one]
    axes.plot(images, 1.96 * standard_errors(one, other)["same images"] * (images_seen / images) ** 0.5, color=colour)
    axes.plot(sizes, half_widths, "o", color=colour, label=f"{one} -> {other}")
axes.axhline(DIFFERENCE, color="black", ls="--", lw=1)
axes.text(10, DIFFERENCE * 0.93, f"a difference of {DIFFERENCE}", va="top", fontsize=8)
axes.set(xscale="log", yscale="log", xlabel="images", ylabel="half-width, mean IoU", title="Noise of a difference")
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Where a line crosses the dashed one, a measured difference of 0.02 is just outside of the noise. More images are the
# honest way there; more decimals are not.
#
# **Do the models fail on the same images?** One point per image. What lies above the line, the model on the vertical
# axis does better; the titles count images, where a difference in IoU under 0.01 is a tie.


# %%
#| export analysis: Average precision, calibration, kinds of errors, label policies, evaluation cards.
TIE = 0.01  # a smaller difference in IoU is none


def image_ious(records: Sequence[dict]) -> np.ndarray:
    """IoU of every image (mean over its true boxes, one to one); NaN where it has no true box."""
    scores = score_images(records, threshold=0.5)
    return scores["iou"].where(scores["with_truth"] > 0).to_numpy()


def count_wins(records: Sequence[dict], others: Sequence[dict]) -> tuple[int, int, int]:
    """On how many images `others` have a higher IoU than `records`, a lower one, and the same within TIE."""
    check_same_images(records, others)
    differences = image_ious(others) - image_ious(records)
    better, worse = int((differences >= TIE).sum()), int((differences <= -TIE).sum())
    return better, worse, int((~np.isnan(differences)).sum()) - better - worse


def plot_against(records_by_name: dict[str, Sequence[dict]], reference: str) -> plt.Figure:
    """IoU of each image under every other model against that under `reference`; above the line is better."""
    others = [name for name in records_by_name if name != reference]
    size = (3.2 * len(others), 3.7)
    figure, grid = plt.subplots(1, len(others), figsize=size, layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, others, strict=True):
        pair = [records_by_name[reference], records_by_name[name]]
        axes.scatter(*map(image_ious, pair), s=14, alpha=0.5, linewidths=0, color=MODEL_COLOURS.get(name, BLUE))
        axes.plot([0, 1], [0, 1], color="grey", lw=1)
        axes.set_title("better {}, worse {}, tie {}".format(*count_wins(*pair)), fontsize=9)
        axes.set(xlabel=f"IoU, {reference}", ylabel=f"IoU, {name}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
    return figure


# %%
compared = dict.fromkeys([order[0], *trained])
plot_against({name: records_by_name[name] for name in compared}, reference=best)
plt.show()

# %% [markdown]
# Points near the lower left corner are images that both models miss. Points far off the line are images that only
# one of them finds: a difference in the mean is the balance of these.
#
# ## 3. Precision and recall
#
# A detector can leave out the boxes it is not sure of. Average precision ranks all boxes of all images by score and
# asks, for every share of tables found (recall), how many of the boxes up to there are right (precision). COCO takes
# the mean over 101 recalls and ten IoU thresholds; it is the metric that other detectors are compared by. The
# evaluation itself is COCO's, by the library `faster-coco-eval`; only the format is made here.


# %%
#| export analysis
def to_coco(records: Sequence[dict]) -> tuple[dict, list[dict]]:
    """Records as a dataset and a list of results in COCO's format, boxes `[x, y, width, height]` in pixels."""
    sides = {"truth": [], "prediction": []}
    for number, record in enumerate(records, start=1):
        for side, entries in sides.items():
            for labelled in record[side]:
                x1, y1, x2, y2 = labelled["box"]
                entries.append({
                    "id": len(entries) + 1,
                    "image_id": number,
                    "category_id": labelled.get("category_id", 1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": labelled.get("score", 1.0),
                })  # fmt: skip
    categories = sorted({entry["category_id"] for entries in sides.values() for entry in entries})
    dataset = {
        "images": [{"id": number} for number in range(1, len(records) + 1)],
        "categories": [{"id": number, "name": str(number)} for number in categories],
        "annotations": sides["truth"],
    }
    return dataset, sides["prediction"]


def compute_precision(records: Sequence[dict]) -> np.ndarray | None:
    """COCO's precision at (10 IoU thresholds, 101 recalls in 0..1, categories of the truth).

    None without true boxes. At most 100 boxes of an image and category count (cocodataset.org/#detection-eval).
    """
    dataset, found = to_coco(records)
    if not dataset["annotations"]:
        return None
    truth = COCO(dataset)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # boxes of all sizes
    return precision[:, :, (precision > -1).all(axis=(0, 1))]  # -1: a category without true boxes


def compute_map(records: Sequence[dict]) -> dict[str, float | None]:
    """COCO's average precision: `mAP` over IoU thresholds .50, .55 ... .95, `mAP50`, `mAP75`; None without true boxes.

    The mean is over the categories that occur in the truth.
    """
    precision = compute_precision(records)
    if precision is None:
        return dict.fromkeys(["mAP", "mAP50", "mAP75"])
    return {"mAP": float(precision.mean()), "mAP50": float(precision[0].mean()), "mAP75": float(precision[5].mean())}


def measure(records: Sequence[dict], threshold: float = 0.5) -> dict[str, float | None]:
    """`summarize` with average precision."""
    metrics = summarize(records, threshold)
    n = metrics.pop("n")
    return metrics | compute_map(records) | {"n": n}


# %%
pd.DataFrame({name: compute_map(records) for name, records in records_by_name.items()}).T.style.format(precision=3)

# %%
figure, grid = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
for axes, (index, threshold) in zip(grid, [(0, 0.5), (5, 0.75)], strict=True):
    for name, records in records_by_name.items():
        precision = compute_precision(records)[index].mean(axis=1)
        axes.plot(np.linspace(0, 1, 101), precision, label=name, color=colours[name])
    axes.set(title=f"true positives from IoU {threshold} on", xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
grid[0].set_ylabel("precision")
grid[1].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# A curve ends at 0 where no further table is found, at whatever score. On the left, how far right a curve reaches
# tells how many tables a model finds at all. The distance between left and right panel is made of boxes that are about
# the right place and not exact. A curve that is high on the left side and falls means that the scores rank well: the
# surest boxes are right. That is a statement about their order alone; the next section is about their size.
#
# Average precision has no interval here: it is not a sum over images, and computing it 2,000 times takes too long.
#
# ## 4. Can the score be believed?
#
# Among boxes with a score of about 0.8, about 80 of 100 should be right. Then scores are *calibrated*, and a threshold
# on them means something.


# %%
#| export analysis
def collect_scores(records: Sequence[dict], threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Score of every predicted box, and whether it is a true positive; a box without a score is left out."""
    scores, right = [], []
    for record in records:
        ious = compute_ious(record["truth"], record["prediction"])
        rows, columns = assign_boxes(ious, threshold)
        positives = set(columns[ious[rows, columns] >= threshold])
        for column, labelled in enumerate(record["prediction"]):
            if "score" in labelled:
                scores.append(labelled["score"])
                right.append(column in positives)
    return np.array(scores, dtype=float), np.array(right, dtype=bool)


def bin_scores(scores: np.ndarray, right: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Boxes by score in bins of equal width: `boxes` (how many), mean `score`, and `share` of true positives."""
    number = np.minimum((scores * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": number, "score": scores, "right": right})
    return table.groupby("bin").agg(boxes=("score", "size"), score=("score", "mean"), share=("right", "mean"))


def calibration_error(records: Sequence[dict], threshold: float = 0.5) -> float | None:
    """Expected calibration error: mean distance of score and share of true positives; None without scored boxes.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 5, in ten bins.
    """
    scores, right = collect_scores(records, threshold)
    if not len(scores):
        return None
    table = bin_scores(scores, right)
    return float(np.average((table.score - table.share).abs(), weights=table.boxes))


def plot_reliability(axes: plt.Axes, records: Sequence[dict], colour: str = BLUE) -> None:
    """Share of true positives against the score, in ten bins; the size of a point tells how many boxes there are."""
    table, error = bin_scores(*collect_scores(records)), calibration_error(records)
    axes.plot([0, 1], [0, 1], color="grey", lw=1)
    sizes = 300 * table.boxes / max(1, table.boxes.sum()) + 10
    axes.scatter(table.score, table.share, s=sizes, color=colour, zorder=3)
    title = "no scores" if error is None else f"calibration error {error:.2f}"
    axes.set(title=title, xlabel="score", ylabel="share of true positives", xlim=(0, 1), ylim=(-0.03, 1.05))


# %%
scored = [name for name in order if len(collect_scores(records_by_name[name])[0])]
size = (2.6 * len(scored), 3)
figure, grid = plt.subplots(1, len(scored), figsize=size, layout="constrained", squeeze=False, sharey=True)
for axes, name in zip(grid.flat, scored, strict=True):
    plot_reliability(axes, records_by_name[name], colours[name])
    axes.set_title(f"{name}\n{axes.get_title()}", fontsize=9)
    axes.label_outer()
plt.show()

# %%
rows = {}
for name in scored:
    scores, right = collect_scores(records_by_name[name])
    rows[name] = {"boxes": len(scores), "mean score": scores.mean(), "share of true positives": right.mean()}
pd.DataFrame(rows).T.style.format(precision=3).format("{:.0f}", subset=["boxes"])

# %% [markdown]
# Above the line, boxes are right more often than the score says: the score is too low. Below the line it is too high,
# as for the base, which is sure of boxes around other things. With a hundred boxes in ten bins, a single point is
# uncertain by a tenth or more; the table has the means over all boxes.
#
# **Why too low?** A guess: a box is written digit by digit, and the score is a mean over all of its tokens. The last
# digit of a coordinate decides about a thousandth of the image, which hardly changes the IoU and which nobody can see.
# If the model spreads its probability over several last digits, the score falls although the box is right. Records
# keep one score per box, so the best trained model is asked again, and the probabilities are sorted by the place of
# their digit. That it is the same model shows in its answers, which are compared with those on file; from here on the
# new ones are used.

# %%
trained_run = RunFolder(folders[best])
settings = SimpleNamespace(**trained_run.read_recipe()["settings"])
detector = load_detector(trained_run.path, settings)
eval_rows = load_rows(DATASET_ID, EVAL_SPLIT, None, SEED)
numbers = {image_id: number for number, image_id in enumerate(eval_rows["image_id"])}


def ask(detector: Detector, images: Sequence[Image.Image], at_once: int = 16) -> list[Answer]:
    """The detector's answers about images of any number."""
    batches = [images[start : start + at_once] for start in range(0, len(images), at_once)]
    return [answer for batch in batches for answer in generate(detector, to_questions(batch, detector))]


on_file = records_by_name[best][:PROBED]
answers = ask(detector, [read_row(eval_rows[numbers[record["id"]]])[0] for record in on_file])
probed = [add_answer(record, answer, detector.task) for record, answer in zip(on_file, answers, strict=True)]
same = sum(answer.text == record["raw"] for answer, record in zip(answers, on_file, strict=True))
print(f"{best}: {same} of {len(probed)} answers are word for word those on file")

# %% [markdown]
# Only boxes that are true positives are looked at: boxes that are right.


# %%
def list_digits(answer: Answer, span: tuple[int, int]) -> list[dict]:
    """Place (0 for units, 1 for tens, 2 for hundreds) and probability of each digit of the box in `text[span]`."""
    probability_at = dict(zip([0, *answer.ends], answer.probabilities, strict=False))
    return [
        {"place": number.end() - position - 1, "probability": probability_at[position]}
        for number in re.compile(r"\d+").finditer(answer.text, *span)
        for position in range(*number.span())
    ]


digits, distances = [], []
for record, answer in zip(probed, answers, strict=True):
    ious, spans = compute_ious(record["truth"], record["prediction"]), parse_answer(answer.text).spans
    for row, column in zip(*assign_boxes(ious, 0.5), strict=True):
        if ious[row, column] >= 0.5 and len(spans) == len(record["prediction"]):  # else a box without area was written
            digits += list_digits(answer, spans[column])
            true, found = (np.array(record[side][n]["box"]) for side, n in [("truth", row), ("prediction", column)])
            distances += (1000 * np.abs(true - found) / ([record["width"], record["height"]] * 2)).tolist()
digits = pd.DataFrame(digits, columns=["place", "probability"])
PLACES = {2: "hundreds", 1: "tens", 0: "units"}
by_place = digits[digits.place.isin(PLACES)].groupby("place").probability
print(f"edges of the true positives are off by {pd.Series(distances, dtype=float).median():.1f} of 1000 (median)")
places = by_place.agg(["count", "mean", "median"]).rename(PLACES).iloc[::-1]
places.style.format(precision=2).format("{:.0f}", subset=["count"])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
columns = [digits.probability[digits.place == place] for place in PLACES]
left.boxplot(columns, tick_labels=list(PLACES.values()), medianprops={"color": ORANGE, "lw": 2}, flierprops={"ms": 3})
left.axhline(0.1, color="grey", ls="--", lw=1)
left.text(0.52, 0.12, "ten equal digits", fontsize=8, color="grey")
left.set(ylabel="probability of the digit", ylim=(0, 1.03), title="Digits of right boxes, by place")
right.hist(distances, bins=np.arange(0, 101, 4), color=BLUE)
right.axvline(10, color="grey", ls="--", lw=1)
right.text(11, right.get_ylim()[1] * 0.93, "one step of the tens", fontsize=8, color="grey")
right.set(
    xlabel="distance to the true edge, in 1/1000 of the image", ylabel="edges", title="How exact right boxes are"
)
plt.show()

# %% [markdown]
# On the left, the further right a digit stands in its number, the less sure the model is of it. Chance alone would be
# the dashed line. On the right, why that is no defect: an edge that is a few thousandths off has other units than the
# true one, and one that is further off than a step of the tens may have other tens. Where they cannot be known,
# spreading the probability over several digits is right. But a score that asks for exact digits then measures
# something other than whether the IoU is above 0.5.
#
# That is still a correlation. **The experiment**: score the same boxes without their units, then by the hundreds
# alone, and measure the calibration error again. If the last digits were innocent, leaving them out would change
# nothing.

# %%
KINDS_OF_SCORE = {"all digits": 0, "without units": 1, "hundreds alone": 2}


def rescore(record: dict, answer: Answer, lowest: int) -> dict:
    """The record with scores from the digits at the place `lowest` and above; small numbers may have none of these."""
    spans, prediction = parse_answer(answer.text).spans, []
    for labelled, span in zip(record["prediction"], spans, strict=False):
        kept = [digit["probability"] for digit in list_digits(answer, span) if digit["place"] >= lowest]
        prediction.append(labelled | {"score": float(np.exp(np.mean(np.log(kept)))) if kept else 1.0})
    return record | {"prediction": prediction}


rescored = {
    kind: [rescore(record, answer, lowest) for record, answer in zip(probed, answers, strict=True)]
    for kind, lowest in KINDS_OF_SCORE.items()
}
figure, grid = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", sharey=True)
for axes, (kind, boxes_scored) in zip(grid, rescored.items(), strict=True):
    plot_reliability(axes, boxes_scored, colours[best])
    axes.set_title(f"{kind}\n{axes.get_title()}", fontsize=10)
    axes.label_outer()
plt.show()

# %%
rows = {}
for kind, boxes_scored in rescored.items():
    scores, right = collect_scores(boxes_scored)
    rows[kind] = {"mean score": scores.mean(), "share of true positives": right.mean()}
    rows[kind] |= {"calibration error": calibration_error(boxes_scored), "mAP50": compute_map(boxes_scored)["mAP50"]}
pd.DataFrame(rows).T.style.format(precision=3)

# %% [markdown]
# The boxes, and so their share of true positives, are the same in every row; what moves is the score. The first step
# is the part of the gap that the units account for, the second the part of the tens. `mAP50` tells whether the ranking
# suffers or gains, since only the order of the scores enters it. With this few images, differences of some hundredths
# in these columns are noise.
#
# For use: choose a threshold on the score by looking at a curve like this one, on images of your own, and not by the
# number 0.5.
#
# ## 5. In which ways boxes fail
#
# Precision and recall count errors, they do not tell them apart. Each predicted box is put into one of four classes:
#
# - *correct*: a true positive;
# - *shifted*: about the right place: its best IoU is between 0.1 and the threshold;
# - *duplicate*: at least at the threshold, but its true box already belongs to another predicted box;
# - *background*: IoU under 0.1, or, where labels count, the wrong label.
#
# A true box with neither a correct nor a shifted box is *missed*; *malformed* counts the pieces of answers that could
# not be read. The limit of 0.1 is TIDE's (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
# Errors", 2020).


# %%
#| export analysis
ERROR_KINDS = ("correct", "shifted", "duplicate", "background", "missed", "malformed")
SHIFTED_IOU = 0.1  # a box with less overlap is not about that object; TIDE's value


def count_image_errors(record: dict, threshold: float = 0.5) -> dict[str, int]:
    """The predicted boxes, missed true boxes and unread pieces of one image, counted by ERROR_KINDS."""
    truth = record["truth"]
    ious = compute_ious(truth, record["prediction"])
    rows, columns = assign_boxes(ious, threshold)
    positive = ious[rows, columns] >= threshold
    rest = np.delete(ious, columns[positive], axis=1)
    best = rest.max(axis=0, initial=0)
    shifted = (best >= SHIFTED_IOU) & (best < threshold)
    reached = {*rows[positive], *rest[:, shifted].argmax(axis=0)} if truth else set()
    return {
        "correct": int(positive.sum()),
        "shifted": int(shifted.sum()),
        "duplicate": int((best >= threshold).sum()),
        "background": int((best < min(SHIFTED_IOU, threshold)).sum()),
        "missed": len(truth) - len(reached),
        "malformed": len(record.get("unread", [])),
    }


def count_errors(records: Iterable[dict], threshold: float = 0.5) -> dict[str, int]:
    """Sums of `count_image_errors` over records."""
    counts = [count_image_errors(record, threshold) for record in records]
    return {kind: sum(count[kind] for count in counts) for kind in ERROR_KINDS}


# %%
errors = pd.DataFrame({name: count_errors(records) for name, records in records_by_name.items()}).T
errors

# %%
KIND_COLOURS = dict(zip(ERROR_KINDS, ["#1a9850", "#fee08b", ORANGE, "#d73027", "#737373", "#cccccc"], strict=True))
axes = errors.plot.barh(stacked=True, color=KIND_COLOURS, figsize=(9, 0.45 * len(errors) + 1.4), width=0.75)
axes.set(
    xlabel="predicted boxes, missed true boxes, unread pieces", title="Kinds of errors, true positives from IoU 0.5 on"
)
axes.invert_yaxis()
axes.legend(frameon=False, fontsize=8, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.22 - 0.6 / len(errors)))
axes.figure.set_layout_engine("constrained")
plt.show()

# %% [markdown]
# The kinds ask for different things. *Shifted* boxes: a higher resolution, or more steps. *Missed* tables together
# with *background* boxes: the model looks at something else. *Duplicates*: it does not know when to stop. *Malformed*:
# `MAX_NEW_TOKENS` is too small, or the format was not learned.
#
# What they look like, two images for each kind, from the best trained model where it has one, else from the next:

# %%
SHOWN_KINDS = ("shifted", "missed", "background", "duplicate")


def find_examples(kind: str, seen: set, count: int = 2) -> list[tuple[str, dict]]:
    """Model and record of the first unseen images with an error of a kind; the best trained model comes first."""
    names = [*ranked, *(name for name in order if name not in ranked)]
    found = [(name, r) for name in names for r in records_by_name[name] if count_image_errors(r)[kind]]
    unseen = [(name, record) for name, record in found if record["id"] not in seen][:count]
    seen.update(record["id"] for _, record in unseen)
    return unseen


seen = set()
chosen = {kind: find_examples(kind, seen) for kind in SHOWN_KINDS}
for kind in [kind for kind, found in chosen.items() if not found]:
    print(f"no model made an error of the kind {kind}")
columns = [(kind, *example) for number in range(2) for kind in chosen for example in chosen[kind][number : number + 1]]
sheet = plot_images(
    [read_row(eval_rows[numbers[record["id"]]])[0] for *_, record in columns],
    [boxes_of(record, "truth") for *_, record in columns],
    [boxes_of(record, "prediction") for *_, record in columns],
    titles=[f"{kind}: {name}, IoU {record['iou']:.2f}" for kind, name, record in columns],
    columns=sum(len(found) > 0 for found in chosen.values()),
)
to_jpeg(sheet, dpi=80)

# %% [markdown]
# A missed table and a box on the background are often one failure, seen from both sides: the model looked at something
# else. It counts twice, once against precision and once against recall. A shifted box counts against both as well,
# though it would be of use to someone who only wants to know where to look. What the boxes lie on instead is worth a
# look: things that are like tables (lists of ingredients, price tables) say that the model has learned the look of a
# table, and not yet what is in one.
#
# ## 6. Are small tables harder?
#
# The same shift costs a small box more IoU than a large one. The true boxes are put into five bins of equal number, by
# their share of the image's area. The bars are plus and minus one standard error of the mean.


# %%
#| export analysis
def list_sizes(records: Sequence[dict]) -> pd.DataFrame:
    """Every true box: its `area` as a share of the image's, and its `iou`, one to one."""
    lines = []
    for record in records:
        truth = boxes_of(record, "truth")
        for (x1, y1, x2, y2), iou in zip(truth, match_boxes(truth, boxes_of(record, "prediction")), strict=True):
            lines.append({"area": (x2 - x1) * (y2 - y1) / (record["width"] * record["height"]), "iou": iou})
    return pd.DataFrame(lines, columns=["area", "iou"])


def bin_sizes(records: Sequence[dict], bins: int = 5) -> pd.DataFrame:
    """Mean IoU of true boxes by area, in bins of about equal number: `boxes`, median `area`, `iou`, its `error`."""
    table = list_sizes(records)
    groups = table.groupby(pd.qcut(table.area, min(bins, len(table)), duplicates="drop"), observed=True)
    return groups.agg(boxes=("iou", "size"), area=("area", "median"), iou=("iou", "mean"), error=("iou", "sem"))


def plot_iou_by_size(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Mean IoU of true boxes against their share of the image's area, a line per model, with standard errors."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for name, records in records_by_name.items():
        table = bin_sizes(records)
        colour = MODEL_COLOURS.get(name)
        axes.errorbar(table.area, table.iou, table.error.fillna(0), marker="o", capsize=3, label=name, color=colour)
    axes.set(xscale="log", xlabel="area of the table / area of the image", ylabel="mean IoU", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.2g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    return figure


# %%
plot_iou_by_size(records_by_name)
plt.show()

# %%
bin_sizes(records_by_name[best]).reset_index(drop=True).round(3)

# %% [markdown]
# The same-box line shows how much of such a curve is geometry: a box that never looks does best on tables of its own
# size. What a trained model gains over it at the left end is what it sees. The real photographs hold tables down to
# a few pixels, so the left end is what a higher `MAX_PIXELS` is for (`notebooks/03_data_preprocessing`).
#
# ## 7. Which labels count
#
# So far labels did not count: a base model that writes "nutrition facts" has found the table. Whether that is fair
# depends on the question, so it is a *policy*, chosen in the open:
#
# - `merge` (the default): all boxes are of one kind;
# - `multi-class`: labels must agree, up to case, spaces, `_` and `-`; average precision is the mean over labels;
# - `table-only`: of the true boxes those labelled `nutrition-table`, and all predicted ones.
#
# The metrics know nothing of policies. They compare boxes with the same COCO `category_id`, or all boxes where there
# is none, and a policy rewrites records accordingly.


# %%
#| export analysis
POLICIES = ("merge", "multi-class", "table-only")
TABLE = "nutrition-table"
SIDES = ["truth", "prediction"]


def apply_policy(records: Sequence[dict], policy: str) -> list[dict]:
    """The records as a policy wants them compared. Raises ValueError for an unknown policy.

    `merge`: labels do not count; `multi-class`: boxes get a `category_id` by their label; `table-only`: as `merge`,
    with the true boxes labelled TABLE alone.
    """
    if policy not in POLICIES:
        raise ValueError(f"Unknown policy {policy!r}: use one of {', '.join(POLICIES)}.")
    if policy == "multi-class":
        return add_categories(records)
    records = [record | {side: drop_categories(record[side]) for side in SIDES} for record in records]
    return keep_label(records, TABLE, ["truth"]) if policy == "table-only" else records


def add_categories(records: Sequence[dict]) -> list[dict]:
    """Records whose boxes carry a `category_id`, 1, 2, ... in the alphabetical order of their labels."""
    labels = {normalize_label(labelled["label"]) for record in records for side in SIDES for labelled in record[side]}
    numbers = {label: number for number, label in enumerate(sorted(labels), start=1)}
    return [
        record
        | {side: [x | {"category_id": numbers[normalize_label(x["label"])]} for x in record[side]] for side in SIDES}
        for record in records
    ]


def drop_categories(boxes: Sequence[dict]) -> list[dict]:
    """Labelled boxes without a `category_id`."""
    return [{key: value for key, value in labelled.items() if key != "category_id"} for labelled in boxes]


def keep_label(records: Sequence[dict], label: str, sides: Sequence[str]) -> list[dict]:
    """Records with, on the given sides, no boxes but those with the label."""
    return [
        record | {side: [x for x in record[side] if normalize_label(x["label"]) == label] for side in sides}
        for record in records
    ]


# %%
labels = {"truth": [x["label"] for record in first for x in record["truth"]]}
labels |= {name: [x["label"] for r in records for x in r["prediction"]] for name, records in records_by_name.items()}
pd.DataFrame({name: Counter(map(normalize_label, found)) for name, found in labels.items()}).T.fillna(0).astype(int)

# %% [markdown]
# How often each label stands in the truth and in the answers of every model.
# Where truth and answers hold one label only, the policies cannot differ. (The real dataset has a few tables under
# other names.) To see them differ, the base gets drawn packages on which every object is labelled, and is asked for
# every object. `notebooks/00_tiny_world` shows such packages; which kinds the base has learned to find, and
# that it was never asked for nutrition tables, is said in `helpers/tiny/base/README.md`.

# %%
FIRST_SEED = 3_000_000_000  # neither the dataset nor the pretraining uses seeds from here on
del detector
release_memory()
base_model = load_model(settings.model_id, quantized=False, dtype=best_dtype()).eval()
base = create_detector(base_model, settings, ["object"])
packages = [draw_package(FIRST_SEED + number) for number in range(DRAWN)]
labelled_records = [
    {
        "id": str(number),
        "width": image.width,
        "height": image.height,
        "truth": [{"label": label, "box": list(box)} for label, box in objects],
    }
    for number, (image, objects) in enumerate(packages)
]
base_answers = ask(base, [image for image, _ in packages])
of_base = [add_answer(record, a, base.task) for record, a in zip(labelled_records, base_answers, strict=True)]
rows = {policy: measure(apply_policy(of_base, policy)) for policy in POLICIES}
pd.DataFrame(rows).T[["mean_iou", "precision", "recall", "f1", "mAP"]].style.format(precision=3)

# %% [markdown]
# `multi-class` can only be lower than `merge` in precision and recall: a box at the right place under the wrong name
# is now wrong. Average precision can go either way, since it becomes a mean over labels, rare ones included.
# `table-only` asks another question altogether: of the tables, how many are covered, and how many of
# the boxes are on tables.
#
# Which label is taken for which? Boxes are paired by place alone, and the labels of a pair are counted; what has no
# partner at that IoU is paired with nothing.


# %%
#| export analysis
NO_BOX = "(no box)"


def pair_labels(record: dict, threshold: float) -> list[tuple[str, str]]:
    """Labels (true, answered) of boxes paired one to one from an IoU of `threshold` on; NO_BOX beside all others."""
    truth, answered = ([normalize_label(labelled["label"]) for labelled in record[side]] for side in SIDES)
    ious = compute_ious(*(drop_categories(record[side]) for side in SIDES))
    rows, columns = assign_boxes(ious, threshold)
    paired = [(r, c) for r, c in zip(rows.tolist(), columns.tolist(), strict=True) if ious[r, c] >= threshold]
    pairs = [(truth[row], answered[column]) for row, column in paired]
    pairs += [(label, NO_BOX) for row, label in enumerate(truth) if row not in dict(paired)]
    return pairs + [(NO_BOX, label) for n, label in enumerate(answered) if n not in [column for _, column in paired]]


def count_confusions(records: Sequence[dict], threshold: float = 0.5) -> pd.DataFrame:
    """How often each true label (rows) was answered with each label (columns): see `pair_labels`."""
    pairs = pd.DataFrame([pair for record in records for pair in pair_labels(record, threshold)], columns=SIDES)
    return pd.crosstab(pairs.truth, pairs.prediction)


def plot_confusions(counts: pd.DataFrame) -> plt.Figure:
    """`count_confusions` as a picture: darker is more often, as a share of the row."""
    figure, axes = plt.subplots(figsize=(1.1 * counts.shape[1] + 2, 0.5 * len(counts) + 1.6), layout="constrained")
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares.iloc[row, column] > 0.5 else "black"
        axes.text(column, row, count, ha="center", va="center", color=colour)
    axes.set_xticks(range(counts.shape[1]), counts.columns, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(counts)), counts.index, parse_math=False)
    axes.set(xlabel="answered", ylabel="true", title="Which label is taken for which")
    return figure


# %%
plot_confusions(count_confusions(of_base))
plt.show()

# %% [markdown]
# Off the diagonal is what the policies disagree about, but for what stands beside no box. With several labels there is
# a row for each, as if it were the only one:


# %%
#| export analysis
def summarize_labels(records: Sequence[dict], threshold: float = 0.5) -> dict[str, dict[str, float | None]]:
    """The metrics for every label of the truth, as if it were the only one; labels must agree.

    Rates over images are left out: whether an image was answered at all is not a matter of one label.
    """
    labels = sorted({normalize_label(labelled["label"]) for record in records for labelled in record["truth"]})
    table = {}
    for label in labels:
        alone = keep_label(apply_policy(records, "merge"), label, ["truth", "prediction"])
        metrics = measure(alone, threshold)
        table[label] = {name: metrics[name] for name in metrics if name not in ("detection_rate", "malformed_rate")}
        table[label]["n"] = sum(len(record["truth"]) > 0 for record in alone)
    return table


# %%
by_label = pd.DataFrame(summarize_labels(of_base)).T
figure, axes = plt.subplots(figsize=(8, 0.35 * len(by_label) + 1), layout="constrained")
bars = axes.barh(by_label.index, by_label.mean_iou, color=[ORANGE if x == TABLE else BLUE for x in by_label.index])
axes.bar_label(bars, [f"{iou:.2f} ({n:.0f} images)" for iou, n in by_label[["mean_iou", "n"]].to_numpy()], padding=3)
axes.set(xlabel="mean IoU, labels must agree", xlim=(0, 1.2), title="The base, asked for every object")
axes.invert_yaxis()
plt.show()

# %%
shown = by_label[["mean_iou", "precision", "recall", "f1", "mAP", "n"]]
shown.style.format(precision=3).format("{:.0f}", subset=["n"])

# %% [markdown]
# ## 8. A card for every model
#
# All of this in one report: metrics, intervals, calibration, kinds of errors, and labels where these count.


# %%
#| export analysis
def build_report(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> dict:
    """All metrics, calibration, intervals, errors by kind; metrics by label where labels count and there are many."""
    chosen = apply_policy(records, policy)
    labels = summarize_labels(records, threshold) if policy == "multi-class" else {}
    return measure(chosen, threshold) | {
        "calibration_error": calibration_error(chosen, threshold),
        "iou_threshold": threshold,
        "policy": policy,
        "intervals": bootstrap_report(chosen, threshold),
        "errors": count_errors(chosen, threshold),
        "labels": labels if len(labels) > 1 else {},
        "confusions": count_confusions(records, threshold).T.to_dict() if len(labels) > 1 else {},
    }


def bootstrap_report(records: Sequence[dict], threshold: float) -> dict[str, tuple[float, float] | None]:
    """`bootstrap_intervals`, and that of the median IoU over images with true boxes, on the same resamples."""
    scores = score_images(records, threshold)
    ious, with_truth = scores["iou"].to_numpy(), (scores["with_truth"] > 0).to_numpy()
    blocks = []
    for weights in resample_weights(records):
        metrics = compute_metrics(scores, weights)
        median = weighted_median(ious, weights * with_truth)
        blocks.append({"mean_iou": metrics["mean_iou"], "median_iou": median} | metrics)
    return {name: percentile_interval(np.concatenate([block[name] for block in blocks])) for name in blocks[0]}


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of (n,) values that are repeated `weights` times, whole numbers (resamples, n); NaN without weight."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    total = reached[:, -1:]
    lower, upper = (np.argmax(reached > (total - odd) // 2, axis=1) for odd in (1, 0))
    return np.where(total[:, 0] > 0, (values[order][lower] + values[order][upper]) / 2, np.nan)


def list_metrics(report: dict) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval (empty where there is none) of every metric of a report, as text."""
    lines = []
    for name in [*report["intervals"], "mAP", "mAP50", "mAP75", "calibration_error"]:
        value, interval = report[name], report["intervals"].get(name)
        shown = "n/a" if value is None else f"{value:.3f}"
        lines.append((name, shown, "{:.3f}, {:.3f}".format(*interval) if interval else ""))
    return lines


# %%
pd.DataFrame(list_metrics(build_report(records_by_name[best])), columns=["metric", best, "95 % interval"])

# %% [markdown]
# As a picture: precision and recall, the IoU of the images, score against share of true positives, and the kinds of
# errors. Side by side, the cards tell how models fail differently even where their mean IoU is the same.


# %%
#| export analysis
def plot_card(records: Sequence[dict], title: str, colour: str = BLUE) -> plt.Figure:
    """Precision-recall curves, IoU histogram, reliability diagram and kinds of errors of one model."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.8), layout="constrained")
    plot_precision_recall(axes[0], records, colour)
    ious = image_ious(records)
    axes[1].hist(ious[~np.isnan(ious)], bins=np.linspace(0, 1, 21), color=colour)
    axes[1].set(title="IoU of the images", xlabel="IoU", ylabel="images", xlim=(0, 1))
    plot_reliability(axes[2], records, colour)
    errors = count_errors(records)
    bars = axes[3].barh(list(errors), list(errors.values()), color=colour)
    axes[3].bar_label(bars, padding=2)
    axes[3].invert_yaxis()
    axes[3].margins(x=0.15)
    axes[3].set(title="kinds of errors", xlabel="boxes")
    figure.suptitle(title, parse_math=False)
    return figure


def plot_precision_recall(axes: plt.Axes, records: Sequence[dict], colour: str = BLUE) -> None:
    """COCO's precision-recall curves for an IoU of 0.5 (solid) and of 0.75 (dashed)."""
    precision = compute_precision(records)
    for index, threshold, style in [(0, 0.5, "-"), (5, 0.75, "--")]:
        values = np.full(101, np.nan) if precision is None else precision[index].mean(axis=1)
        axes.plot(np.linspace(0, 1, 101), values, style, label=f"IoU {threshold}", color=colour)
    axes.set(title="precision and recall", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(-0.02, 1.02))
    axes.legend(frameon=False, fontsize=8)


# %%
for name, records in records_by_name.items():
    plot_card(records, name, colours[name])
    plt.show()

# %% [markdown]
# A row that is high on the left and low on the diagonal of the third plot ranks well and is unsure; many images at
# IoU 0 beside many near 1 mean that the model either finds a table or does not; a heap in the middle means that it
# finds it and places it badly.
#
# And on disk, with the worst images: `card.md`, `plots.png` and `worst.png` in the folder of each model. Images are
# looked up by `image_id`, so the rows may be in any order.


# %%
#| export analysis
def write_card(folder: Path, records: Sequence[dict], rows: Dataset, policy: str = "merge") -> None:
    """Write `card.md`, `plots.png` and, if there are true boxes, `worst.png` into `folder`.

    `rows` hold the images of the records by `image_id`. Raises ValueError for an unknown policy or a missing image.
    """
    report, chosen = build_report(records, 0.5, policy), apply_policy(records, policy)
    ious = image_ious(chosen)
    worst = [chosen[number] for number in np.argsort(ious) if not np.isnan(ious[number])][:8]
    figures = {"plots.png": plot_card(chosen, folder.name, MODEL_COLOURS.get(folder.name, BLUE))}
    if worst:
        figures["worst.png"] = plot_worst(worst, find_images(rows, worst))
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=80)
        plt.close(figure)
    text = describe_card(folder.name, report, [str(record["id"]) for record in worst])
    write_file(folder / "card.md", text.encode())


def find_images(rows: Dataset, records: Sequence[dict]) -> list[Image.Image]:
    """The image of every record. Raises ValueError where `rows` lack one."""
    numbers = {image_id: number for number, image_id in enumerate(rows["image_id"])}
    missing = [record["id"] for record in records if record["id"] not in numbers]
    if missing:
        raise ValueError(f"The dataset has no image {missing[0]!r}: give the split that the records are about.")
    return [read_row(rows[numbers[record["id"]]])[0] for record in records]


def plot_worst(records: Sequence[dict], images: Sequence[Image.Image]) -> plt.Figure:
    """Images with true and predicted boxes, their IoU as titles."""
    truths, predictions = ([boxes_of(record, side) for record in records] for side in ("truth", "prediction"))
    titles = [f"{number}: IoU {iou:.2f}" for number, iou in enumerate(image_ious(records), start=1)]
    return plot_images(images, truths, predictions, titles)


def describe_table(table: pd.DataFrame) -> list[str]:
    """A table as lines of Markdown."""
    rows = [["", *map(as_cell, table.columns)], ["---"] * (table.shape[1] + 1)]
    rows += [
        [as_cell(name), *("n/a" if pd.isna(value) else f"{value:.3f}".removesuffix(".000") for value in row)]
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def as_cell(name: str) -> str:
    """A label in a cell of a table, as it is: neither Markdown nor HTML."""
    return re.sub(r"([\\`*\[\]<>|$~])", r"\\\1", " ".join(name.split()))


def describe_card(name: str, report: dict, worst: Sequence[str]) -> str:
    """The text of an evaluation card from `build_report`, and the ids of the worst images."""
    about = f"{report['n']} images, true positives from IoU {report['iou_threshold']} on, labels: {report['policy']}."
    lines = [f"# {name}", "", about, "", "| metric | value | 95 % interval |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(metric) + " |" for metric in list_metrics(report)]
    lines += ["", "Boxes: " + ", ".join(f"{count} {kind}" for kind, count in report["errors"].items()) + "."]
    for title, table in {
        "By label": report["labels"],
        "True labels, and how they were answered": report["confusions"],
    }.items():
        lines += ["", f"{title}:", "", *describe_table(pd.DataFrame(table).T)] if table else []
    lines += ["", "![Precision and recall, IoU, reliability, kinds of errors](plots.png)"]
    if worst:
        lines += ["", "The worst images, truth dashed, prediction solid:", "", "![Worst images](worst.png)", ""]
        lines += [f"{number}. {as_code(image_id)}" for number, image_id in enumerate(worst, start=1)]
    return "\n".join([*lines, ""])


# %%
for name, records in records_by_name.items():
    write_card(folders[name], records, eval_rows)
print((folders[best] / "card.md").read_text())

# %% [markdown]
# The same without a notebook is `python -m helpers.evaluation --predictions FILE.jsonl`, for any file of answers: one
# JSON object a line with `id`, `width`, `height`, `raw` (the model's text) and `truth`. The answers are read anew, so
# those of other models and programs can be measured the same way. Scores on file are kept where the boxes are those
# on file, so average precision is that of the card.

# %%
evaluation.main(["--predictions", str(folders[best] / "predictions.jsonl")])

# %% [markdown]
# ## What to try next
#
# - Point `RUN_DIR` and `DATASET_ID` at a run of your own, and see whether the scores of a larger model are too low,
#   too. Probabilities of a model that was trained longer can as well be too high.
# - Raise the threshold: `python -m helpers.evaluation --predictions FILE.jsonl --iou 0.75`. Which kind of error grows?
# - Fit a temperature: divide the logits by a constant before the softmax, choose it on the validation split so that
#   the calibration error is smallest, and measure on the evaluation split. Does it do more than leaving out the units?
# - Draw the images that `plot_against` puts far off the diagonal. What do they have in common?
# - Evaluate on more images (a larger dataset from `python -m helpers.tiny.packages`) until the interval of the
#   difference that interests you excludes 0, or until you know that the difference is too small to care about.
