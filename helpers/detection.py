"""Detectors asked about single images and whole datasets; what is kept of the answers.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Qwen2VLProcessor

from helpers.boxes import from_model_coordinates, has_area, resized_size, to_grid
from helpers.conversation import format_answer
from helpers.data import read_headers, read_row
from helpers.generation import Answer, Detector, generate, join_questions, to_question, to_questions
from helpers.loading import release_memory
from helpers.metrics import boxes_of, match_boxes
from helpers.parsing import parse_answer


def to_record(row: dict, resized: tuple[int, int]) -> dict:
    """What is known of an image before it is asked about; `resized` is its (width, height) as the model sees it.

    id, group (the barcode), width, height, resized, and truth: labels and boxes in pixels of the upright image.
    """
    image, boxes, labels = read_row(row)
    truth = [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)]
    known = {"id": row["image_id"], "group": (row.get("meta") or {}).get("barcode") or None}
    return known | {"width": image.width, "height": image.height, "resized": list(resized), "truth": truth}


def add_answer(record: dict, answer: Answer, family: str) -> dict:
    """A record with what a model of `family` made of it: raw (the answer), prediction, unread, iou.

    A prediction has label, box in pixels of the upright image, and score if token probabilities are known; iou is the
    mean over true boxes, None where there are none.
    """
    parsed = parse_answer(answer.text)
    place = record["width"], record["height"], family, record.get("resized")
    prediction, unread = [], [*parsed.unread]
    for (label, written), span in zip(parsed.objects, parsed.spans, strict=True):
        box = from_model_coordinates(written, *place)
        score = {"score": answer.score(*span)} if answer.probabilities else {}
        if has_area(box):
            prediction.append({"label": label, "box": box} | score)
        else:
            unread.append(f"{label}{written}")
    found = record | {"raw": answer.text, "prediction": prediction, "unread": unread}
    ious = match_boxes(boxes_of(found, "truth"), boxes_of(found, "prediction"))
    return found | {"iou": float(np.mean(ious)) if ious else None}


def pixel_budget(processor: Qwen2VLProcessor) -> dict[str, int]:
    """The processor's settings as arguments of `resized_size`."""
    images, size = processor.image_processor, processor.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {"factor": images.patch_size * images.merge_size} | limits


def detect(image: Image.Image, detector: Detector) -> list[dict]:
    """The objects in one image: `{"label", "box", "score"}`, boxes in pixels of the upright image."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    resized = resized_size(*upright.size, **pixel_budget(detector.processor))
    record = {"width": upright.width, "height": upright.height, "resized": resized, "truth": []}
    answer = generate(detector, to_questions([upright], detector))[0]
    return add_answer(record, answer, detector.model.config.model_type)["prediction"]


def evaluate_detector(detector: Detector, rows: Dataset, show_progress: bool = True) -> list[dict]:
    """Ask the detector about every row. One record per image, in the order of the rows: see `add_answer`.

    Batches that do not fit into a GPU's memory are halved. Raises ValueError for a model of an unknown family.
    """
    detector.model.eval()
    batch_size = detector.batch_size or (64 if torch.cuda.is_available() else 32)
    try:
        return ask_in_batches(replace(detector, batch_size=batch_size), rows, show_progress)
    except torch.cuda.OutOfMemoryError:
        if batch_size == 1:
            raise
    print(f"out of memory with {batch_size} images at once: going on with {batch_size // 2}")
    release_memory()
    return evaluate_detector(replace(detector, batch_size=batch_size // 2), rows, show_progress)


def ask_in_batches(detector: Detector, rows: Dataset, show_progress: bool) -> list[dict]:
    """`evaluate_detector` with a batch size that is set; images of like size share a batch."""
    budget = pixel_budget(detector.processor)
    sizes = [resized_size(width, height, **budget) for width, height, _ in read_headers(rows)]
    order = np.argsort([-width * height for width, height in sizes], kind="stable")

    def prepare(number: int) -> tuple[int, dict, dict[str, torch.Tensor]]:
        row = rows[int(number)]
        return number, to_record(row, sizes[number]), to_question(read_row(row)[0], detector)

    workers, done = min(8, os.cpu_count() // 2) if torch.cuda.is_available() else 0, {}
    ahead = {"num_workers": workers, "prefetch_factor": max(2, detector.batch_size // workers) if workers else None}
    prepared = iter(DataLoader(order, batch_size=None, collate_fn=prepare, **ahead))
    with tqdm(total=len(rows), desc="evaluating", unit="image", disable=not show_progress) as progress:
        while batch := list(islice(prepared, detector.batch_size)):
            numbers, records, questions = zip(*batch, strict=True)
            answers = generate(detector, join_questions(questions, detector))
            for number, record, answer in zip(numbers, records, answers, strict=True):
                done[number] = add_answer(record, answer, detector.model.config.model_type)
            progress.update(len(batch))
    return [done[number] for number in range(len(rows))]


def answer_with_same_box(records: Sequence[dict], box: Sequence[float], label: str) -> list[dict]:
    """Records of the same images for a detector that always answers with `box`, fractions of the image in 0..1."""
    answer = Answer(format_answer([label], [to_grid(box, 1, 1)]))
    return [add_answer(record, answer, "qwen2_vl") for record in records]
