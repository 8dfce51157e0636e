"""The words that the model is given and the words that it is taught to write, literally."""

from transformers import Qwen2VLProcessor

from helpers.conversation import QUESTION, format_answer, to_conversation

ANSWER = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(273,487),(730,640)<|box_end|>"


def test_answer_is_written_as_qwen2_vl_writes_it():
    assert format_answer(["nutrition-table"], [[273, 487, 730, 640]]) == ANSWER


def test_objects_are_listed_from_the_top_left():
    answer = format_answer(["c", "b", "a"], [[0, 500, 9, 900], [300, 20, 400, 90], [10, 20, 90, 90]])
    assert [part.split("<")[0] for part in answer.split("<|object_ref_start|>")[1:]] == ["a", "b", "c"]


def test_chat_template(base):
    processor = Qwen2VLProcessor.from_pretrained(base)
    messages = to_conversation(QUESTION, ANSWER)
    assert processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a vision language model that locates objects on food packages.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Detect every nutrition table. Answer with label "
        "and box of each as label(x1,y1),(x2,y2) on a grid from 0 to 1000.<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    )


def test_generation_prompt_ends_where_the_answer_begins(base):
    processor = Qwen2VLProcessor.from_pretrained(base)
    asked = processor.apply_chat_template(to_conversation("?"), tokenize=False, add_generation_prompt=True)
    answered = processor.apply_chat_template(to_conversation("?", ANSWER), tokenize=False)
    assert answered == f"{asked}{ANSWER}<|im_end|>\n"
