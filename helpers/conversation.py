"""Prompts, the format of answers, and chat messages.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from PIL import Image
from transformers import AutoConfig, ProcessorMixin

from helpers.boxes import Box, get_family, resized_size, to_model_coordinates
from helpers.loading import pixel_budget

SYSTEM_MESSAGE = "You are a vision language model that locates objects on food packages."
PROMPT = "Detect every {label}. Answer with label and box of each as label(x1,y1),(x2,y2) on a grid from 0 to 1000."
JSON_PROMPT = 'Detect every {label}. Answer in JSON, a list of {{"bbox_2d": [x1, y1, x2, y2], "label": "..."}}.'
NOTHING = {"tokens": "", "json": "```json\n[]\n```"}  # where there is no object: ends at once, or an empty list


@dataclass(frozen=True)
class Task:
    """What a model is asked about an image, and in which convention it answers."""

    question: str
    labels: Sequence[str] = ()
    family: str = "qwen2_vl"  # a key of FAMILIES
    system_message: str = SYSTEM_MESSAGE
    pixel_budget: dict[str, int] = field(default_factory=dict)  # arguments of `resized_size`


def format_answer(labels: Iterable[str], boxes: Iterable[Sequence[int]], family: str = "qwen2_vl") -> str:
    """What a family's models are taught to write: objects from the top left, boxes in the family's coordinates."""
    objects, kind = sorted(zip(labels, boxes, strict=True), key=lambda pair: pair[1][1::-1]), get_family(family).answer
    if not objects:
        return NOTHING[kind]
    if kind == "json":
        lines = [json.dumps({"bbox_2d": list(box), "label": label}, ensure_ascii=False) for label, box in objects]
        return "```json\n[\n\t" + ",\n\t".join(lines) + "\n]\n```"
    return "".join(
        f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        for label, (x1, y1, x2, y2) in objects
    )


def to_conversation(task: Task, answer: str | None = None) -> list[dict]:
    """System, user (one image, then the question) and, when given, the assistant's answer."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": task.system_message}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.question}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def create_task(processor: ProcessorMixin, labels: Sequence[str], settings: SimpleNamespace) -> Task:
    """The task of the settings for these labels. Raises ValueError for a model of an unknown family."""
    family = AutoConfig.from_pretrained(settings.model_id).model_type
    wording = {"tokens": PROMPT, "json": JSON_PROMPT}[get_family(family).answer]
    *others, last = [re.sub("[-_]", " ", label) for label in labels]
    question = settings.question or wording.format(label=f"{', '.join(others)} and {last}" if others else last)
    return Task(question, labels, family, settings.system_message or SYSTEM_MESSAGE, pixel_budget(processor))


def write_answer(image: Image.Image, boxes: Sequence[Box], labels: Sequence[str], task: Task) -> str:
    """The right answer for an image with these boxes, in pixels."""
    resized = resized_size(*image.size, **task.pixel_budget)
    return format_answer(
        labels, [to_model_coordinates(box, *image.size, task.family, resized) for box in boxes], task.family
    )
