"""The benchmark runs at its tiny size: stock and ours, then generation."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.benchmark import SHAPES, build_config, count_sizes, main
from helpers.recipes import CATALOGUE
from helpers.speed import count_activations, count_trained

COUNTS = {  # parameters, and those that r1, r2 and r4 train, of the models as published
    "qwen2-vl-2b": [2_208_985_600, 73_859_072, 665_271_296, 110_559_232],
    "qwen2-vl-7b": [8_291_375_616, 161_480_704, 675_759_104, 198_180_864],
    "qwen2.5-vl-3b": [3_754_622_976, 119_734_272, 668_684_288, 159_096_832],
    "qwen2.5-vl-7b": [8_292_166_656, 161_480_704, 676_550_144, 200_843_264],
    "qwen3-vl-2b": [2_127_532_032, 69_730_304, 406_957_056, 91_750_400],
    "qwen3-vl-4b": [4_437_815_808, 132_120_576, 415_347_712, 154_140_672],
    "qwen3-vl-8b": [8_767_123_696, 174_587_904, 576_388_336, 201_406_464],
}


@pytest.mark.slow
def test_what_each_recipe_trains_of_the_published_models(real_processor):
    counted = count_sizes(real_processor.tokenizer).T.to_dict("list")
    assert {name: counted[name] for name in COUNTS} == COUNTS


PEAKS = {  # GiB at most while r1 trained on 16 images at once, activations kept, compiled, on one H200
    "qwen2-vl-2b": 51.5,
    "qwen2-vl-7b": 110.8,
    "qwen2.5-vl-3b": 82.8,
    "qwen2.5-vl-7b": 112.6,
    "qwen3-vl-2b": 40.9,
    "qwen3-vl-4b": 81.4,
    "qwen3-vl-8b": 102.1,
}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "peak"), PEAKS.items())
def test_the_plan_is_above_what_was_measured(real_processor, size, peak):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(SHAPES[size], real_processor.tokenizer))
    recipe = CATALOGUE["r1-llm-only"]
    layers = sum(p.numel() for name, p in model.named_parameters() if "language_model.layers" in name)
    loaded = 0.53 * layers + 2 * (model.num_parameters() - layers)  # NF4 with its scales; bfloat16
    activations = 16 * 2 * count_activations(model, recipe, False, 1280 * 28 * 28)
    planned = (loaded + activations + 16 * count_trained(model, recipe)) / 2**30
    assert peak < planned < 1.2 * peak


@pytest.mark.slow
@pytest.mark.campaign
def test_a_step_of_grpo_is_timed(base, tmp_path, capsys):
    shape = ["--processor", str(base), "--output", str(tmp_path), "--size", "tiny", "--images", "2", "1"]
    main([*shape, "--only", "r5-iou-reward", "--steps", "2", "--batch-size", "1"])
    lines = capsys.readouterr().out.partition("r5-iou-reward, 1 images a step\n")[2].splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["seconds", "step", "1", "2"]
    assert float(lines[2].split()[1]) > 0


@pytest.mark.slow
def test_the_benchmark_at_its_tiny_size(base, tmp_path, capsys):
    shape = ["--processor", str(base), "--output", str(tmp_path), "--size", "tiny", "--images", "8", "4"]
    steps = ["--steps", "3", "--warm-up", "1", "--batch-size", "4", "--batch-sizes"]
    table = main([*shape, *steps, "--only", "r4-joint", "generation"])
    assert table["whose"].tolist() == ["stock", "ours, nf4"]
    assert (table["images/s"] > 0).all()
    losses = table["mean loss"]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    printed = capsys.readouterr().out
    assert "ceiling" in printed
    assert "one by one" in printed
