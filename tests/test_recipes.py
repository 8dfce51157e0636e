"""Training: the right weights, in float32, saved, reloaded, and not lost when interrupted."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2VLConfig
from trl import SFTConfig

from helpers.collators import AllTokensCollator, AssistantOnlyCollator
from helpers.conversation import PROMPT
from helpers.data import load_rows, to_training_dataset
from helpers.loading import (
    allocated_megabytes,
    load_model,
    load_processor,
    load_trained_model,
    release_memory,
)
from helpers.recipes import (
    RECIPES,
    IoUAtEvaluation,
    TrainingRecipe,
    apply_freeze_policy,
    build_trainer,
    check_trainable_parameters,
    count_trainables,
    create_training_config,
    get_recipes,
    gradient_norms,
    run_recipe,
    run_two_stage_recipe,
)

R1, R2, R3, R4 = RECIPES.values()
QUESTION = PROMPT.format(label="nutrition table")


@pytest.fixture(scope="module")
def processor(base):
    return load_processor(str(base), 66 * 28 * 28)


@pytest.fixture(scope="module")
def rows(dataset_folder):
    return load_rows(str(dataset_folder), "train", None, 0)


@pytest.fixture(scope="module")
def watch_rows(dataset_folder):
    return load_rows(str(dataset_folder), "val", 2, 0)


@pytest.fixture(scope="module")
def datasets(rows, watch_rows):
    """What to train on, and what to watch."""
    return to_training_dataset(rows, QUESTION, 0.0), to_training_dataset(watch_rows, QUESTION, 0.0)


@pytest.fixture
def watch(processor, watch_rows):
    return [IoUAtEvaluation(processor, watch_rows, QUESTION, batch_size=2)]


def config(folder, variant="run", **changes):
    settings = {
        "learning_rate": 1e-3,
        "num_epochs": 1,
        "max_steps": 4,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "seed": 0,
        "report_to": "none",
    }
    return create_training_config(variant, folder, **settings | changes)


# What a recipe is


def test_the_catalogue():
    assert list(RECIPES) == ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]
    assert R3.stages == ("r2-vision-only", "r1-llm-only")
    assert [recipe.quantized for recipe in (R1, R2, R4)] == [True, False, True]


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"Unknown recipe \['r9'\]: set RECIPES to a list out of \['r1-llm-only'"):
        get_recipes(["r1-llm-only", "r9"])
    with pytest.raises(ValueError, match="set RECIPES to a list"):
        get_recipes([])


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
        ({"train_vision": "full", "quantized": True}, "4-bit weights cannot be saved as a full checkpoint"),
        ({"train_vision": "full", "train_llm": "lora"}, "train one after the other, in stages"),
        ({"train_llm": "lora", "lora_rank": 0}, "positive"),
        ({"train_llm": "lora", "learning_rate": 0.0}, "positive"),
    ],
)
def test_impossible_recipes_are_refused(settings, reason):
    with pytest.raises(ValueError, match=f"Recipe 'mine': .*{reason}"):
        TrainingRecipe("mine", "", **settings)


# What is trained


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
    counts = {name: count_trainables(str(tmp_path), RECIPES[name])["trained"] for name in RECIPES if name != R3.name}
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


@pytest.mark.parametrize(
    ("recipe", "tensors", "parameters"),
    [
        # r * (in + out) per linear layer: q, o 192+192, k, v 192+64, gate, up, down 192+512
        (R1, 6 * 7 * 2, 6 * 64 * (2 * 384 + 2 * 256 + 3 * 704)),
        (R2, 6 * 12 + 1 + 6, 3_633_600),
        # and for the vision blocks: qkv 192+576, fc1, fc2 192+768
        (R4, 6 * 7 * 2 + 6 * 3 * 2, 6 * 64 * (2 * 384 + 2 * 256 + 3 * 704 + 768 + 2 * 960)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_a_recipe_trains_is_in_float32(base, processor, datasets, tmp_path, recipe, tensors, parameters):
    model = load_model(str(base), recipe.quantized, torch.float32)
    trainer = build_trainer(model, processor, recipe, *datasets, config(tmp_path), AssistantOnlyCollator(processor))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trained) == tensors
    assert sum(p.numel() for p in trained) == parameters
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_model_that_trains_elsewhere_is_refused(base, processor, datasets, tmp_path):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    trainer = build_trainer(model, processor, R1, *datasets, config(tmp_path), AssistantOnlyCollator(processor))
    trainer.model.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"unexpectedly trained: \['base_model.model.lm_head.weight'\]"):
        check_trainable_parameters(trainer.model, R1)
    trainer.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"nothing is trained in \['language_model'\]"):
        check_trainable_parameters(trainer.model, R1)


def test_a_frozen_tower_builds_no_graph(base, processor, datasets):
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    apply_freeze_policy(model, R1)
    batch = AssistantOnlyCollator(processor)([datasets[0][0]])
    features = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    assert not features.requires_grad
    apply_freeze_policy(other := load_model(str(base), quantized=False, dtype=torch.float32), R2)
    assert other.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output.requires_grad


def test_joint_training_reaches_both_towers(base, processor, datasets, tmp_path):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    collator = AssistantOnlyCollator(processor)
    trainer = build_trainer(model, processor, R4, *datasets, config(tmp_path), collator)
    trainer.model(**collator([datasets[0][0]])).loss.backward()
    norms = gradient_norms(trainer.model)
    assert set(norms) == {"visual", "language_model"}
    assert min(norms.values()) > 0


def test_training_without_gradient_is_stopped(base, processor, datasets, tmp_path):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    trainer = build_trainer(model, processor, R4, *datasets, config(tmp_path), AssistantOnlyCollator(processor))
    for name, parameter in trainer.model.named_parameters():
        if "visual" in name and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(RuntimeError, match="without any gradient"):
        trainer.train()


def test_data_parallel_is_off_where_several_gpus_are_visible(tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 2))  # what it finds there; here is none
    assert config(tmp_path)._n_gpu == 1


# What is left on disk


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("recipe", [R1, R4], ids=lambda recipe: recipe.name)
def test_an_adapter_is_saved_and_reloads(base, processor, datasets, watch, tmp_path, recipe, gradient_checkpointing):
    settings = config(tmp_path, gradient_checkpointing=gradient_checkpointing)
    settings.load_best_model_at_end = False  # the last one: the best may be the first, which has learned nothing yet
    folder = run_recipe(recipe, str(base), processor, *datasets, settings, AssistantOnlyCollator(processor), watch)
    files = {path.name for path in folder.iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"}
    assert files >= {"trainer_state.json", "recipe.json"}
    assert not [name for name in files if name.startswith("checkpoint")]
    weights = load_file(folder / "adapter_model.safetensors")
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 6 * (7 if recipe is R1 else 10)  # B starts at zero: every adapter has learned something
    model = load_trained_model(folder)
    assert isinstance(model, PeftModel)
    loaded = dict(model.named_parameters())
    for name, tensor in weights.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.slow
def test_a_full_checkpoint_is_saved_and_reloads(base, processor, datasets, watch, tmp_path):
    settings = config(tmp_path)
    settings.load_best_model_at_end = False  # the last one: the best may be the first, which has learned nothing yet
    folder = run_recipe(R2, str(base), processor, *datasets, settings, AssistantOnlyCollator(processor), watch)
    assert (folder / "model.safetensors").exists()
    assert not (folder / "adapter_config.json").exists()
    assert "visual.patch_embed.proj.weight" in load_file(folder / "model.safetensors")  # the names of the hub
    trained = load_trained_model(folder).state_dict()
    before = load_model(str(base), quantized=False, dtype=torch.float32).state_dict()
    changed = {name.split(".")[1] for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    assert changed == {"visual"}


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first(base, processor, datasets, watch, tmp_path):
    configs = [config(tmp_path / "r3-two-stage", "stage1"), config(tmp_path, "r3-two-stage")]
    collator = AssistantOnlyCollator(processor)
    folder = run_two_stage_recipe(R3, str(base), processor, *datasets, configs, collator, watch)
    assert folder == tmp_path / "r3-two-stage"
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "stage1")
    first = load_file(folder / "stage1/model.safetensors")["visual.patch_embed.proj.weight"]
    assert torch.equal(load_trained_model(folder).get_base_model().model.visual.patch_embed.proj.weight, first)
    # a checkpoint takes the place of the first stage
    again = [config(tmp_path / "again", "stage1"), config(tmp_path, "again")]
    run_two_stage_recipe(R3, str(base), processor, *datasets, again, collator, watch, folder / "stage1")
    assert not (tmp_path / "again/stage1").exists()
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("r3-two-stage", "again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [R1, R2], ids=lambda recipe: recipe.name)
def test_interrupted_training_goes_on(base, processor, datasets, watch, tmp_path, capsys, recipe):
    train, watched = datasets
    seen = []

    def interrupting(batch):
        seen.append(1)
        if len(seen) > 4:  # one look at the data, then a batch per step, one of them ahead
            raise KeyboardInterrupt
        return train.format["format_kwargs"]["transform"](batch)

    collator = AssistantOnlyCollator(processor)
    arguments = (recipe, str(base), processor)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(*arguments, train.with_transform(interrupting), watched, config(tmp_path), collator, watch)
    folder = tmp_path / "run"
    left = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    run_recipe(*arguments, train, watched, config(tmp_path), collator, watch)
    assert f"going on from {left}" in capsys.readouterr().out
    assert '"global_step": 4' in (folder / "trainer_state.json").read_text()
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_resumed_full_training_has_the_weights_of_its_checkpoint(base, processor, datasets, watch, tmp_path):
    model = load_model(str(base), R2.quantized, torch.float32)
    collator = AssistantOnlyCollator(processor)
    trainer = build_trainer(model, processor, R2, *datasets, config(tmp_path), collator, watch)
    trainer.train()
    checkpoint = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    wanted = load_file(checkpoint / "model.safetensors")
    assert {name.split(".")[1] for name in wanted} == {"visual"}  # a checkpoint holds what is trained
    fresh = load_model(str(base), R2.quantized, torch.float32)
    other = build_trainer(fresh, processor, R2, *datasets, config(tmp_path), collator, watch)
    other._load_from_checkpoint(str(checkpoint))
    loaded = dict(other.model.named_parameters())
    for name, tensor in wanted.items():
        torch.testing.assert_close(loaded[name], tensor)


@pytest.mark.slow
def test_training_reports_loss_gradients_and_iou(base, processor, datasets, watch, tmp_path):
    settings = config(tmp_path, report_to="tensorboard")
    folder = run_recipe(R4, str(base), processor, *datasets, settings, AllTokensCollator(processor), watch)
    log = json.loads((folder / "trainer_state.json").read_text())
    keys = set().union(*log["log_history"])
    assert keys >= {"eval_loss", "eval_mean_iou", "grad_norm_visual", "grad_norm_language_model"}
    ious = [entry["eval_mean_iou"] for entry in log["log_history"] if "eval_mean_iou" in entry]
    assert log["best_metric"] == pytest.approx(max(ious), abs=1e-4)
    assert list(folder.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_memory_is_free_after_each_of_two_recipes(base, processor, datasets, watch, tmp_path):
    collator = AssistantOnlyCollator(processor)

    def megabytes_after(recipe, name):
        # a batch this large leaves hundreds of megabytes where they are not released
        run_recipe(recipe, str(base), processor, *datasets, config(tmp_path, name, batch_size=16), collator, watch)
        release_memory()
        return allocated_megabytes()

    megabytes_after(R1, "first")  # what is loaded once and stays: kernels, caches
    before = allocated_megabytes()
    for recipe in (R2, R4):
        after = megabytes_after(recipe, recipe.name)
        assert after - before < max(0.05 * before, 150), f"{recipe.name}: {before:.0f} -> {after:.0f} MB"
        before = after
