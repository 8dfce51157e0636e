"""A saved result is measured again, merged, and refused where it is none."""

import json
import shutil

import pytest
import safetensors.torch
from huggingface_hub import ModelCard

from helpers.recipes import CATALOGUE
from helpers.results import main
from helpers.runs import RunFolder
from helpers.training import evaluate_run, run_recipe


@pytest.fixture(scope="module")
def trained(make_settings, splits, tmp_path_factory):
    """r1 after two steps, evaluated, and its metrics."""
    rates = {"learning_rates": {"r1-llm-only": 1e-2}}
    settings = make_settings(tmp_path_factory.mktemp("out"), max_steps=2, evaluations=1, max_new_tokens=24, **rates)
    run = run_recipe(CATALOGUE["r1-llm-only"], settings, splits)
    return run, evaluate_run(run, settings, splits.evaluation)


@pytest.mark.slow
def test_measuring_again_gives_the_same_figures(trained, tmp_path, capsys):
    run, metrics = trained
    moved = shutil.copytree(run.path, tmp_path / "moved")
    assert main(["--model", str(moved), "--evaluate-only", "--output", str(tmp_path / "again")]) == 0
    assert json.loads(capsys.readouterr().out.split("usable\n")[-1])["mean_iou"] == metrics["mean_iou"]
    assert RunFolder(tmp_path / "again").read_records() == run.read_records()
    assert main(["--model", str(moved), "--evaluate-only", "--eval-samples", "3"]) == 0
    assert len(RunFolder(moved).read_records()) == 3
    card = ModelCard.load(moved / "README.md")
    assert card.data.library_name == "peft"
    assert "> `Detect every nutrition table. Answer" in card.text  # in place of TRL's


@pytest.mark.slow
def test_mirrored_copies_are_asked_about_into_another_folder(trained, tmp_path, capsys):
    run, _ = trained
    before = (run.path / "metrics.json").read_bytes()
    command = ["--model", str(run.path), "--evaluate-only", "--mirrored", "--eval-samples", "3"]
    with pytest.raises(SystemExit):
        main(command)
    assert "--mirrored goes with --evaluate-only and --output FOLDER: give both." in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path)]) == 0
    asked = {record["id"] for record in RunFolder(tmp_path).read_records()}
    assert len(asked & {record["id"] for record in run.read_records()}) == 3
    assert (run.path / "metrics.json").read_bytes() == before


@pytest.mark.slow
def test_a_merged_model_is_a_result_too(trained, tmp_path):
    run, _ = trained
    assert main(["--model", str(run.path), "--merge", str(tmp_path / "merged")]) == 0
    assert len(RunFolder(tmp_path / "merged").read_records()) == 8
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert main(["--model", str(tmp_path / "merged"), "--evaluate-only", "--eval-samples", "2"]) == 0


@pytest.mark.slow
def test_an_adapter_is_not_put_on_other_weights(trained, base, tmp_path, capsys):
    run, _ = trained
    shutil.copytree(run.path, tmp_path / "runs/r1")
    saved = run.read_recipe() | {"base": "../base"}
    (tmp_path / "runs/r1/recipe.json").write_text(json.dumps(saved))
    shutil.copytree(base, tmp_path / "runs/base")
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["lm_head.weight"] += 0.01
    safetensors.torch.save_file(weights, tmp_path / "runs/base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "runs/r1"), "--evaluate-only"])
    assert "was trained on other weights than those in" in capsys.readouterr().err


def test_what_is_no_result_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path), "--evaluate-only"])
    assert stopped.value.code == 2
    assert "there is no recipe.json in it" in capsys.readouterr().err


def test_a_model_is_not_written_over(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--merge", str(tmp_path / "merged")])
    assert "is not empty" in capsys.readouterr().err
