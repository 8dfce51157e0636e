"""Labels are ranked by how much models that did not see them disagree; planted mistakes are found."""

import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from helpers.audit import assign_folds, main
from helpers.data import read_row
from helpers.metrics import match_boxes
from helpers.suspects import list_suspects, plant_mistakes, rank_planted
from helpers.tiny.packages import draw_dataset


def labelled(label, *corners, **more):
    return {"label": label, "box": list(corners)} | more


def found(label, *corners, score=0.6):
    return labelled(label, *corners, score=score)


def record(name, truth, prediction):
    return {"id": name, "truth": truth, "prediction": prediction}


@pytest.fixture
def records():
    """Twenty images that a model agrees about, one for each kind of suspect, and one where it is wrong and unsure."""
    right = [record(f"{n}", [labelled("logo", 0, 0, 10, 10)], [found("Logo", 0, 0, 10, 10)]) for n in range(20)]
    return [
        *right,
        record("shifted", [labelled("logo", 5, 0, 15, 10)], [found("logo", 0, 0, 10, 10)]),
        record("swapped", [labelled("logo", 0, 0, 10, 9)], [found("barcode", 0, 0, 10, 10)]),
        record(
            "surplus",
            [labelled("logo", 0, 0, 10, 10), labelled("logo", 50, 50, 60, 60)],
            [found("logo", 0, 0, 10, 10)],
        ),
        record("missing", [], [found("logo", 0, 0, 10, 10)]),
        record("unsure", [labelled("logo", 0, 0, 10, 10)], [found("logo", 70, 0, 80, 10, score=0.1)]),
    ]


def test_every_label_and_every_box_without_one_is_listed_the_suspicious_first(records):
    suspects = list_suspects(records)
    assert len(suspects) == 20 + 1 + 1 + 2 + 1 + 2
    assert {(s["image_id"], s["kind"]) for s in suspects[:5]} == {
        ("shifted", "shifted"), ("swapped", "swapped"), ("surplus", "surplus"), ("missing", "missing"),
        ("unsure", "surplus"),
    }  # fmt: skip
    assert all(s["suspicion"] == 0 for s in suspects[6:])
    by_name = {(s["image_id"], s["kind"]): s for s in suspects}
    assert by_name["surplus", "surplus"] == {
        "image_id": "surplus", "kind": "surplus", "suspicion": pytest.approx(23 / 25), "number": 1, "label": "logo",
        "box": [50, 50, 60, 60], "found_label": None, "found_box": None, "score": None, "iou": None,
    }  # fmt: skip
    shifted, missing = by_name["shifted", "shifted"], by_name["missing", "missing"]
    assert shifted["iou"] == pytest.approx(1 / 3)
    assert shifted["suspicion"] == pytest.approx(shifted["score"] * 21 / 22)  # that many fit better
    assert (missing["number"], missing["found_box"]) == (None, [0, 0, 10, 10])


def make_rows(count):
    """Images of 100 x 100 pixels with a logo and a barcode each, two of a barcode number."""
    objects = {"bbox": [[0.1, 0.1, 0.3, 0.4], [0.6, 0.6, 0.9, 0.9]], "category_name": ["logo", "barcode"]}
    return Dataset.from_list(
        [
            {
                "image_id": str(n), "image": Image.new("RGB", (100, 100)), "meta": {"barcode": f"{n // 2}"},
                "objects": objects | {"category_id": [0, 1]},
            }
            for n in range(count)
        ]
    )  # fmt: skip


def test_mistakes_are_planted_one_an_image_and_named():
    rows = make_rows(20)
    spoilt, planted = plant_mistakes(rows, 0.2, seed=1)
    assert [one["mistake"] for one in planted] == ["shifted", "missing", "swapped", "surplus"] * 2
    assert len({one["image_id"] for one in planted}) == 8
    for one in planted:
        _, boxes, labels = read_row(spoilt[int(one["image_id"])])
        _, before, names = read_row(rows[int(one["image_id"])])
        number = before.index(one["box"])
        if one["mistake"] == "missing":
            assert (one["number"], len(boxes)) == (None, 1)
            assert one["box"] not in boxes
        elif one["mistake"] == "swapped":
            assert (boxes, labels) == (
                before,
                [["barcode"] * 2, ["logo"] * 2][1 - number] if number else ["barcode"] * 2,
            )
        elif one["mistake"] == "shifted":
            assert match_boxes([one["box"]], [boxes[number]]) == [pytest.approx(0.49 / 1.51)]
        else:
            assert (one["number"], len(boxes), labels[2]) == (2, 3, names[number])
            assert np.subtract(boxes[2][2:], boxes[2][:2]) == pytest.approx(
                np.subtract(before[number][2:], before[number][:2])
            )
            assert match_boxes(before, [boxes[2]]) == [0, 0]
    untouched = [n for n in range(20) if str(n) not in {one["image_id"] for one in planted}]
    assert [spoilt[n]["objects"] for n in untouched] == [rows[n]["objects"] for n in untouched]
    assert spoilt.features == rows.features


def test_planted_mistakes_are_looked_up_in_the_list(records):
    suspects = list_suspects(records)
    planted = [
        {"image_id": "shifted", "mistake": "shifted", "number": 0, "box": [0, 0, 10, 10]},
        {"image_id": "missing", "mistake": "missing", "number": None, "box": [0, 0, 10, 9]},
        {"image_id": "missing", "mistake": "missing", "number": None, "box": [50, 50, 60, 60]},
    ]
    first, second, third = rank_planted(suspects, planted)
    assert (suspects[first]["image_id"], suspects[second]["image_id"], third) == ("shifted", "missing", None)


def test_a_barcode_is_in_one_fold():
    folds = assign_folds(make_rows(20), 3, seed=0)
    assert folds[0::2].tolist() == folds[1::2].tolist()
    assert sorted(np.bincount(folds).tolist()) == [6, 6, 8]
    with pytest.raises(ValueError, match="3 images or barcodes do for 1 folds at most: lower --folds"):
        assign_folds(make_rows(6), 2, seed=0)


@pytest.mark.slow
def test_the_command_writes_suspects_and_a_contact_sheet(base, tmp_path, capsys):
    draw_dataset(tmp_path / "data", train=12, validation=1, seed=3, labels=("barcode", "logo"))
    settings = {"MODEL_ID": str(base), "VALIDATION_SAMPLES": 2, "BATCH_SIZE": 2, "REPORT_TO": "none"}
    (tmp_path / "small.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    command = ["--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--max-steps", "2"]
    command += ["--recipe", "r1-llm-only", "--parameters", str(tmp_path / "small.yaml"), "--shown", "4"]
    assert main(command) == 0
    suspects = [json.loads(line) for line in (tmp_path / "out/suspects.jsonl").read_text().splitlines()]
    assert [s["suspicion"] for s in suspects] == sorted((s["suspicion"] for s in suspects), reverse=True)
    labels = [s for s in suspects if s["kind"] != "missing"]
    assert len({(s["image_id"], s["number"]) for s in labels}) == len(labels) > 6
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert min(sheet.size) > 200
    assert "the most suspicious first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--dataset", "nowhere"], "No dataset 'nowhere'"),
        (["--dataset", "x", "--folds", "1"], "--folds is at least 2"),
        (["--dataset", "x", "--parameters", "none.yaml"], "none.yaml: give a YAML file"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, options, reason):
    with pytest.raises(SystemExit) as stopped:
        main([*options, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
