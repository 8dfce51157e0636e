"""Each collator trains on its part of the words, and on nothing else: the answer alone, or all text."""

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers.collators import AllTokensCollator, AssistantOnlyCollator, find_assistant_tokens
from helpers.conversation import Task, format_answer, to_conversation


@pytest.fixture(scope="module")
def processor(base):
    return Qwen2VLProcessor.from_pretrained(base)


def example(size, *boxes):
    answer = format_answer(["nutrition-table"] * len(boxes), boxes)
    return {
        "image": Image.new("RGB", size),
        "messages": to_conversation(Task("Detect every nutrition table."), answer),
    }


def trained(processor, batch, row):
    return processor.tokenizer.convert_ids_to_tokens(batch["labels"][row][batch["labels"][row] != -100])


def test_trained_tokens_are_the_answer_and_its_end(processor):
    batch = AssistantOnlyCollator(processor)([example((224, 224), [27, 4, 730, 640])])
    assert trained(processor, batch, 0) == [
        *("<|object_ref_start|>", "nutrition", "-table", "<|object_ref_end|>"),
        *("<|box_start|>", "(", "2", "7", ",", "4", "),(", "7", "3", "0", ",", "6", "4", "0", ")", "<|box_end|>"),
        "<|im_end|>",
    ]


def test_padding_is_on_the_right_whatever_the_processor_says(base):
    processor = Qwen2VLProcessor.from_pretrained(base, padding_side="left")  # as Qwen2-VL's own
    assert processor.tokenizer.padding_side == "left"
    examples = [example((224, 224), [1, 2, 3, 4]), example((224, 224), [1, 2, 3, 4], [500, 500, 600, 600])]
    mask = AssistantOnlyCollator(processor)(examples)["attention_mask"]
    assert not mask.all()
    assert mask[:, 0].all()  # on the left a padding token would have nothing to look at: NaN in some GPU kernels
    assert (mask[:, 1:] <= mask[:, :-1]).all()


def test_padding_and_images_are_not_trained(processor):
    examples = [example((224, 224), [1, 2, 3, 4]), example((448, 252), [1, 2, 3, 4], [500, 500, 600, 600])]
    batch = AssistantOnlyCollator(processor)(examples)
    tokenizer = processor.tokenizer
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] % 8 == 0  # CUDA's attention misread other lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert not (batch["labels"] == image_token).any()
    assert (batch["input_ids"] == image_token).sum(dim=1).tolist() == [64, 60]
    assert batch["image_grid_thw"].tolist() == [[1, 16, 16], [1, 12, 20]]
    assert trained(processor, batch, 1).count("<|box_start|>") == 2
    assert trained(processor, batch, 1)[-1] == "<|im_end|>"


def test_every_assistant_turn_is_trained(processor):
    text = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n345<|im_end|>\n"
    )
    ids = torch.tensor([processor.tokenizer.encode(text)])
    mask = find_assistant_tokens(ids, processor.tokenizer)
    assert processor.tokenizer.decode(ids[mask]) == "12<|im_end|>345<|im_end|>"


def test_collators_differ_in_labels_alone(processor):
    examples = [example((224, 224), [1, 2, 3, 4]), example((448, 252), [1, 2, 3, 4])]
    all_tokens, assistant = AllTokensCollator(processor)(examples), AssistantOnlyCollator(processor)(examples)
    assert all_tokens.keys() == assistant.keys()
    assert all(torch.equal(all_tokens[name], assistant[name]) for name in assistant if name != "labels")
    tokenizer = processor.tokenizer
    words = tokenizer.decode(all_tokens["labels"][1][all_tokens["labels"][1] != -100])
    assert words.startswith("<|im_start|>system\nYou are")
    assert "<|im_start|>user\nDetect every nutrition table.<|im_end|>" in words  # no image in between
    assert words.endswith("<|box_end|><|im_end|>\n")
