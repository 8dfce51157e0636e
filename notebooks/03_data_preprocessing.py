# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. From a row to tensors
#
# **What you will learn:** each step between a row of the dataset and what the model is given, with shapes; what the
# model gets to see at which pixel budget, and what that costs; how exact a box can be on a grid of 0 to 1000; which
# tokens of a batch are trained; what padding costs.
#
# **How long it takes:** about a minute on two CPU cores. Only the processor is loaded, no model.
#
# The outputs are those of the tiny model's processor on drawn packages. Its images are small and its own budget is 66
# tokens; sizes of phone photographs are computed beside them. With `MODEL_ID` and `DATASET_ID` of your own the same
# cells show your data.

# %% tags=["parameters"]
MODEL_ID = "helpers/tiny/base"  # hub id or folder
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder
SPLIT = "train"
SAMPLES = 1000  # rows whose sizes and lengths are counted; only a few images are decoded
MAX_PIXELS = 1003520  # the main notebook's default: 1,280 tokens
TOKEN_BUDGETS = [6, 16, 66, 192]  # image tokens; for photographs rather [64, 256, 1280, 4096]
BATCH_SIZE = 16
SEED = 42

# %%
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for an optional package

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torchvision.ops import box_iou

from helpers.boxes import flip_horizontally, from_grid, resized_size, to_grid
from helpers.collators import COLLATORS, VISION_TOKENS, find_assistant_tokens
from helpers.conversation import PROMPT, Task, format_answer, to_conversation
from helpers.data import describe_boxes, load_rows, read_headers, read_row, to_training_example
from helpers.loading import load_processor, pixel_budget
from helpers.plots import BLUE, ORANGE, PREDICTION_COLOUR, TRUTH_COLOUR, draw_boxes, plot_images, to_jpeg

TASK = Task(PROMPT.format(label="nutrition table"))

processor = load_processor(MODEL_ID, MAX_PIXELS)
tokenizer, image_processor = processor.tokenizer, processor.image_processor
rows = load_rows(DATASET_ID, SPLIT, SAMPLES, SEED)
budget = pixel_budget(processor)
print(f"{len(rows)} rows; the processor's budget: {budget}")

# %% [markdown]
# ## One row, step by step
#
# The row as it is stored: boxes as `[y_min, x_min, y_max, x_max]`, fractions of the image as displayed. The one with
# the box of middling size that lies farthest to a side is taken, because much can be seen on it.

# %%
table = describe_boxes(rows)
middling = table[table.area.between(table.area.quantile(0.1), table.area.quantile(0.5))]
row = rows[int(middling.image[(middling.x1 + middling.x2 - 1).abs().idxmax()])]
{name: value for name, value in row.items() if name in ("image_id", "image", "objects")}

# %% [markdown]
# **Upright image, boxes in pixels.** From here on x comes first. Then the boxes are rounded to the grid of 0 to 1000
# and become text; the conversation is what the model is taught.

# %%
image, boxes, labels = read_row(row)
on_grid = [to_grid(box, *image.size) for box in boxes]
conversation = to_conversation(TASK, format_answer(labels, on_grid))
print("pixels of", image.size, [[round(v, 1) for v in box] for box in boxes])
print("on the grid", on_grid)
conversation

# %% [markdown]
# **Chat template.** Roles become text with marks. There is one `<|image_pad|>` now: the template does not know the
# image. The processor does, and repeats it, one for each block of 28 x 28 pixels of the resized image.

# %%
text = processor.apply_chat_template(conversation, tokenize=False)
inputs = processor(text=[text], images=[[image]], return_tensors="pt")
image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
print(text)
print(
    "in the text:",
    text.count("<|image_pad|>"),
    "  in the token ids:",
    (inputs["input_ids"] == image_token).sum().item(),
)

# %% [markdown]
# **Shapes.** `image_grid_thw` is all that tells the model which patches belong to which image and how they lie: the
# patches of all images of a batch are one long list.

# %%
frames, grid_height, grid_width = inputs["image_grid_thw"][0].tolist()
resized = resized_size(*image.size, **budget)
steps = [
    ("upright image", f"{image.width} x {image.height} pixels", "width x height"),
    ("resized", f"{resized[0]} x {resized[1]} pixels", "both sides multiples of 28, within the budget"),
    (
        "image_grid_thw",
        f"{frames} x {grid_height} x {grid_width}",
        "frames x rows x columns of patches, 14 pixels each",
    ),
    ("pixel_values", tuple(inputs["pixel_values"].shape), "patches x (3 colours * 2 frames * 14 * 14)"),
    ("image tokens", grid_height * grid_width // 4, "2 x 2 patches become one token"),
    ("input_ids", tuple(inputs["input_ids"].shape), "batch x tokens, the image tokens among them"),
    (
        "mm_token_type_ids",
        tuple(inputs["mm_token_type_ids"].shape),
        "1 where an image token stands: its position is in a plane",
    ),
]
pd.DataFrame(steps, columns=["what", "shape", "meaning"]).set_index("what")

# %% [markdown]
# **Patches.** An image is one frame, and the model reads pairs of frames, so each patch is stored twice. The four
# patches of one token follow each other. To see what the model sees, the patches are put together again: scaling and
# normalisation undone, order restored. A wrong order would be visible at once.


# %%
#| export preprocessing: What the model is given: image tokens, patches put together again, kinds of tokens, padding.
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


# %%
seen = unpatch(inputs["pixel_values"], inputs["image_grid_thw"][0], image_processor)
expected = image.resize(resized, Image.Resampling.BICUBIC)
difference = np.abs(np.asarray(seen, dtype=int) - np.asarray(expected, dtype=int))
print(f"put together: {seen.size}; against the image resized directly: {difference.mean():.2f} of 255 on average")

# %% [markdown]
# Nothing got lost but size. On the right the order in which the first patches stand in `pixel_values`: not line by
# line, but token by token. A box's border mostly runs through the middle of a token, so a token has to carry where in
# its square the border is.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.6), layout="constrained")
left.imshow(image)
draw_boxes(left, boxes, TRUTH_COLOUR, "--")
left.set_title(f"upright: {image.width} x {image.height}")
factor = image.width / seen.width, image.height / seen.height
middle.imshow(seen)
draw_boxes(middle, [np.array(box) / (factor * 2) for box in boxes], TRUTH_COLOUR, "--")
middle.set(xticks=np.arange(0, seen.width + 1, 28) - 0.5, yticks=np.arange(0, seen.height + 1, 28) - 0.5)
middle.grid(color="white", lw=0.5)
middle.tick_params(labelbottom=False, labelleft=False, length=0)
middle.set_title(f"as the model sees it: {seen.width} x {seen.height},\none square is a token")
right.imshow(seen.crop((0, 0, 84, 56)))
for number in range(12):
    token, place = divmod(number, 4)
    x, y = token * 28 + place % 2 * 14, place // 2 * 14
    right.add_patch(Rectangle((x - 0.5, y - 0.5), 14, 14, fill=False, ec=ORANGE, lw=1))
    right.text(x + 6.5, y + 6.5, number, color="white", ha="center", va="center", fontweight="bold",
               bbox={"fc": "black", "ec": "none", "pad": 1.5})  # fmt: skip
right.set_title("first 12 rows of pixel_values:\nfour patches, then the next token")
for axes in (left, right):
    axes.axis("off")
to_jpeg(figure, dpi=90)

# %% [markdown]
# ## What an image costs
#
# `smart_resize` keeps the shape of an image, brings both sides to multiples of 28, and shrinks it until it is within
# the budget. The number of image tokens is a number of 28 x 28 squares, so it can be counted without an image.


# %%
#| export preprocessing
def count_image_tokens(
    sizes: Sequence[tuple[int, int]], factor: int = 28, min_pixels: int = 4 * 28**2, max_pixels: int = 16384 * 28**2
) -> np.ndarray:
    """Image tokens for each (width, height): one for each `factor` x `factor` pixels of the resized image."""
    resized = [resized_size(width, height, factor, min_pixels, max_pixels) for width, height in sizes]
    return np.array([width * height // factor**2 for width, height in resized])


# %%
phones = {"640 x 480": (640, 480), "1600 x 1200": (1600, 1200), "4032 x 3024": (4032, 3024)}
max_pixels = np.geomspace(2e4, 1.4e7, 80).astype(int)
figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
for (name, size), colour in zip(phones.items(), (BLUE, ORANGE, "C4"), strict=True):
    tokens = [count_image_tokens([size], max_pixels=int(pixels))[0] for pixels in max_pixels]
    axes.plot(
        max_pixels, tokens, color=colour, lw=2, label=f"{name}: {count_image_tokens([size])[0]:,} tokens at most"
    )
for name, pixels in {"this processor": budget["max_pixels"], "MAX_PIXELS": MAX_PIXELS}.items():
    axes.axvline(pixels, color="grey", ls=":", lw=1)
    axes.text(pixels * 1.05, 18_000, f"{name}\n{pixels // 28**2:,} tokens", fontsize=8, va="center")
axes.set(xscale="log", yscale="log", xlabel="MAX_PIXELS", ylabel="image tokens", ylim=(20, 40_000),
         title="What an image costs at a given budget")  # fmt: skip
axes.grid(alpha=0.3, which="both")
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# An image below the budget keeps its size: its line becomes level. Above it, all photographs cost about the same,
# whatever the camera. The steps at the left are the rounding to multiples of 28.
#
# ## What the model sees for it
#
# The same image at several budgets, below it the largest table, enlarged. Can you still tell a table from a list of
# ingredients? Can you see where its border is? The model has no more to go by than you.


# %%
def see_at(image: Image.Image, tokens: int) -> Image.Image:
    """The image as the model sees it within a budget of image tokens."""
    size = {"shortest_edge": budget["min_pixels"], "longest_edge": tokens * 28**2}
    made = image_processor(images=[image], size=size, return_tensors="pt")
    assert made["image_grid_thw"].prod() <= 4 * tokens, "the budget is not kept"
    return unpatch(made["pixel_values"], made["image_grid_thw"][0], image_processor)


figure, grid = plt.subplots(2, len(TOKEN_BUDGETS), figsize=(3.2 * len(TOKEN_BUDGETS), 7), layout="constrained")
largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
for (upper, lower), tokens in zip(grid.T, TOKEN_BUDGETS, strict=True):
    seen = see_at(image, tokens)
    x1, y1, x2, y2 = np.array(largest) / (image.size * 2) * (seen.size * 2)
    upper.imshow(seen, interpolation="nearest")
    draw_boxes(upper, [[x1, y1, x2, y2]], TRUTH_COLOUR, "--")
    upper.set_title(
        f"budget {tokens} tokens\n{seen.width} x {seen.height} = {seen.width * seen.height // 28**2} tokens"
    )
    lower.imshow(seen.crop((int(x1), int(y1), int(np.ceil(x2)), int(np.ceil(y2)))), interpolation="nearest")
    lower.set_title(f"table: {x2 - x1:.0f} x {y2 - y1:.0f} pixels,\n{(x2 - x1) * (y2 - y1) / 28**2:.1f} tokens")
for axes in grid.flat:
    axes.axis("off")
to_jpeg(figure, dpi=75)

# %% [markdown]
# How small do the boxes of the whole dataset become? Each line below is a budget; it says which share of the boxes is
# at most so wide or high (the shorter side) in the pixels that the model sees. Left of the dotted line a box is
# narrower than one token, left of the dashed one narrower than a patch.

# %%
headers = [(width, height) for width, height, _ in read_headers(rows)]
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for number, tokens in enumerate(TOKEN_BUDGETS):
    limits = {"min_pixels": budget["min_pixels"], "max_pixels": tokens * 28**2}
    seen_sizes = np.array([resized_size(*size, **limits) for size in headers])[table.image]
    short = np.minimum((table.x2 - table.x1) * seen_sizes[:, 0], (table.y2 - table.y1) * seen_sizes[:, 1])
    colour = plt.cm.viridis(0.85 - 0.85 * number / max(1, len(TOKEN_BUDGETS) - 1))
    axes.ecdf(short, color=colour, lw=2, label=f"{tokens} tokens: {(short < 28).mean():.0%} narrower than a token")
axes.axvline(28, color="grey", ls=":")
axes.axvline(14, color="grey", ls="--")
axes.set(xscale="log", xlabel="shorter side of the box in the pixels that the model sees", ylabel="share of boxes")
axes.legend(frameon=False, fontsize=8)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# That a box is narrower than a token does not make it invisible, but its border has to be read off a few pixels. What
# a smaller budget costs in accuracy is a question for training runs with several budgets; the plot above only says
# where to expect trouble.

# %% [markdown]
# The other side of the trade, for all images counted above: what the dataset costs with and without the budget. Where
# the budget holds, images that differ in size cost nearly the same, and only their shape leaves a difference.

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
counted = {"no budget": count_image_tokens(headers), "this processor's": count_image_tokens(headers, **budget)}
bins = np.linspace(0, counted["no budget"].max() * 1.05, 40)
for (name, tokens), colour in zip(counted.items(), (BLUE, ORANGE), strict=True):
    axes.hist(tokens, bins=bins, color=colour, alpha=0.7, label=f"{name}: {tokens.mean():.0f} on average")
axes.set(xlabel="image tokens", ylabel="images", title="Tokens of the images of this dataset")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## How exact can a box be?
#
# Two things blur a box: the model sees resized pixels, and it writes integers from 0 to 1000. Which of the two is
# coarser depends on the budget. For a photograph of 4032 x 3024:

# %%
width, height = phones["4032 x 3024"]
token_counts = np.unique(np.geomspace(16, 12_000, 60).astype(int))
seen_widths = np.array([resized_size(width, height, max_pixels=int(tokens) * 28**2)[0] for tokens in token_counts])
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.plot(token_counts, width / seen_widths, color=BLUE, lw=2, label="one pixel that the model sees")
axes.plot(token_counts, 28 * width / seen_widths, color=BLUE, lw=1, ls="--", label="one token (28 pixels)")
axes.axhline(width / 1000, color=ORANGE, lw=2, label="one step of the grid")
axes.axvline(MAX_PIXELS // 28**2, color="grey", ls=":", label="MAX_PIXELS")
axes.set(xscale="log", yscale="log", xlabel="budget (image tokens)", ylabel="pixels of the photograph",
         title="Step sizes along the width of 4032 pixels")  # fmt: skip
axes.legend(frameon=False, fontsize=8)
axes.grid(alpha=0.3, which="both")
plt.show()

# %% [markdown]
# Where the blue line is above the orange one, the grid is finer than the pixels that the model sees. How much of the
# overlap does rounding take? It is measured on the boxes of the dataset, with rounding and with cutting off, which
# many a conversion script does (`int()`).


# %%
def overlap_after(convert, boxes: np.ndarray) -> np.ndarray:
    """IoU of boxes in 0..1 with what is left of them on a grid of 0..1000 after `convert`."""
    kept = convert(boxes * 1000) / 1000
    return box_iou(torch.tensor(boxes), torch.tensor(kept)).diagonal().numpy()


fractions = table[["x1", "y1", "x2", "y2"]].to_numpy()
there_and_back = [from_grid(to_grid(box, 1, 1), 1, 1) for box in fractions]
assert np.allclose(there_and_back, np.round(fractions * 1000) / 1000)  # to_grid rounds
lost = {name: 1 - overlap_after(convert, fractions) for name, convert in [("round", np.round), ("cut off", np.floor)]}
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
side = np.minimum(table.x2 - table.x1, table.y2 - table.y1)
for (name, loss), colour in zip(lost.items(), (BLUE, ORANGE), strict=True):
    axes.scatter(
        side, loss, s=6, alpha=0.4, color=colour, label=f"{name}: mean {loss.mean():.4f}, worst {loss.max():.3f}"
    )
axes.set(
    xscale="log", yscale="log", xlabel="shorter side of the box / side of the image", ylabel="1 - IoU", ylim=(1e-5, 1)
)
axes.legend(frameon=False, fontsize=8, markerscale=3)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Small boxes lose most, and cutting off loses more than rounding. The mean for `round` is what a model that writes
# every digit right still misses; compare it with the differences between recipes before you blame the grid.
#
# ## Mirroring
#
# A mirrored image is a new image for free, if its boxes are mirrored with it. On the right what a forgotten box would
# teach. (Letters are mirrored too: whether that does harm is a question for an experiment, so the default is off.)

# %%
mirrored, mirrored_boxes = flip_horizontally(image, boxes)
three = [(image, boxes), (mirrored, mirrored_boxes), (mirrored, boxes)]
titles = ["the row", "image and boxes mirrored", "boxes forgotten"]
to_jpeg(plot_images(*map(list, zip(*three, strict=True)), titles=titles, columns=3), dpi=70)

# %% [markdown]
# ## What is trained
#
# A row with several objects, token by token: `␣` is a space, `↵` a line break. The objects follow each other from the
# top left, and the end-of-turn token counts, because the model has to learn when to stop. A run of image tokens is one
# cell, and what is coloured has a label.


# %%
#| export preprocessing
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


# %%
most = max(range(len(rows)), key=lambda number: len(rows[number]["objects"]["bbox"]))
example = to_training_example(rows[most], TASK)
strips = {variant: collator(processor)([example]) for variant, collator in COLLATORS.items()}
plot_trained_tokens(strips, tokenizer)
plt.show()

# %% [markdown]
# The same for a batch, as a table of kinds: how many tokens there are, and how many have a label under each collator.
# The loss is a mean over the tokens with a label, so a collator also decides what counts how much.


# %%
#| export preprocessing
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


# %%
chosen = [most, *(number for number in range(min(8, len(rows))) if number != most)][:8]
examples = [to_training_example(rows[number], TASK) for number in chosen]
batches = {variant: collator(processor)(examples) for variant, collator in COLLATORS.items()}
tables = {variant: analyze_token_distribution(batch, tokenizer) for variant, batch in batches.items()}
counts = pd.DataFrame({variant: table["trained"] for variant, table in tables.items()}).add_prefix("trained by ")
counts.insert(0, "tokens", tables["v2-assistant-only"]["tokens"])
counts.loc["sum"] = counts.sum()
counts

# %% [markdown]
# And where in the rows they stand. The first row is the one with most objects; the image tokens are one block, whose
# end moves with the shape of the image, so a fixed place for the answer would be wrong: the collator looks for the
# assistant's turn.

# %%
kinds = classify_tokens(batches["v2-assistant-only"]["input_ids"], tokenizer).numpy()
colours = [BLUE, "#bbbbbb", TRUTH_COLOUR, PREDICTION_COLOUR, "white"]
figure, grid = plt.subplots(3, 1, figsize=(12, 6), layout="constrained", sharex=True)
grid[0].imshow(kinds, aspect="auto", cmap=ListedColormap(colours), vmin=0, vmax=4, interpolation="nearest")
grid[0].set_title("kind of each token", loc="left")
for axes, (variant, batch) in zip(grid[1:], batches.items(), strict=True):
    axes.imshow(
        batch["labels"] != -100, aspect="auto", cmap=ListedColormap(["#eeeeee", "black"]), interpolation="nearest"
    )
    axes.set_title(f"{variant}: black has a label", loc="left")
for axes in grid:
    axes.set(ylabel="row of the batch", yticks=range(len(kinds)))
grid[-1].set_xlabel("place in the row (token)")
patches = [Patch(fc=colour, ec="black", lw=0.5, label=name) for colour, name in zip(colours, TOKEN_KINDS, strict=True)]
figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
plt.show()

# %% [markdown]
# The image and the question take most of a row, and the answer is a small part at its end: only there
# `v2-assistant-only` looks. Shorter rows are padded on the right; padding never has a label.
#
# ## What padding costs
#
# A batch is as long as its longest row, rounded up to a multiple (8 here; the main notebook says why). Lengths can be
# counted without images: the tokens of the text, plus those of the image, less the one mark it replaces. First a check
# against the collator.


# %%
def count_text_tokens(objects: dict) -> int:
    """Tokens of a training row without those of its image, before padding."""
    grid_boxes = [to_grid([x1, y1, x2, y2], 1, 1) for y1, x1, y2, x2 in objects["bbox"]]
    answer = format_answer(objects["category_name"], grid_boxes)
    text = processor.apply_chat_template(to_conversation(TASK, answer), tokenize=False)
    return len(tokenizer.encode(text, add_special_tokens=False)) - 1


image_tokens = {
    f"{max_pixels // 28**2} tokens": count_image_tokens(headers, **(budget | {"max_pixels": max_pixels}))
    for max_pixels in (budget["max_pixels"], TOKEN_BUDGETS[-1] * 28**2)
}
text_tokens = np.array([count_text_tokens(objects) for objects in rows["objects"]])
lengths = {name: text_tokens + tokens for name, tokens in image_tokens.items()}
first = next(iter(lengths.values()))[chosen]
for name, tokens in image_tokens.items():
    print(f"image tokens at {name}: {tokens.min()} to {tokens.max()}, standard deviation {tokens.std():.1f}")
print(f"text tokens: {text_tokens.min()} to {text_tokens.max()}, standard deviation {text_tokens.std():.1f}")
print("counted:       ", first.tolist())
print("by the collator:", batches["v2-assistant-only"]["attention_mask"].sum(dim=1).tolist())


# %%
#| export preprocessing
def share_of_padding(lengths: Sequence[int], batch_size: int, multiple: int) -> float:
    """Padding as a share of all tokens when rows are batched in this order, each batch padded to a `multiple`."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    padded = sum(math.ceil(max(batch) / multiple) * multiple * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded


# %% [markdown]
# Each batch is padded to its longest row. Two orders are compared, rows as they come and rows sorted by length, for
# three multiples. The second order is the best case: sorting all rows leaves the least padding that this batch size
# allows.

# %%
multiples = [1, 8, 64]
figure, grid = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
for axes, (name, values) in zip(grid, lengths.items(), strict=False):
    for offset, (order, ordered) in enumerate({"by chance": values, "of like length": np.sort(values)}.items()):
        shares = [share_of_padding(ordered.tolist(), BATCH_SIZE, multiple) for multiple in multiples]
        place = np.arange(len(multiples)) + 0.4 * offset
        bars = axes.bar(place, shares, 0.38, color=(BLUE, ORANGE)[offset], label=f"batches {order}")
        axes.bar_label(bars, fmt="{:.1%}", fontsize=8)
    axes.set_xticks(np.arange(len(multiples)) + 0.2, multiples)
    axes.set(
        xlabel="padded to a multiple of", title=f"image budget {name}: {values.min()} to {values.max()} tokens a row"
    )
    axes.margins(y=0.15)
grid[0].set_ylabel("share of padding")
grid[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# What is computed on padding is wasted. Lengths differ for two reasons, printed above: images of other shapes under
# the same budget, and answers with several objects, each of which lengthens its whole batch. Batches of like length
# avoid most of it, and the multiple of 8 costs little; a coarse multiple takes back what sorting has won. Such batches
# have a price: an epoch is no longer in random order, and whether that costs accuracy is not measured here.
#
# ## What to try next
#
# - Set `TOKEN_BUDGETS` and `MAX_PIXELS` for photographs of your own, and find the smallest budget at which you could
#   draw the box yourself. Then train with it and with the double (main notebook, `MAX_PIXELS`).
# - Turn the question into another language. Which tokens of a batch change, and does the share of trained tokens?
# - Replace `to_grid` by one that cuts off and train `r1-llm-only` again. Is the difference more than noise?
# - What the model is made of, and which of its layers a recipe trains: `02_model_understanding`.
