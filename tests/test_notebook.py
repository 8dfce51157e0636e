"""The notebook, executed headlessly and alone: in an empty folder, with papermill, `helpers` out of reach."""

import json
import shutil

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers.export import SCRIPT

METRICS = ["mean_iou", "median_iou", "detection_rate", "iou_gt_0.5", "iou_gt_0.7"]
RECIPES = ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base, dataset_folder):
    """An empty folder with nothing but the notebook, a model and a dataset."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(SCRIPT.with_suffix(".ipynb"), folder / "story.ipynb")
    shutil.copytree(base, folder / "model")
    shutil.copytree(dataset_folder, folder / "dataset")
    return folder


def execute(folder, name, **parameters):
    smoke = {
        "MODEL_ID": "model",
        "DATASET_ID": "dataset",
        "OUTPUT_DIR": "out",
        "MAX_STEPS": 2,
        "COLLATOR_STEPS": 1,
        "WATCH_SAMPLES": 2,
        "BATCH_SIZE": 2,
        "GRADIENT_ACCUMULATION_STEPS": 1,
        "GRADIENT_CHECKPOINTING": False,
    }
    return papermill.execute_notebook(
        folder / "story.ipynb",
        folder / f"{name}.ipynb",
        parameters=smoke | parameters,
        cwd=folder,
        kernel_name="python3",
        progress_bar=False,
    )


@pytest.fixture(scope="module")
def executed(folder):
    return execute(folder, "executed")


@pytest.mark.slow
def test_notebook_runs_alone_and_leaves_its_results(folder, executed):
    comparison = json.loads((folder / "out/comparison.json").read_text())
    assert list(comparison) == ["base", *RECIPES]
    assert all(list(row)[:5] == METRICS for row in comparison.values())
    assert {row["n"] for row in comparison.values()} == {8}
    for name, figures in comparison.items():
        metrics = json.loads((folder / "out" / name / "metrics.json").read_text())
        assert figures == {key: metrics[key] for key in figures}
        assert set(metrics["intervals"]) >= set(METRICS)
        lines = [json.loads(line) for line in (folder / "out" / name / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == 8
        assert set(lines[0]) >= {"id", "width", "height", "truth", "prediction", "raw", "iou"}
        assert (folder / "out" / name / "card.md").exists()


def names_in(path):
    return {child.name for child in path.iterdir()}


@pytest.mark.slow
def test_adapters_full_checkpoints_and_the_merged_model_are_on_disk(folder, executed):
    adapter = {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "recipe.json"}
    for name in ("r1-llm-only", "r3-two-stage", "r4-joint", "collators/v1-all-tokens", "collators/v2-assistant-only"):
        assert names_in(folder / "out" / name) >= adapter
    full = {"model.safetensors", "config.json", "processor_config.json"}
    assert names_in(folder / "out/r2-vision-only") >= full | {"recipe.json"}
    assert names_in(folder / "out/merged") >= full | {"README.md"}
    # trained in the same run, r2 is the first stage of r3
    started = json.loads((folder / "out/r3-two-stage/recipe.json").read_text())["started_from"]
    assert started == "out/r2-vision-only"


def outputs_of(executed):
    return [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]


def tables_of(executed):
    return [o.data["text/html"] for o in outputs_of(executed) if "text/html" in o.get("data", {})]


@pytest.mark.slow
def test_notebook_shows_figures_and_tables(executed):
    kinds = [kind for output in outputs_of(executed) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 14
    assert any("detection_rate" in table and all(name in table for name in RECIPES) for table in tables_of(executed))
    assert any("before (MB)" in table for table in tables_of(executed))
    assert not [output for output in outputs_of(executed) if output.output_type == "error"]


@pytest.mark.slow
def test_one_recipe_given_as_text(folder, executed):
    """papermill's command line hands `-p RECIPES '["r4-joint"]'` over as text."""
    alone = execute(folder, "alone", RECIPES='["r4-joint"]', OUTPUT_DIR="alone", COLLATOR_STEPS=0, MAX_STEPS=4)
    assert list(json.loads((folder / "alone/comparison.json").read_text())) == ["base", "r4-joint"]
    assert json.loads((folder / "alone/r4-joint/recipe.json").read_text())["steps"] == 4
    printed = "".join(output.get("text", "") for output in outputs_of(alone))
    assert "r1-llm-only: skipped, alone/r1-llm-only holds no trained model" in printed
    assert any("detection_rate" in table and "r4-joint" in table for table in tables_of(alone))


@pytest.mark.slow
def test_unknown_recipe_stops_before_anything_is_written(folder, executed):
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    with pytest.raises(PapermillExecutionError, match=r"Unknown recipe \['r9'\]: set RECIPES to a list out of"):
        execute(folder, "failed", RECIPES=["r9"])
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")} == before


TOPICS = sorted((SCRIPT.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", TOPICS, ids=lambda path: path.stem)
def test_topic_notebook_runs(notebook, tmp_path):
    small = {"PICTURES": 8, "SCORED": 4}
    papermill.execute_notebook(
        notebook, tmp_path / notebook.name, small, cwd=notebook.parent, kernel_name="python3", progress_bar=False
    )
