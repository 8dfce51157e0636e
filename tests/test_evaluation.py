"""The command that measures a file of answers: what it reads, what it prints, what it refuses."""

import json

import pytest

from helpers import evaluation
from helpers.conversation import Task
from helpers.detection import add_answer
from helpers.evaluation import keep_scores, main, read_predictions
from helpers.generation import Answer
from helpers.metrics import bootstrap_intervals, summarize
from helpers.runs import RunFolder

LINES = [
    {  # IoU 1/3, see tests/test_metrics.py; 1000 x 1000 pixels, so that grid and pixels are the same
        "raw": "table(5,0),(15,10)",
        "truth": [[0, 0, 10, 10]],
    },
    {"raw": "table(0,0),(10,20)", "truth": [[0, 0, 10, 10], [0, 0, 10, 20]]},  # best IoU 0.5 and 1
    {"raw": "table(0,0),(10,8),(20,20),(30,30),(50,0),(60,10)", "truth": [[0, 0, 10, 10]]},  # 0.8 and two others
    {"raw": "table(0,0),(10", "truth": []},
]


def write_lines(path, lines):
    truths = [[{"label": "nutrition-table", "box": box} for box in line["truth"]] for line in lines]
    full = [
        {"id": str(n), "width": 1000, "height": 1000, "raw": line["raw"], "truth": truth}
        for n, (line, truth) in enumerate(zip(lines, truths, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in full))
    return str(path)


def test_command_gives_the_metrics_computed_by_hand(tmp_path, capsys):
    main(["--predictions", write_lines(tmp_path / "p.jsonl", LINES), "--json"])
    report = json.loads(capsys.readouterr().out)
    wanted = {
        "mean_best_iou": (1 / 3 + 0.5 + 1 + 0.8) / 4,
        "precision": 2 / 5,
        "recall": 2 / 4,
        "f1": 2 * 0.4 * 0.5 / 0.9,
        "malformed_rate": 1 / 4,
        "n": 4,
    }
    assert {name: report[name] for name in wanted} == pytest.approx(wanted)
    assert report["intervals"]["precision"][0] < 2 / 5 < report["intervals"]["precision"][1]
    assert report["errors"] == {
        **{"correct": 2, "shifted": 1, "duplicate": 0, "background": 2, "missed": 1, "malformed": 1}
    }


def test_command_prints_a_table(tmp_path, capsys):
    main(["--predictions", write_lines(tmp_path / "p.jsonl", LINES), "--iou", "0.9"])
    printed = capsys.readouterr().out
    assert "precision              0.200  [" in printed  # one of five
    assert "4 pictures; hits from IoU 0.9 on; labels: merge" in printed


def test_command_prints_every_line_of_the_report(tmp_path, capsys):
    main(["--predictions", write_lines(tmp_path / "p.jsonl", LINES)])
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "mAP75                  0.337",  # in the order of the lines: wrong, right, right: 51 * 2 / 3 / 101
        "calibration_error        n/a",
        "4 pictures; hits from IoU 0.5 on; labels: merge",
        "boxes: 2 correct, 1 shifted, 0 duplicate, 2 background, 1 missed, 1 malformed",
    ]


def test_help_defines_every_metric(tmp_path, capsys):
    main(["--predictions", write_lines(tmp_path / "p.jsonl", LINES), "--json"])
    report = json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out.replace("_0.7", "iou_gt_0.7")
    undefined = [name for name in [*report["intervals"], "mAP50", *report["errors"]] if name not in text]
    assert undefined == []
    assert max(map(len, text.splitlines())) <= 120


def test_command_prints_labels_where_they_count(tmp_path, capsys):
    lines = [{"id": 1, "width": 9, "height": 9, "raw": "", "truth": [{"label": x, "box": [0, 0, 1, 1]} for x in "ab"]}]
    (tmp_path / "p.jsonl").write_text(json.dumps(lines[0]))
    main(["--predictions", str(tmp_path / "p.jsonl"), "--json"])
    assert list(json.loads(capsys.readouterr().out)["labels"]) == ["a", "b"]


# Scores on file

ANSWER = "table(100,100),(500,300)table(0,0),(1000,1000)"


def scored_record(id="a", scores=(0.9, 0.2)):
    """A record of a run: the first box is half of the table, the second one the whole image."""
    truth = [{"label": "table", "box": [20, 10, 100, 50]}]
    record = add_answer({"id": id, "width": 200, "height": 100, "truth": truth}, Answer(ANSWER), Task("?"))
    scored = [box | {"score": score} for box, score in zip(record["prediction"], scores, strict=True)]
    return record | {"prediction": scored}


def test_a_run_measured_again_gives_the_same_metrics(tmp_path, capsys):
    records = [scored_record("a"), scored_record("b", scores=(0.1, 0.8))]
    RunFolder(tmp_path).write_records(records)
    main(["--predictions", str(tmp_path / "predictions.jsonl"), "--json"])
    report = json.loads(capsys.readouterr().out)
    metrics = summarize(records)
    assert {name: report[name] for name in metrics} == metrics
    for name, interval in bootstrap_intervals(records).items():
        assert report["intervals"][name] == pytest.approx(interval)
    # by score: right (0.9), wrong (0.8), wrong (0.2), right (0.1): precision 1 up to recall 1/2, then 2/4
    assert report["mAP50"] == pytest.approx((51 * 1 + 50 * 2 / 4) / 101)
    assert report["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.2 + 0.9) / 4)


def read_one(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    (record,) = read_predictions(tmp_path / "p.jsonl", "qwen2_vl")
    return record


def test_scores_on_file_are_kept_where_the_boxes_are_the_same(tmp_path):
    record = scored_record()
    assert read_one(tmp_path, record) == record


@pytest.mark.parametrize(
    "change",
    [
        lambda boxes: boxes[:1],
        lambda boxes: boxes[::-1],
        lambda boxes: [boxes[0], boxes[1] | {"box": [0, 0, 200, 99]}],
        lambda boxes: [boxes[0], {"score": 0.5}],
        lambda boxes: "none",
        lambda boxes: None,
    ],
    ids=["fewer", "another order", "another box", "no box", "a text", "nothing"],
)
def test_scores_of_other_boxes_are_not_kept(tmp_path, change):
    record = scored_record()
    found = read_one(tmp_path, record | {"prediction": change(record["prediction"])})
    assert [set(box) for box in found["prediction"]] == [{"label", "box"}] * 2


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), "0.5", None])
def test_what_is_no_probability_is_not_kept(score):
    record = scored_record()
    unscored = [{"label": box["label"], "box": box["box"]} for box in record["prediction"]]
    stored = [record["prediction"][0], record["prediction"][1] | {"score": score}]
    found = keep_scores(record | {"prediction": unscored}, stored)
    assert [box.get("score") for box in found["prediction"]] == [0.9, None]


def test_pixels_of_the_resized_image(tmp_path):
    answer = '[{"bbox_2d": [98, 56, 196, 112], "label": "table"}]'
    line = {"id": 1, "width": 200, "height": 100, "resized": [196, 112], "raw": answer, "truth": []}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    (record,) = read_predictions(tmp_path / "p.jsonl", "qwen2_5_vl")
    assert record["prediction"] == [{"label": "table", "box": [100, 50, 200, 100]}]


# What is refused

GOOD = {"id": 1, "width": 10, "height": 10, "raw": "", "truth": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.jsonl is empty: write one line per picture; a line is \{"),
        ("\n\n", "is empty"),
        (json.dumps(GOOD) + "\n{oops\n", "line 2 is not JSON: a line is"),
        (b"\xff\xfe\xff", "line 1 is not JSON"),
        ("[1]", "line 1: not a JSON object; a line is"),
        (json.dumps({"id": 1, "raw": "", "truth": []}), "line 1: no field width, height; a line is"),
        (json.dumps(GOOD | {"width": 0}), "line 1: width, height .* must be whole numbers of pixels"),
        (json.dumps(GOOD | {"raw": None}), "line 1: raw must be a text"),
        (json.dumps(GOOD | {"truth": None}), "line 1: truth must be a list"),
        (json.dumps(GOOD | {"truth": [{"label": "a", "box": [1, 2, 1, 4]}]}), "line 1: truth must be .* x1 < x2"),
        (json.dumps(GOOD | {"truth": [{"label": "a", "box": [1, 2, float("nan"), 4]}]}), "line 1: truth must be"),
    ],
)
def test_command_names_the_line_that_is_wrong(tmp_path, capsys, text, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stopped:
        main(["--predictions", str(path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1
    with pytest.raises(ValueError, match=message):
        evaluation.read_predictions(path, "qwen2_vl")


@pytest.mark.parametrize("name", ["missing.jsonl", ""])  # no such file; a folder
def test_command_without_a_file(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main(["--predictions", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert "give --predictions an existing file" in capsys.readouterr().err


def test_command_refuses_an_impossible_threshold(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--predictions", str(tmp_path), "--iou", "50"])
    assert "--iou 50.0 is not an IoU" in capsys.readouterr().err
