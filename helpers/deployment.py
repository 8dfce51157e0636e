"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from PIL import Image, ImageOps
from transformers import PreTrainedModel, Qwen2VLProcessor

from helpers.boxes import resized_size
from helpers.conversation import SYSTEM_MESSAGE
from helpers.evaluation import generate, pixel_budget, read_answer, to_questions
from helpers.recipes import TrainingRecipe


def save_merged(model: PreTrainedModel | PeftModel, target: Path, processor: Qwen2VLProcessor) -> None:
    """Write a model without its adapters, if it has any, and its processor into `target`. Not for 4-bit bases."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    model.save_pretrained(target)
    processor.save_pretrained(target)


def detect(
    image: Image.Image, model: PreTrainedModel, processor: Qwen2VLProcessor, prompt: str, max_new_tokens: int = 256
) -> list[dict]:
    """The objects in one picture: `{"label", "box", "score"}`, boxes in pixels of the upright picture."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    answer = generate(model, processor.tokenizer, to_questions([upright], processor, prompt), max_new_tokens)[0]
    resized = resized_size(*upright.size, **pixel_budget(processor))
    return read_answer(answer.text, *upright.size, model.config.model_type, resized, answer.score)["prediction"]


MODEL_CARD = """{metadata}
# {base}, fine-tuned for object detection on {dataset}

Trained with the recipe `{recipe}` ({description}). Ask it with the system message

> {system}

and, after the picture, with the prompt

> {prompt}

It answers with boxes as `label(x1,y1),(x2,y2)` on a grid from 0 to 1000 in both directions. Pictures are turned
upright (EXIF) and resized to at most {max_pixels:,} pixels, as the processor in this folder does by itself.

| metric | value |
| --- | --- |
{metrics}

Measured on {n} pictures of the evaluation split, merged weights, greedy answers.
"""


def write_model_card(
    folder: Path, base: str, dataset: str, recipe: TrainingRecipe, prompt: str, max_pixels: int, metrics: dict
) -> None:
    """Write `README.md` with metadata that the hub reads, prompt, pixel budget and metrics."""
    data = ModelCardData(
        base_model=base,
        datasets=[dataset],
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["object-detection", "trl"],
        model_name=folder.name,
        eval_results=[
            EvalResult(
                task_type="object-detection",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="mean_iou",
                metric_value=round(metrics["mean_iou"], 3),
            )
        ],
    )
    text = MODEL_CARD.format(
        metadata=f"---\n{data.to_yaml()}\n---\n",
        base=base,
        dataset=dataset,
        recipe=recipe.name,
        description=recipe.description,
        system=SYSTEM_MESSAGE,
        prompt=prompt,
        max_pixels=max_pixels,
        metrics="\n".join(
            f"| {name} | {value:.3f} |" for name, value in metrics.items() if name != "n" and value is not None
        ),
        n=metrics["n"],
    )
    ModelCard(text).save(folder / "README.md")
