"""Detectors asked about single images and whole datasets; what is kept of the answers.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from tqdm import tqdm

from helpers.boxes import from_model_coordinates, has_area, resized_size, to_grid
from helpers.conversation import Task, format_answer
from helpers.data import read_barcode, read_headers, read_row, to_upright_rgb
from helpers.generation import Answer, Detector, generate, join_questions, to_question, to_questions
from helpers.loading import release_memory
from helpers.metrics import assigned_ious, compute_ious
from helpers.parsing import parse_answer


def to_record(row: dict, task: Task) -> dict:
    """What is known of an image before it is asked about.

    id, group (the barcode), width, height, resized (width and height as the model sees it), and truth: labels and
    boxes in pixels of the upright image; where the task has several labels, each with its `category_id`.
    """
    image, boxes, labels = read_row(row)
    truth = [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)]
    known = {"id": row["image_id"], "group": read_barcode(row.get("meta"))}
    known |= {"width": image.width, "height": image.height}
    resized = list(resized_size(*image.size, **task.pixel_budget))
    return known | {"resized": resized, "truth": number_labels(truth, task.labels)}


def normalize_label(label: str) -> str:
    """Labels that differ in case, spaces, underscores or hyphens only are the same."""
    return re.sub(r"[\s_-]+", "-", label.strip().lower())


def number_labels(boxes: Sequence[dict], labels: Sequence[str]) -> list[dict]:
    """Labelled boxes with the place of their label among `labels` as `category_id`, 0 for others; one needs none."""
    numbers = {normalize_label(label): number for number, label in enumerate(labels, start=1)}
    if len(numbers) < 2:
        return list(boxes)
    return [labelled | {"category_id": numbers.get(normalize_label(labelled["label"]), 0)} for labelled in boxes]


def add_answer(record: dict, answer: Answer, task: Task) -> dict:
    """A record with what a model made of it: raw (the answer), prediction, unread, iou.

    A prediction has label, box in pixels of the upright image, and score if token probabilities are known; iou is the
    mean over true boxes, None where there are none.
    """
    parsed = parse_answer(answer.text)
    place = record["width"], record["height"], task.family, record.get("resized")
    prediction, unread = [], [*parsed.unread]
    for (label, written), span in zip(parsed.objects, parsed.spans, strict=True):
        box = from_model_coordinates(written, *place)
        score = {"score": answer.score(*span)} if answer.probabilities else {}
        if has_area(box):
            prediction.append({"label": label, "box": box} | score)
        else:
            unread.append(f"{label}{written}")
    prediction = number_labels(prediction, task.labels)
    ious = assigned_ious(compute_ious(record["truth"], prediction))
    found = {"raw": answer.text, "prediction": prediction, "unread": unread}
    return record | found | {"iou": float(ious.mean()) if len(ious) else None}


def detect(image: Image.Image, detector: Detector) -> list[dict]:
    """The objects in one image: `{"label", "box", "score"}`, boxes in pixels of the upright image."""
    upright = to_upright_rgb(image)
    resized = resized_size(*upright.size, **detector.task.pixel_budget)
    record = {"width": upright.width, "height": upright.height, "resized": resized, "truth": []}
    answer = generate(detector, to_questions([upright], detector))[0]
    return add_answer(record, answer, detector.task)["prediction"]


def evaluate_detector(detector: Detector, rows: Dataset, show_progress: bool = True) -> list[dict]:
    """Ask the detector about every row. One record per image, in the order of the rows: see `add_answer`.

    Processes of torchrun ask about a share each, and all get the records of all; of a sharded model all ask together.
    """
    if not torch.distributed.is_initialized() or isinstance(detector.model, FSDPModule):
        return ask_about_all(detector, rows, show_progress)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = rows.select(range(len(rows) * rank // processes, len(rows) * (rank + 1) // processes))
    shares = [None] * processes
    torch.distributed.all_gather_object(shares, ask_about_all(detector, share, show_progress and rank == 0))
    return [record for share in shares for record in share]


def ask_about_all(detector: Detector, rows: Dataset, show_progress: bool) -> list[dict]:
    """`evaluate_detector` in one process. Batches that do not fit into a GPU's memory are halved."""
    detector.model.eval()
    batch_size = detector.batch_size or (64 if torch.cuda.is_available() else 32)
    try:
        return ask_in_batches(replace(detector, batch_size=batch_size), rows, show_progress)
    except torch.cuda.OutOfMemoryError:
        if batch_size == 1:
            raise
    print(f"out of memory with {batch_size} images at once: going on with {batch_size // 2}")
    release_memory()
    return ask_about_all(replace(detector, batch_size=batch_size // 2), rows, show_progress)


def ask_in_batches(detector: Detector, rows: Dataset, show_progress: bool) -> list[dict]:
    """`evaluate_detector` with a batch size that is set; images of like size share a batch."""
    sizes = [resized_size(*header[:2], **detector.task.pixel_budget) for header in read_headers(rows)]
    order = np.argsort([-width * height for width, height in sizes], kind="stable")

    def prepare(number: int) -> tuple[int, dict, dict[str, torch.Tensor]]:
        row = rows[int(number)]
        return number, to_record(row, detector.task), to_question(read_row(row)[0], detector)

    workers, done = min(8, os.cpu_count() // 2) if torch.cuda.is_available() else 0, {}
    ahead = {"num_workers": workers, "prefetch_factor": max(2, detector.batch_size // workers) if workers else None}
    prepared = iter(DataLoader(order, batch_size=None, collate_fn=prepare, pin_memory=workers > 0, **ahead))
    with tqdm(total=len(rows), desc="evaluating", unit="image", disable=not show_progress) as progress:
        while batch := list(islice(prepared, detector.batch_size)):
            numbers, records, questions = zip(*batch, strict=True)
            answers = generate(detector, join_questions(questions, detector))
            for number, record, answer in zip(numbers, records, answers, strict=True):
                done[number] = add_answer(record, answer, detector.task)
            progress.update(len(batch))
    return [done[number] for number in range(len(rows))]


def answer_with_same_box(records: Sequence[dict], box: Sequence[float], label: str) -> list[dict]:
    """Records of the same images for a detector that always answers with `box`, fractions of the image in 0..1."""
    answer = Answer(format_answer([label], [to_grid(box, 1, 1)]))
    return [add_answer(record, answer, Task("", (label,))) for record in records]
