"""From a recipe and the settings to trained weights on disk.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
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
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from helpers.collators import COLLATORS
from helpers.conversation import create_task
from helpers.data import Mirroring, Splits, to_training_dataset
from helpers.detection import evaluate_detector
from helpers.generation import Detector
from helpers.loading import PACKAGES, area_of, best_dtype, load_model, load_processor, release_memory
from helpers.metrics import summarize
from helpers.recipes import CATALOGUE, TrainingRecipe, apply_freeze_policy, build_lora_config_for_recipe
from helpers.runs import RunFolder, write_json
from helpers.speed import (
    MemoryPlan,
    cache_features,
    can_compile,
    compile_layers,
    convert_to_float8,
    describe_compilation,
    describe_plan,
    free_memory,
    hash_tensors,
    plan_memory,
    split_batch,
    use_packed_attention,
)


def create_detector(model: PreTrainedModel, settings: SimpleNamespace, labels: Sequence[str]) -> Detector:
    """A model with the base's processor and the settings' limits, asked about the labels."""
    processor = load_processor(settings.model_id, settings.max_pixels)
    task = create_task(processor, labels, settings)
    return Detector(model, processor, task, settings.max_new_tokens, settings.eval_batch_size)


OPTIMISATION = {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "warmup_steps": 0.03}  # 0.03 of all steps
EXAMPLES = {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
VALIDATION = {"eval_on_start": True, "eval_strategy": "steps", "prediction_loss_only": True}
CHECKPOINTS = {"save_strategy": "steps"}  # the last and the best are kept: `CheckpointingTrainer`
SELECTION = {"load_best_model_at_end": True, "metric_for_best_model": "selection", "greater_is_better": True}


def create_training_config(recipe: TrainingRecipe, settings: SimpleNamespace, plan: MemoryPlan) -> SFTConfig:
    """TRL's settings for a run, which writes into OUTPUT_DIR/<recipe's name>; precision follows from the hardware."""
    on_gpu, dtype = torch.cuda.is_available(), best_dtype()
    config = SFTConfig(
        output_dir=str(Path(settings.output_dir) / recipe.name),
        run_name=recipe.name,
        learning_rate=recipe.learning_rate,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=max(1, settings.batch_size // int(os.environ.get("WORLD_SIZE", 1))),
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_checkpointing=plan.checkpointing,
        use_cpu=not on_gpu,  # else torchrun would not connect its processes on a CPU
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        dataloader_num_workers=min(8, os.cpu_count() // 2) if on_gpu else 0,
        seed=settings.seed,
        report_to=settings.report_to,
        project=os.environ.get("WANDB_PROJECT", Path(settings.output_dir).resolve().name),  # of trackers
        logging_steps=5,
        disable_tqdm=True,  # TrainingProgress takes its place
        **OPTIMISATION,
        **EXAMPLES,
        eval_steps=min(1 / settings.evaluations, 0.999999),  # of all steps; 1 would be every step
        save_steps=min(1 / settings.evaluations, 0.999999),
        **VALIDATION,
        **CHECKPOINTS,
        **SELECTION,
    )
    if config.n_gpu > 1:  # reading it sets it
        config._n_gpu = 1
    return config


class TrainingProgress(ProgressCallback):
    """One bar with the latest loss, the same in notebooks, terminals and log files; `progress.json` for who watches.

    Tells `mirroring` the epoch.
    """

    def __init__(self, mirroring: Mirroring):
        super().__init__()
        self.mirroring = mirroring

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.mirroring.epoch = int(state.epoch)

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=self.current_step, unit="step", mininterval=5)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
        if state.is_world_process_zero:
            shown = ("loss", "eval_mean_iou")
            latest = {name: entry[name] for entry in state.log_history for name in shown if name in entry}
            progress = {"step": state.global_step, "steps": state.max_steps} | latest
            write_json(Path(args.output_dir) / "progress.json", progress)

    def on_prediction_step(self, *arguments, **options):
        """No bar for the validation loss."""


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


class CheckpointingTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are whole, hold what is trained, and are read back or refused."""

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint gets its name when it is whole; then an older one may go."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.args.output_dir = str(folder / "unfinished")
        super()._save_checkpoint(model, trial)
        self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        self.find_best()
        if self.is_world_process_zero():
            self.state.save_to_json(folder / "unfinished" / name / "trainer_state.json")
            (folder / "unfinished" / name).replace(folder / name)
            rotate_checkpoints(str(folder), 1, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def find_best(self) -> None:
        """Where the best checkpoint is, also after the folder was moved."""
        step = self.state.best_global_step
        self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{step}" if step else None

    def _run_epoch(self, *arguments, **options) -> None:
        """Nothing is left to do where the checkpoint to go on from was that of the last step."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*arguments, **options)
        self.control.should_training_stop = True

    def _finalize_training(self, *arguments):
        self.find_best()
        return super()._finalize_training(*arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapters as usual; of other models the trained weights, by their names in memory.

        Of a sharded model `state_dict` has the whole weights, in the first process only.
        """
        if isinstance(self.model, PeftModel):
            return super()._save(output_dir, state_dict)
        if not self.is_world_process_zero():
            return
        trained = {name: p.data for name, p in self.model.named_parameters() if p.requires_grad}
        if self.is_fsdp_enabled:
            trained = {name: state_dict[name] for name in trained}
        trained = {name: tensor.contiguous() for name, tensor in trained.items()}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained, Path(output_dir) / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result) -> None:
        """Raise RuntimeError unless a checkpoint held each trained weight and nothing unknown."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        lost = [*trained.intersection(load_result.missing_keys), *load_result.unexpected_keys]
        if lost:
            raise RuntimeError(f"The checkpoint does not fit what is trained: {lost[:3]}. Delete it to start again.")


class DetectionTrainer(CheckpointingTrainer):
    """Trains a detector, and asks it about `validation_rows` at every evaluation."""

    def __init__(
        self,
        detector: Detector,
        validation_rows: Dataset,
        micro_batch_size: int,
        loss_function: Callable | None = None,
        **arguments,
    ):
        super().__init__(model=detector.model, processing_class=detector.processor, **arguments)
        self.detector, self.validation_rows = replace(detector, model=self.model), validation_rows
        self.micro_batch_size, self.loss_function = micro_batch_size, loss_function

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        """The loss as usual, the mean IoU, and `eval_selection`, by which the best checkpoint is chosen."""
        with torch.compiler.set_stance("force_eager"):
            metrics = super().evaluate(*arguments, **options)
            records = evaluate_detector(self.detector, self.validation_rows, show_progress=False)
        mean_iou = summarize(records)["mean_iou"]
        self.log({"eval_mean_iou": mean_iou})
        return metrics | {"eval_mean_iou": mean_iou, "eval_selection": mean_iou - 1e-6 * metrics["eval_loss"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The recipe's loss, if it has its own; evaluations keep cross-entropy, in which recipes can be compared."""
        if self.loss_function is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, others = inputs["labels"], {name: inputs[name] for name in inputs if name != "labels"}
        first = max(1, (labels != -100).any(dim=0).nonzero()[0].item())  # no logits before: the vocabulary is large
        logits = model(**others, use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits
        loss = self.loss_function(logits[:, :-1], labels[:, first:], num_items_in_batch)
        return loss * self.accelerator.num_processes  # which share the tokens that were counted; DDP takes the mean

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """A step in micro-batches; logs gradient norms by area. Raises RuntimeError where one is 0, or no number."""
        loss = self.add_gradients(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.state.global_step % self.args.logging_steps == 0:
            scaler = self.accelerator.scaler  # in float16 only; it skips steps whose gradients overflow
            scale = scaler.get_scale() if scaler else 1.0
            norms = {area: norm / scale for area, norm in gradient_norms(self.model).items()}
            self.log({f"grad_norm_{area}": norm for area, norm in norms.items()})
            if 0.0 in norms.values() or not (scaler or math.isfinite(sum(norms.values()))):
                remedy = "0: check freezing and LoRA targets; nan or inf: check the loss, precision and padding"
                raise RuntimeError(f"Trained, but without a usable gradient: {norms}. {remedy}.")
        return loss

    def add_gradients(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Loss of a batch, and its gradients; where memory runs out, once more in micro-batches of half the size."""
        try:
            parts = split_batch(inputs, self.micro_batch_size)
            return sum(super(DetectionTrainer, self).training_step(model, part, num_items_in_batch) for part in parts)
        except torch.cuda.OutOfMemoryError as error:
            if self.micro_batch_size == 1 or self.args.world_size > 1:  # others of torchrun's processes would wait
                remedy = "Lower MICRO_BATCH_SIZE; at 1, set GRADIENT_CHECKPOINTING=True or a lower MAX_PIXELS."
                raise RuntimeError(f"Out of memory with {self.micro_batch_size} images at once. {remedy}") from error
        self.micro_batch_size //= 2
        print(f"out of memory: going on with {self.micro_batch_size} images at once")
        model.zero_grad()
        release_memory()
        return self.add_gradients(model, inputs, num_items_in_batch)


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norm of the gradient of all trained parameters, by area."""
    gradients = [(area_of(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    by_area = {area: [gradient for other, gradient in gradients if other == area] for area, _ in gradients}
    return {area: torch.nn.utils.get_total_norm(tensors).item() for area, tensors in by_area.items()}


def build_trainer(
    detector: Detector, recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits
) -> DetectionTrainer:
    """A trainer for what the recipe trains, in float32. Raises RuntimeError if it would train anything else."""
    model = detector.model
    apply_freeze_policy(model, recipe)
    use_packed_attention(model)
    if settings.cache_features and recipe.train_vision == "frozen":
        cache_features(model.model.visual, Path(settings.output_dir) / "features")
    plan = plan_memory(detector, recipe, settings, free_memory())
    mirroring = Mirroring(settings.flip_probability, settings.seed)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    trainer = DetectionTrainer(
        detector,
        splits.validation,
        plan.micro_batch_size,
        recipe.loss_function and recipe.loss_function(detector.processor),
        args=create_training_config(recipe, settings, plan),
        train_dataset=to_training_dataset(splits.train, detector.task, mirroring),
        eval_dataset=to_training_dataset(splits.validation, detector.task, Mirroring()),
        data_collator=COLLATORS[recipe.collator](detector.processor),
        peft_config=build_lora_config_for_recipe(recipe),
        callbacks=[TrainingProgress(mirroring)],
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise RuntimeError("FSDP was asked for, but accelerate shards on GPUs only: leave it out, or use GPUs.")
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = f"{trainer.args.output_dir}/tensorboard"  # else named by date and host
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    if recipe.precision == "fp8":
        convert_to_float8(model)
    if can_compile(settings):
        compile_layers(model, recipe)
    print(describe_plan(plan))
    if (processes := trainer.args.world_size) > 1:
        images = trainer.args.per_device_train_batch_size
        print(f"{processes} processes with {images} images each: {processes * images} images a step")
    return trainer


def describe_run(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str) -> dict:
    """All that makes a result: recipe, task, settings, the weights it starts from, data, versions."""
    task = create_task(load_processor(settings.model_id, settings.max_pixels), splits.labels, settings)
    names = "num_epochs", "max_steps", "batch_size", "evaluations", "flip_probability", "max_new_tokens", "seed"
    made = {"started_from": start, "base_hash": hash_weights(start)}
    made["lora_target_modules"] = recipe.lora_target_modules
    made["loss_function"] = recipe.loss_function and recipe.loss_function.__name__
    made["schedule"] = {name: getattr(settings, name) for name in names}
    made["rows"] = {"train": hash_rows(splits.train), "validation": hash_rows(splits.validation)}
    given = json.loads(json.dumps(vars(settings), default=str))
    versions = {package: importlib.metadata.version(package) for package in [*PACKAGES, "accelerate"]}
    return asdict(recipe) | asdict(task) | made | {"settings": given, "versions": versions}


def hash_rows(rows: Dataset) -> str:
    """xxHash of the ids and objects of rows; images are told apart by their ids."""
    digest = xxhash.xxh3_128()
    for image_id, objects in zip(rows["image_id"], rows["objects"], strict=True):
        digest.update(f"{image_id} {objects}".encode())
    return digest.hexdigest()


def hash_weights(folder: str) -> str:
    """xxHash of the weights in a folder's safetensors files; of a hub id, that id."""
    files = [str(file) for file in sorted(Path(folder).glob("*.safetensors"))]
    read = (torch.from_file(file, size=os.path.getsize(file), dtype=torch.uint8) for file in files)
    return hash_tensors(read) if files else folder


def run_recipe(
    recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: Path | None = None
) -> RunFolder:
    """Train a recipe into OUTPUT_DIR/<its name>, from the base or from the full checkpoint in the folder `start`.

    Of a recipe in two stages the first one goes into the folder's `stage1`; `start` takes its place.
    """
    stages = [adjust(CATALOGUE[name], settings) for name in recipe.stages] or [adjust(recipe, settings)]
    run = RunFolder(Path(settings.output_dir) / recipe.name)
    if settings.again:
        if Path(start or settings.model_id).resolve().is_relative_to(run.path.resolve()):
            raise ValueError(f"AGAIN deletes {run.path}, and with it the weights to start from: move those elsewhere.")
        clear(run.path)
    if recipe.stages and start is None and run.read_state():
        start = run.path / run.read_state()["base"]  # what it was begun from
    if recipe.stages and start is None:
        start = train(replace(stages[0], name=f"{recipe.name}/stage1"), settings, splits, settings.model_id).path
        release_memory()
    return train(replace(stages[-1], name=recipe.name), settings, splits, str(start or settings.model_id))


def adjust(recipe: TrainingRecipe, settings: SimpleNamespace) -> TrainingRecipe:
    """A recipe with the learning rate, precision and rank that the settings name for it, if they do."""
    changes = {"learning_rate": float(settings.learning_rates.get(recipe.name, recipe.learning_rate))}
    if settings.precision and recipe.train_llm == "lora":
        changes["precision"] = settings.precision
    if settings.lora_rank:
        changes |= {"lora_rank": settings.lora_rank, "lora_alpha": 2 * settings.lora_rank}
    return replace(recipe, **changes)


def train(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str) -> RunFolder:
    """Train a recipe without stages from the weights in `start`; what was interrupted goes on, what has ended stays.

    Raises OtherRunError where the folder holds a run with other settings, data or weights.
    """
    run = RunFolder(Path(settings.output_dir) / recipe.name)
    description = describe_run(recipe, settings, splits, start) | {"base": os.path.relpath(start, run.path)}
    run.begin(description)
    if run.is_trained:
        print(f"{recipe.name}: trained already, skipped (AGAIN=True trains it anew)")
        delete_checkpoints(run.path)
        return run
    detector = create_detector(load_model(start, recipe.quantized, best_dtype()), settings, splits.labels)
    trainer = build_trainer(detector, recipe, settings, splits)
    if interrupted := find_checkpoint(run.path):
        print(f"going on from {interrupted}")
        trainer.args.eval_on_start = False
    if settings.report_to == "wandb" and trainer.is_world_process_zero():
        wandb = importlib.import_module("wandb")  # the Trainer would go on with the run of the recipe before
        wandb.finish()
        wandb.init(project=trainer.args.project, name=recipe.name)
    trainer.train(resume_from_checkpoint=interrupted)
    if can_compile(settings):
        print(describe_compilation())
    save_trained(trainer, run, description)
    trainer.accelerator.free_memory()
    return run


def clear(folder: Path) -> None:
    """Delete what a run left."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", "train.log"):  # of the process that does this
            path.unlink()


def find_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in a folder, None where there is none."""
    return get_last_checkpoint(folder) if folder.is_dir() else None


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run, also one that was never finished."""
    for leftover in [*folder.glob("checkpoint-*"), *folder.glob("unfinished")]:
        shutil.rmtree(leftover, ignore_errors=True)


def save_trained(trainer: DetectionTrainer, run: RunFolder, provenance: dict) -> None:
    """Write weights, processor, log and provenance; checkpoints of the way are deleted."""
    if not isinstance(trainer.model, PeftModel):
        trainer.model.to(best_dtype())  # trained in float32, used in what it was loaded in
    trainer.save_state()
    whole = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    trainer.accelerator.wait_for_everyone()  # under torchrun, others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(run.path, state_dict=whole)
        trainer.processing_class.save_pretrained(run.path)
        write_json(run.path / "recipe.json", provenance | {"steps": trainer.state.global_step})
        delete_checkpoints(run.path)
    trainer.accelerator.wait_for_everyone()  # the next stage reads what the first process wrote


def load_trained_model(folder: Path, precision: str | None = None) -> PreTrainedModel:
    """A full checkpoint, or an adapter on its base, in the precision of its training, or in another.

    Raises ValueError where the base's weights are not those that the adapter was trained on.
    """
    saved, is_adapter = RunFolder(folder).read_recipe(), (folder / "adapter_config.json").exists()
    precision, beside = precision or saved["precision"], folder / saved["base"]  # which was moved with it, if it was
    base = str(folder) if not is_adapter else str(beside) if beside.is_dir() else saved["started_from"]
    if is_adapter and "base_hash" in saved and Path(base).is_dir() and hash_weights(base) != saved["base_hash"]:
        raise ValueError(f"{folder} was trained on other weights than those in {base}: bring its base back there.")
    model = load_model(base, precision == "nf4", best_dtype())
    if precision == "nf4" and torch.cuda.is_available() and free_memory() > 5 * model.get_memory_footprint():
        model.dequantize(best_dtype())
    use_packed_attention(model)
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(folder)).to(best_dtype())  # its weights come in float32
    if precision == "fp8":
        convert_to_float8(model)
    return model.eval()


def load_detector(folder: Path, settings: SimpleNamespace, precision: str | None = None) -> Detector:
    """What a training left, asked as it was trained, under the settings' limits."""
    model, task = load_trained_model(folder, precision), RunFolder(folder).read_task()
    processor = load_processor(str(folder), settings.max_pixels)
    return Detector(model, processor, task, settings.max_new_tokens, settings.eval_batch_size)


def evaluate_run(run: RunFolder, settings: SimpleNamespace, rows: Dataset) -> dict:
    """Load from disk what a training left, evaluate it on the rows, write records and metrics; returns the metrics.

    Nothing is loaded where that was done already.
    """
    file = run.path / "metrics.json"
    limits = {"max_new_tokens": settings.max_new_tokens, "max_pixels": settings.max_pixels}
    about = limits | {"rows": hash_rows(rows)}
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("about") == about:
        return known
    records = evaluate_detector(load_detector(run.path, settings), rows)
    if int(os.environ.get("RANK", 0)) > 0:  # of torchrun's processes, which had a share each, the first one writes
        return summarize(records)
    return run.write_records(records, about)
