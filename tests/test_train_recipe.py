"""The command line: the notebook's settings, one recipe here, several in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import psutil
import pytest
import yaml

from helpers.export import SCRIPT
from helpers.train_recipe import (
    NOTEBOOK_ONLY,
    build_parser,
    choose_gpus,
    main,
    own,
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
    return subprocess.run(command(*argv), capture_output=True, text=True, check=False, env=environment, timeout=300)


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


def check_results(folder, *names, weights="adapter_model.safetensors"):
    """The recipes left weights, and metrics that `comparison.json` repeats."""
    comparison = json.loads((folder / "comparison.json").read_text())
    assert list(comparison) == sorted(names)
    for name in names:
        assert comparison[name].items() <= json.loads((folder / name / "metrics.json").read_text()).items()
        assert len((folder / name / "predictions.jsonl").read_text().splitlines()) == 8
        assert (folder / name / ("model.safetensors" if name == "r2-vision-only" else weights)).exists()


# Settings


def test_settings_and_defaults_are_those_of_the_notebook():
    cell = next(cell for cell in jupytext.read(SCRIPT).cells if "parameters" in cell.metadata.get("tags", []))
    wanted = {}
    exec(cell.source.partition("\nDEFAULTS = ")[0], {}, wanted)
    wanted = {name.lower(): value for name, value in wanted.items() if name not in NOTEBOOK_ONLY}
    options = vars(options_of("--recipe", "r1-llm-only"))
    assert set(options) - set(wanted) == {"recipe", "gpu", "checkpoint", "parameters", "learning_rate"}
    assert wanted == {name: options[name] for name in wanted} | {"output_dir": str(options["output_dir"])}
    assert options["learning_rate"] is None


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
    (tmp_path / "file.yaml").write_text("LEARNING_RATES: {r1-llm-only: 2e-3}")  # which YAML takes for a text
    argv = ["--recipe", "all", "--parameters", str(tmp_path / "file.yaml")]
    assert to_settings(options_of(*argv)).learning_rates == {"r1-llm-only": 2e-3}
    assert to_settings(options_of(*argv, "--learning-rate", "0.5")).learning_rates == {
        "r1-llm-only": 0.5,
        "r2-vision-only": 0.5,
        "r3-two-stage": 0.5,
        "r4-joint": 0.5,
    }


# What cannot be


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "r9"], "invalid choice: 'r9' (choose from 'r1-llm-only'"),
        (
            ["--recipe", "r1-llm-only", "--checkpoint", "."],
            "--checkpoint belongs to a recipe in stages (r3-two-stage)",
        ),
        (["--recipe", "r3-two-stage", "--checkpoint", "nowhere"], "give the folder that --recipe r2-vision-only left"),
        (["--recipe", "all", "--checkpoint", "."], "give --recipe one name"),
        (["--recipe", "all", "--parameters", "nowhere.yaml"], "give a YAML file that can be read"),
        (["--recipe", "all", "--max-step", "3"], "unrecognized arguments: --max-step"),
    ],
)
def test_impossible_options(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
def test_one_recipe_leaves_its_results(small, tmp_path, capsys):
    assert main(["--recipe", "r1-llm-only", *small]) == 0
    check_results(tmp_path / "out", "r1-llm-only")
    made = json.loads((tmp_path / "out/r1-llm-only/recipe.json").read_text())
    assert (made["steps"], made["settings"]["validation_samples"]) == (2, 4)
    printed = capsys.readouterr().out
    assert "20 images to train on, 4 for validation, 8 to evaluate on" in printed
    assert '"mean_iou": ' in printed


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
    assert done.stdout.count('"mean_iou": ') == 1  # one process evaluates
    epochs = json.loads((tmp_path / "out/r4-joint/trainer_state.json").read_text())["epoch"]
    assert epochs == 2 * 2 / 20  # steps * images a step, of both processes together / images


# Several recipes


@pytest.mark.slow
def test_each_recipe_has_a_process_a_gpu_and_a_log(small, tmp_path):
    done = run("--recipe", "r1-llm-only", "r2-vision-only", "--gpu", 0, 1, *small)
    assert done.returncode == 0, done.stderr
    check_results(tmp_path / "out", "r1-llm-only", "r2-vision-only")
    lines = done.stdout.splitlines()
    for number, name in enumerate(["r1-llm-only", "r2-vision-only"]):
        log = tmp_path / "out" / name / "train.log"
        assert lines[number] == f"{name}: started on GPU {number}, log in {log}"
        assert '"mean_iou": ' in log.read_text()
        assert any(line.startswith(f"{name}: done, exit code 0 (") for line in lines[2:])


@pytest.mark.slow
def test_a_failure_is_told_and_the_others_still_run(small, tmp_path):
    done = run("--recipe", "r1-llm-only", "r4-joint", "--gpu", 0, *small, "--dataset-id", "nowhere")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for name, (started, ended) in {"r1-llm-only": lines[:2], "r4-joint": lines[2:]}.items():
        log = tmp_path / "out" / name / "train.log"
        assert started == f"{name}: started on GPU 0, log in {log}"
        assert ended.startswith(f"{name}: FAILED with exit code 2, see {log} (")
        assert "No dataset 'nowhere'" in log.read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_children_end_with_the_command(small, sent):
    launcher = subprocess.Popen(
        command("--recipe", "all", "--gpu", 0, 1, *small),
        stdout=subprocess.PIPE,
        text=True,
        # where pytest itself was started in the background, SIGINT is ignored, and so it would be here
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert launcher.stdout.readline().startswith("r1-llm-only: started")
    assert launcher.stdout.readline().startswith("r2-vision-only: started")
    launcher.send_signal(sent)
    assert launcher.communicate(timeout=60)[0].splitlines() == ["r1-llm-only: stopped", "r2-vision-only: stopped"]
    assert launcher.returncode == 130


def test_no_child_is_left_when_the_command_is_killed(small):
    launcher = subprocess.Popen(command("--recipe", "all", "--gpu", 0, 1, *small), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline().startswith("r1-llm-only: started")
    assert launcher.stdout.readline().startswith("r2-vision-only: started")
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    launcher.kill()
    launcher.communicate()
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert (len(gone), alive) == (2, [])


def test_a_folder_has_one_owner(small, tmp_path, capsys):
    with own(tmp_path / "out/r1-llm-only"):
        started = time.perf_counter()
        with pytest.raises(SystemExit) as stopped:
            main(["--recipe", "r1-llm-only", *small])
        assert time.perf_counter() - started < 5  # under one where nothing else runs: torch is not imported for it
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"r1-llm-only is in use by process {os.getpid()} on {socket.gethostname()}: wait until it has ended" in told
    with own(tmp_path / "out/r1-llm-only"):  # free again
        pass


def test_a_folder_with_another_run_is_refused_in_a_line(small, tmp_path):
    folder = tmp_path / "out/r1-llm-only"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"precision": "bf16"}')
    done = run("--recipe", "r1-llm-only", *small)
    assert done.returncode == 2
    assert "holds another run: " in done.stderr.splitlines()[-1]
    assert "precision was 'bf16', is 'nf4'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_processes_of_torchrun_do_not_delete_under_each_other(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="--again deletes a folder, which torchrun's processes share"):
        options_of("--recipe", "r4-joint", "--again")
