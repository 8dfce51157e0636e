"""The base that ships with the repository is what its model card says."""

import json

import pytest
import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from helpers.loading import load_model, load_processor
from helpers.tiny import pretrain
from helpers.tiny.packages import LABELS, TABLE_LABEL


def test_it_is_an_ordinary_checkpoint(base):
    assert (base / "model.safetensors").stat().st_size <= 16_000_000
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    assert sum(p.numel() for p in model.parameters()) == 6_193_920
    processor = AutoProcessor.from_pretrained(base)
    assert processor.image_processor.size["longest_edge"] == 66 * 28 * 28


def test_its_processor_is_the_one_that_is_built(base):
    built = pretrain.build_processor()
    shipped = AutoProcessor.from_pretrained(base)
    assert shipped.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert shipped.image_processor.to_dict() == built.image_processor.to_dict()


def test_its_scores_meet_the_promise(base):
    labels = json.loads((base / "scores.json").read_text())
    assert list(labels) == [*LABELS, TABLE_LABEL]
    assert min(labels[label]["mean_iou"] for label in LABELS) >= 0.75
    assert labels[TABLE_LABEL]["mean_iou"] < 0.2
    assert pretrain.scores_table(labels) in (base / "README.md").read_text()


@pytest.mark.slow
def test_its_scores_can_be_reproduced(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    scores = pretrain.score(model, load_processor(str(base), 10**9), range(2_000_000_000, 2_000_000_048), 16)
    assert scores["barcode"]["mean_iou"] > 0.6  # few pictures: a wide margin
    assert scores[TABLE_LABEL]["mean_iou"] < 0.2
