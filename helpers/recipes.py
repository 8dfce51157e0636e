"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Qwen2VLProcessor, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from helpers.collators import AllTokensCollator, AssistantOnlyCollator
from helpers.evaluation import evaluate_model, write_text
from helpers.loading import (
    area_of,
    best_dtype,
    build_empty_model,
    load_model,
    release_memory,
    summarize_trainables_by_area,
)
from helpers.metrics import summarize

LLM_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION_LAYERS = r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.fc[12])"


@dataclass(frozen=True)
class TrainingRecipe:
    """One way to fine-tune: which weights, in which precision, how fast. Raises ValueError where that cannot work."""

    name: str
    description: str
    quantized: bool = False  # language model in 4-bit NF4
    train_vision: str = "frozen"  # or "lora", or "full": all weights of the vision tower, merger included
    train_llm: str = "frozen"  # or "lora"
    lora_rank: int = 64
    lora_alpha: int = 128
    learning_rate: float = 1e-4  # peak; TRL's default for full fine-tuning (2e-5) is too slow for LoRA
    stages: tuple[str, ...] = ()  # recipes to train one after the other, each from the weights of the one before

    def __post_init__(self):
        trained = (self.train_vision != "frozen") + (self.train_llm != "frozen")
        refusals = {
            "train_vision is frozen, lora or full": self.train_vision not in ("frozen", "lora", "full"),
            "train_llm is frozen or lora": self.train_llm not in ("frozen", "lora"),
            "it either trains something or has stages": bool(trained) == bool(self.stages),
            "4-bit weights cannot be saved as a full checkpoint": self.quantized and self.train_vision == "full",
            "with LoRA, PEFT freezes all other weights: train one after the other, in stages": trained == 2
            and self.train_vision == "full",
            "lora_rank and learning_rate are positive": self.lora_rank < 1 or self.learning_rate <= 0,
        }
        for reason, refused in refusals.items():
            if refused:
                raise ValueError(f"Recipe {self.name!r}: {reason}.")

    @property
    def lora_target_modules(self) -> str | None:
        """Regular expression on the paths of the layers that get LoRA; None without LoRA."""
        towers = {LLM_LAYERS: self.train_llm, VISION_LAYERS: self.train_vision}
        return "|".join(f"({layers})" for layers, mode in towers.items() if mode == "lora") or None


RECIPES = {
    recipe.name: recipe
    for recipe in [
        TrainingRecipe(
            name="r1-llm-only",
            description="QLoRA on the language model, vision tower frozen",
            quantized=True,
            train_llm="lora",
        ),
        TrainingRecipe(
            name="r2-vision-only",
            description="all weights of the vision tower, language model frozen",
            train_vision="full",
            learning_rate=1e-5,
        ),
        TrainingRecipe(
            name="r3-two-stage",
            description="first the vision tower (r2), then the language model (r1) from that checkpoint",
            stages=("r2-vision-only", "r1-llm-only"),
        ),
        TrainingRecipe(
            name="r4-joint",
            description="QLoRA on the language model and LoRA on the vision tower, at once",
            quantized=True,
            train_vision="lora",
            train_llm="lora",
        ),
    ]
}


def get_recipes(names: Sequence[str]) -> list[TrainingRecipe]:
    """Look up recipes by name. Raises ValueError for an unknown or missing name, with the names that exist."""
    unknown = [name for name in names if name not in RECIPES]
    if unknown or not names:
        raise ValueError(f"Unknown recipe {unknown}: set RECIPES to a list out of {sorted(RECIPES)}.")
    return [RECIPES[name] for name in names]


def apply_freeze_policy(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Freeze everything but a vision tower that is trained whole; adapters are added later, by PEFT.

    A frozen tower runs without building a backward graph, which gradient checkpointing would otherwise make it do.
    """
    visual = model.model.visual
    model.requires_grad_(False)
    visual.requires_grad_(recipe.train_vision == "full")
    if recipe.train_vision == "frozen":
        visual.forward = torch.no_grad()(visual.forward)


def build_lora_config_for_recipe(recipe: TrainingRecipe) -> LoraConfig | None:
    """PEFT's settings for a recipe; None where it trains no adapter."""
    if recipe.lora_target_modules is None:
        return None
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=recipe.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def count_trainables(model_id: str, recipe: TrainingRecipe) -> pd.DataFrame:
    """`summarize_trainables_by_area` of a recipe, without loading weights."""
    model = build_empty_model(model_id)
    apply_freeze_policy(model, recipe)
    config = build_lora_config_for_recipe(recipe)
    return summarize_trainables_by_area(model if config is None else get_peft_model(model, config))


def create_training_config(
    variant: str,
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
    """TRL's settings for the run `variant`, which names its folder below `output_dir` and its curve in the tracker.

    Precision and the number of data loader workers follow from the hardware.
    """
    dtype = best_dtype()
    config = SFTConfig(
        output_dir=str(output_dir / variant),
        run_name=variant,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # under 1: a share of all steps
        num_train_epochs=num_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),  # else torchrun would not connect its processes on a CPU
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=min(8, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=0.25,  # under 1: a share of all steps
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=0.25,
        save_total_limit=1,  # the last one, besides the best one
        load_best_model_at_end=True,
        metric_for_best_model="selection",  # see IoUAtEvaluation
        greater_is_better=True,
        seed=seed,
        report_to=report_to,
        disable_tqdm=True,  # TrainingProgress takes its place
    )
    if config.n_gpu > 1:  # reading it sets it
        config._n_gpu = 1
    return config


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


class GradientNorms(TrainerCallback):
    """Logs the gradient norm, after clipping, of each trained area. Raises RuntimeError when an area gets none."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step % args.logging_steps:
            return
        norms = gradient_norms(model)
        self.trainer.log({f"grad_norm_{area}": norm for area, norm in norms.items()})
        if 0.0 in norms.values():
            raise RuntimeError(f"Trained, but without any gradient: {norms}. Check freezing and LoRA targets.")


class IoUAtEvaluation(TrainerCallback):
    """Answers questions about a few pictures at every evaluation; their mean IoU chooses the checkpoint.

    Between checkpoints of the same IoU the loss decides.
    """

    def __init__(self, processor: Qwen2VLProcessor, rows: Dataset, prompt: str, batch_size: int | None):
        self.processor, self.rows, self.prompt, self.batch_size = processor, rows, prompt, batch_size

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        records = evaluate_model(model, self.processor, self.rows, self.prompt, self.batch_size, max_new_tokens=64)
        mean_iou = summarize(records)["mean_iou"]
        metrics["eval_selection"] = mean_iou - 1e-6 * metrics["eval_loss"]
        self.trainer.log({"eval_mean_iou": mean_iou})
        model.train()


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norm of the gradient of all trained parameters, by area."""
    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            area = area_of(name)
            squares[area] = squares.get(area, 0.0) + float(parameter.grad.float().pow(2).sum())
    return {area: square**0.5 for area, square in squares.items()}


def build_trainer(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    recipe: TrainingRecipe,
    train_dataset: Dataset,
    watch_dataset: Dataset,
    config: SFTConfig,
    collator: AllTokensCollator | AssistantOnlyCollator,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """A trainer for what the recipe trains, in float32. Raises RuntimeError if it would train anything else."""
    apply_freeze_policy(model, recipe)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    if recipe.train_vision == "full":
        shrink_checkpoints(model)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=watch_dataset,
        data_collator=collator,
        processing_class=processor,
        peft_config=build_lora_config_for_recipe(recipe),
        callbacks=[TrainingProgress(), GradientNorms(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        callback.trainer = trainer
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    return trainer


def shrink_checkpoints(model: PreTrainedModel) -> None:
    """Save what is trained and nothing else, by its names in memory, by which the Trainer reads checkpoints back.

    By default a checkpoint holds all weights under the names of the hub, of which the Trainer recognises none.
    """
    model._keys_to_ignore_on_save = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)


def check_trainable_parameters(model: torch.nn.Module, recipe: TrainingRecipe) -> None:
    """Raise RuntimeError unless the recipe's areas are trained, in float32, and nothing else is."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    full = r"model\.visual\..*" if recipe.train_vision == "full" else "nothing"
    pattern = re.compile(rf"({recipe.lora_target_modules})\.lora_[AB]\..*|{full}")
    strays = [name for name, p in trained.items() if not pattern.fullmatch(name) or p.dtype != torch.float32]
    wanted = {"visual": recipe.train_vision != "frozen", "language_model": recipe.train_llm != "frozen"}
    missing = [area for area, is_trained in wanted.items() if is_trained and area not in map(area_of, trained)]
    if strays or missing:
        raise RuntimeError(f"{recipe.name}: nothing is trained in {missing}, unexpectedly trained: {strays[:3]}.")
    print(f"{recipe.name}: {sum(p.numel() for p in trained.values()):,} trainable parameters")


def load_model_for_recipe(model_id: str, recipe: TrainingRecipe, checkpoint: Path | None = None) -> PreTrainedModel:
    """The model in the precision that the recipe trains it in, with the weights of `checkpoint` if there is one."""
    return load_model(str(checkpoint or model_id), recipe.quantized, best_dtype())


def run_recipe(
    recipe: TrainingRecipe,
    model_id: str,
    processor: Qwen2VLProcessor,
    train_dataset: Dataset,
    watch_dataset: Dataset,
    config: SFTConfig,
    collator: AllTokensCollator | AssistantOnlyCollator,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
) -> Path:
    """Train from `model_id`, or from the weights in `checkpoint`; returns the folder with the result.

    An interrupted run goes on from its last checkpoint. The model lives in this function only: when it returns, its
    memory can be released.
    """
    folder = Path(config.output_dir)
    model = load_model_for_recipe(model_id, recipe, checkpoint)
    trainer = build_trainer(model, processor, recipe, train_dataset, watch_dataset, config, collator, callbacks)
    interrupted = get_last_checkpoint(folder) if folder.is_dir() else None
    if interrupted:
        print(f"going on from {interrupted} (delete it to start again)")
    trainer.train(resume_from_checkpoint=interrupted)
    save_trained(trainer, recipe, str(checkpoint or model_id))
    trainer.accelerator.free_memory()
    return folder


def save_trained(trainer: SFTTrainer, recipe: TrainingRecipe, started_from: str) -> None:
    """Write weights, processor, log and provenance; checkpoints of the way are deleted."""
    folder = Path(trainer.args.output_dir)
    if recipe.train_vision == "full":
        trainer.model.to(best_dtype())  # trained in float32, used in what it was loaded in
        del trainer.model.save_pretrained  # from here on all weights, by the names that everyone expects
        trainer.model._keys_to_ignore_on_save = set()
    trainer.save_model()
    trainer.save_state()
    provenance = asdict(recipe) | {
        "started_from": started_from,
        "learning_rate": trainer.args.learning_rate,
        "steps": trainer.state.global_step,
    }
    trainer.accelerator.wait_for_everyone()  # under torchrun, others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        write_text(folder / "recipe.json", json.dumps(provenance, indent=2) + "\n")
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()  # the next stage reads what the first process wrote


def run_two_stage_recipe(
    recipe: TrainingRecipe,
    model_id: str,
    processor: Qwen2VLProcessor,
    train_dataset: Dataset,
    watch_dataset: Dataset,
    configs: Sequence[SFTConfig],
    collator: AllTokensCollator | AssistantOnlyCollator,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
) -> Path:
    """Train the recipe's two stages, the second from the weights of the first; returns the second one's folder.

    With `checkpoint`, a folder that holds a full checkpoint, the first stage is taken from there. Where the second
    stage was interrupted, the first one is there already.
    """
    first, second = get_recipes(recipe.stages)
    shared = (model_id, processor, train_dataset, watch_dataset)
    folders = [Path(config.output_dir) for config in configs]
    if folders[1].is_dir() and get_last_checkpoint(folders[1]) and (folders[0] / "recipe.json").exists():
        checkpoint = checkpoint or folders[0]
    if checkpoint is None:
        checkpoint = run_recipe(first, *shared, configs[0], collator, callbacks)
        release_memory()
    return run_recipe(second, *shared, configs[1], collator, callbacks, checkpoint)
