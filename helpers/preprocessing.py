"""What the model is given: image tokens, patches put together again, kinds of tokens, padding.

Printed from notebooks/03_data_preprocessing.py: edit that, then run `make sync`.
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from helpers.boxes import resized_size
from helpers.collators import VISION_TOKENS, find_assistant_tokens
from helpers.plots import TRUTH_COLOUR


def unpatch(pixel_values: torch.Tensor, grid: Sequence[int], image_processor) -> Image.Image:
    """The image that a Qwen2-VL processor cut into `pixel_values` (patches of one image), with `grid` (t, h, w)."""
    _, height, width = (int(size) for size in grid)
    merge, patch = image_processor.merge_size, image_processor.patch_size
    blocks = pixel_values.reshape(
        height // merge, width // merge, merge, merge, 3, image_processor.temporal_patch_size, patch, patch
    )[:, :, :, :, :, 0]  # both frames of an image are the same
    pixels = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)
    pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def count_image_tokens(
    sizes: Sequence[tuple[int, int]], factor: int = 28, min_pixels: int = 4 * 28**2, max_pixels: int = 16384 * 28**2
) -> np.ndarray:
    """Image tokens for each (width, height): one for each `factor` x `factor` pixels of the resized image."""
    resized = [resized_size(width, height, factor, min_pixels, max_pixels) for width, height in sizes]
    return np.array([width * height // factor**2 for width, height in resized])


def list_token_cells(batch: dict[str, torch.Tensor], tokenizer) -> list[tuple[str, bool]]:
    """Text and "has a label" of each token in the batch's first row; a run of image tokens is one cell."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    cells = []
    for token, label, previous in zip(ids, labels, [None, *ids], strict=False):
        if token == tokenizer.pad_token_id or token == previous == image:
            continue
        text = tokenizer.decode([token]).replace("<|", "").replace("|>", "").replace(" ", "␣").replace("\n", "↵")
        cells.append((f"{ids.count(image)} x {text}" if token == image else text, label != -100))
    return cells


def plot_trained_tokens(batches: dict[str, dict[str, torch.Tensor]], tokenizer, per_line: int = 14) -> plt.Figure:
    """The first row of one batch per collator as a strip of tokens, coloured where the loss looks."""
    figure, grid = plt.subplots(len(batches), 1, figsize=(12, 3.4 * len(batches)), layout="constrained", squeeze=False)
    for axes, (variant, batch) in zip(grid.flat, batches.items(), strict=True):
        cells = list_token_cells(batch, tokenizer)
        for number, (text, trained) in enumerate(cells):
            x, y = number % per_line, -(number // per_line)
            fill, ink = (TRUTH_COLOUR, "white") if trained else ("#eeeeee", "black")
            axes.add_patch(Rectangle((x + 0.03, y + 0.1), 0.94, 0.8, color=fill))
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=ink, parse_math=False)
        axes.set_title(f"{variant}: {sum(t for _, t in cells)} of {len(cells)} cells are trained", loc="left")
        axes.set(xlim=(0, per_line), ylim=(-((len(cells) - 1) // per_line), 1))
        axes.axis("off")
    return figure


TOKEN_KINDS = ["image", "system message, question, roles", "answer", "end of turn", "padding"]


def classify_tokens(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """The kind of each token (batch, tokens), as its place in TOKEN_KINDS."""
    is_answer = find_assistant_tokens(input_ids, tokenizer)
    kinds = torch.ones_like(input_ids)
    kinds[torch.isin(input_ids, torch.tensor(tokenizer.convert_tokens_to_ids(VISION_TOKENS)))] = 0
    kinds[is_answer] = 2
    kinds[is_answer & (input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>"))] = 3
    kinds[input_ids == tokenizer.pad_token_id] = 4
    return kinds


def analyze_token_distribution(batch: dict[str, torch.Tensor], tokenizer) -> pd.DataFrame:
    """Tokens of a batch by kind: how many there are, and how many of them have a label."""
    kinds, trained = classify_tokens(batch["input_ids"], tokenizer), batch["labels"] != -100
    counts = {name: [kinds == number, (kinds == number) & trained] for number, name in enumerate(TOKEN_KINDS)}
    counts = {name: [int(mask.sum()) for mask in masks] for name, masks in counts.items()}
    return pd.DataFrame.from_dict(counts, orient="index", columns=["tokens", "trained"])


def share_of_padding(lengths: Sequence[int], batch_size: int, multiple: int) -> float:
    """Padding as a share of all tokens when rows are batched in this order, each batch padded to a `multiple`."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    padded = sum(math.ceil(max(batch) / multiple) * multiple * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded
