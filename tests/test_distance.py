"""The distance-aware loss: targets near the truth, cross-entropy elsewhere, and an option of every recipe."""

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.loss.loss_utils import ForCausalLMLoss

from helpers.distance import DistanceLoss, spread_digits, with_distance_loss
from helpers.loading import load_model
from helpers.recipes import CATALOGUE
from helpers.training import build_trainer, create_detector, describe_run, load_trained_model, run_recipe

ANSWER = (
    "<|object_ref_start|>nutrition-table 100 g<|object_ref_end|><|box_start|>(9,57),(499,1000)<|box_end|><|im_end|>"
)


@pytest.fixture(scope="module")
def processor(base):
    return AutoProcessor.from_pretrained(base)


def test_first_digit_may_be_that_of_a_near_number():
    first, second, last = spread_digits(499, 4.0)
    assert np.round(first[[3, 4, 5, 6]], 2).tolist() == [0, 0.55, 0.45, 0]
    assert second[9] > 0.95
    assert last[0] < last[8] < last[9]


def test_numbers_stay_as_long_as_they_are():
    """Else 1 would be likelier than 5 for 5: it begins 10, 11 and more."""
    assert spread_digits(5, 4.0).shape == (1, 10)
    assert spread_digits(5, 4.0).argmax() == 5
    assert spread_digits(99, 4.0)[0, 9] > 0.98
    assert spread_digits(1000, 4.0)[0, 1] == 1
    assert np.allclose(spread_digits(3, 4.0).sum(axis=1), 1)


@pytest.mark.parametrize("family", ["processor", "real_processor"])
def test_digits_are_single_tokens_and_found_in_boxes_only(family, request):
    loss = DistanceLoss(request.getfixturevalue(family))
    tokens = request.getfixturevalue(family).tokenizer.encode(ANSWER, add_special_tokens=False)
    places, targets = loss.find_targets(tokens)
    texts = [loss.texts[tokens[place]] for place in places]
    assert "".join(texts) == "9574991000"
    assert len(targets) == len(places)


def test_json_boxes_are_found_too(real_processor):
    loss = DistanceLoss(real_processor)
    tokens = real_processor.tokenizer.encode('[{"bbox_2d": [14, 57, 991, 1012], "label": "e 330"}]')
    places, _ = loss.find_targets(tokens)
    assert "".join(loss.texts[tokens[place]] for place in places) == "14579911012"


def test_without_spread_it_is_cross_entropy(processor):
    tokens = torch.tensor([processor.tokenizer.encode(ANSWER, add_special_tokens=False)])
    labels = torch.cat([torch.full((1, 3), -100), tokens], dim=1)
    logits = torch.randn(1, labels.shape[1], len(processor.tokenizer), generator=torch.Generator().manual_seed(0))
    shifted = torch.cat([logits[:, 1:], logits[:, :1]], dim=1)  # as a model writes them: for the token after
    expected = ForCausalLMLoss(shifted, labels, logits.shape[-1], num_items_in_batch=7)
    assert DistanceLoss(processor, spread=0.01)(logits, labels, 7).item() == pytest.approx(expected.item(), rel=1e-5)


def test_near_digits_cost_less_than_far_ones(processor):
    tokens = processor.tokenizer.encode("(500,57),(900,900)", add_special_tokens=False)
    labels, loss = torch.tensor([tokens]), DistanceLoss(processor)

    def cost(first_digit: str) -> float:
        written = [*tokens]
        written[1] = processor.tokenizer.convert_tokens_to_ids(first_digit)
        return loss(12 * torch.nn.functional.one_hot(torch.tensor([written]), len(loss.texts)).float(), labels).item()

    assert cost("4") < cost("3") - 0.1
    assert cost("3") == pytest.approx(cost("8"))


def test_loss_without_boxes_has_a_gradient(processor):
    labels = torch.tensor([processor.tokenizer.encode("nothing<|im_end|>", add_special_tokens=False)])
    logits = torch.zeros(*labels.shape, len(processor.tokenizer), requires_grad=True)
    DistanceLoss(processor)(logits, labels).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("collator", ["v1-all-tokens", "v2-assistant-only"])
def test_training_computes_the_loss_of_the_right_tokens(collator, make_settings, tmp_path, splits):
    """With a spread of nearly nothing a step is that of cross-entropy, in micro-batches and with padding."""
    settings = make_settings(tmp_path, batch_size=4, micro_batch_size=2)
    detector = create_detector(load_model(settings.model_id, True, torch.float32), settings, splits.labels)
    recipe = replace(CATALOGUE["r1-llm-only"], collator=collator, loss_function=partial(DistanceLoss, spread=0.01))
    trainer = build_trainer(detector, recipe, settings, splits)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    items = (batch["labels"][:, 1:] != -100).sum()
    own = trainer.training_step(trainer.model, dict(batch), items)
    trainer.loss_function = None
    assert own.item() == pytest.approx(trainer.training_step(trainer.model, dict(batch), items).item(), rel=1e-4)


def test_recipe_with_the_loss_trains_and_says_so(make_settings, tmp_path, splits):
    settings = make_settings(tmp_path, max_steps=1, evaluations=1)
    recipe = with_distance_loss(CATALOGUE["r1-llm-only"])
    assert asdict(recipe)["name"] == "r1-llm-only-distance"
    run = run_recipe(recipe, settings, splits)
    assert run.read_recipe()["loss_function"] == "DistanceLoss"
    assert describe_run(CATALOGUE["r1-llm-only"], settings, splits, settings.model_id)["loss_function"] is None
    load_trained_model(run.path)
