"""Recipes: combinations that cannot work are refused; what each trains is counted without loading weights."""

import dataclasses
import re

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig

from helpers.collators import AssistantOnlyCollator
from helpers.conversation import Task, to_conversation
from helpers.loading import build_empty_model, load_model, load_processor
from helpers.recipes import (
    CATALOGUE,
    LLM_LAYERS,
    VISION_LAYERS,
    TrainingRecipe,
    apply_freeze_policy,
    build_lora_config_for_recipe,
    count_trainables,
)

R1, R2, R3, R4 = CATALOGUE.values()


def test_the_catalogue():
    assert list(CATALOGUE) == ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]
    assert R3.stages == ("r2-vision-only", "r1-llm-only")
    assert [recipe.quantized for recipe in (R1, R2, R4)] == [True, False, True]
    assert {recipe.collator for recipe in CATALOGUE.values()} == {"v2-assistant-only"}


def test_recipes_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        R1.lora_rank = 8


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "either trains something or has stages"),
        ({"train_llm": "lora", "stages": ("r1-llm-only",)}, "either trains something or has stages"),
        ({"train_llm": "full"}, "train_llm is frozen or lora"),
        ({"train_vision": "all"}, "train_vision is frozen, lora or full"),
        ({"train_vision": "full", "precision": "nf4"}, "4-bit or 8-bit weights cannot be saved as a full checkpoint"),
        ({"train_vision": "full", "train_llm": "lora"}, "train one after the other, in stages"),
        ({"train_llm": "lora", "lora_rank": 0}, "positive"),
        ({"train_llm": "lora", "learning_rate": 0.0}, "positive"),
        ({"train_llm": "lora", "collator": "v3"}, "collator is one of v1-all-tokens, v2-assistant-only"),
    ],
)
def test_impossible_recipes_are_refused(settings, reason):
    with pytest.raises(ValueError, match=f"Recipe 'mine': .*{reason}"):
        TrainingRecipe("mine", "", **settings)


def test_trainable_parameters_of_the_7b_model(tmp_path):
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16}
    Qwen2VLConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    counts = {
        name: count_trainables(str(tmp_path), CATALOGUE[name])["trained"] for name in CATALOGUE if name != R3.name
    }
    assert counts[R1.name].to_dict() == {
        "visual": 0,
        "language_model": 161_480_704,
        "lm_head": 0,
        "other": 0,
        "total": 161_480_704,
    }
    assert counts[R2.name]["visual"] == counts[R2.name]["total"] == 675_759_104
    assert counts[R4.name]["visual"] == 36_700_160
    assert counts[R4.name]["total"] == 198_180_864


def test_patterns_separate_the_towers(base):
    names = [name for name, _ in build_empty_model(str(base)).named_modules()]
    llm, vision = ([name for name in names if re.fullmatch(layers, name)] for layers in (LLM_LAYERS, VISION_LAYERS))
    assert len(llm) == 6 * 7
    assert all(name.startswith("model.language_model.layers.") for name in llm)
    assert len(vision) == 6 * 3
    assert {name.rpartition(".")[2] for name in vision} == {"qkv", "fc1", "fc2"}
    # a plain list with "proj", as often seen, would hit the convolution too
    assert "model.visual.patch_embed.proj" in [name for name in names if name.endswith(".proj")]


def test_layers_that_get_lora():
    assert R2.lora_target_modules is None
    assert build_lora_config_for_recipe(R2) is None
    assert R1.lora_target_modules == f"({LLM_LAYERS})"
    assert R4.lora_target_modules == f"({LLM_LAYERS})|({VISION_LAYERS})"
    config = build_lora_config_for_recipe(dataclasses.replace(R1, lora_rank=8, lora_alpha=4))
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 4, f"({LLM_LAYERS})")


def test_a_frozen_tower_builds_no_graph(base):
    processor = load_processor(str(base), 66 * 28 * 28)
    example = {"image": Image.new("RGB", (56, 56)), "messages": to_conversation(Task("?"), "!")}
    batch = AssistantOnlyCollator(processor)([example])

    def features(recipe):
        model = load_model(str(base), quantized=False, dtype=torch.float32)
        apply_freeze_policy(model, recipe)
        return model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output

    assert not features(R1).requires_grad
    assert features(R2).requires_grad
