"""Agreement of two models' boxes, and the memory of a training by arithmetic."""

import numpy as np
import pytest
import torch

from helpers.loading import build_empty_model, load_model
from helpers.quantization import (
    BITS_IN_NF4,
    PUBLISHED_SIZES,
    bootstrap_agreement,
    build_published_model,
    count_lora_numbers,
    count_scale_bytes,
    estimate_memory,
    measure_agreement,
    score_agreement,
    summarize_memory,
)
from helpers.recipes import CATALOGUE, R1, R2, R4, count_trainables


def record(boxes):
    return {"id": "a", "truth": [], "prediction": [{"label": "t", "box": box} for box in boxes]}


SAME, HALF, NOTHING = record([[0, 0, 10, 10]]), record([[0, 0, 10, 5]]), record([])


# Agreement


def test_agreement_of_two_models():
    assert measure_agreement([SAME, NOTHING], [SAME, NOTHING]) == 1
    assert measure_agreement([HALF, SAME], [SAME, NOTHING]) == 0.25


@pytest.mark.parametrize(
    ("found", "reference", "score"),
    [
        (NOTHING, NOTHING, 1),
        (NOTHING, SAME, 0),
        (SAME, NOTHING, 0),
        (record([[0, 0, 10, 10], [50, 50, 60, 60]]), SAME, 1),  # one too many does not count
        (SAME, record([[0, 0, 10, 10], [50, 50, 60, 60]]), 0.5),  # one that is missing does
    ],
)
def test_agreement_on_one_image(found, reference, score):
    assert score_agreement(found, reference) == score


def test_bootstrapped_agreement_is_paired():
    reference = [SAME] * 4
    draws = bootstrap_agreement([HALF, SAME, SAME, SAME], reference)
    assert draws.min() == 0.5
    assert draws.max() == 1
    assert abs(draws.mean() - 0.875) < 0.01
    assert np.array_equal(draws, bootstrap_agreement([HALF, SAME, SAME, SAME], reference))


def test_agreement_needs_the_same_images():
    with pytest.raises(ValueError, match="zip"):
        measure_agreement([SAME], [SAME, SAME])


# Memory of a model that is loaded


def test_memory_by_area(base):
    table = summarize_memory(load_model(str(base), quantized=True, dtype=torch.float32))
    assert table.index.tolist() == ["visual", "language_model", "lm_head"]
    assert table["layers in 4 bits"].tolist() == ["0 of 26", "42 of 42", "0 of 1"]
    assert table["stored as"].tolist() == ["float32", "float32, uint8", "float32"]
    assert table.megabytes["visual"] == 3_633_600 * 4 / 1e6
    # two of 2,359,296 weights in a byte, the other 102,720 in float32, and the scales
    scales = 2_359_296 / 64 + 42 * 4 * 6  # 8 bits each, and at most 6 scales of scales in a layer of 98,304 weights
    assert table.megabytes["language_model"] == pytest.approx((2_359_296 / 2 + 102_720 * 4 + scales) / 1e6, rel=1e-3)


def test_lm_head_in_four_bits_too(base):
    table = summarize_memory(load_model(str(base), True, torch.float32, kept_modules=["model.visual"]))
    assert table["layers in 4 bits"].tolist() == ["0 of 26", "42 of 42", "1 of 1"]


def test_other_weights_have_no_scales():
    assert count_scale_bytes(torch.nn.Parameter(torch.zeros(64, 64))) == 0


# Arithmetic


def test_bits_in_nf4():
    assert pytest.approx(4.127, abs=1e-4) == BITS_IN_NF4


def test_arithmetic_is_what_a_loaded_model_takes(base):
    loaded = load_model(str(base), quantized=True, dtype=torch.float32)
    scales = sum(map(count_scale_bytes, loaded.parameters()))
    parts = estimate_memory(build_empty_model(str(base)), R1, itemsize=4)
    reckoned = parts["frozen, kept"] + parts["frozen, NF4"]
    assert reckoned == pytest.approx(loaded.get_memory_footprint() + scales, rel=1e-3)


@pytest.mark.parametrize("recipe", [R1, R2, R4], ids=lambda recipe: recipe.name)
def test_trained_numbers_are_those_of_peft(base, recipe):
    parts = estimate_memory(build_empty_model(str(base)), recipe)
    trained = count_trainables(str(base), recipe).loc["total", "trained"]
    assert [parts[key] for key in ("trained, float32", "gradients", "AdamW's averages")] == [
        4 * trained,
        4 * trained,
        8 * trained,
    ]


def test_nothing_is_frozen_without_a_recipe(base):
    assert estimate_memory(build_empty_model(str(base)), None) == {
        "frozen, kept": 0,
        "frozen, NF4": 0,
        "trained, float32": 4 * 6_193_920,
        "gradients": 4 * 6_193_920,
        "AdamW's averages": 8 * 6_193_920,
    }


def test_unquantised_recipe_keeps_all_that_is_frozen(base):
    parts = estimate_memory(build_empty_model(str(base)), R2)
    assert parts["frozen, kept"] == 2 * (6_193_920 - 3_633_600)
    assert parts["frozen, NF4"] == 0


# Published sizes: as transformers counts the checkpoints on the hub


@pytest.mark.parametrize(
    ("size", "parameters"), [("2B", 2_208_985_600), ("7B", 8_291_375_616), ("72B", 73_405_560_320)]
)
def test_published_sizes(size, parameters):
    model = build_published_model(size)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_all_published_sizes_are_tested():
    assert list(PUBLISHED_SIZES) == ["2B", "7B", "72B"]


def test_known_counts_at_7b():
    model = build_published_model("7B")
    trained = {
        name: estimate_memory(model, CATALOGUE[name])["gradients"] / 4 for name in CATALOGUE if name[1] in "124"
    }
    assert trained == {"r1-llm-only": 161_480_704, "r2-vision-only": 675_759_104, "r4-joint": 198_180_864}
    assert [count_lora_numbers(model, recipe) for recipe in (R1, R2, R4)] == [161_480_704, 0, 198_180_864]
