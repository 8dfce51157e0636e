"""From a recipe and the settings to trained weights on disk.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
import xxhash
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from helpers.collators import COLLATORS
from helpers.conversation import QUESTION, SYSTEM_MESSAGE
from helpers.data import Splits, to_training_dataset
from helpers.detection import evaluate_detector, pixel_budget
from helpers.generation import Detector
from helpers.loading import PACKAGES, area_of, best_dtype, load_model, load_processor, release_memory
from helpers.metrics import summarize
from helpers.recipes import CATALOGUE, TrainingRecipe, apply_freeze_policy, build_lora_config_for_recipe
from helpers.runs import RunFolder, write_file, write_json


def create_detector(model: PreTrainedModel, settings: SimpleNamespace) -> Detector:
    """A model with the base's processor and the settings' limits, asked with QUESTION."""
    processor = load_processor(settings.model_id, settings.max_pixels)
    return Detector(model, processor, QUESTION, settings.max_new_tokens, settings.eval_batch_size)


OPTIMISATION = {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "warmup_steps": 0.03}  # 0.03 of all steps
EXAMPLES = {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
EVALUATIONS = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 0.25, "prediction_loss_only": True}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 0.25, "save_total_limit": 1}  # the last, besides the best
SELECTION = {"load_best_model_at_end": True, "metric_for_best_model": "selection", "greater_is_better": True}


def create_training_config(recipe: TrainingRecipe, settings: SimpleNamespace) -> SFTConfig:
    """TRL's settings for a run, which writes into OUTPUT_DIR/<recipe's name>; precision follows from the hardware."""
    on_gpu, dtype = torch.cuda.is_available(), best_dtype()
    config = SFTConfig(
        output_dir=str(Path(settings.output_dir) / recipe.name),
        run_name=recipe.name,
        learning_rate=recipe.learning_rate,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not on_gpu,  # else torchrun would not connect its processes on a CPU
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        dataloader_num_workers=min(8, os.cpu_count() // 2) if on_gpu else 0,
        seed=settings.seed,
        report_to=settings.report_to,
        logging_steps=5,
        disable_tqdm=True,  # TrainingProgress takes its place
        **OPTIMISATION,
        **EXAMPLES,
        **EVALUATIONS,
        **CHECKPOINTS,
        **SELECTION,
    )
    if config.n_gpu > 1:  # reading it sets it
        config._n_gpu = 1
    return config


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


class DetectionTrainer(SFTTrainer):
    """SFTTrainer that trains a detector, and asks it about `validation_rows` at every evaluation."""

    def __init__(self, detector: Detector, validation_rows: Dataset, **arguments):
        super().__init__(model=detector.model, processing_class=detector.processor, **arguments)
        self.detector, self.validation_rows = replace(detector, model=self.model), validation_rows

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        """The loss as usual, the mean IoU, and `eval_selection`, by which the best checkpoint is chosen."""
        metrics = super().evaluate(*arguments, **options)
        records = evaluate_detector(self.detector, self.validation_rows, show_progress=False)
        mean_iou = summarize(records)["mean_iou"]
        self.log({"eval_mean_iou": mean_iou})
        return metrics | {"eval_mean_iou": mean_iou, "eval_selection": mean_iou - 1e-6 * metrics["eval_loss"]}

    def training_step(self, *arguments, **options) -> torch.Tensor:
        """A step as usual; logs gradient norms by area. Raises RuntimeError where an area gets none, or one of NaN."""
        loss = super().training_step(*arguments, **options)
        if self.accelerator.sync_gradients and self.state.global_step % self.args.logging_steps == 0:
            scaler = self.accelerator.scaler  # in float16 only; it skips steps whose gradients overflow
            scale = scaler.get_scale() if scaler else 1.0
            norms = {area: norm / scale for area, norm in gradient_norms(self.model).items()}
            self.log({f"grad_norm_{area}": norm for area, norm in norms.items()})
            if 0.0 in norms.values() or not (scaler or math.isfinite(sum(norms.values()))):
                remedy = "0: check freezing and LoRA targets; nan or inf: check the loss, precision and padding"
                raise RuntimeError(f"Trained, but without a usable gradient: {norms}. {remedy}.")
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapters as usual; of other models the trained weights, by their names in memory."""
        if isinstance(self.model, PeftModel):
            return super()._save(output_dir, state_dict)
        trained = {name: p.data.contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained, Path(output_dir) / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result) -> None:
        """Raise RuntimeError unless a checkpoint held each trained weight and nothing unknown."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        lost = [*trained.intersection(load_result.missing_keys), *load_result.unexpected_keys]
        if lost:
            raise RuntimeError(f"The checkpoint does not fit what is trained: {lost[:3]}. Delete it to start again.")


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norm of the gradient of all trained parameters, by area."""
    gradients = [(area_of(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    by_area = {area: [gradient for other, gradient in gradients if other == area] for area, _ in gradients}
    return {area: torch.nn.utils.get_total_norm(tensors).item() for area, tensors in by_area.items()}


class TrainingProgress(ProgressCallback):
    """One bar with the latest loss, the same in notebooks, terminals and log files."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=self.current_step, unit="step", mininterval=5)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_prediction_step(self, *arguments, **options):
        """No bar for the validation loss."""


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """xxHash of the bytes of some tensors, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_features(visual: PreTrainedModel, folder: Path) -> None:
    """Let a frozen vision tower compute the features of each image once; they are kept in `folder`.

    Images go through it one at a time and without autocast, so that their features do not depend on the batch.
    """
    compute, weights = visual.forward, hash_tensors(visual.parameters())

    def recall(patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        file = folder / weights / f"{hash_tensors([patches, grid])}.safetensors"
        try:
            return safetensors.torch.load_file(file, device=str(patches.device))["features"]
        except FileNotFoundError:
            with torch.autocast(patches.device.type, enabled=False):
                features = compute(patches, grid_thw=grid).pooler_output
            write_file(file, safetensors.torch.save({"features": features.contiguous()}))
            return features

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **options) -> BaseModelOutputWithPooling:
        images = zip(hidden_states.split(grid_thw.prod(dim=1).tolist()), grid_thw.split(1), strict=True)
        return BaseModelOutputWithPooling(pooler_output=torch.cat([recall(*image) for image in images]))

    visual.forward = forward


def build_trainer(
    detector: Detector, recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits
) -> DetectionTrainer:
    """A trainer for what the recipe trains, in float32. Raises RuntimeError if it would train anything else."""
    apply_freeze_policy(detector.model, recipe)
    if settings.cache_features and recipe.train_vision == "frozen":
        cache_features(detector.model.model.visual, Path(settings.output_dir) / "features")
    for module in detector.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    trainer = DetectionTrainer(
        detector,
        splits.validation,
        args=create_training_config(recipe, settings),
        train_dataset=to_training_dataset(splits.train, detector.prompt, settings.flip_probability),
        eval_dataset=to_training_dataset(splits.validation, detector.prompt, flip_probability=0.0),
        data_collator=COLLATORS[recipe.collator](detector.processor),
        peft_config=build_lora_config_for_recipe(recipe),
        callbacks=[TrainingProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    return trainer


def run_recipe(
    recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: Path | None = None
) -> RunFolder:
    """Train a recipe into OUTPUT_DIR/<its name>, from the base or from the full checkpoint in the folder `start`.

    Of a recipe in two stages the first one goes into the folder's `stage1`; `start` takes its place.
    """
    stages = [CATALOGUE[name] for name in recipe.stages] or [recipe]
    rates = [settings.learning_rates.get(stage.name, stage.learning_rate) for stage in stages]
    stages = [replace(stage, learning_rate=rate) for stage, rate in zip(stages, rates, strict=True)]
    if recipe.stages and start is None:
        stage1 = RunFolder(Path(settings.output_dir) / recipe.name / "stage1")
        if not (stage1.is_trained and find_checkpoint(stage1.path.parent)):
            train(replace(stages[0], name=f"{recipe.name}/stage1"), settings, splits, settings.model_id)
            release_memory()
        start = stage1.path
    return train(replace(stages[-1], name=recipe.name), settings, splits, str(start or settings.model_id))


def train(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str) -> RunFolder:
    """Train a recipe without stages from the weights in `start`; an interrupted run goes on from its checkpoint."""
    run = RunFolder(Path(settings.output_dir) / recipe.name)
    detector = create_detector(load_model(start, recipe.quantized, best_dtype()), settings)
    trainer = build_trainer(detector, recipe, settings, splits)
    if interrupted := find_checkpoint(run.path):
        print(f"going on from {interrupted} (delete it to start again)")
    trainer.train(resume_from_checkpoint=interrupted)
    save_trained(trainer, run, asdict(recipe) | {"started_from": start} | describe_settings(detector, settings))
    trainer.accelerator.free_memory()
    return run


def find_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in a folder, None where there is none."""
    return get_last_checkpoint(folder) if folder.is_dir() else None


def describe_settings(detector: Detector, settings: SimpleNamespace) -> dict:
    """What besides the recipe makes a result: settings, prompt, pixel budget, versions."""
    asked = {"system_message": SYSTEM_MESSAGE, "prompt": detector.prompt}
    versions = {package: importlib.metadata.version(package) for package in [*PACKAGES, "accelerate"]}
    given = json.loads(json.dumps(vars(settings), default=str))
    return asked | {"pixel_budget": pixel_budget(detector.processor), "settings": given, "versions": versions}


def save_trained(trainer: DetectionTrainer, run: RunFolder, provenance: dict) -> None:
    """Write weights, processor, log and provenance; checkpoints of the way are deleted."""
    if not isinstance(trainer.model, PeftModel):
        trainer.model.to(best_dtype())  # trained in float32, used in what it was loaded in
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # under torchrun, others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(run.path)
        trainer.processing_class.save_pretrained(run.path)
        write_json(run.path / "recipe.json", provenance | {"steps": trainer.state.global_step})
        for leftover in run.path.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()  # the next stage reads what the first process wrote


def load_trained_model(folder: Path, quantized: bool | None = None) -> PreTrainedModel:
    """A full checkpoint, or an adapter on its base, in the precision of its training, which `quantized` overrides."""
    quantized = RunFolder(folder).read_recipe()["quantized"] if quantized is None else quantized
    if not (folder / "adapter_config.json").exists():
        return load_model(str(folder), quantized, best_dtype()).eval()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(load_model(base, quantized, best_dtype()), str(folder))
    return adapted.to(best_dtype()).eval()  # its weights come in float32


def evaluate_run(run: RunFolder, settings: SimpleNamespace, rows: Dataset) -> dict:
    """Load from disk what a training left, evaluate it on the rows, write records and metrics; returns the metrics."""
    detector = create_detector(load_trained_model(run.path), settings)
    return run.write_records(evaluate_detector(detector, rows))
