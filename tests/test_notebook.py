"""The notebook, executed headlessly and alone: in an empty folder, with papermill, `helpers` out of reach."""

import json
import shutil

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers.export import SCRIPT

METRICS = ["mean_iou", "median_iou", "detection_rate", "iou_gt_0.5", "iou_gt_0.7", "n"]


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
    assert list(comparison) == ["base", "r1-llm-only"]
    assert [list(row) for row in comparison.values()] == [METRICS, METRICS]
    assert {row["n"] for row in comparison.values()} == {8}
    recipe = folder / "out/r1-llm-only"
    assert json.loads((recipe / "metrics.json").read_text()) == comparison["r1-llm-only"]
    lines = [json.loads(line) for line in (recipe / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert set(lines[0]) == {"id", "width", "height", "truth", "prediction", "raw", "iou"}
    assert {"adapter_model.safetensors", "processor_config.json", "tokenizer.json"} <= {
        p.name for p in recipe.iterdir()
    }


@pytest.mark.slow
def test_notebook_shows_figures_and_table(executed):
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 6
    tables = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("detection_rate" in table and "r1-llm-only" in table for table in tables)
    assert not [output for output in outputs if output.output_type == "error"]


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
