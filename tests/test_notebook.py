"""The notebooks, executed headlessly: the story alone in an empty folder, the topics on what its run left."""

import json
import re
import shutil

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers.export import SCRIPT

METRICS = ["mean_iou", "median_iou", "detection_rate", "iou_gt_0.5", "iou_gt_0.7"]
RECIPES = ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]
PLOTS, GRIDS = 9, 4  # figures; grids of photographs, which are JPEG
PATHS = {"MODEL_ID": "model", "PROCESSES_MODEL_ID": "model", "DATASET_ID": "dataset", "RUN_DIR": "out"}  # of topics


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base, dataset_folder):
    """An empty folder with nothing but the notebook, a model and a dataset."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(SCRIPT.with_suffix(".ipynb"), folder / "story.ipynb")
    shutil.copytree(base, folder / "model")
    shutil.copytree(dataset_folder, folder / "dataset")
    return folder


def run(notebook, output, parameters, cwd):
    return papermill.execute_notebook(notebook, output, parameters, cwd=cwd, kernel_name="python3", progress_bar=False)


def execute(folder, name, **parameters):
    smoke = {
        "MODEL_ID": str(folder / "model"),  # whole paths: the topics read what this run leaves, from elsewhere
        "DATASET_ID": str(folder / "dataset"),
        "OUTPUT_DIR": str(folder / "out"),
        "MAX_STEPS": 2,
        "COLLATOR_STEPS": 1,
        "VALIDATION_SAMPLES": 2,
        "BATCH_SIZE": 2,
    }
    return run(folder / "story.ipynb", folder / f"{name}.ipynb", smoke | parameters, folder)


@pytest.fixture(scope="module")
def executed(folder):
    return execute(folder, "executed")


@pytest.mark.slow
def test_notebook_runs_alone_and_leaves_its_results(folder, executed):
    comparison = json.loads((folder / "out/comparison.json").read_text())
    assert list(comparison) == ["base", "same-box", *RECIPES]
    assert all(list(row)[:5] == METRICS for row in comparison.values())
    assert {row["n"] for row in comparison.values()} == {8}
    for name, compared in comparison.items():
        metrics = json.loads((folder / "out" / name / "metrics.json").read_text())
        assert compared == {key: metrics[key] for key in compared}
        assert set(metrics["intervals"]) >= set(METRICS) - {"median_iou"}  # which is no ratio of sums
        lines = [json.loads(line) for line in (folder / "out" / name / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == 8
        assert set(lines[0]) >= {"id", "group", "width", "height", "truth", "prediction", "raw", "unread", "iou"}


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
    assert started == str(folder / "out/r2-vision-only")
    assert not (folder / "out/r3-two-stage/stage1").exists()
    assert (folder / "out/predictions.png").stat().st_size > 10_000


def outputs_of(executed):
    return [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]


def tables_of(executed):
    return [o.data["text/html"] for o in outputs_of(executed) if "text/html" in o.get("data", {})]


@pytest.mark.slow
def test_notebook_shows_plots_and_tables(executed):
    kinds = [kind for output in outputs_of(executed) for kind in output.get("data", {})]
    assert (kinds.count("image/png"), kinds.count("image/jpeg")) == (PLOTS, GRIDS)
    assert any("detection_rate" in table and all(name in table for name in RECIPES) for table in tables_of(executed))
    assert any("before (MB)" in table for table in tables_of(executed))
    assert not [output for output in outputs_of(executed) if output.output_type == "error"]


@pytest.mark.slow
def test_the_first_tables_name_versions_and_what_is_not_the_default(folder, executed):
    rows = re.findall(r"<th>(.*?)</th>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", tables_of(executed)[1])
    settings = {name: (value, default) for name, value, default in rows if name.isupper()}
    assert settings == {
        "MODEL_ID": (str(folder / "model"), "Qwen/Qwen2-VL-7B-Instruct"),
        "DATASET_ID": (str(folder / "dataset"), "openfoodfacts/nutrition-table-detection"),
        "OUTPUT_DIR": (str(folder / "out"), "outputs/qwen2-vl-7b"),
        "MAX_STEPS": ("2", "-1"),
        "COLLATOR_STEPS": ("1", "100"),
        "VALIDATION_SAMPLES": ("2", "64"),
        "BATCH_SIZE": ("2", "16"),
    }
    assert {"device", "dtype"} <= {name for name, *_ in rows}
    assert all(f"<th>{package}</th>" in tables_of(executed)[0] for package in ("torch", "trl", "peft"))


@pytest.mark.slow
def test_one_recipe_given_as_text(folder, executed):
    """papermill's command line hands `-p RECIPES '["r4-joint"]'` over as text."""
    alone = execute(folder, "alone", RECIPES='["r4-joint"]', OUTPUT_DIR="alone", COLLATOR_STEPS=0, MAX_STEPS=4)
    assert list(json.loads((folder / "alone/comparison.json").read_text())) == ["base", "same-box", "r4-joint"]
    assert json.loads((folder / "alone/r4-joint/recipe.json").read_text())["steps"] == 4
    printed = "".join(output.get("text", "") for output in outputs_of(alone))
    assert "r1-llm-only: skipped, alone/r1-llm-only holds no trained model" in printed
    assert any("detection_rate" in table and "r4-joint" in table for table in tables_of(alone))


@pytest.mark.slow
def test_unknown_recipe_stops_before_anything_is_written(folder, executed):
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    with pytest.raises(PapermillExecutionError, match=r"RECIPES=\['r9'\]: give a list out of r1-llm-only, r2-"):
        execute(folder, "failed", RECIPES=["r9"])
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")} == before


TOPICS = sorted((SCRIPT.parent / "notebooks").glob("*.ipynb"))
SMALL = {
    "00_tiny_world": {"SCORED_IMAGES": 4},
    "01_dataset_exploration": {"PLANTED": 4},
    "02_model_understanding": {"IMAGE": 0, "SAMPLES": 4},
    "03_data_preprocessing": {"SAMPLES": 24, "BATCH_SIZE": 4},
    "04_evaluation_analysis": {"PROBED": 4},
    "05_dtype_and_device": {"STEPS": 2, "ANSWERS": 4, "BATCH_SIZE": 2},
    "06_quantization_and_trainable_params": {"SAMPLES": 4, "BATCH_SIZE": 2},
    "07_beyond_sft": {"STEPS": 1, "IMAGES": 1, "ASKED": 2},
    "08_trust": {"PROBED": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", TOPICS, ids=lambda path: path.stem)
def test_topic_notebook_runs(notebook, folder, executed, tmp_path):
    paths = {name: str(folder / name_on_disk) for name, name_on_disk in PATHS.items()}
    paths |= {"OUTPUT_DIR": str(tmp_path / "out")}
    known = papermill.inspect_notebook(str(notebook))
    parameters = SMALL[notebook.stem] | {name: path for name, path in paths.items() if name in known}
    assert parameters.keys() <= known.keys()
    finished = run(notebook, tmp_path / notebook.name, parameters, notebook.parent)
    assert "image/png" in {kind for output in outputs_of(finished) for kind in output.get("data", {})}
