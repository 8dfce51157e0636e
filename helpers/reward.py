"""GRPO that rewards the overlap of the boxes that a model writes with the true ones.

Printed from notebooks/07_beyond_sft.py: edit that, then run `make sync`.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from helpers.boxes import flip_horizontally
from helpers.conversation import Task, to_conversation
from helpers.data import Mirroring, Splits, read_row
from helpers.detection import add_answer, evaluate_detector, to_record
from helpers.generation import Answer, Detector
from helpers.loading import best_dtype, load_model
from helpers.metrics import summarize
from helpers.parsing import END_PATTERN
from helpers.recipes import R4, TrainingRecipe, build_lora_config_for_recipe
from helpers.runs import RunFolder
from helpers.speed import MemoryPlan, free_memory, plan_memory, use_packed_attention
from helpers.training import (
    TrainingProgress,
    adjust,
    check_trainable_parameters,
    clear,
    create_detector,
    describe_run,
    hash_weights,
    load_trained_model,
    save_trained,
)

R5 = replace(R4, name="r5-iou-reward", description="GRPO from a trained recipe, rewarded by IoU", learning_rate=1e-5)
GENERATIONS = 8  # answers to each image, which are compared with each other
WEIGHTS = {"iou": 1.0, "format": 1.0, "surplus": 0.5}  # of the rewards


def judge(text: str, record: dict, task: Task) -> dict[str, float]:
    """The rewards of an answer: iou, 0..1; format, -1 where something cannot be read or the end is missing; surplus.

    `iou` is the mean over true boxes, one to one; where there are none, 1 for an answer without boxes. `surplus` is
    minus the number of boxes beyond that of true ones.
    """
    judged = add_answer(record, Answer(text), task)
    surplus = max(0, len(judged["prediction"]) - len(judged["truth"]))
    iou = float(surplus == 0) if judged["iou"] is None else judged["iou"]
    is_whole = not judged["unread"] and END_PATTERN.search(text) is not None
    return {"iou": iou, "format": float(is_whole) - 1.0, "surplus": -float(surplus)}


def build_rewards(processor: ProcessorMixin, task: Task) -> list[Callable]:
    """A function for each of WEIGHTS, as TRL calls it: completions as token ids, `record` of each image."""

    def build(part: str) -> Callable:
        def reward(completion_ids: Sequence[Sequence[int]], record: Sequence[dict], **columns) -> list[float]:
            texts = processor.tokenizer.batch_decode(completion_ids, skip_special_tokens=False)
            return [judge(text, known, task)[part] for text, known in zip(texts, record, strict=True)]

        reward.__name__ = part
        return reward

    return [build(part) for part in WEIGHTS]


def to_prompts(rows: Dataset, task: Task, mirroring: Mirroring) -> Dataset:
    """The rows as lazily built `{"prompt", "image", "record"}` examples."""

    def transform(columns: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        prompts = [to_prompt(row, task, mirroring.applies_to(row["image_id"])) for row in rows]
        return {name: [prompt[name] for prompt in prompts] for name in ("prompt", "image", "record")}

    return rows.with_transform(transform)


def to_prompt(row: dict, task: Task, mirrored: bool = False) -> dict:
    """One dataset row as question, upright image, and what an answer is judged by."""
    record, (image, boxes, _) = to_record(row, task), read_row(row)
    if mirrored:
        image, boxes = flip_horizontally(image, boxes)
        record["truth"] = [known | {"box": box} for known, box in zip(record["truth"], boxes, strict=True)]
    return {"prompt": to_conversation(task), "image": image, "record": record}


class RewardTrainer(GRPOTrainer):
    """GRPO of an adapter; at every evaluation the detector is asked about `validation_rows`, the best one is kept."""

    def __init__(self, detector: Detector, validation_rows: Dataset, **arguments):
        super().__init__(model=detector.model, processing_class=detector.processor, **arguments)
        self.detector, self.validation_rows = replace(detector, model=self.model), validation_rows
        self.best_iou, self.best_weights = -1.0, {}

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        """The mean IoU of greedy answers."""
        records = evaluate_detector(self.detector, self.validation_rows, show_progress=False)
        mean_iou = summarize(records)["mean_iou"]
        self.log({"eval_mean_iou": mean_iou})
        if mean_iou > self.best_iou:
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            self.best_iou, self.best_weights = mean_iou, {name: p.detach().clone() for name, p in trained.items()}
        return {"eval_mean_iou": mean_iou}

    def keep_best(self) -> None:
        """Go back to the weights of the best evaluation."""
        with torch.no_grad():
            for name, weights in self.best_weights.items():
                self.model.get_parameter(name).copy_(weights)


def count_images_at_once(settings: SimpleNamespace) -> int:
    """Images whose answers are written at once: a divisor of BATCH_SIZE within EVAL_BATCH_SIZE answers (or 64)."""
    limit, batch = (settings.eval_batch_size or 64) // GENERATIONS, settings.batch_size
    return max(count for count in range(1, batch + 1) if batch % count == 0 and count <= max(1, limit))


def count_answers_at_once(detector: Detector) -> int:
    """Answers that can be written at once, by half of the free memory, 64 at most.

    Reading a question took 0.47 GiB an answer at the shape of 7B (width 3,584) with 1,003,520 pixels.
    """
    width, pixels = detector.model.config.get_text_config().hidden_size, detector.task.pixel_budget["max_pixels"]
    answer = 2**29 * (width / 3584) * (pixels / 1003520)
    return max(1, min(64, int(free_memory() / 2 / answer)))


def create_reward_config(recipe: TrainingRecipe, settings: SimpleNamespace, plan: MemoryPlan) -> GRPOConfig:
    """TRL's settings for a run: BATCH_SIZE images a step, GENERATIONS answers to each, in batches that fit."""
    completions, dtype = settings.batch_size * GENERATIONS, best_dtype()
    written_at_once = GENERATIONS * count_images_at_once(settings)
    micro_batch_size = math.gcd(plan.micro_batch_size, written_at_once)
    return GRPOConfig(
        output_dir=str(Path(settings.output_dir) / recipe.name),
        run_name=recipe.name,
        learning_rate=recipe.learning_rate,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=GENERATIONS,
        gradient_accumulation_steps=completions // micro_batch_size,
        steps_per_generation=written_at_once // micro_batch_size,
        num_generations=GENERATIONS,
        max_completion_length=settings.max_new_tokens,
        gradient_checkpointing=plan.checkpointing,
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        dataloader_num_workers=min(8, os.cpu_count() // 2) if torch.cuda.is_available() else 0,
        seed=settings.seed,
        report_to=settings.report_to,
        logging_steps=1,
        disable_tqdm=True,  # TrainingProgress takes its place
        optim="adamw_torch_fused",
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=min(1 / settings.evaluations, 0.999999),  # of all steps; 1 would be every step
        save_strategy="no",
    )


def find_base(start: Path) -> str:
    """The weights below the adapter in a run's folder; the folder itself where it holds a full checkpoint."""
    if not (start / "adapter_config.json").exists():
        return str(start)
    saved = RunFolder(start).read_recipe()
    beside = os.path.normpath(start / saved["base"])
    return beside if Path(beside).is_dir() else saved["started_from"]


def follow(start: Path, recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with precision and layers of the adapter in `start`, if there is one: it is trained on."""
    if not (start / "adapter_config.json").exists():
        return recipe
    saved = RunFolder(start).read_recipe()
    names = "precision", "train_vision", "train_llm", "lora_rank", "lora_alpha"
    return replace(recipe, **{name: saved[name] for name in names})


def load_adapted(start: Path, recipe: TrainingRecipe) -> PeftModel:
    """What a run left, with its adapter to be trained on, in float32; a full checkpoint gets a new one."""
    if (start / "adapter_config.json").exists():
        model = load_trained_model(start)
    else:
        config = build_lora_config_for_recipe(recipe)
        model = get_peft_model(load_model(str(start), recipe.quantized, best_dtype()), config)
        use_packed_attention(model.get_base_model())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its kernel has no gradient
    make_trainable(model)
    return model


def make_trainable(model: PeftModel) -> None:
    """Train the adapter, in float32, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def build_reward_trainer(
    detector: Detector, recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, weights: dict[str, float]
) -> RewardTrainer:
    """A trainer of a detector whose adapter is to be trained."""
    detector.processor.tokenizer.padding_side = "left"
    answers = settings.eval_batch_size or count_answers_at_once(detector)
    settings = SimpleNamespace(**vars(settings) | {"eval_batch_size": answers, "compile": False})
    completions = SimpleNamespace(**vars(settings) | {"batch_size": settings.batch_size * GENERATIONS})
    inner = replace(detector, model=detector.model.get_base_model())
    plan = plan_memory(inner, recipe, completions, free_memory() / 2)  # the other half: answers being written
    mirroring = Mirroring(settings.flip_probability, settings.seed)
    config = create_reward_config(recipe, settings, plan)
    config.reward_weights = list(weights.values())
    trainer = RewardTrainer(
        detector,
        splits.validation,
        args=config,
        reward_funcs=build_rewards(detector.processor, detector.task),
        train_dataset=to_prompts(splits.train, detector.task, mirroring),
        eval_dataset=to_prompts(splits.validation, detector.task, Mirroring()),
        callbacks=[TrainingProgress(mirroring)],
    )
    trainer.remove_callback(PrinterCallback)
    make_trainable(trainer.model)  # TRL makes adapters of 4-bit models bfloat16
    check_trainable_parameters(trainer.model, recipe)
    return trainer


def run_reward_recipe(
    settings: SimpleNamespace,
    splits: Splits,
    start: Path,
    recipe: TrainingRecipe = R5,
    weights: dict[str, float] = WEIGHTS,
) -> RunFolder:
    """Train on, with GRPO, what the run in `start` left, into OUTPUT_DIR/<recipe's name>; what has ended stays.

    Raises OtherRunError where the folder holds another run, ValueError where `start` is below a folder to be deleted.
    """
    recipe, base = follow(start, adjust(recipe, settings)), find_base(start)
    run = RunFolder(Path(settings.output_dir) / recipe.name)
    if settings.again:
        if start.resolve().is_relative_to(run.path.resolve()):
            raise ValueError(f"AGAIN deletes {run.path}, and with it the weights to start from: move those elsewhere.")
        clear(run.path)
    description = describe_run(recipe, settings, splits, base) | {"base": os.path.relpath(base, run.path)}
    description |= {"trained_from": str(start), "trained_from_hash": hash_weights(str(start)), "rewards": weights}
    run.begin(description)
    if run.is_trained:
        print(f"{recipe.name}: trained already, skipped (AGAIN=True trains it anew)")
        return run
    detector = create_detector(load_adapted(start, recipe), settings, splits.labels)
    trainer = build_reward_trainer(detector, recipe, settings, splits, weights)
    try:
        trainer.train()
    except torch.cuda.OutOfMemoryError as error:
        remedy = "Lower EVAL_BATCH_SIZE (answers that are written at once), MICRO_BATCH_SIZE or MAX_PIXELS"
        raise RuntimeError(f"Out of memory. {remedy}.") from error
    trainer.keep_best()
    save_trained(trainer, run, description)
    trainer.accelerator.free_memory()
    return run
