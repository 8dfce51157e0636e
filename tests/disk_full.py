"""Let the disk run full at many moments of a run, make room, give the same command again, and compare the results.

    PYTHONPATH=. unshare --map-root-user --mount python tests/disk_full.py OUTPUT      # OUTPUT: an empty folder

The disk is a real one, a tmpfs that is mounted on OUTPUT/disk for this process alone. It is filled to the last byte
right before a file is written, so that the system itself refuses the rest. The command has to end with exit code 2 and
one line; once there is room, the same command has to end with the bytes of a run whose disk was never full. A sample
is a test: tests/test_disk_full.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import peft.peft_model
import safetensors.torch
import torch
import transformers.modeling_utils
import xxhash
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers.trainer_callback import TrainerState

from helpers import results, train_recipe
from helpers.tiny.packages import draw_dataset

BASE = Path(__file__).parents[1] / "helpers/tiny/base"
SIZE = "200m"
RESULTS = ("adapter_model.safetensors", "model.safetensors", "predictions.jsonl", "metrics.json", "comparison.json")
MOMENTS = {  # where and when: recipe, the function that is about to write, a part of the file's name, which time
    "features of an image": ("r1-llm-only", Path, "write_bytes", "features", 3),
    "run.json": ("r1-llm-only", Path, "write_bytes", ".run.json", 1),
    "adapter of a checkpoint": ("r1-llm-only", peft.peft_model, "safe_save_file", "unfinished", 1),
    "optimiser of a checkpoint": ("r1-llm-only", torch, "save", "optimizer.pt", 2),
    "state of a checkpoint": ("r1-llm-only", TrainerState, "save_to_json", "unfinished", 1),
    "weights of a checkpoint": ("r2-vision-only", safetensors.torch, "save_file", "unfinished", 1),
    "log": ("r1-llm-only", RecordWriter, "write", "", 4),
    "adapter": ("r1-llm-only", peft.peft_model, "safe_save_file", "r1-llm-only/adapter", 1),
    "model": ("r2-vision-only", transformers.modeling_utils, "safe_save_file", "r2-vision-only", 1),
    "recipe.json": ("r1-llm-only", Path, "write_bytes", ".recipe.json", 1),
    "predictions.jsonl": ("r1-llm-only", Path, "write_bytes", ".predictions.jsonl", 1),
    "metrics.json": ("r1-llm-only", Path, "write_bytes", ".metrics.json", 1),
    "comparison.json": ("r1-llm-only", Path, "write_bytes", ".comparison.json", 1),
    "merged model": ("merge", transformers.modeling_utils, "safe_save_file", "merged", 1),
}


# The disk


def fill(disk: Path) -> None:
    """Write until there is no room for another byte."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (2**20, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                pass


def fill_before(disk: Path, owner: object, name: str, part: str, nth: int) -> None:
    """Let the disk run full before the nth call of a function that is given a path with `part` in it."""
    write, calls = getattr(owner, name), iter(range(1, 10_000))

    def wrapped(*arguments, **options):
        paths = [str(value) for value in [*arguments, *options.values()] if isinstance(value, str | Path)]
        if any(part in path for path in paths or [""]) and next(calls) == nth:
            fill(disk)
        return write(*arguments, **options)

    setattr(owner, name, wrapped)


# Runs


def list_arguments(output: Path, recipe: str, folder: Path) -> tuple[Callable, list[str]]:
    """The command and its arguments: a short training, or the merging of what one left."""
    if recipe == "merge":
        return results.main, ["--model", str(output / "disk/trained"), "--merge", str(folder / "merged")]
    places = {"--model-id": BASE, "--dataset-id": output / "dataset", "--output-dir": folder}
    numbers = {"--max-steps": 2, "--evaluations": 2, "--batch-size": 2, "--train-samples": 6, "--eval-samples": 2}
    numbers |= {"--validation-samples": 1, "--max-new-tokens": 24, "--flip-probability": 0.5}
    words = [str(word) for option in (places | numbers).items() for word in option]
    return train_recipe.main, ["--recipe", recipe, *words]


def run(command: tuple[Callable, list[str]], log: Path, arm: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """A command in a process of its own: its exit code, and what it said on stderr as an error."""
    if (child := os.fork()) == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        arm()
        code = 1
        try:
            code = command[0](command[1])
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(f"Traceback: {error!r}", flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return code, "\n".join(
        line.partition("error: ")[2] or line for line in lines if re.search("error: |Traceback", line)
    )


def read_results(folder: Path) -> dict[str, str]:
    """The hash of each file that a run leaves and that does not tell of time or place."""
    files = [file for file in sorted(folder.rglob("*")) if file.name in RESULTS]
    return {str(file.relative_to(folder)): xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in files}


def measure(output: Path, moment: str, wanted: dict[str, str]) -> dict[str, object]:
    """One full disk: what was said, and whether the same command ended as if it had never been full."""
    recipe, *where = MOMENTS[moment]
    folder, log, disk = output / "disk/run", output / f"{moment}.log", output / "disk"
    command = list_arguments(output, recipe, folder)
    code, said = run(command, log, lambda: fill_before(disk, *where))
    was_full = (disk / "ballast").exists()
    (disk / "ballast").unlink(missing_ok=True)
    again, _ = run(command, output / f"{moment}, again.log")
    found = {"full at": moment if was_full else f"{moment}: NOT REACHED", "exit code": code, "said": said}
    found |= {"again": again, "identical": read_results(folder) == wanted}
    shutil.rmtree(folder)
    return found


def run_campaign(output: Path, moments: Sequence[str]) -> pd.DataFrame:
    """The moments one after the other: a line each."""
    torch.set_num_threads(1)  # a process that has started threads cannot be forked
    draw_dataset(output / "dataset", train=24, validation=4, seed=1)
    wanted, lines = {}, []
    for recipe in dict.fromkeys(MOMENTS[moment][0] for moment in moments):
        folder = output / "disk/whole"
        if recipe == "merge":
            code, said = run(list_arguments(output, "r1-llm-only", output / "disk/source"), output / "source.log")
            (output / "disk/source/r1-llm-only").rename(output / "disk/trained")
        code, said = run(list_arguments(output, recipe, folder), output / f"{recipe}.log")
        assert code == 0, said
        wanted[recipe] = read_results(folder)
        shutil.rmtree(folder)
    for moment in moments:
        lines.append(measure(output, moment, wanted[MOMENTS[moment][0]]))
        print(lines[-1], flush=True)
    return pd.DataFrame(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 unless each full disk was told in one line and left nothing undone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="an empty folder")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=[*MOMENTS])
    options = parser.parse_args(argv)
    disk = (options.output / "disk").resolve()
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)
    table = run_campaign(options.output.resolve(), options.moments)
    print(table.drop(columns="said").to_string(index=False))
    told = table["exit code"].eq(2) & table.said.str.contains("disk is full") & ~table.said.str.contains("\n")
    return int(not (told & table.again.eq(0) & table.identical).all())


if __name__ == "__main__":
    sys.exit(main())
