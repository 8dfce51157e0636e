"""Baselines are measured once; models are compared in pairs, on the same images only."""

import json

import pytest

from helpers.comparison import compare, compare_pairs, describe, drop_other_images, find_best, measure_baselines
from helpers.runs import RunFolder


def to_records(ious, name="image"):
    """Records of one true box each, found with these IoUs (the predicted box is as wide, and lower)."""
    truth = [{"label": "table", "box": [0, 0, 10, 100]}]
    return [
        {"id": f"{name}{number}", "truth": truth, "prediction": [{"label": "table", "box": [0, 0, 10, 100 * iou]}]}
        | {"unread": [], "iou": iou}
        for number, iou in enumerate(ious)
    ]


MODELS = {"base": to_records([0.1, 0.2]), "r1-llm-only": to_records([0.6, 0.7]), "r4-joint": to_records([0.5, 0.8])}


def test_every_pair_gets_a_verdict():
    differences = compare_pairs(MODELS)
    lines = describe(MODELS, differences).splitlines()
    assert lines[0].split() == ["mean_iou", "iou_gt_0.5", "iou_gt_0.7", "f1", "malformed_rate", "n"]
    assert lines[2].split()[:2] == ["r1-llm-only", "0.650"]
    assert lines[5:] == [
        "base -> r1-llm-only: +0.500 [+0.500, +0.500] mean IoU: better",
        "base -> r4-joint: +0.500 [+0.400, +0.600] mean IoU: better",
        "r1-llm-only -> r4-joint: +0.000 [-0.100, +0.100] mean IoU: no difference seen",
        "About one in twenty such intervals excludes 0 by chance.",
    ]


def test_other_images_are_not_compared():
    models = MODELS | {"r2-vision-only": to_records([0.9, 0.9], "other")}
    assert drop_other_images(models) == ["r2-vision-only"]
    assert list(models) == ["base", "r1-llm-only", "r4-joint"]


def test_the_merged_model_is_not_one_more(tmp_path, capsys):
    for name, records in (MODELS | {"merged": to_records([1, 1])}).items():
        RunFolder(tmp_path / name).write_records(records)
    metrics, differences = compare(tmp_path)
    assert list(metrics) == ["base", "r1-llm-only", "r4-joint"]
    assert json.loads((tmp_path / "differences.json").read_text()) == differences
    assert "base -> r4-joint: +0.500" in capsys.readouterr().out


def test_the_best_is_a_recipe(tmp_path):
    ious = {"base": 0.8, "same-box": 0.9, "r1-llm-only": 0.2, "r2-vision-only": None, "r4-joint": 0.3}
    metrics = {name: {"mean_iou": iou} for name, iou in ious.items()}
    assert find_best(tmp_path, metrics).path == tmp_path / "r4-joint"


@pytest.mark.slow
def test_baselines_are_measured_once(make_settings, splits, tmp_path):
    settings = make_settings(tmp_path)
    measure_baselines(settings, splits)
    files = [tmp_path / name / "predictions.jsonl" for name in ("base", "same-box")]
    times = [file.stat().st_mtime_ns for file in files]
    same = [record["raw"] for record in RunFolder(tmp_path / "same-box").read_records()]
    assert (len(same), len(set(same))) == (8, 1)
    assert RunFolder(tmp_path / "base").read_records()[0]["raw"].endswith("<|im_end|>")
    measure_baselines(settings, splits)
    assert [file.stat().st_mtime_ns for file in files] == times
    measure_baselines(make_settings(tmp_path, max_new_tokens=5), splits)
    assert [file.stat().st_mtime_ns for file in files] != times
