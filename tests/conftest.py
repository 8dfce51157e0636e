"""What tests share. No test needs the network: the hub is off for them and for what they start."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

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
    """Qwen2-VL's own processor, rebuilt without a hub: its tokens, its chat template, its picture sizes."""
    from qwen_tokenizer import build_processor  # its imports take seconds, which only these tests should wait for

    return build_processor()


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> Path:
    """A dataset of 24 training and 8 validation pictures."""
    folder = tmp_path_factory.mktemp("data") / "tiny_dataset"
    draw_dataset(folder, train=24, validation=8, seed=1)
    return folder
