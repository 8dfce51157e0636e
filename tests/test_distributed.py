"""Two processes, started by torchrun on a CPU, learn and measure what one process does, and share the work.

This file is also what they run: torchrun … tests/test_distributed.py share_images|shard_weights OUTPUT_DIR
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import Trainer

from helpers import detection, loading, speed, training
from helpers.data import load_splits
from helpers.export import ROOT
from helpers.loading import check_placement
from helpers.recipes import CATALOGUE
from helpers.training import evaluate_run, run_recipe

R2 = CATALOGUE["r2-vision-only"]
IMAGES = {"train_samples": 12, "validation_samples": 4, "batch_size": 4}  # two of the four steps are an epoch


@pytest.fixture(scope="module")
def pair(make_settings, tmp_path_factory):
    """The folder in which two processes trained, once uninterrupted and once not, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    settings = make_settings(folder, max_new_tokens=4, **IMAGES)
    (folder / "settings.json").write_text(json.dumps(vars(settings)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return folder, launch([*torchrun, __file__, "share_images", str(folder)])


def launch(command, **environment):
    """What the processes of a command say."""
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def single(make_settings, splits, tmp_path_factory):
    """One process with as many images a step, half of them at once."""
    settings = make_settings(tmp_path_factory.mktemp("single"), max_new_tokens=4, micro_batch_size=2, **IMAGES)
    run = run_recipe(R2, settings, load_splits(settings))
    return run, evaluate_run(run, settings, splits.evaluation)


def largest_difference(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(pair, single, base):
    folder, said = pair
    learned, other = folder / "whole/r2-vision-only", single[0].path
    assert largest_difference(learned, base) > 1e-5
    assert largest_difference(learned, other) < 1e-6  # rounding: other images at once
    assert said.count("2 processes with 2 images each: 4 images a step") == 2 * 3  # three trainings were begun


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(pair, single):
    run, metrics = single
    folder = pair[0] / "whole/r2-vision-only"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    ids = [json.loads(line)["id"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert ids == [record["id"] for record in run.read_records()]
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_mean_iou"] for entry in log if "eval_mean_iou" in entry] == [0, 0, 0, 0, 0]
    for rank in (0, 1):  # 5 validations of 4 images, an evaluation of 8
        assert json.loads((pair[0] / f"asked-{rank}.json").read_text()) == 5 * 2 + 4


@pytest.mark.slow
def test_two_processes_go_on_in_a_later_epoch(pair):
    folder, said = pair
    assert said.count("going on from") == 2
    assert "checkpoint-3" in said
    assert largest_difference(folder / "again/r2-vision-only", folder / "whole/r2-vision-only") == 0


@pytest.mark.slow
@pytest.mark.campaign
def test_sharded_weights_learn_what_whole_ones_learn(single, make_settings, tmp_path):
    settings = make_settings(tmp_path, max_new_tokens=4, micro_batch_size=2, **IMAGES)
    (tmp_path / "settings.json").write_text(json.dumps(vars(settings)))
    fsdp = yaml.safe_load((ROOT / "helpers/fsdp2.yaml").read_text())["fsdp_config"]
    asked = {name.upper(): str(value) for name, value in fsdp.items()} | {"ACCELERATE_USE_FSDP": "true"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    said = launch([sys.executable, __file__, "shard_weights", str(tmp_path)], **asked, **place)
    assert "FSDP was asked for, but accelerate shards on GPUs only: leave it out, or use GPUs." in said
    assert "DistributedType.FSDP" in said
    assert largest_difference(tmp_path / "sharded/r2-vision-only", single[0].path) < 1e-7


def test_a_process_plans_with_its_own_gpu(monkeypatch):
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(speed.torch.cuda, "mem_get_info", lambda gpu: [(3, 8), (5, 8)][gpu])
    assert speed.free_memory() == 8
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert speed.free_memory() == 5


def test_weights_beside_the_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: True)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"))  # where offloaded weights are
    with pytest.raises(RuntimeError, match=r"The GPUs are full: 2 weights are not on them, 0\.weight first\. Free"):
        check_placement(model)


# What the processes do


def count_questions():
    """Count the images that this process asks about."""
    asked, generate = [], detection.generate

    def count(detector, questions):
        asked.append(len(questions["input_ids"]))
        return generate(detector, questions)

    detection.generate = count
    return asked


def run_interrupted(settings, splits):
    """Train until the fourth step, then give up."""
    take_step = training.DetectionTrainer.training_step

    def stop(self, *arguments):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return take_step(self, *arguments)

    training.DetectionTrainer.training_step = stop
    try:
        run_recipe(R2, settings, splits)
    except KeyboardInterrupt:
        training.DetectionTrainer.training_step = take_step


def read_settings(folder, name):
    settings = json.loads((folder / "settings.json").read_text())
    return SimpleNamespace(**settings | {"output_dir": str(folder / name)})


def share_images(folder):
    """Train and measure; train again, with an interruption."""
    whole, again = read_settings(folder, "whole"), read_settings(folder, "again")
    splits, asked = load_splits(whole), count_questions()
    evaluate_run(run_recipe(R2, whole, splits), whole, splits.evaluation)
    (folder / f"asked-{os.environ['RANK']}.json").write_text(json.dumps(sum(asked)))
    run_interrupted(again, splits)
    run_recipe(R2, again, splits)
    torch.distributed.destroy_process_group()


def shard_weights(folder):
    """Be refused, as accelerate shards on GPUs only; then let it take this CPU for one."""
    settings = read_settings(folder, "sharded")
    splits = load_splits(settings)
    try:
        run_recipe(R2, settings, splits)
    except RuntimeError as error:
        print(error)
    accelerate_trainer = Trainer.create_accelerator_and_postprocess

    def create(trainer):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        AcceleratorState._reset_state()
        accelerate_trainer(trainer)
        print(trainer.accelerator.distributed_type)

    Trainer.create_accelerator_and_postprocess = create
    run_recipe(R2, settings, splits)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"share_images": share_images, "shard_weights": shard_weights}[sys.argv[1]](Path(sys.argv[2]))
