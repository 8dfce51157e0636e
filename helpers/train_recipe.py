"""Train recipes and evaluate what they learned, from a shell, with the settings of the notebook's parameters cell.

    python -m helpers.train_recipe --recipe r1-llm-only                       # one recipe, in this very process
    python -m helpers.train_recipe --recipe r1 r2 r4 --gpu 0,1                # r1 stands for r1-llm-only, and so on
                                          # each in a process of its own, on the first of these GPUs that is free
    python -m helpers.train_recipe --recipe all --parameters FILE.yaml        # without --gpu: one after the other
    python -m helpers.train_recipe --recipe r3-two-stage --checkpoint OUTPUT_DIR/r2-vision-only    # second stage only
    python -m helpers.train_recipe --recipe r5-iou-reward --checkpoint OUTPUT_DIR/r4-joint    # goes on with GRPO
    torchrun --nproc-per-node 2 -m helpers.train_recipe --recipe r4-joint     # data parallel, a process for each GPU

A recipe leaves in OUTPUT_DIR/RECIPE what it leaves when the notebook runs it: weights, processor, training log,
metrics.json, predictions.jsonl, model card. The base and the box that never looks are measured once, into
OUTPUT_DIR/base and OUTPUT_DIR/same-box; OUTPUT_DIR/comparison.json gathers all metrics, differences.json the paired
differences with verdicts, and both are printed. --merge writes the best recipe without adapters into
OUTPUT_DIR/merged. --dataset-id may point at a folder in the layout of YOLO (data.yaml), COCO
(annotations/*train*.json, *val*.json) or Pascal VOC (Annotations/): it becomes a dataset in OUTPUT_DIR/dataset first.

Of several recipes a table shows what they are doing, what they print goes to OUTPUT_DIR/RECIPE/train.log, and the exit
code is 1 if one of them failed; the others still run. r3-two-stage waits for r2-vision-only and starts from its
weights. What was interrupted goes on from its last checkpoint when the same command is given again (without --again).
Settings, model and disk are checked before anything is loaded, and a training is tried on one image before it begins;
what cannot be takes a line for each problem, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import yaml

from helpers.launch import Campaign, launch, open_display
from helpers.locks import InUseError, check_free, own
from helpers.settings import check_settings

if TYPE_CHECKING:
    from helpers.data import Splits
    from helpers.runs import RunFolder

# GPUs have to be chosen before torch looks for them: whatever imports it is imported by the functions that train

NOTEBOOK = Path(__file__).resolve().parents[1] / "fine_tuning_vlm_for_object_detection_trl.ipynb"
NOTEBOOK_ONLY = ("RECIPES", "COLLATOR_STEPS")  # settings that mean nothing here
TYPES = {"NUM_EPOCHS": float, "OUTPUT_DIR": Path, "COMPILE": bool, "GRADIENT_CHECKPOINTING": bool}
TYPES |= dict.fromkeys(["LABELS", "SYSTEM_MESSAGE", "QUESTION", "PRECISION"], str)  # whose default does not tell
ALIASES = {"NUM_EPOCHS": ["--epochs"]}
REWARD = "r5-iou-reward"  # helpers.reward's, not trained by the notebook
INTERRUPTED = "interrupted: the same command goes on from the last checkpoint"
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


class UsageError(Exception):
    """What was asked for cannot be meant; its text says why, and what to do, a line for each problem."""


class Parser(argparse.ArgumentParser):
    """Options whose errors take a line each, without the names of all others."""

    def error(self, message: str) -> None:
        self.exit(2, "".join(f"{self.prog}: error: {line}\n" for line in message.splitlines()))


# The command line


def read_notebook_settings() -> dict[str, tuple[object, str]]:
    """Name -> default, comment: the settings in the notebook's parameters cell, which are not written down twice."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    source = "".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])))
    lines, settings = source.splitlines(), {}
    for node in ast.parse(source.partition("\nDEFAULTS = ")[0]).body:  # which is no setting
        comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
        settings[node.targets[0].id] = ast.literal_eval(node.value), comment
    return settings


def build_parser(settings: dict[str, tuple[object, str]]) -> Parser:
    """The options of this command, and one for each setting of the notebook."""
    parser = Parser(
        "helpers.train_recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add_recipes(parser, [*settings["RECIPES"][0], REWARD])
    skip = f"a full checkpoint to start from in place of base or first stage; for {REWARD} what a recipe left"
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help=skip)
    file = f"settings as papermill takes them ({', '.join(NOTEBOOK_ONLY)} are ignored); options override them"
    parser.add_argument("--parameters", type=Path, metavar="FILE.yaml", help=file)
    rate = "peak, for all recipes; default: what LEARNING_RATES names, else the recipe's own"
    parser.add_argument("--learning-rate", type=float, help=rate)
    parser.add_argument("--collator", help="v1-all-tokens or v2-assistant-only; default: the recipe's own, the latter")
    merge = "write the best recipe without adapters into OUTPUT_DIR/merged; refused if it differs by 0.01 mean IoU"
    parser.add_argument("--merge", action="store_true", help=merge)
    lines = "print a JSON object for each event and one with the results, nothing else"
    parser.add_argument("--json", action="store_true", help=lines)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one of several recipes
    parser.set_defaults(learning_rates=settings["LEARNING_RATES"][0])
    for name in settings:
        if name not in (*NOTEBOOK_ONLY, "LEARNING_RATES"):
            add_setting(parser, name, *settings[name])
    none = {"action": "store_const", "const": "none", "default": argparse.SUPPRESS, "dest": "report_to"}
    parser.add_argument("--no-wandb", help="the same as --report-to none", **none)
    return parser


def add_recipes(parser: Parser, names: Sequence[str]) -> None:
    """What to train, r1 standing for r1-llm-only, and on which GPUs."""
    short = {name.partition("-")[0]: name for name in names}
    recipes = parser.add_argument("--recipe", nargs="+", required=True, type=lambda word: short.get(word, word))
    recipes.help, recipes.choices = f"what to train, in this order; for short: {', '.join(short)}", [*names, "all"]
    spread = "several recipes: one at a time on each of these GPUs; one recipe: its layers are spread over them"
    parser.add_argument("--gpu", nargs="+", metavar="ID", help=f"{spread} (0 1, or 0,1)")


def add_setting(parser: Parser, name: str, default: object, comment: str) -> None:
    """MAX_STEPS becomes --max-steps; a setting that is on or off becomes two options; None stands for a number."""
    options = [f"--{name.lower().replace('_', '-')}", *ALIASES.get(name, [])]
    help_text = f"{comment} (default: {default})".lstrip().replace("%", "%%")  # argparse reads % as a format
    kind = TYPES.get(name, int if default is None else type(default))
    how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
    parser.add_argument(*options, default=default, dest=name.lower(), help=help_text, **how)


def parse(parser: Parser, settings: dict[str, tuple[object, str]], argv: Sequence[str]) -> argparse.Namespace:
    """The options, over the settings of a parameters file, over those of the notebook. Raises ValueError."""
    options = parser.parse_args(argv)
    if options.parameters:
        parser.set_defaults(**read_parameters_file(options.parameters, {*settings, "LEARNING_RATE"}))
        options = parser.parse_args(argv)
    names = settings["RECIPES"][0]
    options.recipe = list(dict.fromkeys(names if "all" in options.recipe else options.recipe))
    options.gpu = read_gpus(options.gpu)
    if options.learning_rate is not None:
        options.learning_rates = dict.fromkeys(names, options.learning_rate)
    check_combinations(options)
    return options


def read_gpus(words: Sequence[str] | None) -> list[str]:
    """`0 1` and `0,1` name the same GPUs. Raises ValueError where a name is none, or comes twice."""
    gpus = [gpu.strip() for word in words or [] for gpu in word.split(",")]
    if wrong := [gpu for gpu in gpus if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", gpu) or gpus.count(gpu) > 1]:
        raise ValueError(f"--gpu {' '.join(words)}: name each GPU once, as `nvidia-smi -L` does, not {wrong[0]!r}")
    return gpus


def check_combinations(options: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other."""
    several, torchrun = len(options.recipe) > 1, "TORCHELASTIC_RUN_ID" in os.environ
    problems = {
        "torchrun trains one recipe on all its GPUs: give --recipe one name, or leave torchrun out": several,
        "--again deletes a folder, which torchrun's processes share: delete it, and leave --again out": options.again,
        "--json starts a process of its own for the recipe, torchrun those that share it: leave one out": options.json,
    }
    found = [problem for problem, is_there in problems.items() if torchrun and is_there]
    if several and options.checkpoint:
        found += ["--checkpoint belongs to one recipe: give --recipe one name, or leave --checkpoint out"]
    if REWARD in options.recipe and (several or not options.checkpoint):
        found += [f"{REWARD} starts from what another recipe left: give --recipe its name alone, and --checkpoint"]
    if found:
        raise ValueError("\n".join(found))


def read_parameters_file(path: Path, known: set[str]) -> dict[str, object]:
    """Settings by the names of their options. Raises ValueError for a file that cannot be read, or names others."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--parameters {path}: give a YAML file that can be read ({reason})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--parameters {path} holds no settings: write lines such as `MAX_STEPS: 100`")
    if unknown := sorted(str(name) for name in values.keys() - known):
        raise ValueError(f"--parameters {path} sets {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    return {name.lower(): value for name, value in values.items()}


def choose_gpus(gpus: Sequence[str]) -> None:
    """Hide all other GPUs from this process; torch must not have looked for them before."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers that nvidia-smi shows
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def check_checkpoint(folder: Path, recipe: str) -> None:
    """Raise ValueError unless a folder holds what the recipe can start from."""
    file = folder / ("recipe.json" if recipe == REWARD else "config.json")
    if not file.is_file():
        raise ValueError(
            f"--checkpoint {folder} holds no {'result' if recipe == REWARD else 'full checkpoint'} (there is no "
            f"{file.name}): give the folder that --recipe {'r4-joint' if recipe == REWARD else 'r2-vision-only'} left"
        )


def check_gpus(gpus: Sequence[str]) -> None:
    """Raise ValueError where there is a driver, and CUDA does not find the GPUs: it would train on the CPU."""
    import torch

    if NVIDIA_DRIVER.exists() and (count := torch.cuda.device_count()) < len(gpus):
        raise ValueError(f"--gpu {' '.join(gpus)}: CUDA finds {count} of them; `nvidia-smi -L` lists what there is")


def choose_collator(name: str) -> None:
    """Let all recipes and stages of this process use a collator. Raises ValueError for an unknown one."""
    from helpers.recipes import CATALOGUE

    CATALOGUE.update({recipe.name: replace(recipe, collator=name) for recipe in CATALOGUE.values()})


def check(options: argparse.Namespace) -> None:
    """Choose GPUs and collator, make the dataset if need be, and raise ValueError for what cannot be meant."""
    if options.gpu:
        choose_gpus(options.gpu)
    if options.collator:
        choose_collator(options.collator)
    if options.child or int(os.environ.get("RANK", 0)) > 0:
        return  # another process has looked
    from huggingface_hub import get_token

    from helpers.checks import check_before_loading

    check_gpus(options.gpu)
    if options.checkpoint:
        check_checkpoint(options.checkpoint, options.recipe[0])
    if options.push_to_hub and not get_token():
        raise ValueError("--push-to-hub: log in first, with `hf auth login`")
    check_before_loading(to_settings(options), [name for name in options.recipe if name != REWARD])
    options.dataset_id = prepare(options.dataset_id, options.output_dir)


# One recipe: in this process


def to_settings(options: argparse.Namespace) -> SimpleNamespace:
    """The notebook's `settings`: the options by their names."""
    return SimpleNamespace(**vars(options))


def prepare(dataset_id: str, output_dir: Path) -> str:
    """`dataset_id`; for a folder in the layout of YOLO, COCO or VOC, the dataset it becomes. Raises ValueError."""
    folder = Path(dataset_id)
    if not folder.is_dir() or list(folder.glob("data/*.parquet")) or "TORCHELASTIC_RUN_ID" in os.environ:
        return dataset_id
    from helpers.import_dataset import prepare_dataset

    return prepare_dataset(dataset_id, output_dir / "dataset")


def train_and_evaluate(options: argparse.Namespace) -> None:
    """Train the recipe, load what it left from disk, measure it and the baselines; of several processes, one does.

    Raises UsageError for settings, data or a folder that cannot be meant.
    """
    from helpers.comparison import measure_baselines
    from helpers.data import load_splits
    from helpers.deployment import write_model_card
    from helpers.loading import release_memory
    from helpers.metrics import summarize
    from helpers.trackers import log_result
    from helpers.training import evaluate_run

    settings = to_settings(options)
    try:
        splits = load_splits(settings)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(error) from error
    run = train(options, settings, splits)
    release_memory()
    is_new = not (run.path / "metrics.json").exists()
    metrics = evaluate_run(run, settings, splits.evaluation)  # torchrun's processes share the images
    if leave_group() == 0:
        if is_new:
            log_result(run, settings, metrics)
        write_model_card(run.path, summarize(run.read_records()))
        release_memory()
        measure_baselines(settings, splits)


def train(options: argparse.Namespace, settings: SimpleNamespace, splits: Splits) -> RunFolder:
    """Train the recipe; before anything was begun in its folder, see if it can be trained. Raises UsageError."""
    from helpers.preflight import PreflightError, check_recipe
    from helpers.recipes import CATALOGUE
    from helpers.runs import OtherRunError
    from helpers.training import run_recipe

    name, start = options.recipe[0], options.checkpoint
    try:
        if name == REWARD:
            from helpers.reward import R5, run_reward_recipe

            recipe = replace(R5, learning_rate=options.learning_rate or R5.learning_rate)
            return run_reward_recipe(settings, splits, start, recipe)
        if settings.again or not any((options.output_dir / name).rglob("run.json")):
            check_recipe(CATALOGUE[name], settings, splits, start and str(start))
        return run_recipe(CATALOGUE[name], settings, splits, start)
    except (OtherRunError, PreflightError) as error:
        raise UsageError(error) from error


def leave_group() -> int:
    """End the work that torchrun's processes share, if it started any; returns the rank of this one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return int(os.environ.get("RANK", 0))


def conclude(options: argparse.Namespace, merge: bool) -> dict:
    """Compare all that OUTPUT_DIR holds; merge and upload the best recipe if asked to. Returns what was found.

    Raises UsageError where the merged model is not the model that was merged.
    """
    from helpers.comparison import compare, merge_best
    from helpers.results import upload

    metrics, differences = compare(options.output_dir)
    result = {"event": "result", "metrics": metrics, "differences": differences}
    if (features := options.output_dir / "features").is_dir():
        print(f"{features} can be deleted when no other recipe is to be trained into {options.output_dir}")
    if not merge:
        return result
    try:
        merged = merge_best(options.output_dir, metrics, to_settings(options))
    except ValueError as error:
        raise UsageError(error) from error
    if options.push_to_hub:
        upload(merged, options.push_to_hub)
    return result | {"merged": str(merged)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 for what cannot be, a line for each problem on stderr."""
    # when imported on a CPU it asks for an optional package that would download kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(settings := read_notebook_settings())
    try:
        options = parse_and_check(parser, settings, argv)
        several = len(options.recipe) > 1 or options.json
        return train_several(options, argv) if several and not options.child else train_one(options)
    except (UsageError, InUseError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except Exception as error:
        from helpers.checks import describe_os_error

        if line := describe_os_error(error):
            parser.error(line)
        raise


def parse_and_check(parser: Parser, settings: dict[str, tuple], argv: Sequence[str]) -> argparse.Namespace:
    """The options, when they can be meant and the folders of the recipes are free. Raises UsageError, InUseError."""
    try:
        options = parse(parser, settings, argv)
        check_settings(to_settings(options), settings["RECIPES"][0])
        for recipe in options.recipe:
            check_free(options.output_dir / recipe)
        check(options)
    except ValueError as error:
        raise UsageError(error) from error
    return options


def train_one(options: argparse.Namespace) -> int:
    """Train one recipe as the only process in its folder; of torchrun's processes, the first one holds the lock."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    with own(options.output_dir / options.recipe[0]) if is_first else nullcontext():
        train_and_evaluate(options)
        if is_first:
            conclude(options, merge=not options.child and bool(options.merge or options.push_to_hub))
    return 0


def train_several(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Train recipes in processes of their own, which Ctrl-C and SIGTERM end; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if (at_interrupt := signal.getsignal(signal.SIGINT)) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the table is taken down, the others are told to end
    gpus = options.gpu if len(options.recipe) > 1 else [",".join(options.gpu)]
    argv = [*argv, "--dataset-id", options.dataset_id]
    campaign = Campaign(options.recipe, gpus or [""], argv, options.output_dir, options.again)
    with open_display(options.recipe, options.json) as show:
        failures = launch(campaign, show)
    signal.signal(signal.SIGINT, at_interrupt)
    result = {"event": "result", "metrics": {}, "differences": []}
    if failures < len(options.recipe):
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            result = conclude(options, merge=not failures and bool(options.merge or options.push_to_hub))
    if options.json:
        print(json.dumps(result))
    return int(failures > 0)


def end_at_once(*_: object) -> None:
    """End the process at SIGINT, which loses nothing here. The usual exception would not always arrive: some libraries
    catch all exceptions, as `datasets` does around its fingerprints, and the run would go on.
    """
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    # else a shell lets a job in its background ignore the signal, and so it stays
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    sys.exit(main())
