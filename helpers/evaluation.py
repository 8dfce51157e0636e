"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen2VLProcessor

from helpers.boxes import GRID, from_grid
from helpers.conversation import to_conversation
from helpers.data import read_row
from helpers.loading import load_trained_model


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    images: Sequence[Image.Image],
    prompt: str,
    max_new_tokens: int,
) -> list[str]:
    """One greedy answer per picture, special tokens included, padding removed. The pictures make one batch."""
    text = processor.apply_chat_template(to_conversation(prompt), tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[text] * len(images),
        images=[[image] for image in images],
        padding=True,
        padding_side="left",
        pad_to_multiple_of=8,
        return_tensors="pt",
    ).to(model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    return [answer.replace(processor.tokenizer.pad_token, "") for answer in answers]


NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX_PATTERN = re.compile(rf"\({NUMBER},{NUMBER}\)\s*,?\s*\({NUMBER},{NUMBER}\)")
MARKUP_PATTERN = re.compile(r"<[^<>]*>")


def parse_answer(answer: str) -> list[tuple[str, list[float]]]:
    """Every `label(x1,y1),(x2,y2)` in a model's answer, as label and box `[x1, y1, x2, y2]` on the 0..1000 grid.

    Tags and special tokens, spaces, decimals, swapped corners and numbers off the grid are put right; what holds no
    box gives an empty list. A box without a label of its own takes the one before it.
    """
    objects: list[tuple[str, list[float]]] = []
    end = 0
    for match in BOX_PATTERN.finditer(answer):
        words = MARKUP_PATTERN.sub(" ", answer[end : match.start()]).strip(" \n,;:.")
        label = words or (objects[-1][0] if objects else "")
        xs, ys = sorted(map(float, match.group(1, 3))), sorted(map(float, match.group(2, 4)))
        box = [min(GRID, max(0.0, v)) for v in (xs[0], ys[0], xs[1], ys[1])]
        if box[0] < box[2] and box[1] < box[3]:
            objects.append((label, box))
        end = match.end()
    return objects


def match_boxes(truth: Sequence[Sequence[float]], prediction: Sequence[Sequence[float]]) -> list[float]:
    """IoU of every true box with the predicted box assigned to it, one to one; 0 where none was left.

    Boxes are `[x1, y1, x2, y2]` in any common unit. The assignment maximises the sum of IoU
    (Kuhn, "The Hungarian method for the assignment problem", 1955).
    """
    overlaps = [0.0] * len(truth)
    if len(prediction):
        ious = box_iou(torch.tensor(truth, dtype=torch.float64), torch.tensor(prediction, dtype=torch.float64)).numpy()
        for true_index, predicted_index in zip(*linear_sum_assignment(ious, maximize=True), strict=True):
            overlaps[true_index] = float(ious[true_index, predicted_index])
    return overlaps


def summarize(records: Sequence[dict]) -> dict[str, float]:
    """Metrics over the records of `evaluate_model`, one record per picture. Raises ValueError when there is none."""
    if not records:
        raise ValueError("No picture was evaluated: EVAL_SAMPLES must be at least 1.")
    ious = np.array([record["iou"] for record in records])
    return {
        "mean_iou": float(ious.mean()),
        "median_iou": float(np.median(ious)),
        "detection_rate": float(np.mean([len(record["prediction"]) > 0 for record in records])),
        "iou_gt_0.5": float((ious > 0.5).mean()),
        "iou_gt_0.7": float((ious > 0.7).mean()),
        "n": len(records),
    }


def evaluate_model(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    rows: Dataset,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict]:
    """Ask the model about every row. One record per picture: id, size, truth, prediction (pixels), raw text, IoU."""
    model.eval()
    records = []
    with tqdm(total=len(rows), desc="evaluating", unit="picture", mininterval=1) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows.select(range(start, min(start + batch_size, len(rows))))
            examples = [read_row(row) for row in batch]
            answers = generate_answers(model, processor, [e[0] for e in examples], prompt, max_new_tokens)
            records += [to_record(*args) for args in zip(batch["image_id"], examples, answers, strict=True)]
            progress.update(len(batch))
    return records


def to_record(image_id: str, example: tuple[Image.Image, list, list[str]], answer: str) -> dict:
    """What is kept of one picture, boxes `[x1, y1, x2, y2]` in pixels of the upright picture."""
    image, boxes, labels = example
    objects = [(label, from_grid(box, *image.size)) for label, box in parse_answer(answer)]
    return {
        "id": image_id,
        "width": image.width,
        "height": image.height,
        "truth": [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)],
        "prediction": [{"label": label, "box": box} for label, box in objects],
        "raw": answer,
        "iou": float(np.mean(match_boxes(boxes, [box for _, box in objects]))),
    }


def save_results(folder: Path, records: Sequence[dict]) -> dict[str, float]:
    """Write `predictions.jsonl` and `metrics.json` into `folder`; returns the metrics."""
    metrics = summarize(records)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def save_comparison(output_dir: Path) -> dict[str, dict[str, float]]:
    """Gather every `metrics.json` below `output_dir` into its `comparison.json`: `base` first, then by name."""
    files = sorted(output_dir.glob("*/metrics.json"), key=lambda file: (file.parent.name != "base", file.parent.name))
    comparison = {file.parent.name: json.loads(file.read_text()) for file in files}
    write_text(output_dir / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    return comparison


def write_text(file: Path, text: str) -> None:
    """Write through a temporary file: whoever is interrupted keeps the old file, never half of the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


def measure_agreement(records: Sequence[dict], reference: Sequence[dict]) -> float:
    """Mean IoU between the boxes of two models on the same pictures; 1 where both found nothing."""
    scores = []
    for record, other in zip(records, reference, strict=True):
        boxes, wanted = [[thing["box"] for thing in some["prediction"]] for some in (record, other)]
        scores.append(np.mean(match_boxes(wanted, boxes)) if wanted else float(not boxes))
    return float(np.mean(scores))


def load_and_evaluate_demo(
    folder: Path,
    processor: Qwen2VLProcessor,
    rows: Dataset,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float] | None:
    """Load what a recipe left in `folder`, evaluate it, write the results there; None, and a line, if nothing is there."""
    if not (folder / "recipe.json").exists():
        print(f"{folder.name}: skipped, {folder} holds no trained model")
        return None
    records = evaluate_model(load_trained_model(folder), processor, rows, prompt, batch_size, max_new_tokens)
    return save_results(folder, records)


def load_records(folder: Path) -> list[dict]:
    """The lines of a `predictions.jsonl`."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
