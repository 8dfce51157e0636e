"""Several recipes, each in a process of its own; what they are doing as a live table, as lines, or as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

FIRST_STAGES = {"r3-two-stage": "r2-vision-only"}  # as in helpers.recipes.CATALOGUE, which would take torch to read


@dataclass(frozen=True)
class Campaign:
    """Recipes to train, at most one at a time on each of the GPUs, and the options that all of them get."""

    recipes: Sequence[str]
    gpus: Sequence[str]  # an empty name: without choosing one
    argv: Sequence[str]
    output_dir: Path
    again: bool = False

    def first_stage(self, recipe: str) -> str | None:
        """The recipe of this campaign from whose weights another one starts, unless that was begun already."""
        begun = not self.again and any((self.output_dir / recipe).glob("r*.json"))  # run.json, recipe.json
        stage = FIRST_STAGES.get(recipe)
        return stage if stage in self.recipes and not begun else None

    def start(self, recipe: str, gpu: str) -> Child:
        """Give this command again, for one recipe and GPU: of an option that comes twice, the last one counts."""
        log, stage = self.output_dir / recipe / "train.log", self.first_stage(recipe)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "helpers.train_recipe", *self.argv, "--child", "--recipe", recipe]
        command += ["--gpu", gpu] if gpu else []
        command += ["--checkpoint", str(self.output_dir / stage)] if stage else []
        with log.open("a") as file:
            # its lines and progress bars in the order they were written
            environment, out = os.environ | {"PYTHONUNBUFFERED": "1"}, {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, **out, env=environment, preexec_fn=end_with_parent)
        return Child(recipe, gpu, log, process)


@dataclass
class Child:
    """A recipe that is being trained in a process of its own, and what was seen of it."""

    recipe: str
    gpu: str
    log: Path
    process: subprocess.Popen
    started: float = field(default_factory=time.time)  # seconds since the epoch, as in the times of files
    first: tuple[str, int, float] = ("", 0, 0.0)  # state, step and time of the first progress in that state
    shown: dict = field(default_factory=dict)

    def read_progress(self) -> dict:
        """What it is doing: state, and if it trains step, steps, seconds_left, loss, eval_mean_iou."""
        folder = self.log.parent
        if self.is_new(folder / "recipe.json"):
            return {"state": "evaluating"}
        for stage, file in {"training": "progress.json", "first stage": "stage1/progress.json"}.items():
            if self.is_new(folder / file):
                noted = json.loads((folder / file).read_text())
                return {"state": stage} | noted | {"seconds_left": self.estimate(stage, noted["step"], noted["steps"])}
        return {"state": "loading"}

    def is_new(self, file: Path) -> bool:
        """Whether this process wrote it."""
        return file.exists() and file.stat().st_mtime >= self.started

    def estimate(self, stage: str, step: int, steps: int) -> float | None:
        """Seconds that the steps left will take, evaluations included; None before the second look."""
        if self.first[0] != stage:
            self.first = stage, step, time.time()
        done = step - self.first[1]
        return (time.time() - self.first[2]) / done * (steps - step) if done else None


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it dies, however it dies (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


Show = Callable[[dict], None]


def launch(campaign: Campaign, show: Show) -> int:
    """Train the recipes and show what happens to them; returns how many failed. They end when this ends.

    An event has `event` (started, progress, ended, skipped or stopped), `recipe`, and what the functions below say.
    """
    waiting, free, running, codes = list(campaign.recipes), deque(campaign.gpus), [], {}
    try:
        while waiting or running:
            skip_without_stage(campaign, waiting, codes, show)
            while free and (recipe := next((r for r in waiting if campaign.first_stage(r) in (None, *codes)), None)):
                waiting.remove(recipe)
                running.append(campaign.start(recipe, free.popleft()))
                show({"event": "started", "recipe": recipe, "gpu": running[-1].gpu, "log": str(running[-1].log)})
            time.sleep(0.2)
            for child in collect_ended(running, show):
                free.append(child.gpu)
                codes[child.recipe] = child.process.returncode
    finally:
        stop(running, show)
    return sum(code != 0 for code in codes.values())


def skip_without_stage(campaign: Campaign, waiting: list[str], codes: dict[str, int], show: Show) -> None:
    """A recipe whose first stage failed is not started, and counts as failed."""
    for recipe in [recipe for recipe in waiting if codes.get(campaign.first_stage(recipe))]:
        waiting.remove(recipe)
        codes[recipe] = 1
        show({"event": "skipped", "recipe": recipe, "first_stage": campaign.first_stage(recipe)})


def collect_ended(running: list[Child], show: Show) -> list[Child]:
    """Take out the children that have ended, and return them; show these, and what others do where that changed."""
    ended = [child for child in running if child.process.poll() is not None]
    for child in ended:
        running.remove(child)
        show(describe_end(child))
    for child in running:
        progress = child.read_progress()
        if progress | {"seconds_left": 0} != child.shown | {"seconds_left": 0}:
            child.shown = progress
            show({"event": "progress", "recipe": child.recipe} | progress)
    return ended


def describe_end(child: Child) -> dict:
    """How a child ended, where to read why, and when."""
    ended = {"exit_code": child.process.returncode, "minutes": (time.time() - child.started) / 60}
    return {"event": "ended", "recipe": child.recipe, "log": str(child.log)} | ended


def stop(running: Sequence[Child], show: Show) -> None:
    """End what is running."""
    for child in running:
        child.process.terminate()
    for child in running:
        child.process.wait()
        show({"event": "stopped", "recipe": child.recipe})


# What is shown


@contextmanager
def open_display(recipes: Sequence[str], as_json: bool) -> Iterator[Show]:
    """What shows events on standard output: a line of JSON each, on a terminal a live table, else lines of text."""
    if as_json:
        yield lambda event: print(json.dumps(event), flush=True)
    elif sys.stdout.isatty():
        with show_table(recipes) as show:
            yield show
    else:
        yield lambda event: event["event"] != "progress" and print(describe(event), flush=True)


def describe(event: dict) -> str:
    """An event as a line; not for progress."""
    texts = {"started": "started{on}, log in {log}", "stopped": "stopped"}
    texts["skipped"] = "not started, its first stage {first_stage} failed"
    texts["ended"] = "{end} ({minutes:.1f} minutes)"
    known = {"on": f" on GPU {event['gpu']}" if event.get("gpu") else ""} | event
    if code := event.get("exit_code"):
        known["end"] = f"FAILED with exit code {code}, see {event['log']}"
    else:
        known["end"] = "done, exit code 0"
    return f"{event['recipe']}: {texts[event['event']].format(**known)}"


@contextmanager
def show_table(recipes: Sequence[str]) -> Iterator[Show]:
    """A table that is drawn anew with each event; above it a line for what failed."""
    from rich.live import Live  # a quarter of a second, which a command that is refused should not take

    rows = {recipe: {"state": "waiting"} for recipe in recipes}
    with Live(build_table(rows)) as live:

        def show(event: dict) -> None:
            rows[event["recipe"]] |= to_state(event)
            live.update(build_table(rows))
            if event.get("exit_code"):
                live.console.print(describe(event), highlight=False)

        yield show


def to_state(event: dict) -> dict:
    """What an event changes in its row: it names the state itself where it is about progress."""
    ended = "FAILED" if event.get("exit_code") else "done"
    states = {"started": "loading", "ended": ended, "skipped": "FAILED", "stopped": "stopped"}
    return {"seconds_left": None, "state": states.get(event["event"])} | event


def build_table(rows: dict[str, dict]):
    """A line for each recipe: state, GPU, optimiser steps, loss, mean IoU on the validation split, time left."""
    from rich.table import Table

    table = Table("recipe", "state", "GPU", "step", "loss", "validation IoU", "time left")
    for recipe, row in rows.items():
        steps = f"{row['step']}/{row['steps']}" if "steps" in row else ""
        numbers = [f"{row[name]:.3f}" if name in row else "" for name in ("loss", "eval_mean_iou")]
        seconds = row.get("seconds_left")
        left = "" if seconds is None else f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"
        table.add_row(recipe, row["state"], row.get("gpu") or "", steps, *numbers, left)
    return table
