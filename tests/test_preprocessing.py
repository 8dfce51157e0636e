"""What a model is given: image tokens within a budget, patches that can be put together again, kinds of tokens."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers.collators import AllTokensCollator, AssistantOnlyCollator
from helpers.conversation import Task, format_answer, to_conversation
from helpers.plots import TRUTH_COLOUR
from helpers.preprocessing import (
    TOKEN_KINDS,
    analyze_token_distribution,
    classify_tokens,
    count_image_tokens,
    list_token_cells,
    plot_trained_tokens,
    share_of_padding,
    unpatch,
)


@pytest.fixture(scope="module")
def processor(base):
    return Qwen2VLProcessor.from_pretrained(base)


def example(size, *boxes):
    answer = format_answer(["nutrition-table"] * len(boxes), boxes)
    return {
        "image": Image.new("RGB", size),
        "messages": to_conversation(Task("Detect every nutrition table."), answer),
    }


def test_tokens_within_a_budget():
    assert count_image_tokens([(400, 300)]).tolist() == [154]
    assert count_image_tokens([(400, 300), (300, 400)], max_pixels=64 * 28**2).tolist() == [54, 54]
    assert count_image_tokens([(28, 28)]).tolist() == [4]  # the smallest image is enlarged


def test_tokens_of_the_processor(processor):
    sizes = [(224, 224), (448, 252), (300, 447)]
    images = [Image.new("RGB", size) for size in sizes]
    grids = processor.image_processor(images=images, return_tensors="pt")["image_grid_thw"]
    size = processor.image_processor.size
    counted = count_image_tokens(sizes, 28, size["shortest_edge"], size["longest_edge"])
    assert counted.tolist() == (grids.prod(dim=1) // 4).tolist()


def test_patches_are_put_together_again(processor):
    noise = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    inputs = processor.image_processor(images=[Image.fromarray(noise)], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8]]
    image = unpatch(inputs["pixel_values"], inputs["image_grid_thw"][0], processor.image_processor)
    assert image.size == (112, 56)
    assert np.abs(np.asarray(image, dtype=int) - noise).max() <= 1


def test_each_token_has_a_kind(processor):
    batch = AssistantOnlyCollator(processor)([example((224, 224), [1, 2, 3, 4])])
    ids, kinds = batch["input_ids"][0], classify_tokens(batch["input_ids"], processor.tokenizer)[0]
    words = {
        kind: processor.tokenizer.decode(ids[kinds == number], skip_special_tokens=False)
        for number, kind in enumerate(TOKEN_KINDS)
    }
    assert words["answer"] == (
        "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    )
    assert words["end of turn"] == "<|im_end|>"
    assert words["image"] == "<|vision_start|>" + 64 * "<|image_pad|>" + "<|vision_end|>"
    assert words["system message, question, roles"].endswith(
        "Detect every nutrition table.<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert set(words["padding"]) <= set(processor.tokenizer.pad_token)


def test_token_distribution(processor):
    examples = [example((224, 224), [1, 2, 3, 4]), example((224, 224), [1, 2, 3, 4], [5, 6, 7, 8])]
    table = analyze_token_distribution(AssistantOnlyCollator(processor)(examples), processor.tokenizer)
    assert table.loc["image"].tolist() == [2 * (64 + 2), 0]
    assert table.loc["end of turn"].tolist() == [2, 2]
    assert table.loc["answer"].tolist() == [3 * 15, 3 * 15]
    assert table.loc["padding", "tokens"] >= 15
    assert table.loc["system message, question, roles", "trained"] == 0
    table = analyze_token_distribution(AllTokensCollator(processor)(examples), processor.tokenizer)
    assert (table.trained == table.tokens * [0, 1, 1, 1, 0]).all()


def test_kinds_are_counted_once(processor):
    batch = AllTokensCollator(processor)([example((224, 224), [1, 2, 3, 4]), example((448, 252), [1, 2, 3, 4])])
    table = analyze_token_distribution(batch, processor.tokenizer)
    assert table.tokens.sum() == batch["input_ids"].numel()
    assert table.trained.sum() == (batch["labels"] != -100).sum()
    assert torch.equal(batch["attention_mask"] == 0, classify_tokens(batch["input_ids"], processor.tokenizer) == 4)


@pytest.mark.parametrize(
    ("lengths", "multiple", "share"),
    [
        ([10, 20, 20, 10], 1, 20 / 80),
        ([10, 10, 20, 20], 1, 0),
        ([10, 10, 20, 20], 8, 20 / 80),
        ([10, 20, 7], 1, 10 / 47),
    ],
)
def test_share_of_padding(lengths, multiple, share):
    assert share_of_padding(lengths, 2, multiple) == pytest.approx(share)


def test_trained_tokens_are_coloured(processor):
    batch = AssistantOnlyCollator(processor)([example((56, 56), [1, 2, 3, 4])])
    cells = list_token_cells(batch, processor.tokenizer)
    assert ("4 x image_pad", False) in cells  # four image tokens in one cell
    words = [text for text, trained in cells if trained]
    assert (words[0], words[-1]) == ("object_ref_start", "im_end")
    assert sum(trained for _, trained in cells) == (batch["labels"] != -100).sum()
    figure = plot_trained_tokens({"v2": batch}, processor.tokenizer)
    coloured = [patch for patch in figure.axes[0].patches if to_hex(patch.get_facecolor()) == TRUTH_COLOUR]
    plt.close(figure)
    assert len(coloured) == (batch["labels"] != -100).sum()
