"""Train recipes and evaluate what they learned, from a shell, with the settings of the notebook's parameters cell.

    python -m helpers.train_recipe --recipe r1-llm-only                       # one recipe, in this very process
    python -m helpers.train_recipe --recipe r1-llm-only r2-vision-only r4-joint --gpu 0 1
                                          # each in a process of its own, on the first of these GPUs that is free
    python -m helpers.train_recipe --recipe all --parameters FILE.yaml        # without --gpu: one after the other
    python -m helpers.train_recipe --recipe r3-two-stage --checkpoint OUTPUT_DIR/r2-vision-only    # second stage only
    torchrun --nproc-per-node 2 -m helpers.train_recipe --recipe r4-joint     # data parallel, a process for each GPU

A recipe leaves in OUTPUT_DIR/RECIPE what it leaves when the notebook runs it: weights, processor, training log,
metrics.json, predictions.jsonl; OUTPUT_DIR/comparison.json gathers the metrics. --dataset-id may point at a folder in
the layout of YOLO (data.yaml), COCO (annotations/*train*.json, *val*.json) or Pascal VOC (Annotations/): it becomes a
dataset in OUTPUT_DIR/dataset first. Where there are several, what they
print goes to OUTPUT_DIR/RECIPE/train.log, and the exit code is 1 if one of them failed; the others still run. What
was interrupted goes on from its last checkpoint when the same command is given again (without --again).
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import papermill
import yaml

# GPUs have to be chosen before torch looks for them: whatever imports it is imported by the functions that train

NOTEBOOK = Path(__file__).resolve().parents[1] / "fine_tuning_vlm_for_object_detection_trl.ipynb"
NOTEBOOK_ONLY = ("RECIPES", "COLLATOR_STEPS", "PUSH_TO_HUB")  # settings that mean nothing here
TYPES = {"NUM_EPOCHS": float, "OUTPUT_DIR": Path, "COMPILE": bool, "GRADIENT_CHECKPOINTING": bool}
TYPES |= dict.fromkeys(["LABELS", "SYSTEM_MESSAGE", "QUESTION", "PRECISION"], str)  # whose default does not tell


class UsageError(Exception):
    """What was asked for cannot be meant; its text says why, and what to do."""


# The command line


def read_notebook_settings() -> dict[str, tuple[object, str]]:
    """Name -> default, comment: the settings in the notebook's parameters cell, which are not written down twice."""
    parameters = papermill.inspect_notebook(str(NOTEBOOK))
    parameters.pop("DEFAULTS")  # not a setting: it remembers what the settings were before papermill changed them
    return {name: (ast.literal_eval(found["default"]), found["help"]) for name, found in parameters.items()}


def build_parser(settings: dict[str, tuple[object, str]]) -> argparse.ArgumentParser:
    """The options of this command, and one for each setting of the notebook."""
    parser = argparse.ArgumentParser(
        "helpers.train_recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    recipes = parser.add_argument("--recipe", nargs="+", required=True, help="what to train, in this order")
    recipes.choices = [*settings["RECIPES"][0], "all"]
    spread = "several recipes: one at a time on each of these GPUs; one recipe: its layers are spread over them"
    parser.add_argument("--gpu", nargs="+", metavar="ID", help=spread)
    skip = "for a recipe in two stages: what its first stage left, which is not trained again then"
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help=skip)
    file = f"settings as papermill takes them ({', '.join(NOTEBOOK_ONLY)} are ignored); options override them"
    parser.add_argument("--parameters", type=Path, metavar="FILE.yaml", help=file)
    rate = "peak, for all recipes; default: what LEARNING_RATES names, else the recipe's own"
    parser.add_argument("--learning-rate", type=float, help=rate)
    parser.set_defaults(learning_rates=settings["LEARNING_RATES"][0])
    for name in settings:
        if name not in (*NOTEBOOK_ONLY, "LEARNING_RATES"):
            add_setting(parser, name, *settings[name])
    return parser


def add_setting(parser: argparse.ArgumentParser, name: str, default: object, comment: str) -> None:
    """MAX_STEPS becomes --max-steps; a setting that is on or off becomes two options; None stands for a number."""
    option = f"--{name.lower().replace('_', '-')}"
    help_text = f"{comment} (default: {default})".lstrip().replace("%", "%%")  # argparse reads % as a format
    kind = TYPES.get(name, int if default is None else type(default))
    if kind is bool:
        parser.add_argument(option, default=default, action=argparse.BooleanOptionalAction, help=help_text)
    else:
        parser.add_argument(option, default=default, type=kind, help=help_text)


def parse(
    parser: argparse.ArgumentParser, settings: dict[str, tuple[object, str]], argv: Sequence[str]
) -> argparse.Namespace:
    """The options, over the settings of a parameters file, over those of the notebook. Raises ValueError."""
    options = parser.parse_args(argv)
    if options.parameters:
        parser.set_defaults(**read_parameters_file(options.parameters, {*settings, "LEARNING_RATE"}))
        options = parser.parse_args(argv)
    options.recipe = list(dict.fromkeys(settings["RECIPES"][0] if "all" in options.recipe else options.recipe))
    if len(options.recipe) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("torchrun trains one recipe on all its GPUs: give --recipe one name, or leave torchrun out")
    if options.again and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "--again deletes a folder, which torchrun's processes share: delete it, and leave --again out"
        )
    if len(options.recipe) > 1 and options.checkpoint:
        raise ValueError("--checkpoint belongs to one recipe: give --recipe one name, or leave --checkpoint out")
    return options


def read_parameters_file(path: Path, known: set[str]) -> dict[str, object]:
    """Settings by the names of their options. Raises ValueError for a file that cannot be read, or names others."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--parameters {path}: give a YAML file that can be read ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--parameters {path} holds no settings: write lines such as `MAX_STEPS: 100`")
    if unknown := sorted(str(name) for name in values.keys() - known):
        raise ValueError(f"--parameters {path} sets {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    return {name.lower(): value for name, value in values.items()}


def choose_gpus(gpus: Sequence[str]) -> None:
    """Hide all other GPUs from this process; torch must not have looked for them before."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers that nvidia-smi shows
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def check_checkpoint(folder: Path, name: str) -> None:
    """Raise ValueError unless the recipe has stages and `folder` holds what the first of them leaves."""
    from helpers.recipes import CATALOGUE

    staged = [recipe.name for recipe in CATALOGUE.values() if recipe.stages]
    if name not in staged:
        raise ValueError(
            f"--checkpoint belongs to a recipe in stages ({', '.join(staged)}), {name} has none: to start it from "
            "trained weights, give their folder as --model-id"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {folder} holds no full checkpoint (there is no config.json): give the folder that "
            f"--recipe {CATALOGUE[name].stages[0]} left, or leave the option out to train all stages"
        )


# Several recipes: a process for each


@dataclass(frozen=True)
class Child:
    """A recipe that is being trained in a process of its own."""

    recipe: str
    gpu: str | None
    log: Path
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)


def start(recipe: str, gpu: str | None, argv: Sequence[str], output_dir: Path) -> Child:
    """Give this command again, for one recipe and GPU: of an option that comes twice, the last one counts."""
    log = output_dir / recipe / "train.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "helpers.train_recipe", *argv, "--recipe", recipe]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--gpu", gpu] if gpu else command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # its lines and progress bars in the order they were written
            preexec_fn=end_with_parent,
        )
    return Child(recipe, gpu, log, process)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it dies, however it dies (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def describe_start(child: Child) -> str:
    """Where it runs, and where to read what it says."""
    return f"{child.recipe}: started{f' on GPU {child.gpu}' if child.gpu else ''}, log in {child.log}"


def describe_end(child: Child) -> str:
    """How it ended, where to read why, and when."""
    minutes, code = (time.monotonic() - child.started) / 60, child.process.returncode
    end = f"FAILED with exit code {code}, see {child.log}" if code else "done, exit code 0"
    return f"{child.recipe}: {end} ({minutes:.1f} minutes)"


def launch(recipes: Sequence[str], gpus: Sequence[str | None], argv: Sequence[str], output_dir: Path) -> int:
    """Train the recipes, at most one at a time on each GPU; returns how many failed. They end when this ends."""
    waiting, free, running, failures = deque(recipes), deque(gpus), [], 0
    try:
        while waiting or running:
            while waiting and free:
                running.append(start(waiting.popleft(), free.popleft(), argv, output_dir))
                print(describe_start(running[-1]), flush=True)
            time.sleep(0.2)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                free.append(child.gpu)
                failures += child.process.returncode != 0
                print(describe_end(child), flush=True)
    finally:
        for child in running:
            child.process.terminate()
        for child in running:
            child.process.wait()
            print(f"{child.recipe}: stopped", flush=True)
    return failures


# One recipe: in this process


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder as long as this one lives. Raises UsageError that names the owner."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            remedy = "wait until it has ended, stop it, or set another OUTPUT_DIR"
            raise UsageError(f"{folder} is in use by {file.read()}: {remedy}") from error
        except OSError as error:
            print(f"{folder} cannot be locked on this file system ({error.strerror}): start no second process in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def to_settings(options: argparse.Namespace) -> SimpleNamespace:
    """The notebook's `settings`: the options by their names; --learning-rate is that of all recipes and stages."""
    from helpers.recipes import CATALOGUE

    settings = SimpleNamespace(**vars(options))
    one_for_all = options.learning_rate is not None
    rates = dict.fromkeys(CATALOGUE, options.learning_rate) if one_for_all else options.learning_rates
    settings.learning_rates = {name: float(rate) for name, rate in rates.items()}  # YAML takes 1e-3 for a text
    return settings


def prepare(dataset_id: str, output_dir: Path) -> str:
    """`dataset_id`; for a folder in the layout of YOLO, COCO or VOC, the dataset it becomes. Raises ValueError."""
    folder = Path(dataset_id)
    if not folder.is_dir() or list(folder.glob("data/*.parquet")) or "TORCHELASTIC_RUN_ID" in os.environ:
        return dataset_id
    from helpers.import_dataset import prepare_dataset

    return prepare_dataset(dataset_id, output_dir / "dataset")


def train_and_evaluate(options: argparse.Namespace) -> None:
    """Train the recipe, load what it left from disk, measure it and print that; of several processes, one does.

    Raises UsageError for settings, data or a folder that cannot be meant.
    """
    from helpers.data import load_splits
    from helpers.loading import release_memory
    from helpers.recipes import CATALOGUE
    from helpers.runs import OtherRunError
    from helpers.training import evaluate_run, run_recipe

    settings = to_settings(options)
    try:
        splits = load_splits(settings)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(error) from error
    try:
        run = run_recipe(CATALOGUE[options.recipe[0]], settings, splits, options.checkpoint)
    except OtherRunError as error:
        raise UsageError(error) from error
    release_memory()
    if leave_group() == 0:
        evaluate_run(run, settings, splits.evaluation)
        print(f"{run.path}: {json.dumps(compare(options.output_dir)[run.path.name], indent=2)}")
        if (features := options.output_dir / "features").is_dir():
            print(f"{features} can be deleted when no other recipe is to be trained into {options.output_dir}")


def leave_group() -> int:
    """End the work that torchrun's processes share, if it started any; returns the rank of this one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return int(os.environ.get("RANK", 0))


def compare(output_dir: Path) -> dict[str, dict]:
    """Write and return `comparison.json`, one process at a time: recipes that run side by side may end together."""
    from helpers.runs import save_comparison

    handle = os.open(output_dir, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        return save_comparison(output_dir)
    finally:
        os.close(handle)  # frees the lock


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring; returns the exit code, which is 2 for options that cannot be."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(settings := read_notebook_settings())
    try:
        options = parse(parser, settings, argv)
        if options.gpu and len(options.recipe) == 1:
            choose_gpus(options.gpu)
        if options.checkpoint:
            check_checkpoint(options.checkpoint, options.recipe[0])
        options.dataset_id = prepare(options.dataset_id, options.output_dir)
    except ValueError as error:
        parser.error(str(error))
    if len(options.recipe) == 1:
        return train_one(parser, options)
    return launch_until_interrupted(options, argv)


def train_one(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Train one recipe as the only process in its folder; of torchrun's processes, the first one holds the lock."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    try:
        with own(options.output_dir / options.recipe[0]) if is_first else nullcontext():
            train_and_evaluate(options)
    except UsageError as error:
        parser.error(" ".join(str(error).split()))
    return 0


def launch_until_interrupted(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """`launch`, which Ctrl-C and SIGTERM end; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        argv = [*argv, "--dataset-id", options.dataset_id]
        return int(launch(options.recipe, options.gpu or [None], argv, options.output_dir) > 0)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
