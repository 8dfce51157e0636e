# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Beyond supervised fine-tuning
#
# The story trains with cross-entropy on tokens and measures IoU of boxes. The two do not agree: for cross-entropy,
# 500 in place of 499 is three wrong digits, for IoU it is nothing. This notebook tries two remedies, and holds both
# against the fair opponent: the same starting weights, trained on with plain cross-entropy for the same time.
#
# - **A distance-aware loss**: the targets of a coordinate's digits are spread over near numbers.
# - **Reward what is measured**: GRPO, reinforcement learning whose reward is the IoU itself (recipe `r5-iou-reward`).
#
# **What you will learn**: how to give digits a distance; how to turn an evaluation into a reward, and how a careless
# reward is hacked; what a fair comparison of two ways to go on takes.
#
# **How long it takes**: two minutes on two CPU cores. It starts from a recipe that a run of the story left (`make
# demo`). What takes longer was run on a GPU by one command; section 4 reads what it left, and says which command.
#
# With the defaults the model has 6 million parameters and the images are drawings: no number below is that of a 7B
# model.

# %% tags=["parameters"]
RUN_DIR = "outputs/demo"  # OUTPUT_DIR of the story
START = "r4-joint"  # the recipe in it to start from; it trains adapters
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder
RESULTS = "notebooks/results/07_beyond_sft*.json"  # what `python -m helpers.beyond_experiment` measured
OUTPUT_DIR = "outputs/topics/beyond"  # of the small run in section 3
STEPS = 4  # of it
IMAGES = 2  # a step
ASKED = 8  # images that are asked about eight times
SEED = 42

# %%
import os
import sys
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

# %%
import json
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

# when imported on a CPU it asks for an optional package that would download kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# PEFT and TRL use the old name; the new one does not exist in all versions allowed here
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from IPython.display import display
from matplotlib.lines import Line2D
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import PrinterCallback, ProcessorMixin
from transformers.utils.logging import disable_progress_bar as disable_loading_bar
from trl import GRPOConfig, GRPOTrainer

from helpers.boxes import flip_horizontally
from helpers.conversation import Task, to_conversation
from helpers.data import Mirroring, Splits, load_splits, read_row
from helpers.detection import add_answer, evaluate_detector, to_record
from helpers.generation import Answer, Detector, to_questions
from helpers.loading import best_dtype, load_model
from helpers.metrics import check_same_images, describe_difference, resample_weights, summarize
from helpers.parsing import BOX, END_PATTERN
from helpers.plots import BLUE, ORANGE, PREDICTION_COLOUR, TRUTH_COLOUR, draw_boxes, to_jpeg
from helpers.recipes import R4, TrainingRecipe, build_lora_config_for_recipe
from helpers.runs import RunFolder
from helpers.speed import MemoryPlan, free_memory, plan_memory, use_packed_attention
from helpers.tiny.packages import draw_package
from helpers.training import (
    TrainingProgress,
    adjust,
    check_trainable_parameters,
    clear,
    create_detector,
    describe_run,
    evaluate_run,
    hash_weights,
    load_detector,
    load_trained_model,
    save_trained,
)

disable_progress_bar()
disable_loading_bar()

# %% [markdown]
# ## 1. A loss that knows that 499 is near 500
#
# A coordinate is written digit by digit, each digit a token of its own, in Qwen's tokenizer as in the tiny one. Plain
# cross-entropy asks for the one right digit at each place. In its place, `spread_digits` asks for what a normal
# distribution around the right number says: it adds up the weights of all near numbers that agree with the digits
# before. Numbers of another length are left out: they would make 1 the likeliest first digit for 5, since it begins
# 10, 11, 12 as well.


# %%
#| export distance: A loss that knows that 499 is near 500.
SPREAD = 5.0  # standard deviation of a target, in units of the coordinates
DIGITS = "0123456789"


@cache
def spread_digits(value: int, spread: float) -> np.ndarray:
    """Targets for the tokens that write a whole number, (digits, 10): the share of each digit at each place.

    Numbers near `value` and as long as it weigh as in a normal distribution. The shares of a place are those of the
    numbers that agree with `value` in all places before it, since these are what the model has read by then.
    """
    written, reach = str(value), math.ceil(4 * spread)
    numbers = [str(number) for number in range(max(0, value - reach), value + reach + 1)]
    targets = np.zeros((len(written), 10))
    for number in (number for number in numbers if len(number) == len(written)):
        weight = math.exp(-(((int(number) - value) / spread) ** 2) / 2)
        for place in range(len(written)):
            targets[place, int(number[place])] += weight * (number[:place] == written[:place])
    return targets / targets.sum(axis=1, keepdims=True)


class DistanceLoss:
    """Cross-entropy whose targets for the coordinates of boxes are spread over the numbers near the right one."""

    def __init__(self, processor: ProcessorMixin, spread: float = SPREAD):
        tokenizer = processor.tokenizer
        self.spread, self.texts = spread, [tokenizer.decode([token]) for token in range(len(tokenizer))]
        self.digits = tokenizer.convert_tokens_to_ids(list(DIGITS))

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over the labels (batch, tokens) that are not -100, by `items` or by their number; logits are theirs."""
        chosen = labels != -100
        scores, written = logits[chosen].float().log_softmax(dim=-1), labels[chosen]
        losses = -scores.gather(1, written[:, None])[:, 0]
        places, targets = self.find_targets(written.tolist())
        if places:
            targets = torch.tensor(np.array(targets), dtype=scores.dtype, device=scores.device)
            losses[places] = -(targets * scores[places][:, self.digits]).sum(dim=1)
        return losses.sum() / (len(written) if items is None else items)

    def find_targets(self, tokens: Sequence[int]) -> tuple[list[int], list[np.ndarray]]:
        """The places of the digits of all coordinates among the tokens, and their targets."""
        texts = [self.texts[token] for token in tokens]
        starts = {start: place for place, start in enumerate(accumulate(map(len, texts), initial=0))}
        places, targets = [], []
        for box in re.finditer(BOX, "".join(texts)):
            for number in re.finditer(r"\d+", box[0]):
                first, wanted = starts[box.start() + number.start()], spread_digits(int(number[0]), self.spread)
                places += range(first, first + len(wanted))
                targets += list(wanted)
        return places, targets


def with_distance_loss(recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with `DistanceLoss`, under a name of its own."""
    return replace(recipe, name=f"{recipe.name}-distance", loss_function=DistanceLoss)


# %%
figure, grid = plt.subplots(3, 3, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
for row, spread in zip(grid, (0.5, 5.0, 20.0), strict=True):
    for place, (axes, target) in enumerate(zip(row, spread_digits(499, spread), strict=True)):
        axes.bar(range(10), target, color=BLUE)
        axes.set(xticks=range(10), title=f"spread {spread:g}: digit {place + 1}")
figure.suptitle("What the three digits of 499 are trained towards")
plt.show()

# %% [markdown]
# With a spread of next to nothing it is cross-entropy. With 5 units of the grid (of 1,000) the first digit may be a 4
# or a 5, and the last one hardly matters: it no longer pulls at the weights with noise that nobody could predict from
# an image. Every recipe takes the loss, by `with_distance_loss(recipe)`; evaluations keep the plain one, so that
# losses of two recipes can be compared.

# %% [markdown]
# It is not quite a distance: each digit is still judged given the right digits before it, so that a model which is
# sure of 500 is wrong at the second place as well. What changes is that nothing pushes it to be sure of the 4.

# %% [markdown]
# ## 2. A reward, and how it is hacked
#
# The reward of an answer has three parts. `iou` is the metric itself: mean IoU, one to one. `format` takes 1 away
# where something cannot be read, or the answer does not end. `surplus` takes 0.5 away for each box too many.


# %%
#| export reward: GRPO that rewards the overlap of the boxes that a model writes with the true ones.
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


# %%
settings = SimpleNamespace(**RunFolder(Path(RUN_DIR, START)).read_recipe()["settings"])
settings.dataset_id, settings.output_dir, settings.report_to, settings.again = DATASET_ID, OUTPUT_DIR, "none", True
settings.train_samples, settings.eval_samples, settings.validation_samples = 8 * ASKED, None, 8
settings.seed, settings.max_steps, settings.batch_size, settings.evaluations = SEED, STEPS, IMAGES, 1
splits = load_splits(settings)
detector = load_detector(Path(RUN_DIR, START), settings)
task = detector.task
label = task.labels[0]
square = {"width": 100, "height": 100, "truth": [{"label": label, "box": [0, 0, 50, 50]}]}
right, wrong, end = f"{label}(0,0),(500,500)", f"{label}(600,600),(900,900)", "<|im_end|>"
answers = [right + end, f"{label}(0,0),(500,400)" + end, right + wrong + end, wrong + right, wrong + end, end]
pd.DataFrame([{"answer": answer} | judge(answer, square, task) for answer in answers]).style.hide().format(precision=2)

# %% [markdown]
# Why the penalty? Because IoU one to one forgives what is left over. A model that is unsure writes several boxes, and
# the assignment picks the best. To see what that is worth, the trained model is asked eight times about the same
# images, its words drawn by their probabilities as GRPO draws them. Then the boxes of several answers are written into
# one.


# %%
def ask_often(images: Sequence[Image.Image], detector: Detector, times: int) -> list[list[str]]:
    """Answers to each image, drawn by their probability, special tokens included."""
    questions = to_questions(images, detector)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": times}
    tokens = detector.model.generate(**questions, **options, max_new_tokens=detector.max_new_tokens)
    texts = detector.processor.tokenizer.batch_decode(tokens[:, questions["input_ids"].shape[1] :])
    return [texts[start : start + times] for start in range(0, len(texts), times)]


torch.manual_seed(SEED)
rows = [splits.train[number] for number in range(ASKED)]
drawn = ask_often([read_row(row)[0] for row in rows], detector, GENERATIONS)
records = [to_record(row, task) for row in rows]
joined = []
for count in range(1, GENERATIONS + 1):
    texts = ["".join(END_PATTERN.split(text)[0] for text in texts[:count]) + end for texts in drawn]
    judged = pd.DataFrame([judge(text, record, task) for text, record in zip(texts, records, strict=True)]).mean()
    joined.append({"answers in one": count, "penalty off": judged.iou, "penalty on": judged @ pd.Series(WEIGHTS)})
joined = pd.DataFrame(joined).set_index("answers in one")
joined.plot(figsize=(11, 3), marker="o", ylabel="mean reward", color=[ORANGE, BLUE])
plt.show()

# %% [markdown]
# Without the penalty every further guess is free, and the mean reward can only rise: this is what the optimiser will
# find, and what a user will not want. With it, a second guess costs more than it brings. (A half is not the only right
# weight: what matters is that it exceeds what a guess gains.)

# %% [markdown]
# ## 3. GRPO, a few steps
#
# GRPO (Shao et al., "DeepSeekMath", 2024) asks the model eight times about an image and compares the answers with each
# other: those above the mean of the eight become likelier, those below it less so. No model of the reward and none of
# the value is needed. TRL's trainer does this, on the family's own processor. `run_reward_recipe` goes on with the
# adapter that a run left, on its base in 4 bits where it had one, and leaves the same folder as every other recipe, so
# that evaluation, cards and comparison work on it unchanged.


# %%
#| export reward
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


# %%
#| export reward
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


# %%
#| export reward
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


# %% [markdown]
# A few steps of two images are not meant to teach anything; they show that everything is in its place, and what a step
# costs. The weights of the best evaluation are kept, and that may well be the one before the first step.

# %%
started = time.perf_counter()
run = run_reward_recipe(settings, splits, Path(RUN_DIR, START))
print(f"{time.perf_counter() - started:.0f} seconds, evaluations included")
logged = {"reward": "reward", "rewards/iou/mean": "iou", "rewards/surplus/mean": "surplus", "entropy": "entropy"}
logged |= {"step_time": "seconds", "eval_mean_iou": "IoU of greedy answers, validation"}
log = pd.DataFrame({short: run.read_log(name) for name, short in logged.items()})
log.rename_axis("step").style.format(precision=3, na_rep="")

# %%
few = splits.evaluation.select(range(min(16, len(splits.evaluation))))
before = evaluate_detector(detector, few, show_progress=False)
evaluate_run(run, settings, few)
print(f"{len(few)} images, {START} -> {run.path.name}: {describe_difference(before, run.read_records())}")

# %% [markdown]
# ## 4. In the same time
#
# Is it worth it? A step of GRPO takes many times as long as one of plain training: eight answers are written for each
# image before anything is learned. So the opponent gets the same time, not the same steps: "sft" is the start, trained
# on with cross-entropy. There are three seeds, each with a start of its own (`r4-joint`), and all and a tenth of the
# training images; `distance-5` is the loss with a spread of 5. Each arm is evaluated with its last weights on drawings
# of a seed of the generator that nothing was trained on. The command below was run on one GPU, six cases side by side,
# and is not run here; the file that it left is in the repository.
#
# Two records of the same image are compared with each other, and images are drawn with all their runs together, so
# that the interval is about other images. What other starts would give, the three seeds tell.


# %%
#| export beyond: Records of two models on the same images, held against each other by more than the mean IoU.
MEASURES = ["mean IoU", "IoU > 0.5", "IoU > 0.7", "IoU > 0.9", "boxes", "malformed"]


def measure_images(records: Sequence[dict]) -> pd.DataFrame:
    """MEASURES of each image with a true box: its IoU, whether above a threshold; boxes; whether any was unread."""
    kept = [record for record in records if record["truth"]]
    rows = [
        (r["iou"], *(r["iou"] > t for t in (0.5, 0.7, 0.9)), len(r["prediction"]), bool(r["unread"])) for r in kept
    ]
    return pd.DataFrame(rows, columns=MEASURES, dtype=float)


def compare_images(pairs: Sequence[tuple[Sequence[dict], Sequence[dict]]]) -> pd.DataFrame:
    """Difference, low and high (95 %, images drawn by their group) of MEASURES, over pairs of records of two models.

    A pair is what two models made of the same images; several pairs are several runs of both, whose images are drawn
    together. Raises ValueError where the images of a pair differ.
    """
    for one, other in pairs:
        check_same_images(one, other)
    records = [record for one, _ in pairs for record in one if record["truth"]]
    records = [record | {"group": record["group"] or record["id"]} for record in records]
    differences = pd.concat([measure_images(other) - measure_images(one) for one, other in pairs])
    weights = np.concatenate(list(resample_weights(records)))
    drawn = weights @ differences.to_numpy() / weights.sum(axis=1, keepdims=True)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return pd.DataFrame({"difference": differences.mean(), "low": low, "high": high})


# %%
def show_means(results: dict) -> None:
    """What was run, and the means over the seeds."""
    print(f"{results['command']}\non {results['device']}: {results['seconds']:.0f} seconds an arm, ", end="")
    print(f"{results['pictures']} drawings of seed {results['unseen_seed']}")
    arms = pd.DataFrame(results["arms"]).assign(seconds_a_step=lambda table: table.seconds / table.steps)
    means = arms.groupby(["share", "arm"], sort=False)[[*MEASURES, "steps", "seconds_a_step"]].mean()
    display(means.style.format(precision=3, na_rep=""))


measured = [json.loads(file.read_text()) for file in sorted(Path().glob(RESULTS))]
for results in measured:
    show_means(results)

# %% [markdown]
# `boxes` is the number of boxes in an answer, `malformed` the share of answers with something that cannot be read. Now
# the differences: above from the opponent, below from the start that all arms share. Black intervals exclude 0.


# %%
def plot_gains(results: dict, measures: Sequence[str]) -> plt.Figure:
    """Differences with their intervals, from the opponent and from the start: a row for each arm and share."""
    figure, grid = plt.subplots(2, len(measures), figsize=(13, 7), sharex="col", sharey="row", layout="constrained")
    for line, (key, name) in zip(grid, {"differences": "plain SFT", "from_start": "the start"}.items(), strict=True):
        table = pd.DataFrame(results[key])
        table = table[~table.duplicated(["share", "arm", "measure"])]  # the first is of all seeds
        for axes, measure in zip(line, measures, strict=True):
            rows = table[table.measure == measure].reset_index(drop=True)
            for place, row in rows.iterrows():
                colour = "black" if row.low > 0 or row.high < 0 else "grey"
                axes.plot([row.low, row.high], [place, place], color=colour)
                axes.plot(row.difference, place, "o", color=colour)
            axes.set_yticks(range(len(rows)), [f"{row.arm}, {row.share:.0%}" for row in rows.itertuples()])
            axes.axvline(0, color="lightgrey", zorder=0)
            axes.set_title(f"{measure}, from {name}")
        line[0].invert_yaxis()
    return figure


for results in measured:
    plot_gains(results, ["mean IoU", "IoU > 0.7", "IoU > 0.9"])
    plt.show()

# %% [markdown]
# What the first run says:
#
# - **With all images nothing beats plain training on.** It gains 0.023 [0.015, 0.030] mean IoU over the start. The
#   distance-aware loss gains as well, but less: 0.007 [0.002, 0.012] with a spread of 5. What 28 steps of GRPO gain
#   cannot be seen.
# - **With a tenth of them, 237, both beat it.** GRPO is ahead by 0.010 [0.002, 0.017] mean IoU and by 0.026 [0.010,
#   0.042] in IoU > 0.9, the loss with a spread of 5 by 0.022 [0.002, 0.042] in IoU > 0.9. But look at the lower half:
#   **here the start beats plain training on, too**, since 200 more steps on 237 images overfit. Neither of the two is
#   ahead of the start itself. What they won is that they did less harm, and stopping earlier would have done that.
# - **The penalty is needed.** Without it the same 28 steps took the number of boxes in an answer from 1.0 to 1.55, and
#   4 % of the answers became malformed (one seed).
#
# Eleven arms against an opponent in six measures are many comparisons, and no correction is made: an interval that
# misses 0 by little, as that of the loss at a tenth of the images, is a hint. Three spreads were
# tried in this run, 2, 5 and 12; to name the best of them at a tenth of the images afterwards flatters it.

# %%
single = pd.concat([pd.DataFrame(results["differences"]) for results in measured[:1]])
single = single[(single.seeds.map(len) == 1) & single.measure.isin(["mean IoU", "IoU > 0.9"])]
by_seed = single.assign(seed=single.seeds.str[0]).pivot_table(
    index=["share", "arm"], columns=["measure", "seed"], values="difference", sort=False
)
by_seed.style.format(precision=3, na_rep="")

# %% [markdown]
# That was seed by seed: where the sign changes from one column to the next, the choice of the start and of the order
# of images weighs more than the choice of the loss.
#
# The curves: IoU on 32 held-back training images over the time of each arm, and the rewards of GRPO over its steps.
# What GRPO draws from changes from step to step, so that its IoU is noise to the eye; the boxes too many are not.


# %%
def plot_curves(arms: Sequence[dict]) -> plt.Figure:
    """Means over the seeds: IoU on validation images; of GRPO, IoU of drawn answers, and boxes too many in them."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    colours = {name: f"C{n}" for n, name in enumerate(sorted({arm["arm"] for arm in arms if "curve" in arm}))}
    groups = {(arm["arm"], arm["share"]): [] for arm in arms if "curve" in arm}
    for arm in arms:
        groups.get((arm["arm"], arm["share"]), []).append(arm)
    for (name, share), runs in groups.items():
        lines = [np.mean([[iou for _, iou in run["curve"][:4]] for run in runs], axis=0)]
        if runs[0]["rewards"]:
            lines.append(np.mean([run["rewards"]["iou"] for run in runs], axis=0))
            lines.append(-np.mean([run["rewards"]["surplus"] for run in runs], axis=0))
        for place, line in zip(axes, lines, strict=False):
            style = "-" if share == 1 else ":"
            place.plot(np.arange(1, len(line) + 1) / len(line), line, style, color=colours[name])
    for place, title in zip(
        axes, ["IoU, validation", "IoU of drawn answers", "boxes too many an answer"], strict=True
    ):
        place.set(xlabel="share of the time", title=title)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color="grey", ls=style, label=text) for style, text in (("-", "100%"), (":", "10%"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


for results in measured[:1]:
    plot_curves(results["arms"])
    plt.show()

# %% [markdown]
# And eight images on which an arm and its opponent differ most, four each way, drawn again from the generator's seeds:
# dashed green the truth, blue the opponent, red the arm. The number is how much more IoU the arm has.


# %%
def plot_largest(rows: Sequence[dict]) -> plt.Figure:
    """Drawings with true boxes (dashed), those of plain training (blue) and those of the other way (red)."""
    figure, grid = plt.subplots(2, 4, figsize=(13, 7), layout="constrained")
    styles = {"sft": (BLUE, "-"), "own": (PREDICTION_COLOUR, "-"), "truth": (TRUTH_COLOUR, "--")}
    for axes, row in zip(grid.flat, rows, strict=False):
        axes.imshow(draw_package(row["drawing"])[0])
        for side, style in styles.items():
            draw_boxes(axes, row[side], *style)
        axes.set_title(f"{row['arm']}: {row['gain']:+.2f}", fontsize=9)
    for axes in grid.flat:
        axes.axis("off")
    return figure


largest = [row for results in measured[:1] for row in results["largest"]]
for name in ("reward", "distance-5"):
    display(to_jpeg(plot_largest([row for row in largest if row["arm"] == name])))

# %% [markdown]
# ## What to take with you
#
# - Cross-entropy on digits and IoU of boxes are different goals. Spreading the targets over near numbers costs no
#   time; what it brings is a question for a paired comparison, not for a belief.
# - A metric becomes a reward in a few lines, and with it everything that the metric forgives becomes a strategy. Write
#   down what an answer could do to please it before training, and count it while training.
# - The opponent of a new method is not only the starting point, but also the old method with the same time; and if the
#   old method does harm, the starting point.
