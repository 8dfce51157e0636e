"""The command line: the notebook's settings, one recipe here, several in processes of their own."""

import errno
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jupytext
import papermill
import pytest
import yaml

from helpers import results, train_recipe
from helpers.export import SCRIPT
from helpers.locks import own
from helpers.train_recipe import (
    NOTEBOOK,
    NOTEBOOK_ONLY,
    build_parser,
    choose_gpus,
    main,
    parse,
    read_notebook_settings,
    to_settings,
)

DEMO = Path(__file__).parents[1] / "helpers/tiny/demo.yaml"


def options_of(*argv):
    settings = read_notebook_settings()
    return parse(build_parser(settings), settings, argv)


def command(*argv):
    return [sys.executable, "-m", "helpers.train_recipe", *map(str, argv)]


def run(*argv):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # on few cores, threads of several processes wait in turn
    return subprocess.run(command(*argv), capture_output=True, text=True, check=False, env=environment, timeout=900)


@pytest.fixture
def small(base, dataset_folder, tmp_path):
    """Two steps of the tiny base on the tiny dataset, into an empty folder."""
    settings = {
        "--model-id": base,
        "--dataset-id": dataset_folder,
        "--output-dir": tmp_path / "out",
        "--validation-samples": 4,
        "--max-steps": 2,
        "--batch-size": 2,
        "--report-to": "none",
    }
    return [str(word) for pair in settings.items() for word in pair] + ["--no-gradient-checkpointing"]


def check_results(folder, *names):
    """The recipes left weights, model cards, and metrics that `comparison.json` repeats, as do the baselines."""
    comparison = json.loads((folder / "comparison.json").read_text())
    assert list(comparison) == ["base", "same-box", *sorted(names)]
    for name in comparison:
        assert comparison[name].items() <= json.loads((folder / name / "metrics.json").read_text()).items()
        assert len((folder / name / "predictions.jsonl").read_text().splitlines()) == 8
    for name in names:
        weights = "model.safetensors" if name == "r2-vision-only" else "adapter_model.safetensors"
        assert (folder / name / weights).exists()
        assert f"Trained with the recipe `{name}`" in (folder / name / "README.md").read_text()
    pairs = [(pair["first"], pair["second"]) for pair in json.loads((folder / "differences.json").read_text())]
    assert pairs[: len(names) + 1] == [("base", "same-box"), *(("base", name) for name in sorted(names))]


# Settings


def test_settings_and_defaults_are_those_of_the_notebook():
    cell = next(cell for cell in jupytext.read(SCRIPT).cells if "parameters" in cell.metadata.get("tags", []))
    wanted = {}
    exec(cell.source.partition("\nDEFAULTS = ")[0], {}, wanted)
    wanted = {name.lower(): value for name, value in wanted.items() if name not in NOTEBOOK_ONLY}
    options = vars(options_of("--recipe", "r1-llm-only"))
    others = {"recipe", "gpu", "checkpoint", "parameters", "learning_rate", "collator", "merge", "json", "child"}
    assert set(options) - set(wanted) == others
    assert wanted == {name: options[name] for name in wanted} | {"output_dir": str(options["output_dir"])}
    assert options["learning_rate"] is None


def test_settings_are_read_as_papermill_reads_them():
    read = papermill.inspect_notebook(str(NOTEBOOK))
    found = {name: (repr(default), comment) for name, (default, comment) in read_notebook_settings().items()}
    assert found.keys() == read.keys() - {"DEFAULTS"}
    assert found == {name: (read[name]["default"].replace('"', "'"), read[name]["help"]) for name in found}


def test_help_repeats_the_comments_of_the_notebook():
    printed = " ".join(build_parser(read_notebook_settings()).format_help().split())
    assert "images of the training split that are held back to choose checkpoints with (default: 64)" in printed


def test_a_new_setting_of_the_notebook_is_an_option_at_once():
    added = {"LORA_DROPOUT": (0.25, "10 % is usual"), "PATIENCE": (None, "")}
    settings = read_notebook_settings() | added
    parser = build_parser(settings)
    assert "10 % is usual (default: 0.25)" in parser.format_help()
    options = parse(parser, settings, ["--recipe", "r4-joint", "--lora-dropout", "0.5", "--patience", "3"])
    assert (to_settings(options).lora_dropout, to_settings(options).patience) == (0.5, 3)


def test_options_are_read_as_what_they_are():
    options = options_of("--recipe", "r4-joint", "--train-samples", "9", "--num-epochs", "0.5", "--seed", "1")
    assert (options.train_samples, options.num_epochs, options.seed) == (9, 0.5, 1)
    assert options_of("--recipe", "r4-joint", "--no-gradient-checkpointing").gradient_checkpointing is False
    assert options_of("--recipe", "r4-joint").gradient_checkpointing is None
    assert options_of("--recipe", "r4-joint", "--precision", "fp8", "--compile").precision == "fp8"


def test_recipes_are_those_of_the_library():
    from helpers.recipes import CATALOGUE

    assert options_of("--recipe", "all").recipe == list(CATALOGUE)
    assert options_of("--recipe", "r4-joint", "r1-llm-only", "r4-joint").recipe == ["r4-joint", "r1-llm-only"]


def test_options_override_the_parameters_file():
    demo = yaml.safe_load(DEMO.read_text())
    for argv in (["--parameters", str(DEMO), "--seed", "1"], ["--seed", "1", "--parameters", str(DEMO)]):
        options = options_of("--recipe", "r1-llm-only", *argv)
        assert (options.max_steps, options.validation_samples) == (demo["MAX_STEPS"], demo["VALIDATION_SAMPLES"])
        assert (options.flip_probability, options.seed) == (0.5, 1)
    options = options_of("--recipe", "r1-llm-only", "--max-steps", "3", "--parameters", str(DEMO))
    assert options.max_steps == 3


def test_settings_have_the_names_that_the_story_uses():
    settings = to_settings(options_of("--recipe", "r4-joint", "--model-id", "me/model", "--validation-samples", "7"))
    assert (settings.model_id, settings.validation_samples, settings.max_pixels) == ("me/model", 7, 1003520)
    assert settings.learning_rates == {}


def test_learning_rates(tmp_path):
    from helpers.recipes import R1
    from helpers.training import adjust

    (tmp_path / "file.yaml").write_text("LEARNING_RATES: {r1-llm-only: 2e-3}")  # which YAML takes for a text
    argv = ["--recipe", "all", "--parameters", str(tmp_path / "file.yaml")]
    assert adjust(R1, to_settings(options_of(*argv))).learning_rate == 2e-3
    assert to_settings(options_of(*argv, "--learning-rate", "0.5")).learning_rates == {
        "r1-llm-only": 0.5,
        "r2-vision-only": 0.5,
        "r3-two-stage": 0.5,
        "r4-joint": 0.5,
    }


SEEDS = {  # command lines of the documents that this project was made from, and what they mean
    "--recipe r1-llm-only --gpu 0": (["r1-llm-only"], ["0"], 3, "tensorboard"),
    "--recipe r2-vision-only": (["r2-vision-only"], [], 3, "tensorboard"),
    "--recipe r4-joint --gpu 0,1 --epochs 3 --no-wandb": (["r4-joint"], ["0", "1"], 3, "none"),
    "--recipe r4-joint --gpu 0,1 --no-wandb": (["r4-joint"], ["0", "1"], 3, "none"),
    "--recipe r3-two-stage --gpu 6,7": (["r3-two-stage"], ["6", "7"], 3, "tensorboard"),
    "--recipe r1-llm-only --gpu 0 --checkpoint /path/to/stage1": (["r1-llm-only"], ["0"], 3, "tensorboard"),
    "--recipe r4 r1 --gpu 0 1 --epochs 0.5": (["r4-joint", "r1-llm-only"], ["0", "1"], 0.5, "tensorboard"),
}


@pytest.mark.parametrize("line", SEEDS)
def test_other_spellings(line):
    options = options_of(*shlex.split(line))
    assert (options.recipe, options.gpu, options.num_epochs, options.report_to) == SEEDS[line]


# What cannot be


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "r9"], "invalid choice: 'r9' (choose from 'r1-llm-only'"),
        (["--recipe", "r3-two-stage", "--checkpoint", "nowhere"], "give the folder that --recipe r2-vision-only left"),
        (["--recipe", "r5-iou-reward", "--checkpoint", "tests"], "holds no result (there is no recipe.json)"),
        (["--recipe", "r5-iou-reward"], "r5-iou-reward starts from what another recipe left"),
        (["--recipe", "r1", "--collator", "v3"], "collator is one of v1-all-tokens, v2-assistant-only"),
        (["--recipe", "r1", "--gpu", "0,0"], "name each GPU once, as `nvidia-smi -L` does, not '0'"),
        (["--recipe", "r1", "--gpu", "0,"], "name each GPU once, as `nvidia-smi -L` does, not ''"),
        (["--recipe", "r1", "--push-to-hub", "me/it"], "log in first, with `hf auth login`"),
        (["--recipe", "r1", "--model-id", "nowhere"], "MODEL_ID=nowhere is neither a folder"),
        (["--recipe", "all", "--checkpoint", "."], "give --recipe one name"),
        (["--recipe", "all", "--parameters", "nowhere.yaml"], "give a YAML file that can be read"),
        (["--recipe", "all", "--max-step", "3"], "unrecognized arguments: --max-step"),
    ],
)
def test_impossible_options(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("helpers.train_recipe: error: ")
    assert len(told.splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_all_that_is_wrong_is_told_at_once(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--recipe", "r1", "--max-steps", "0", "--flip-probability", "2"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "helpers.train_recipe: error: MAX_STEPS=0: give a whole number above 0, or -1.",
        "helpers.train_recipe: error: FLIP_PROBABILITY=2.0: give a number from 0 to 1.",
    ]


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(train_recipe, "NVIDIA_DRIVER", tmp_path)  # there is a driver
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"--gpu 9: CUDA finds 0 of them"):
        train_recipe.check_gpus(["9"])


def test_a_full_disk_takes_a_line(small, monkeypatch, capsys):
    def fill(options):
        raise RuntimeError from OSError(errno.ENOSPC, "No space left on device", "out/file")

    monkeypatch.setattr(train_recipe, "train_one", fill)
    with pytest.raises(SystemExit) as stopped:
        main(["--recipe", "r1", *small])
    assert stopped.value.code == 2
    assert "error: out/file: the disk is full; free some room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MAX_STEP: 3", "sets MAX_STEP: choose from AGAIN, BATCH_SIZE, "),
        ("- 3", "write lines such as `MAX_STEPS: 100`"),
        ("a: b: c", "give a YAML file that can be read"),
        ("MAX_STEPS: many", "argument --max-steps: invalid int value: 'many'"),
    ],
)
def test_impossible_parameters_file(tmp_path, capsys, text, message):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["--recipe", "r1-llm-only", "--parameters", str(tmp_path / "file.yaml")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_torchrun_with_several_recipes(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit):
        main(["--recipe", "all"])
    assert "torchrun trains one recipe" in capsys.readouterr().err


# One recipe


def test_torch_is_not_loaded_before_gpus_are_chosen():
    script = "import sys, helpers.train_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_one_recipe_sees_all_gpus_that_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    choose_gpus(["0", "2"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"


@pytest.mark.slow
def test_one_recipe_leaves_its_results(small, tmp_path, capsys, monkeypatch):
    given = ["--recipe", "r1-llm-only", *small, "--merge", "--collator", "v1-all-tokens"]
    assert main(given) == 0
    made = json.loads((tmp_path / "out/r1-llm-only/recipe.json").read_text())
    assert (made["steps"], made["settings"]["validation_samples"], made["collator"]) == (2, 4, "v1-all-tokens")
    printed = capsys.readouterr().out
    assert "20 images to train on, 4 for validation, 8 to evaluate on" in printed
    assert "preflight, r1-llm-only: 0 problems found" in printed
    assert "same-box -> r1-llm-only: " in printed
    assert "out/merged: r1-llm-only without adapters" in printed
    assert len((tmp_path / "out/merged/predictions.jsonl").read_text().splitlines()) == 8
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/[brm]*/*.json*")}

    assert main(given) == 0  # again: nothing is done twice
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/[brm]*/*.json*")} == times
    printed = capsys.readouterr().out
    assert "r1-llm-only: trained already, skipped" in printed
    assert "r1-llm-only was merged already, skipped" in printed
    assert "preflight" not in printed

    monkeypatch.setattr(results, "TOLERANCE", -1.0)  # whatever the merged model answers is too far off
    (tmp_path / "out/merged/metrics.json").unlink()
    (tmp_path / "out/merged").rename(tmp_path / "old")
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert "merging changed the model: mean IoU 0." in capsys.readouterr().err
    assert not (tmp_path / "out/merged").exists()
    check_results(tmp_path / "out", "r1-llm-only")


@pytest.mark.slow
def test_ctrl_c_takes_a_line(small):
    process = subprocess.Popen(
        command("--recipe", "r1-llm-only", *small),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # where pytest itself was started in the background, SIGINT is ignored, and so it would be here
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "24 of 24 rows are usable\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "interrupted: the same command goes on from the last checkpoint"
    assert "Traceback" not in told


def test_ctrl_c_ends_a_run_inside_of_what_catches_every_exception():
    """As datasets does around a fingerprint: a run that was interrupted there went on to its end."""
    caught = """
import argparse, os, runpy, signal, sys

def catch(*given):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except:
        print("went on")
    sys.exit(0)

argparse.ArgumentParser.parse_args = catch
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("helpers.train_recipe", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", caught], capture_output=True, text=True, check=False)
    told = "interrupted: the same command goes on from the last checkpoint\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)


@pytest.mark.slow
def test_a_checkpoint_takes_the_place_of_the_first_stage(small, base, tmp_path):
    assert main(["--recipe", "r3-two-stage", "--checkpoint", str(base), *small]) == 0
    check_results(tmp_path / "out", "r3-two-stage")
    assert not (tmp_path / "out/r3-two-stage/stage1").exists()


@pytest.mark.slow
def test_torchrun_shares_the_images_among_processes(small, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*command("--recipe", "r4-joint", *small)[1:]]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    check_results(tmp_path / "out", "r4-joint")
    assert done.stdout.count("base -> r4-joint: ") == 1  # one process evaluates
    epochs = json.loads((tmp_path / "out/r4-joint/trainer_state.json").read_text())["epoch"]
    assert epochs == 2 * 2 / 20  # steps * images a step, of both processes together / images


# Several recipes


@pytest.mark.slow
def test_recipes_side_by_side(small, tmp_path):
    done = run("--recipe", "r1", "r3", "r2", "--gpu", "0,1", "--json", *small)
    assert done.returncode == 0, done.stderr
    names = ["r1-llm-only", "r2-vision-only", "r3-two-stage"]
    check_results(tmp_path / "out", *names)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    started = [(event["recipe"], event["gpu"]) for event in events if event["event"] == "started"]
    assert started[:2] == [("r1-llm-only", "0"), ("r2-vision-only", "1")]
    assert started[2][0] == "r3-two-stage"
    ended = [event["recipe"] for event in events if event["event"] == "ended" and event["exit_code"] == 0]
    assert sorted(ended) == names
    assert ended.index("r2-vision-only") < ended.index("r3-two-stage")  # which starts from its weights
    assert not (tmp_path / "out/r3-two-stage/stage1").exists()
    assert json.loads((tmp_path / "out/r3-two-stage/run.json").read_text())["base"] == "../r2-vision-only"
    seen = [event for event in events if event["event"] == "progress" and event["recipe"] == "r1-llm-only"]
    assert seen[0]["state"] == "loading"
    assert [event["step"] for event in seen if event["state"] == "training"][-1] == 2
    assert events[-1]["event"] == "result"
    assert events[-1]["metrics"] == json.loads((tmp_path / "out/comparison.json").read_text())
    assert [pair["first"] for pair in events[-1]["differences"]].count("base") == 4
    for name in names:
        assert "base -> " in (tmp_path / "out" / name / "train.log").read_text()


@pytest.mark.slow
def test_a_failure_is_told_and_the_others_still_run(small, tmp_path):
    done = run("--recipe", "r2", "r3", "r4", "--gpu", 0, *small, "--dataset-id", "nowhere")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    logs = {name: tmp_path / "out" / name / "train.log" for name in ("r2-vision-only", "r4-joint")}
    assert lines[0] == f"r2-vision-only: started on GPU 0, log in {logs['r2-vision-only']}"
    assert lines[1].startswith(f"r2-vision-only: FAILED with exit code 2, see {logs['r2-vision-only']} (")
    assert lines[2] == "r3-two-stage: not started, its first stage r2-vision-only failed"
    assert lines[3] == f"r4-joint: started on GPU 0, log in {logs['r4-joint']}"
    assert lines[4].startswith(f"r4-joint: FAILED with exit code 2, see {logs['r4-joint']} (")
    assert all("No dataset 'nowhere'" in log.read_text() for log in logs.values())


@pytest.mark.slow
def test_children_end_with_the_command(small):
    launcher = subprocess.Popen(command("--recipe", "all", "--gpu", 0, 1, *small), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline().startswith("r1-llm-only: started")
    assert launcher.stdout.readline().startswith("r2-vision-only: started")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.communicate(timeout=60)[0].splitlines() == ["r1-llm-only: stopped", "r2-vision-only: stopped"]
    assert launcher.returncode == 130


def test_a_folder_has_one_owner(small, tmp_path):
    with own(tmp_path / "out/r1-llm-only"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--recipe", "r4", "r1", *small)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == ""
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert done.stderr.startswith(
        f"helpers.train_recipe: error: {tmp_path}/out/r1-llm-only is in use by {owner}: wait"
    )
    assert len(done.stderr.splitlines()) == 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # seconds of work
    assert not (tmp_path / "out/r4-joint").exists()
    with own(tmp_path / "out/r1-llm-only"):  # free again
        pass


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused_in_a_line(small, tmp_path, capsys):
    folder = tmp_path / "out/r1-llm-only"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"precision": "bf16"}')
    with pytest.raises(SystemExit) as stopped:
        main(["--recipe", "r1-llm-only", *small])
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "holds another run: " in told
    assert "precision was 'bf16', is 'nf4'" in told


def test_processes_of_torchrun_do_not_delete_under_each_other(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="--again deletes a folder, which torchrun's processes share"):
        options_of("--recipe", "r4-joint", "--again")
