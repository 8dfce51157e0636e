"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Qwen2VLProcessor, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from helpers.collators import AssistantOnlyCollator
from helpers.loading import best_dtype, load_model

LLM_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class TrainingRecipe:
    """One way to fine-tune: which weights, in which precision, how fast."""

    name: str
    description: str
    quantized: bool  # language model in 4-bit NF4
    lora_target_modules: str  # regular expression on module paths
    lora_rank: int = 64
    lora_alpha: int = 128
    learning_rate: float = 1e-4  # peak; TRL's default for full fine-tuning (2e-5) is too slow for LoRA


RECIPES = {
    recipe.name: recipe
    for recipe in [
        TrainingRecipe(
            name="r1-llm-only",
            description="QLoRA on the language model, vision tower frozen",
            quantized=True,
            lora_target_modules=LLM_LAYERS,
        ),
    ]
}


def get_recipes(names: Sequence[str]) -> list[TrainingRecipe]:
    """Look up recipes by name. Raises ValueError for an unknown or missing name, with the names that exist."""
    unknown = [name for name in names if name not in RECIPES]
    if unknown or not names:
        raise ValueError(f"Unknown recipe {unknown}: set RECIPES to a list out of {sorted(RECIPES)}.")
    return [RECIPES[name] for name in names]


def to_training_arguments(
    output_dir: Path,
    learning_rate: float,
    num_epochs: float,
    max_steps: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    gradient_checkpointing: bool,
    seed: int,
    report_to: str,
) -> SFTConfig:
    """TRL's settings for every recipe; precision follows from the hardware."""
    dtype = best_dtype()
    return SFTConfig(
        output_dir=str(output_dir),
        run_name=output_dir.name,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # under 1: a share of all steps
        num_train_epochs=num_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=min(8, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="steps",
        save_steps=0.25,  # under 1: a share of all steps
        save_total_limit=1,
        seed=seed,
        report_to=report_to,
        disable_tqdm=True,  # TrainingProgress takes its place
    )


class TrainingProgress(TrainerCallback):
    """A bar with the latest loss that reads the same in notebooks, terminals and log files."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=5)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def build_trainer(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    recipe: TrainingRecipe,
    dataset: Dataset,
    arguments: SFTConfig,
) -> SFTTrainer:
    """A trainer with LoRA adapters where the recipe wants them, in float32. Raises RuntimeError if they are not."""
    freeze_vision(model)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=AssistantOnlyCollator(processor),
        processing_class=processor,
        peft_config=LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules=recipe.lora_target_modules,
            task_type="CAUSAL_LM",
        ),
        callbacks=[TrainingProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    return trainer


def freeze_vision(model: PreTrainedModel) -> None:
    """No gradients for the vision tower, and none through it (checkpointing would otherwise build its graph)."""
    visual = model.model.visual
    visual.requires_grad_(False)
    visual.forward = torch.no_grad()(visual.forward)


def check_trainable_parameters(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Raise RuntimeError unless something is trained, in float32, and only in the recipe's modules."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pattern = re.compile(recipe.lora_target_modules + r"\.lora_[AB]\..*")
    strays = [name for name, p in trained.items() if not pattern.fullmatch(name) or p.dtype != torch.float32]
    if strays or not trained:
        raise RuntimeError(f"{recipe.name}: {len(trained)} trainable tensors, unexpected ones: {strays[:3]}.")
    print(f"{recipe.name}: {sum(p.numel() for p in trained.values()):,} trainable parameters")


def train_recipe(
    recipe: TrainingRecipe,
    model_id: str,
    processor: Qwen2VLProcessor,
    dataset: Dataset,
    arguments: SFTConfig,
) -> None:
    """Train and save adapter, processor and training log into `arguments.output_dir`; resumes an interrupted run."""
    folder = Path(arguments.output_dir)
    model = load_model(model_id, recipe.quantized, best_dtype())
    trainer = build_trainer(model, processor, recipe, dataset, arguments)
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint:
        print(f"going on from {checkpoint} (delete it to start again)")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    for leftover in folder.glob("checkpoint-*"):
        shutil.rmtree(leftover)


def load_trained_model(model_id: str, recipe: TrainingRecipe, folder: Path) -> PreTrainedModel:
    """The base as the recipe loads it, with the trained adapter from `folder` on top."""
    base = load_model(model_id, recipe.quantized, best_dtype())
    return PeftModel.from_pretrained(base, str(folder)).eval()
