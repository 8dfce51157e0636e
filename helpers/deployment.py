"""Merging an adapter into its base, and the card of the merged model.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel, Qwen2VLProcessor

from helpers.conversation import QUESTION, SYSTEM_MESSAGE
from helpers.detection import pixel_budget
from helpers.loading import load_processor
from helpers.recipes import TrainingRecipe


def save_merged(model: PreTrainedModel | PeftModel, target: Path, processor: Qwen2VLProcessor) -> None:
    """Write a model without its adapters, if it has any, and its processor into `target`. Not for 4-bit bases."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    model.save_pretrained(target)
    processor.save_pretrained(target)


MODEL_CARD = """# {base}, fine-tuned for object detection on {dataset}

Trained with the recipe `{recipe.name}` ({recipe.description}). Ask it with the system message

> {system}

and, after the image, with the prompt

> {prompt}

It answers with boxes as `label(x1,y1),(x2,y2)` on a grid from 0 to 1000 in both directions. The processor in this
folder resizes images to at most {max_pixels} pixels. It does not turn a PIL image upright: apply its EXIF orientation
first (`PIL.ImageOps.exif_transpose`). Measured on the evaluation split, merged weights, greedy answers:

{metrics}
"""


def write_model_card(folder: Path, recipe: TrainingRecipe, settings: SimpleNamespace, metrics: dict) -> None:
    """Write `README.md` with metadata that the hub reads, prompt, pixel budget and metrics."""
    base, dataset = settings.model_id, settings.dataset_id
    max_pixels = pixel_budget(load_processor(str(folder), settings.max_pixels))["max_pixels"]
    asked = {"system": SYSTEM_MESSAGE, "prompt": QUESTION, "max_pixels": max_pixels}
    lines = "\n".join(f"- {name}: {value:.3f}" for name, value in metrics.items() if value is not None)
    text = MODEL_CARD.format(base=base, dataset=dataset, recipe=recipe, metrics=lines, **asked)
    data = ModelCardData(base_model=base, datasets=[dataset], library_name="transformers")
    data.pipeline_tag, data.tags = "image-text-to-text", ["object-detection", "trl"]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
