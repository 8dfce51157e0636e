"""More accurate boxes for more time: means of digits, a mirrored copy, a second look.

Printed from notebooks/08_trust.py: edit that, then run `make sync`.
"""

import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import LogitsProcessorList

from helpers.boxes import Box, coordinate_range, flip_horizontally, resized_size
from helpers.conversation import format_answer
from helpers.data import read_row
from helpers.detection import add_answer, to_record
from helpers.generation import GREEDY, Answer, Detector, ProbabilityRecorder, to_answer, to_questions
from helpers.metrics import assign_boxes, compute_ious
from helpers.parsing import parse_answer

Prediction = list[dict]  # of one image: {"label", "box", "score"}, boxes in pixels of the upright image
Mean = Callable[[str, np.ndarray], float]  # of a number as written and its digits' distributions (places, 10)


class DigitRecorder(ProbabilityRecorder):
    """Keeps the probabilities of the ten digits at each step as well; `digits` are their token ids."""

    def __init__(self, digits: Sequence[int]):
        super().__init__()
        self.digits, self.by_digit = list(digits), []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.by_digit.append(scores[:, self.digits].float().softmax(dim=-1))
        return super().__call__(input_ids, scores)


@torch.inference_mode()
def generate_with_digits(detector: Detector, images: Sequence[Image.Image]) -> list[tuple[Answer, np.ndarray]]:
    """Greedy answers about upright images, each with the probabilities (tokens, 10) of the digits at every token.

    They are conditional on a digit being written there, and on the tokens before it.
    """
    tokenizer, questions = detector.processor.tokenizer, to_questions(images, detector)
    recorder = DigitRecorder(tokenizer.convert_tokens_to_ids([*"0123456789"]))
    limits = {"max_new_tokens": detector.max_new_tokens, "logits_processor": LogitsProcessorList([recorder])}
    tokens = detector.model.generate(**questions, **limits, **GREEDY)
    written = tokens[:, questions["input_ids"].shape[1] :].tolist()
    chosen, digits = (torch.stack(steps, dim=1).cpu() for steps in (recorder.steps, recorder.by_digit))
    rows = zip(written, chosen.tolist(), digits.numpy(), strict=True)
    return [(to_answer(ids, probabilities, tokenizer), by_digit) for ids, probabilities, by_digit in rows]


WHOLE_NUMBER = re.compile(r"(?<![\d.])\d+(?![\d.])")


def mean_by_place(number: str, digits: np.ndarray) -> float:
    """The mean of each digit, put together as if the places were independent, which they are not."""
    return float((digits @ np.arange(10)) @ 10.0 ** np.arange(len(number))[::-1])


def mean_nearby(number: str, digits: np.ndarray) -> float:
    """The mean among numbers with the tens that were written, or one more or less; the hundreds stay.

    The units are known for the tens that were written; beside them they are taken to be equally likely.
    """
    if len(number) < 2:
        return float(number)
    tens, values = int(number[-2]), 10 * np.arange(10) + 4.5
    values[tens] = 10 * tens + digits[-1] @ np.arange(10)
    near = slice(max(0, tens - 1), tens + 2)
    return int(number) // 100 * 100 + float(np.average(values[near], weights=digits[-2][near]))


def write_means(answer: Answer, digits: np.ndarray, mean: Mean) -> Answer:
    """The answer with the mean in place of every whole number in its boxes; tokens keep their probabilities."""
    starts = [0, *answer.ends]
    pieces, token_at = [answer.text[a:b] for a, b in pairwise(starts)], {start: n for n, start in enumerate(starts)}
    for span in parse_answer(answer.text).spans:
        for number in WHOLE_NUMBER.finditer(answer.text, *span):
            tokens = [token_at[place] for place in range(*number.span()) if place in token_at]
            if len(tokens) == len(number[0]):  # a token for each digit
                pieces[tokens[0] : tokens[-1] + 1] = [f"{mean(number[0], digits[tokens]):.1f}"] + [""] * (
                    len(tokens) - 1
                )
    return Answer("".join(pieces), np.cumsum([*map(len, pieces)]).tolist(), answer.probabilities)


def look(detector: Detector, images: Sequence[Image.Image], mean: Mean | None = None) -> list[Prediction]:
    """Greedy answers about upright images; with `mean`, numbers become means over the digits' distributions."""
    predictions = []
    for image, (answer, digits) in zip(images, generate_with_digits(detector, images), strict=True):
        resized = resized_size(*image.size, **detector.task.pixel_budget)
        record = {"width": image.width, "height": image.height, "resized": resized, "truth": []}
        chosen = write_means(answer, digits, mean) if mean else answer
        predictions.append(add_answer(record, chosen, detector.task)["prediction"])
    return predictions


def mean_score(prediction: Prediction) -> float:
    """Mean score of the boxes of an image; 0 without any."""
    return float(np.mean([labelled["score"] for labelled in prediction])) if prediction else 0.0


def fuse(prediction: Prediction, other: Prediction, threshold: float = 0.5) -> Prediction:
    """The surer of two answers about an image, its boxes averaged, by score, with those of the other that agree.

    Boxes agree from an IoU of `threshold` on, under one label; they are paired one to one.
    """
    surer, other = sorted([prediction, other], key=mean_score, reverse=True)
    ious, fused = compute_ious(surer, other), [*surer]
    for row, column in zip(*assign_boxes(ious, threshold), strict=True):
        if ious[row, column] >= threshold:
            boxes, scores = zip(
                *((labelled["box"], labelled["score"]) for labelled in (surer[row], other[column])), strict=True
            )
            fused[row] = surer[row] | {"box": np.average(boxes, axis=0, weights=scores).tolist()}
    return fused


def look_mirrored(detector: Detector, images: Sequence[Image.Image], mean: Mean | None = None) -> list[Prediction]:
    """The answers about images and about their mirrored copies, `fuse`d."""
    predictions = look(detector, images, mean)
    mirrored = look(detector, [ImageOps.mirror(image) for image in images], mean)
    fused = []
    for image, prediction, other in zip(images, predictions, mirrored, strict=True):
        _, boxes = flip_horizontally(image, [labelled["box"] for labelled in other])
        back = [labelled | {"box": box} for labelled, box in zip(other, boxes, strict=True)]
        fused.append(fuse(prediction, back))
    return fused


MARGIN = 0.5  # around a box, of its width and height, that a second look shows as well


def crop_around(image: Image.Image, box: Box, pixels: int) -> tuple[Image.Image, list[int]]:
    """The surroundings of a box, enlarged to about so many pixels, and where they are, `[x1, y1, x2, y2]`."""
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    across, down = max(MARGIN * width, height / 20), max(MARGIN * height, width / 20)  # processors refuse slivers
    cut = [max(0, int(x1 - across)), max(0, int(y1 - down))]
    cut += [min(image.width, int(x2 + across) + 1), min(image.height, int(y2 + down) + 1)]
    size = np.subtract(cut[2:], cut[:2])
    enlarged = np.maximum(1, np.round(size * (pixels / size.prod()) ** 0.5)).astype(int)
    return image.crop(cut).resize(enlarged.tolist(), Image.Resampling.BICUBIC), cut


def look_closer(detector: Detector, images: Sequence[Image.Image], mean: Mean | None = None) -> list[Prediction]:
    """Greedy answers, then a second look at the surroundings of each box: the surer box is kept."""
    predictions, pixels = look(detector, images, mean), detector.task.pixel_budget["max_pixels"]
    places = [(number, k) for number, prediction in enumerate(predictions) for k in range(len(prediction))]
    crops = [crop_around(images[number], predictions[number][k]["box"], pixels) for number, k in places]
    seen = look(detector, [crop for crop, _ in crops], mean) if crops else []
    for (number, k), (crop, cut), found in zip(places, crops, seen, strict=True):
        scale = np.subtract(cut[2:], cut[:2]) / crop.size
        moved = [one | {"box": (np.reshape(one["box"], (2, 2)) * scale + cut[:2]).ravel().tolist()} for one in found]
        predictions[number][k] = choose_surer(predictions[number][k], moved)
    return predictions


def choose_surer(first: dict, others: Prediction) -> dict:
    """A box, or of the others the one that overlaps it most, under its label, if that has a higher score."""
    ious = compute_ious([first], others)[0]
    return max(first, others[int(ious.argmax())] if ious.any() else first, key=lambda labelled: labelled["score"])


RUNGS = {  # name: how images are asked about, and how numbers are read
    "greedy": (look, None),
    "mean by place": (look, mean_by_place),
    "mean nearby": (look, mean_nearby),
    "second look": (look_closer, None),
    "mirrored": (look_mirrored, None),
    "mirrored, mean nearby": (look_mirrored, mean_nearby),
}
BEST = "mirrored, mean nearby"


def to_rung_record(record: dict, prediction: Prediction, detector: Detector) -> dict:
    """A record (`to_record`) with boxes as if the model had written them, to a tenth of its units; scores stay."""
    place = record["width"], record["height"], detector.task.family, record["resized"]
    scale = np.array(coordinate_range(*place) * 2) / (place[:2] * 2)
    written = [([round(float(v), 1) for v in labelled["box"] * scale], labelled) for labelled in prediction]
    written.sort(key=lambda pair: pair[0][1::-1])  # as `format_answer` does
    labels, boxes = [labelled["label"] for _, labelled in written], [box for box, _ in written]
    answered = add_answer(record, Answer(format_answer(labels, boxes, detector.task.family)), detector.task)
    scores = [labelled["score"] for _, labelled in written]
    scored = [labelled | {"score": score} for labelled, score in zip(answered["prediction"], scores, strict=True)]
    return answered | {"prediction": scored}


def evaluate_rungs(detector: Detector, rows: Dataset, names=(BEST,), show_progress: bool = True) -> dict:
    """For each rung its `records`, as of `evaluate_detector`, and the `seconds` that its answers took.

    All rungs are asked about a batch before the next one, so that a busy machine slows each alike.
    """
    size = detector.batch_size or (64 if torch.cuda.is_available() else 16)
    found = {name: {"records": [], "seconds": 0.0} for name in names}
    detector.model.eval()
    for start in tqdm(range(0, len(rows), size), desc="rungs", unit="batch", disable=not show_progress):
        batch = rows.select(range(start, min(start + size, len(rows))))
        images, records = [read_row(row)[0] for row in batch], [to_record(row, detector.task) for row in batch]
        for name, rung in found.items():
            ask, mean = RUNGS[name]
            began = time.perf_counter()
            predictions = ask(detector, images, mean)
            rung["seconds"] += time.perf_counter() - began
            pairs = zip(records, predictions, strict=True)
            rung["records"] += [to_rung_record(record, prediction, detector) for record, prediction in pairs]
    return found


def evaluate_best_rung(detector: Detector, rows: Dataset, show_progress: bool = True) -> list[dict]:
    """`evaluate_detector` by the best rung."""
    return evaluate_rungs(detector, rows, (BEST,), show_progress)[BEST]["records"]
