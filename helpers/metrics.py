"""Boxes matched one to one, metrics with intervals, paired comparisons.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou


def boxes_of(record: dict, side: str) -> list[list[float]]:
    """The boxes of a record's "truth" or "prediction", `[x1, y1, x2, y2]` in pixels."""
    return [labelled["box"] for labelled in record[side]]


def compute_ious(truth: Sequence[dict], prediction: Sequence[dict]) -> np.ndarray:
    """IoU of every true with every predicted `{"label", "box"}`, (true, predicted).

    Labels do not count, unless the boxes have a `category_id`: then IoU is 0 where these differ.
    """
    boxes = [torch.tensor([labelled["box"] for labelled in side], dtype=torch.float64) for side in (truth, prediction)]
    ious = box_iou(boxes[0].reshape(-1, 4), boxes[1].reshape(-1, 4)).numpy()
    same = [[t.get("category_id") == p.get("category_id") for p in prediction] for t in truth]
    return ious * np.array(same, dtype=bool).reshape(ious.shape)


def assign_boxes(ious: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns of an IoU matrix one to one; returns their indices.

    First there are as many pairs with an IoU of at least `threshold` as possible, then the sum of IoU is largest
    (Kuhn, "The Hungarian method for the assignment problem", 1955). Pairs may have an IoU of 0.
    """
    tie_breaker = ious / (min(ious.shape) + 1)  # sums to less than one more pair would add
    return linear_sum_assignment((ious >= threshold) + tie_breaker, maximize=True)


def assigned_ious(ious: np.ndarray) -> np.ndarray:
    """Of an IoU matrix (true, predicted): what each true box gets in the assignment with the largest sum."""
    assigned = np.zeros(len(ious))
    pairs = assign_boxes(ious)
    assigned[pairs[0]] = ious[pairs]
    return assigned


def match_boxes(truth: Sequence[Sequence[float]], prediction: Sequence[Sequence[float]]) -> list[float]:
    """IoU of every true box with the predicted box assigned to it, one to one; 0 where none was left.

    Boxes are `[x1, y1, x2, y2]` in any common unit.
    """
    return assigned_ious(compute_ious(*([{"box": box} for box in side] for side in (truth, prediction)))).tolist()


RATIOS = {  # metric: numerator, denominator; columns of `score_images`
    "mean_iou": ("iou", "with_truth"),
    "detection_rate": ("detected", "images"),
    "iou_gt_0.5": ("iou_gt_0.5", "with_truth"),
    "iou_gt_0.7": ("iou_gt_0.7", "with_truth"),
    "mean_best_iou": ("best_iou", "truths"),
    "precision": ("true_positives", "predictions"),
    "recall": ("true_positives", "truths"),
    "f1": ("twice_true_positives", "boxes"),  # 2 TP / (2 TP + FP + FN), the harmonic mean of the two
    "malformed_rate": ("malformed", "images"),
}


def score_image(record: dict, threshold: float) -> dict[str, float]:
    """One record of `evaluate_detector` as the counts and sums that the metrics are made of."""
    truth, prediction = record["truth"], record["prediction"]
    ious = compute_ious(truth, prediction)
    iou = assigned_ious(ious).mean() if truth else 0.0
    true_positives = (ious[assign_boxes(ious, threshold)] >= threshold).sum()
    return {
        "images": 1,
        "with_truth": len(truth) > 0,
        "iou": iou,
        "iou_gt_0.5": iou > 0.5,
        "iou_gt_0.7": iou > 0.7,
        "best_iou": ious.max(axis=1, initial=0).sum(),
        "truths": len(truth),
        "predictions": len(prediction),
        "boxes": len(truth) + len(prediction),
        "true_positives": true_positives,
        "twice_true_positives": 2 * true_positives,
        "detected": len(prediction) > 0,
        "malformed": len(record.get("unread", [])) > 0,
    }


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
    metrics["precision"] = np.nan_to_num(metrics["precision"])
    return metrics


def summarize(records: Sequence[dict], threshold: float = 0.5) -> dict[str, float | None]:
    """Every metric over the records of `evaluate_detector`; None (JSON has no NaN) where it is not defined.

    `threshold` is the IoU from which on an assigned pair is a true positive, in precision, recall and F1. Raises
    ValueError when there is no record.
    """
    scores = score_images(records, threshold)
    metrics = {name: value[0] for name, value in compute_metrics(scores, np.ones((1, len(records)))).items()}
    median = scores["iou"][scores["with_truth"] > 0].median()
    metrics = {"mean_iou": metrics.pop("mean_iou"), "median_iou": median, **metrics}
    return {name: None if math.isnan(value) else float(value) for name, value in metrics.items()} | {"n": len(records)}


LOWER_IS_BETTER = ("malformed_rate",)


def resample_weights(records: Sequence[dict], resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each image is in each bootstrap resample, (resamples, images).

    Groups are drawn (records with the same `group`; an image without one is its own), with replacement.
    """
    keys = [record.get("group") or number for number, record in enumerate(records)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    drawn = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    return drawn[:, [numbers[key] for key in keys]]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of bootstrap values; None where the metric is not defined."""
    defined = values[~np.isnan(values)]
    return tuple(map(float, np.quantile(defined, [0.025, 0.975]))) if len(defined) else None


def bootstrap_metrics(
    records: Sequence[dict], threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
    """All metrics of `summarize` but average precision, on every resample, (resamples,) each."""
    return compute_metrics(score_images(records, threshold), resample_weights(records, resamples, seed))


def bootstrap_intervals(
    records: Sequence[dict], threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals (Efron, 1979) of the metrics of `bootstrap_metrics`."""
    draws = bootstrap_metrics(records, threshold, resamples, seed)
    return {name: percentile_interval(values) for name, values in draws.items()}


def check_same_images(records: Sequence[dict], others: Sequence[dict]) -> None:
    """Raise ValueError unless both are about the same images, in the same order."""
    if [record["id"] for record in records] != [record["id"] for record in others]:
        raise ValueError(
            f"Not the same images ({len(records)} and {len(others)} records), or not in the same order: evaluate both "
            "models with the same EVAL_SPLIT, EVAL_SAMPLES and SEED."
        )


def compare_records(
    records: Sequence[dict], others: Sequence[dict], metric: str = "mean_iou", threshold: float = 0.5
) -> dict[str, float | str]:
    """Paired bootstrap of how much better `others` are than `records` on the same images, in `metric`.

    Gives difference, low and high (95 %), and a verdict: "better", "worse", or "no difference seen" unless the
    interval excludes 0. Raises ValueError if the images differ.
    """
    check_same_images(records, others)
    draws = [bootstrap_metrics(side, threshold)[metric] for side in (others, records)]
    difference = summarize(others, threshold)[metric] - summarize(records, threshold)[metric]
    low, high = percentile_interval(draws[0] - draws[1])
    verdict = {1: "better", -1: "worse", 0: "no difference seen"}[better_side(draws[0] - draws[1], metric)]
    return {"difference": difference, "low": low, "high": high, "verdict": verdict}


def better_side(differences: np.ndarray, metric: str) -> int:
    """1 where bootstrap differences a - b say that a is better, -1 for b, 0 where their interval holds 0."""
    low, high = percentile_interval(differences) or (0, 0)
    sign = int(low > 0) - int(high < 0)
    return -sign if metric in LOWER_IS_BETTER else sign


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
        rows[name] = texts | {"n": str(values["n"])}
    return pd.DataFrame.from_dict(rows, orient="index")
