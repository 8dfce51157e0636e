"""Metrics against values computed by hand and against their definitions; intervals; paired comparisons."""

import json

import numpy as np
import pandas as pd
import pytest

from helpers.metrics import (
    assign_boxes,
    bootstrap_intervals,
    bootstrap_metrics,
    boxes_of,
    check_same_images,
    compare_records,
    compare_table,
    compute_ious,
    compute_metrics,
    describe_difference,
    match_boxes,
    percentile_interval,
    resample_weights,
    score_images,
    summarize,
)


def labelled(*boxes, **more):
    return [{"label": "nutrition-table", "box": box} | more for box in boxes]


def record(truth, prediction, id="a", **more):
    return {"id": id, "truth": truth, "prediction": prediction} | more


SQUARE = [0, 0, 10, 10]
GOLDEN = [
    # intersection 5 x 10 = 50, union 100 + 100 - 50 = 150: IoU 1/3
    record(labelled(SQUARE), labelled([5, 0, 15, 10]), "a"),
    # the predicted box is the second true box (IoU 1), and twice the first (0.5): one to one 0 and 1, mean 0.5
    record(labelled(SQUARE, [0, 0, 10, 20]), labelled([0, 0, 10, 20]), "b"),
    # 80 / 100 = 0.8, and two boxes that touch nothing
    record(labelled(SQUARE), labelled([0, 0, 10, 8], [20, 20, 30, 30], [50, 0, 60, 10]), "c"),
]


def test_boxes_on_images_without_objects_are_counted():
    empty = [record([], labelled(SQUARE, SQUARE), "d"), record([], [], "e")]
    assert summarize([*GOLDEN, *empty])["boxes_per_empty_image"] == 1
    assert summarize(GOLDEN)["boxes_per_empty_image"] is None
    assert (
        summarize([*GOLDEN, *empty])["precision"] == summarize(GOLDEN)["precision"] * 5 / 7
    )  # five boxes, then seven


def test_metrics_by_hand():
    metrics = summarize(GOLDEN)
    assert list(metrics)[:5] == ["mean_iou", "median_iou", "detection_rate", "iou_gt_0.5", "iou_gt_0.7"]
    assert metrics == {
        "mean_iou": pytest.approx((1 / 3 + 0.5 + 0.8) / 3),
        "median_iou": pytest.approx(0.5),
        "detection_rate": 1,
        "iou_gt_0.5": pytest.approx(1 / 3),  # 0.5 is not above 0.5
        "iou_gt_0.7": pytest.approx(1 / 3),
        "mean_best_iou": pytest.approx((1 / 3 + 0.5 + 1 + 0.8) / 4),  # 4 true boxes; one predicted box used twice
        "precision": pytest.approx(2 / 5),  # true positives: IoU 1 and 0.8, of 5 predicted boxes
        "recall": pytest.approx(2 / 4),
        "f1": pytest.approx(2 * 0.4 * 0.5 / 0.9),
        "malformed_rate": 0,
        "boxes_per_empty_image": None,
        "n": 3,
    }
    assert json.loads(json.dumps(metrics)) == metrics


def test_threshold_is_inclusive():
    half = [record(labelled(SQUARE), labelled([0, 0, 10, 5]))]  # 50 / 100
    assert summarize(half)["precision"] == 1
    assert summarize(half, threshold=0.51)["precision"] == 0


# Matching


def test_a_predicted_box_is_used_once():
    assert match_boxes([SQUARE, [0, 0, 10, 20]], [[0, 0, 10, 20]]) == pytest.approx([0, 1])


def test_matching_is_best_overall_not_greedy():
    truth, prediction = [SQUARE, [4, 0, 14, 10]], [[3, 0, 13, 10], [8, 0, 18, 10]]
    assert match_boxes(truth, prediction) == pytest.approx([7 / 13, 6 / 14])


def test_nothing_to_match():
    assert match_boxes([SQUARE], []) == [0]
    assert match_boxes([], [SQUARE]) == []
    assert match_boxes([], []) == []


def test_true_positives_are_as_many_as_possible():
    # boxes of 100 x 1, shifted by d: IoU (100 - d) / (100 + d), here [[80 / 120, 67 / 133], [67 / 133, 14 / 186]];
    # the largest sum is that of the two 67 / 133, and would hold no true positive
    truth, prediction = labelled([0, 0, 100, 1], [53, 0, 153, 1]), labelled([20, 0, 120, 1], [-33, 0, 67, 1])
    metrics = summarize([record(truth, prediction)], threshold=0.6)
    assert metrics["recall"] == 0.5
    assert metrics["mean_iou"] == pytest.approx(67 / 133)
    pairs = assign_boxes(compute_ious(truth, prediction), 0.6)
    assert [side.tolist() for side in pairs] == [[0, 1], [0, 1]]


def test_labels_do_not_count_without_categories():
    truth, prediction = ([{"label": label, "box": SQUARE}] for label in ("table", "logo"))
    assert compute_ious(truth, prediction).tolist() == [[1]]


def test_boxes_of_other_categories_do_not_overlap():
    truth, prediction = labelled(SQUARE, category_id=1), [*labelled(SQUARE, category_id=2), *labelled(SQUARE)]
    assert compute_ious(truth, prediction).tolist() == [[0, 0]]
    assert compute_ious(truth, labelled([0, 0, 10, 5], category_id=1)).tolist() == [[0.5]]


def test_boxes_of_a_side():
    assert boxes_of(GOLDEN[1], "truth") == [SQUARE, [0, 0, 10, 20]]
    assert boxes_of(GOLDEN[1], "prediction") == [[0, 0, 10, 20]]


# Images without the one or the other


def test_image_without_truth():
    background = record([], labelled(SQUARE), "d")
    metrics, without = summarize([*GOLDEN, background]), summarize(GOLDEN)
    assert metrics["precision"] == pytest.approx(2 / 6)  # a false positive
    same = ["mean_iou", "median_iou", "iou_gt_0.5", "mean_best_iou", "recall"]
    assert [metrics[name] for name in same] == pytest.approx([without[name] for name in same])
    assert metrics["n"] == 4
    assert summarize([*GOLDEN, record([], [], "e")])["precision"] == pytest.approx(2 / 5)


def test_nothing_but_predictions():
    metrics = summarize([record([], labelled(SQUARE))])
    undefined = ["mean_iou", "median_iou", "iou_gt_0.5", "iou_gt_0.7", "mean_best_iou", "recall"]
    assert [name for name, value in metrics.items() if value is None] == undefined
    assert (metrics["precision"], metrics["f1"]) == (0, 0)
    assert bootstrap_intervals([record([], labelled(SQUARE))])["mean_iou"] is None


def test_nothing_predicted():
    metrics = summarize([record(labelled(SQUARE), [])])
    assert all(metrics[name] == 0 for name in metrics if name not in ("n", "boxes_per_empty_image"))


def test_malformed_is_counted_apart():
    records = [record(labelled(SQUARE), [], "a", unread=["(1,2"]), record(labelled(SQUARE), [], "b", unread=[])]
    assert summarize(records)["malformed_rate"] == 0.5


def test_summary_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="EVAL_SAMPLES must be at least 1"):
        summarize([])


# Noise


def random_box(rng):
    x, y = rng.uniform(0, 80, 2)
    return [x, y, x + rng.uniform(4, 20), y + rng.uniform(4, 20)]


def random_records(seed):
    """Up to 5 images, up to 6 boxes each; half of the predictions are near a true box."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(rng.integers(2, 6)):
        truth = [random_box(rng) for _ in range(rng.integers(0, 7))]
        near = [rng.choice(truth).tolist() if truth else random_box(rng) for _ in range(rng.integers(0, 7))]
        shifted = [(np.array(box) + rng.uniform(-4, 4) * np.array([1, 0, 1, 0])).tolist() for box in near]
        records.append(record(labelled(*truth), labelled(*shifted), number))
    return records


@pytest.mark.parametrize("seed", range(5))
def test_weights_stand_for_repeated_images(seed):
    records = random_records(seed)
    weights = np.arange(len(records))[None]
    repeated = [record for record, weight in zip(records, weights[0], strict=True) for _ in range(weight)]
    weighted, summary = compute_metrics(score_images(records, 0.5), weights), summarize(repeated)
    wanted = {name: np.nan if summary[name] is None else summary[name] for name in weighted}
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx(wanted, nan_ok=True)


def noisy_records(seed, n, shift=0.0):
    """Images with one box, found with an IoU spread evenly over (0.5 + shift, 0.9 + shift)."""
    widths = np.random.default_rng(seed).uniform(5, 9, n) + 10 * shift
    return [record(labelled(SQUARE), labelled([0, 0, float(w), 10]), str(i)) for i, w in enumerate(widths)]


def test_interval_is_that_of_the_normal_approximation():
    records = noisy_records(0, 200)
    ious = np.array([match_boxes([SQUARE], boxes_of(r, "prediction"))[0] for r in records])
    half = 1.96 * ious.std() / len(ious) ** 0.5
    low, high = bootstrap_intervals(records)["mean_iou"]
    assert (low, high) == pytest.approx((ious.mean() - half, ious.mean() + half), abs=0.15 * half)
    assert bootstrap_intervals(records) == bootstrap_intervals(records)  # seeded


def test_interval_is_the_middle_of_the_draws():
    assert percentile_interval(np.arange(1001.0)) == (25, 975)
    assert percentile_interval(np.array([np.nan, 3.0, 3.0])) == (3, 3)
    assert percentile_interval(np.array([np.nan])) is None
    assert {len(values) for values in bootstrap_metrics(noisy_records(0, 20)).values()} == {2000}


def test_groups_are_drawn_whole():
    single = noisy_records(0, 100)
    twice = [record | {"group": record["id"], "id": record["id"] + copy} for record in single for copy in "xy"]
    width = {}
    for name, records in {
        "single": single,
        "grouped": twice,
        "ungrouped": [r | {"group": None} for r in twice],
    }.items():
        low, high = bootstrap_intervals(records)["mean_iou"]
        width[name] = high - low
    assert width["grouped"] == pytest.approx(width["single"])  # a copy tells nothing new
    assert width["ungrouped"] == pytest.approx(width["single"] / 2**0.5, rel=0.15)
    weights = np.concatenate(list(resample_weights(twice, resamples=5)))
    assert (weights[:, 0::2] == weights[:, 1::2]).all()
    assert (weights.sum(axis=1) == 200).all()


# Comparisons


def test_equal_models_do_not_differ():
    records = noisy_records(0, 50)
    expected = {"difference": 0, "low": 0, "high": 0, "verdict": "no difference seen"}
    assert compare_records(records, records) == expected


def test_small_but_steady_difference_is_found():
    worse, better = noisy_records(0, 50), noisy_records(0, 50, shift=0.02)
    result = compare_records(worse, better)
    assert result["verdict"] == "better"
    assert result["low"] <= result["difference"] <= result["high"]
    assert result["difference"] == pytest.approx(0.02)
    assert compare_records(better, worse)["verdict"] == "worse"


def test_noise_is_no_difference():
    assert compare_records(noisy_records(0, 50), noisy_records(1, 50))["verdict"] == "no difference seen"


def test_fewer_malformed_answers_are_better():
    clean = noisy_records(0, 50)
    broken = [record | {"unread": ["(1,2"]} for record in clean]
    result = compare_records(broken, clean, metric="malformed_rate")
    assert (result["difference"], result["verdict"]) == (-1, "better")


def test_other_images_cannot_be_compared():
    records = noisy_records(0, 5)
    with pytest.raises(ValueError, match=r"\(5 and 6 records\).* same EVAL_SPLIT, EVAL_SAMPLES and SEED"):
        compare_records(records, noisy_records(0, 6))
    with pytest.raises(ValueError, match="Not the same images in the same order"):
        check_same_images(records, records[::-1])
    check_same_images(records, noisy_records(1, 5))


def test_difference_in_words():
    good = [record(labelled(SQUARE), labelled(SQUARE), str(n)) for n in range(20)]
    bad = [record(labelled(SQUARE), labelled([0, 0, 10, 6]), str(n)) for n in range(20)]
    assert describe_difference(bad, good) == "+0.400 [+0.400, +0.400] mean IoU: better"
    assert describe_difference(good, bad) == "-0.400 [-0.400, -0.400] mean IoU: worse"
    assert describe_difference(good, good) == "+0.000 [+0.000, +0.000] mean IoU: no difference seen"


def test_table_shows_values_with_intervals():
    worse, better = noisy_records(0, 50), noisy_records(0, 50, shift=0.02)
    table = compare_table({"base": worse, "r1": better})
    assert list(table.index) == ["base", "r1"]
    assert table.loc["r1", "mean_iou"] == "0.731 [0.70, 0.76]"
    assert table.loc["r1", "detection_rate"] == "1.000 [1.00, 1.00]"
    assert table.loc["base", "n"] == 50
    assert table.loc["base", "median_iou"].count("[") == 0  # only ratios have intervals here


def test_table_says_where_a_metric_is_not_defined():
    table = compare_table({"base": [record([], labelled(SQUARE))]})
    assert isinstance(table, pd.DataFrame)
    assert table.loc["base", "recall"] == "n/a"
    assert table.loc["base", "precision"] == "0.000 [0.00, 0.00]"
