"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from faster_coco_eval import COCO, COCOeval_faster
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

POLICIES = ("merge", "multi-class", "table-only")
TABLE = "nutrition-table"


def normalize_label(label: str) -> str:
    """Labels that differ in case, spaces, underscores or hyphens only are the same."""
    return re.sub(r"[\s_-]+", "-", label.strip().lower())


def apply_policy(record: dict, policy: str) -> tuple[list[dict], list[dict]]:
    """Truth and prediction of a picture, with the labels that are to be compared. Raises ValueError for others."""
    if policy not in POLICIES:
        raise ValueError(f"Unknown policy {policy!r}: use one of {', '.join(POLICIES)}.")
    truth, prediction = record["truth"], record["prediction"]
    if policy == "table-only":
        truth = [thing for thing in truth if normalize_label(thing["label"]) == TABLE]
    if policy == "multi-class":
        return tuple(
            [thing | {"label": normalize_label(thing["label"])} for thing in side] for side in (truth, prediction)
        )
    return tuple([thing | {"label": TABLE} for thing in side] for side in (truth, prediction))


def compute_ious(truth: Sequence[dict], prediction: Sequence[dict]) -> np.ndarray:
    """IoU of every true with every predicted `{"label", "box"}`, (true, predicted); 0 where the labels differ."""
    boxes = [torch.tensor([thing["box"] for thing in side], dtype=torch.float64) for side in (truth, prediction)]
    ious = box_iou(boxes[0].reshape(-1, 4), boxes[1].reshape(-1, 4)).numpy()
    same = [[t["label"] == p["label"] for p in prediction] for t in truth]
    return ious * np.array(same, dtype=bool).reshape(ious.shape)


def assign_boxes(ious: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns of an IoU matrix one to one; returns their indices.

    First there are as many pairs with an IoU of at least `threshold` as possible, then the sum of IoU is largest
    (Kuhn, "The Hungarian method for the assignment problem", 1955). Pairs may have an IoU of 0.
    """
    tie_breaker = ious / (min(ious.shape) + 1)  # sums to less than one more pair would add
    return linear_sum_assignment((ious >= threshold) + tie_breaker, maximize=True)


def match_boxes(truth: Sequence[Sequence[float]], prediction: Sequence[Sequence[float]]) -> list[float]:
    """IoU of every true box with the predicted box assigned to it, one to one; 0 where none was left.

    Boxes are `[x1, y1, x2, y2]` in any common unit; labels are left out of account.
    """
    ious = compute_ious(*([{"label": "", "box": box} for box in side] for side in (truth, prediction)))
    return claimed_ious(ious).tolist()


def claimed_ious(ious: np.ndarray) -> np.ndarray:
    """Of an IoU matrix (true, predicted): what each true box gets in the assignment with the largest sum."""
    claimed = np.zeros(len(ious))
    pairs = assign_boxes(ious)
    claimed[pairs[0]] = ious[pairs]
    return claimed


RATIOS = {  # figure: numerator, denominator; columns of `score_pictures`
    "mean_iou": ("iou", "with_truth"),
    "detection_rate": ("detected", "pictures"),
    "iou_gt_0.5": ("iou_gt_0.5", "with_truth"),
    "iou_gt_0.7": ("iou_gt_0.7", "with_truth"),
    "mean_best_iou": ("best_iou", "truths"),
    "precision": ("hits", "predictions"),
    "recall": ("hits", "truths"),
    "f1": ("twice_hits", "boxes"),  # 2 TP / (2 TP + FP + FN), the harmonic mean of the two
    "malformed_rate": ("malformed", "pictures"),
}


def score_picture(record: dict, threshold: float, policy: str) -> dict[str, float]:
    """One record of `evaluate_model` as the counts and sums that the figures are made of."""
    truth, prediction = apply_policy(record, policy)
    ious = compute_ious(truth, prediction)
    iou = claimed_ious(ious).mean() if truth else 0.0
    hits = (ious[assign_boxes(ious, threshold)] >= threshold).sum()
    return {
        "pictures": 1,
        "with_truth": len(truth) > 0,
        "iou": iou,
        "iou_gt_0.5": iou > 0.5,
        "iou_gt_0.7": iou > 0.7,
        "best_iou": ious.max(axis=1, initial=0).sum(),
        "truths": len(truth),
        "predictions": len(prediction),
        "boxes": len(truth) + len(prediction),
        "hits": hits,
        "twice_hits": 2 * hits,
        "detected": len(prediction) > 0,
        "malformed": len(record.get("unread", [])) > 0,
    }


def score_pictures(records: Sequence[dict], threshold: float, policy: str) -> pd.DataFrame:
    """`score_picture` for every record, one row each. Raises ValueError when there is none."""
    if not records:
        raise ValueError("No picture was evaluated: EVAL_SAMPLES must be at least 1.")
    return pd.DataFrame([score_picture(record, threshold, policy) for record in records], dtype=float)


def compute_figures(scores: pd.DataFrame, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of weighted pictures: `weights` is (resamples, pictures), every figure (resamples,).

    What is not defined is NaN, such as a mean over true boxes where there are none; precision without any predicted
    box is 0, as in scikit-learn.
    """
    sums = dict(zip(scores.columns, (weights @ scores.to_numpy()).T, strict=True))
    with np.errstate(invalid="ignore"):  # 0 / 0
        figures = {name: sums[part] / sums[whole] for name, (part, whole) in RATIOS.items()}
    figures["precision"] = np.nan_to_num(figures["precision"])
    median = weighted_median(scores["iou"].to_numpy(), weights * scores["with_truth"].to_numpy())
    return {"mean_iou": figures.pop("mean_iou"), "median_iou": median, **figures}


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of (n,) values that are repeated `weights` times, whole numbers (resamples, n); NaN without weight."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    total = reached[:, -1:]
    lower, upper = (np.argmax(reached > (total - odd) // 2, axis=1) for odd in (1, 0))
    return np.where(total[:, 0] > 0, (values[order][lower] + values[order][upper]) / 2, np.nan)


def summarize(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> dict[str, float | None]:
    """Every figure over the records of `evaluate_model`; None where it is not defined.

    `threshold` is the IoU from which on a pair of boxes counts as a hit, in precision, recall and F1. Raises
    ValueError when there is no record or the policy is unknown.
    """
    figures = compute_figures(score_pictures(records, threshold, policy), np.ones((1, len(records))))
    values = {name: none_if_nan(value[0]) for name, value in figures.items()}
    return values | compute_map(records, policy) | {"n": len(records)}


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def to_coco(records: Sequence[dict], policy: str) -> tuple[dict, list[dict]]:
    """Records as a data set and a list of results in COCO's format, boxes `[x, y, width, height]` in pixels."""
    sides = [apply_policy(record, policy) for record in records]
    labels = sorted({thing["label"] for pair in sides for side in pair for thing in side})
    truth, found = [], []
    for number, pair in enumerate(sides, start=1):
        for things, target in zip(pair, (truth, found), strict=True):
            for thing in things:
                x1, y1, x2, y2 = thing["box"]
                size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                place = {"id": len(target) + 1, "image_id": number, "category_id": labels.index(thing["label"]) + 1}
                target.append(place | size | {"iscrowd": 0, "score": thing.get("score", 1.0)})
    dataset = {
        "images": [{"id": number} for number in range(1, len(sides) + 1)],
        "categories": [{"id": number, "name": label} for number, label in enumerate(labels, start=1)],
        "annotations": truth,
    }
    return dataset, found


def compute_map(records: Sequence[dict], policy: str = "merge") -> dict[str, float | None]:
    """COCO's average precision: `mAP` over IoU thresholds .50, .55 ... .95, `mAP50`, `mAP75`; None without true boxes.

    The mean is over labels that occur in the truth; at most 100 boxes of a picture and label count
    (cocodataset.org/#detection-eval).
    """
    precision = compute_precision(records, policy)
    if precision is None:
        return dict.fromkeys(["mAP", "mAP50", "mAP75"])
    return {"mAP": float(precision.mean()), "mAP50": float(precision[0].mean()), "mAP75": float(precision[5].mean())}


def compute_precision(records: Sequence[dict], policy: str = "merge") -> np.ndarray | None:
    """COCO's precision at (10 IoU thresholds, 101 recalls in 0..1, labels of the truth); None without true boxes."""
    dataset, found = to_coco(records, policy)
    if not dataset["annotations"]:
        return None
    truth = COCO(dataset)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # boxes of all sizes
    return precision[:, :, (precision > -1).all(axis=(0, 1))]  # -1: a label without true boxes


def collect_scores(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> tuple[np.ndarray, ...]:
    """Score of every predicted box, and whether it hit a true one; a box without a score is left out."""
    scores, hits = [], []
    for record in records:
        truth, prediction = apply_policy(record, policy)
        ious = compute_ious(truth, prediction)
        rows, columns = assign_boxes(ious, threshold)
        hit = {column for row, column in zip(rows, columns, strict=True) if ious[row, column] >= threshold}
        for column, thing in enumerate(prediction):
            if "score" in thing:
                scores.append(thing["score"])
                hits.append(column in hit)
    return np.array(scores, dtype=float), np.array(hits, dtype=bool)


def bin_scores(scores: np.ndarray, hits: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Boxes by score in bins of equal width: how many, their mean score, and the share of them that hit."""
    number = np.minimum((scores * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": number, "score": scores, "hit rate": hits})
    return table.groupby("bin").agg(boxes=("score", "size"), score=("score", "mean"), hits=("hit rate", "mean"))


def calibration_error(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> float | None:
    """Expected calibration error: mean distance of score and hit rate over ten bins; None without scored boxes.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 5.
    """
    scores, hits = collect_scores(records, threshold, policy)
    if not len(scores):
        return None
    table = bin_scores(scores, hits)
    return float(np.average((table.score - table.hits).abs(), weights=table.boxes))


def summarize_labels(records: Sequence[dict], threshold: float = 0.5) -> dict[str, dict[str, float | None]]:
    """The figures for every label of the truth, as if it were the only one; labels must agree.

    Rates over pictures are left out: whether a picture was answered at all is not a matter of one label.
    """
    labels = sorted({normalize_label(thing["label"]) for record in records for thing in record["truth"]})
    figures = {}
    for label in labels:
        alone = [
            {side: [thing for thing in record[side] if normalize_label(thing["label"]) == label]
             for side in ("truth", "prediction")} for record in records]  # fmt: skip
        values = summarize(alone, threshold)
        figures[label] = {name: values[name] for name in values if name not in ("detection_rate", "malformed_rate")}
        figures[label]["n"] = sum(len(record["truth"]) > 0 for record in alone)
    return figures


LOWER_IS_BETTER = ("malformed_rate",)


def resample_weights(records: Sequence[dict], resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each picture is in each bootstrap resample, (resamples, pictures).

    Groups are drawn (records with the same `group`; a picture without one is its own), with replacement.
    """
    keys = [
        ("picture", n) if record.get("group") is None else ("group", record["group"])
        for n, record in enumerate(records)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    drawn = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    return drawn[:, [numbers[key] for key in keys]]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of bootstrap values; None where the figure is not defined."""
    defined = values[~np.isnan(values)]
    return tuple(map(float, np.quantile(defined, [0.025, 0.975]))) if len(defined) else None


def bootstrap_intervals(
    records: Sequence[dict], threshold: float = 0.5, policy: str = "merge", resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals (Efron, 1979) of all figures of `summarize` but average precision."""
    scores = score_pictures(records, threshold, policy)
    figures = compute_figures(scores, resample_weights(records, resamples, seed))
    return {name: percentile_interval(values) for name, values in figures.items()}


def align_records(records: Sequence[dict], like: Sequence[dict]) -> list[dict]:
    """`records` in the order of `like`, by `id`. Raises ValueError unless both hold the same pictures."""
    by_id = {record["id"]: record for record in records}
    wanted = [record["id"] for record in like]
    if len(by_id) != len(records) or len(set(wanted)) != len(wanted) or set(by_id) != set(wanted):
        raise ValueError(
            f"Not the same pictures ({len(records)} and {len(like)} records, {len(set(by_id) & set(wanted))} ids in "
            "common; no id may come twice): evaluate both models with the same EVAL_SPLIT, EVAL_SAMPLES and SEED."
        )
    return [by_id[id] for id in wanted]


def compare_recipes(
    records_a: Sequence[dict],
    records_b: Sequence[dict],
    metric: str = "mean_iou",
    threshold: float = 0.5,
    policy: str = "merge",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float | str | None]:
    """Paired bootstrap of `metric` (a figure of `bootstrap_intervals`) of a minus b, on the same pictures.

    Gives difference, low and high (95 %), and a verdict: "a is better", "b is better", or "no difference" unless
    the interval excludes 0. Raises ValueError if the pictures differ.
    """
    sides = [score_pictures(side, threshold, policy) for side in (records_a, align_records(records_b, records_a))]
    weights = np.vstack([np.ones((1, len(records_a))), resample_weights(records_a, resamples, seed)])
    difference = np.subtract(*(compute_figures(scores, weights)[metric] for scores in sides))
    low, high = percentile_interval(difference[1:]) or (None, None)
    return {
        "difference": none_if_nan(difference[0]),
        "low": low,
        "high": high,
        "verdict": {1: "a is better", -1: "b is better", 0: "no difference"}[better_side(difference[1:], metric)],
    }


def better_side(differences: np.ndarray, metric: str) -> int:
    """1 where bootstrap differences a - b say that a is better, -1 for b, 0 where their interval holds 0."""
    low, high = percentile_interval(differences) or (0, 0)
    sign = int(low > 0) - int(high < 0)
    return -sign if metric in LOWER_IS_BETTER else sign


def compare_table(
    records_by_name: dict[str, Sequence[dict]], threshold: float = 0.5, policy: str = "merge", seed: int = 0
) -> pd.DataFrame:
    """All figures of several models on the same pictures as text, `0.729 [0.68, 0.78]`, one row per model.

    "best" is added where the paired bootstrap finds a model better than each of the others; it is not corrected for
    the number of comparisons. Raises ValueError if the pictures differ.
    """
    first = next(iter(records_by_name.values()))
    aligned = {name: align_records(records, first) for name, records in records_by_name.items()}
    weights = resample_weights(first, seed=seed)
    draws = {name: compute_figures(score_pictures(side, threshold, policy), weights) for name, side in aligned.items()}
    rows = {}
    for name, side in aligned.items():
        others = [draws[other] for other in draws if other != name]
        rows[name] = {
            figure: describe_figure(value, figure, draws[name], others)
            for figure, value in summarize(side, threshold, policy).items()
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def describe_figure(value: float | None, figure: str, draws: dict, others: Sequence[dict]) -> str:
    """A figure, its interval if it was bootstrapped, and "best" if it is better than that of all others."""
    if value is None or figure == "n":
        return "n/a" if value is None else str(value)
    if figure not in draws:
        return f"{value:.3f}"
    low, high = percentile_interval(draws[figure])
    best = others and all(better_side(draws[figure] - other[figure], figure) == 1 for other in others)
    return f"{value:.3f} [{low:.2f}, {high:.2f}]" + (" best" if best else "")


ERROR_KINDS = ("correct", "shifted", "duplicate", "background", "missed", "malformed")
SHIFTED_IOU = 0.1  # a box with less overlap is not about that object; TIDE's value


def count_picture_errors(record: dict, threshold: float = 0.5, policy: str = "merge") -> dict[str, int]:
    """The predicted boxes, missed true boxes and unread pieces of one picture, counted by ERROR_KINDS.

    With the policy `multi-class` a box with the wrong label is background.
    """
    truth, prediction = apply_policy(record, policy)
    ious = compute_ious(truth, prediction)
    rows, columns = assign_boxes(ious, threshold)
    hit = ious[rows, columns] >= threshold
    rest = np.delete(ious, columns[hit], axis=1)
    best = rest.max(axis=0, initial=0)
    shifted = (best >= SHIFTED_IOU) & (best < threshold)
    reached = {*rows[hit], *rest[:, shifted].argmax(axis=0)} if truth else set()
    return {
        "correct": int(hit.sum()),
        "shifted": int(shifted.sum()),
        "duplicate": int((best >= threshold).sum()),
        "background": int((best < min(SHIFTED_IOU, threshold)).sum()),
        "missed": len(truth) - len(reached),
        "malformed": len(record.get("unread", [])),
    }


def count_errors(records: Iterable[dict], threshold: float = 0.5, policy: str = "merge") -> dict[str, int]:
    """Sums of `count_picture_errors` over records."""
    counts = [count_picture_errors(record, threshold, policy) for record in records]
    return {kind: sum(count[kind] for count in counts) for kind in ERROR_KINDS}


def describe_difference(records: Sequence[dict], others: Sequence[dict]) -> str:
    """How much better `others` are than `records` on the same pictures, and whether that is more than noise."""
    result = compare_recipes(others, records)
    verdict = {"a is better": "better", "b is better": "worse"}.get(result["verdict"], "no difference seen")
    return f"{result['difference']:+.3f} [{result['low']:+.3f}, {result['high']:+.3f}] mean IoU: {verdict}"
