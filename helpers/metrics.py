"""Boxes matched one to one, metrics with intervals, paired comparisons.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from helpers.boxes import box_iou


def boxes_of(record: dict, side: str) -> list[list[float]]:
    """The boxes of a record's "truth" or "prediction", `[x1, y1, x2, y2]` in pixels."""
    return [labelled["box"] for labelled in record[side]]


def compute_ious(truth: Sequence[dict], prediction: Sequence[dict]) -> np.ndarray:
    """IoU of every true with every predicted box, (true, predicted); 0 where a `category_id` of the two differs."""
    ious = box_iou(*([labelled["box"] for labelled in side] for side in (truth, prediction)))
    same = [[t.get("category_id") == p.get("category_id") for p in prediction] for t in truth]
    return ious * np.reshape(same, ious.shape)


def assign_boxes(ious: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns of an IoU matrix one to one: the indices of both. Pairs may have an IoU of 0.

    As many pairs as can be have at least `threshold`; then the sum is largest (Kuhn, "The Hungarian method", 1955).
    """
    tie_breaker = ious / (min(ious.shape) + 1)  # sums to less than one more pair would add
    return linear_sum_assignment((ious >= threshold) + tie_breaker, maximize=True)


def assigned_ious(ious: np.ndarray) -> np.ndarray:
    """Of an IoU matrix (true, predicted): what each true box gets in the assignment with the largest sum."""
    assigned, pairs = np.zeros(len(ious)), assign_boxes(ious)
    assigned[pairs[0]] = ious[pairs]
    return assigned


def match_boxes(truth: Sequence[Sequence[float]], prediction: Sequence[Sequence[float]]) -> list[float]:
    """IoU of every true box with the predicted box assigned to it, one to one; 0 where none was left."""
    return assigned_ious(compute_ious(*([{"box": box} for box in side] for side in (truth, prediction)))).tolist()


RATIOS = {  # metric: numerator, denominator; columns of `score_images`
    "mean_iou": ("iou", "with_truth"),
    "detection_rate": ("detected", "images"),
    "iou_gt_0.5": ("iou_gt_0.5", "with_truth"),
    "iou_gt_0.7": ("iou_gt_0.7", "with_truth"),
    "mean_best_iou": ("best_iou", "truths"),
    "precision": ("true_positives", "predictions"),
    "recall": ("true_positives", "truths"),
    "malformed_rate": ("malformed", "images"),
    "boxes_per_empty_image": ("predictions_on_empty", "empty"),
}


def score_image(record: dict, threshold: float) -> dict[str, float]:
    """One record of `evaluate_detector` as the counts and sums that the metrics are made of."""
    truth, prediction = record["truth"], record["prediction"]
    ious = compute_ious(truth, prediction)
    iou = assigned_ious(ious).mean() if truth else 0.0
    counts = {"images": 1, "with_truth": len(truth) > 0, "truths": len(truth), "predictions": len(prediction)}
    counts |= {"empty": not truth, "predictions_on_empty": 0 if truth else len(prediction)}
    counts |= {"iou": iou, "iou_gt_0.5": iou > 0.5, "iou_gt_0.7": iou > 0.7}
    counts |= {"detected": len(prediction) > 0, "malformed": len(record.get("unread", [])) > 0}
    counts["true_positives"] = (ious[assign_boxes(ious, threshold)] >= threshold).sum()
    return counts | {"best_iou": ious.max(axis=1, initial=0).sum()}


def score_images(records: Sequence[dict], threshold: float) -> pd.DataFrame:
    """`score_image` for every record, one row each. Raises ValueError when there is none."""
    if not records:
        raise ValueError("No image was evaluated: EVAL_SAMPLES must be at least 1.")
    return pd.DataFrame([score_image(record, threshold) for record in records], dtype=float)


def compute_metrics(scores: pd.DataFrame, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of weighted images: `weights` is (resamples, images), every metric (resamples,).

    What is not defined is NaN, such as a mean over true boxes where there are none; precision without any predicted
    box is 0, as in scikit-learn.
    """
    sums = dict(zip(scores.columns, (weights @ scores.to_numpy()).T, strict=True))
    with np.errstate(invalid="ignore"):  # 0 / 0
        metrics = {name: sums[part] / sums[whole] for name, (part, whole) in RATIOS.items()}
        metrics["f1"] = 2 * sums["true_positives"] / (sums["truths"] + sums["predictions"])
    return metrics | {"precision": np.nan_to_num(metrics["precision"])}


def summarize(records: Sequence[dict], threshold: float = 0.5) -> dict[str, float | None]:
    """Every metric over the records of `evaluate_detector`; None (JSON has no NaN) where it is not defined.

    `threshold` is the IoU from which on an assigned pair is a true positive. Raises ValueError without records.
    """
    scores = score_images(records, threshold)
    metrics = {name: value[0] for name, value in compute_metrics(scores, np.ones((1, len(records)))).items()}
    median = scores["iou"][scores["with_truth"] > 0].median()
    metrics = {"mean_iou": metrics["mean_iou"], "median_iou": median} | metrics
    return {name: None if math.isnan(value) else float(value) for name, value in metrics.items()} | {"n": len(records)}


def resample_weights(records: Sequence[dict], resamples: int = 2000, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each image is in each bootstrap resample of whole groups, (100, images) at a time."""
    keys = [record.get("group") or ("image", number) for number, record in enumerate(records)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    columns, shares = [numbers[key] for key in keys], np.full(len(numbers), 1 / len(numbers))
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 100):
        yield generator.multinomial(len(numbers), shares, min(100, resamples - start))[:, columns]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of bootstrap values; None where the metric is not defined."""
    defined = values[~np.isnan(values)]
    return tuple(map(float, np.quantile(defined, [0.025, 0.975]))) if len(defined) else None


def bootstrap_metrics(records: Sequence[dict], threshold: float = 0.5, seed: int = 0) -> dict[str, np.ndarray]:
    """All metrics of `summarize` but the median, on every resample, (resamples,) each."""
    scores = score_images(records, threshold)
    blocks = [compute_metrics(scores, weights) for weights in resample_weights(records, seed=seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def bootstrap_intervals(records: Sequence[dict], threshold: float = 0.5, seed: int = 0) -> dict[str, tuple | None]:
    """95 % percentile intervals (Efron, 1979) of the metrics of `bootstrap_metrics`."""
    return {name: percentile_interval(values) for name, values in bootstrap_metrics(records, threshold, seed).items()}


def check_same_images(records: Sequence[dict], others: Sequence[dict]) -> None:
    """Raise ValueError unless both are about the same images, in the same order."""
    if [record["id"] for record in records] != [record["id"] for record in others]:
        found, remedy = f"{len(records)} and {len(others)} records", "the same EVAL_SPLIT, EVAL_SAMPLES and SEED"
        raise ValueError(f"Not the same images in the same order ({found}): evaluate both models with {remedy}.")


def compare_records(records: Sequence[dict], others: Sequence[dict], metric: str = "mean_iou") -> dict:
    """Paired bootstrap of how much more `others` have of a metric than `records` of the same images.

    Gives difference, low and high (95 %), and a verdict: "better", "worse", or "no difference seen" unless the
    interval excludes 0. Raises ValueError if the images differ.
    """
    check_same_images(records, others)
    difference = summarize(others)[metric] - summarize(records)[metric]
    low, high = percentile_interval(bootstrap_metrics(others)[metric] - bootstrap_metrics(records)[metric])
    more, less = ("worse", "better") if metric in ("malformed_rate", "boxes_per_empty_image") else ("better", "worse")
    verdict = more if low > 0 else less if high < 0 else "no difference seen"
    return {"difference": difference, "low": low, "high": high, "verdict": verdict}


def describe_difference(records: Sequence[dict], others: Sequence[dict]) -> str:
    """How much better `others` are than `records` on the same images, and whether that is more than noise."""
    result = compare_records(records, others)
    return "{difference:+.3f} [{low:+.3f}, {high:+.3f}] mean IoU: {verdict}".format(**result)


def compare_table(records_by_name: dict[str, Sequence[dict]], threshold: float = 0.5) -> pd.DataFrame:
    """All metrics of several models as text with 95 % intervals, `0.729 [0.68, 0.78]`, one row per model."""
    rows = {}
    for name, records in records_by_name.items():
        values, intervals = summarize(records, threshold), bootstrap_intervals(records, threshold)
        texts = {metric: "n/a" if value is None else f"{value:.3f}" for metric, value in values.items()}
        texts |= {m: "{} [{:.2f}, {:.2f}]".format(texts[m], *pair) for m, pair in intervals.items() if pair}
        rows[name] = texts | {"n": values["n"]}
    return pd.DataFrame.from_dict(rows, orient="index")
