"""Average precision, calibration, kinds of errors, label policies and cards, by hand and against references."""

import contextlib
import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.analysis import (
    ERROR_KINDS,
    POLICIES,
    apply_policy,
    bin_scores,
    bin_sizes,
    build_report,
    calibration_error,
    collect_scores,
    compute_map,
    compute_precision,
    count_confusions,
    count_errors,
    count_wins,
    describe_table,
    image_ious,
    list_metrics,
    list_sizes,
    measure,
    normalize_label,
    plot_against,
    plot_card,
    plot_confusions,
    plot_iou_by_size,
    plot_precision_recall,
    plot_reliability,
    summarize_labels,
    to_coco,
    weighted_median,
    write_card,
)
from helpers.metrics import summarize
from helpers.plots import MODEL_COLOURS


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def labelled(*boxes, label="nutrition-table"):
    return [{"label": label, "box": box} for box in boxes]


def record(truth, prediction, id="a", **more):
    return {"id": id, "width": 100, "height": 100, "truth": truth, "prediction": prediction} | more


SQUARE, AWAY = [0, 0, 10, 10], [20, 20, 30, 30]


def scored(*scores_and_boxes, id="a"):
    """A record with one table, SQUARE, and predicted boxes with scores."""
    prediction = [{"label": "t", "box": box, "score": score} for score, box in scores_and_boxes]
    return record(labelled(SQUARE, label="t"), prediction, id)


# Average precision


def test_average_precision_by_hand():
    # by score: right, wrong, right. Precision 1 up to recall 1/2, then 2/3 up to 1; of the 101 recalls 0, 0.01 ... 1,
    # 51 are up to 1/2
    prediction = [
        {"label": "", "box": SQUARE, "score": 0.9},
        {"label": "", "box": [50, 50, 60, 60], "score": 0.8},
        {"label": "", "box": AWAY, "score": 0.7},
    ]
    expected = pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    records = [record(labelled(SQUARE, AWAY), prediction)]
    assert compute_map(records) == {"mAP": expected, "mAP50": expected, "mAP75": expected}
    precision = compute_precision(records)
    assert precision.shape == (10, 101, 1)
    assert precision[0, :, 0] == pytest.approx([1] * 51 + [2 / 3] * 50)


def test_scores_decide_average_precision():
    assert compute_map([scored((0.9, SQUARE), (0.1, AWAY))])["mAP50"] == pytest.approx(1.0)
    assert compute_map([scored((0.1, SQUARE), (0.9, AWAY))])["mAP50"] == pytest.approx(0.5)


def test_thresholds_of_average_precision():
    most = [record(labelled(SQUARE), labelled([0, 0, 10, 8]))]  # IoU 0.8: right at 0.50, 0.55 ... 0.80, seven of ten
    assert compute_map(most) == pytest.approx({"mAP": 0.7, "mAP50": 1, "mAP75": 1})


def test_average_precision_without_true_boxes():
    background = [record([], labelled(SQUARE))]
    assert compute_precision(background) is None
    assert compute_map(background) == {"mAP": None, "mAP50": None, "mAP75": None}
    assert compute_map([record(labelled(SQUARE), [])]) == {"mAP": 0, "mAP50": 0, "mAP75": 0}


def test_coco_format_by_hand():
    dataset, found = to_coco([
        record([], []),
        record([{"label": "a", "box": [1, 2, 4, 10], "category_id": 2}], labelled([0, 0, 2, 3])),
    ])  # fmt: skip
    assert dataset["images"] == [{"id": 1}, {"id": 2}]
    assert dataset["categories"] == [{"id": 1, "name": "1"}, {"id": 2, "name": "2"}]
    (truth,) = dataset["annotations"]
    assert truth | {"id": 1, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 8], "area": 24, "iscrowd": 0} == truth
    assert [(f["id"], f["image_id"], f["category_id"], f["score"]) for f in found] == [(1, 2, 1, 1.0)]


def random_box(rng):
    x, y = rng.uniform(0, 80, 2)
    return [x, y, x + rng.uniform(4, 20), y + rng.uniform(4, 20)]


def random_records(seed):
    """Up to 5 images, up to 6 boxes each, 3 labels; half of the predictions are near a true box."""
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
        records.append(record(truth, prediction, number))
    return records


def pycocotools_map(records):
    """The reference, with its own conversion."""

    def annotate(box_of_label, number, n):
        x1, y1, x2, y2 = box_of_label["box"]
        box = [x1, y1, x2 - x1, y2 - y1]
        category = {"a": 1, "b": 2, "c": 3}[box_of_label["label"]]
        more = {"id": n, "iscrowd": 0, "area": box[2] * box[3], "score": box_of_label.get("score")}
        return {"image_id": number, "bbox": box, "category_id": category} | more

    truth, found = COCO(), COCO()
    for coco, side in ((truth, "truth"), (found, "prediction")):
        pairs = [(record["id"], entry) for record in records for entry in record[side]]
        coco.dataset = {
            "images": [{"id": record["id"]} for record in records],
            "categories": [{"id": 1}, {"id": 2}, {"id": 3}],
            "annotations": [annotate(entry, number, n) for n, (number, entry) in enumerate(pairs, start=1)],
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
        metrics = compute_map(apply_policy(records, "multi-class"))
        ours = {name: -1 if value is None else value for name, value in metrics.items()}
        if ours != pytest.approx(reference, abs=1e-6):
            different.append((seed, ours, reference))
    assert different == []


# Calibration


def test_calibration_error_by_hand():
    # bin 0.9..1: two boxes, mean score 0.95, one right: distance 0.45; bin 0.2..0.3: one, 0.25, not right: 0.25
    records = [scored((0.92, SQUARE), (0.25, AWAY)), scored((0.98, AWAY))]
    assert calibration_error(records) == pytest.approx((2 * 0.45 + 1 * 0.25) / 3)
    assert calibration_error([scored((1.0, SQUARE))]) == 0
    assert calibration_error([record([], [])]) is None


def test_scores_and_true_positives():
    half = [0, 0, 10, 5]
    records = [scored((0.9, AWAY), (0.8, half)), record(labelled(SQUARE), labelled(SQUARE)), scored((0.7, SQUARE))]
    scores, right = collect_scores(records)
    assert (scores.tolist(), right.tolist()) == ([0.9, 0.8, 0.7], [False, True, True])  # without a score: left out
    assert collect_scores(records, threshold=0.6)[1].tolist() == [False, False, True]


def test_bins_of_scores():
    table = bin_scores(np.array([0.0, 0.05, 0.1, 1.0]), np.array([False, True, True, True]))
    assert table.index.tolist() == [0, 1, 9]  # a score of 1 belongs to the last bin
    assert table.boxes.tolist() == [2, 1, 1]
    assert table.score.tolist() == pytest.approx([0.025, 0.1, 1])
    assert table.share.tolist() == [0.5, 1, 1]


# Kinds of errors


def test_errors_by_hand():
    tall = [0, 0, 10, 20]
    records = [
        record(labelled(SQUARE), labelled([5, 0, 15, 10])),  # shifted (1/3)
        record(labelled(SQUARE, tall), labelled(tall)),  # correct, the other table missed
        record(labelled(SQUARE), labelled([0, 0, 10, 8], AWAY, [50, 0, 60, 10])),  # correct, two on the background
        record(labelled(SQUARE), labelled(SQUARE, [0, 0, 10, 9])),  # correct, duplicate (0.9)
        record([], labelled(SQUARE)),  # background
        record(labelled(SQUARE), [], unread=["(1,2", "(3,4"]),  # missed, malformed twice
        record(labelled(SQUARE), labelled([9, 0, 19, 10])),  # 10 / 190 is under 0.1: background, missed
    ]
    assert count_errors(records) == dict(zip(ERROR_KINDS, [3, 1, 1, 4, 3, 2], strict=True))


@given(st.integers(0, 10_000), st.sampled_from(POLICIES), st.sampled_from([0.05, 0.5, 0.9]))
def test_every_box_is_of_one_kind(seed, policy, threshold):
    records = random_records(seed)
    counts = count_errors(apply_policy(records, policy), threshold)
    predicted = sum(len(record["prediction"]) for record in records)
    assert sum(counts[kind] for kind in ("correct", "shifted", "duplicate", "background")) == predicted
    assert min(counts.values()) >= 0


# Policies


@pytest.mark.parametrize(
    ("policy", "precision", "recall"), [("merge", 1, 1), ("multi-class", 0.5, 0.5), ("table-only", 0.5, 1)]
)
def test_policies(policy, precision, recall):
    # the table is found under another spelling, the logo under another name
    truth = [*labelled(SQUARE), *labelled(AWAY, label="logo")]
    prediction = [*labelled(SQUARE, label="Nutrition table"), *labelled(AWAY, label="barcode")]
    metrics = summarize(apply_policy([record(truth, prediction)], policy))
    assert (metrics["precision"], metrics["recall"]) == (precision, recall)


def test_records_of_each_policy():
    truth = [*labelled(SQUARE), *labelled(AWAY, label="Logo")]
    one = record(truth, labelled(SQUARE, label="bar code"), more="kept")
    assert apply_policy([one], "merge") == [one]
    assert apply_policy([one], "table-only") == [one | {"truth": labelled(SQUARE)}]
    (numbered,) = apply_policy([one], "multi-class")
    assert [x["category_id"] for x in [*numbered["truth"], *numbered["prediction"]]] == [3, 2, 1]  # bar-code, logo, …
    assert apply_policy([numbered], "merge") == [one]  # labels do not count, so neither do categories
    assert "category_id" not in one["truth"][0]


def test_labels_agree_up_to_spelling():
    assert {normalize_label(label) for label in ("Nutrition table", " nutrition_table", "nutrition--TABLE\n")} == {
        "nutrition-table"
    }


def test_unknown_policy_says_what_there_is():
    with pytest.raises(ValueError, match="Unknown policy 'all': use one of merge, multi-class, table-only"):
        apply_policy([], "all")


def test_metrics_by_label():
    truth = [*labelled(SQUARE), *labelled(AWAY, label="logo")]
    labels = summarize_labels([record(truth, labelled(SQUARE, SQUARE)), record(labelled(SQUARE), [])])
    assert list(labels) == ["logo", "nutrition-table"]
    assert (labels["nutrition-table"]["precision"], labels["nutrition-table"]["recall"]) == (0.5, 0.5)
    assert (labels["logo"]["recall"], labels["logo"]["n"]) == (0, 1)
    assert labels["nutrition-table"]["n"] == 2
    assert not {"detection_rate", "malformed_rate"} & set(labels["logo"])


# Images against each other


def squares(*heights):
    """Images with one table, of which the predicted box covers these tenths."""
    return [record(labelled(SQUARE), labelled([0, 0, 10, h]), str(n)) for n, h in enumerate(heights)]


def test_wins_losses_and_ties():
    background = record([], labelled(SQUARE), "none")
    first, second = [*squares(5, 5, 5, 5), background], [*squares(6, 4, 5.05, 9), background]
    assert count_wins(first, second) == (2, 1, 1)  # a difference of 0.005 is a tie; without a table there is no IoU
    assert count_wins(second, first) == (1, 2, 1)
    with pytest.raises(ValueError, match="Not the same images"):
        count_wins(first, second[::-1])


def test_image_ious():
    ious = image_ious([*squares(5), record([], labelled(SQUARE)), record(labelled(SQUARE, AWAY), labelled(SQUARE))])
    np.testing.assert_allclose(ious, [0.5, np.nan, 0.5])


def test_models_against_a_reference():
    records = {"r4-joint": squares(5, 5), "base": squares(2, 9), "mine": squares(6, 6)}
    figure = plot_against(records, reference="r4-joint")
    assert [axes.get_title() for axes in figure.axes] == ["better 1, worse 1, tie 0", "better 2, worse 0, tie 0"]
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("IoU, r4-joint", "IoU, base")
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.5, 0.2], [0.5, 0.9]])


def test_sizes_by_hand():
    table = list_sizes([
        record(labelled([0, 0, 10, 10], [50, 50, 100, 100]), labelled([50, 50, 100, 100])),
        record([], labelled(SQUARE)),
    ])  # fmt: skip
    assert table.area.tolist() == pytest.approx([0.01, 0.25])
    assert table.iou.tolist() == pytest.approx([0, 1])


def test_sizes_in_bins():
    records = [record(labelled([0, 0, w, 10]), labelled([0, 0, w, 10 if w > 20 else 5])) for w in range(1, 41)]
    table = bin_sizes(records, bins=2)
    assert table.boxes.tolist() == [20, 20]
    assert table.iou.tolist() == pytest.approx([0.5, 1])
    assert table.area.tolist() == pytest.approx([0.0105, 0.0305])
    assert table.error.tolist() == pytest.approx([0, 0], abs=1e-9)
    lines = plot_iou_by_size({"base": records, "mine": records[:1]}).axes[0].get_lines()  # one box makes one bin
    assert lines[0].get_ydata().tolist() == pytest.approx(bin_sizes(records).iou.tolist())
    assert to_hex(lines[0].get_color()) == to_hex(MODEL_COLOURS["base"])


# Reports and cards


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=9))
def test_weighted_median_is_the_median_of_repeated_values(pairs):
    values, weights = np.array([value for value, _ in pairs]), np.array([[weight for _, weight in pairs]])
    repeated = np.repeat(values, weights[0])
    expected = np.median(repeated) if len(repeated) else np.nan
    np.testing.assert_allclose(weighted_median(values, weights), [expected])


def test_report_by_hand():
    records = [scored((0.9, SQUARE), id="x"), scored((0.6, [0, 0, 10, 6]), id="y")]
    report = build_report(records, 0.7, "merge")
    assert list(report) == [
        *("mean_iou", "median_iou", "detection_rate", "iou_gt_0.5", "iou_gt_0.7", "mean_best_iou", "precision"),
        *(
            "recall",
            "malformed_rate",
            "boxes_per_empty_image",
            "f1",
            "mAP",
            "mAP50",
            "mAP75",
            "n",
            "calibration_error",
            "iou_threshold",
        ),
        *("policy", "intervals", "errors", "labels", "confusions"),
    ]
    assert (report["iou_threshold"], report["policy"], report["labels"]) == (0.7, "merge", {})
    assert (report["median_iou"], report["precision"], report["mAP75"]) == pytest.approx((0.8, 0.5, 0.505), abs=1e-3)
    assert report["calibration_error"] == pytest.approx((0.1 + 0.6) / 2)
    assert list(report["intervals"])[:3] == ["mean_iou", "median_iou", "detection_rate"]
    assert report["intervals"]["median_iou"] == pytest.approx((0.6, 1))  # of two images
    assert report["errors"]["shifted"] == 1
    assert json.loads(json.dumps(report))["intervals"]["median_iou"] == pytest.approx([0.6, 1])


def test_report_with_labels():
    truth = [*labelled(SQUARE), *labelled(AWAY, label="logo")]
    records = [record(truth, labelled(SQUARE, AWAY))]
    report = build_report(records, policy="multi-class")
    assert (report["precision"], report["errors"]["background"]) == (0.5, 1)  # the wrong label is background
    assert list(report["labels"]) == ["logo", "nutrition-table"]
    assert report["confusions"] == {
        "logo": {"nutrition-table": 1},
        "nutrition-table": {"nutrition-table": 1},
    }
    assert build_report([record(labelled(SQUARE), [])], policy="multi-class")["labels"] == {}  # there is one only
    assert build_report(records)["precision"] == 1


def test_confusions_pair_boxes_by_place_alone():
    truth = [*labelled(SQUARE), *labelled(AWAY, label="logo")]
    records = [record(truth, [*labelled(SQUARE, label="Logo")]), record([], labelled(AWAY))]
    counts = count_confusions(records)
    assert counts.T.to_dict() == {
        "(no box)": {"(no box)": 0, "logo": 0, "nutrition-table": 1},
        "logo": {"(no box)": 1, "logo": 0, "nutrition-table": 0},
        "nutrition-table": {"(no box)": 0, "logo": 1, "nutrition-table": 0},
    }
    texts = [text.get_text() for text in plot_confusions(counts).axes[0].texts]
    assert texts == ["0", "0", "1", "1", "0", "0", "0", "1", "0"]


def test_cards_tell_what_is_not_defined_and_count_in_whole_numbers():
    table = pd.DataFrame({"iou": [0.5, None], "n": [1234, 2]}, index=["logo", "barcode"])
    assert describe_table(table) == [
        "|  | iou | n |",
        "| --- | --- | --- |",
        "| logo | 0.500 | 1234 |",
        "| barcode | n/a | 2 |",
    ]


def test_metrics_as_text():
    lines = list_metrics(build_report([record([], labelled(SQUARE))]))
    assert lines[0] == ("mean_iou", "n/a", "")
    assert ("precision", "0.000", "0.000, 0.000") in lines
    assert lines[-2:] == [("mAP75", "n/a", ""), ("calibration_error", "n/a", "")]


def test_measure_is_the_summary_with_average_precision():
    metrics = measure(squares(10, 8))
    assert metrics == summarize(squares(10, 8)) | compute_map(squares(10, 8))
    assert list(metrics)[-4:] == ["mAP", "mAP50", "mAP75", "n"]


def test_card_shows_what_was_measured():
    records = [scored((0.95, SQUARE), id="x"), scored((0.95, AWAY), id="y"), record([], [], "z")]
    figure = plot_card(records, "r1-llm-only", "#123456")
    assert figure.get_suptitle() == "r1-llm-only"
    curves, ious, reliability, errors = figure.axes
    assert [line.get_label() for line in curves.get_lines()] == ["IoU 0.5", "IoU 0.75"]
    assert [patch.get_height() for patch in ious.patches if patch.get_height()] == [1, 1]  # two images have tables
    assert reliability.get_title() == "calibration error 0.45"
    np.testing.assert_allclose(reliability.collections[0].get_offsets(), [[0.95, 0.5]])
    assert [bar.get_width() for bar in errors.patches] == [1, 0, 0, 1, 1, 0]
    assert {to_hex(bar.get_facecolor()) for bar in errors.patches} == {"#123456"}


def test_card_without_scores_or_tables():
    _, (left, right) = plt.subplots(1, 2)
    plot_precision_recall(left, [record([], labelled(SQUARE))])
    assert all(np.isnan(line.get_ydata()).all() for line in left.get_lines())
    plot_reliability(right, squares(10))
    assert right.get_title() == "no scores"


@pytest.fixture(scope="module")
def rows():
    """Eight plain images."""
    objects = {"bbox": [[0.05, 0.05, 0.5, 0.5]], "category_name": ["nutrition-table"]}
    shades = [Image.new("RGB", (100, 100), (30 * number, 120, 120)) for number in range(8)]
    return Dataset.from_list([{"image_id": f"n{n}", "image": i, "objects": objects} for n, i in enumerate(shades)])


def records_of(rows):
    """Records that find nothing in the first image, and all tables in the others."""
    return [
        record(labelled([5, 5, 50, 50]), labelled([5, 5, 50, 50]) if number else [], image_id)
        for number, image_id in enumerate(rows["image_id"])
    ]


def test_card_on_disk(rows, tmp_path):
    folder = tmp_path / "r1-llm-only"
    folder.mkdir()
    records = records_of(rows)
    write_card(folder, records, rows.select(range(7, -1, -1)))  # images are found by id
    assert sorted(path.name for path in folder.iterdir()) == ["card.md", "plots.png", "worst.png"]
    lines = (folder / "card.md").read_text().splitlines()
    assert lines[0] == "# r1-llm-only"
    assert lines[2] == "8 images, true positives from IoU 0.5 on, labels: merge."
    assert "| mAP50 | 0.871 |  |" in lines
    assert "Boxes: 7 correct, 0 shifted, 0 duplicate, 0 background, 1 missed, 0 malformed." in lines
    assert f"1. `{rows['image_id'][0]}`" in lines
    assert plt.get_fignums() == []


def test_card_under_another_policy(rows, tmp_path):
    records = [r | {"prediction": labelled([5, 5, 50, 50], label="logo")} for r in records_of(rows)]
    write_card(tmp_path, records, rows, policy="multi-class")
    text = (tmp_path / "card.md").read_text()
    assert "labels: multi-class." in text
    assert "8 background, 8 missed" in text


def test_card_without_true_boxes(rows, tmp_path):
    write_card(tmp_path, [record([], labelled(SQUARE), rows["image_id"][0])], rows)
    assert "worst" not in (tmp_path / "card.md").read_text().lower()
    assert not (tmp_path / "worst.png").exists()


def test_card_of_ids_that_look_like_formulas(rows, tmp_path):
    odd = rows.select([0]).remove_columns("image_id").add_column("image_id", [r"a$\frac$b"])
    write_card(tmp_path, [record(labelled(SQUARE), [], r"a$\frac$b")], odd)
    assert r"1. `a$\frac$b`" in (tmp_path / "card.md").read_text()


def test_card_of_other_images(rows, tmp_path):
    with pytest.raises(ValueError, match="The dataset has no image 'elsewhere'"):
        write_card(tmp_path, [record(labelled(SQUARE), [], "elsewhere")], rows)
    assert list(tmp_path.iterdir()) == []
