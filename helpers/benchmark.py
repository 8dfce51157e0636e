"""Speed and memory of training and generation at full size, ours beside stock TRL, with random weights: no hub.

    python -m helpers.benchmark --processor FOLDER                # every recipe, stock and ours; then generation
    python -m helpers.benchmark --processor FOLDER --only r1-llm-only --precision fp8
    python -m helpers.benchmark --processor FOLDER --only r1-llm-only r4-joint --memory 24    # as on a smaller GPU
    python -m helpers.benchmark --processor FOLDER --mixed        # images of four sizes instead of one
    python -m helpers.benchmark --processor FOLDER --whose ours --without compile              # what a lever gains
    python -m helpers.benchmark --processor FOLDER --only r4-joint --epochs 3       # a whole run, by parts
    python -m helpers.benchmark --processor FOLDER --only r5-iou-reward --steps 3    # GRPO; answers of 256 tokens
    python -m helpers.benchmark --processor FOLDER --size qwen3-vl-8b    # another model (--count: what is trained)
    python -m helpers.benchmark --processor FOLDER --build-only   # leaves a model and a dataset for the notebook

FOLDER holds Qwen2-VL's own processor (any Qwen2-VL repository of the hub has it). Random weights take the same memory
and time as trained ones; their answers are noise, so generation is made to write a fixed number of tokens. Images are
980 x 980, 1,225 image tokens each. "stock" is TRL as its documentation shows it: 2 images at once, 8 such parts a
step, no checkpointing, all linear layers of an NF4 model in NF4; "plain" is the same with the vision tower kept in 16
bits, whose losses can be compared with ours. Speeds are medians over the steps after --warm-up;
"of the ceiling" divides what the matrix products of a step need by what this GPU reaches on one large product of
bfloat16 matrices. `--size tiny` with the embedded model's processor (helpers/tiny/base) runs anywhere.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    TrainerCallback,
)
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from helpers.collators import AssistantOnlyCollator
from helpers.conversation import create_task
from helpers.data import Mirroring, Splits, load_rows, read_row, to_training_dataset
from helpers.detection import evaluate_detector
from helpers.generation import Detector, generate, to_questions
from helpers.loading import KEPT_MODULES, best_dtype, build_empty_model, load_model, load_processor, release_memory
from helpers.quantization import PUBLISHED_SIZES, describe_text
from helpers.recipes import CATALOGUE, TrainingRecipe, apply_freeze_policy, build_lora_config_for_recipe
from helpers.reward import R5, run_reward_recipe
from helpers.runs import RunFolder, write_json
from helpers.speed import count_trained, free_memory, plan_memory
from helpers.tiny.packages import draw_dataset
from helpers.training import DetectionTrainer, build_trainer, create_detector, load_trained_model

LABELS = ("nutrition-table",)


@dataclass(frozen=True)
class Shape:
    """The configuration of a published model, without its weights; images of `side` pixels are 1,225 tokens or so."""

    family: str
    text: dict
    vision: dict
    tied: bool  # one matrix is embedding and lm_head
    side: int = 980


QWEN2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
QWEN2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
QWEN3 = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
QWEN3_SMALL = QWEN3 | {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_LARGE = QWEN3 | {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
HEADS = {"head_dim": 128}
SHAPES = {  # of the repositories Qwen/… on the hub
    "qwen2-vl-2b": Shape("qwen2_vl", PUBLISHED_SIZES["2B"][0], QWEN2 | {"hidden_size": 1536}, True),
    "qwen2-vl-7b": Shape("qwen2_vl", PUBLISHED_SIZES["7B"][0], QWEN2 | {"hidden_size": 3584}, False),
    "qwen2.5-vl-3b": Shape(
        "qwen2_5_vl", describe_text(2048, 36, 16, 2, 11008, 151936), QWEN2_5 | {"out_hidden_size": 2048}, True
    ),
    "qwen2.5-vl-7b": Shape(
        "qwen2_5_vl", describe_text(3584, 28, 28, 4, 18944, 152064), QWEN2_5 | {"out_hidden_size": 3584}, False
    ),
    "qwen3-vl-2b": Shape(
        "qwen3_vl",
        describe_text(2048, 28, 16, 8, 6144, 151936) | HEADS,
        QWEN3_SMALL | {"out_hidden_size": 2048},
        True,
        1120,
    ),
    "qwen3-vl-4b": Shape(
        "qwen3_vl",
        describe_text(2560, 36, 32, 8, 9728, 151936) | HEADS,
        QWEN3_SMALL | {"out_hidden_size": 2560},
        True,
        1120,
    ),
    "qwen3-vl-8b": Shape(
        "qwen3_vl",
        describe_text(4096, 36, 32, 8, 12288, 151936) | HEADS,
        QWEN3_LARGE | {"out_hidden_size": 4096},
        False,
        1120,
    ),
    "tiny": Shape(
        "qwen2_vl",
        describe_text(256, 2, 2, 1, 256, 512),
        {"depth": 2, "embed_dim": 192, "hidden_size": 256, "mlp_ratio": 4, "num_heads": 3},
        False,
        112,
    ),
}
ONE_STAGE = [name for name, recipe in CATALOGUE.items() if not recipe.stages]
SECTIONS = {"qwen2_vl": [16, 24, 24], "qwen2_5_vl": [16, 24, 24], "qwen3_vl": [24, 20, 20]}  # of M-RoPE
MIXED = [(1, 1), (1.3, 0.75), (0.75, 1.3), (0.8, 0.6)]  # width and height, in parts of the usual side
TOKENS = 28  # of every answer
RUN_IMAGES = 1083, 64  # of a whole run: to train on, to choose checkpoints with


# What is measured: a model and datasets


def build_config(shape: Shape, tokenizer) -> PreTrainedConfig:
    """The configuration of a model of this shape for a Qwen tokenizer."""
    to_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": SECTIONS[shape.family]}
    text = shape.text | {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_parameters": rope}
    text |= {"eos_token_id": to_id("<|im_end|>"), "bos_token_id": to_id("<|endoftext|>")}
    tokens = {f"{kind}_token_id": to_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    tokens |= {f"vision_{place}_token_id": to_id(f"<|vision_{place}|>") for place in ("start", "end")}
    sizes = {"text_config": text, "vision_config": shape.vision, "tie_word_embeddings": shape.tied}
    return AutoConfig.for_model(shape.family, **sizes, **tokens)


def build_processor(family: str, source: ProcessorMixin) -> ProcessorMixin:
    """A family's own processor, with the tokenizer, the chat template and the pixel budget of a Qwen2-VL's."""
    patch = 16 if family == "qwen3_vl" else 14
    images = Qwen2VLImageProcessor(patch_size=patch, size=dict(source.image_processor.size))
    parts = {"image_processor": images, "tokenizer": source.tokenizer, "chat_template": source.chat_template}
    if family == "qwen3_vl":
        return Qwen3VLProcessor(video_processor=Qwen3VLVideoProcessor(), **parts)
    kind = Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen2VLProcessor
    return kind(video_processor=Qwen2VLVideoProcessor(), **parts)


def build_model(folder: Path, size: str, processor_id: str) -> None:
    """Save a model with random weights, and its processor, into `folder`."""
    shape, source = SHAPES[size], Qwen2VLProcessor.from_pretrained(processor_id)
    config = build_config(shape, source.tokenizer)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    end, pad = map(source.tokenizer.convert_tokens_to_ids, ("<|im_end|>", "<|endoftext|>"))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    build_processor(shape.family, source).save_pretrained(folder)


def count_sizes(tokenizer) -> pd.DataFrame:
    """Parameters of every published model, and how many of them each recipe trains, without weights."""
    lines = {}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(build_config(shape, tokenizer))
        trained = {recipe: count_trained(model, CATALOGUE[recipe]) for recipe in ONE_STAGE}
        lines[name] = {"parameters": model.num_parameters()} | trained
    return pd.DataFrame(lines).T


def build_dataset(folder: Path, side: int, train: int, validation: int) -> None:
    """Draw packages, and enlarge them to squares of `side` pixels (train, val), and to four sizes (mixed); as JPEG."""
    drawn = folder.with_name("drawn")
    draw_dataset(drawn, train=train, validation=validation)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, source, sizes in [("train", "train", MIXED[:1]), ("mixed", "train", MIXED), ("val", "val", MIXED[:1])]:
        sides = [(int(side * width), int(side * height)) for width, height in sizes]
        rows = load_rows(str(drawn), source, None, 0).map(
            lambda row, number, sides=sides: {"image": enlarge(row["image"], sides[number % len(sides)])},
            with_indices=True,
        )
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def enlarge(image: Image.Image, size: tuple[int, int]) -> dict:
    """An image as a JPEG of `size` (width, height) pixels, as datasets stores it."""
    buffer = BytesIO()
    image.convert("RGB").resize(size).save(buffer, "JPEG")
    return {"bytes": buffer.getvalue(), "path": None}


def create_settings(arguments: argparse.Namespace) -> SimpleNamespace:
    """The settings of the story for a few steps of training, and answers of TOKENS tokens."""
    return SimpleNamespace(
        model_id=str(arguments.output / "model"),
        output_dir=str(arguments.output / "runs"),
        max_pixels=1280 * 28 * 28,
        num_epochs=1,
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=False if "compile" in arguments.without else None,
        precision=arguments.precision,
        cache_features="cache" not in arguments.without,
        learning_rates={},
        system_message=None,
        question=None,
        lora_rank=None,
        evaluations=4,
        flip_probability=0.0,
        eval_batch_size=None,
        max_new_tokens=TOKENS,
        seed=0,
        again=False,
        report_to="none",
    )


# Training


@dataclass
class StepClock(TrainerCallback):
    """Seconds of each step of the optimiser, data included."""

    ends: list[float] = field(default_factory=list)

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


@dataclass
class PartClock(TrainerCallback):
    """Seconds of each part of a training; a part is what went before the event that ends it."""

    seconds: dict[str, float] = field(default_factory=dict)
    forward_and_backward: list[float] = field(default_factory=list)  # of each step
    last: float = 0.0

    def tick(self, part: str | None) -> float:
        """Add the time since the last tick to a part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed, self.last = time.perf_counter() - self.last, time.perf_counter()
        if part:
            self.seconds[part] = self.seconds.get(part, 0.0) + passed
        return passed

    def on_train_begin(self, args, state, control, **kwargs):
        self.tick(None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.tick("data")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.forward_and_backward.append(self.tick("forward and backward"))

    def on_step_end(self, args, state, control, **kwargs):
        self.tick("optimiser")

    def on_evaluate(self, args, state, control, **kwargs):
        self.tick("evaluation")

    def on_train_end(self, args, state, control, **kwargs):
        self.tick("checkpoints")

    def summarize(self) -> dict[str, float]:
        """Seconds by part; what the first step took longer than the median counts as compiling."""
        compiling = self.forward_and_backward[0] - float(np.median(self.forward_and_backward))
        rest = self.seconds["forward and backward"] - compiling
        return {"compiling": compiling} | self.seconds | {"forward and backward": rest}


def measure_whole_run(name: str, rows: Dataset, arguments: argparse.Namespace) -> pd.DataFrame:
    """Train a recipe for --epochs on RUN_IMAGES images as the notebook does, and evaluate it: seconds by part."""
    settings, recipe, clock = create_settings(arguments), CATALOGUE[name], PartClock()
    settings.num_epochs, settings.max_steps = arguments.epochs, -1
    splits = [rows.select([number % len(rows) for number in range(count)]) for count in RUN_IMAGES]
    clock.tick(None)
    detector = create_detector(load_model(settings.model_id, recipe.quantized, best_dtype()), settings, LABELS)
    detector.model.generation_config.min_new_tokens = TOKENS
    trainer = build_trainer(detector, recipe, settings, Splits(*splits, rows, LABELS))
    clock.tick("loading")
    trainer.add_callback(clock)
    trainer.train()
    parts = clock.summarize()
    return pd.DataFrame({"seconds": parts | {"together": sum(parts.values())}}).round(1)


def measure_reward(rows: Dataset, arguments: argparse.Namespace) -> pd.DataFrame:
    """Seconds of each step of r5-iou-reward from an untrained adapter of r4-joint, and the highest peak in GiB.

    Random weights do not end their answers, so each of them has all of its 256 tokens.
    """
    settings, recipe, start = create_settings(arguments), CATALOGUE["r4-joint"], arguments.output / "start"
    model = load_model(settings.model_id, recipe.quantized, best_dtype())
    apply_freeze_policy(model, recipe)
    get_peft_model(model, build_lora_config_for_recipe(recipe)).save_pretrained(start)
    write_json(start / "recipe.json", asdict(recipe) | {"base": "../model", "started_from": settings.model_id})
    del model
    release_memory()
    settings.max_new_tokens, settings.evaluations, settings.again = 256, 1, True
    few = rows.select(range(min(len(rows), 16)))
    run = run_reward_recipe(settings, Splits(rows, few, few, LABELS), start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else np.nan
    return pd.DataFrame({"seconds": run.read_log("step_time"), "peak (GiB)": peak}).rename_axis("step").round(1)


def build_stock_trainer(
    recipe: TrainingRecipe, settings: SimpleNamespace, rows: Dataset, kept_modules: list[str] | None
) -> SFTTrainer:
    """TRL as its documentation shows it, on the same examples; adapters in float32, so that losses can be compared."""
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four_bits |= {"bnb_4bit_compute_dtype": best_dtype(), "llm_int8_skip_modules": kept_modules}
    quantization = BitsAndBytesConfig(**four_bits) if recipe.quantized else None
    arguments = {"dtype": best_dtype(), "device_map": "auto" if torch.cuda.is_available() else "cpu"}
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model_id, quantization_config=quantization, attn_implementation="sdpa", **arguments
    )
    lora = build_lora_config_for_recipe(recipe)
    for name, parameter in model.named_parameters() if lora is None else []:
        parameter.requires_grad_(".visual." in name)
    config = SFTConfig(
        output_dir=settings.output_dir,
        max_steps=settings.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=settings.batch_size // 2,
        gradient_checkpointing=False,
        bf16=best_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        seed=settings.seed,
    )
    processor = load_processor(settings.model_id, settings.max_pixels)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=to_training_dataset(rows, create_task(processor, LABELS, settings), Mirroring()),
        data_collator=AssistantOnlyCollator(processor),
        processing_class=processor,
        peft_config=lora,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def build_our_trainer(
    recipe: TrainingRecipe, settings: SimpleNamespace, rows: Dataset, memory: float | None
) -> DetectionTrainer:
    """The project's trainer, without evaluations and checkpoints; planned for `memory` GiB, if given."""
    detector = create_detector(load_model(settings.model_id, recipe.quantized, best_dtype()), settings, LABELS)
    if memory:
        taken = torch.cuda.mem_get_info()[1] - free_memory() if torch.cuda.is_available() else 0
        plan = plan_memory(detector, recipe, settings, memory * 2**30 - taken)
        settings.micro_batch_size, settings.gradient_checkpointing = plan.micro_batch_size, plan.checkpointing
    trainer = build_trainer(detector, recipe, settings, Splits(rows, rows, rows, LABELS))
    config = trainer.args
    config.eval_strategy = config.save_strategy = IntervalStrategy.NO
    config.eval_on_start, config.load_best_model_at_end, config.logging_steps = False, False, 1
    return trainer


def measure_recipe(name: str, whose: str, rows: Dataset, arguments: argparse.Namespace) -> dict:
    """Train a recipe for a few steps: images a second, share of the ceiling, peak memory, losses."""
    settings, recipe, clock = create_settings(arguments), CATALOGUE[name], StepClock()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if whose != "ours":
        trainer = build_stock_trainer(recipe, settings, rows, list(KEPT_MODULES) if whose == "plain" else None)
    else:
        changed = {"precision": arguments.precision} if arguments.precision and recipe.train_llm == "lora" else {}
        recipe = replace(recipe, **changed)
        trainer = build_our_trainer(recipe, settings, rows, arguments.memory)
        expected = count_trained(build_empty_model(settings.model_id), recipe)
        assert count_parameters(trainer.model) == expected, f"{name} is to train {expected:,} numbers"
    trainer.add_callback(clock)
    trainer.train()
    seconds = np.diff(clock.ends)
    rate = arguments.batch_size / np.median(seconds[arguments.warm_up :])
    log = pd.DataFrame(trainer.state.log_history)
    losses, norms = log["loss"].dropna(), log.filter(like="grad_norm_").dropna(how="all")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    flops, trained = count_flops(trainer.model, recipe, rows), count_parameters(trainer.model)
    trainer.accelerator.free_memory()
    line = {"recipe": name, "whose": f"ours, {recipe.precision}" if whose == "ours" else whose}
    line |= {"images/s": round(rate, 2), "TFLOP an image": round(flops / 1e12, 1), "peak GiB": round(peak / 2**30, 1)}
    line |= {"first step (s)": round(seconds[0], 1), "mean loss": round(losses.mean(), 4)}
    line |= {"last loss": round(losses.iloc[-1], 4), "trained": trained}
    return line | {f"least gradient, {area}": norm for area, norm in norms.min().round(4).items()}


def count_parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(model: torch.nn.Module, recipe: TrainingRecipe, rows: Dataset) -> float:
    """What the matrix products with weights need for one image: 2 operations a weight and token, forward; and back.

    Backward takes once as much for the input's gradient, and once more for the weights' where they are trained.
    """
    image = read_row(rows[0])[0]
    patches = (image.width // 14) * (image.height // 14)
    numbers = {"visual": 0, "language_model": 0}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            area = "visual" if "visual" in name else "language_model"
            numbers[area] += module.in_features * module.out_features
    vision = {"frozen": 2, "lora": 4, "full": 6}[recipe.train_vision] * numbers["visual"] * patches
    return vision + 4 * numbers["language_model"] * (patches / 4 + 60)


def measure_ceiling() -> float:
    """Operations a second of one large product of bfloat16 matrices."""
    side = 8192 if torch.cuda.is_available() else 512
    factors = [torch.randn(side, side, device="cuda" if torch.cuda.is_available() else "cpu").bfloat16()] * 2
    times = []
    for _ in range(20):
        clock = time.perf_counter()
        torch.mm(*factors)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return 2 * side**3 / np.median(times)


# Generation


def create_detectors(settings: SimpleNamespace) -> Iterator[tuple[str, Detector]]:
    """The model in 16 bits, then in 4 bits with an adapter (r4-joint), as the notebook evaluates them."""
    model = load_model(settings.model_id, quantized=False, dtype=best_dtype()).eval()
    yield str(best_dtype()).removeprefix("torch."), create_detector(model, settings, LABELS)
    del model
    release_memory()
    recipe, run = CATALOGUE["r4-joint"], RunFolder(Path(settings.output_dir).with_name("adapter"))
    adapted = load_model(settings.model_id, recipe.quantized, best_dtype())
    apply_freeze_policy(adapted, recipe)
    get_peft_model(adapted, build_lora_config_for_recipe(recipe)).save_pretrained(run.path)
    write_json(
        run.path / "recipe.json",
        {"precision": recipe.precision, "base": "../model"},
    )
    del adapted
    release_memory()
    yield "NF4, r4-joint", create_detector(load_trained_model(run.path), settings, LABELS)


def measure_generation(detector: Detector, rows: Dataset, batch_sizes: list[int]) -> pd.DataFrame:
    """Images a second, one by one and in batches, preprocessing included; every answer has TOKENS tokens."""
    detector.model.generation_config.min_new_tokens = TOKENS
    rates = {}
    for _ in range(2):  # the first round warms up
        clock = time.perf_counter()
        ask_one_by_one(detector, rows.select(range(min(16, len(rows)))))
        rates["one by one"] = min(16, len(rows)) / (time.perf_counter() - clock)
    for size in [*sorted(set(batch_sizes)), None]:
        for images in (rows.select(range(min(size or 64, len(rows)))), rows):  # the first round warms up
            clock = time.perf_counter()
            evaluate_detector(replace(detector, batch_size=size), images, show_progress=False)
            rates[f"batches of {size}" if size else "batches (chosen)"] = len(images) / (time.perf_counter() - clock)
    table = pd.DataFrame({"images a second": rates})
    return table.assign(speedup=table["images a second"] / rates["one by one"]).round(2)


def ask_one_by_one(detector: Detector, rows: Dataset) -> list[str]:
    """The plain way: read an image, generate its answer, read the next."""
    return [generate(detector, to_questions([read_row(row)[0]], detector))[0].text for row in rows]


# The command line


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", required=True, help="folder or hub id of Qwen2-VL's processor")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--size", choices=SHAPES, default="qwen2-vl-7b")
    parser.add_argument("--only", nargs="+", default=[*ONE_STAGE, "generation"])
    parser.add_argument("--whose", nargs="+", choices=["stock", "plain", "ours"], default=["stock", "ours"])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warm-up", type=int, default=4, help="steps at the beginning that are not counted")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="default: what the plan says")
    checkpointing = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--gradient-checkpointing", **checkpointing, help="default: what the plan says")
    parser.add_argument("--precision", choices=["bf16", "nf4", "fp8"], help="default: the recipe's own")
    levers = parser.add_argument("--without", nargs="+", default=[], help="levers that are left out")
    levers.choices = ["compile", "cache"]
    parser.add_argument("--memory", type=float, help="GiB that may be planned with; default: what is free")
    parser.add_argument("--mixed", action="store_true", help="images of four sizes")
    parser.add_argument("--images", nargs=2, type=int, default=[64, 256], help="to draw: for training, for answers")
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[32], help="to generate in, besides the chosen")
    parser.add_argument("--epochs", type=int, help="measure whole runs, by parts, in place of a few steps")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--count", action="store_true", help="only count parameters, of all sizes, without weights")
    return parser


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Command line; see the module's docstring. Returns the table of the recipes."""
    arguments = build_parser().parse_args(argv)
    if arguments.count:
        table = count_sizes(Qwen2VLProcessor.from_pretrained(arguments.processor).tokenizer)
        print(table.map("{:,}".format).to_string())
        return table
    model_id, data = arguments.output / "model", arguments.output / "dataset"
    if not (model_id / "config.json").exists():
        build_model(model_id, arguments.size, arguments.processor)
        release_memory()
    if not data.exists():
        build_dataset(data, SHAPES[arguments.size].side, *arguments.images)
    lines, ceiling = [], measure_ceiling()
    for name in [] if arguments.build_only else arguments.only:
        if name == "generation":
            rows = load_rows(str(data), "val", None, 0)
            for precision, detector in create_detectors(create_settings(arguments)):
                table = measure_generation(detector, rows, arguments.batch_sizes)
                print(f"{precision}\n{table.to_string()}", flush=True)
                del detector
        elif name == R5.name:
            rows = load_rows(str(data), "train", None, 0)
            rows = rows.select([number % len(rows) for number in range(arguments.steps * arguments.batch_size)])
            table = measure_reward(rows, arguments)
            print(f"{name}, {arguments.batch_size} images a step\n{table.to_string()}", flush=True)
        elif arguments.epochs:
            table = measure_whole_run(name, load_rows(str(data), "train", None, 0), arguments)
            print(f"{name}, {arguments.epochs} epochs of {RUN_IMAGES[0]:,} images\n{table.to_string()}", flush=True)
        else:
            rows = load_rows(str(data), "mixed" if arguments.mixed else "train", None, 0)
            needed = arguments.steps * arguments.batch_size  # in one epoch: a new one starts new workers
            rows = rows.select([number % len(rows) for number in range(needed)])
            for whose in arguments.whose:
                lines.append(measure_recipe(name, whose, rows, arguments))
                print(pd.DataFrame(lines[-1:]).to_string(index=False), flush=True)
                release_memory()
        release_memory()
    table = pd.DataFrame(lines)
    if lines:
        table["of the ceiling"] = (table["images/s"] * table["TFLOP an image"] * 1e12 / ceiling).round(2)
        print(f"ceiling: {ceiling / 1e12:,.0f} TFLOP/s\n{table.to_string(index=False)}")
    return table


if __name__ == "__main__":
    main()
