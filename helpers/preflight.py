"""Before the first step of a long run, in seconds: what would go wrong without a word.

    python -m helpers.preflight --recipe r4-joint    # and the other options of helpers.train_recipe

The model is loaded as it would be trained; where nothing else is wrong, it takes one step on the largest image, in a
folder that is deleted afterwards. Asked is: are the right layers quantised, and the right weights trained, in every
block; does the image keep the pixel budget; do the labels that the loss looks at read back as the boxes of the
dataset, with the token that ends the answer; does a gradient reach each trained area, and none other; does it take the
memory that was planned. A recipe in stages is asked about each. Exit code 2 if something is wrong: one line for each
problem, cause and remedy.
"""

from __future__ import annotations

import io
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin, ProgressCallback, TrainerCallback

from helpers.boxes import GRID, get_family, resized_size
from helpers.conversation import Task, format_answer
from helpers.data import Mirroring, Splits, load_splits, read_headers, to_training_dataset
from helpers.detection import add_answer, to_record
from helpers.generation import Answer
from helpers.loading import area_of, best_dtype, load_model, release_memory
from helpers.parsing import parse_answer
from helpers.recipes import CATALOGUE, TrainingRecipe
from helpers.speed import Float8Linear, count_trained, free_memory, plan_memory
from helpers.train_recipe import build_parser, check, parse, read_notebook_settings, to_settings
from helpers.training import DetectionTrainer, adjust, build_trainer, create_detector, gradient_norms

BLOCKS = {"visual": "visual.blocks.", "language_model": "language_model.layers."}  # how their paths begin
WORKSPACE = 2**29  # bytes that kernels may take besides what is planned
END = "<|im_end|>"


class PreflightError(RuntimeError):
    """What a run would do wrong: a line for each problem, with cause and remedy."""


@dataclass(frozen=True)
class Example:
    """A row of the dataset, and the batch of one that training makes of it."""

    row: dict
    batch: dict[str, torch.Tensor]
    processor: ProcessorMixin
    task: Task

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height at which the model sees the image, in pixels; from what the processor made of it."""
        _, lines, columns = self.batch["image_grid_thw"][0].tolist()
        patch = self.processor.image_processor.patch_size
        return columns * patch, lines * patch


def check_recipe(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str | None = None) -> None:
    """Try what a recipe, or each of its stages, would do; `start`, a folder, takes the place of base or first stage.

    Raises PreflightError with a line for each problem.
    """
    stages, problems = [CATALOGUE[name] for name in recipe.stages] or [recipe], []
    for stage in stages[-1:] if start else stages:
        started = time.perf_counter()
        found = find_problems(adjust(stage, settings), settings, splits, start or settings.model_id)
        print(f"preflight, {stage.name}: {len(found)} problems found in {time.perf_counter() - started:.1f} s")
        problems += [f"{stage.name}: {problem}" for problem in found]
        release_memory()
    if problems:
        raise PreflightError("\n".join(problems))


def find_problems(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str) -> list[str]:
    """What is wrong with a recipe without stages, a sentence for each."""
    detector = create_detector(load_model(start, recipe.quantized, best_dtype()), settings, splits.labels)
    largest, fullest = find_examples(splits.train, detector.task)
    checkpointing = plan_memory(detector, recipe, settings, free_memory()).checkpointing
    small = {"batch_size": 1, "micro_batch_size": 1, "max_steps": 1, "gradient_checkpointing": checkpointing}
    small |= {"compile": False, "cache_features": False, "report_to": "none"}
    wanted = count_trained(detector.model, recipe)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trial = SimpleNamespace(**vars(settings) | small | {"output_dir": folder})
        plan = plan_memory(detector, recipe, trial, free_memory())
        try:
            trainer = build_trainer(detector, recipe, trial, replace(splits, train=splits.train.select([largest])))
        except RuntimeError as error:
            return [f"{error} Compare its LoRA pattern with the model's layers, and what is frozen"]
        examples = [build_example(splits.train.select([number]), trainer) for number in {largest, fullest}]
        problems = find_quantization_problems(trainer.model, recipe)
        problems += find_count_problems(trainer.model, recipe, wanted)
        for example in examples:
            problems += find_budget_problems(example, settings.max_pixels)
            problems += find_label_problems(example, recipe.collator == "v2-assistant-only", settings.max_new_tokens)
        return problems or find_step_problems(trainer, recipe, plan.peak)


# The images


def find_examples(rows: Dataset, task: Task) -> tuple[int, int]:
    """Numbers of the row whose image is largest after resizing, and of that with most objects."""
    sizes = [math.prod(resized_size(*header[:2], **task.pixel_budget)) for header in read_headers(rows)]
    objects = [len(objects["bbox"]) for objects in rows["objects"]]
    return sizes.index(max(sizes)), objects.index(max(objects))


def build_example(row: Dataset, trainer: DetectionTrainer) -> Example:
    """The only row of `row`, and what the trainer's collator makes of it."""
    task = trainer.detector.task
    batch = trainer.data_collator([to_training_dataset(row, task, Mirroring())[0]])
    return Example(row[0], batch, trainer.processing_class, task)


# What is asked


def find_quantization_problems(model: PreTrainedModel, recipe: TrainingRecipe) -> list[str]:
    """Layers in another precision than the recipe says: language model as it names, the rest in 16 bits or more."""
    names = {"nf4": Linear4bit, "fp8": Float8Linear}
    kinds = {
        kind: [name for name, layer in model.named_modules() if isinstance(layer, kind)] for kind in names.values()
    }
    problems = []
    for precision, kind in names.items():
        strays = [name for name in kinds[kind] if area_of(name) != "language_model" or recipe.precision != precision]
        if strays:
            remedy = "Compare KEPT_MODULES with the paths of the model's modules"
            problems.append(f"{len(strays)} layers are in {precision} that must not be, first {strays[0]}. {remedy}")
    if recipe.precision == "nf4" and not kinds[Linear4bit]:
        problems.append("no layer is in 4 bits. Look for bitsandbytes' own messages, or set PRECISION='bf16'")
    return problems


def find_count_problems(model: PreTrainedModel, recipe: TrainingRecipe, wanted: int) -> list[str]:
    """Whether as many numbers are trained as the recipe says, and in every block of each trained tower."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    problems, remedy = [], "Compare its LoRA pattern with the model's layers, and what is frozen"
    if sum(trained.values()) != wanted:
        problems.append(f"{sum(trained.values()):,} numbers are trained, not {wanted:,} as it says. {remedy}")
    towers = {"visual": recipe.train_vision, "language_model": recipe.train_llm}
    for area in [area for area, mode in towers.items() if mode != "frozen"]:
        blocks, reached = find_blocks(dict(model.named_parameters()), area), find_blocks(trained, area)
        if blocks != reached:
            problems.append(f"{len(reached)} of {len(blocks)} blocks of {area} are trained. {remedy}")
    return problems


def find_blocks(names: Sequence[str], area: str) -> set[str]:
    """The numbers of the blocks that parameters of an area belong to."""
    return {name.partition(BLOCKS[area])[2].partition(".")[0] for name in names if BLOCKS[area] in name}


def find_budget_problems(example: Example, max_pixels: int) -> list[str]:
    """Whether the image that the model is given has the size that is planned, and boxes are read with."""
    width, height = example.resized
    image = to_record(example.row, example.task)
    problems = []
    if width * height > max_pixels:
        remedy = "Its processor ignores the budget: try another version of transformers"
        problems.append(f"image {image['id']!r} is {width} x {height} pixels, MAX_PIXELS={max_pixels}. {remedy}")
    if [width, height] != image["resized"]:
        planned = " x ".join(map(str, image["resized"]))
        remedy = "Its boxes would be read at the wrong size: compare `pixel_budget` with the processor"
        problems.append(f"image {image['id']!r} is {width} x {height} pixels, not {planned}. {remedy}")
    return problems


def find_label_problems(example: Example, answer_only: bool, max_new_tokens: int) -> list[str]:
    """Whether the tokens that the loss looks at are the right answer, and are read back as the row's boxes."""
    labels = example.batch["labels"][0]
    tokens = labels[labels != -100]
    text = example.processor.tokenizer.decode(tokens)
    answer = text.rpartition("<|im_start|>assistant\n")[2].removesuffix("\n")
    where = f"the labels of image {example.row['image_id']!r}"
    if not answer.endswith(END):
        return [f"{where} do not end with {END}: {shorten(text)}. The model would not learn to stop: see the collator"]
    answer, objects = answer.removesuffix(END), parse_answer(answer).objects
    written = [(label, [*map(round, box)]) for label, box in objects]
    if answer != format_answer(*zip(*written, strict=True), example.task.family) if written else objects:
        return [f"{where} are not the answer alone: {shorten(text)}. See the collator's mask"]
    if answer_only and text != answer + END:
        return [f"{where} hold more than the answer: {shorten(text)}. See the collator's mask"]
    problems = find_box_problems(example, objects)
    if len(tokens) > max_new_tokens and answer_only:
        remedy = "No such answer could be complete: raise it"
        problems.append(f"{where} are {len(tokens)} tokens, MAX_NEW_TOKENS={max_new_tokens}. {remedy}")
    return problems


def find_box_problems(example: Example, objects: Sequence[tuple[str, Sequence[float]]]) -> list[str]:
    """Whether boxes in the family's coordinates are the row's, and so again where an answer is read."""
    family = get_family(example.task.family)
    limits = (GRID, GRID) if family.coordinates == "grid" else example.resized
    truth = read_truth(example.row)
    written = [(label, to_fractions(box, limits)) for label, box in objects]
    where = f"image {example.row['image_id']!r}"
    if not agree(written, truth, limits):
        swapped = [(label, [y1, x1, y2, x2]) for label, (x1, y1, x2, y2) in truth]
        cause = "x and y are swapped" if agree(written, swapped, limits) else "they are in another convention"
        remedy = f"{example.task.family} writes {family.coordinates}: see `write_answer` and FAMILIES"
        return [f"{where}: the labels' boxes are not those of its row, {cause}. {remedy}"]
    answer = Answer(format_answer(*zip(*objects, strict=True), example.task.family) if objects else "")
    record = add_answer(to_record(example.row, example.task), answer, example.task)
    size = record["width"], record["height"]
    read = [(found["label"], to_fractions(found["box"], size)) for found in record["prediction"]]
    if not agree(read, truth, limits):
        return [f"{where}: the right answer is read as other boxes than its row's. See `from_model_coordinates`"]
    return []


def read_truth(row: dict) -> list[tuple[str, list[float]]]:
    """Labels and boxes `[x1, y1, x2, y2]` of a row, as fractions of the image."""
    boxes = [[x1, y1, x2, y2] for y1, x1, y2, x2 in row["objects"]["bbox"]]
    return list(zip(row["objects"]["category_name"], boxes, strict=True))


def to_fractions(box: Sequence[float], size: Sequence[float]) -> list[float]:
    """A box as fractions of the width and height in `size`."""
    return [value / limit for value, limit in zip(box, (*size, *size), strict=True)]


def agree(found: Sequence[tuple], truth: Sequence[tuple], limits: Sequence[float]) -> bool:
    """Whether labelled boxes, fractions of the image, are the same but for rounding to coordinates up to `limits`.

    A true box that rounding may leave without an area need not be found.
    """

    def same(one: tuple, other: tuple) -> bool:
        pairs = zip(one[1], other[1], (*limits, *limits), strict=True)
        return one[0] == other[0] and all(abs(a - b) * limit < 0.501 for a, b, limit in pairs)

    def is_large(box: Sequence[float]) -> bool:
        return min((box[2] - box[0]) * limits[0], (box[3] - box[1]) * limits[1]) > 1

    missed = [one for one in truth if is_large(one[1]) and not any(same(one, other) for other in found)]
    return not missed and all(any(same(one, other) for other in truth) for one in found)


# One step


class GradientWatch(TrainerCallback):
    """Keeps the norms of the gradients by area, before the optimiser uses them."""

    def __init__(self):
        self.norms = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms = gradient_norms(model)


def find_step_problems(trainer: DetectionTrainer, recipe: TrainingRecipe, planned: float) -> list[str]:
    """What is wrong after one step in the trainer's own loop: gradients by area, peak memory on GPUs in bytes."""
    before, watch = reset_peak_memory(), GradientWatch()
    try:
        take_step(trainer, watch)
    except RuntimeError as error:
        return [find_damaged_weights(trainer.model) or str(error)]
    finally:
        trainer.accelerator.free_memory()
    towers = {"visual": recipe.train_vision, "language_model": recipe.train_llm}
    wanted = {area for area, mode in towers.items() if mode != "frozen"}
    problems = []
    if {area for area, norm in watch.norms.items() if norm > 0} != wanted:
        remedy = "Check freezing and LoRA targets"
        problems.append(f"gradients reach {watch.norms}, they should reach {sorted(wanted)}. {remedy}")
    if (taken := peak_memory() - before) > planned + WORKSPACE:
        remedy = "Set MICRO_BATCH_SIZE to half of what it prints as planned"
        gibibytes = f"{taken / 2**30:.1f} GiB, planned were {planned / 2**30:.1f}"
        problems.append(f"one image takes {gibibytes}. {remedy}")
    return problems


def take_step(trainer: DetectionTrainer, watch: GradientWatch) -> None:
    """One step, without evaluations, checkpoints and progress bar."""
    trainer.args.eval_on_start = trainer.args.load_best_model_at_end = False
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.dataloader_num_workers = 0
    for callback in [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]:
        trainer.remove_callback(callback)
    trainer.add_callback(watch)
    trainer.train()


def find_damaged_weights(model: PreTrainedModel) -> str | None:
    """A sentence where weights hold NaN or infinity."""
    damaged = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    remedy = "The files of the base are damaged: fetch them again"
    return f"{len(damaged)} weights hold NaN or infinity, first {damaged[0]}. {remedy}" if damaged else None


def reset_peak_memory() -> int:
    """Forget the peak so far; returns the bytes that tensors hold on all GPUs."""
    gpus = range(torch.cuda.device_count())
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    return sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)


def peak_memory() -> int:
    """The most bytes that tensors held on all GPUs since `reset_peak_memory`."""
    return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))


def shorten(text: str) -> str:
    """The end of a text, on one line."""
    return repr(text if len(text) < 200 else "..." + text[-200:])


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 where something is wrong."""
    parser = build_parser(settings := read_notebook_settings())
    parser.prog = "helpers.preflight"
    try:
        options = parse(parser, settings, sys.argv[1:] if argv is None else argv)
        check(options)
        splits, start = load_splits(to_settings(options)), options.checkpoint and str(options.checkpoint)
        for name in [name for name in options.recipe if name in CATALOGUE]:
            check_recipe(CATALOGUE[name], to_settings(options), splits, start)
    except (FileNotFoundError, PreflightError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
