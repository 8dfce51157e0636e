"""Every family with small random checkpoints: the four recipes, evaluation, merging, reloading."""

import re

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, Qwen2VLProcessor

from helpers.benchmark import build_processor
from helpers.boxes import resized_size
from helpers.conversation import create_task, write_answer
from helpers.data import load_splits, read_row
from helpers.deployment import save_merged
from helpers.detection import add_answer, evaluate_detector, to_record
from helpers.generation import Answer
from helpers.loading import load_model, load_processor
from helpers.recipes import CATALOGUE, LLM_LAYERS, VISION_LAYERS
from helpers.speed import cache_features
from helpers.training import create_detector, evaluate_run, load_detector, run_recipe

PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16}
VISION = {"depth": 3, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
MORE = {
    "qwen2_5_vl": {"window_size": 112, "fullatt_block_indexes": [2]},
    "qwen3_vl": {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]},
}
LAYERS = {  # of one vision block and the paths of its layers that get LoRA
    "qwen2_5_vl": {"attn.qkv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "qwen3_vl": {"attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2"},
}


def build_checkpoint(family, base, folder):
    """A random model of a family, small, with the tiny base's tokenizer and the family's own processor."""
    tiny = Qwen2VLProcessor.from_pretrained(base)
    build_processor(family, tiny).save_pretrained(folder)
    to_id = tiny.tokenizer.convert_tokens_to_ids
    tokens = {f"{kind}_token_id": to_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    tokens |= {f"vision_{place}_token_id": to_id(f"<|vision_{place}|>") for place in ("start", "end")}
    ends = {"eos_token_id": to_id("<|im_end|>"), "pad_token_id": to_id("<|endoftext|>")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tiny.tokenizer), "rope_parameters": rope}
    vision = VISION | MORE[family] | {"patch_size": PATCH[family]}
    config = AutoConfig.for_model(family, text_config=text | ends, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=PATCH)
def checkpoint(request, base, tmp_path_factory):
    return build_checkpoint(request.param, base, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def settings(checkpoint, make_settings, tmp_path_factory):
    small = {"evaluations": 1, "max_new_tokens": 8, "model_id": checkpoint}
    return make_settings(tmp_path_factory.mktemp("out"), **small)


def test_the_patterns_match_the_layers_of_the_family(checkpoint):
    model = load_model(checkpoint, quantized=True, dtype=torch.float32)  # which checks what is in 4 bits
    names = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    vision = [name for name in names if re.fullmatch(VISION_LAYERS, name)]
    assert {name.split(".", 4)[4] for name in vision} == LAYERS[model.config.model_type]
    assert len(vision) == 3 * len(LAYERS[model.config.model_type])
    assert len([name for name in names if re.fullmatch(LLM_LAYERS, name)]) == 2 * 7


def test_the_truth_is_read_back_from_the_answer_that_is_taught(checkpoint, settings):
    splits = load_splits(settings)
    detector = create_detector(load_model(checkpoint, quantized=False, dtype=torch.float32), settings, splits.labels)
    for row in splits.evaluation:
        record = to_record(row, detector.task)
        assert add_answer(record, Answer(write_answer(*read_row(row), detector.task)), detector.task)["iou"] > 0.95


def test_an_image_is_resized_as_the_task_says(checkpoint, settings):
    processor = load_processor(checkpoint, settings.max_pixels)
    task = create_task(processor, ["nutrition-table"], settings)
    image = read_row(load_splits(settings).evaluation[0])[0]
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    width, height = resized_size(*image.size, **task.pixel_budget)
    assert [height, width] == [side * PATCH[task.family] for side in grid[1:]]


def test_kept_features_are_those_that_the_tower_computes(checkpoint, settings, tmp_path):
    visual = load_model(checkpoint, quantized=False, dtype=torch.float32).model.visual
    images = [Image.effect_noise(size, 50).convert("RGB") for size in ((224, 112), (160, 192))]
    processor = load_processor(checkpoint, settings.max_pixels)
    batch = processor.image_processor(images=images, return_tensors="pt")
    inputs = {"hidden_states": batch["pixel_values"], "grid_thw": batch["image_grid_thw"]}
    wanted = visual(**inputs, return_dict=True)
    cache_features(visual, tmp_path)
    for _ in ("computed", "recalled"):
        found = visual(**inputs, return_dict=True)
        torch.testing.assert_close(found.pooler_output, wanted.pooler_output)
        for one, other in zip(found.deepstack_features, wanted.get("deepstack_features", []), strict=True):
            torch.testing.assert_close(one, other)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_recipes_train_evaluate_merge_and_reload(settings, name, tmp_path, capsys):
    splits = load_splits(settings)
    run = run_recipe(CATALOGUE[name], settings, splits)
    assert run.read_recipe()["steps"] == 4
    norms = {"grad_norm_visual", "grad_norm_language_model"}
    logged = {key for key in norms if len(run.read_log(key))}
    assert (
        logged
        == {
            "r1-llm-only": {"grad_norm_language_model"},
            "r2-vision-only": {"grad_norm_visual"},
            "r3-two-stage": {"grad_norm_language_model"},
            "r4-joint": norms,
        }[name]
    )
    assert evaluate_run(run, settings, splits.evaluation)["n"] == 8
    trained = load_detector(run.path, settings, "bf16")
    save_merged(trained, run, tmp_path / "merged")
    merged = load_detector(tmp_path / "merged", settings)
    wanted, found = (evaluate_detector(detector, splits.evaluation) for detector in (trained, merged))
    assert [record["raw"] for record in found] == [record["raw"] for record in wanted]
