"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import argparse
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, Qwen2VLProcessor

from helpers.boxes import GRID_FAMILIES, PIXEL_FAMILIES, from_model_coordinates, has_area, resized_size
from helpers.conversation import to_conversation
from helpers.data import read_barcodes, read_headers, read_row
from helpers.loading import best_dtype, load_trained_model
from helpers.metrics import (
    POLICIES,
    bootstrap_intervals,
    calibration_error,
    count_errors,
    match_boxes,
    summarize,
    summarize_labels,
)
from helpers.parsing import parse_answer


def to_question(image: Image.Image, processor: Qwen2VLProcessor, prompt: str) -> dict[str, torch.Tensor]:
    """The question about one picture as processor tensors, one row."""
    text = processor.apply_chat_template(to_conversation(prompt), tokenize=False, add_generation_prompt=True)
    return dict(processor(text=[text], images=[[image]], return_tensors="pt"))


def to_batch_of_questions(questions: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of `to_question` as one batch, padded on the left to a multiple of 8; equal lengths are not padded."""
    lengths = [question["input_ids"].shape[1] for question in questions]
    longest = lengths[0] if len(set(lengths)) == 1 else 8 * -(-max(lengths) // 8)
    batch = {}
    for name in questions[0]:
        rows = [question[name] for question in questions]
        if name not in ("pixel_values", "image_grid_thw"):
            value = pad_token_id if name == "input_ids" else 0
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows]
        batch[name] = torch.cat(rows)
    return batch


def to_questions(images: Sequence[Image.Image], processor: Qwen2VLProcessor, prompt: str) -> dict[str, torch.Tensor]:
    """One question per picture as one batch."""
    questions = [to_question(image, processor, prompt) for image in images]
    return to_batch_of_questions(questions, processor.tokenizer.pad_token_id)


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and how sure it was of each token: where the token ends in the text, its probability."""

    text: str
    ends: list[int]
    probabilities: list[float]

    def score(self, start: int, end: int) -> float:
        """Geometric mean of the probabilities of the tokens in `text[start:end]`."""
        begins = [0, *self.ends]
        inside = [p for p, a, b in zip(self.probabilities, begins, self.ends, strict=False) if b > start and a < end]
        return float(np.exp(np.mean(np.log(np.maximum(inside, 1e-12)))))


class ProbabilityRecorder(LogitsProcessor):
    """Keeps the probability of each token that greedy decoding chooses; all scores of all steps take gigabytes."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().softmax(dim=-1).amax(dim=-1))
        return scores


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer, questions: dict[str, torch.Tensor], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to a batch of `to_questions`, special tokens included, padding removed.

    A row that has ended is padded while the others go on; the batch ends with its last row.
    """
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    recorder = ProbabilityRecorder()
    inputs = {name: tensor.to(model.device) for name, tensor in questions.items()}
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList([recorder]), **greedy
    )
    written = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    probabilities = torch.stack(recorder.steps, dim=1).tolist()
    return [to_answer(*row, tokenizer) for row in zip(written, probabilities, strict=True)]


def to_answer(tokens: Sequence[int], probabilities: Sequence[float], tokenizer) -> Answer:
    """One row of token ids and their probabilities as text; a letter of several tokens ends with the last of them."""
    length = len(tokens) - next((n for n, token in enumerate(reversed(tokens)) if token != tokenizer.pad_token_id), 0)
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=False) for n in range(1, length + 1)]
    return Answer(texts[-1] if texts else "", [len(text) for text in texts], list(probabilities[:length]))


def generate_answers(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    images: Sequence[Image.Image],
    prompt: str,
    max_new_tokens: int,
) -> list[str]:
    """One greedy answer per picture, special tokens included, padding removed. The pictures make one batch."""
    questions = to_questions(images, processor, prompt)
    return [answer.text for answer in generate(model, processor.tokenizer, questions, max_new_tokens)]


def evaluate_model(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    rows: Dataset,
    prompt: str,
    batch_size: int | None,
    max_new_tokens: int,
) -> list[dict]:
    """Ask the model about every row. One record per picture, in the order of the rows: see `to_record`.

    Pictures of like size share a batch; a `batch_size` of None takes what the memory allows; the next pictures are
    prepared while the model answers. `group` is the barcode. Raises ValueError for a model of an unknown family.
    """
    model.eval()
    family, budget = model.config.model_type, pixel_budget(processor)
    sizes = [resized_size(width, height, **budget) for width, height, _ in read_headers(rows)]
    order = sorted(range(len(rows)), key=lambda number: sizes[number][0] * sizes[number][1], reverse=True)
    batch_size = batch_size or choose_batch_size(model, max((w * h for w, h in sizes), default=0))
    ids, barcodes = list(rows["image_id"]), read_barcodes(rows)

    def prepare(number: int) -> tuple[int, tuple, dict[str, torch.Tensor]]:
        example = read_row(rows[number])
        question = to_question(example[0], processor, prompt)
        return number, example, question | {"pixel_values": question["pixel_values"].to(model.dtype)}

    prepared = prepare_ahead(prepare, order, ahead=2 * batch_size)
    records = {}
    with tqdm(total=len(rows), desc="evaluating", unit="picture", mininterval=1) as progress:
        while batch := list(itertools.islice(prepared, batch_size)):
            questions = to_batch_of_questions([question for *_, question in batch], processor.tokenizer.pad_token_id)
            answers = generate(model, processor.tokenizer, questions, max_new_tokens)
            for (number, example, _), answer in zip(batch, answers, strict=True):
                record = to_record(ids[number], example, answer.text, family, sizes[number], answer.score)
                records[number] = record | {"group": barcodes[number]}
            progress.update(len(batch))
    return [records[number] for number in range(len(rows))]


def prepare_ahead(function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`function(item)` for every item, in order; up to `ahead` are computed in threads before they are used."""
    workers = min(8, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 1
    with ThreadPoolExecutor(workers or 1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def choose_batch_size(model: PreTrainedModel, pixels: int) -> int:
    """How many pictures of `pixels` pixels the model can be asked about at once: 1 to 64 on a GPU, 32 on a CPU.

    An estimate from the model's shape, on four fifths of the memory that is free: per token the keys and values of all
    layers, and what the largest layers of both towers hold while the question is read.
    """
    if not torch.cuda.is_available():
        return 32
    text, vision = model.config.get_text_config(), model.config.vision_config
    keys = 2 * text.num_hidden_layers * text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layers = 6 * text.intermediate_size + 16 * vision.embed_dim * vision.mlp_ratio  # four patches make a token
    token_bytes = (keys + layers) * best_dtype().itemsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(min(64, max(1, 0.8 * free // (token_bytes * (pixels / 28**2 + 256)))))


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
    score: Callable[[int, int], float] | None = None,
) -> dict:
    """What is kept of one picture, boxes `[x1, y1, x2, y2]` in pixels of the upright picture.

    id, width, height, resized (the size that the model saw), truth, prediction (label, box, and score if `score`
    tells it for a part of the answer), raw (the answer), unread (what of it could not be read), iou (mean over true
    boxes, one to one; None where there are none).
    """
    image, boxes, labels = example
    found = read_answer(answer, *image.size, family, resized, score)
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


def read_answer(
    answer: str,
    width: int,
    height: int,
    family: str,
    resized: tuple[int, int] | None,
    score: Callable[[int, int], float] | None = None,
) -> dict[str, list]:
    """`prediction` (label, pixel box, score) and `unread` of an answer; a box outside the picture is unread."""
    parsed = parse_answer(answer)
    prediction, unread = [], [*parsed.unread]
    for (label, written), span in zip(parsed.objects, parsed.spans, strict=True):
        box = from_model_coordinates(written, width, height, family, resized)
        if has_area(box):
            prediction.append({"label": label, "box": box} | ({"score": score(*span)} if score else {}))
        else:
            unread.append(f"{label}{written}")
    return {"prediction": prediction, "unread": unread}


def save_results(folder: Path, records: Sequence[dict]) -> dict:
    """Write `predictions.jsonl` and `metrics.json` (see `build_report`) into `folder`; returns the metrics."""
    metrics = build_report(records, threshold=0.5, policy="merge")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
    """Gather the figures of every `metrics.json` below `output_dir` in its `comparison.json`, `base` first."""
    files = sorted(output_dir.glob("*/metrics.json"), key=lambda file: (file.parent.name != "base", file.parent.name))
    comparison = {
        file.parent.name: {k: v for k, v in json.loads(file.read_text()).items() if not isinstance(v, dict | str)}
        for file in files
    }
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
    """All figures, calibration, intervals, errors by kind; figures by label where labels count and there are many."""
    labels = summarize_labels(records, threshold) if policy == "multi-class" else {}
    return summarize(records, threshold, policy) | {
        "calibration_error": calibration_error(records, threshold, policy),
        "iou_threshold": threshold,
        "policy": policy,
        "intervals": bootstrap_intervals(records, threshold, policy),
        "errors": count_errors(records, threshold, policy),
        "labels": labels if len(labels) > 1 else {},
    }


def list_figures(report: dict) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval (empty where there is none) of every figure of a report, as text."""
    lines = []
    for name in [*report["intervals"], "mAP", "mAP50", "mAP75", "calibration_error"]:
        value, interval = report[name], report["intervals"].get(name)
        shown = "n/a" if value is None else f"{value:.3f}"
        lines.append((name, shown, "{:.3f}, {:.3f}".format(*interval) if interval else ""))
    return lines


def print_report(report: dict) -> None:
    """A report as tables for people."""
    for name, value, interval in list_figures(report):
        print(f"{name:<18}{value:>6}  {interval and f'[{interval}]'}".rstrip())
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
    batch_size: int | None,
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
