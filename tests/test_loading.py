"""Loading: four bits in the language model and nowhere else, and a pixel budget that is kept."""

import pytest
import torch
from PIL import Image

from helpers.loading import (
    allocated_megabytes,
    area_of,
    best_dtype,
    build_empty_model,
    check_quantization,
    load_model,
    load_processor,
    release_memory,
    summarize_trainables_by_area,
)


def linear4bit(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


def test_only_the_language_model_is_quantized(base):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    quantized = linear4bit(model)
    assert len(quantized) == 6 * 7  # layers x (q, k, v, o, gate, up, down)
    assert all("language_model" in name for name in quantized)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.model.visual.blocks[0].attn.qkv.weight.dtype == torch.float32


def test_quantized_vision_is_refused(base):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    model.model.visual.blocks[0].mlp.fc1 = model.model.language_model.layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match=r"1 of 68 .* wrong precision, first model\.visual\.blocks\.0\.mlp\.fc1"):
        check_quantization(model, quantized=True)


def test_missing_quantization_is_refused(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    assert linear4bit(model) == []
    with pytest.raises(RuntimeError, match="42 of 69 linear layers have the wrong precision"):
        check_quantization(model, quantized=True)


def test_budget_is_the_smaller_of_two(base):
    assert load_processor(str(base), 10**9).image_processor.size["longest_edge"] == 66 * 28 * 28
    processor = load_processor(str(base), 16 * 28 * 28)
    grid = processor.image_processor(images=[Image.new("RGB", (4000, 3000))], return_tensors="pt")["image_grid_thw"]
    assert grid.prod().item() // 4 <= 16


def test_budget_survives_saving(base, tmp_path):
    load_processor(str(base), 16 * 28 * 28).save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), 10**9).image_processor.size["longest_edge"] == 16 * 28 * 28


def test_impossible_budget(base):
    with pytest.raises(ValueError, match="MAX_PIXELS=100 is under the processor's smallest image: 3136"):
        load_processor(str(base), 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds on a CPU; this machine has a GPU")
def test_dtype_on_a_cpu():
    assert best_dtype() == torch.float32


def test_quantization_everywhere_but_in_the_head(base):
    model = load_model(str(base), quantized=True, dtype=torch.float32, kept_modules=["lm_head"])
    assert len(linear4bit(model)) == 26 + 42  # of the vision tower and of the language model
    assert [area_of(name) for name in linear4bit(model)].count("visual") == 26
    assert type(model.lm_head) is torch.nn.Linear


def test_names_and_counts_need_no_weights(base):
    model = build_empty_model(str(base))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    table = summarize_trainables_by_area(model)
    assert table.parameters.to_dict() == {
        "visual": 3_633_600,
        "language_model": 2_462_016,
        "lm_head": 98_304,
        "other": 0,
        "total": 6_193_920,
    }
    assert table.trained["total"] == 6_193_920
    model.model.visual.requires_grad_(False)
    assert summarize_trainables_by_area(model).trained.tolist() == [0, 2_462_016, 98_304, 0, 2_560_320]


def test_areas_are_told_by_the_path():
    assert area_of("model.visual.merger.mlp.0.weight") == "visual"
    assert area_of("base_model.model.model.language_model.layers.3.mlp.up_proj") == "language_model"
    assert area_of("lm_head.weight") == "lm_head"
    assert area_of("score.weight") == "other"


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the memory of the process; this machine has a GPU")
def test_memory_is_counted_and_released():
    release_memory()
    before = allocated_megabytes()
    held = torch.ones(50_000_000)  # 200 MB
    assert 150 < allocated_megabytes() - before < 250
    del held
    release_memory()
    assert abs(allocated_megabytes() - before) < 100
