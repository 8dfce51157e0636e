"""Conversations to batches, and which of their tokens have labels.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import ProcessorMixin

VISION_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]


@dataclass(frozen=True)
class AllTokensCollator:
    """Batch `{"image", "messages"}` examples; labels are all text: system message, question and answer."""

    processor: ProcessorMixin

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        return add_labels(to_batch(examples, self.processor), find_text_tokens, self.processor.tokenizer)


@dataclass(frozen=True)
class AssistantOnlyCollator:
    """Batch `{"image", "messages"}` examples; labels are the assistant's answers with their end-of-turn token."""

    processor: ProcessorMixin

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        return add_labels(to_batch(examples, self.processor), find_assistant_tokens, self.processor.tokenizer)


COLLATORS = {"v1-all-tokens": AllTokensCollator, "v2-assistant-only": AssistantOnlyCollator}


def to_batch(examples: Sequence[dict], processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """What the model is given: token ids, masks, patches of the images and their grids; padded on the right."""
    texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
    padding = {"padding": True, "padding_side": "right", "pad_to_multiple_of": 8, "return_tensors": "pt"}
    return dict(processor(text=texts, images=[[example["image"]] for example in examples], **padding))


def add_labels(batch: dict[str, torch.Tensor], find_trained: Callable, tokenizer) -> dict[str, torch.Tensor]:
    """The batch with `labels` (batch, tokens): the token ids where `find_trained` says so, -100 elsewhere."""
    trained = find_trained(batch["input_ids"], tokenizer)
    return batch | {"labels": batch["input_ids"].masked_fill(~trained, -100)}


def find_text_tokens(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Mask (batch, tokens) of all that is neither padding nor part of an image."""
    excluded = tokenizer.convert_tokens_to_ids([tokenizer.pad_token, *VISION_TOKENS])
    return ~torch.isin(input_ids, torch.tensor(excluded))


def find_assistant_tokens(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Mask (batch, tokens) of the assistant's words: after `<|im_start|>assistant\\n`, up to `<|im_end|>` included."""
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, tokens in enumerate(input_ids.tolist()):
        for start in range(len(tokens) - len(header)):
            if tokens[start : start + len(header)] == header:
                stop = tokens.index(end, start)
                mask[row, start + len(header) : stop + 1] = True
    return mask
