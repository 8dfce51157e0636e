"""Preflight: what would train wrongly without a word is refused before the first step, with cause and remedy."""

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from helpers import conversation, preflight, recipes, training
from helpers.collators import COLLATORS, add_labels, find_assistant_tokens, find_text_tokens, to_batch
from helpers.loading import load_model
from helpers.preflight import PreflightError, check_recipe, main
from helpers.recipes import CATALOGUE

R1, R2, R3, R4 = CATALOGUE.values()

pytestmark = pytest.mark.slow


@pytest.fixture
def refused(make_settings, splits, tmp_path, capsys):
    """The lines with which a recipe is refused."""

    def check(recipe, **changes):
        with pytest.raises(PreflightError) as stopped:
            check_recipe(recipe, make_settings(tmp_path, max_new_tokens=64, **changes), splits)
        return str(stopped.value).splitlines()

    return check


@pytest.fixture
def collate(monkeypatch):
    """Let recipes use another mask of what is trained."""

    def use(find_trained):
        def build(processor):
            return lambda examples: add_labels(to_batch(examples, processor), find_trained, processor.tokenizer)

        monkeypatch.setitem(COLLATORS, "v2-assistant-only", build)

    return use


# What is trained


def test_a_lora_pattern_that_matches_one_tower_only(refused, monkeypatch):
    monkeypatch.setattr(recipes, "VISION_LAYERS", r".*vision_tower\.blocks\.\d+\.attn\.qkv")
    assert refused(R4) == [
        "r4-joint: r4-joint: nothing is trained in ['visual'], unexpectedly trained: []. "
        "Compare its LoRA pattern with the model's layers, and what is frozen"
    ]


def test_a_lora_pattern_that_matches_some_blocks_only(refused, monkeypatch):
    monkeypatch.setattr(recipes, "VISION_LAYERS", r".*visual\.blocks\.[01]\.attn\.qkv")
    assert refused(R4) == [
        "r4-joint: 2 of 6 blocks of visual are trained. "
        "Compare its LoRA pattern with the model's layers, and what is frozen"
    ]


def test_a_block_that_was_frozen_by_mistake(refused, monkeypatch):
    def freeze(model, recipe):
        recipes.apply_freeze_policy(model, recipe)
        model.model.visual.blocks[3].requires_grad_(False)

    monkeypatch.setattr(training, "apply_freeze_policy", freeze)
    found = refused(R2)
    assert found[0].startswith("r2-vision-only: 3,188,")
    assert "numbers are trained, not 3,633,600 as it says. Compare its LoRA pattern" in found[0]
    assert found[1].startswith("r2-vision-only: 5 of 6 blocks of visual are trained. ")


def test_a_tower_that_no_gradient_reaches(refused, monkeypatch):
    def freeze(model, recipe):
        recipes.apply_freeze_policy(model, recipe)
        visual = model.model.visual
        visual.forward = torch.no_grad()(visual.forward)

    monkeypatch.setattr(training, "apply_freeze_policy", freeze)
    assert refused(R4)[0].startswith("r4-joint: gradients reach {'language_model': ")
    assert "they should reach ['language_model', 'visual']. Check freezing" in refused(R4)[0]


def test_a_quantised_vision_tower(refused, monkeypatch):
    kept = partial(load_model, kept_modules=("visual",))  # the name that transformers 4 knew
    monkeypatch.setattr(preflight, "load_model", kept)
    assert refused(R1) == [
        "r1-llm-only: 27 layers are in nf4 that must not be, first "
        "base_model.model.model.visual.blocks.0.attn.qkv. Compare KEPT_MODULES with the paths of the model's modules"
    ]


def test_weights_that_are_not_numbers(refused, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.2.mlp.up_proj" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = refused(R2, model_id=str(folder))
    assert len(found) == 1
    assert "1 weights hold NaN or infinity, first model.language_model.layers.2.mlp.up_proj.weight. " in found[0]


# What is learned


def test_a_collator_that_masks_the_end(refused, collate):
    def find(input_ids, tokenizer):
        return find_assistant_tokens(input_ids, tokenizer) & (input_ids != tokenizer.eos_token_id)

    collate(find)
    found = refused(R2)
    assert " do not end with <|im_end|>: '<|object_ref_start|>nutrition-table<|object_ref_end|>" in found[0]
    assert found[0].endswith(" The model would not learn to stop: see the collator")


@pytest.mark.parametrize("places", [1, -1])
def test_a_collator_that_is_off_by_a_token(refused, collate, places):
    collate(lambda input_ids, tokenizer: find_assistant_tokens(input_ids, tokenizer).roll(places, dims=1))
    cause = {1: "are not the answer alone", -1: "do not end with <|im_end|>"}[places]
    assert cause in refused(R2)[0]


def test_a_collator_that_trains_the_question(refused, collate):
    collate(find_text_tokens)
    assert " hold more than the answer: " in refused(R2)[0]


@pytest.mark.parametrize(
    ("convert", "cause"),
    [
        (lambda box, *size: conversation_boxes(box, *size)[1::-1] + conversation_boxes(box, *size)[:1:-1], "swapped"),
        (lambda box, *size: [*map(round, box)], "in another convention"),
    ],
)
def test_boxes_in_another_convention(refused, monkeypatch, convert, cause):
    monkeypatch.setattr(conversation, "to_model_coordinates", convert)
    found = refused(R2)
    assert "the labels' boxes are not those of its row, " in found[0]
    assert cause in found[0]
    assert found[0].endswith("qwen2_vl writes grid: see `write_answer` and FAMILIES")


conversation_boxes = conversation.to_model_coordinates


def test_a_processor_that_ignores_the_pixel_budget(refused, monkeypatch):
    monkeypatch.setattr(
        training, "load_processor", lambda model_id, max_pixels: AutoProcessor.from_pretrained(model_id)
    )
    found = refused(R2, max_pixels=16 * 28 * 28)
    assert " is 196 x 252 pixels, MAX_PIXELS=12544. Its processor ignores the budget: " in found[0]


# The command


def test_what_is_right_passes_and_leaves_nothing(base, dataset_folder, tmp_path, capsys):
    paths = ["--model-id", str(base), "--dataset-id", str(dataset_folder), "--output-dir", str(tmp_path / "out")]
    command = ["--recipe", "r3-two-stage", "r4-joint", *paths, "--validation-samples", "2", "--report-to", "none"]
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight")]
    wanted = [f"preflight, {name}: 0 problems found in" for name in (R2.name, R1.name, R4.name)]
    assert [line.rsplit(" ", 2)[0] for line in lines] == wanted
    assert list((tmp_path / "out").rglob("*")) == []


def test_the_command_tells_what_is_wrong(base, dataset_folder, tmp_path, capsys):
    paths = ["--model-id", str(base), "--dataset-id", str(dataset_folder), "--output-dir", str(tmp_path / "out")]
    command = ["--recipe", "r2-vision-only", *paths, "--validation-samples", "2", "--max-new-tokens", "20"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "error: r2-vision-only: the labels of image " in told
    assert told.endswith(" tokens, MAX_NEW_TOKENS=20. No such answer could be complete: raise it")
