"""Merging an adapter into its base, and the card of the merged model.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from helpers.boxes import get_family
from helpers.conversation import format_answer
from helpers.generation import Detector
from helpers.runs import RunFolder, write_json


def save_merged(detector: Detector, run: RunFolder, target: Path) -> None:
    """Write what a run trained without its adapters, if it has any, into `target`. Not for a base in 4 bits."""
    is_adapted = isinstance(detector.model, PeftModel)
    model = detector.model.merge_and_unload(safe_merge=True) if is_adapted else detector.model
    model.save_pretrained(target)
    detector.processor.save_pretrained(target)
    write_json(target / "recipe.json", run.read_recipe() | {"precision": "bf16"})


MODEL_CARD = """# {base}, fine-tuned for object detection on {dataset}

Trained with the recipe `{recipe}` ({description}) to detect: {labels}. Ask it with the system message

> {system_message}

and, after the image, with the prompt

> {question}

It answers as in {example}, with boxes x1, y1, x2, y2 {coordinates}. The processor in this folder resizes images to
at most {max_pixels} pixels. It does not turn a PIL image upright: apply its EXIF orientation first
(`PIL.ImageOps.exif_transpose`). Measured on the evaluation split, greedy answers:

{metrics}
"""
COORDINATES = {
    "grid": "on a grid from 0 to 1000 in both directions",
    "pixels": "in pixels of the image as the processor resized it",
}


def as_code(text: str) -> str:
    """A text on one line, of which Markdown and HTML change no letter."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def write_model_card(folder: Path, metrics: dict) -> None:
    """Write `README.md` for a run or a merged model: metadata that the hub reads, task, metrics."""
    saved, task = RunFolder(folder).read_recipe(), RunFolder(folder).read_task()
    base, dataset = saved["settings"]["model_id"], saved["settings"]["dataset_id"]
    lines = "\n".join(f"- {name}: {value:.3f}" for name, value in metrics.items() if value is not None)
    text = MODEL_CARD.format(
        base=as_code(base),
        dataset=as_code(dataset),
        recipe=saved["name"],
        description=saved["description"],
        labels=", ".join(map(as_code, task.labels)),
        system_message=as_code(task.system_message),
        question=as_code(task.question),
        example=as_code(format_answer(task.labels[:1], [[120, 240, 480, 960]], task.family)),
        coordinates=COORDINATES[get_family(task.family).coordinates],
        max_pixels=task.pixel_budget["max_pixels"],
        metrics=lines,
    )
    data = ModelCardData(base_model=base, datasets=[dataset], pipeline_tag="image-text-to-text")
    data.library_name = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    data.tags = ["object-detection", "trl"]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
