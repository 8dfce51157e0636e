"""What the real Qwen2-VL reads and is taught, literally: words, token ids, labels and image sizes.

The token ids in golden_tokens.json were published by others. Those in this file are the real tokenizer's, too: a test
that fails here says that a model's checkpoint and this code no longer mean the same.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from helpers.collators import AssistantOnlyCollator
from helpers.conversation import PROMPT, Task
from helpers.data import to_training_example

TASK = Task(PROMPT.format(label="nutrition table"))

GOLDEN_TOKENS = json.loads(Path(__file__).with_name("golden_tokens.json").read_text(encoding="utf-8"))
ANSWER = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(273,487),(730,640)<|box_end|>"
ANSWER_IDS = [
    *(151646, 82564, 16785, 151647, 151648),  # <|object_ref_start|> nutrition -table <|object_ref_end|> <|box_start|>
    *(7, 17, 22, 18, 11, 19, 23, 22, 23547, 22, 18, 15, 11, 21, 19, 15, 8),  # one token a digit; `),(` is 23547
    *(151649, 151645),  # <|box_end|> <|im_end|>
]
CONVERSATION_IDS = [
    *(151644, 8948, 198, 2610, 525, 264, 11129, 4128, 1614, 429, 1329, 973, 6171, 389, 3607, 14185, 13, 151645, 198),
    *(151644, 872, 198),  # <|im_start|>user
    *(151652, 151655, 151655, 151655, 151655, 151653),  # 56 x 56 pixels: four times <|image_pad|>
    *(57193, 1449, 25595, 1965, 13, 21806, 448, 2383, 323, 3745, 315, 1817, 438, 2383, 2075, 16, 7358, 16, 23547),
    *(87, 17, 7358, 17, 8, 389, 264, 5827, 504, 220, 15, 311, 220, 16, 15, 15, 15, 13, 151645, 198),
    *(151644, 77091, 198),  # <|im_start|>assistant
    *ANSWER_IDS,
    198,
]
PUBLISHED_BUDGET = {"min_pixels": 3_136, "max_pixels": 12_845_056}  # 4 to 16,384 tokens
SMALL_BUDGET = {"min_pixels": 200_704, "max_pixels": 1_003_520}  # 256 to 1,280 tokens


@pytest.fixture
def example() -> dict:
    """One small image with one box, from a dataset row (which writes y first, and fractions)."""
    objects = {"bbox": [[0.487, 0.273, 0.640, 0.730]], "category_name": ["nutrition-table"]}
    row = {"image_id": "1", "image": Image.new("RGB", (56, 56)), "objects": objects}
    return to_training_example(row, TASK)


def test_conversation(example, real_processor):
    question = (
        "Detect every nutrition table. Answer with label and box of each as label(x1,y1),(x2,y2) on a grid from 0 to "
        "1000."
    )
    system = "You are a vision language model that locates objects on food packages."
    assert example["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    assert real_processor.apply_chat_template(example["messages"], tokenize=False) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    )


def test_special_tokens(real_processor):
    tokenizer = real_processor.tokenizer
    assert len(tokenizer) == 151657
    assert tokenizer.convert_ids_to_tokens(range(151643, 151657)) == [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
        *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    ]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151643, 151645)


@pytest.mark.parametrize("source", GOLDEN_TOKENS)
def test_text_is_split_as_published(source, real_processor):
    assert {text: real_processor.tokenizer.encode(text) for text in GOLDEN_TOKENS[source]} == GOLDEN_TOKENS[source]


def test_answer_is_24_tokens(real_processor):
    assert real_processor.tokenizer.encode(f"{ANSWER}<|im_end|>") == ANSWER_IDS
    assert len(ANSWER_IDS) == 24


def test_answer_without_special_tokens_is_still_a_label_and_a_box(real_processor):
    decoded = real_processor.tokenizer.decode(ANSWER_IDS, skip_special_tokens=True)
    assert decoded == "nutrition-table(273,487),(730,640)"


def test_assistant_only_labels(example, real_processor):
    batch = AssistantOnlyCollator(real_processor)([example])
    assert batch["input_ids"].tolist() == [[*CONVERSATION_IDS, 151643]]  # one token of padding makes 96
    assert batch["attention_mask"].tolist() == [[1] * 95 + [0]]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert batch["labels"].tolist() == [[-100] * 70 + ANSWER_IDS + [-100] * 2]


@pytest.mark.parametrize(
    ("height_width", "budget", "resized"),
    [
        ((561, 278), {}, (560, 280)),  # from the tests of transformers
        ((1080, 1920), {}, (728, 1316)),
        ((300, 400), PUBLISHED_BUDGET, (308, 392)),
        ((1536, 2048), PUBLISHED_BUDGET, (1540, 2044)),  # 4,015 tokens
        ((3120, 4208), PUBLISHED_BUDGET, (3080, 4144)),  # 16,280 tokens
        ((4208, 3120), SMALL_BUDGET, (1148, 840)),
        ((20, 20), PUBLISHED_BUDGET, (56, 56)),
        ((10, 2000), PUBLISHED_BUDGET, (28, 812)),  # no side gets under 28
    ],
)
def test_smart_resize(height_width, budget, resized):
    assert smart_resize(*height_width, **budget) == resized


def test_too_long_images_are_refused(real_processor):
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        real_processor.image_processor(images=[Image.new("RGB", (2010, 10))], return_tensors="pt")


@pytest.mark.parametrize(
    ("width_height", "grid", "tokens"),
    [
        ((400, 300), [1, 22, 28], 154),
        ((300, 400), [1, 28, 22], 154),
        ((56, 56), [1, 4, 4], 4),
        ((20, 20), [1, 4, 4], 4),
        ((2000, 10), [1, 2, 58], 29),
    ],
)
def test_image_becomes_a_grid_of_patches(width_height, grid, tokens, real_processor):
    image = Image.new("RGB", width_height)
    batch = real_processor(text=["<|image_pad|>"], images=[[image]], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [grid]  # in patches of 14 pixels; 2 x 2 of them are a token
    assert batch["input_ids"].tolist() == [[151655] * tokens]


def test_pixel_budget_shrinks_the_grid(real_processor):
    size = {"shortest_edge": SMALL_BUDGET["min_pixels"], "longest_edge": SMALL_BUDGET["max_pixels"]}
    batch = real_processor.image_processor(images=[Image.new("RGB", (1920, 1080))], size=size, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 52, 94]]
