"""The words that the model is given and the words that it is taught to write, literally."""

import pytest
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers.conversation import PROMPT, Task, create_task, format_answer, to_conversation, write_answer
from helpers.loading import load_processor
from helpers.parsing import ParsedAnswer, parse_answer

TASK = Task(PROMPT.format(label="nutrition table"))

ANSWER = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(273,487),(730,640)<|box_end|>"


def test_answer_is_written_as_qwen2_vl_writes_it():
    assert format_answer(["nutrition-table"], [[273, 487, 730, 640]]) == ANSWER


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_answer_is_json_in_the_later_families(family):
    answer = format_answer(["logo", "Nährwerte"], [[5, 60, 70, 80], [1, 2, 3, 4]], family)
    assert answer == (
        '```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "Nährwerte"},\n'
        '\t{"bbox_2d": [5, 60, 70, 80], "label": "logo"}\n]\n```'
    )
    assert parse_answer(answer).objects == [("Nährwerte", [1, 2, 3, 4]), ("logo", [5, 60, 70, 80])]


@pytest.mark.parametrize(("family", "answer"), [("qwen2_vl", ""), ("qwen3_vl", "```json\n[]\n```")])
def test_that_there_is_nothing_is_an_answer(family, answer):
    assert format_answer([], [], family) == answer
    assert parse_answer(answer) == ParsedAnswer([], [])


def test_the_truth_is_written_in_the_coordinates_of_the_family():
    image, box = Image.new("RGB", (300, 400)), [150.0, 100.0, 300.0, 400.0]
    pixels = Task("?", family="qwen2_5_vl", pixel_budget={"factor": 28, "min_pixels": 3136, "max_pixels": 308 * 392})
    assert "[154, 98, 308, 392]" in write_answer(image, [box], ["a"], pixels)
    assert "[500, 250, 1000, 1000]" in write_answer(image, [box], ["a"], Task("?", family="qwen3_vl"))
    assert "(500,250),(1000,1000)" in write_answer(image, [box], ["a"], Task("?"))


@pytest.mark.parametrize(
    ("labels", "beginning"),
    [
        (["nutrition-table"], "Detect every nutrition table. Answer with"),
        (["barcode", "logo"], "Detect every barcode and logo. Answer with"),
        (["best_before", "logo", "barcode"], "Detect every best before, logo and barcode. Answer with"),
    ],
)
def test_the_question_names_the_labels(base, make_settings, tmp_path, labels, beginning):
    processor = load_processor(str(base), 66 * 28 * 28)
    task = create_task(processor, labels, make_settings(tmp_path))
    assert task.question.startswith(beginning)
    assert (task.labels, task.family) == (labels, "qwen2_vl")
    assert task.pixel_budget == {"factor": 28, "min_pixels": 3136, "max_pixels": 66 * 28 * 28}


def test_system_message_and_question_are_settings(base, make_settings, tmp_path):
    settings = make_settings(tmp_path, system_message="You see cats.", question="Where are the cats?")
    task = create_task(load_processor(str(base), 66 * 28 * 28), ["cat"], settings)
    assert [part["content"][-1]["text"] for part in to_conversation(task)] == ["You see cats.", "Where are the cats?"]


def test_objects_are_listed_from_the_top_left():
    answer = format_answer(["c", "b", "a"], [[0, 500, 9, 900], [300, 20, 400, 90], [10, 20, 90, 90]])
    assert [part.split("<")[0] for part in answer.split("<|object_ref_start|>")[1:]] == ["a", "b", "c"]


def test_chat_template(base):
    processor = Qwen2VLProcessor.from_pretrained(base)
    messages = to_conversation(TASK, ANSWER)
    assert processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a vision language model that locates objects on food packages.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Detect every nutrition table. Answer with label "
        "and box of each as label(x1,y1),(x2,y2) on a grid from 0 to 1000.<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    )


def test_generation_prompt_ends_where_the_answer_begins(base):
    processor = Qwen2VLProcessor.from_pretrained(base)
    asked = processor.apply_chat_template(to_conversation(Task("?")), tokenize=False, add_generation_prompt=True)
    answered = processor.apply_chat_template(to_conversation(Task("?"), ANSWER), tokenize=False)
    assert answered == f"{asked}{ANSWER}<|im_end|>\n"
