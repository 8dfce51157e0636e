"""Qwen2-VL's real tokenizer without a hub: rebuilt from the token ranks in the package `dashscope`."""

import base64
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from helpers.tiny.pretrain import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKEN

PIXEL_BUDGET = {"shortest_edge": 4 * TOKEN**2, "longest_edge": 16384 * TOKEN**2}  # what Qwen2-VL is published with


def build_processor() -> Qwen2VLProcessor:
    """What `from_pretrained` gives for the published Qwen2-VL, but for the template's video branch."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(PIXEL_BUDGET)),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """151,643 byte-level BPE tokens, then the special ones; pads on the left, as published."""
    ranks = read_ranks()
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {names[token]: rank for token, rank in ranks.items()}
    merges = [tuple(names[part] for part in split(token, ranks)) for token in ranks if len(token) > 1]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})  # the first one is its default
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def read_ranks() -> dict[bytes, int]:
    """Each token's bytes and its id, in the order of ids. The package itself is not imported."""
    path = Path(distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken"))
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}


def split(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that `token` is merged from: its bytes, merged lowest rank first, until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
