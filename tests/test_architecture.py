"""What the model consists of: names, shapes and counts, and which layers the patterns of the recipes match."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from helpers.architecture import (
    describe_tree,
    find_modules_by_pattern,
    list_linear_modules,
    list_parameters,
    without_layer_number,
)
from helpers.loading import build_empty_model
from helpers.quantization import build_published_model
from helpers.recipes import LLM_LAYERS, VISION_LAYERS


@pytest.fixture(scope="module")
def model(base):
    return build_empty_model(str(base))


@pytest.fixture(scope="module")
def large():
    return build_published_model("7B")


def test_layer_numbers_are_left_out_and_other_numbers_kept():
    assert without_layer_number("model.visual.blocks.11.mlp.fc1") == "model.visual.blocks.{i}.mlp.fc1"
    assert without_layer_number("model.language_model.layers.0") == "model.language_model.layers.{i}"
    assert without_layer_number("model.visual.merger.mlp.2.weight") == "model.visual.merger.mlp.2.weight"


def test_tree_writes_equal_layers_once():
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 3) for _ in range(4))
    tree = torch.nn.ModuleDict({"layers": layers, "act": torch.nn.GELU()})
    assert describe_tree(tree, depth=2) == [
        "model (ModuleDict): 36",
        "    layers: 4 layers, 36 in all; each:",
        "        0 (Linear): 9",
    ]
    assert describe_tree(tree, depth=0) == ["model (ModuleDict): 36"]


def test_parameters_of_the_base(model):
    table = list_parameters(model)
    qkv = table.loc["model.visual.blocks.{i}.attn.qkv.weight"]
    assert qkv[["shape", "count", "parameters"]].tolist() == [(576, 192), 6, 6 * 576 * 192]
    assert table.loc["model.visual.merger.mlp.2.weight", "count"] == 1
    assert table["count"].sum() == 154
    assert table.parameters.sum() == 6_193_920
    assert table.share.sum() == pytest.approx(1)


def test_linear_layers_of_the_base(model):
    modules = list_linear_modules(model, prefix="model.language_model")
    assert modules.loc["model.language_model.layers.{i}.self_attn.q_proj"].tolist() == [192, 192, 6]
    assert len(modules) == 7
    assert list_linear_modules(model)["count"].sum() == 69


def test_patterns_separate_the_towers(model):
    llm, vision = find_modules_by_pattern(model, LLM_LAYERS), find_modules_by_pattern(model, VISION_LAYERS)
    assert len(llm) == 6 * 7
    assert all(name.startswith("model.language_model.layers.") for name in llm)
    assert len(vision) == 6 * 3
    assert {name.rpartition(".")[2] for name in vision} == {"qkv", "fc1", "fc2"}


def found_by_peft(model, target_modules):
    config = LoraConfig(target_modules=target_modules)
    return [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]


def test_patterns_match_what_peft_matches(model):
    for pattern in (LLM_LAYERS, VISION_LAYERS, f"({LLM_LAYERS})|({VISION_LAYERS})"):
        assert find_modules_by_pattern(model, pattern) == found_by_peft(model, pattern) != []
    # a plain list with "proj", as often seen, hits the convolution, and no q_proj or o_proj
    found = find_modules_by_pattern(model, r".*\.proj")
    assert found == found_by_peft(model, ["proj"])
    assert found == ["model.visual.patch_embed.proj", *(f"model.visual.blocks.{i}.attn.proj" for i in range(6))]


def test_qwen2_vl_7b(large):
    assert {parameter.device.type for parameter in large.parameters()} == {"meta"}
    table = list_parameters(large)
    assert table.parameters.sum() == 8_291_375_616
    assert table.parameters[table.index.str.startswith("model.visual")].sum() == 675_759_104


def test_lora_of_rank_64_at_7b(large):
    lora = {name: 64 * sum(large.get_submodule(name).weight.shape) for name, _ in large.named_modules()
            if isinstance(large.get_submodule(name), torch.nn.Linear)}  # fmt: skip
    assert sum(lora[name] for name in find_modules_by_pattern(large, LLM_LAYERS)) == 161_480_704
    assert sum(lora[name] for name in find_modules_by_pattern(large, VISION_LAYERS)) == 36_700_160
