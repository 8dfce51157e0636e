"""Figures against values computed by hand, against pycocotools, and against their definitions."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.metrics import (
    ERROR_KINDS,
    bootstrap_intervals,
    calibration_error,
    compare_recipes,
    compare_table,
    compute_figures,
    compute_map,
    count_errors,
    describe_difference,
    match_boxes,
    resample_weights,
    score_pictures,
    summarize,
    summarize_labels,
    weighted_median,
)


def things(*boxes, label="nutrition-table"):
    return [{"label": label, "box": box} for box in boxes]


def picture(truth, prediction, id="a", **more):
    return {"id": id, "truth": truth, "prediction": prediction} | more


SQUARE = [0, 0, 10, 10]
GOLDEN = [
    # intersection 5 x 10 = 50, union 100 + 100 - 50 = 150: IoU 1/3
    picture(things(SQUARE), things([5, 0, 15, 10]), "a"),
    # the predicted box is the second true box (IoU 1), and twice the first (0.5): one to one 0 and 1, mean 0.5
    picture(things(SQUARE, [0, 0, 10, 20]), things([0, 0, 10, 20]), "b"),
    # 80 / 100 = 0.8, and two boxes that touch nothing
    picture(things(SQUARE), things([0, 0, 10, 8], [20, 20, 30, 30], [50, 0, 60, 10]), "c"),
]


def test_figures_by_hand():
    figures = summarize(GOLDEN)
    assert list(figures)[:5] == ["mean_iou", "median_iou", "detection_rate", "iou_gt_0.5", "iou_gt_0.7"]
    assert {name: figures[name] for name in figures if not name.startswith("mAP")} == {
        "mean_iou": pytest.approx((1 / 3 + 0.5 + 0.8) / 3),
        "median_iou": pytest.approx(0.5),
        "detection_rate": 1,
        "iou_gt_0.5": pytest.approx(1 / 3),  # 0.5 is not above 0.5
        "iou_gt_0.7": pytest.approx(1 / 3),
        "mean_best_iou": pytest.approx((1 / 3 + 0.5 + 1 + 0.8) / 4),  # 4 true boxes; one predicted box used twice
        "precision": pytest.approx(2 / 5),  # hits: IoU 1 and 0.8, of 5 predicted boxes
        "recall": pytest.approx(2 / 4),
        "f1": pytest.approx(2 * 0.4 * 0.5 / 0.9),
        "malformed_rate": 0,
        "n": 3,
    }


def test_threshold_is_inclusive():
    half = [picture(things(SQUARE), things([0, 0, 10, 5]))]  # 50 / 100
    assert summarize(half)["precision"] == 1
    assert summarize(half, threshold=0.51)["precision"] == 0


def test_average_precision_by_hand():
    # by score: hit, false, hit. Precision 1 up to recall 1/2, then 2/3 up to 1; of the 101 recalls 0, 0.01 ... 1,
    # 51 are up to 1/2
    truth, other = SQUARE, [20, 20, 30, 30]
    prediction = [
        {"label": "", "box": truth, "score": 0.9},
        {"label": "", "box": [50, 50, 60, 60], "score": 0.8},
        {"label": "", "box": other, "score": 0.7},
    ]
    expected = pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    figures = compute_map([picture(things(truth, other), prediction)])
    assert figures == {"mAP": expected, "mAP50": expected, "mAP75": expected}


def test_a_predicted_box_is_used_once():
    assert match_boxes([SQUARE, [0, 0, 10, 20]], [[0, 0, 10, 20]]) == pytest.approx([0, 1])


def test_matching_is_best_overall_not_greedy():
    truth, prediction = [SQUARE, [4, 0, 14, 10]], [[3, 0, 13, 10], [8, 0, 18, 10]]
    assert match_boxes(truth, prediction) == pytest.approx([7 / 13, 6 / 14])


def test_nothing_to_match():
    assert match_boxes([SQUARE], []) == [0]
    assert match_boxes([], [SQUARE]) == []
    assert match_boxes([], []) == []


def test_hits_are_as_many_as_possible():
    # boxes of 100 x 1, shifted by d: IoU (100 - d) / (100 + d), here [[80 / 120, 67 / 133], [67 / 133, 14 / 186]];
    # the largest sum is that of the two 67 / 133, and would hold no hit
    truth, prediction = things([0, 0, 100, 1], [53, 0, 153, 1]), things([20, 0, 120, 1], [-33, 0, 67, 1])
    figures = summarize([picture(truth, prediction)], threshold=0.6)
    assert figures["recall"] == 0.5
    assert figures["mean_iou"] == pytest.approx(67 / 133)


def test_picture_without_truth():
    background = picture([], things(SQUARE), "d")
    figures, without = summarize([*GOLDEN, background]), summarize(GOLDEN)
    assert figures["precision"] == pytest.approx(2 / 6)  # a false positive
    same = ["mean_iou", "median_iou", "iou_gt_0.5", "mean_best_iou", "recall"]
    assert [figures[name] for name in same] == pytest.approx([without[name] for name in same])
    assert figures["n"] == 4
    assert summarize([*GOLDEN, picture([], [], "e")])["precision"] == pytest.approx(2 / 5)


def test_nothing_but_predictions():
    figures = summarize([picture([], things(SQUARE))])
    undefined = ["mean_iou", "median_iou", "iou_gt_0.5", "iou_gt_0.7", "mean_best_iou", "recall"]
    assert [name for name, value in figures.items() if value is None] == [*undefined, "mAP", "mAP50", "mAP75"]
    assert (figures["precision"], figures["f1"]) == (0, 0)
    assert bootstrap_intervals([picture([], things(SQUARE))])["mean_iou"] is None


def test_nothing_predicted():
    figures = summarize([picture(things(SQUARE), [])])
    assert all(figures[name] == 0 for name in figures if name != "n")


def test_malformed_is_counted_apart():
    records = [picture(things(SQUARE), [], "a", unread=["(1,2"]), picture(things(SQUARE), [], "b", unread=[])]
    assert summarize(records)["malformed_rate"] == 0.5


@pytest.mark.parametrize(
    ("policy", "precision", "recall"), [("merge", 1, 1), ("multi-class", 0.5, 0.5), ("table-only", 0.5, 1)]
)
def test_policies(policy, precision, recall):
    # the table is found under another spelling, the logo under another name
    truth = [*things(SQUARE), *things([20, 20, 30, 30], label="logo")]
    prediction = [*things(SQUARE, label="Nutrition table"), *things([20, 20, 30, 30], label="barcode")]
    figures = summarize([picture(truth, prediction)], policy=policy)
    assert (figures["precision"], figures["recall"]) == (precision, recall)


def test_unknown_policy_says_what_there_is():
    with pytest.raises(ValueError, match="Unknown policy 'all': use one of merge, multi-class, table-only"):
        summarize(GOLDEN, policy="all")


def test_figures_by_label():
    truth = [*things(SQUARE), *things([20, 20, 30, 30], label="logo")]
    labels = summarize_labels([picture(truth, things(SQUARE, SQUARE)), picture(things(SQUARE), [])])
    assert (labels["nutrition-table"]["precision"], labels["nutrition-table"]["recall"]) == (0.5, 0.5)
    assert (labels["logo"]["recall"], labels["logo"]["n"]) == (0, 1)


def test_summary_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="EVAL_SAMPLES must be at least 1"):
        summarize([])


# Average precision


def random_box(rng):
    x, y = rng.uniform(0, 80, 2)
    return [x, y, x + rng.uniform(4, 20), y + rng.uniform(4, 20)]


def random_records(seed):
    """Up to 5 pictures, up to 6 boxes each, 3 labels; half of the predictions are near a true box."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(rng.integers(1, 6)):
        truth = [
            {"label": str(rng.choice(["a", "b", "c"])), "box": random_box(rng)} for _ in range(rng.integers(0, 7))
        ]
        prediction = []
        for _ in range(rng.integers(0, 7)):
            near = rng.choice(truth) if truth and rng.random() < 0.7 else {"label": "b", "box": random_box(rng)}
            box = (np.array(near["box"]) + rng.uniform(-1, 1, 4)).tolist()
            prediction.append({"label": near["label"], "box": box, "score": round(float(rng.random()), 1)})
        records.append(picture(truth, prediction, number))
    return records


def pycocotools_map(records):
    """The reference, with its own conversion."""

    def annotate(thing, number, n):
        x1, y1, x2, y2 = thing["box"]
        box = [x1, y1, x2 - x1, y2 - y1]
        category = {"a": 1, "b": 2, "c": 3}[thing["label"]]
        more = {"id": n, "iscrowd": 0, "area": box[2] * box[3], "score": thing.get("score")}
        return {"image_id": number, "bbox": box, "category_id": category} | more

    truth, found = COCO(), COCO()
    for coco, side in ((truth, "truth"), (found, "prediction")):
        pairs = [(record["id"], thing) for record in records for thing in record[side]]
        coco.dataset = {
            "images": [{"id": record["id"]} for record in records],
            "categories": [{"id": 1}, {"id": 2}, {"id": 3}],
            "annotations": [annotate(thing, number, n) for n, (number, thing) in enumerate(pairs, start=1)],
        }
        coco.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(["mAP", "mAP50", "mAP75"], evaluation.stats[:3].tolist(), strict=True))


def test_average_precision_is_that_of_pycocotools():
    different = []
    for seed in range(200):
        records = random_records(seed)
        with contextlib.redirect_stdout(io.StringIO()):
            reference = pycocotools_map(records)
        ours = {name: -1 if value is None else value for name, value in compute_map(records, "multi-class").items()}
        if ours != pytest.approx(reference, abs=1e-6):
            different.append((seed, ours, reference))
    assert different == []


# Noise


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=9))
def test_weighted_median_is_the_median_of_repeated_values(pairs):
    values, weights = np.array([value for value, _ in pairs]), np.array([[weight for _, weight in pairs]])
    repeated = np.repeat(values, weights[0])
    expected = np.median(repeated) if len(repeated) else np.nan
    np.testing.assert_allclose(weighted_median(values, weights), [expected])


def test_weights_stand_for_repeated_pictures():
    records = random_records(7)
    weights = np.arange(len(records))[None]
    repeated = [record for record, weight in zip(records, weights[0], strict=True) for _ in range(weight)]
    weighted = compute_figures(score_pictures(records, 0.5, "merge"), weights)
    summary = summarize(repeated)
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx({n: summary[n] for n in weighted})


def noisy_records(seed, n, shift=0.0):
    """Pictures with one box, found with an IoU spread evenly over (0.5 + shift, 0.9 + shift)."""
    widths = np.random.default_rng(seed).uniform(5, 9, n) + 10 * shift
    return [picture(things(SQUARE), things([0, 0, float(w), 10]), str(i)) for i, w in enumerate(widths)]


def test_interval_is_that_of_the_normal_approximation():
    records = noisy_records(0, 200)
    ious = np.array([match_boxes([SQUARE], [r["prediction"][0]["box"]])[0] for r in records])
    half = 1.96 * ious.std() / len(ious) ** 0.5
    low, high = bootstrap_intervals(records)["mean_iou"]
    assert (low, high) == pytest.approx((ious.mean() - half, ious.mean() + half), abs=0.15 * half)
    assert bootstrap_intervals(records) == bootstrap_intervals(records)  # seeded


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
    weights = resample_weights(twice, resamples=5)
    assert (weights[:, 0::2] == weights[:, 1::2]).all()
    assert (weights.sum(axis=1) == 200).all()


def test_identical_recipes_do_not_differ():
    records = noisy_records(0, 50)
    expected = {"difference": 0, "low": 0, "high": 0, "verdict": "no difference"}
    assert compare_recipes(records, records) == expected
    assert compare_recipes(records, records[::-1]) == expected  # paired by id, not by position


def test_small_but_steady_difference_is_found():
    worse, better = noisy_records(0, 50), noisy_records(0, 50, shift=0.02)
    result = compare_recipes(better, worse)
    assert result["verdict"] == "a is better"
    assert result["low"] <= result["difference"] <= result["high"]
    assert result["difference"] == pytest.approx(0.02)
    assert compare_recipes(worse, better)["verdict"] == "b is better"


def test_noise_is_no_difference():
    assert compare_recipes(noisy_records(0, 50), noisy_records(1, 50))["verdict"] == "no difference"


def test_fewer_malformed_answers_are_better():
    clean = noisy_records(0, 50)
    broken = [record | {"unread": ["(1,2"]} for record in clean]
    assert compare_recipes(clean, broken, metric="malformed_rate")["verdict"] == "a is better"


def test_other_pictures_cannot_be_compared():
    with pytest.raises(ValueError, match="same EVAL_SPLIT, EVAL_SAMPLES and SEED"):
        compare_recipes(noisy_records(0, 5), noisy_records(0, 6))


def test_table_marks_best_only_where_the_test_supports_it():
    worse, better = noisy_records(0, 50), noisy_records(0, 50, shift=0.02)
    table = compare_table({"base": worse, "r1": better})
    assert table.loc["r1", "mean_iou"] == "0.731 [0.70, 0.76] best"
    assert not table.loc["base"].str.contains("best").any()
    assert table.loc["r1", "detection_rate"] == "1.000 [1.00, 1.00]"
    tied = compare_table({"base": worse, "r1": better, "r2": better})
    assert not tied.map(lambda text: "best" in text).any(axis=None)
    assert "best" not in compare_table({"base": worse}).loc["base", "mean_iou"]


# Kinds of errors


def test_errors_by_hand():
    records = [
        *GOLDEN,  # shifted (1/3); correct, the other table missed; correct and two on the background
        picture(things(SQUARE), things(SQUARE, [0, 0, 10, 9]), "d"),  # correct, duplicate (0.9)
        picture([], things(SQUARE), "e"),  # background
        picture(things(SQUARE), [], "f", unread=["(1,2", "(3,4"]),  # missed, malformed twice
        picture(things(SQUARE), things([9, 0, 19, 10]), "g"),  # 10 / 190 is under 0.1: background, missed
    ]
    counts = dict(zip(ERROR_KINDS, [3, 1, 1, 4, 3, 2], strict=True))
    assert count_errors(records) == counts


@given(
    st.integers(0, 10_000), st.sampled_from(["merge", "multi-class", "table-only"]), st.sampled_from([0.05, 0.5, 0.9])
)
def test_every_box_is_in_one_drawer(seed, policy, threshold):
    records = random_records(seed)
    counts = count_errors(records, threshold, policy)
    predicted = sum(len(record["prediction"]) for record in records)
    assert sum(counts[kind] for kind in ("correct", "shifted", "duplicate", "background")) == predicted
    assert min(counts.values()) >= 0


def scored(*scores_and_boxes):
    prediction = [{"label": "t", "box": box, "score": score} for score, box in scores_and_boxes]
    return {"id": "a", "truth": [{"label": "t", "box": [0, 0, 10, 10]}], "prediction": prediction}


def test_calibration_error_by_hand():
    hit, miss = [0, 0, 10, 10], [20, 20, 30, 30]
    # bin 0.9..1: two boxes, mean score 0.95, one hit: distance 0.45; bin 0.2..0.3: one, 0.25, no hit: 0.25
    records = [scored((0.92, hit), (0.25, miss)), scored((0.98, miss))]
    assert calibration_error(records) == pytest.approx((2 * 0.45 + 1 * 0.25) / 3)
    assert calibration_error([scored((1.0, hit))]) == 0
    assert calibration_error([{"truth": [], "prediction": []}]) is None


def test_scores_decide_average_precision():
    hit, miss = [0, 0, 10, 10], [20, 20, 30, 30]
    assert compute_map([scored((0.9, hit), (0.1, miss))])["mAP50"] == pytest.approx(1.0)
    assert compute_map([scored((0.1, hit), (0.9, miss))])["mAP50"] == pytest.approx(0.5)


def test_a_difference_is_only_called_one_beyond_the_noise():
    good = [scored((1.0, [0, 0, 10, 10])) | {"id": str(n)} for n in range(20)]
    bad = [scored((1.0, [0, 0, 10, 6])) | {"id": str(n)} for n in range(20)]
    assert describe_difference(bad, good) == "+0.400 [+0.400, +0.400] mean IoU: better"
    assert describe_difference(good, good) == "+0.000 [+0.000, +0.000] mean IoU: no difference seen"
