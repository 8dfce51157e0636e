"""Average precision, calibration, kinds of errors, label policies, evaluation cards.

Printed from notebooks/04_evaluation_analysis.py: edit that, then run `make sync`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import Dataset
from faster_coco_eval import COCO, COCOeval_faster
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from helpers.data import read_row
from helpers.deployment import as_code
from helpers.detection import normalize_label
from helpers.metrics import (
    assign_boxes,
    boxes_of,
    check_same_images,
    compute_ious,
    compute_metrics,
    match_boxes,
    percentile_interval,
    resample_weights,
    score_images,
    summarize,
)
from helpers.plots import BLUE, MODEL_COLOURS, plot_images
from helpers.runs import write_file

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
