"""What tests share. No test needs the network: the hub is off for them and for what they start."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

from helpers.tiny.packages import draw_dataset

ROOT = Path(__file__).parents[1]

# the same cases on every run, and no verdict on how long one takes: a busy machine is no defect
settings.register_profile("project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def base() -> Path:
    """The tiny Qwen2-VL that ships with the repository."""
    return ROOT / "helpers/tiny/base"


@pytest.fixture(scope="session")
def real_processor():
    """Qwen2-VL's own processor, rebuilt without a hub: its tokens, its chat template, its image sizes."""
    from qwen_tokenizer import build_processor  # its imports take seconds, which only these tests should wait for

    return build_processor()


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> Path:
    """A dataset of 24 training and 8 validation images."""
    folder = tmp_path_factory.mktemp("data") / "tiny_dataset"
    draw_dataset(folder, train=24, validation=8, seed=1)
    return folder


@pytest.fixture(scope="session")
def make_settings(base, dataset_folder) -> Callable[..., SimpleNamespace]:
    """The settings of the story by their names, small ones: four steps of two images of the tiny dataset."""

    def make(output_dir: Path, **changes) -> SimpleNamespace:
        names = {"model_id": str(base), "dataset_id": str(dataset_folder), "output_dir": str(output_dir)}
        data = {"train_split": "train", "eval_split": "val", "train_samples": None, "eval_samples": None}
        data |= {"labels": None, "system_message": None, "question": None}
        data |= {"validation_samples": 2, "max_pixels": 66 * 28 * 28, "flip_probability": 0.0}
        steps = {"num_epochs": 1, "max_steps": 4, "batch_size": 2, "micro_batch_size": None}
        steps |= {"gradient_checkpointing": None, "compile": None, "precision": None, "cache_features": True}
        steps |= {"learning_rates": {}, "lora_rank": None, "evaluations": 4}
        steps |= {"seed": 0, "again": False, "report_to": "none"}
        answers = {"eval_batch_size": 2, "max_new_tokens": 40}
        return SimpleNamespace(**names | data | steps | answers | changes)

    return make


@pytest.fixture(scope="module")
def splits(make_settings, tmp_path_factory):
    """The splits of the tiny dataset, as `make_settings` makes them."""
    from helpers.data import load_splits

    return load_splits(make_settings(tmp_path_factory.mktemp("unused")))
