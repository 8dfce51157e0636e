"""Every word is trained, literally: labels of `AllTokensCollator` with Qwen2-VL's real tokenizer."""

from PIL import Image

from helpers.collators import AllTokensCollator
from helpers.conversation import Task, format_answer, to_conversation

WORDS_BEFORE_IMAGE = [
    *(151644, 8948, 198, 2610, 525, 264, 11129, 4128, 1614, 429, 1329, 973, 6171, 389, 3607, 14185, 13, 151645, 198),
    *(151644, 872, 198),  # <|im_start|>user
]
WORDS_AFTER_IMAGE = [
    *(57193, 1449, 25595, 1965, 13, 151645, 198),  # Detect every nutrition table.<|im_end|>
    *(151644, 77091, 198),  # <|im_start|>assistant
    *(151646, 82564, 16785, 151647),  # <|object_ref_start|>nutrition-table<|object_ref_end|>
    *(151648, 7, 17, 22, 18, 11, 19, 23, 22, 23547, 22, 18, 15, 11, 21, 19, 15, 8, 151649),  # the box
    *(151645, 198),
]


def collate(processor, *sizes):
    messages = to_conversation(
        Task("Detect every nutrition table."), format_answer(["nutrition-table"], [[273, 487, 730, 640]])
    )
    return AllTokensCollator(processor)([{"image": Image.new("RGB", size), "messages": messages} for size in sizes])


def test_labels_are_all_words_but_padding_and_image(real_processor):
    batch = collate(real_processor, (56, 56))
    image = [151652, 151655, 151655, 151655, 151655, 151653]
    assert batch["input_ids"].tolist() == [[*WORDS_BEFORE_IMAGE, *image, *WORDS_AFTER_IMAGE, 151643]]
    assert batch["labels"].tolist() == [WORDS_BEFORE_IMAGE + [-100] * 6 + WORDS_AFTER_IMAGE + [-100]]


def test_shorter_conversations_are_not_trained_on_their_padding(real_processor):
    small, large = collate(real_processor, (56, 56), (84, 84))["labels"].tolist()  # 4 and 9 tokens an image
    assert small == WORDS_BEFORE_IMAGE + [-100] * 6 + WORDS_AFTER_IMAGE + [-100] * 9
    assert large == WORDS_BEFORE_IMAGE + [-100] * 11 + WORDS_AFTER_IMAGE + [-100] * 4
