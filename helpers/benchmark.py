"""Memory and speed of training and generation at full size, with random weights: no hub is needed.

    python -m helpers.benchmark --processor FOLDER                # every recipe, then generation; a table each
    python -m helpers.benchmark --processor FOLDER --only r1-llm-only --batch-size 1
    python -m helpers.benchmark --processor FOLDER --build-only   # leaves a model and a dataset for the notebook

FOLDER holds Qwen2-VL's own processor (any Qwen2-VL repository of the hub has it). Random weights take the same memory
and time as trained ones; their answers are noise, so generation is made to write a fixed number of tokens. Images are
980 x 980, 1,225 image tokens each. README.md has figures of one H200; `--size tiny` runs anywhere, to see that it
works.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.trainer_utils import IntervalStrategy

from helpers.data import Splits, load_rows, read_row
from helpers.detection import evaluate_detector
from helpers.generation import Detector, generate, to_questions
from helpers.loading import best_dtype, load_model, release_memory
from helpers.quantization import PUBLISHED_SIZES
from helpers.recipes import CATALOGUE, apply_freeze_policy, build_lora_config_for_recipe
from helpers.runs import RunFolder, write_json
from helpers.tiny.packages import draw_dataset
from helpers.training import build_trainer, create_detector, load_trained_model

SIZES = {
    "7b": {
        "text": PUBLISHED_SIZES["7B"][0] | {"max_position_embeddings": 32768},
        "vision": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16},
        "side": 980,
        "trainable": {"r1-llm-only": 161_480_704, "r2-vision-only": 675_759_104, "r4-joint": 198_180_864},
    },
    "tiny": {
        "text": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "vocab_size": 152064, "max_position_embeddings": 32768},
        "vision": {"depth": 2, "embed_dim": 192, "hidden_size": 256, "mlp_ratio": 4, "num_heads": 3},
        "side": 112,
        "trainable": {},
    },
}  # fmt: skip
TOKENS = 28  # of every answer


def build_model(folder: Path, size: str, processor_id: str) -> None:
    """Save a Qwen2-VL with random weights, and the processor, into `folder`."""
    text = SIZES[size]["text"] | {
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    tokens = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    config = Qwen2VLConfig(text_config=text, vision_config=SIZES[size]["vision"], tie_word_embeddings=False, **tokens)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=151645, pad_token_id=151643)
    model.save_pretrained(folder)
    Qwen2VLProcessor.from_pretrained(processor_id).save_pretrained(folder)


def build_dataset(folder: Path, side: int) -> None:
    """Draw 64 packages to train on and 256 to ask about, enlarged to `side` x `side` pixels, as JPEG."""
    drawn = folder.with_name("drawn")
    draw_dataset(drawn, train=64, validation=256)
    for split in ("train", "val"):
        rows = load_rows(str(drawn), split, None, 0)
        large = rows.map(lambda row: {"image": enlarge(row["image"], side)}, desc="enlarging")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        large.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def enlarge(image: Image.Image, side: int) -> dict:
    """An image as a JPEG of `side` x `side` pixels, as datasets stores it."""
    buffer = BytesIO()
    image.convert("RGB").resize((side, side)).save(buffer, "JPEG")
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
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        gradient_checkpointing=not arguments.no_gradient_checkpointing,
        flip_probability=0.0,
        eval_batch_size=None,
        max_new_tokens=TOKENS,
        seed=0,
        report_to="none",
    )


def measure_recipe(name: str, data: Path, arguments: argparse.Namespace) -> dict:
    """Train a recipe for a few steps: trainable parameters, peak memory (GiB), mean seconds a step."""
    recipe, settings, rows = CATALOGUE[name], create_settings(arguments), load_rows(str(data), "train", None, 0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    detector = create_detector(load_model(settings.model_id, recipe.quantized, best_dtype()), settings)
    trainer = build_trainer(detector, recipe, settings, Splits(rows, rows, rows))
    config = trainer.args
    config.eval_strategy = config.save_strategy = IntervalStrategy.NO
    config.eval_on_start, config.load_best_model_at_end, config.logging_steps = False, False, 1
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trainable == SIZES[arguments.size]["trainable"].get(name, trainable), trainable
    loaded, clock = torch.cuda.memory_allocated() / 2**30, time.perf_counter()
    trainer.train()
    return {
        "recipe": name,
        "batch": f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps}",
        "gradient checkpointing": config.gradient_checkpointing,
        "trainable": f"{trainable:,}",
        "loaded GiB": round(loaded, 1),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "s a step": round((time.perf_counter() - clock) / arguments.steps, 1),
    }


def create_detectors(settings: SimpleNamespace) -> Iterator[tuple[str, Detector]]:
    """The model in 16 bits, then in 4 bits with an adapter (r4-joint), as the notebook evaluates them."""
    model = load_model(settings.model_id, quantized=False, dtype=best_dtype()).eval()
    yield str(best_dtype()).removeprefix("torch."), create_detector(model, settings)
    del model
    release_memory()
    recipe, run = CATALOGUE["r4-joint"], RunFolder(Path(settings.output_dir).with_name("adapter"))
    adapted = load_model(settings.model_id, recipe.quantized, best_dtype())
    apply_freeze_policy(adapted, recipe)
    get_peft_model(adapted, build_lora_config_for_recipe(recipe)).save_pretrained(run.path)
    write_json(run.path / "recipe.json", {"name": recipe.name, "quantized": recipe.quantized})
    del adapted
    release_memory()
    yield "NF4, r4-joint", create_detector(load_trained_model(run.path), settings)


def measure_generation(detector: Detector, rows: Dataset, batch_sizes: list[int]) -> pd.DataFrame:
    """Images a second, one by one and in batches, preprocessing included; every answer has TOKENS tokens."""
    detector.model.generation_config.min_new_tokens = TOKENS
    rates = {}
    for _ in range(2):  # the first round warms up
        clock = time.perf_counter()
        ask_one_by_one(detector, rows.select(range(16)))
        rates["one by one"] = 16 / (time.perf_counter() - clock)
    for size in [*sorted(set(batch_sizes)), None]:
        for images in (rows.select(range(size or 64)), rows):  # the first round warms up
            clock = time.perf_counter()
            evaluate_detector(replace(detector, batch_size=size), images, show_progress=False)
            rates[f"batches of {size}" if size else "batches (chosen)"] = len(images) / (time.perf_counter() - clock)
    table = pd.DataFrame({"images a second": rates})
    return table.assign(speedup=table["images a second"] / rates["one by one"]).round(2)


def ask_one_by_one(detector: Detector, rows: Dataset) -> list[str]:
    """The plain way: read an image, generate its answer, read the next."""
    return [generate(detector, to_questions([read_row(row)[0]], detector))[0].text for row in rows]


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", required=True, help="folder or hub id of Qwen2-VL's processor")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--only", nargs="+", default=["r1-llm-only", "r2-vision-only", "r4-joint", "generation"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=8)
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[8, 32], help="to generate in, besides the chosen"
    )
    parser.add_argument("--build-only", action="store_true")
    arguments = parser.parse_args()
    model_id, data = arguments.output / "model", arguments.output / "dataset"
    if not (model_id / "config.json").exists():
        build_model(model_id, arguments.size, arguments.processor)
        build_dataset(data, SIZES[arguments.size]["side"])
        release_memory()
    lines = []
    for name in [] if arguments.build_only else arguments.only:
        if name == "generation":
            rows = load_rows(str(data), "val", None, 0)
            for precision, detector in create_detectors(create_settings(arguments)):
                table = measure_generation(detector, rows, arguments.batch_sizes)
                print(f"{precision}\n{table.to_string()}", flush=True)
                del detector
        else:
            lines.append(measure_recipe(name, data, arguments))
            print(pd.DataFrame(lines[-1:]).to_string(index=False), flush=True)
        release_memory()
    if lines:
        print(pd.DataFrame(lines).to_string(index=False))


if __name__ == "__main__":
    main()
