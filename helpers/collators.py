"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen2VLProcessor


@dataclass(frozen=True)
class AssistantOnlyCollator:
    """Batch `{"image", "messages"}` examples; labels are the assistant's answers with their end-of-turn token."""

    processor: Qwen2VLProcessor

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Processor tensors plus `labels` of the shape of `input_ids` (batch, tokens)."""
        texts = [self.processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [[example["image"]] for example in examples]
        batch = self.processor(text=texts, images=images, padding=True, pad_to_multiple_of=8, return_tensors="pt")
        trained = find_assistant_tokens(batch["input_ids"], self.processor.tokenizer)
        batch["labels"] = batch["input_ids"].masked_fill(~trained, -100)
        return dict(batch)


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
