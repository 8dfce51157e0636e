"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen2VLProcessor

from helpers.boxes import GRID_FAMILIES, PIXEL_FAMILIES, from_model_coordinates, has_area, resized_size
from helpers.conversation import to_conversation
from helpers.data import read_row
from helpers.loading import load_trained_model
from helpers.metrics import POLICIES, bootstrap_intervals, count_errors, match_boxes, summarize, summarize_labels
from helpers.parsing import parse_answer


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


def evaluate_model(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    rows: Dataset,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict]:
    """Ask the model about every row. One record per picture: see `to_record`.

    `group` is added where rows have `meta.barcode`. Raises ValueError for a model of an unknown family.
    """
    model.eval()
    family, budget = model.config.model_type, pixel_budget(processor)
    records = []
    with tqdm(total=len(rows), desc="evaluating", unit="picture", mininterval=1) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows.select(range(start, min(start + batch_size, len(rows))))
            examples = [read_row(row) for row in batch]
            answers = generate_answers(model, processor, [e[0] for e in examples], prompt, max_new_tokens)
            for image_id, example, answer in zip(batch["image_id"], examples, answers, strict=True):
                resized = resized_size(*example[0].size, **budget)
                records.append(to_record(image_id, example, answer, family, resized))
            progress.update(len(batch))
    if "meta" in rows.column_names:
        records = [record | {"group": meta["barcode"]} for record, meta in zip(records, rows["meta"], strict=True)]
    return records


def pixel_budget(processor: Qwen2VLProcessor) -> dict[str, int]:
    """The processor's settings as arguments of `resized_size`."""
    settings = processor.image_processor
    return {
        "factor": settings.patch_size * settings.merge_size,
        "min_pixels": settings.size["shortest_edge"],
        "max_pixels": settings.size["longest_edge"],
    }


def to_record(
    image_id: str,
    example: tuple[Image.Image, list, list[str]],
    answer: str,
    family: str,
    resized: tuple[int, int],
) -> dict:
    """What is kept of one picture, boxes `[x1, y1, x2, y2]` in pixels of the upright picture.

    id, width, height, resized (the size that the model saw), truth, prediction (label and box each), raw (the answer),
    unread (what of it could not be read), iou (mean over true boxes, one to one; None where there are none).
    """
    image, boxes, labels = example
    found = read_answer(answer, *image.size, family, resized)
    overlaps = match_boxes(boxes, [thing["box"] for thing in found["prediction"]])
    return {
        "id": image_id,
        "width": image.width,
        "height": image.height,
        "resized": list(resized),
        "truth": [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)],
        "raw": answer,
        "iou": float(np.mean(overlaps)) if overlaps else None,
    } | found


def read_answer(answer: str, width: int, height: int, family: str, resized: tuple[int, int] | None) -> dict[str, list]:
    """`prediction` (label and pixel box each) and `unread` of an answer; a box outside the picture is unread."""
    parsed = parse_answer(answer)
    prediction, unread = [], [*parsed.unread]
    for label, written in parsed.objects:
        box = from_model_coordinates(written, width, height, family, resized)
        if has_area(box):
            prediction.append({"label": label, "box": box})
        else:
            unread.append(f"{label}{written}")
    return {"prediction": prediction, "unread": unread}


def save_results(folder: Path, records: Sequence[dict]) -> dict[str, float | None]:
    """Write `predictions.jsonl` and `metrics.json` into `folder`; returns the metrics."""
    metrics = summarize(records)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
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


LINE_FORMAT = (
    'a line is {"id": ..., "width": pixels, "height": pixels, "raw": "the answer", '
    '"truth": [{"label": ..., "box": [x1, y1, x2, y2] in pixels}, ...]}, with an empty list where there is nothing'
)


def read_predictions(path: Path, family: str) -> list[dict]:
    """The records of a JSON Lines file, their answers parsed anew. Blank lines are skipped.

    Raises OSError for a file that cannot be read, ValueError (naming the line) for one that holds something else.
    """
    lines = path.read_bytes().splitlines()
    records = [read_line(line, f"{path}, line {n}", family) for n, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise ValueError(f"{path} is empty: write one line per picture; {LINE_FORMAT}.")
    return records


def read_line(text: bytes, place: str, family: str) -> dict:
    """One line as a record; `place` is for the message. Raises ValueError."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {LINE_FORMAT}.") from error
    if problem := describe_line_problem(line):
        raise ValueError(f"{place}: {problem}; {LINE_FORMAT}.")
    resized = tuple(line["resized"]) if "resized" in line else None
    return line | read_answer(line["raw"], line["width"], line["height"], family, resized)


def describe_line_problem(line: object) -> str | None:
    """What is wrong with a line of predictions, or None."""
    if not isinstance(line, dict):
        return "not a JSON object"
    missing = [name for name in ("id", "width", "height", "raw", "truth") if name not in line]
    if missing:
        return f"no field {', '.join(missing)}"
    if not is_size([line["width"], line["height"]]) or not is_size(line.get("resized", [1, 1])):
        return "width, height (and resized, where given) must be whole numbers of pixels, at least 1"
    if not isinstance(line["raw"], str):
        return "raw must be a text"
    if not isinstance(line["truth"], list) or not all(map(is_labelled_box, line["truth"])):
        return "truth must be a list of labelled boxes with x1 < x2 and y1 < y2"
    return None


def is_size(value: object) -> bool:
    """Whether a JSON value is `[width, height]`."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v >= 1 for v in value)


def is_labelled_box(value: object) -> bool:
    """Whether a JSON value is `{"label": text, "box": [x1, y1, x2, y2]}` with an area."""
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return False
    box = value.get("box")
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    return is_box and has_area(box)


def build_report(records: Sequence[dict], threshold: float, policy: str) -> dict:
    """All figures, their intervals, errors by kind, and figures by label where labels count and there are several."""
    labels = summarize_labels(records, threshold) if policy == "multi-class" else {}
    return summarize(records, threshold, policy) | {
        "iou_threshold": threshold,
        "policy": policy,
        "intervals": bootstrap_intervals(records, threshold, policy),
        "errors": count_errors(records, threshold, policy),
        "labels": labels if len(labels) > 1 else {},
    }


def print_report(report: dict) -> None:
    """A report as tables for people."""
    for name in [*report["intervals"], "mAP", "mAP50", "mAP75"]:
        value, interval = report[name], report["intervals"].get(name)
        shown = "n/a" if value is None else f"{value:.3f}"
        print(f"{name:<16}{shown:>7}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))
    print(f"{report['n']} pictures; hits from IoU {report['iou_threshold']} on; labels: {report['policy']}")
    print("boxes: " + ", ".join(f"{count} {kind}" for kind, count in report["errors"].items()))
    if report["labels"]:
        print(pd.DataFrame(report["labels"]).T.to_string(float_format="{:.3f}".format))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a file of answers: `python -m helpers.evaluation --predictions FILE.jsonl`. Exit code 2 on bad input."""
    parser = argparse.ArgumentParser(description="Measure predicted boxes against true ones.", epilog=LINE_FORMAT)
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU from which on a pair of boxes is a hit")
    parser.add_argument("--policy", choices=POLICIES, default="merge", help="which labels count, and whether they do")
    parser.add_argument("--family", choices=[*GRID_FAMILIES, *PIXEL_FAMILIES], default="qwen2_vl")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(arguments)
    if not 0 < options.iou <= 1:
        parser.error(f"--iou {options.iou} is not an IoU: give a number above 0, up to 1")
    try:
        records = read_predictions(options.predictions, options.family)
    except OSError as error:
        parser.error(f"{options.predictions} cannot be read ({error.strerror}): give --predictions an existing file")
    except ValueError as error:
        parser.error(str(error))
    report = build_report(records, options.iou, options.policy)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


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
    """Evaluate what a recipe left in `folder` and write the results there; None, and a line, if nothing is there."""
    if not (folder / "recipe.json").exists():
        print(f"{folder.name}: skipped, {folder} holds no trained model")
        return None
    records = evaluate_model(load_trained_model(folder), processor, rows, prompt, batch_size, max_new_tokens)
    return save_results(folder, records)


def load_records(folder: Path) -> list[dict]:
    """The lines of a `predictions.jsonl`."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
