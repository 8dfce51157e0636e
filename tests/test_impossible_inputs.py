"""Inputs that cannot be meant: each gets one line that says what, where and what to do, exit code 2, no traceback."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import checks, detect, evaluation, import_dataset, results, train_recipe
from helpers.checks import check_before_loading, describe_model, describe_os_error, describe_result
from helpers.data import drop_bad_rows
from helpers.recipes import CATALOGUE
from helpers.settings import check_settings

ROOT = Path(__file__).parents[1]
COUNT = "a whole number above 0"
RECIPES = "r1-llm-only, r2-vision-only, r3-two-stage, r4-joint"


@pytest.fixture(scope="module")
def defaults() -> dict[str, object]:
    """The settings of the notebook, by their names there."""
    return {name: default for name, (default, _) in train_recipe.read_notebook_settings().items()}


def refuse(main: Callable, argv: Sequence[object], capsys) -> str:
    """The line that a command says before it ends with exit code 2; what stands in brackets of a path is left out."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, argv)])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in said.out + said.err
    lines = [line for line in said.err.splitlines() if ": error: " in line]
    assert len(lines) == 1, said.err
    return lines[0].partition(": error: ")[2]


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder, with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Settings

SETTINGS = [
    ("MODEL_ID", "", "'': give a text."),
    ("MODEL_ID", None, "None: give a text."),
    ("MODEL_ID", 7, "7: give a text."),
    ("DATASET_ID", "a\0b", "'a\\x00b': give a text."),
    ("OUTPUT_DIR", "  ", "'  ': give a text."),
    ("TRAIN_SPLIT", ["train"], "['train']: give a text."),
    ("QUESTION", 3, "3: give a text, or None."),
    ("SYSTEM_MESSAGE", "", "'': give a text, or None."),
    ("LABELS", [], "[]: give a text such as 'barcode, logo', or None."),
    ("LABELS", [1], "[1]: give a text such as 'barcode, logo', or None."),
    ("RECIPES", [], f"[]: give a list out of {RECIPES}, each once."),
    ("RECIPES", "r1-llm-only", f"'r1-llm-only': give a list out of {RECIPES}, each once."),
    ("RECIPES", ["r1-llm"], f"['r1-llm']: give a list out of {RECIPES}, each once."),
    ("RECIPES", ["r4-joint", "r4-joint"], f"['r4-joint', 'r4-joint']: give a list out of {RECIPES}, each once."),
    ("NUM_EPOCHS", 0, "0: give a number above 0."),
    ("NUM_EPOCHS", -1.5, "-1.5: give a number above 0."),
    ("NUM_EPOCHS", float("nan"), "nan: give a number above 0."),
    ("NUM_EPOCHS", float("inf"), "inf: give a number above 0."),
    ("NUM_EPOCHS", "three", "'three': give a number above 0."),
    ("NUM_EPOCHS", True, "True: give a number above 0."),
    ("MAX_STEPS", 0, f"0: give {COUNT}, or -1."),
    ("MAX_STEPS", -5, f"-5: give {COUNT}, or -1."),
    ("MAX_STEPS", 10.5, f"10.5: give {COUNT}, or -1."),
    ("COLLATOR_STEPS", -1, "-1: give a whole number, 0 or above."),
    ("TRAIN_SAMPLES", 0, f"0: give {COUNT}, or None."),
    ("EVAL_SAMPLES", -1, f"-1: give {COUNT}, or None."),
    ("VALIDATION_SAMPLES", None, f"None: give {COUNT}."),
    ("EVALUATIONS", 0, f"0: give {COUNT}."),
    ("MAX_PIXELS", 1e6, f"1000000.0: give {COUNT}."),
    ("MAX_PIXELS", 10**400, f"1{'0' * 109}: give {COUNT}."),
    ("BATCH_SIZE", 0, f"0: give {COUNT}."),
    ("MICRO_BATCH_SIZE", -2, f"-2: give {COUNT}, or None."),
    ("EVAL_BATCH_SIZE", "8", f"'8': give {COUNT}, or None."),
    ("MAX_NEW_TOKENS", 0, f"0: give {COUNT}."),
    ("LORA_RANK", 0, f"0: give {COUNT}, or None."),
    ("SEED", -1, "-1: give a whole number from 0 to 4294967295."),
    ("SEED", 2**32, "4294967296: give a whole number from 0 to 4294967295."),
    ("FLIP_PROBABILITY", 2, "2: give a number from 0 to 1."),
    ("FLIP_PROBABILITY", float("nan"), "nan: give a number from 0 to 1."),
    ("GRADIENT_CHECKPOINTING", "no", "'no': give True or False, or None."),
    ("COMPILE", 1, "1: give True or False, or None."),
    ("CACHE_FEATURES", None, "None: give True or False."),
    ("AGAIN", "False", "'False': give True or False."),
    ("PRECISION", "int4", "'int4': give one of 'bf16', 'nf4', 'fp8', or None."),
    ("REPORT_TO", "all", "'all': give one of ['tensorboard', 'wandb', 'trackio', 'none']."),
    ("PUSH_TO_HUB", "my detector", "'my detector': give a hub id such as 'me/detector', or ''."),
    ("LEARNING_RATES", 1e-4, f"0.0001: give numbers between 0 and 1, by recipe: {RECIPES}."),
    ("LEARNING_RATES", {"r4": 1e-4}, f"{{'r4': 0.0001}}: give numbers between 0 and 1, by recipe: {RECIPES}."),
    (
        "LEARNING_RATES",
        {"r4-joint": 1e9},
        f"{{'r4-joint': 1000000000.0}}: give numbers between 0 and 1, by recipe: {RECIPES}.",
    ),
    (
        "LEARNING_RATES",
        {"r4-joint": "fast"},
        f"{{'r4-joint': 'fast'}}: give numbers between 0 and 1, by recipe: {RECIPES}.",
    ),
]


@pytest.mark.parametrize(("name", "value", "line"), SETTINGS)
def test_a_setting_that_cannot_be_meant_is_named(defaults, name, value, line):
    settings = SimpleNamespace(**{key.lower(): default for key, default in (defaults | {name: value}).items()})
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}={line}") + "$"):
        check_settings(settings, list(CATALOGUE))


def test_all_settings_are_named_at_once(defaults):
    wrong = {"NUM_EPOCHS": 0, "SEED": -1, "TRAIN_SPLIT": "val", "EVAL_SPLIT": "val"}
    settings = SimpleNamespace(**{key.lower(): default for key, default in (defaults | wrong).items()})
    with pytest.raises(ValueError) as found:  # noqa: PT011 (the text is compared below)
        check_settings(settings, list(CATALOGUE))
    assert str(found.value).splitlines() == [
        "SEED=-1: give a whole number from 0 to 4294967295.",
        "NUM_EPOCHS=0: give a number above 0.",
        "TRAIN_SPLIT and EVAL_SPLIT are both 'val': evaluate on images that are not trained on.",
    ]


# The command that trains

OPTIONS = [
    (["--recipe", "r9"], "argument --recipe: invalid choice: 'r9'"),
    (["--recipe"], "argument --recipe: expected at least one argument"),
    ([], "the following arguments are required: --recipe"),
    (["--recipe", "r1", "--max-step", "3"], "unrecognized arguments: --max-step 3"),
    (["--recipe", "r1", "--max-steps", "many"], "argument --max-steps: invalid int value: 'many'"),
    (["--recipe", "r1", "--max-steps", "0"], "MAX_STEPS=0: give a whole number above 0, or -1."),
    (["--recipe", "r1", "--learning-rate", "nan"], "LEARNING_RATES={'r1-llm-only': nan, "),
    (["--recipe", "r1", "--gpu", "0", "0"], "--gpu 0 0: name each GPU once"),
    (["--recipe", "r1", "r2", "--checkpoint", "/nowhere"], "--checkpoint belongs to one recipe"),
    (["--recipe", "r1", "--checkpoint", "/nowhere"], "--checkpoint /nowhere holds no full checkpoint"),
    (["--recipe", "r1", "--parameters", "/nowhere"], "--parameters /nowhere: give a YAML file that can be read"),
    (["--recipe", "r1", "--labels", ""], "LABELS='': give a text such as 'barcode, logo', or None."),
    (["--recipe", "r1", "--report-to", "mlflow"], "REPORT_TO='mlflow': give one of"),
    (["--recipe", "r1", "--model-id", "/nowhere"], "MODEL_ID=/nowhere is neither a folder"),
    (["--recipe", "r1", "--dataset-id", "/nowhere"], "No dataset '/nowhere': neither a folder below "),
    (["--recipe", "r1", "--max-pixels", "100"], "MAX_PIXELS=100 is under the processor's smallest image: 3136."),
    (["--recipe", "r1", "--eval-split", "test"], "has no split 'test', only ['train', 'val']: set TRAIN_SPLIT /"),
    (["--recipe", "r1", "--labels", "cat"], "LABELS='cat': choose from those of the training split"),
    (
        ["--recipe", "r1", "--validation-samples", "999"],
        "VALIDATION_SAMPLES=999 of 24 rows: hold back at least 1 image",
    ),
    (["--recipe", "r1", "--output-dir", "FILE"], "cannot be written to: "),
    (["--recipe", "r1", "--output-dir", "FILE/below"], "a part of that path is a file; name another folder."),
]


@pytest.mark.parametrize(("options", "line"), OPTIONS)
def test_the_command_refuses_options(options, line, base, dataset_folder, tmp_path, capsys):
    kept, file = tmp_path / "runs/r4-joint/metrics.json", tmp_path / "FILE"
    kept.parent.mkdir(parents=True)
    for path in (kept, file):
        path.write_text("kept")
    places = {"--model-id": base, "--dataset-id": dataset_folder, "--output-dir": tmp_path / "runs"}
    argv = [word for place in places.items() for word in place]
    argv += [str(tmp_path / word) if word.startswith("FILE") else word for word in options]
    assert line in refuse(train_recipe.main, [*argv, "--report-to", "none"] if "mlflow" not in argv else argv, capsys)
    assert {kept.read_text(), file.read_text()} == {"kept"}


PARAMETERS = [
    ("", "holds no settings"),
    ("- MAX_STEPS", "holds no settings"),
    ("MAX_STEPS: [", "give a YAML file that can be read"),
    (b"\xff\xfe\x00", "give a YAML file that can be read"),
    ("!!python/object/apply:os.system ['exit']", "give a YAML file that can be read"),
    ("STEPS: 3", "sets STEPS: choose from AGAIN, "),
    ("MAX_STEPS: 1e3", "argument --max-steps: invalid int value: '1e3'"),
    ("SEED: 1.5", "SEED=1.5: give a whole number from 0 to 4294967295."),
    ("LEARNING_RATES: {r1: 1.0e-4}", "LEARNING_RATES={'r1': 0.0001}: give numbers between 0 and 1, by recipe: "),
    ("GRADIENT_CHECKPOINTING: 'no'", "GRADIENT_CHECKPOINTING='no': give True or False, or None."),
]


@pytest.mark.parametrize(("content", "line"), PARAMETERS)
def test_the_command_refuses_a_parameters_file(content, line, tmp_path, capsys):
    file = tmp_path / "parameters.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ["--recipe", "r1-llm-only", "--output-dir", tmp_path / "runs", "--parameters", file]
    assert line in refuse(train_recipe.main, argv, capsys)


# Models


def change_json(file: Path, **changes) -> None:
    """Change what a JSON file says; None deletes."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def to_pickle(folder: Path) -> None:
    """A model as it was saved years ago."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_shards(folder: Path) -> None:
    """An index that names two files, of which one is there."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def poison(value: float) -> Callable[[Path], None]:
    """One number of one tensor is none."""
    return lambda folder: change_weights(folder, lambda tensors: tensors["model.norm.weight"][3:4].fill_(value))


UP = "model.layers.3.mlp.up_proj.weight"
MODELS = [
    ("no config", lambda f: (f / "config.json").unlink(), "there is no config.json in it: give the folder of a whole"),
    ("binary config", lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
    ("half config", lambda f: (f / "config.json").write_text('{"model_type"'), "config.json is not JSON"),
    ("no family", lambda f: change_json(f / "config.json", model_type=None), "config.json names no model_type"),
    (
        "other family",
        lambda f: change_json(f / "config.json", model_type="llama"),
        "How 'llama' models write boxes is",
    ),
    (
        "quantised",
        lambda f: change_json(f / "config.json", quantization_config={}),
        "its weights are quantised already",
    ),
    (
        "other width",
        lambda f: change_json(f / "config.json", text_config={"hidden_size": 3}),
        "it cannot be built from",
    ),
    (
        "adapter",
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "merge the adapter into its base first",
    ),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "there are no weights (*.safetensors) in it"),
    ("pickled", to_pickle, "pytorch_model.bin is pickled, and could run any code when read: convert it, `python -c"),
    ("truncated", lambda f: os.truncate(f / "model.safetensors", 9999), "model.safetensors is damaged or not whole"),
    ("garbage", lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "model.safetensors is damaged or not"),
    ("empty", lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or not whole"),
    (
        "pointer",
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
        "it is a Git LFS pointer: `git lfs pull`",
    ),
    ("shards", to_shards, "1 of the files that model.safetensors.index.json names are missing, model-2.safetensors"),
    (
        "missing tensor",
        lambda f: change_weights(f, lambda t: t.pop(UP)),
        "1 tensors are missing, model.language_model.la",
    ),
    (
        "other shape",
        lambda f: change_weights(f, lambda t: t.update({UP: torch.zeros(2, 3)})),
        "has shape [2, 3], config",
    ),
    ("nan", poison(float("nan")), "1 tensors hold nan or infinity, model.norm.weight first"),
    ("infinity", poison(float("inf")), "1 tensors hold nan or infinity, model.norm.weight first"),
    (
        "no tokenizer",
        lambda f: (f / "tokenizer.json").unlink(),
        "its tokenizer knows no words: download tokenizer.json again",
    ),
    ("no template", lambda f: (f / "chat_template.jinja").unlink(), "its processor has no chat template"),
]


@pytest.mark.parametrize(("damage", "line"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_a_model_that_cannot_be_trained_is_named(damage, line, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    damage(folder)
    before = tree(folder)
    (problem,) = describe_model(str(folder), 224 * 224)
    assert problem.startswith(f"MODEL_ID={folder}: ")
    assert line in problem
    assert "\n" not in problem
    assert tree(folder) == before


def test_a_model_is_neither_a_file_nor_a_name_that_nobody_knows(base):
    assert describe_model(f"{base}/config.json", 50176) == [
        f"MODEL_ID={base}/config.json is a file: give the folder that it is in."
    ]
    (problem,) = describe_model("nobody/nothing", 50176)
    assert problem.endswith("on the hub: check its spelling; a gated model needs `hf auth login`.")


# Output folders and disks


def test_too_little_room_is_told_before_anything_is_loaded(make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000))
    with pytest.raises(
        ValueError, match=r"will be needed \(results .* MB, checkpoints .*, features .*\), 3.0 MB are free"
    ):
        check_before_loading(make_settings(tmp_path / "out"), ["r1-llm-only"])


def test_a_tracker_that_is_not_installed_is_named(make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="REPORT_TO='wandb' is not installed: `pip install wandb`"):
        check_before_loading(make_settings(tmp_path, report_to="wandb"), ["r1-llm-only"])


DISKS = [
    (OSError(28, "No space left on device", "a.json"), "a.json: the disk is full; free some room"),
    (OSError(28, "No space left on device"), "A file could not be written: the disk is full"),
    (OSError(122, "Disk quota exceeded", "a"), "a: the quota is used up"),
    (PermissionError(13, "Permission denied", "/a"), "/a: that is not permitted; name a folder that you may write to"),
    (OSError(30, "Read-only file system", "/a"), "/a: the file system is read-only"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "the disk is full"),
    (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
]


@pytest.mark.parametrize(("error", "line"), DISKS)
def test_a_disk_that_takes_no_more_is_told_in_a_line(error, line):
    assert line in describe_os_error(error)


def test_other_errors_are_not_taken_for_those_of_a_disk():
    assert describe_os_error(ValueError("no space left for the label")) == ""
    assert describe_os_error(FileNotFoundError(2, "No such file or directory", "a")) == ""


# Rows of a dataset: named and left out


def encode(image: Image.Image, **options) -> dict:
    """An image as a dataset stores it."""
    image.save(buffer := io.BytesIO(), **{"format": "PNG"} | options)
    return {"bytes": buffer.getvalue(), "path": None}


GOOD = encode(Image.new("RGB", (40, 30)))
ROWS = [
    (None, [[0.1, 0.1, 0.5, 0.5]], ["logo"], "there is no image"),
    ({"bytes": b"GIF89a", "path": None}, [], [], "image cannot be decoded"),
    ({"bytes": None, "path": "/nowhere.jpg"}, [], [], "image cannot be decoded (FileNotFoundError)"),
    ({"bytes": GOOD["bytes"][:60], "path": None}, [], [], "image cannot be decoded"),
    (encode(Image.new("L", (20000, 10))), [], [], "one side of 20000 x 10 pixels is more than 200 times the other"),
    (GOOD, None, None, "there are no objects: give empty lists"),
    (GOOD, [[0.1, 0.1, 0.5]], ["logo"], "box [0.1, 0.1, 0.5] is not four numbers"),
    (GOOD, [[0.1, 0.1, 0.5, None]], ["logo"], "box [0.1, 0.1, 0.5, None] is not four numbers"),
    (GOOD, [[0.1, 0.1, 0.5, float("nan")]], ["logo"], "is not 0 <= min < max <= 1"),
    (GOOD, [[10.0, 10.0, 50.0, 50.0]], ["logo"], "box [10.0, 10.0, 50.0, 50.0] is not 0 <= min < max <= 1"),
    (GOOD, [[0.5, 0.1, 0.1, 0.5]], ["logo"], "is not 0 <= min < max <= 1"),
    (GOOD, [[0.1, 0.1, 0.5, 0.5]], [], "1 boxes, but 0 labels"),
    (GOOD, [[0.1, 0.1, 0.5, 0.5]], [None], "label None is not a text"),
    (GOOD, [[0.1, 0.1, 0.5, 0.5]], ["<|im_end|>"], "label '<|im_end|>' is not a text, or holds <, braces"),
    (GOOD, [[0.1, 0.1, 0.5, 0.5]], ["a {b}"], "label 'a {b}' is not a text, or holds <, braces"),
    (GOOD, [[0.1, 0.1, 0.5, 0.5]], ["two\nlines"], "label 'two\\nlines' is not a text, or holds <, braces or a line"),
    (encode(Image.new("F", (40, 30)), format="TIFF"), [], [], "the image is in floating point"),
]


def test_malformed_rows_are_named_and_left_out_before_training(capsys):
    """A column of a dataset has one type: labels that are numbers are a dataset of their own."""
    images, boxes, labels, lines = zip(*ROWS, strict=True)
    objects = [{"bbox": b, "category_name": n} if b is not None else None for b, n in zip(boxes, labels, strict=True)]
    good = {"bbox": [[0.1, 0.1, 0.5, 0.5]], "category_name": ["logo"]}
    columns = {"image_id": [*range(len(ROWS) + 1)], "image": [*images, GOOD], "objects": [*objects, good]}
    assert drop_bad_rows(Dataset.from_dict(columns))["image_id"] == [len(ROWS)]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(said) == len(ROWS)
    for number, (text, line) in enumerate(zip(said, lines, strict=True)):
        assert text.startswith(f"left out: {number}: ")
        assert line in text


def test_a_dataset_of_numbers_for_labels_is_refused():
    columns = {"image_id": [1], "image": [GOOD], "objects": [{"bbox": [[0.1, 0.1, 0.5, 0.5]], "category_name": [3]}]}
    with pytest.raises(ValueError, match="No usable row is left"):
        drop_bad_rows(Dataset.from_dict(columns))


# Answers to be measured

LINE = {
    "id": "a",
    "width": 100,
    "height": 80,
    "raw": "(1,2),(300,400)",
    "truth": [{"label": "x", "box": [1, 2, 30, 40]}],
}
BOXES = "truth must be a list of labelled boxes with x1 < x2 and y1 < y2"
SIZES = "width, height (and resized, where given) must be whole numbers of pixels, at least 1"


def with_box(*box: object) -> dict:
    """A line with this true box."""
    return LINE | {"truth": [{"label": "x", "box": [*box]}]}


ANSWERS = [
    (b"", "is empty: write one line per picture"),
    (b"\n \n", "is empty: write one line per picture"),
    (b"hello", "line 1 is not JSON"),
    (b"\0", "line 1 is not JSON"),
    (b'{"id": "\xe9"}', "line 1 is not JSON"),
    (b"[" * 100_000, "line 1 is not JSON"),
    (b'{"width": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
    (json.dumps(LINE | {"raw": "\ud800"}), "line 1 is not JSON"),
    (json.dumps(LINE) + "}", "line 1 is not JSON"),
    ("5", "line 1: not a JSON object"),
    (json.dumps([LINE]), "line 1: not a JSON object"),
    ("{}", "line 1: no field id, width, height, raw, truth"),
    (json.dumps(LINE) + "\n\n" + json.dumps(LINE | {"raw": None}), "line 3: raw must be a text"),
    (LINE | {"width": 100.0}, SIZES),
    (LINE | {"width": 10**400}, SIZES),
    (LINE | {"height": -1}, SIZES),
    (LINE | {"resized": [0, 5]}, SIZES),
    (LINE | {"group": ["a"]}, "group must be a text or a number"),
    (LINE | {"truth": {}}, BOXES),
    (LINE | {"truth": [{"label": 1, "box": [1, 2, 3, 4]}]}, BOXES),
    (with_box(1, 2, 3), BOXES),
    (with_box(1, 2, 0, 4), BOXES),
    (with_box(1, 2, float("nan"), 4), BOXES),
    (with_box(1, 2, float("inf"), 4), BOXES),
    (with_box(1, 2, 10**400, 4), BOXES),
    (with_box(-1e200, -1e200, 1e200, 1e200), BOXES),
]


@pytest.mark.parametrize(("content", "line"), ANSWERS)
def test_answers_that_cannot_be_measured_are_named(content, line, tmp_path, capsys):
    file = tmp_path / "predictions.jsonl"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert line in refuse(evaluation.main, ["--predictions", file], capsys)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["/nowhere"], "/nowhere cannot be read (No such file or directory)"),
        ([ROOT], "cannot be read (Is a directory)"),
        (["x", "--iou", "nan"], "--iou nan is not an IoU: give a number above 0, up to 1"),
        (["x", "--iou", "1.5"], "--iou 1.5 is not an IoU"),
        (["x", "--policy", "all"], "argument --policy: invalid choice: 'all'"),
    ],
)
def test_options_of_the_measurement_are_checked(options, line, capsys):
    assert line in refuse(evaluation.main, ["--predictions", *options], capsys)


# Results


def write_result(folder: Path, base: Path, **changes) -> Path:
    """What a training leaves, as far as it is looked at before it is loaded."""
    folder.mkdir()
    task = {"question": "", "labels": [], "family": "qwen2_vl", "system_message": "", "pixel_budget": {}}
    saved = {"settings": {"dataset_id": "x"}, "precision": "nf4", "started_from": str(base), "base": str(base)}
    (folder / "recipe.json").write_text(json.dumps(task | saved | changes))
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


RESULTS = [
    ("no result", lambda f: (f / "recipe.json").unlink(), "there is no recipe.json in it"),
    (
        "half",
        lambda f: (f / "recipe.json").write_text("{"),
        "recipe.json is damaged or of another kind (JSONDecodeError)",
    ),
    ("other", lambda f: (f / "recipe.json").write_text("{}"), "recipe.json is damaged or of another kind (KeyError)"),
    ("list", lambda f: (f / "recipe.json").write_text("[]"), "recipe.json is damaged or of another kind (TypeError)"),
    ("no adapter", lambda f: (f / "adapter_model.safetensors").unlink(), "there are no weights (*.safetensors) in it"),
    (
        "damaged",
        lambda f: os.truncate(f / "adapter_model.safetensors", 9),
        "adapter_model.safetensors is damaged or not",
    ),
    (
        "no base",
        lambda f: change_json(f / "recipe.json", base="../nowhere", started_from="/nowhere/base"),
        "its base /nowhere/base is not there: bring it back",
    ),
]


@pytest.mark.parametrize(("damage", "line"), [case[1:] for case in RESULTS], ids=[case[0] for case in RESULTS])
def test_a_result_that_cannot_be_used_is_named(damage, line, base, tmp_path, capsys):
    folder = write_result(tmp_path / "r1", base)
    assert describe_result(folder) == []
    damage(folder)
    assert line in refuse(results.main, ["--model", folder, "--evaluate-only"], capsys)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "one of the arguments --evaluate-only --merge --push-to-hub is required"),
        (["--evaluate-only", "--eval-samples", "0"], "--eval-samples 0: give a whole number above 0."),
        (["--evaluate-only", "--eval-batch-size", "-1"], "--eval-batch-size -1: give a whole number above 0."),
        (["--evaluate-only", "--dataset-id", "/nowhere"], "No dataset '/nowhere': neither a folder below "),
        (["--evaluate-only", "--output", "FILE"], "cannot be written to: "),
        (["--merge", "FILE"], "cannot be written to: "),
        (["--merge", "r1"], "is not empty: name another folder, or delete it."),
        (["--push-to-hub", "my detector"], "Repo id must use alphanumeric chars"),
    ],
)
def test_options_for_results_are_checked(options, line, base, tmp_path, capsys):
    settings = {"dataset_id": "x", "eval_split": "val", "eval_samples": None, "seed": 0}
    folder = write_result(tmp_path / "r1", base, settings=settings)
    (tmp_path / "FILE").write_text("kept")
    before = tree(tmp_path)
    places = {"FILE": tmp_path / "FILE", "r1": folder}
    argv = ["--model", folder, *(places.get(word, word) for word in options)]
    assert line in refuse(results.main, argv, capsys)
    assert tree(tmp_path) == before


# Pictures to look at, and datasets to import


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["/nowhere.jpg", "--model", "x", "--output", "o"],
            "no picture can be read: give files or folders of pictures",
        ),
        (["TEXT", "--model", "x", "--output", "o"], "no picture can be read: give files or folders of pictures"),
        (["PICTURE", "--model", "/nowhere", "--output", "o"], "there is no recipe.json in it"),
        (["PICTURE", "--output", "o"], "the following arguments are required: --model"),
        (
            ["PICTURE", "--model", "x", "--output", "o", "--threshold", "high"],
            "argument --threshold: invalid float value",
        ),
    ],
)
def test_pictures_and_models_that_cannot_be_used_are_named(options, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save("PICTURE", format="PNG")
    Path("TEXT").write_text("no picture")
    assert line in refuse(detect.main, options, capsys)
    assert not Path("o").exists()


COCO = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    "categories": [{"id": 1, "name": "logo"}],
}
IMPORTS = [
    ("/nowhere", ["--coco"], "/nowhere cannot be read (No such file or directory)"),
    ("x", ["--coco"], "is not JSON"),
    ("[" * 100_000, ["--coco"], "is not JSON"),
    ("[]", ["--coco"], "has no list images, annotations, categories"),
    (COCO | {"categories": [{}]}, ["--coco"], "a category has no id or no name"),
    (COCO | {"images": []}, ["--coco"], "lists no picture"),
    (COCO | {"images": [{"id": [1]}]}, ["--coco"], "an id is neither a number nor a text"),
    (COCO, ["--coco"], "no picture is left for train, nothing was written."),
    (COCO, ["--validation", "nan", "--coco"], "--validation nan is not a share"),
    (COCO, ["--group", "(", "--coco"], "--group ( is not a regular expression"),
    (COCO, ["--seed", "-1", "--coco"], "--seed -1: give a whole number, 0 or above"),
    ("{", ["--yolo"], "is not YAML"),
    (b"\xff\xfe", ["--yolo"], "is not YAML"),
    ("names: 5", ["--yolo"], "has no names: list the classes there"),
    ("names: [a]", ["--yolo"], "names no folder of pictures"),
    ("{names: [a], train: nowhere}", ["--yolo"], "which does not exist: correct the path"),
    ("{names: [a], train: 5}", ["--yolo"], "path, train and val are names of folders, or lists of them"),
    ("{names: [a], train: ., path: [a]}", ["--yolo"], "path, train and val are names of folders, or lists of them"),
    ("{names: {x: a}, train: .}", ["--yolo"], "has names without numbers"),
]


@pytest.mark.parametrize(("content", "options", "line"), IMPORTS)
def test_sources_of_a_dataset_that_cannot_be_read_are_named(content, options, line, tmp_path, capsys):
    source = tmp_path / ("data.yaml" if "--yolo" in options else "coco.json")
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    source = content if content == "/nowhere" else source
    images = ["--images", tmp_path] if "--coco" in options else []
    argv = [*options, source, *images, "--output", tmp_path / "out"]
    assert line in refuse(import_dataset.main, argv, capsys)
    assert not (tmp_path / "out").exists()
