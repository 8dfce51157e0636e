"""Pretrain the tiny Qwen2-VL base that ships with this repository, from nothing, on drawn food packages.

    python -m helpers.tiny.pretrain                      # one GPU (21 minutes on an H200), writes helpers/tiny/base
    python -m helpers.tiny.pretrain --smoke --output /tmp/base  # a minute on a CPU, to see that the code runs

The result is an ordinary `Qwen2VLForConditionalGeneration` folder. It finds the objects in `packages.LABELS`.
Nutrition tables are in the images, and the vision tower is shown some of them, but no answer ever holds the box of
one: to write it is what fine-tuning is to teach.

Two phases, because a language model of this size does not learn coordinates from the loss on a few digits alone (5,000
steps of that gave nothing):
1. the vision tower, through a throw-away linear head: each token tells which objects cover it, and their boxes; in one
   image of four this includes the nutrition table, so that the tower has seen some, as a real one has;
2. the whole model, next-token loss on conversations: "Detect every barcode …" (for a quarter of the images "Detect the
   bounding box of the barcode."), "Detect every object …", and "Write the label of the barcode.", which gives the
   language model the words, that of nutrition tables among them.

The loss of phase 2 covers the whole conversation: the answer, plus a tenth of that on system message and question.
With the loss on answers alone, nothing makes the output head tell the words of a prompt apart: on an earlier base made
that way the loss on the tokens of prompts was 17 nats, and the median cosine between the head's rows for their words
0.999. Now they are about 0.2 (`tests/test_tiny_base.py`) and 0.4 (`notebooks/00_tiny_world`).

Python overhead would dominate at this size, so all images live on the GPU, batches hold images of one size, and
token positions are computed once per size.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention, apply_rotary_pos_emb_vision

from helpers.boxes import from_grid, to_grid
from helpers.collators import VISION_TOKENS
from helpers.conversation import PROMPT, Task, format_answer, to_conversation
from helpers.generation import Detector, generate, to_questions
from helpers.metrics import match_boxes
from helpers.parsing import parse_answer
from helpers.tiny.packages import LABELS, TABLE_LABEL, draw_package

BASE = Path(__file__).parent / "base"
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
# Qwen2-VL's own template, without its video branch
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKEN = 28  # pixels per side of the block that becomes one token
PIXEL_BUDGET = {"shortest_edge": 4 * TOKEN**2, "longest_edge": 66 * TOKEN**2}
KINDS = [*LABELS, TABLE_LABEL]  # what the vision tower is shown in phase 1
TABLE_EVERY = 4  # one image in so many shows the tower its nutrition table; of the others nothing is said
FIRST_SEED = 10**9  # images from here on are for pretraining; those of datasets come before
FIRST_UNSEEN_SEED = 2 * 10**9  # and those from here on are for the scores
QUESTION_WEIGHT = 0.1  # of the loss on system message and question: without it the head cannot tell their words apart
PLAIN_PROMPT = "Detect the bounding box of the {label}."
NAMING_PROMPT = "Write the label of the {label}."
EVERYTHING = "object"  # "Detect every object …" is answered with all of LABELS
MODEL_CARD = """---
license: apache-2.0
base_model_relation: none
pipeline_tag: image-text-to-text
tags: [object-detection, qwen2_vl]
---
# A tiny Qwen2-VL that finds objects on drawn food packages

An ordinary `Qwen2VLForConditionalGeneration` of {parameters:,} parameters (float16), with Qwen2-VL's special tokens,
chat template and answer format, and a byte-level vocabulary of {tokens} tokens of its own. It exists so that a
fine-tuning story can be run and tested in minutes on a CPU; it knows nothing but drawn packages.

## How it was made

`python -m helpers.tiny.pretrain`: {minutes} minutes on {device}, drawing included. From random weights, on
{images:,} images drawn by `helpers/tiny/packages.py` (seeds from {first_seed:,}), of at most {longest_edge:,}
pixels each:

1. {vision_steps:,} steps of {batch_size} images: the vision tower, through a linear head that was thrown away (per
   token: which objects cover it, and their boxes; one image in {table_every} tells of its nutrition table too, in
   the others the tokens on it do not count);
2. {answer_steps:,} steps of {batch_size} conversations: all weights, next-token loss. The questions are "Detect every
   barcode …" or "Detect the bounding box of the barcode." (one label), "Detect every object …" (all of them), and
   "Write the label of the barcode." (its name, no box). The loss is that of the answers plus {question_weight} times
   that of system message and question: with the loss on answers alone, the output head cannot tell the words of a
   prompt apart (an earlier base made that way had a loss of 17 nats on the tokens of prompts, and a median cosine of
   0.999 between the head's rows for their words; here they are about 0.2, asserted in
   `tests/test_tiny_base.py`, and 0.4, drawn in `notebooks/00_tiny_world`).

So the vision tower has seen nutrition tables and the language model knows what they are called, but in no answer was
ever the box of one: to bring the two together is left for fine-tuning.

## Scores

Zero-shot on {score_images} unseen images of six aspect ratios, greedy answers, mean IoU one to one
(`python -m helpers.tiny.pretrain --score-only` repeats it):

{table}

## Limits

Drawn packages only, one object of each label an image; the prompt has to be one of those it was trained with
(`PROMPT` in `helpers/conversation.py`, `PLAIN_PROMPT` in `helpers/tiny/pretrain.py`). Objects under about 7 % of the
image's longer side were never labelled. It has read no other sentences than these, and the rows of its output head for
the words of prompts are still alike (median cosine about 0.4): what is learned from a loss on prompts need not carry
over to a real model.
"""
Objects = list[tuple[str, tuple[float, float, float, float]]]


def prompt_for(label: str, wording: str = PROMPT) -> str:
    """The question for a label: `brand-name` is asked for as `brand name`."""
    return wording.format(label=label.replace("-", " "))


def wording_for(image: int) -> str:
    """Every fourth image is asked about in the plain words, which say nothing of the format."""
    return PLAIN_PROMPT if image % 4 == 3 else PROMPT


# Model, tokenizer, processor


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer (byte-level BPE, one token per digit) with a few hundred merges of its own."""
    labels = [*LABELS, TABLE_LABEL, EVERYTHING]
    corpus = [
        "\n".join([message, label, *(prompt_for(label, words) for words in (PROMPT, PLAIN_PROMPT, NAMING_PROMPT))])
        for label in labels
        for message in ("system", "user", "assistant")
    ]
    corpus += [part["text"] for part in to_conversation(Task(""))[0]["content"]] * len(corpus)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=512, new_special_tokens=SPECIAL_TOKENS[1:])
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return tokenizer


def build_processor() -> Qwen2VLProcessor:
    """Processor with the pixel budget that the base is trained at: 66 tokens an image at most."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=PIXEL_BUDGET),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """About 6 million parameters, over half of them vision; widths are multiples of 64, as 4-bit loading needs."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 64 * math.ceil(len(tokenizer) / 64),
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 6, "embed_dim": 192, "hidden_size": 192, "mlp_ratio": 4, "num_heads": 3}
    ids = {
        f"{name}_token_id": token(f"<|{short}|>")
        for name, short in [
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        ]
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


# Images, grouped by size


def draw_resized(seed: int) -> tuple[np.ndarray, Objects]:
    """A drawn package at the size the processor gives it, uint8 (height, width, 3), and its objects in 0..1."""
    image, objects = draw_package(seed)
    budget = {"min_pixels": PIXEL_BUDGET["shortest_edge"], "max_pixels": PIXEL_BUDGET["longest_edge"]}
    height, width = smart_resize(image.height, image.width, factor=TOKEN, **budget)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    scale = np.array([image.width, image.height] * 2)
    return pixels, [(label, tuple(np.array(box) / scale)) for label, box in objects]


def draw_groups(seeds: Sequence[int], device: str) -> list[dict]:
    """Images of one size per group: `pixels` uint8 (n, 3, height, width) on the device, `objects` per image."""
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        drawn = list(
            tqdm(pool.imap(draw_resized, seeds, chunksize=32), total=len(seeds), desc="drawing", mininterval=5)
        )
    groups = {}
    for pixels, objects in drawn:
        groups.setdefault(pixels.shape, []).append((pixels, objects))
    return [
        {
            "pixels": torch.from_numpy(np.stack([p for p, _ in group])).permute(0, 3, 1, 2).contiguous().to(device),
            "objects": [objects for _, objects in group],
        }
        for group in groups.values()
    ]


def flip(objects: Objects) -> Objects:
    """Objects of the mirrored image, boxes in 0..1."""
    return [(label, (1 - x2, y1, 1 - x1, y2)) for label, (x1, y1, x2, y2) in objects]


def pick_group(groups: Sequence[dict], counts: Sequence[int]) -> dict:
    """A random group, likelier the more examples it has."""
    return groups[int(torch.multinomial(torch.tensor(counts, dtype=torch.float), 1))]


@contextmanager
def same_size_attention() -> Iterator[None]:
    """Within this context vision attention takes the images of a batch, all of one size, at once, not in a loop."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings, **kwargs):
        n, images = len(hidden_states), len(cu_seqlens) - 1
        qkv = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).permute(1, 0, 2, 3)
        query, key = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *position_embeddings)
        split = [t.to(qkv.dtype).reshape(images, -1, self.num_heads, t.shape[-1]).transpose(1, 2)
                 for t in (query, key, qkv[2])]  # fmt: skip
        return self.proj(F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(n, -1))

    original = VisionAttention.forward
    VisionAttention.forward = forward  # of the class, not of each layer: torch.compile would compile each layer anew
    try:
        yield
    finally:
        VisionAttention.forward = original


def look(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Vision features (images, tokens, width) of uint8 images (images, 3, height, width) of one size."""
    inputs = processor.image_processor(images=list(jitter(pixels)), do_resize=False, return_tensors="pt")
    grid = inputs["image_grid_thw"]
    one = vision_positions(*grid[0, 1:].tolist())
    positions = one.repeat(len(grid), 1).to(pixels.device)
    bounds = torch.arange(0, len(grid) + 1, dtype=torch.int32, device=pixels.device) * len(one)
    visual = model.model.visual
    patches = inputs["pixel_values"].to(pixels.device)
    features = visual(patches, grid_thw=grid, position_ids=positions, cu_seqlens=bounds).pooler_output
    return features.reshape(len(grid), -1, features.shape[-1])


def vision_positions(height: int, width: int) -> torch.Tensor:
    """Row and column of each patch (patches, 2), in the order of the processor: blocks of 2 x 2."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blocks = torch.stack([rows, columns], -1).reshape(height // 2, 2, width // 2, 2, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def jitter(pixels: torch.Tensor) -> torch.Tensor:
    """Random brightness and contrast per image, so that no image is ever seen twice alike."""
    shape = (len(pixels), 1, 1, 1)
    gain = torch.empty(shape, device=pixels.device).uniform_(0.8, 1.2)
    shift = torch.empty(shape, device=pixels.device).uniform_(-20, 20)
    return (pixels * gain + shift).clamp(0, 255).byte()


# Phase 1: what is where, read off every token


def dense_targets(group: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each token is to tell.

    Returns which kind covers which token (n, rows, columns, kinds), the kinds' boxes in 0..1 (n, kinds, 4), and the
    tokens that count (n, rows, columns): all but those on nutrition tables that are not shown, of which nothing is
    said, lest the tower learn that they are background.
    """
    n, _, height, width = group["pixels"].shape
    rows, columns = height // TOKEN, width // TOKEN
    covered = np.zeros((n, rows, columns, len(KINDS)), dtype=bool)
    boxes = np.zeros((n, len(KINDS), 4), dtype=np.float32)
    counted = np.ones((n, rows, columns), dtype=bool)
    for image, objects in enumerate(group["objects"]):
        labels = [label for label, _ in objects]
        shown = image % TABLE_EVERY == 0 and labels.count(TABLE_LABEL) == 1
        for label, box in objects:
            inside = tokens_inside(box, rows, columns)
            if label == TABLE_LABEL and not shown:
                counted[image] &= ~inside
            else:
                covered[image, ..., KINDS.index(label)], boxes[image, KINDS.index(label)] = inside, box
    return tuple(torch.from_numpy(array).to(group["pixels"].device) for array in (covered, boxes, counted))


def tokens_inside(box: Sequence[float], rows: int, columns: int) -> np.ndarray:
    """The tokens (rows, columns) whose centres are inside a box in 0..1, and the one at the box's centre."""
    x1, y1, x2, y2 = box
    x, y = (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows
    inside = ((y >= y1) & (y <= y2))[:, None] & ((x >= x1) & (x <= x2))
    inside[min(rows - 1, int((y1 + y2) / 2 * rows)), min(columns - 1, int((x1 + x2) / 2 * columns))] = True
    return inside


def dense_loss(
    output: torch.Tensor, covered: torch.Tensor, boxes: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of "kind covers this token" plus L1 of its box; output (n, tokens, kinds, 5)."""
    output, covered, counted = output.float(), covered.flatten(1, 2), counted.flatten(1, 2)
    weight = torch.tensor(5.0, device=output.device)  # most tokens are covered by nothing
    presence = F.binary_cross_entropy_with_logits(
        output[..., 0], covered.float(), pos_weight=weight, weight=counted[..., None].float()
    )
    distance = (output[..., 1:] - boxes[:, None]).abs().sum(-1)
    return 5 * presence + 3 * (distance * covered).sum() / covered.sum().clamp(min=1)


def pretrain_vision(model, processor, groups: Sequence[dict], steps: int, batch_size: int, lr: float) -> None:
    """Phase 1: train `model.model.visual` through a linear head that is thrown away."""
    device = groups[0]["pixels"].device
    head = torch.nn.Linear(model.config.vision_config.hidden_size, len(KINDS) * 5).to(device)
    for group in groups:
        group["targets"] = dense_targets(group)
    counts = [len(group["pixels"]) for group in groups]

    def loss_of_batch() -> torch.Tensor:
        group = pick_group(groups, counts)
        chosen = torch.randint(len(group["pixels"]), (batch_size,), device=device)
        pixels = group["pixels"][chosen]
        covered, boxes, counted = [target[chosen] for target in group["targets"]]
        if torch.rand(()) < 0.5:
            pixels, covered, counted = pixels.flip(3), covered.flip(2), counted.flip(2)
            boxes = torch.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], -1)
        output = head(look(model, processor, pixels))
        return dense_loss(output.unflatten(-1, (len(KINDS), 5)), covered, boxes, counted)

    optimize([*model.model.visual.parameters(), *head.parameters()], loss_of_batch, steps, lr, "vision", device.type)
    for group in groups:
        del group["targets"]


# Phase 2: questions and answers


def ask_about(group: dict, kind: str) -> list[tuple[int, str, str, str]]:
    """Questions of a kind, "one", "everything" or "name": image number, prompt, answer plain and mirrored."""
    asked = []
    for image, objects in enumerate(group["objects"]):
        known = [labelled for labelled in objects if labelled[0] != TABLE_LABEL]
        if kind == "one":
            subjects = [(prompt_for(labelled[0], wording_for(image)), [labelled]) for labelled in known]
            asked += [(image, prompt, answer_text(o), answer_text(flip(o))) for prompt, o in subjects]
        elif kind == "everything" and known:
            asked.append((image, prompt_for(EVERYTHING), answer_text(known), answer_text(flip(known))))
        elif kind == "name":
            label = KINDS[image % len(KINDS)]
            name = f"<|object_ref_start|>{label}<|object_ref_end|><|im_end|>"
            asked.append((image, prompt_for(label, NAMING_PROMPT), name, name))
    return asked


def build_questions(group: dict, processor: Qwen2VLProcessor, kind: str) -> dict:
    """Token ids (plain or mirrored, questions, length) padded on the right, starts of answers, image numbers."""
    tokenizer = processor.tokenizer
    height, width = group["pixels"].shape[2:]
    image_tokens = "<|image_pad|>" * (height // TOKEN * (width // TOKEN))
    asked = ask_about(group, kind)
    prompts = [prompt for _, prompt, _, _ in asked]
    heads = {
        prompt: processor.apply_chat_template(to_conversation(Task(prompt)), add_generation_prompt=True)
        .replace("<|image_pad|>", image_tokens)
        for prompt in set(prompts)
    }  # fmt: skip
    starts = {prompt: len(tokenizer.encode(text)) for prompt, text in heads.items()}
    answers = [question[view] for view in (2, 3) for question in asked]
    texts = [heads[prompt] + answer for prompt, answer in zip(prompts * 2, answers, strict=True)]
    rows = [torch.tensor(ids, dtype=torch.int16) for ids in tokenizer(texts)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    device = group["pixels"].device
    return {
        "pixels": group["pixels"],
        "tokens": tokens.reshape(2, len(asked), -1).to(device),
        "start": torch.tensor([starts[prompt] for prompt in prompts], device=device),
        "image": torch.tensor([image for image, *_ in asked], device=device),
        "grid": torch.tensor([[1, height // 14, width // 14]]),
    }


def answer_text(objects: Objects) -> str:
    """What the model is to write for objects with boxes in 0..1, end of turn included."""
    return format_answer([label for label, _ in objects], [to_grid(box, 1, 1) for _, box in objects]) + "<|im_end|>"


def answer_loss(model, processor, questions: dict, batch_size: int) -> torch.Tensor:
    """Next-token loss on whole conversations about a random batch of images; the answers weigh most."""
    pad, device = processor.tokenizer.pad_token_id, questions["tokens"].device
    chosen = torch.randint(len(questions["image"]), (batch_size,), device=device)
    mirrored = int(torch.rand(()) < 0.5)
    ids = questions["tokens"][mirrored, chosen].long()
    ids = ids[:, : int((ids != pad).sum(1).max())]
    pixels = questions["pixels"][questions["image"][chosen]]
    features = look(model, processor, pixels.flip(3) if mirrored else pixels)
    embeddings = model.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
    positions = text_positions(model, ids, questions["grid"])
    hidden = model.model.language_model(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False
    ).last_hidden_state
    is_text = ~torch.isin(
        ids, torch.tensor([pad, *processor.tokenizer.convert_tokens_to_ids(VISION_TOKENS)]).to(device)
    )
    is_answer = is_text & (torch.arange(ids.shape[1], device=device) >= questions["start"][chosen, None])
    wanted = is_text[:, 1:]
    losses = F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]).float(), ids[:, 1:][wanted], reduction="none")
    answered = is_answer[:, 1:][wanted]
    return losses[answered].mean() + QUESTION_WEIGHT * losses[~answered].mean()


def text_positions(model, ids: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Qwen2-VL's 3-D positions (3, batch, length): the same for all rows, whose images are in the same place."""
    kinds = (ids[:1] == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids[:1].cpu(), mm_token_type_ids=kinds.cpu(), image_grid_thw=grid)
    return positions.expand(-1, len(ids), -1).to(ids.device)


def pretrain_answers(model, processor, groups: Sequence[dict], steps: int, batch_size: int, lr: float) -> None:
    """Phase 2: train everything; a third of the batches ask for every object at once, one in ten for a name."""
    shares = {"one": 0.57, "everything": 0.33, "name": 0.1}
    tables = [[build_questions(group, processor, kind) for group in groups] for kind in shares]
    counts = [[len(questions["image"]) for questions in table] for table in tables]

    def loss_of_batch() -> torch.Tensor:
        kind = int(torch.multinomial(torch.tensor(list(shares.values())), 1))
        return answer_loss(model, processor, pick_group(tables[kind], counts[kind]), batch_size)

    optimize(list(model.parameters()), loss_of_batch, steps, lr, "answers", groups[0]["pixels"].device.type)


def optimize(parameters: list, loss_of_batch, steps: int, lr: float, name: str, device: str) -> None:
    """AdamW with 3 % warmup and cosine decay, bfloat16 on a GPU."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    warmup = max(1, round(0.03 * steps))
    factor = lambda step: min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    progress = tqdm(range(steps), desc=name, mininterval=5)
    for step in progress:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


# Scores and model card


def score(model, processor, seeds: Sequence[int], batch_size: int = 64) -> dict[str, dict[str, float]]:
    """Zero-shot mean IoU per label on images drawn from `seeds`, through the story's own generation and parser."""
    model.eval()
    examples = [draw_package(seed) for seed in tqdm(seeds, desc="drawing", mininterval=5)]
    results = {}
    for label in tqdm([*LABELS, TABLE_LABEL], desc="scoring"):
        detector = Detector(model, processor, Task(prompt_for(label)), max_new_tokens=96)
        asked = [(image, [b for name, b in objects if name == label]) for image, objects in examples]
        asked = [(image, boxes) for image, boxes in asked if boxes]
        ious = []
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            answers = generate(detector, to_questions([image for image, _ in batch], detector))
            ious += [np.mean(match_boxes(boxes, found_boxes(answer.text, image)))
                     for (image, boxes), answer in zip(batch, answers, strict=True)]  # fmt: skip
        ious = np.array(ious)
        results[label] = {
            "images": len(ious),
            "mean_iou": round(float(ious.mean()), 3),
            "iou_gt_0.5": round(float((ious > 0.5).mean()), 3),
            "iou_gt_0.7": round(float((ious > 0.7).mean()), 3),
        }
    return results


def found_boxes(answer: str, image: Image.Image) -> list[list[float]]:
    """Boxes of an answer in pixels."""
    return [from_grid(box, *image.size) for _, box in parse_answer(answer).objects]


def scores_table(scores: dict[str, dict[str, float]]) -> str:
    """Scores per label as a Markdown table."""
    columns = list(next(iter(scores.values())))
    lines = [["label", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label, *map(str, row.values())] for label, row in scores.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_model_card(folder: Path, model, processor, scores: dict) -> None:
    """`scores.json`, and the README.md that quotes it and `training.json`, beside the weights."""
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    facts = json.loads((folder / "training.json").read_text()) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(processor.tokenizer),
        "first_seed": FIRST_SEED,
        "longest_edge": PIXEL_BUDGET["longest_edge"],
        "table_every": TABLE_EVERY,
        "question_weight": QUESTION_WEIGHT,
        "score_images": scores[TABLE_LABEL]["images"],  # there is a table in every image
        "table": scores_table(scores),
    }
    (folder / "README.md").write_text(MODEL_CARD.format(**facts))


def pretrain(arguments: argparse.Namespace) -> None:
    """Draw, train in two phases, save the model and, in `training.json`, how it was made."""
    started = time.time()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = build_processor()
    model = build_model(processor.tokenizer).to(device)
    groups = draw_groups(range(FIRST_SEED, FIRST_SEED + arguments.images), device)
    if device == "cuda":
        for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
            block.compile()  # halves the time of a step
    with same_size_attention():
        pretrain_vision(model, processor, groups, arguments.vision_steps, arguments.batch_size, lr=1e-3)
        pretrain_answers(model, processor, groups, arguments.answer_steps, arguments.batch_size, lr=8e-4)
    model.half().save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    training = {name: getattr(arguments, name) for name in ("images", "vision_steps", "answer_steps", "batch_size")}
    training["minutes"] = round((time.time() - started) / 60, 1)
    training["device"] = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    (arguments.output / "training.json").write_text(json.dumps(training, indent=1) + "\n")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BASE)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--vision-steps", type=int, default=8_000)
    parser.add_argument("--answer-steps", type=int, default=13_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--score-images", type=int, default=256)
    parser.add_argument("--score-only", action="store_true", help="score what is in --output")
    parser.add_argument("--smoke", action="store_true", help="shrink everything, to see that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        small = {"images": 64, "vision_steps": 3, "answer_steps": 3, "batch_size": 4, "score_images": 8}
        arguments = argparse.Namespace(**{**vars(arguments), **small})

    if not arguments.score_only:
        pretrain(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2VLForConditionalGeneration.from_pretrained(arguments.output, dtype=torch.float32).to(device)
    processor = Qwen2VLProcessor.from_pretrained(arguments.output)
    unseen = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + arguments.score_images)
    scores = score(model, processor, unseen)
    print(scores_table(scores))
    write_model_card(arguments.output, model, processor, scores)


if __name__ == "__main__":
    main()
