"""The pretraining takes shortcuts for speed; they must not change what the model computes."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

from helpers.boxes import to_grid
from helpers.collators import AllTokensCollator, AssistantOnlyCollator
from helpers.conversation import PROMPT, Task, format_answer, to_conversation
from helpers.tiny import pretrain
from helpers.tiny.packages import TABLE_LABEL


@pytest.fixture(scope="module")
def processor():
    return pretrain.build_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return pretrain.build_model(processor.tokenizer).eval()


def test_one_token_per_digit_and_special_token(processor):
    tokens = processor.tokenizer.tokenize("<|box_start|>(273,48)<|box_end|><|im_end|>")
    assert tokens == ["<|box_start|>", "(", "2", "7", "3", ",", "4", "8", ")", "<|box_end|>", "<|im_end|>"]


def test_any_text_can_be_written(processor):
    text = "Näringsdeklaration, διατροφή, 栄養成分"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_shortcut_loss_is_the_models_own_loss(model, processor, monkeypatch):
    monkeypatch.setattr(pretrain, "jitter", lambda pixels: pixels)
    pixels = torch.randint(0, 255, (3, 3, 252, 196), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    box = (0.1, 0.2, 0.5, 0.75)
    group = {"pixels": pixels, "objects": [[("logo", box)], [("barcode", box)], [("logo", box)]]}
    questions = pretrain.build_questions(group, processor, "one")
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.arange(3))
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor(0.9))  # not mirrored
    with torch.no_grad(), pretrain.same_size_attention():
        shortcut = pretrain.answer_loss(model, processor, questions, 3)
    examples = [
        {
            "image": Image.fromarray(pixels[i].permute(1, 2, 0).numpy()),
            "messages": to_conversation(
                Task(pretrain.prompt_for(label)), format_answer([label], [to_grid(box, 1, 1)])
            ),
        }
        for i, label in enumerate(["logo", "barcode", "logo"])
    ]
    batch = AllTokensCollator(processor)(examples)
    is_answer = AssistantOnlyCollator(processor)(examples)["labels"] != -100
    end = processor.tokenizer.encode("\n")[0]  # after the last <|im_end|>: the pretraining leaves it out
    is_question = (batch["labels"] != -100) & ~is_answer
    for row in range(3):
        last = is_question[row].nonzero()[-1]
        assert batch["input_ids"][row, last] == end
        is_question[row, last] = False

    def own_loss(chosen):
        with torch.no_grad():
            return model(**batch | {"labels": batch["input_ids"].masked_fill(~chosen, -100)}).loss.item()

    answers, questions = own_loss(is_answer), own_loss(is_question)
    assert shortcut.item() == pytest.approx(answers + 0.1 * questions, abs=1e-4)
    assert questions > 1  # so that its tenth counts


def test_the_short_attention_is_left_whatever_happens():
    original = VisionAttention.forward

    def fail():
        with pretrain.same_size_attention():
            raise KeyError(VisionAttention.forward is original)

    with pytest.raises(KeyError, match="False"):
        fail()
    assert VisionAttention.forward is original


def test_nutrition_tables_are_never_located_and_shown_in_one_image_of_four(processor):
    box = (0.1, 0.1, 0.9, 0.9)
    pixels = torch.zeros((4, 3, 224, 224), dtype=torch.uint8)
    group = {"pixels": pixels, "objects": [[(TABLE_LABEL, box), ("logo", box)]] * 4}
    covered, _, counted = pretrain.dense_targets(group)
    shown = [kind in ("logo", TABLE_LABEL) for kind in pretrain.KINDS]
    assert covered[0].any(dim=(0, 1)).tolist() == shown
    assert covered[1:].any(dim=(0, 1, 2)).tolist() == [kind == "logo" for kind in pretrain.KINDS]
    assert counted[0].all()
    assert (~counted[1]).sum() == 6 * 6  # 8 x 8 tokens, the table spans the centres from 0.1 to 0.9
    for kind in ("one", "everything"):
        questions = pretrain.build_questions(group, processor, kind)
        assert "nutrition" not in processor.tokenizer.decode(questions["tokens"].flatten().tolist())


def test_names_are_asked_for_without_boxes(processor):
    group = {"objects": [[(TABLE_LABEL, (0.1, 0.1, 0.9, 0.9))]] * len(pretrain.KINDS)}
    questions = pretrain.ask_about(group, "name")
    table = questions[pretrain.KINDS.index(TABLE_LABEL)]
    assert table[1] == "Write the label of the nutrition table."
    assert table[2] == table[3] == "<|object_ref_start|>nutrition-table<|object_ref_end|><|im_end|>"
    assert not [answer for *_, plain, mirrored in questions for answer in (plain, mirrored) if "box" in answer]


def test_every_fourth_image_is_asked_about_in_plain_words():
    assert pretrain.wording_for(2) == PROMPT
    assert pretrain.wording_for(3) == "Detect the bounding box of the {label}."


def test_mirrored_boxes(processor):
    assert pretrain.flip([("logo", (0.1, 0.2, 0.4, 0.6))]) == [("logo", (0.6, 0.2, 0.9, 0.6))]


def test_token_is_covered_when_its_centre_is_inside():
    group = {"pixels": torch.zeros((1, 3, 56, 84), dtype=torch.uint8), "objects": [[("logo", (0.0, 0.0, 0.5, 1.0))]]}
    covered, boxes, counted = pretrain.dense_targets(group)
    assert counted.all()
    logo = pretrain.KINDS.index("logo")
    assert covered[0, :, :, logo].tolist() == [[True, True, False], [True, True, False]]
    np.testing.assert_allclose(boxes[0, logo], [0.0, 0.0, 0.5, 1.0])
