"""Training: the right weights, in float32, saved, reloaded, and not lost when interrupted."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers.conversation import PROMPT
from helpers.data import load_rows, to_training_dataset
from helpers.loading import load_model, load_processor
from helpers.recipes import (
    RECIPES,
    build_trainer,
    check_trainable_parameters,
    get_recipes,
    load_trained_model,
    to_training_arguments,
    train_recipe,
)

R1 = RECIPES["r1-llm-only"]


@pytest.fixture(scope="module")
def processor(base):
    return load_processor(str(base), 66 * 28 * 28)


@pytest.fixture(scope="module")
def dataset(dataset_folder):
    rows = load_rows(str(dataset_folder), "train", None, 0)
    return to_training_dataset(rows, PROMPT.format(label="nutrition table"), 0.0)


def arguments(folder, **changes):
    settings = {
        "output_dir": folder,
        "learning_rate": 1e-3,
        "num_epochs": 1,
        "max_steps": 4,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "seed": 0,
        "report_to": "none",
    }
    return to_training_arguments(**settings | changes)


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"Unknown recipe \['r9'\]: set RECIPES to a list out of \['r1-llm-only'"):
        get_recipes(["r1-llm-only", "r9"])
    with pytest.raises(ValueError, match="set RECIPES to a list"):
        get_recipes([])


def test_recipes_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        R1.lora_rank = 8


def test_trained_parameters_are_lora_on_the_language_model_in_float32(base, processor, dataset, tmp_path):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    trainer = build_trainer(model, processor, R1, dataset, arguments(tmp_path))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 * 7 * 2  # layers x linear layers x (A, B)
    # r * (in + out) per linear layer: q, o 192+192, k, v 192+64, gate, up, down 192+512
    assert sum(p.numel() for p in trained.values()) == 6 * 64 * (2 * 384 + 2 * 256 + 3 * 704)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("language_model" in name for name in trained)


def test_a_model_that_trains_elsewhere_is_refused(base, processor, dataset, tmp_path):
    model = load_model(str(base), quantized=True, dtype=torch.float32)
    trainer = build_trainer(model, processor, R1, dataset, arguments(tmp_path))
    trainer.model.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"unexpected ones: \['base_model.model.lm_head.weight'\]"):
        check_trainable_parameters(trainer.model, R1)
    trainer.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="0 trainable tensors"):
        check_trainable_parameters(trainer.model, R1)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_saves_what_reloads_to_the_trained_model(base, processor, dataset, tmp_path, gradient_checkpointing):
    train_recipe(R1, str(base), processor, dataset, arguments(tmp_path, gradient_checkpointing=gradient_checkpointing))
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"}
    assert "trainer_state.json" in files
    assert not [name for name in files if name.startswith("checkpoint")]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 6 * 7  # B starts at zero: every adapter has learned something
    model = load_trained_model(str(base), R1, tmp_path)
    assert isinstance(model, PeftModel)
    loaded = dict(model.named_parameters())
    for name, tensor in weights.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], tensor)


def test_interrupted_training_goes_on(base, processor, dataset, tmp_path, capsys):
    seen = []

    def interrupting(batch):
        seen.append(1)
        if len(seen) > 4:  # one look at the data, then a batch per step, one of them ahead
            raise KeyboardInterrupt
        return dataset.format["format_kwargs"]["transform"](batch)

    with pytest.raises(KeyboardInterrupt):
        train_recipe(R1, str(base), processor, dataset.with_transform(interrupting), arguments(tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    train_recipe(R1, str(base), processor, dataset, arguments(tmp_path))
    assert f"going on from {tmp_path / 'checkpoint-2'}" in capsys.readouterr().out
    assert '"global_step": 4' in (tmp_path / "trainer_state.json").read_text()
    assert not list(tmp_path.glob("checkpoint-*"))
