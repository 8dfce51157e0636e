"""Questions in batches: padding, answers that do not depend on it, and probabilities that are the model's own."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from helpers.conversation import PROMPT, Task
from helpers.generation import Answer, Detector, generate, to_answer, to_questions
from helpers.loading import load_model, load_processor
from helpers.tiny.packages import draw_package


@pytest.fixture(scope="module")
def detector(base):
    """The base, asked for barcodes."""
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    return Detector(
        model, load_processor(str(base), 66 * 28 * 28), Task(PROMPT.format(label="barcode")), max_new_tokens=40
    )


def ask(detector, *images):
    return generate(detector, to_questions(images, detector))


def test_batched_answers_equal_those_given_one_by_one(detector):
    images = [draw_package(seed)[0] for seed in range(6)]
    assert len({image.size for image in images}) > 1  # so that rows are padded
    together = [answer.text for answer in ask(detector, *images)]
    assert together == [ask(detector, image)[0].text for image in images]
    assert all(text.endswith("<|im_end|>") for text in together)


def test_questions_are_padded_on_the_left_and_only_where_lengths_differ(detector):
    images = [Image.new("RGB", size) for size in [(56, 56), (112, 84)]]
    small, mixed = to_questions(images[:1], detector), to_questions(images, detector)
    padding_token = detector.processor.tokenizer.pad_token_id
    length = small["input_ids"].shape[1]
    assert mixed["input_ids"].shape[1] % 8 == 0
    padding = mixed["input_ids"].shape[1] - length
    assert padding >= 8  # 4 and 12 tokens of images
    assert mixed["attention_mask"][0].tolist() == [0] * padding + [1] * length
    assert mixed["mm_token_type_ids"][0].tolist() == [0] * padding + small["mm_token_type_ids"][0].tolist()
    assert mixed["input_ids"][0].tolist() == [padding_token] * padding + small["input_ids"][0].tolist()
    assert mixed["pixel_values"].shape[0] == (4 + 12) * 4
    assert mixed["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 8]]
    equal = to_questions([images[0]] * 2, detector)
    assert equal["input_ids"].shape == (2, length)
    assert equal["attention_mask"].all()


def test_question_is_the_detectors_prompt_in_the_models_precision(detector):
    question = to_questions([Image.new("RGB", (56, 56))], replace(detector, task=Task("Where is it?")))
    text = detector.processor.tokenizer.decode(question["input_ids"][0])
    assert text.endswith("<|vision_end|>Where is it?<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\nYou are a vision language model")
    assert question["pixel_values"].dtype == torch.float32


def test_image_of_a_unit_size_is_answered(detector):
    assert len(ask(replace(detector, max_new_tokens=4), Image.new("RGB", (1, 1)))) == 1


def test_answers_end_at_the_limit(detector):
    answer = ask(replace(detector, max_new_tokens=3), draw_package(0)[0])[0]
    assert len(answer.probabilities) == 3
    assert answer.text == "<|object_ref_start|>barcode<|object_ref_end|>"


def test_probabilities_are_the_models_own(detector):
    images = [draw_package(seed)[0] for seed in range(3)]
    batch, alone = ask(detector, *images), ask(detector, images[1])[0]
    assert batch[1].text == alone.text
    assert batch[1].probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    # the same probabilities from one forward pass over question and answer
    tokens = detector.processor.tokenizer.encode(alone.text)
    question = to_questions([images[1]], detector)
    question["input_ids"] = torch.cat([question["input_ids"], torch.tensor([tokens])], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        question[name] = torch.cat([question[name], torch.full((1, len(tokens)), value)], dim=1)
    with torch.no_grad():
        logits = detector.model(**question).logits[0, -len(tokens) - 1 : -1]
    wanted = logits.softmax(-1)[torch.arange(len(tokens)), tokens]
    assert alone.probabilities == pytest.approx(wanted.tolist(), abs=1e-4)
    assert alone.ends[-1] == len(alone.text)


def test_padding_after_the_end_of_an_answer_is_not_part_of_it(detector):
    tokenizer = detector.processor.tokenizer
    tokens = [*tokenizer.encode("(1,2)<|im_end|>"), tokenizer.pad_token_id, tokenizer.pad_token_id]
    answer = to_answer(tokens, [0.5] * len(tokens), tokenizer)
    assert answer == Answer("(1,2)<|im_end|>", [1, 2, 3, 4, 5, 15], [0.5] * 6)


def test_letter_of_several_tokens_ends_with_the_last(detector):
    tokenizer = detector.processor.tokenizer
    tokens = tokenizer.encode("ä!")
    assert len(tokens) == 3  # two bytes, one letter
    answer = to_answer(tokens, [0.1, 0.2, 0.3], tokenizer)
    assert (answer.text, list(answer.ends)) == ("ä!", [1, 1, 2])


def test_score_is_the_geometric_mean_of_the_tokens_inside():
    answer = Answer("a(1,2),(3,4)<|im_end|>", ends=[1, 6, 12, 22], probabilities=[0.1, 0.5, 0.08, 0.9])
    assert answer.score(1, 12) == pytest.approx(0.2)  # the square root of 0.5 * 0.08
    assert answer.score(0, 1) == pytest.approx(0.1)
