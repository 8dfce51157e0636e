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
# # 2. The model: its parts, their names, and how it sees an image
#
# **What you will learn:** what Qwen2-VL consists of and where its weights are, in the tiny model and in the one of 7
# billion; which layers LoRA can target, and what a pattern on their names leaves out; how an image becomes tokens, and
# what the model makes of them; which position a token gets, and what happens when the positions are wrong.
#
# **How long it takes:** about a minute on two CPU cores.
#
# Sections 1 to 3 need no weights. The pictures of sections 4 to 6 show the base of 6 million parameters on drawn
# packages: how such pictures are made carries over to another `MODEL_ID`, what they show need not.

# %% tags=["parameters"]
MODEL_ID = "helpers/tiny/base"  # hub id or folder
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder
EVAL_SPLIT = "val"
IMAGE = 35  # number of the image that is looked at closely
LABEL = "barcode"  # what the model is asked for
SAMPLES = 24  # images of the experiments with positions
MAX_PIXELS = 1003520
SEED = 0

# %%
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for an optional package

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from huggingface_hub import get_safetensors_metadata
from PIL import Image
from safetensors import safe_open
from transformers import Qwen2VLConfig

from helpers.boxes import from_grid
from helpers.collators import AssistantOnlyCollator
from helpers.conversation import PROMPT, Task, to_conversation
from helpers.data import load_rows, read_row
from helpers.generation import Detector, generate, to_questions
from helpers.loading import area_of, best_dtype, build_empty_model, load_model, load_processor
from helpers.parsing import parse_answer
from helpers.plots import BLUE, LIGHT, ORANGE, PREDICTION_COLOUR, draw_boxes, to_jpeg
from helpers.quantization import build_published_model
from helpers.recipes import LLM_LAYERS, VISION_LAYERS

transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()

# %% [markdown]
# ## 1. Two towers and a merger
#
# PyTorch prints every module of a model, which is more than one can read. A tree is readable if it ends at a certain
# depth and writes repeated layers once. Nothing is loaded for it: the model stands on the `meta` device, where
# tensors have a shape and no values.


# %%
#| export architecture: What a model consists of: its modules, parameters and their names.
def describe_tree(module: torch.nn.Module, depth: int, name: str = "model") -> list[str]:
    """A line a module down to `depth`, with class and parameters; of a list of equal layers only the first."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    lines = [f"{name} ({type(module).__name__}): {parameters:,}"]
    children = list(module.named_children()) if depth else []
    if isinstance(module, torch.nn.ModuleList):
        lines[0] = f"{name}: {len(module)} layers, {parameters:,} in all; each:"
        children = children[:1]
    for child_name, child in children:
        if any(True for _ in child.parameters()):
            lines += [f"    {line}" for line in describe_tree(child, depth - 1, child_name)]
    return lines


# %%
model = build_empty_model(MODEL_ID)
print("\n".join(describe_tree(model, depth=6)))

# %% [markdown]
# Read it from the top as the road of an image. `patch_embed` turns a patch of 14 x 14 pixels into a vector, the
# blocks of `visual` let the patches look at each other, and the `merger` makes one token out of 2 x 2 of them, in the
# width of the language model. There these tokens stand among those of the words. `lm_head` is a
# matrix with a row per token of the vocabulary. The same, drawn, with the numbers of this model:


# %%
def plot_towers(config: Qwen2VLConfig) -> plt.Figure:
    """The two towers and the merger with their widths; an arrow is data, a blue box holds weights."""
    vision, text = config.vision_config, config.text_config
    inside = vision.embed_dim * vision.spatial_merge_size**2
    boxes = {
        (0, 3): ("image", "white"),
        (2.6, 3): (f"patch_embed\n{vision.patch_size} x {vision.patch_size} pixels -> {vision.embed_dim}", LIGHT),
        (5.5, 3): (f"{vision.depth} vision blocks\nwidth {vision.embed_dim}, {vision.num_heads} heads", LIGHT),
        (8.4, 3): (f"merger\n4 x {vision.embed_dim} = {inside} -> {text.hidden_size}", LIGHT),
        (0, 1): ("words", "white"),
        (2.6, 1): (f"embed_tokens\n{text.vocab_size:,} x {text.hidden_size}", LIGHT),
        (5.5, 1): ("one sequence:\nwords, image tokens, words", "white"),
        (8.4, 1): (
            f"{text.num_hidden_layers} decoder layers\nwidth {text.hidden_size}, {text.num_attention_heads} heads,\n"
            f"keys and values: {text.num_key_value_heads}",
            LIGHT,
        ),
        (11.2, 1): (f"lm_head\n{text.vocab_size:,} x {text.hidden_size}", LIGHT),
        (13.2, 1): ("next word", "white"),
    }
    figure, axes = plt.subplots(figsize=(12.5, 3.2), layout="constrained")
    for (x, y), (label, colour) in boxes.items():
        style = {"boxstyle": "round,pad=0.5", "fc": colour, "ec": BLUE if colour == LIGHT else "grey"}
        axes.text(x, y, label, ha="center", va="center", fontsize=9, bbox=style)
    for y, starts, ends in [(3, [0.5, 3.75, 6.65], [1.35, 4.35, 7.15]),
                            (1, [0.5, 3.55, 6.75, 9.65, 12.05], [1.65, 4.2, 7.15, 10.35, 12.55])]:  # fmt: skip
        for start, end in zip(starts, ends, strict=True):
            axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>"})
    axes.annotate("", (6.2, 1.55), (7.9, 2.5), arrowprops={"arrowstyle": "-|>"})
    axes.text(-0.4, 3.9, "vision tower: model.visual", fontsize=10, color=BLUE, weight="bold")
    axes.text(-0.4, 0.05, "language model: model.language_model, lm_head", fontsize=10, color=BLUE, weight="bold")
    axes.set(xlim=(-0.6, 14), ylim=(-0.1, 4.2))
    axes.axis("off")
    return figure


# %%
plot_towers(model.config)
plt.show()

# %% [markdown]
# ## 2. Every parameter, here and at 7 billion
#
# Paths of parameters differ between layers only by the layer's number. With `{i}` in its place a few dozen lines hold
# the whole model.


# %%
#| export architecture
def without_layer_number(name: str) -> str:
    """A module's or parameter's path with `{i}` in place of the number of its block or layer."""
    return re.sub(r"\.(blocks|layers)\.\d+(?=\.|$)", r".\1.{i}", name)


def list_parameters(model: torch.nn.Module) -> pd.DataFrame:
    """All parameters: path with `{i}` for layer numbers, shape, how many of them, how many numbers, their share."""
    found = Counter(
        (without_layer_number(name), tuple(parameter.shape)) for name, parameter in model.named_parameters()
    )
    lines = [(path, shape, count, count * math.prod(shape)) for (path, shape), count in found.items()]
    table = pd.DataFrame(lines, columns=["path", "shape", "count", "parameters"]).set_index("path")
    return table.assign(share=table.parameters / table.parameters.sum())


# %%
style = {"parameters": "{:,}", "share": "{:.2%}"}
list_parameters(model).style.format(style)

# %% [markdown]
# Most lines stand for many layers, two stand alone and are large: `embed_tokens`, which turns a token into a vector,
# and `lm_head`, which turns a vector into a token. Some models share one matrix for both (`tie_word_embeddings`); in
# this one and in the 7B they are two, so that a frozen `lm_head` stays as it is whatever is trained elsewhere.
#
# The same table for Qwen2-VL-7B, whose configuration is public, needs no download either. Its paths are the same.

# %%
large = build_published_model("7B")
list_parameters(large).style.format(style)

# %% [markdown]
# The two tables drawn as shares, on the left by area, as the recipes freeze and train them, on the right by kind of
# layer. Patch embedding and merger are parts of the area `visual`, the word embedding is one of `language_model`.

# %%
KINDS = {
    r"patch_embed": "patch embedding",
    r"visual.*\.attn\.": "vision: attention",
    r"visual\.blocks.*\.mlp\.": "vision: MLP",
    r"merger": "merger",
    r"embed_tokens": "word embedding",
    r"self_attn": "language: attention",
    r"language_model.*\.mlp\.": "language: MLP",
    r"lm_head": "lm_head",
    r"": "norms",
}


def kind_of(path: str) -> str:
    """The kind of layer that a parameter belongs to."""
    return next(kind for pattern, kind in KINDS.items() if re.search(pattern, path))


def share_by(group: Callable[[str], str], order: Sequence[str]) -> pd.DataFrame:
    """Share of the parameters of both models in each group, in this order."""
    shares = {name: list_parameters(m).groupby(group).share.sum() for name, m in models.items()}
    return pd.DataFrame(shares).reindex(order)


models = {f"this model ({sum(p.numel() for p in model.parameters()):,})": model,
          f"Qwen2-VL-7B ({sum(p.numel() for p in large.parameters()):,})": large}  # fmt: skip
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=[2, 3])
areas = ["visual", "language_model", "lm_head"]
for place, (group, order) in zip(axes, [(area_of, areas), (kind_of, list(KINDS.values()))], strict=True):
    (100 * share_by(group, order)).plot.barh(ax=place, color=[ORANGE, BLUE], legend=place is axes[1], width=0.75)
    for bars in place.containers:
        place.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    place.set(xlabel="share of all parameters (%)", ylabel="", xlim=(0, 100))
    place.invert_yaxis()
axes[0].set_title("By area")
axes[1].set_title("By kind of layer")
plt.show()

# %% [markdown]
# Both are the same architecture with different weights on the scales. Training the vision tower touches more than half
# of the tiny model and a twelfth of the large one, so what the recipes do to the one is not what they do to the other.
# At 7B the MLPs of the language model hold most of the weights: four bits save the most memory there.
#
# ## 3. What LoRA can target
#
# LoRA stands beside linear layers, and PEFT finds them by their path. These are all linear layers, with what a pair of
# rank 64 costs beside each, in this model and at 7B.


# %%
#| export architecture
def list_linear_modules(model: torch.nn.Module, prefix: str = "") -> pd.DataFrame:
    """The linear layers below `prefix`: path with `{i}` for layer numbers, their shape, how many of them."""
    found = Counter(
        (without_layer_number(name), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    )
    lines = [(*key, count) for key, count in found.items()]
    return pd.DataFrame(lines, columns=["module", "in", "out", "count"]).set_index("module")


def find_modules_by_pattern(model: torch.nn.Module, pattern: str) -> list[str]:
    """Paths of the modules that a regular expression matches in full, as PEFT matches `target_modules`."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


# %%
linear = list_linear_modules(model).assign(**{"LoRA, rank 64": lambda t: 64 * (t["in"] + t["out"]) * t["count"]})
at_7b = list_linear_modules(large).assign(**{"LoRA, rank 64": lambda t: 64 * (t["in"] + t["out"]) * t["count"]})
pd.concat({"this model": linear, "Qwen2-VL-7B": at_7b}, axis=1).style.format("{:,}")

# %% [markdown]
# A layer has in x out weights, the pair beside it 64 x (in + out). So the wider the layer, the thinner the pair:
# beside a `q_proj` of the tiny model the pair has two thirds of the layer's weights, at 7B a twenty-eighth. LoRA on
# the tiny model is far from the thrifty thing that it is on a large one.
#
# `LLM_LAYERS` and `VISION_LAYERS` are the patterns of the recipes. Beside them stands the plain name `proj`, as it is
# found in many scripts: PEFT takes a list of plain names as endings of paths. A cell tells how many layers match.


# %%
def plot_matches(model: torch.nn.Module, patterns: dict[str, str]) -> plt.Figure:
    """A line per kind of layer that LoRA could target, a column per pattern, coloured where it matches."""
    layers = (torch.nn.Linear, torch.nn.Conv3d)
    names = [name for name, module in model.named_modules() if isinstance(module, layers)]
    rows = list(dict.fromkeys(map(without_layer_number, names)))
    counts = [Counter(map(without_layer_number, find_modules_by_pattern(model, p))) for p in patterns.values()]
    cells = np.array([[count[row] for count in counts] for row in rows])
    figure, axes = plt.subplots(figsize=(7.5, 0.3 * len(rows) + 0.8), layout="constrained")
    axes.pcolormesh(cells > 0, cmap=plt.matplotlib.colors.ListedColormap(["#eeeeee", ORANGE]), ec="white", lw=2)
    for (line, column), count in np.ndenumerate(cells):
        axes.text(column + 0.5, line + 0.5, count or "", ha="center", va="center", fontsize=9)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8, family="monospace")
    axes.set_xticks(np.arange(len(patterns)) + 0.5, patterns)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.invert_yaxis()
    return figure


# %%
patterns = {"LLM_LAYERS": LLM_LAYERS, "VISION_LAYERS": VISION_LAYERS, '"proj"': r".*\.proj"}
plot_matches(model, patterns)
plt.show()

# %% [markdown]
# - `proj` does not match `o_proj`, since an ending begins at a dot. It does match `patch_embed.proj`, the convolution
#   that reads the pixels, which few want an adapter on.
# - `LLM_LAYERS` leaves out `lm_head`, `VISION_LAYERS` leaves out `attn.proj`, the convolution and the merger. Nothing
#   says that this is best; a training run with other patterns would tell.
#
# What the patterns cost at 7B, from the table above. `make test` compares the sums with what PEFT really adds.

# %%
for name in ("LLM_LAYERS", "VISION_LAYERS"):
    matched = at_7b[[re.fullmatch(patterns[name], path.replace("{i}", "0")) is not None for path in at_7b.index]]
    print(f"{name}: {matched['count'].sum()} layers, {matched['LoRA, rank 64'].sum():,} parameters of rank 64")


# %% [markdown]
# ### Names in memory and on disk
#
# Since transformers 5 a module's path in memory is not the one under which its weights lie on disk. Files and older
# tutorials have the older names.


# %%
def names_on_disk(model_id: str) -> set[str]:
    """The names of the tensors in a model's files; of a model on the hub only their headers are read."""
    if not Path(model_id).is_dir():
        return set(get_safetensors_metadata(model_id).weight_map)
    files = Path(model_id).glob("*.safetensors")
    return set().union(*(safe_open(file, "pt").keys() for file in files))


def to_disk(name: str) -> str:
    """The name on disk of a parameter in memory."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


names = [name for name, _ in model.named_parameters()]
print("every name accounted for:", set(map(to_disk, names)) == names_on_disk(MODEL_ID))
first = {area: next(name for name in names if area_of(name) == area) for area in areas}
pd.DataFrame({area: {"in memory": name, "on disk": to_disk(name)} for area, name in first.items()}).T

# %% [markdown]
# So a pattern written after the files matches nothing, while the quantisation of section 7 of the story, the adapters
# of PEFT and these patterns go by the names in memory:

# %%
for pattern in (r"model\.layers\.\d+\.self_attn\.q_proj", r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"):
    print(f"{len(find_modules_by_pattern(model, pattern))} modules match {pattern}")

# %% [markdown]
# ## 4. What the vision tower sees
#
# From here on weights are needed. The processor scales an image until both sides are multiples of 28 pixels and its
# area is within the budget. Left are the patches of 14 x 14 pixels that the tower reads, right the blocks of 28 x 28
# that become tokens.

# %%
model = load_model(MODEL_ID, quantized=False, dtype=best_dtype()).eval()
processor = load_processor(MODEL_ID, MAX_PIXELS)
detector = Detector(model, processor, Task(PROMPT.format(label=LABEL)), max_new_tokens=64)
rows = load_rows(DATASET_ID, EVAL_SPLIT, None, SEED)
image = read_row(rows[IMAGE % len(rows)])[0]
question = to_questions([image], detector)
patch = processor.image_processor.patch_size
merge = processor.image_processor.merge_size
lines, columns = (question["image_grid_thw"][0, 1:] // merge).tolist()  # of tokens


# %%
def plot_grids(image: Image.Image) -> plt.Figure:
    """The image as the tower gets it, with the edges of the patches, and with those of the tokens."""
    side = patch * merge
    seen = image.resize((columns * side, lines * side), Image.Resampling.BICUBIC)
    figure, places = plt.subplots(1, 2, figsize=(9, 9 * lines / columns / 2 + 0.4), layout="constrained")
    for axes, step, name in zip(places, (patch, side), ("patches", "tokens"), strict=True):
        axes.imshow(seen)
        axes.set_xticks(np.arange(0, seen.width + 1, step) - 0.5, labels=[])
        axes.set_yticks(np.arange(0, seen.height + 1, step) - 0.5, labels=[])
        axes.grid(color="white", lw=1)
        axes.tick_params(length=0)
        axes.set_title(f"{seen.width // step} x {seen.height // step} {name} of {step} pixels", fontsize=10)
    return figure


patches, numbers = question["pixel_values"].shape
print(f"{image.width} x {image.height} pixels -> {patches} patches of {numbers} numbers -> {lines * columns} tokens")
to_jpeg(plot_grids(image))

# %% [markdown]
# What is smaller than a patch can only be told by the pattern within it. And the answer is asked for more finely than
# this grid: boxes are written from 0 to 1000, so a token spans a thousand divided by the number of columns. To place
# an edge within a token, its feature has to say where in the token the edge is.
#
# A feature of the tower has hundreds of numbers. Their three main directions (principal components, taken over the
# images below), shown as red, green and blue, let one see which places the tower holds to be alike. From left to
# right: as the patches enter, after a third and two thirds of the blocks, after the last one, and after the merger,
# where a token replaces four patches. Colours can be compared down a column, not along a line.


# %%
def to_map(features: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Features (patches or tokens, width) in the order of the model as (rows, columns, width) of the image."""
    height, width = grid[1:].tolist()
    if len(features) < height * width:
        return features.unflatten(0, (height // merge, width // merge))
    blocks = features.unflatten(0, (height // merge, width // merge, merge, merge))  # patches come in blocks of 2 x 2
    return blocks.transpose(1, 2).reshape(height, width, -1)


@torch.inference_mode()
def look(image: Image.Image) -> dict[str, torch.Tensor]:
    """Maps of features at five depths of the vision tower."""
    question = to_questions([image], detector)
    visual, grid = model.model.visual, question["image_grid_thw"]
    pixels = question["pixel_values"].to(model.device)
    output = visual(pixels, grid_thw=grid.to(model.device), output_hidden_states=True)
    depth = len(visual.blocks)
    stages = {"patches": 0, f"block {depth // 3}": depth // 3, f"block {2 * depth // 3}": 2 * depth // 3}
    features = {name: output.hidden_states[number] for name, number in stages.items()}
    features |= {f"block {depth}": output.last_hidden_state, "merger": output.pooler_output}
    return {name: to_map(feature.float().cpu(), grid[0]) for name, feature in features.items()}


def to_colours(maps: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The three main components of some maps of features as RGB, the same for all of them."""
    flat = torch.cat([part.flatten(0, 1) for part in maps])
    mean, (*_, directions) = flat.mean(0), torch.pca_lowrank(flat, q=3)
    projected = (flat - mean) @ directions
    low, high = projected.quantile(torch.tensor([0.02, 0.98]), dim=0)
    colours = [((part - mean) @ directions - low) / (high - low) for part in maps]
    return [colour.clamp(0, 1).numpy() for colour in colours]


# %%
shown = [image, *(read_row(rows[number % len(rows)])[0] for number in (0, 1))]
torch.manual_seed(SEED)  # pca_lowrank begins with random directions
seen = [look(one) for one in shown]
figure, grid = plt.subplots(len(shown), 6, figsize=(12, 2.3 * len(shown)), layout="constrained")
for column, stage in enumerate(["image", *seen[0]]):
    for axes, part in zip(
        grid[:, column], shown if column == 0 else to_colours([s[stage] for s in seen]), strict=True
    ):
        axes.imshow(part)
        axes.axis("off")
    grid[0, column].set_title(stage, fontsize=10)
to_jpeg(figure)

# %% [markdown]
# The first map follows brightness and colour, as the first layer sees nothing but its own 14 x 14 pixels. Before the
# merger, places on one object have like colours, and objects stand out from what surrounds them. After it the colour
# of a token that lies on nothing tells above all its place, alike in all images. The tiny tower was pretrained to tell
# at each token which objects cover it and where their boxes are; another tower need not look like this.
#
# ## 5. Where the language model looks
#
# The model is asked for one kind of object, and answers:

# %%
answer = generate(detector, question)[0]
print(detector.task.question, answer.text, sep="\n")
found = [from_grid(box, *image.size) for _, box in parse_answer(answer.text).objects]

# %% [markdown]
# While it writes, each token attends to those before it. Attention is one map per layer and head; the figure shows
# the mean over all of them, for the tokens of each of the four coordinates, over the image tokens only. To see it,
# question and answer are read once in one piece, by an attention that returns its weights ("eager").


# %%
@torch.inference_mode()
def attend(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Attention (tokens, tokens) of each token to each, mean over layers and heads."""
    model.set_attn_implementation("eager")
    attentions = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack([attention[0].float().mean(0) for attention in attentions]).mean(0).cpu()


def find_coordinates(tokens: Sequence[int]) -> dict[str, list[int]]:
    """Places of the tokens of the first box's x1, y1, x2, y2; empty without a box."""
    texts = processor.tokenizer.batch_decode([[token] for token in tokens])
    ends = np.cumsum([len(text) for text in texts])
    match = re.search(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", "".join(texts))
    spans = [match.span(number) for number in range(1, 5)] if match else []
    names = ("x1", "y1", "x2", "y2")
    return {n: [i for i, e in enumerate(ends) if a < e <= b] for n, (a, b) in zip(names, spans, strict=False)}


messages = to_conversation(detector.task, answer.text.removesuffix("<|im_end|>"))
batch = AssistantOnlyCollator(processor)([{"image": image, "messages": messages}])
batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
attention = attend(batch)
is_image = (batch["input_ids"][0] == model.config.image_token_id).cpu()
coordinates = find_coordinates(batch["input_ids"][0].tolist())
# the token before a place is the one that writes what stands there
looked = {name: attention[[place - 1 for place in places]].mean(0) for name, places in coordinates.items()}


# %%
def show_map(axes: plt.Axes, image: Image.Image, values: np.ndarray, title: str) -> None:
    """A map over the tokens on top of the grey image, with the model's box."""
    axes.imshow(image.convert("L"), cmap="gray", alpha=0.6)
    extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    axes.imshow(values, cmap="inferno", alpha=0.65, extent=extent, interpolation="nearest")
    draw_boxes(axes, found, PREDICTION_COLOUR, "-")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


figure, places = plt.subplots(1, 5, figsize=(13, 13 / 5 * image.height / image.width + 0.3), layout="constrained")
places[0].imshow(image)
draw_boxes(places[0], found, PREDICTION_COLOUR, "-")
places[0].set_title(f"asked for: {LABEL}", fontsize=10)
for axes in places:
    axes.axis("off")
for axes, (name, weights) in zip(places[1:], looked.items(), strict=False):
    share = weights[is_image].sum()
    show_map(axes, image, weights[is_image].view(lines, columns).numpy(), f"writes {name}: {share:.0%} on the image")
to_jpeg(figure)

# %% [markdown]
# The titles tell how much of the attention goes to the image at all; the rest goes to the words and to what has been
# written so far. Each coordinate has its own map: compare where the bright tokens lie with the edge of the box that
# the coordinate belongs to.
#
# Attention says where information is taken from, not what the answer would be without it. That takes an experiment:
# hide a place, by giving its token the mean feature of the image, and see by how much the same answer becomes less
# likely. (With many tokens, as in photographs, square blocks of them are hidden at once.)


# %%
@contextmanager
def changed_tokens(change: Callable[[torch.Tensor], torch.Tensor]):
    """Within this context the language model gets the image tokens (tokens, width) as `change` returns them."""
    hook = model.model.visual.merger.register_forward_hook(lambda module, given, tokens: change(tokens))
    try:
        yield
    finally:
        hook.remove()


def hide(hidden: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Replaces the tokens at the `hidden` places by the mean of all."""
    return lambda tokens: torch.where(hidden.to(tokens.device)[:, None], tokens.mean(0), tokens)


@torch.inference_mode()
def lost_by_hiding() -> torch.Tensor:
    """How many nats an answer token loses on average, for each place that is hidden (rows, columns)."""
    step = math.ceil((lines * columns / 100) ** 0.5)
    whole, lost = model(**batch).loss.item(), torch.zeros(lines, columns)
    for top in range(0, lines, step):
        for left in range(0, columns, step):
            block = (slice(top, top + step), slice(left, left + step))
            hidden = torch.zeros(lines, columns, dtype=torch.bool)
            hidden[block] = True
            with changed_tokens(hide(hidden.flatten())):
                lost[block] = model(**batch).loss.item() - whole
    return lost


# %%
lost = lost_by_hiding()
looked_at = torch.stack([*looked.values(), torch.zeros_like(attention[0])]).sum(0)[is_image].view(lines, columns)
figure, places = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
show_map(places[0], image, looked_at.numpy(), "attention, all four coordinates")
show_map(places[1], image, lost.clamp(min=0).numpy(), "what hiding a place costs")
places[2].scatter(looked_at, lost, color=BLUE, s=14)
places[2].set(xlabel="attention to the token", ylabel="loss added by hiding it (nats per token)")
rank = pd.Series(looked_at.flatten()).corr(pd.Series(lost.flatten()), method="spearman")
places[2].set_title(f"rank correlation {rank:.2f}", fontsize=10)
to_jpeg(figure)

# %% [markdown]
# Attention also rests on places where there is nothing to see, and hiding a place that is looked at need not cost
# anything (below zero, the answer even became a little likelier). One image shows how the two maps are made, and no
# more. Where they disagree, believe the experiment.
#
# ## 6. Positions: M-RoPE
#
# A token's position enters attention as a rotation. Qwen2-VL gives each token three positions: time, height and width.
# For words the three are equal and count up. Within an image the time stands still, height and width count lines and
# columns; the word after it goes on behind the largest of them.

# %%
positions, _ = model.model.get_rope_index(
    **{name: question[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
)
streams = dict(zip(["temporal", "height", "width"], positions[:, 0], strict=True))
inside = question["mm_token_type_ids"][0].bool()
figure, places = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=[2.2, 1, 1])
for (name, stream), colour, dashes in zip(streams.items(), ("black", ORANGE, BLUE), ("--", "-", "-"), strict=True):
    places[0].plot(stream, label=name, color=colour, ls=dashes, lw=1.5)
start, end = inside.nonzero()[[0, -1], 0].tolist()
places[0].axvspan(start, end, color=LIGHT, zorder=0)
places[0].axline((0, 0), slope=1, color="grey", lw=0.8, ls=":", label="one by one")
places[0].text((start + end) / 2, 1, "image tokens", ha="center", color=BLUE)
places[0].set(xlabel="token of the question", ylabel="position", xlim=(0, len(inside)), ylim=(0, None))
places[0].set_title("Three positions of each token", fontsize=10)
places[0].legend(frameon=False, fontsize=8)
for axes, name in zip(places[1:], ("height", "width"), strict=True):
    values = streams[name][inside].view(lines, columns)
    axes.imshow(values, cmap="Blues", vmin=values.min() - 2, vmax=values.max() + 4)
    for (line, column), value in np.ndenumerate(values.numpy()) if values.numel() < 150 else ():
        axes.text(column, line, value, ha="center", va="center", fontsize=7)
    axes.set(xlabel="column of tokens", ylabel="line of tokens")
    axes.set_title(f"{name} over the image", fontsize=10)
plt.show()
print(f"{lines * columns} image tokens take {max(lines, columns)} positions of {positions.max() + 1} in all")

# %% [markdown]
# So an image takes as many positions as its longer side has tokens, and the words behind it stay near: rotations grow
# with the distance, and a model has seen only distances up to those of its training. Two tokens of one column differ
# only in their height, two of one line only in their width.
#
# The processor returns `mm_token_type_ids`, which tells the model where image tokens are. If it is left out, `forward`
# refuses, while `generate` says nothing and counts the tokens one by one, along the dotted line above:

# %%
incomplete = {name: tensor for name, tensor in question.items() if name != "mm_token_type_ids"}
try:
    model(**{name: tensor.to(model.device) for name, tensor in incomplete.items()})
except ValueError as error:
    print("forward:", str(error)[:118], "…")
print("generate:", generate(detector, incomplete)[0].text)
print("complete:", answer.text)


# %% [markdown]
# Does it matter? One image cannot tell, so more images are asked, four ways: as it should be, without
# `mm_token_type_ids`, with the image tokens in random order, and with the vision tower itself made blind to places by
# giving all patches the same position. Images where the model is unsure already when nothing is wrong are left out,
# since they may not show what was asked for. The figure holds the coordinates against those that are written
# when nothing is wrong.


# %%
@contextmanager
def same_position_for_all_patches():
    """Within this context the vision tower believes that all patches are at the same place."""

    def move(module, given, named):
        patches = int(named["grid_thw"].prod(1).sum())
        return given, named | {"position_ids": torch.zeros(patches, 2, dtype=torch.long, device=model.device)}

    hook = model.model.visual.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def shuffle(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens in an order that is random, but the same in each call."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(SEED)).to(tokens.device)]


def first_box(question: dict[str, torch.Tensor]) -> tuple[list[int] | None, float]:
    """The first box of the answer, on the model's grid, and its score; None and 0 without one."""
    answer = generate(detector, question)[0]
    parsed = parse_answer(answer.text)
    return (parsed.objects[0][1], answer.score(*parsed.spans[0])) if parsed.objects else (None, 0.0)


def ask_in_four_ways(question: dict[str, torch.Tensor]) -> dict[str, list[int] | None]:
    """The first box of the answer, as it should be and with wrong positions."""
    without = {name: tensor for name, tensor in question.items() if name != "mm_token_type_ids"}
    boxes = {"right": first_box(question)[0], "without mm_token_type_ids": first_box(without)[0]}
    with changed_tokens(shuffle):
        boxes["image tokens shuffled"] = first_box(question)[0]
    with same_position_for_all_patches():
        boxes["patches without positions"] = first_box(question)[0]
    return boxes


# %%
questions = [to_questions([read_row(row)[0]], detector) for row in rows.select(range(min(SAMPLES, len(rows))))]
sure = [question for question in questions if first_box(question)[1] > 0.6]
asked = [ask_in_four_ways(question) for question in sure]
answered = [boxes for boxes in asked if all(boxes.values())]
print(f"{len(questions)} images, {len(sure)} with a sure answer, {len(answered)} of them with a box in all four ways")
figure, places = plt.subplots(1, 3, figsize=(12, 4.1), layout="constrained", sharey=True)
wrong_ways = ["without mm_token_type_ids", "image tokens shuffled", "patches without positions"]
for axes, way in zip(places, wrong_ways, strict=True):
    right, wrong = (np.array([boxes[name] for boxes in answered]).reshape(-1, 4) for name in ("right", way))
    for corner, colour, mark in zip(range(4), (BLUE, ORANGE) * 2, "oo^^", strict=True):
        axes.plot(right[:, corner], wrong[:, corner], mark, color=colour, ms=5, label=("x1", "y1", "x2", "y2")[corner])
    axes.axline((0, 0), slope=1, color="grey", lw=1)
    axes.set(xlabel="coordinate as it should be (0 to 1000)", xlim=(-20, 1020), ylim=(-20, 1020), title=way)
    moved = np.abs(right - wrong) if answered else np.zeros(1)
    print(f"{way}: {moved.mean():.0f} of 1000 on average, {moved.max(initial=0):.0f} at most")
places[0].set(ylabel="coordinate written")
places[0].legend(frameon=False)
plt.show()

# %% [markdown]
# In this model the places are already in the features: its answers hardly change when the language model is told wrong
# positions or gets the tokens in random order, and fall apart when the *vision tower* loses them. That fits how it was
# made: its tower was taught to write boxes into the features before it met the language model. (The third panel alone
# would prove little: a tower that is given what it never saw may fail for that reason.)
#
# **Do not conclude that the positions may be left out.** A Qwen2-VL that was pretrained at full size had no such
# phase, and nothing here was measured on one. What this section shows is that a missing key causes no error in
# `generate`, and how to find out what it costs. The story's collators and questions pass on every key that the
# processor returns.
#
# ## What to try next
#
# - Point `MODEL_ID` at `Qwen/Qwen2-VL-2B-Instruct` and `DATASET_ID` at photographs, and repeat section 6. If the
#   points leave the diagonal of the first panel, its places are not all in the features.
# - Ask for `LABEL = "nutrition table"`, which the base was never taught to box, and look at section 5 again; then with
#   `MODEL_ID` at the model that `make demo` merged.
# - In section 5, take the mean over the heads of a single layer. Are there layers that look at the box, and others?
# - Let `VISION_LAYERS` match `attn.proj` and the merger too, and train `r4-joint` with it: section 3 shows the paths.
