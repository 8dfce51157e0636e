"""Questions about images in batches, answers with the probability of each token.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)

from helpers.conversation import Task, to_conversation


@dataclass(frozen=True)
class Detector:
    """A model that writes boxes, with all that its answers depend on."""

    model: PreTrainedModel
    processor: ProcessorMixin
    task: Task
    max_new_tokens: int = 256
    batch_size: int | None = None  # None: what fits into the free memory


def to_question(image: Image.Image, detector: Detector) -> dict[str, torch.Tensor]:
    """The detector's question about one image as processor tensors."""
    messages = to_conversation(detector.task)
    text = detector.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    question = dict(detector.processor(text=[text], images=[[image]], return_tensors="pt"))
    return question | {"pixel_values": question["pixel_values"].to(detector.model.dtype)}


def join_questions(questions: Sequence[dict[str, torch.Tensor]], detector: Detector) -> dict[str, torch.Tensor]:
    """Questions about single images as one batch; if lengths differ, padded on the left to a multiple of 8."""
    lengths = {question["input_ids"].shape[1] for question in questions}
    longest = 8 * math.ceil(max(lengths) / 8) if len(lengths) > 1 else max(lengths)
    batch = {}
    for name, tensor in questions[0].items():
        rows = [question[name] for question in questions]
        if tensor.shape == questions[0]["input_ids"].shape:
            fill = detector.processor.tokenizer.pad_token_id if name == "input_ids" else 0
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows]
        batch[name] = torch.cat([row.to(detector.model.device, non_blocking=True) for row in rows])
    return batch


def to_questions(images: Sequence[Image.Image], detector: Detector) -> dict[str, torch.Tensor]:
    """The detector's question about each image as one batch of processor tensors: see `join_questions`."""
    return join_questions([to_question(image, detector) for image in images], detector)


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and how sure it was of each token: where the token ends in the text, its probability."""

    text: str
    ends: Sequence[int] = ()
    probabilities: Sequence[float] = ()

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


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()  # inference_mode is not for sharded models
def generate(detector: Detector, questions: dict[str, torch.Tensor]) -> list[Answer]:
    """Greedy answers to the batch of `to_questions`, special tokens included, padding removed."""
    recorder, batch = ProbabilityRecorder(), {k: v.to(detector.model.device) for k, v in questions.items()}
    limits = {"max_new_tokens": detector.max_new_tokens, "logits_processor": LogitsProcessorList([recorder])}
    tokens = detector.model.generate(**batch, **limits, **GREEDY)
    written = tokens[:, batch["input_ids"].shape[1] :].tolist()
    probabilities = torch.stack(recorder.steps, dim=1).tolist()
    return [to_answer(*row, detector.processor.tokenizer) for row in zip(written, probabilities, strict=True)]


def to_answer(tokens: Sequence[int], probabilities: Sequence[float], tokenizer) -> Answer:
    """One row of token ids and their probabilities as text; a letter of several tokens ends with the last of them."""
    length = max((n for n, token in enumerate(tokens, start=1) if token != tokenizer.pad_token_id), default=0)
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=False) for n in range(1, length + 1)]
    return Answer(texts[-1] if texts else "", [len(text) for text in texts], list(probabilities[:length]))
