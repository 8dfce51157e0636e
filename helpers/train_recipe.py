"""Train recipes and evaluate what they learned, from a shell, with the settings of the notebook's parameters cell.

    python -m helpers.train_recipe --recipe r1-llm-only                       # one recipe, in this very process
    python -m helpers.train_recipe --recipe r1-llm-only r2-vision-only r4-joint --gpu 0 1
                                          # each in a process of its own, on the first of these GPUs that is free
    python -m helpers.train_recipe --recipe all --parameters FILE.yaml        # without --gpu: one after the other
    python -m helpers.train_recipe --recipe r3-two-stage --checkpoint OUTPUT_DIR/r2-vision-only    # second stage only
    torchrun --nproc-per-node 2 -m helpers.train_recipe --recipe r4-joint     # data parallel, a process for each GPU

A recipe leaves in OUTPUT_DIR/RECIPE what it leaves when the notebook runs it: weights, processor, training log,
metrics.json, predictions.jsonl; OUTPUT_DIR/comparison.json gathers the metrics. Where there are several, what they
print goes to OUTPUT_DIR/RECIPE/train.log, and the exit code is 1 if one of them failed; the others still run. What
was interrupted goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

# GPUs have to be chosen before torch looks for them: whatever imports it is imported by the functions that train
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Qwen2VLProcessor
    from trl import SFTConfig

    from helpers.recipes import TrainingRecipe

SCRIPT = Path(__file__).resolve().parents[1] / "fine_tuning_vlm_for_object_detection_trl.py"
PARAMETERS_CELL = re.compile(r'^# %% tags=\["parameters"\]\n(.*?)^# %%', re.DOTALL | re.MULTILINE)
NOTEBOOK_ONLY = ("RECIPES", "COLLATOR_STEPS", "PUSH_TO_HUB")  # settings that mean nothing here
TYPES = {"NUM_EPOCHS": float, "OUTPUT_DIR": Path}  # of settings whose default does not tell


# The command line


def read_notebook_settings() -> dict[str, tuple[object, str]]:
    """Name -> default, comment: the settings in the script's parameters cell, which are not written down twice."""
    cell = PARAMETERS_CELL.search(SCRIPT.read_text())[1]
    settings = {}
    for node in ast.parse(cell).body:
        lines = cell.splitlines()[node.lineno - 1 : node.end_lineno]
        comment = re.search(r"  # (.+)", "\n".join(lines))
        settings[node.targets[0].id] = eval(ast.unparse(node.value)), comment[1] if comment else ""
    return settings


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
    option, help_text = f"--{name.lower().replace('_', '-')}", f"{comment} (default: {default})".lstrip()
    if isinstance(default, bool):
        parser.add_argument(option, default=default, action=argparse.BooleanOptionalAction, help=help_text)
    else:
        kind = TYPES.get(name, int if default is None else type(default))
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
    from helpers.recipes import RECIPES

    staged = [recipe.name for recipe in RECIPES.values() if recipe.stages]
    if name not in staged:
        raise ValueError(
            f"--checkpoint belongs to a recipe in stages ({', '.join(staged)}), {name} has none: to start it from "
            "trained weights, give their folder as --model-id"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {folder} holds no full checkpoint (there is no config.json): give the folder that "
            f"--recipe {RECIPES[name].stages[0]} left, or leave the option out to train all stages"
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
        )
    return Child(recipe, gpu, log, process)


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


def read_splits(options: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset]:
    """The rows to train on, to watch with and to evaluate on, checked and parted as in the notebook."""
    from helpers.data import drop_bad_rows, drop_shared_barcodes, hold_back, load_rows

    source, seed = options.dataset_id, options.seed
    usable = drop_bad_rows(load_rows(source, options.train_split, options.train_samples, seed))
    eval_rows = drop_bad_rows(load_rows(source, options.eval_split, options.eval_samples, seed))
    train_rows, watch_rows = hold_back(drop_shared_barcodes(usable, eval_rows), options.watch_samples, seed)
    print(f"{len(train_rows)} pictures to train on, {len(watch_rows)} to watch with, {len(eval_rows)} to evaluate on")
    return train_rows, watch_rows, eval_rows


def config_for(variant: str, folder: Path, recipe: TrainingRecipe, options: argparse.Namespace) -> SFTConfig:
    """TRL's settings for one run below `folder`."""
    from helpers.recipes import create_training_config

    own = float(options.learning_rates.get(recipe.name, recipe.learning_rate))
    return create_training_config(
        variant,
        folder,
        own if options.learning_rate is None else options.learning_rate,
        num_epochs=options.num_epochs,
        max_steps=options.max_steps,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        seed=options.seed,
        report_to=options.report_to,
    )


def train(
    recipe: TrainingRecipe,
    processor: Qwen2VLProcessor,
    train_rows: Dataset,
    watch_rows: Dataset,
    question: str,
    options: argparse.Namespace,
) -> Path:
    """Train a recipe, in one stage or two; returns the folder with the result."""
    from helpers.collators import AssistantOnlyCollator
    from helpers.data import to_training_dataset
    from helpers.recipes import IoUAtEvaluation, get_recipes, run_recipe, run_two_stage_recipe

    datasets = [
        to_training_dataset(train_rows, question, options.flip_probability),
        to_training_dataset(watch_rows, question, flip_probability=0.0),
    ]
    shared = (options.model_id, processor, *datasets)
    watch = [IoUAtEvaluation(processor, watch_rows, question, options.eval_batch_size)]
    collator, folder = AssistantOnlyCollator(processor), options.output_dir
    if not recipe.stages:
        return run_recipe(recipe, *shared, config_for(recipe.name, folder, recipe, options), collator, watch)
    first, second = get_recipes(recipe.stages)
    configs = [
        config_for("stage1", folder / recipe.name, first, options),
        config_for(recipe.name, folder, second, options),
    ]
    return run_two_stage_recipe(recipe, *shared, configs, collator, watch, options.checkpoint)


def train_and_evaluate(options: argparse.Namespace) -> None:
    """Train the recipe, load what it left from disk, measure it and print that; of several processes, one does."""
    from helpers.conversation import PROMPT
    from helpers.evaluation import load_and_evaluate_demo
    from helpers.loading import load_processor, release_memory
    from helpers.recipes import RECIPES

    train_rows, watch_rows, eval_rows = read_splits(options)
    processor = load_processor(options.model_id, options.max_pixels)
    question = PROMPT.format(label="nutrition table")
    folder = train(RECIPES[options.recipe[0]], processor, train_rows, watch_rows, question, options)
    release_memory()
    if leave_group() == 0:
        size = (options.eval_batch_size, options.max_new_tokens)
        load_and_evaluate_demo(folder, processor, eval_rows, question, *size)
        print(f"{folder}: {json.dumps(compare(options.output_dir)[folder.name], indent=2)}")


def leave_group() -> int:
    """End the work that torchrun's processes share, if it started any; returns the rank of this one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return int(os.environ.get("RANK", 0))


def compare(output_dir: Path) -> dict[str, dict]:
    """Write and return `comparison.json`, one process at a time: recipes that run side by side may end together."""
    from helpers.evaluation import save_comparison

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
    except ValueError as error:
        parser.error(str(error))
    if len(options.recipe) == 1:
        train_and_evaluate(options)
        return 0
    return launch_until_interrupted(options, argv)


def launch_until_interrupted(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """`launch`, which Ctrl-C and SIGTERM end; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(launch(options.recipe, options.gpu or [None], argv, options.output_dir) > 0)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
