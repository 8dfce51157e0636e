"""Prompts, the format of answers, and chat messages.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

from collections.abc import Iterable, Sequence

SYSTEM_MESSAGE = "You are a vision language model that locates objects on food packages."
PROMPT = "Detect every {label}. Answer with label and box of each as label(x1,y1),(x2,y2) on a grid from 0 to 1000."
QUESTION = PROMPT.format(label="nutrition table")


def format_answer(labels: Iterable[str], grid_boxes: Iterable[Sequence[int]]) -> str:
    """The text Qwen2-VL is taught to write: objects from the top left, boxes `[x1, y1, x2, y2]` on 0..1000."""
    objects = sorted(zip(labels, grid_boxes, strict=True), key=lambda pair: (pair[1][1], pair[1][0]))
    return "".join(
        f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        for label, (x1, y1, x2, y2) in objects
    )


def to_conversation(prompt: str, answer: str | None = None) -> list[dict]:
    """System, user (one image, then the prompt) and, when given, the assistant's answer."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
