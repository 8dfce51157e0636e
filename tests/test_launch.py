"""Recipes in processes of their own: their order, what is shown of them, and that none is left behind."""

import io
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from helpers.launch import FIRST_STAGES, Campaign, Child, build_table, describe, open_display, to_state
from helpers.recipes import CATALOGUE


def test_first_stages_are_those_of_the_catalogue():
    assert {name: recipe.stages[0] for name, recipe in CATALOGUE.items() if recipe.stages} == FIRST_STAGES


def test_a_second_stage_waits_for_the_first_unless_it_was_begun(tmp_path):
    both, alone = (
        Campaign(names, ["0"], [], tmp_path) for names in (["r3-two-stage", "r2-vision-only"], ["r3-two-stage"])
    )
    assert both.first_stage("r3-two-stage") == "r2-vision-only"
    assert both.first_stage("r2-vision-only") is None
    assert alone.first_stage("r3-two-stage") is None
    (tmp_path / "r3-two-stage").mkdir()
    (tmp_path / "r3-two-stage/run.json").write_text("{}")
    assert both.first_stage("r3-two-stage") is None
    again = Campaign(["r2-vision-only", "r3-two-stage"], ["0"], [], tmp_path, again=True)
    assert again.first_stage("r3-two-stage") == "r2-vision-only"


def test_progress_is_what_this_process_wrote(tmp_path):
    old = tmp_path / "progress.json"
    old.write_text('{"step": 9, "steps": 9}')
    os.utime(old, (0, 0))
    child = Child("r3-two-stage", "0", tmp_path / "train.log", None, started=time.time() - 1)
    assert child.read_progress() == {"state": "loading"}
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/progress.json").write_text('{"step": 5, "steps": 20, "loss": 0.5}')
    first = {"state": "first stage", "step": 5, "steps": 20, "loss": 0.5, "seconds_left": None}
    assert child.read_progress() == first
    child.first = ("first stage", 5, time.time() - 10)
    (tmp_path / "stage1/progress.json").write_text('{"step": 10, "steps": 20}')
    assert child.read_progress()["seconds_left"] == pytest.approx(20, abs=0.5)  # 5 steps took 10 seconds
    old.write_text('{"step": 1, "steps": 20, "eval_mean_iou": 0.25}')
    assert child.read_progress()["state"] == "training"
    assert child.read_progress()["eval_mean_iou"] == 0.25
    (tmp_path / "recipe.json").write_text("{}")
    assert child.read_progress() == {"state": "evaluating"}


def test_the_table_shows_what_each_recipe_is_doing():
    rows = {"r1-llm-only": {"state": "waiting"}, "r2-vision-only": {"state": "waiting"}}
    events = [{"event": "started", "recipe": "r1-llm-only", "gpu": "1", "log": "log"}]
    progress = {"step": 50, "steps": 200, "loss": 0.1234, "eval_mean_iou": 0.5678, "seconds_left": 3725.4}
    events += [{"event": "progress", "recipe": "r1-llm-only", "state": "training"} | progress]
    events += [{"event": "ended", "recipe": "r2-vision-only", "exit_code": 1, "log": "log", "minutes": 1.0}]
    for event in events:
        rows[event["recipe"]] |= to_state(event)
    console = Console(file=io.StringIO(), width=120)
    console.print(build_table(rows))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert lines == [
        ["r1-llm-only", "training", "1", "50/200", "0.123", "0.568", "1:02:05"],
        ["r2-vision-only", "FAILED"],
    ]


def test_what_is_no_terminal_gets_lines(capsys):
    with open_display(["r1-llm-only"], as_json=False) as show:
        show({"event": "started", "recipe": "r1-llm-only", "gpu": "", "log": "out/train.log"})
        show({"event": "progress", "recipe": "r1-llm-only", "state": "loading"})
        show({"event": "ended", "recipe": "r1-llm-only", "exit_code": 0, "log": "out/train.log", "minutes": 1.25})
    told = capsys.readouterr().out.splitlines()
    assert told == ["r1-llm-only: started, log in out/train.log", "r1-llm-only: done, exit code 0 (1.2 minutes)"]


def test_machines_get_json(capsys):
    event = {"event": "progress", "recipe": "r1-llm-only", "state": "loading"}
    with open_display(["r1-llm-only"], as_json=True) as show:
        show(event)
    assert json.loads(capsys.readouterr().out) == event


def test_a_failure_says_where_to_read_why():
    event = {"event": "ended", "recipe": "r4-joint", "exit_code": 2, "log": "out/train.log", "minutes": 0.31}
    assert describe(event) == "r4-joint: FAILED with exit code 2, see out/train.log (0.3 minutes)"


def test_no_child_is_left_when_the_command_is_killed(tmp_path):
    script = f"""
from pathlib import Path
from helpers.launch import Campaign, launch
argv = ["--output-dir", {str(tmp_path)!r}]
launch(Campaign(["r1-llm-only", "r4-joint"], ["0", "1"], argv, Path(argv[1])), lambda event: print(event, flush=True))
"""
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert [launcher.stdout.readline()[:18] for _ in range(2)] == ["{'event': 'started", "{'event': 'started"]
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    launcher.kill()
    launcher.communicate()
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert (len(gone), alive) == (2, [])
