"""The base that ships with the repository is what its model card says."""

import json

import pytest
import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from helpers.boxes import to_grid
from helpers.collators import AllTokensCollator, AssistantOnlyCollator
from helpers.conversation import PROMPT, Task, format_answer, to_conversation
from helpers.loading import load_model, load_processor
from helpers.tiny import pretrain
from helpers.tiny.packages import LABELS, TABLE_LABEL, draw_package

TASK = Task(PROMPT.format(label="nutrition table"))


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


def test_its_card_is_the_one_that_is_written(base, tmp_path):
    (tmp_path / "training.json").write_bytes((base / "training.json").read_bytes())
    scores = json.loads((base / "scores.json").read_text())
    with torch.device("meta"):
        model = pretrain.build_model(pretrain.build_tokenizer())
    pretrain.write_model_card(tmp_path, model, pretrain.build_processor(), scores)
    assert (tmp_path / "README.md").read_text() == (base / "README.md").read_text()
    assert (tmp_path / "scores.json").read_text() == (base / "scores.json").read_text()


def test_its_head_knows_the_words_of_prompts(base):
    """With the loss on answers alone this was 17 nats; 6.1 is chance."""
    processor = load_processor(str(base), 10**9)
    examples = []
    for seed in range(2_000_000_000, 2_000_000_004):
        image, objects = draw_package(seed)
        answer = format_answer([TABLE_LABEL], [to_grid(dict(objects)[TABLE_LABEL], *image.size)])
        examples.append({"image": image, "messages": to_conversation(TASK, answer)})
    batch, answers = AllTokensCollator(processor)(examples), AssistantOnlyCollator(processor)(examples)
    batch["labels"][answers["labels"] != -100] = -100
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    with torch.no_grad():
        assert model(**batch).loss < 0.5


@pytest.mark.slow
def test_its_scores_can_be_reproduced(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    scores = pretrain.score(model, load_processor(str(base), 10**9), range(2_000_000_000, 2_000_000_048), 16)
    assert scores["barcode"]["mean_iou"] > 0.6  # few images: a wide margin
    assert scores[TABLE_LABEL]["mean_iou"] < 0.2
