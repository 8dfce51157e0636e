"""What can be done with a saved result, an adapter, a full checkpoint or a merged model: measure, merge, upload it.

    python -m helpers.results --model OUTPUT_DIR/r4-joint --evaluate-only
    python -m helpers.results --model OUTPUT_DIR/r4-joint --evaluate-only --dataset-id outputs/other --output outputs/x
    python -m helpers.results --model OUTPUT_DIR/r4-joint --evaluate-only --mirrored --output outputs/mirrored
    python -m helpers.results --model OUTPUT_DIR/r4-joint --merge OUTPUT_DIR/merged
    python -m helpers.results --model OUTPUT_DIR/merged --push-to-hub me/nutrition-table-detector

It is asked as it was trained (task, pixel budget), on the dataset it was trained for unless --dataset-id names
another. --evaluate-only writes predictions.jsonl and metrics.json into --output (default: beside the weights, where
the model card is written anew); --mirrored asks about the mirrored copy of each picture as well, in twice the time, as
`helpers.detect` does with it, and leaves what was measured beside the weights alone. --merge writes a model without
adapters, measures it as well, and fails if that differs by more than 0.01 mean IoU from the adapter on the same base
in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from datasets import Dataset
from huggingface_hub import HfApi

from helpers.checks import describe_os_error, describe_output, describe_result
from helpers.data import drop_bad_rows, keep_labels, load_rows
from helpers.deployment import save_merged, write_model_card
from helpers.detection import evaluate_detector
from helpers.ladder import evaluate_best_rung
from helpers.loading import release_memory
from helpers.metrics import summarize
from helpers.runs import RunFolder
from helpers.training import load_detector

TOLERANCE = 0.01  # mean IoU by which a merged model may differ


def read_settings(run: RunFolder, options: argparse.Namespace) -> SimpleNamespace:
    """The settings that the result was made with, over them those of the command line."""
    given = {name: getattr(options, name) for name in ("dataset_id", "eval_split", "eval_samples", "eval_batch_size")}
    changes = {name: value for name, value in given.items() if value is not None}
    return SimpleNamespace(**run.read_recipe()["settings"] | changes)


def load_evaluation_rows(run: RunFolder, settings: SimpleNamespace) -> Dataset:
    """The rows to measure on, with boxes of the labels that the result was trained for."""
    rows = drop_bad_rows(load_rows(settings.dataset_id, settings.eval_split, settings.eval_samples, settings.seed))
    return keep_labels(rows, run.read_task().labels)


def evaluate(run: RunFolder, settings: SimpleNamespace, output: Path, ask: Callable = evaluate_detector) -> dict:
    """Measure a result, and write records, metrics and the model card. `ask` is `evaluate_detector` or one like it."""
    rows = load_evaluation_rows(run, settings)
    records = ask(load_detector(run.path, settings), rows)
    metrics = RunFolder(output).write_records(records)
    if output == run.path:
        write_model_card(output, {name: value for name, value in metrics.items() if isinstance(value, int | float)})
    release_memory()
    return metrics


def merge(run: RunFolder, settings: SimpleNamespace, target: Path) -> dict:
    """Write the merged model and measure it. Raises ValueError if it is not the model that was merged."""
    rows, detector = load_evaluation_rows(run, settings), load_detector(run.path, settings, "bf16")
    before = summarize(evaluate_detector(detector, rows))["mean_iou"]
    save_merged(detector, run, target)
    del detector
    release_memory()
    after = evaluate(RunFolder(target), settings, target)
    if abs(after["mean_iou"] - before) > TOLERANCE:
        raise ValueError(f"merging changed the model: mean IoU {before:.3f} before, {after['mean_iou']:.3f} after")
    return after


def merge_whole(run: RunFolder, settings: SimpleNamespace, target: Path) -> dict:
    """`merge` in place of an older result; the model gets its name when it is whole and was measured."""
    unfinished = target.parent / "unfinished" / target.name
    shutil.rmtree(unfinished, ignore_errors=True)
    metrics = merge(run, settings, unfinished)
    if RunFolder(target).is_trained:
        shutil.rmtree(target)
    unfinished.replace(target)
    unfinished.parent.rmdir()
    return metrics


UNSENT = ["lock", "*.log", "checkpoint-*", "progress.json"]  # of no use to others


def upload(folder: Path, repo_id: str) -> None:
    """Upload a folder to the hub as a private repository; `hf auth login` first."""
    HfApi().create_repo(repo_id, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=UNSENT)


def describe_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the folders and numbers that the options name."""
    problems, target = describe_result(options.model), options.merge
    if target and target.is_dir() and any(target.iterdir()):
        problems.append(f"--merge {target} is not empty: name another folder, or delete it.")
    elif target or options.output:
        problems += describe_output(target or options.output, "--merge" if target else "--output")
    if options.mirrored and not (options.evaluate_only and options.output):
        problems.append("--mirrored goes with --evaluate-only and --output FOLDER: give both.")
    for name in ("eval_samples", "eval_batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(options, name)}: give a whole number above 0.")
    return problems


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="what a training left, or merged/")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--evaluate-only", action="store_true", help="measure it")
    what.add_argument("--merge", type=Path, metavar="FOLDER", help="write it without adapters, and measure that")
    what.add_argument("--push-to-hub", metavar="ID", help="upload it to a private repository of the hub")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for predictions and metrics; default: --model")
    parser.add_argument("--mirrored", action="store_true", help="ask about mirrored copies as well; needs --output")
    parser.add_argument("--dataset-id", help="default: that of the training")
    parser.add_argument("--eval-split", help="default: that of the training")
    parser.add_argument("--eval-samples", type=int, help="default: as in the training")
    parser.add_argument("--eval-batch-size", type=int, help="default: as in the training")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if problems := describe_problems(options):
        parser.error(" ".join(problems))
    run = RunFolder(options.model)
    try:
        if options.push_to_hub:
            upload(options.model, options.push_to_hub)
            return 0
        settings = read_settings(run, options)
        metrics = merge_whole(run, settings, options.merge) if options.merge else None
        ask = evaluate_best_rung if options.mirrored else evaluate_detector
        metrics = metrics or evaluate(run, settings, options.output or options.model, ask)
    except (FileNotFoundError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except Exception as error:
        if line := describe_os_error(error):
            parser.error(line)
        raise
    print(json.dumps(metrics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
