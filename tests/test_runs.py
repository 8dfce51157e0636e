"""What a run leaves on disk, and the comparison that gathers it."""

import json
import resource

import pytest

from helpers.runs import RunFolder, save_comparison, write_file, write_json


def record(width, id="a"):
    """A record of one table of 10 x 10 pixels and a box that covers `width` of them."""
    truth, prediction = ([{"label": "t", "box": [0, 0, x, 10]}] for x in (10, width))
    return {"id": id, "truth": truth, "prediction": prediction, "unread": [], "iou": width / 10}


def test_records_and_metrics_are_read_as_they_were_written(tmp_path):
    run = RunFolder(tmp_path / "base")
    metrics = run.write_records([record(8), record(6, "b")])
    assert (metrics["mean_iou"], metrics["iou_gt_0.7"], metrics["n"]) == (pytest.approx(0.7), 0.5, 2)
    assert metrics["intervals"]["mean_iou"] == pytest.approx((0.6, 0.8))
    assert run.read_records() == [record(8), record(6, "b")]
    assert json.loads((run.path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))  # no tuples in JSON
    assert sorted(path.name for path in run.path.iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_a_run_is_trained_when_its_recipe_is_written(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.is_trained
    write_json(tmp_path / "recipe.json", {"name": "r1-llm-only", "precision": "nf4"})
    assert run.is_trained
    assert run.read_recipe() == {"name": "r1-llm-only", "precision": "nf4"}


def test_one_number_of_the_log(tmp_path):
    log = [{"step": 0, "eval_loss": 2.0}, {"step": 5, "loss": 1.5}, {"step": 5, "eval_loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert RunFolder(tmp_path).read_log("eval_loss").to_dict() == {0: 2.0, 5: 1.0}
    assert RunFolder(tmp_path).read_log("loss").to_dict() == {5: 1.5}
    assert RunFolder(tmp_path).read_log("grad_norm_visual").empty


def test_comparison_names_untrained_models_first(tmp_path):
    for name, width in [("r1-llm-only", 8), ("same-box", 3), ("base", 1)]:
        RunFolder(tmp_path / name).write_records([record(width)])
    write_json(tmp_path / "r1-llm-only/recipe.json", {})
    RunFolder(tmp_path / "collators/v1-all-tokens").write_records([record(5)])  # an experiment: not compared
    comparison = save_comparison(tmp_path)
    assert list(comparison) == ["base", "same-box", "r1-llm-only"]
    assert [metrics["mean_iou"] for metrics in comparison.values()] == [0.1, 0.3, 0.8]
    assert "intervals" not in comparison["base"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "metrics.json"
    write_file(file, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))  # as on a full disk: the sixth byte cannot be written
    try:
        with pytest.raises(OSError, match="too large"):
            write_file(file, b"new, and longer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old"
