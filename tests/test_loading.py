"""Loading: four bits in the language model and nowhere else, and a pixel budget that is kept."""

import pytest
import torch
from PIL import Image

from helpers.loading import best_dtype, check_quantization, load_model, load_processor


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
    with pytest.raises(RuntimeError, match=r"4-bit layers: 42 in all, \['model.visual.blocks.0.mlp.fc1'\]"):
        check_quantization(model, quantized=True)


def test_missing_quantization_is_refused(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    assert linear4bit(model) == []
    with pytest.raises(RuntimeError, match="4-bit layers: 0 in all"):
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
    with pytest.raises(ValueError, match="MAX_PIXELS=100 is under the processor's smallest picture: 3136"):
        load_processor(str(base), 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds on a CPU; this machine has a GPU")
def test_dtype_on_a_cpu():
    assert best_dtype() == torch.float32
