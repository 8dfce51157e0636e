"""Kill trainings with SIGKILL at many moments, give them again, and compare with runs that nobody interrupted.

    PYTHONPATH=. python tests/interruptions.py OUTPUT --kills 100      # the whole campaign, with its table
    PYTHONPATH=. python tests/interruptions.py OUTPUT --kills 0 --notebook 20    # of the notebook under papermill

Half of the kills come at moments that are spread over the duration of a run, from loading to evaluation; the others in
the middle of what a run writes or deletes: a file is left at half its length, a folder half deleted. A run that was
killed is given again, and has to end with the bytes of the uninterrupted one, without training again what had ended.
Of the notebook papermill and its kernel are killed, at moments that are spread over its duration; the weights of a
training that had ended must not even be written again. A sample is a test: tests/test_interruptions.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import peft.peft_model
import psutil
import safetensors.torch
import torch
import transformers.modeling_utils
import xxhash
import yaml

from helpers.data import Splits, load_splits
from helpers.recipes import CATALOGUE
from helpers.runs import RunFolder
from helpers.tiny.packages import draw_dataset
from helpers.train_recipe import NOTEBOOK, read_notebook_settings
from helpers.training import DetectionTrainer, evaluate_run, run_recipe

BASE = Path(__file__).parents[1] / "helpers/tiny/base"
# six images to train on: three steps an epoch, checkpoints after the second and the fourth step
SMALL = {
    "max_steps": 4,
    "evaluations": 2,
    "batch_size": 2,
    "train_samples": 8,
    "validation_samples": 2,
    "eval_samples": 4,
}
SMALL |= {"flip_probability": 0.5, "max_new_tokens": 24, "report_to": "none"}
RESULTS = ("adapter_model.safetensors", "model.safetensors", "predictions.jsonl", "metrics.json")


def create_settings(output: Path) -> SimpleNamespace:
    """The notebook's settings for four steps of the tiny base on 24 drawings, with mirroring."""
    settings = {name.lower(): default for name, (default, _) in read_notebook_settings().items()}
    places = {"model_id": str(BASE), "dataset_id": str(output / "dataset"), "output_dir": str(output / "runs")}
    return SimpleNamespace(**settings | SMALL | places)


def train_and_evaluate(name: str, settings: SimpleNamespace, splits: Splits) -> None:
    """What a run does."""
    evaluate_run(run_recipe(CATALOGUE[name], settings, splits), settings, splits.evaluation)


# Children


def start(name: str, settings: SimpleNamespace, splits: Splits, arm: Callable[[], None] = lambda: None) -> int:
    """A run in a process of its own, whose id is returned; its steps are noted in steps.txt."""
    sys.stdout.flush()
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if (child := os.fork()) > 0:
        return child
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count_steps(folder / "steps.txt")
    arm()
    try:
        train_and_evaluate(name, settings, splits)
    except BaseException as error:
        print(f"ended by {error!r}", flush=True)
        os._exit(1)
    os._exit(0)


def count_steps(file: Path) -> None:
    """Note a line for each step of the optimiser in this process."""
    step = DetectionTrainer.training_step

    def noted(trainer, *arguments, **options):
        with file.open("a") as steps:
            steps.write(f"{trainer.args.output_dir} {trainer.state.global_step}\n")
        return step(trainer, *arguments, **options)

    DetectionTrainer.training_step = noted


def die() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_file(module: object, name: str, nth: int) -> Callable[[], None]:
    """Arm a process to die in the nth call of a function that writes a file, which is left at half its length."""

    def arm() -> None:
        write, calls = getattr(module, name), iter(range(1, 1000))

        def broken(*arguments, **options):
            result = write(*arguments, **options)
            if next(calls) == nth:
                file = next(a for a in [*arguments, *options.values()] if isinstance(a, str | Path))
                os.truncate(file, os.path.getsize(file) // 2)
                die()
            return result

        setattr(module, name, broken)

    return arm


def kill_in_folder(nth: int) -> Callable[[], None]:
    """Arm a process to die in the nth deletion of a folder, of which half of the files are gone."""

    def arm() -> None:
        delete, calls = shutil.rmtree, iter(range(1, 1000))

        def broken(folder, *arguments, **options):
            if next(calls) == nth:
                files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                for file in files[: len(files) // 2]:
                    file.unlink()
                die()
            return delete(folder, *arguments, **options)

        shutil.rmtree = broken

    return arm


def kill_before_name(nth: int) -> Callable[[], None]:
    """Arm a process to die before the nth time that something whole gets its name."""

    def arm() -> None:
        rename, calls = Path.replace, iter(range(1, 1000))

        def broken(path, target):
            if next(calls) == nth:
                die()
            return rename(path, target)

        Path.replace = broken

    return arm


TARGETS = [
    *(("writing a checkpoint", kill_in_file(torch, "save", nth)) for nth in (1, 2, 3, 4)),
    *(("writing weights", kill_in_file(safetensors.torch, "save_file", nth)) for nth in (1, 2)),
    *(("writing weights", kill_in_file(peft.peft_model, "safe_save_file", nth)) for nth in (1, 2, 3)),
    *(("writing weights", kill_in_file(transformers.modeling_utils, "safe_save_file", nth)) for nth in (1,)),
    *(("giving a name", kill_before_name(nth)) for nth in (1, 2, 3, 4, 5, 6)),
    *(("deleting", kill_in_folder(nth)) for nth in (1, 2)),
]


# The campaign


def read_results(folder: Path) -> dict[str, str | int]:
    """The hash of each file that a run leaves and that does not tell of time or place, and its number of steps."""
    files = [file for file in sorted(folder.rglob("*")) if file.name in RESULTS]
    hashes = {str(file.relative_to(folder)): xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in files}
    steps = {
        str(run.parent.relative_to(folder)): RunFolder(run.parent).read_recipe()["steps"]
        for run in folder.rglob("recipe.json")
    }
    return hashes | steps


def describe_phase(folder: Path) -> str:
    """What a run was doing when it was killed, by what it left."""
    if not (folder / "run.json").exists() and not (folder / "stage1/run.json").exists():
        return "loading"
    if (folder / "metrics.json").exists():
        return "after the end"
    return "evaluating" if RunFolder(folder).is_trained else "training"


def interrupt(name: str, settings: SimpleNamespace, splits: Splits, delay: float, arm: Callable[[], None]) -> str:
    """Start a run, and kill it after `delay` seconds if nothing else has; what it was doing then, or "not killed"."""
    child, begun = start(name, settings, splits, arm), time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() - begun > delay:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return describe_phase(Path(settings.output_dir) / name) if os.WIFSIGNALED(ended[1]) else "not killed"


def finish(name: str, settings: SimpleNamespace, splits: Splits) -> bool:
    """Give a run again until its end; whether that came without an error."""
    return os.waitstatus_to_exitcode(os.waitpid(start(name, settings, splits), 0)[1]) == 0


def plan_kills(name: str, kills: int, duration: float) -> Iterator[tuple[str, float, Callable[[], None]]]:
    """The moments: how each is called, after how many seconds, and how the process is armed."""
    for number in range(kills):
        if number % 2:
            what, arm = TARGETS[(number // 2 + 5 * [*CATALOGUE].index(name)) % len(TARGETS)]
            yield what, duration * 20, arm
        else:
            yield "", duration * (number + 0.5) / kills, lambda: None


def run_campaign(output: Path, names: list[str], kills: int) -> pd.DataFrame:
    """`kills` interruptions of each recipe: a line each."""
    torch.set_num_threads(1)  # a process that has started threads cannot be forked
    draw_dataset(output / "dataset", train=24, validation=4, seed=1)
    settings, lines = create_settings(output), []
    splits = load_splits(settings)
    for name in names:
        settings.output_dir = str(output / "whole" / name)
        begun = time.monotonic()
        assert finish(name, settings, splits), (output / "whole" / name / "log.txt").read_text()
        duration, wanted = time.monotonic() - begun, read_results(output / "whole" / name)
        for number, (what, delay, arm) in enumerate(plan_kills(name, kills, duration)):
            settings.output_dir = str(output / f"{name}-{number}")
            lines.append({"recipe": name} | measure_kill(name, settings, splits, (what, delay, arm), wanted))
            print(lines[-1], flush=True)
            if lines[-1]["identical"] and not lines[-1]["steps again"]:
                shutil.rmtree(settings.output_dir)
    return pd.DataFrame(lines)


def measure_kill(name, settings, splits, kill, wanted) -> dict:
    """One interruption: what the run was doing, whether it ended with the wanted bytes, steps that it did twice."""
    what, delay, arm = kill
    folder = Path(settings.output_dir)
    phase = interrupt(name, settings, splits, delay, arm)
    trained = [path.parent for path in folder.rglob("recipe.json")]
    before = read_steps(folder)
    ended = finish(name, settings, splits)
    after = read_steps(folder) - before
    repeated = sum(count for (place, _), count in after.items() if Path(place) in trained)
    found = {
        "killed while": phase if phase == "not killed" else what or phase,
        "ended": ended,
        "identical": read_results(folder) == wanted,
    }
    return found | {"steps again": repeated}


def read_steps(folder: Path) -> Counter:
    """How often each step of each training was done."""
    file = folder / "steps.txt"
    return (
        Counter(tuple(line.rsplit(" ", 1)) for line in file.read_text().splitlines()) if file.exists() else Counter()
    )


# The notebook


def start_notebook(output: Path, folder: Path) -> subprocess.Popen:
    """The notebook in papermill, all recipes with the small settings, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SMALL | {"model_id": str(BASE), "dataset_id": str(output / "dataset"), "output_dir": str(folder)}
    parameters = {name.upper(): value for name, value in settings.items()} | {"COLLATOR_STEPS": 0}
    (folder / "parameters.yaml").write_text(yaml.safe_dump(parameters))
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(folder / "executed.ipynb"), "--kernel", "python3"]
    command += ["--parameters_file", str(folder / "parameters.yaml"), "--no-progress-bar"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JUPYTER_PATH": f"{sys.prefix}/share/jupyter"}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def kill_notebook(process: subprocess.Popen) -> None:
    """Kill papermill and the kernel that it started."""
    for killed in [*psutil.Process(process.pid).children(recursive=True), process]:
        killed.kill()
    process.wait()


def describe_notebook_phase(folder: Path) -> str:
    """What the notebook was doing when it was killed, by what it left."""
    left = {str(file.relative_to(folder)) for file in folder.rglob("*.json")}
    first, *_, last = CATALOGUE
    phases = {"merging": "comparison.json", "evaluating": f"{last}/recipe.json", "training": f"{first}/run.json"}
    return "notebook: " + next((phase for phase, file in phases.items() if file in left), "loading")


def read_times(folder: Path) -> dict[Path, int]:
    """When the weights of each training that has ended were written."""
    runs = [file.parent for file in folder.rglob("recipe.json") if file.parent.name != "merged"]
    return {file: file.stat().st_mtime_ns for run in runs for file in run.glob("*model.safetensors")}


def run_notebook_campaign(output: Path, kills: int) -> pd.DataFrame:
    """`kills` interruptions of the notebook: a line each."""
    if not (output / "dataset").exists():
        draw_dataset(output / "dataset", train=24, validation=4, seed=1)
    begun, lines = time.monotonic(), []
    assert start_notebook(output, output / "whole/notebook").wait() == 0, "see whole/notebook/log.txt"
    duration, wanted = time.monotonic() - begun, read_results(output / "whole/notebook")
    for number in range(kills):
        folder = output / f"notebook-{number}"
        process = start_notebook(output, folder)
        time.sleep(duration * (number + 0.5) / kills)
        kill_notebook(process)
        line, times = {"recipe": "all", "killed while": describe_notebook_phase(folder)}, read_times(folder)
        line["ended"] = start_notebook(output, folder).wait() == 0
        line["identical"] = read_results(folder) == wanted
        line["steps again"] = sum(read_times(folder)[file] != written for file, written in times.items())
        lines.append(line)
        print(line, flush=True)
        if line["identical"] and not line["steps again"]:
            shutil.rmtree(folder)
    return pd.DataFrame(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 if a run did not end as the uninterrupted one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="an empty folder")
    parser.add_argument("--recipes", nargs="+", choices=CATALOGUE, default=[*CATALOGUE])
    parser.add_argument("--kills", type=int, default=100, help="of all recipes together")
    parser.add_argument("--notebook", type=int, default=0, help="kills of the notebook")
    options = parser.parse_args(argv)
    tables = []
    if options.kills:
        tables.append(run_campaign(options.output, options.recipes, options.kills // len(options.recipes)))
    if options.notebook:
        tables.append(run_notebook_campaign(options.output, options.notebook))
    table = pd.concat(tables)
    counts = table.groupby("killed while").agg(
        kills=("ended", "size"), ended=("ended", "sum"), identical=("identical", "sum"), again=("steps again", "sum")
    )
    print(counts.to_string())
    return int(not (table.identical.all() and not table["steps again"].any()))


if __name__ == "__main__":
    sys.exit(main())
