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
# # 6. Quantisation, and what can be trained
#
# Recipes r1 and r4, and the second stage of r3, keep the language model in four bits a weight. This notebook looks at
# what that does.
#
# **What you will learn**
#
# 1. what NF4 does to numbers: sixteen levels, a scale for every 64 weights, and the scales quantised once more;
# 2. how large the error is in each linear layer, in its weights and in what it computes;
# 3. which parts of the model can be quantised before its boxes move;
# 4. how to reckon the memory of a training from the shapes alone, checked against measured peaks, and which sizes of
#    Qwen2-VL fit into which GPU;
# 5. what can be trained in four bits, and whether LoRA sees the same gradients there;
# 6. what a gradient norm tells about a training, and what it does not.
#
# **How long it takes**: under two minutes on two CPU cores, once `make demo` has been run (section 6 reads its logs).
#
# The model is the one of 6 million parameters that ships with the repository, and its images are drawn packages, so
# no accuracy below is that of a 7B model. Layers of width 192 may well be hurt more, or less, than layers of width
# 3,584. The parameters point the same code at a real model. Section 4 is about the real sizes: it needs no weights.

# %% tags=["parameters"]
MODEL_ID = "helpers/tiny/base"  # hub id or folder
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder
EVAL_SPLIT = "val"
RUN_DIR = "outputs/demo"  # the OUTPUT_DIR of a run of the story
SAMPLES = 24  # images that every version of the model is asked about
BATCH_SIZE = 8  # images that layer outputs and gradients are computed on
MAX_PIXELS = 1003520
MAX_NEW_TOKENS = 256
SEED = 42

# %%
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

# when imported on a CPU it asks for an optional package that would download kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.collators import AssistantOnlyCollator
from helpers.conversation import PROMPT, Task
from helpers.data import Mirroring, load_rows, read_row, to_training_dataset
from helpers.detection import evaluate_detector
from helpers.generation import Detector
from helpers.loading import AREAS, KEPT_MODULES, area_of, best_dtype
from helpers.loading import build_empty_model, load_model, load_processor, release_memory
from helpers.metrics import boxes_of, match_boxes, percentile_interval, resample_weights
from helpers.plots import BLUE, MODEL_COLOURS, ORANGE, plot_images, to_jpeg
from helpers.recipes import CATALOGUE, TrainingRecipe
from helpers.recipes import apply_freeze_policy, build_lora_config_for_recipe, count_trainables
from helpers.runs import RunFolder
from helpers.training import load_trained_model

TASK = Task(PROMPT.format(label="nutrition table"))

# PEFT itself uses the old name; the new one does not exist in all versions allowed here
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

runs = [RunFolder(Path(RUN_DIR) / name) for name in CATALOGUE if RunFolder(Path(RUN_DIR) / name).is_trained]
if not runs:
    raise FileNotFoundError(f"No trained recipe below {RUN_DIR}: run `make demo` first, or give RUN_DIR.")

# %% [markdown]
# ## 1. What NF4 does to numbers
#
# Four bits can tell sixteen numbers apart. NF4 (Dettmers et al., "QLoRA", 2023) takes sixteen fixed levels between -1
# and 1, dense around 0 because most weights are small. A layer's weights are cut into blocks of 64; each block is
# divided by its largest absolute value, its *scale*, and every weight becomes the number of the nearest level. Two
# such numbers share a byte.

# %%
model = load_model(MODEL_ID, quantized=False, dtype=best_dtype()).eval()
linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
example = next(name for name in linears if name.endswith("mlp.down_proj"))
weight = linears[example].weight.detach().float()
packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
restored = dequantize_4bit(packed, state)
levels = state.code.cpu().numpy()
print(example, "of shape", tuple(weight.shape))
print(f"in 16 bits {weight.numel() * 2:,} bytes, packed {packed.nbytes:,}, scales {state.absmax.nbytes:,}")
print("levels", np.round(levels, 3))

# %% [markdown]
# One block. The thin lines are the sixteen levels times the block's scale, and every weight is moved to the nearest
# one. Between the outer levels the gaps are wide, so the large weights are moved the furthest; the largest is kept.

# %%
first, moved, scale = weight.flatten()[:64].cpu(), restored.flatten()[:64].cpu(), state.absmax[0].item()
figure, axes = plt.subplots(figsize=(11, 3.6), layout="constrained")
axes.hlines(levels * scale, -1, 64, color="lightgrey", lw=0.8)
axes.vlines(range(64), first, moved, color="black", lw=1)
axes.plot(range(64), first, "o", color=BLUE, ms=5, label="before")
axes.plot(range(64), moved, "_", color=ORANGE, ms=9, mew=2.5, label="after")
axes.set(
    xlabel="number in the block", ylabel="weight", title=f"A block of 64 weights, scale {scale:.3f}", xlim=(-1, 64)
)
figure.legend(loc="outside right upper", frameon=False)
plt.show()

# %% [markdown]
# The whole layer. After quantisation the weights still fill the axis, because each block has a scale of its own. Only
# when every weight is divided by its scale do the levels appear, and one sees how often each is used. (FP4 is the
# other format of four bits in bitsandbytes: a tiny floating-point number, with levels that are spread otherwise.)

# %%
bins = np.linspace(-4, 4, 161) * weight.std().item()
normalised = (restored.reshape(-1, 64) / state.absmax[:, None]).flatten().cpu()
used = np.array([(normalised - level).abs().lt(1e-3).double().mean().item() for level in levels])
fp4 = quantize_4bit(weight, blocksize=64, quant_type="fp4")[1].code.cpu()
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
left.hist(weight.flatten().cpu(), bins, color=BLUE, label="before", alpha=0.6)
left.hist(restored.flatten().cpu(), bins, color=ORANGE, label="after", histtype="step", lw=1.2)
left.set(xlabel="weight", ylabel="weights", title="One layer before and after")
left.legend(frameon=False)
right.vlines(levels, 0, 100 * used, color=ORANGE, lw=5, label="NF4")
right.axhline(100 / 16, color="black", ls="--", lw=1, label="all sixteen equally often")
right.plot(fp4, np.full(16, -0.6), "|", color="black", ms=9, label="levels of FP4")
right.set(xlabel="weight / scale of its block", ylabel="% of the weights", title="How often each level is used")
right.legend(frameon=False, fontsize=8, loc="upper right")
right.set_ylim(top=1.45 * 100 * used.max())
plt.show()

# %% [markdown]
# A scale for 64 weights, stored in 32 bits, adds half a bit to each weight. **Double quantisation** stores the scales
# in 8 bits (with a 32-bit scale for every 256 of them). What it saves, and what it adds to the error:


# %%
def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Norm of the difference, as a share of the norm of what was there before."""
    return ((after.float() - before.float()).norm() / before.float().norm()).item()


SCALES = {"scales in 32 bits": 32 / 64, "scales in 8 bits": 8 / 64 + 32 / (64 * 256)}
lines = {}
for (kind, bits), nested in zip(SCALES.items(), [False, True], strict=True):
    again = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested))
    lines[kind] = {"bits a weight": 4 + bits, "GB for 7e9 weights": 7 * (4 + bits) / 8}
    lines[kind]["relative error"] = relative_error(weight, again)
pd.DataFrame(lines).T.style.format(precision=4)

# %% [markdown]
# The error is that of the sixteen levels; storing the scales in 8 bits as well hardly changes it. All recipes use
# double quantisation.
#
# ## 2. How large is the error, layer by layer?
#
# Two errors can be asked for. That of the **weights** says how far the numbers were moved. That of the **output** says
# what comes of it: each layer is given what the model that is not quantised feeds it, once with its own weights and
# once with quantised ones. No error is passed on from layer to layer here.
#
# FP4 and int8 are measured beside NF4. int8 is the simplest kind: 255 equal steps, and one scale for every row of the
# matrix.


# %%
def round_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """The weight in 255 equal steps, one scale for every row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


def round_to_four_bits(weight: torch.Tensor, kind: str, blocksize: int = 64) -> torch.Tensor:
    """The weight after quantisation to "nf4" or "fp4" and back.

    It goes in as one long row: of a matrix whose rows are no multiple of the block size, bitsandbytes 0.50 restores
    wrong numbers on a CPU.
    """
    flat = weight.flatten()
    return dequantize_4bit(*quantize_4bit(flat, blocksize=blocksize, quant_type=kind)).reshape(weight.shape)


FORMATS = {
    "NF4": lambda weight: round_to_four_bits(weight, "nf4"),
    "FP4": lambda weight: round_to_four_bits(weight, "fp4"),
    "int8": round_to_int8,
}


@torch.no_grad()
def measure_layer(name: str, layer: torch.nn.Linear, given: torch.Tensor) -> list[dict]:
    """Errors of one linear layer in each format: of its weights, and of its output on what it is given."""
    weight, given = layer.weight.float(), given.float()
    bias = None if layer.bias is None else layer.bias.float()
    block = re.search(r"(?:blocks|layers)\.(\d+)\.(.+)", name)
    number, kind = block.groups() if block else (None, name)
    place = {"name": name, "area": area_of(name), "layer": number, "kind": kind}
    output, lines = torch.nn.functional.linear(given, weight, bias), []
    for format_name, convert in FORMATS.items():
        rounded = convert(weight)
        after = torch.nn.functional.linear(given, rounded, bias)
        errors = {"weights": relative_error(weight, rounded), "output": relative_error(output, after)}
        lines.append(place | {"format": format_name} | errors)
    return lines


# %%
processor = load_processor(MODEL_ID, MAX_PIXELS)
rows = load_rows(DATASET_ID, EVAL_SPLIT, max(SAMPLES, 2 * BATCH_SIZE), SEED)
training_rows = to_training_dataset(rows, TASK, Mirroring())
collate = AssistantOnlyCollator(processor)
batch, other_batch = (
    {name: tensor.to(model.device) for name, tensor in collate([training_rows[n] for n in numbers]).items()}
    for numbers in (range(BATCH_SIZE), range(BATCH_SIZE, 2 * BATCH_SIZE))
)
measured = []
hooks = []
for name, layer in linears.items():

    def note_errors(layer, given, output, name=name):
        measured.extend(measure_layer(name, layer, given[0]))

    hooks.append(layer.register_forward_hook(note_errors))
with torch.no_grad():
    model(**batch)
for hook in hooks:
    hook.remove()
errors = pd.DataFrame(measured)
errors.groupby(["area", "format"], sort=False)[["weights", "output"]].mean().unstack().style.format("{:.1%}")

# %% [markdown]
# Four bits are no detail: NF4 moves the weights by about a tenth of their norm, FP4 by more, int8 by far less. Where
# in the model? A row is a kind of layer, a column is the layer's number.


# %%
def plot_error_maps(errors: pd.DataFrame, towers: dict[str, str]) -> plt.Figure:
    """NF4's relative error as maps, layer number against kind of layer: left of the weights, right of the output."""
    chosen = errors[(errors.format == "NF4") & errors.layer.notna()].astype({"layer": int})
    limits = chosen[["weights", "output"]].to_numpy().min(), chosen[["weights", "output"]].to_numpy().max()
    figure, grid = plt.subplots(2, 2, figsize=(11, 6), layout="constrained", height_ratios=[4, 7])
    for line, (area, title) in zip(grid, towers.items(), strict=True):
        for axes, quantity in zip(line, ["weights", "output"], strict=True):
            table = chosen[chosen.area == area].pivot(index="kind", columns="layer", values=quantity)
            table = table.loc[chosen[chosen.area == area].kind.unique()]
            shown = axes.imshow(table, cmap="YlOrRd", vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set_yticks(range(len(table)), table.index)
            axes.set_xticks(range(table.shape[1])[:: max(1, table.shape[1] // 14)])
            axes.set_title(f"{title}: {quantity}")
            for (y, x), value in np.ndenumerate(table.to_numpy()) if table.shape[1] <= 12 else ():
                colour = "white" if value > 0.8 * limits[1] else "black"
                axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(shown, ax=grid, label="relative error of NF4", format=lambda value, _: f"{value:.0%}")
    figure.supxlabel("layer number (cells: per cent)")
    return figure


plot_error_maps(errors, {"visual": "vision tower", "language_model": "language model"})
plt.show()
outside = errors[errors.layer.isna()].pivot(index="name", columns="format", values="output")
outside[list(FORMATS)].rename_axis("output errors of the layers outside the blocks").style.format("{:.1%}")

# %% [markdown]
# The error of the weights is nearly the same everywhere: it is a property of the format, and the weights of all layers
# are alike in shape. The error of the output is not. What a layer is given decides: where an output is the small
# difference of large products, or mostly bias, the same rounding weighs more, or less.
#
# Smaller blocks follow the weights more closely, and cost more scales. All weights of the model, in both formats of
# four bits and with other sizes of blocks (scales in 32 bits):


# %%
def measure_block_sizes(weights: Sequence[torch.Tensor], kind: str, sizes: Sequence[int]) -> list[float]:
    """Relative error over all weights together, for each size of blocks."""
    before = torch.cat([weight.flatten() for weight in weights])
    return [
        relative_error(before, torch.cat([round_to_four_bits(weight, kind, size).flatten() for weight in weights]))
        for size in sizes
    ]


weights, sizes = [layer.weight.detach().float() for layer in linears.values()], (64, 128, 256, 512)
bits = [4 + 32 / size for size in sizes]
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
for kind, colour in {"nf4": ORANGE, "fp4": BLUE}.items():
    values = measure_block_sizes(weights, kind, sizes)
    axes.plot(bits, [100 * value for value in values], "o-", color=colour, label=kind.upper())
    for size, x, y in zip(sizes, bits, values, strict=True):
        axes.annotate(f"{size}", (x, 100 * y), textcoords="offset points", xytext=(5, 5), fontsize=8)
axes.set(xlabel="bits a weight, scales included", ylabel="relative error, %", xlim=(4, 4.55))
axes.set_title("All linear layers; beside the points the size of the blocks")
axes.margins(y=0.15)
axes.legend(frameon=False)
plt.show()
del model, linears, weights
release_memory()

# %% [markdown]
# ## 3. Which parts may be quantised?
#
# An error of a tenth in every layer says nothing yet about boxes. So one area after the other is quantised, and every
# version is asked about all objects on the same images. The base does not know nutrition tables, so that its IoU with
# the truth would say little; what is measured is the **agreement** with the model that is not quantised.


# %%
#| export quantization: What four bits do to a model's boxes, and the memory that a training takes.
def score_agreement(record: dict, reference: dict) -> float:
    """Mean IoU of the boxes of one image's `reference` with those of another model's `record`, one to one.

    A box that is missing counts as 0, one too many does not count, nor do labels. Without boxes in `reference` it is 1
    where the other model found nothing either, else 0.
    """
    wanted, boxes = boxes_of(reference, "prediction"), boxes_of(record, "prediction")
    return float(np.mean(match_boxes(wanted, boxes))) if wanted else float(not boxes)


def measure_agreement(records: Sequence[dict], reference: Sequence[dict]) -> float:
    """Mean of `score_agreement` over the images; 1 means that every box is the same."""
    return float(np.mean([score_agreement(*pair) for pair in zip(records, reference, strict=True)]))


def bootstrap_agreement(records: Sequence[dict], reference: Sequence[dict]) -> np.ndarray:
    """`measure_agreement` on resamples of the images: the same ones for every model, so differences are paired."""
    weights = np.concatenate(list(resample_weights(reference)))
    scores = [score_agreement(*pair) for pair in zip(records, reference, strict=True)]
    return weights @ np.array(scores) / weights.sum(axis=1)


# %% [markdown]
# The other side of the bargain is memory. Only linear layers are quantised: embeddings, norms and biases stay as they
# were. A 4-bit weight shares a `uint8` with its neighbour, and its scales are kept beside the tensor, where
# `named_parameters` does not show them; they are counted here.


# %%
#| export quantization
def summarize_memory(model: PreTrainedModel) -> pd.DataFrame:
    """Weights of a model by area: megabytes with scales, the types they are stored in, how many layers in 4 bits."""
    lines = []
    for area in [*AREAS, "other"]:
        tensors = [p for name, p in model.named_parameters() if area_of(name) == area]
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
        layers = [m for name, m in model.named_modules() if area_of(name) == area and isinstance(m, torch.nn.Linear)]
        packed = sum(isinstance(m, Linear4bit) for m in layers)
        megabytes = sum(p.numel() * p.element_size() + count_scale_bytes(p) for p in tensors) / 1e6
        lines.append([area, megabytes, ", ".join(kinds), f"{packed} of {len(layers)}"])
    table = pd.DataFrame(lines, columns=["area", "megabytes", "stored as", "layers in 4 bits"]).set_index("area")
    return table if table["stored as"]["other"] else table.drop("other")


def count_scale_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of the scales that a 4-bit weight is kept with; 0 for other weights."""
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    if state is None:
        return 0
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


# %% [markdown]
# What is not quantised stays as it was loaded. The recipes call that "16 bits", which it is on a GPU; on a CPU it is
# float32, so that the megabytes below hold for the precision that the table names.

# %%
MADE_OF = {  # version: whether quantised, modules that are kept
    "not quantised": (False, ()),
    "language model (the recipes)": (True, KEPT_MODULES),
    "lm_head": (True, ("model.visual", "model.language_model")),
    "vision tower": (True, ("model.language_model", "lm_head")),
    "both towers": (True, ("lm_head",)),
    "everything": (True, ()),
}
records, memory = {}, {}
for version, (quantized, kept) in MADE_OF.items():
    loaded = load_model(MODEL_ID, quantized, best_dtype(), kept)
    memory[version] = summarize_memory(loaded)
    detector = Detector(loaded, processor, Task(PROMPT.format(label="object")), MAX_NEW_TOKENS)
    records[version] = evaluate_detector(detector, rows.select(range(min(SAMPLES, len(rows)))), show_progress=False)
    del loaded, detector
    release_memory()
reference = records["not quantised"]
found = sum(len(record["prediction"]) for record in reference)
print(
    f"kept in {str(best_dtype()).removeprefix('torch.')}; {len(reference)} images, {found} boxes without quantisation"
)
pd.concat({"not quantised": memory["not quantised"], "the recipes": memory["language model (the recipes)"]}, axis=1)

# %%
draws, each, lines = {}, {}, {}
for version in list(MADE_OF)[1:]:
    draws[version] = bootstrap_agreement(records[version], reference)
    each[version] = [score_agreement(*pair) for pair in zip(records[version], reference, strict=True)]
    lines[version] = {
        "MB": memory[version]["megabytes"].sum(),
        "median": np.median(each[version]),
        "agreement": measure_agreement(records[version], reference),
        "low": percentile_interval(draws[version])[0],
        "high": percentile_interval(draws[version])[1],
    }
agreement = pd.DataFrame(lines).T
against = draws["language model (the recipes)"]
intervals = {version: percentile_interval(draws[version] - against) for version in draws}
agreement["against the recipes' choice"] = [f"{low:+.3f} to {high:+.3f}" for low, high in intervals.values()]
agreement.style.format("{:.1f}", subset="MB").format("{:.3f}", subset=["median", "agreement", "low", "high"])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
left.plot(memory["not quantised"]["megabytes"].sum(), 1, "o", color="black", label="not quantised")
for number, (version, line) in enumerate(agreement.iterrows()):
    error = [[line["agreement"] - line["low"]], [line["high"] - line["agreement"]]]
    left.errorbar(line["MB"], line["agreement"], error, fmt="o", color=f"C{number}", capsize=4, label=version)
    places = number + np.random.default_rng(number).uniform(-0.25, 0.25, len(each[version]))
    right.plot(places, each[version], "o", color=f"C{number}", ms=4, alpha=0.6)
left.set(xlabel="megabytes of weights", ylabel="mean agreement, 95 % interval", title="What is in four bits?")
left.set_xlim(left=0)
figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
right.set(ylabel="agreement", title="Image by image", ylim=(-0.05, 1.05))
right.set_xticks(range(len(agreement)), [version.replace(" (", "\n(") for version in agreement.index], fontsize=8)
plt.show()

# %% [markdown]
# The intervals of the means are wide where single images lose nearly all (right), while the median hardly moves. Those
# in the last column of the table compare a version with the recipes' choice image by image, so that an image that is
# lost in both cancels; one that holds 0 is no difference that these images can show.
#
# In this small model the vision tower holds most of the weights, so quantising it would save the most. In a model of 7
# billion it holds a twelfth of them (section 4): there is little to gain by it, and the recipes keep it. `lm_head` is
# a small matrix here and a large one there.
#
# The images on which quantising everything changed the most: above the model that is not quantised, with the score of
# its least certain box (the geometric mean of its tokens' probabilities), below the one in four bits. Was the model
# sure of the boxes that moved? The median score of all boxes stands beside it for comparison. The truth is only drawn
# for the objects that the dataset knows.

# %%
scores = [[labelled["score"] for labelled in record["prediction"]] for record in reference]
print(f"median score of all boxes {np.median(np.concatenate(scores)):.2f}")
changed = each["everything"]
worst = [int(number) for number in np.argsort(changed)[:4]]
shown = [("not quantised", n) for n in worst] + [("everything", n) for n in worst]
to_jpeg(
    plot_images(
        [read_row(rows[n])[0] for _, n in shown],
        [boxes_of(records[version][n], "truth") for version, n in shown],
        [boxes_of(records[version][n], "prediction") for version, n in shown],
        titles=[f"not quantised, score {min(scores[n], default=0):.2f}" for n in worst]
        + [f"everything in 4 bits, agreement {changed[n]:.2f}" for n in worst],
        columns=len(worst),
    ),
    dpi=70,
)

# %% [markdown]
# ## 4. Memory by arithmetic
#
# What a training holds besides activations follows from the shapes:
#
# - a weight that is not trained takes 2 bytes, or as a 4-bit weight 4.127 bits (section 1) in place of 16;
# - a weight that is trained takes 16 bytes: 4 as a float32, 4 for its gradient, 8 for AdamW's two averages;
# - LoRA adds weights of the second kind and leaves the others alone.
#
# Activations depend on the length of the input, on checkpointing, and on what the kernels need in between; they are
# not reckoned here, only measured.


# %%
#| export quantization
BITS_IN_NF4 = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, its share of an 8-bit scale, that scale's share of a 32-bit one


def count_lora_numbers(model: torch.nn.Module, recipe: TrainingRecipe) -> int:
    """How many numbers LoRA adds to a model, by a recipe; the model may be on the meta device."""
    if recipe.lora_target_modules is None:
        return 0
    targets = re.compile(recipe.lora_target_modules)
    layers = [module for name, module in model.named_modules() if targets.fullmatch(name)]
    return recipe.lora_rank * sum(layer.in_features + layer.out_features for layer in layers)


def estimate_memory(model: torch.nn.Module, recipe: TrainingRecipe | None, itemsize: int = 2) -> dict[str, float]:
    """Bytes that a training takes before any activation, by what they hold; the model may be on the meta device.

    Without a recipe all weights are trained. What is trained is in float32, what is frozen in NF4 if the recipe
    quantises it, else it takes `itemsize` bytes a number.
    """
    numbers = {"kept": 0, "packed": 0, "trained": 0 if recipe is None else count_lora_numbers(model, recipe)}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        trained = recipe is None or (recipe.train_vision == "full" and area_of(name) == "visual")
        packed = not trained and recipe.quantized and name in linear and not name.startswith(KEPT_MODULES)
        numbers["trained" if trained else "packed" if packed else "kept"] += parameter.numel()
    return {
        "frozen, kept": numbers["kept"] * itemsize,
        "frozen, NF4": numbers["packed"] * BITS_IN_NF4 / 8,
        "trained, float32": numbers["trained"] * 4,
        "gradients": numbers["trained"] * 4,
        "AdamW's averages": numbers["trained"] * 8,
    }


# %% [markdown]
# The first check is on the model at hand: the arithmetic against what is really in memory. transformers'
# `get_memory_footprint` counts parameters and buffers; the scales of 4-bit weights are neither, so the function above
# counts a little more.

# %%
loaded = load_model(MODEL_ID, quantized=True, dtype=best_dtype())
footprint = loaded.get_memory_footprint()
scale_bytes = sum(count_scale_bytes(parameter) for parameter in loaded.parameters())
parts = estimate_memory(build_empty_model(MODEL_ID), CATALOGUE["r1-llm-only"], best_dtype().itemsize)
reckoned = parts["frozen, kept"] + parts["frozen, NF4"]  # the model as it was loaded, without adapters
print(f"get_memory_footprint {footprint:,} bytes, scales {scale_bytes:,}, arithmetic {reckoned:,.0f}")
print(f"arithmetic / footprint {reckoned / footprint:.4f}, with the scales {reckoned / (footprint + scale_bytes):.4f}")
assert abs(reckoned / footprint - 1) < 0.01
del loaded
release_memory()

# %% [markdown]
# Then the real sizes. They are built on PyTorch's `meta` device from their published shapes, so they have names and
# shapes and take no memory.


# %%
#| export quantization
def describe_text(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> dict:
    """The shape of a language model, under the names of its configuration."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
    }  # fmt: skip


PUBLISHED_SIZES = {  # the configurations of Qwen2-VL on the hub; the smallest uses one matrix as embedding and lm_head
    "2B": (describe_text(1536, 28, 12, 2, 8960, 151936), True),
    "7B": (describe_text(3584, 28, 28, 4, 18944, 152064), False),
    "72B": (describe_text(8192, 80, 64, 8, 29568, 152064), False),
}


def build_published_model(size: str) -> PreTrainedModel:
    """Qwen2-VL in one of its published sizes, without weights, on the meta device."""
    text, tied = PUBLISHED_SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "mlp_ratio": 4, "num_heads": 16}
    text = text | {"rope_parameters": rope, "tie_word_embeddings": tied}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(config)


# %%
KINDS = {"all weights": None} | {name: recipe for name, recipe in CATALOGUE.items() if not recipe.stages}
TRAINED_AT_7B = {"r1-llm-only": 161_480_704, "r2-vision-only": 675_759_104, "r4-joint": 198_180_864}
areas, budgets = {}, {}
for size in PUBLISHED_SIZES:
    empty = build_published_model(size)
    areas[size] = pd.Series({name: p.numel() for name, p in empty.named_parameters()}).groupby(area_of).sum()
    for name, recipe in KINDS.items():
        budgets[size, name] = estimate_memory(empty, recipe)
budgets = pd.DataFrame(budgets).T / 2**30  # GiB
for name, trained in TRAINED_AT_7B.items():
    assert round(budgets.loc[("7B", name), "gradients"] * 2**30 / 4) == trained
    by_peft = count_trainables(MODEL_ID, CATALOGUE[name]).loc["total", "trained"]
    assert estimate_memory(build_empty_model(MODEL_ID), CATALOGUE[name])["gradients"] / 4 == by_peft
table = pd.DataFrame(areas).reindex(AREAS).T.fillna(0).astype(int)
table.assign(total=table.sum(axis=1), vision=table["visual"] / table.sum(axis=1)).style.format(
    "{:,}", subset=[*AREAS, "total"]
).format("{:.1%}", subset="vision")

# %% [markdown]
# (In the smallest, `lm_head` is the embedding matrix and is counted with the language model.) The numbers of trained
# weights at 7B have just been asserted to be those that were counted in training, and those of the model at hand to be
# what PEFT counts.
#
# The second check is against measured peaks: one H200, random weights of the 7B shape, one image of 1,225 tokens at a
# time, gradient checkpointing (`python -m helpers.benchmark --micro-batch-size 1 --gradient-checkpointing` measures
# them). What the arithmetic leaves is activations and workspace.

# %%
MEASURED_AT_7B = {"r1-llm-only": 9.8, "r2-vision-only": 26.7, "r4-joint": 10.8}  # GiB
parts = budgets.loc["7B"].loc[list(MEASURED_AT_7B)]
remainder = pd.Series(MEASURED_AT_7B) - parts.sum(axis=1)
colours = ["#4575b4", "#91bfdb", "#f28e2b", "#f9d3a8", "#fee8c8"]
figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
bottom = np.zeros(len(parts))
for (part, values), colour in zip(parts.items(), colours, strict=True):
    axes.bar(np.arange(len(parts)) - 0.2, values, 0.36, bottom, color=colour, ec="white", label=part)
    bottom += values.to_numpy()
axes.bar(np.arange(len(parts)) - 0.2, remainder, 0.36, bottom, fc="none", ec="grey", hatch="//", label="remainder")
bars = axes.bar(np.arange(len(parts)) + 0.2, list(MEASURED_AT_7B.values()), 0.36, color="grey", label="measured peak")
axes.bar_label(bars, fmt="%.1f", padding=2)
axes.set_xticks(range(len(parts)), parts.index)
axes.margins(y=0.08)
axes.set(ylabel="GiB", title="Qwen2-VL-7B: arithmetic (left bars) and measurement")
figure.legend(loc="outside right upper", frameon=False)
plt.show()
parts.assign(sum=parts.sum(axis=1), measured=pd.Series(MEASURED_AT_7B), remainder=remainder).style.format("{:.1f}")

# %% [markdown]
# The arithmetic explains most of each peak, and its order. In four bits the language model stops being the largest
# item. In r2 it is the 16 bytes for each weight of the vision tower that count, on top of a language model in 16 bits:
# a quantised one would have gone with it as well, but a checkpoint that is saved whole cannot hold 4-bit weights.
#
# Which size fits into which GPU? Below is the arithmetic for all sizes and recipes; "all weights" is the training of
# everything, which no recipe does. **These are sums, not measurements**: green leaves at least a fifth of the GPU to
# activations, yellow less than that, red does not even hold weights, gradients and averages. A GPU of 24 GB is taken
# to have 24 GiB. r3 needs what the larger of its stages, r2, needs. A model can also be spread over several GPUs; this
# is about one.


# %%
def judge_fit(line: pd.Series) -> list[str]:
    """Background colours of a line of the table: green, yellow or red for each GPU."""
    colours = []
    for column in line.index:
        share = line["arithmetic (GiB)"] / int(column.split()[0]) if column.endswith("GB") else None
        colour = "#d9ef8b" if share and share <= 0.8 else "#fee08b" if share and share <= 1 else "#f4a582"
        colours.append("" if share is None else f"background-color: {colour}; color: black")
    return colours


fits = budgets.sum(axis=1).rename("arithmetic (GiB)").to_frame()
for gigabytes in (16, 24, 48, 80):
    left_over = gigabytes - fits["arithmetic (GiB)"]
    fits[f"{gigabytes} GB"] = [f"{free:.0f} left" if free > 0 else "-" for free in left_over]
fits.style.apply(judge_fit, axis=1).format("{:.1f}", subset="arithmetic (GiB)")

# %% [markdown]
# ## 5. What can be trained in four bits?
#
# A gradient step is much smaller than the gap between two levels, and a weight that is the number of a level cannot be
# moved by a little. PyTorch does not even let one try: a `Linear4bit` holds `uint8`, and only floating-point numbers
# have gradients.

# %%
loaded = load_model(MODEL_ID, quantized=True, dtype=best_dtype())
layer = next(module for module in loaded.modules() if isinstance(module, Linear4bit))
print(type(layer.weight).__name__, layer.weight.dtype, tuple(layer.weight.shape), "for", layer)
try:
    layer.weight.requires_grad_(True)
except RuntimeError as error:
    print("RuntimeError:", error)
numbers = pd.DataFrame(
    [(area_of(name), p.numel() if p.is_floating_point() else 0, 0 if p.is_floating_point() else 2 * p.numel())
     for name, p in loaded.named_parameters()], columns=["area", "can get gradients", "in four bits: cannot"],
)  # fmt: skip
numbers.groupby("area").sum().style.format("{:,}")

# %% [markdown]
# What is trained in their place is LoRA's two thin matrices beside each of them, in float32. The gradient passes
# *through* the 4-bit layer on its way down, as multiplication with its (rounded) weights. So the adapters' gradients
# are not those that they would get without quantisation. How far off are they?
#
# One backward pass on the same images, with the same adapters, in 4 bits and without. LoRA's B starts at zero, so that
# nothing changes at first; therefore A has no gradient at all in the first step, and B's are compared, by their
# cosine: 1 is the same direction. For scale, the gradients of two different batches, both without quantisation.


# %%
def compute_lora_gradients(quantized: bool, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient of each adapter's matrices after one backward pass of r4-joint, and the loss."""
    model, recipe = load_model(MODEL_ID, quantized, best_dtype()), CATALOGUE["r4-joint"]
    torch.manual_seed(SEED)  # the same adapters every time
    apply_freeze_policy(model, recipe)
    adapted = get_peft_model(model, build_lora_config_for_recipe(recipe)).train()
    loss = adapted(**batch).loss
    loss.backward()
    trained = {name.split("base_model.model.")[1]: p for name, p in adapted.named_parameters() if p.requires_grad}
    return {name: p.grad.float() for name, p in trained.items()}, loss.item()


exact, exact_loss = compute_lora_gradients(False, batch)
in_nf4, nf4_loss = compute_lora_gradients(True, batch)
elsewhere, _ = compute_lora_gradients(False, other_batch)
assert all(gradient.norm() == 0 for name, gradient in exact.items() if ".lora_A." in name)
print(f"loss without quantisation {exact_loss:.4f}, in 4 bits {nf4_loss:.4f}")
lines = []
for name in [name for name in exact if ".lora_B." in name]:
    number, kind = re.search(r"\.(\d+)\.(.+)\.lora_B", name).groups()
    line = {"area": area_of(name), "layer": int(number), "kind": kind}
    for compared, gradients in {"in 4 bits": in_nf4, "another batch": elsewhere}.items():
        pair = exact[name].flatten(), gradients[name].flatten()
        line[compared] = torch.cosine_similarity(*pair, dim=0).item()
    lines.append(line | {"ratio of norms": (in_nf4[name].norm() / exact[name].norm()).item()})
cosines = pd.DataFrame(lines)
cosines.groupby("area", sort=False)[["in 4 bits", "another batch", "ratio of norms"]].agg(["min", "median"]).round(3)


# %%
def plot_cosines(cosines: pd.DataFrame, towers: dict[str, str]) -> plt.Figure:
    """Cosine of each adapter's gradient with the exact one: in 4 bits as dots, of another batch as crosses."""
    figure, grid = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, (area, title) in zip(grid, towers.items(), strict=True):
        for kind, some in cosines[cosines.area == area].groupby("kind", sort=False):
            dots = axes.plot(some["layer"], some["in 4 bits"], "o-", ms=4, label=kind)
            axes.plot(some["layer"], some["another batch"], "x", ms=5, color=dots[0].get_color(), alpha=0.7)
        axes.set(xlabel="layer number", title=title)
        axes.axhline(1, color="lightgrey", lw=1)
        axes.axhline(0, color="lightgrey", lw=1)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    grid[0].set_ylabel("cosine with the exact gradient")
    figure.suptitle("Gradients of LoRA's B. Dots: in 4 bits. Crosses: another batch, not quantised", fontsize=10)
    return figure


plot_cosines(cosines, {"visual": "vision tower (kept)", "language_model": "language model (NF4)"})
plt.show()
release_memory()

# %% [markdown]
# ("Exact" is the gradient of the model that is not quantised.)
#
# The vision tower itself is not quantised, yet its gradients come through the language model that is. Against the
# crosses one sees what the dots mean: a gradient in four bits is far closer to the exact one than the next batch's is,
# which is what a training lives with anyway. The table's last columns compare lengths: 1 would be the same. This is
# one backward pass at the start; it does not say what the difference does over many steps.
#
# How many numbers are trained is the choice of a rank: LoRA on a layer has rank x (inputs + outputs) weights, so the
# number is proportional to it. The two recipes on the model at hand, and at 7B:

# %%
models = {"this model": build_empty_model(MODEL_ID), "7B": build_published_model("7B")}
ranks = 2 ** np.arange(9)
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for (title, empty), style in zip(models.items(), ["o--", "o-"], strict=True):
    whole = sum(p.numel() for p in empty.parameters())
    for name in ("r1-llm-only", "r4-joint"):
        numbers = ranks * count_lora_numbers(empty, replace(CATALOGUE[name], lora_rank=1))
        axes.loglog(ranks, 100 * numbers / whole, style, ms=4, color=MODEL_COLOURS[name], label=f"{name}, {title}")
        if title == "7B":
            assert numbers[6] == TRAINED_AT_7B[name]
axes.axvline(64, color="grey", lw=1, ls=":")
axes.set_xticks(ranks, ranks)
axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
axes.set(xlabel="rank (the recipes take 64)", ylabel="trained numbers, % of all weights", title="Trained by rank")
axes.minorticks_off()
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The same rank is a larger share of a small model: a layer grows with the square of its width, its adapter with the
# width.
#
# ## 6. Gradient norms over a training
#
# Every run logs the norm of the gradient of each tower, before the Trainer clips the gradient of all that is trained
# to a norm of 1 (dashed). It shows that a tower gets a gradient at all (the story stops where it is 0), and whether a
# training jumps. Dotted: the first stage of r3.


# %%
def plot_gradient_norms(runs: Sequence[RunFolder], towers: dict[str, str]) -> plt.Figure:
    """Norm of each tower's gradient over optimiser steps, one line per run."""
    figure, grid = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    for axes, (area, title) in zip(grid, towers.items(), strict=True):
        for run in runs:
            for stage, style in ((run, "-"), (RunFolder(run.path / "stage1"), ":")):
                norms = stage.read_log(f"grad_norm_{area}") if stage.is_trained else ()
                if len(norms):
                    label = run.path.name + ("" if stage is run else ", first stage")
                    marker = "o" if len(norms) == 1 else None
                    axes.semilogy(norms, style, marker=marker, label=label, color=MODEL_COLOURS[run.path.name])
        axes.axhline(1, color="black", lw=1, ls="--")
        axes.set(xlabel="optimiser step", title=title)
        axes.legend(frameon=False, fontsize=8)
    grid[0].set_ylabel("gradient norm before clipping")
    return figure


towers = {"visual": "vision tower", "language_model": "language model"}
plot_gradient_norms(runs, towers)
plt.show()

# %% [markdown]
# The norm does not tell how far the weights move. AdamW divides each step by the running size of the gradient, so that
# a gradient a hundred times as large makes the same step. A layer alone, the same loss times 1 and times 100:


# %%
def train_layer(factor: float) -> dict[str, float]:
    """Norm of the first gradient, and how far the weights are from where they began after 50 steps of AdamW."""
    torch.manual_seed(SEED)
    layer, inputs, targets = torch.nn.Linear(64, 64), torch.randn(256, 64), torch.randn(256, 64)
    optimiser, start, norms = torch.optim.AdamW(layer.parameters(), lr=1e-3), layer.weight.detach().clone(), []
    for _ in range(50):
        optimiser.zero_grad()
        (factor * (layer(inputs) - targets).square().mean()).backward()
        norms.append(layer.weight.grad.norm().item())
        optimiser.step()
    return {"first gradient norm": norms[0], "distance after 50 steps": (layer.weight - start).norm().item()}


pd.DataFrame({f"loss x {factor}": train_layer(factor) for factor in (1, 100)}).T.round(4)

# %% [markdown]
# How far did the runs really move their weights? Each trained model is loaded, its adapter, if it has one, is merged,
# and it is compared with the model from which the run began.


# %%
def measure_movement(run: RunFolder, areas: Sequence[str]) -> dict[str, float]:
    """How far a run moved the weights of each area, as a share of their norm before."""
    before = load_model(run.read_recipe()["settings"]["model_id"], False, best_dtype()).state_dict()
    trained = load_trained_model(run.path, "bf16")
    after = (trained.merge_and_unload() if isinstance(trained, PeftModel) else trained).state_dict()
    moved = {}
    for area in areas:
        names = [name for name in before if area_of(name) == area]
        both = [torch.cat([weights[name].flatten() for name in names]) for weights in (before, after)]
        moved[area] = relative_error(*both)
    return moved


movement = pd.DataFrame({run.path.name: measure_movement(run, list(towers)) for run in runs}).T
release_memory()
figure, grid = plt.subplots(1, 2, figsize=(11, 2.8), layout="constrained", sharex=True, sharey=True)
for axes, (area, title) in zip(grid, towers.items(), strict=True):
    bars = axes.barh(movement.index, 100 * movement[area], color=[MODEL_COLOURS[name] for name in movement.index])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set(xlabel="distance moved, % of the norm before", title=title)
    axes.margins(x=0.15)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# Where a bar is 0 the tower was frozen. Compare the order of the bars with that of the norms above: learning rate,
# number of steps and the form of LoRA all stand between the two. A long way is not a good one either; what a training
# was worth is measured on images, in the story's section 13.
#
# ## What to remember
#
# - NF4 rounds to sixteen levels, with a scale for 64 weights. It moves every layer's weights by about the same share,
#   which FP4 exceeds; what comes out of a layer differs more from layer to layer.
# - Whether an error matters is asked of boxes, not of weights, and answered with an interval: a mean over few images
#   can hang on one of them.
# - Weights, gradients and AdamW's averages can be reckoned before anything is downloaded. The recipes' measured peaks
#   lie above these sums by what activations and workspace take.
# - Packed weights cannot be trained; adapters beside them can, and their gradients at the start are close to the exact
#   ones, much closer than those of two batches are to each other.
# - A gradient norm says that a tower is reached, and whether a training is steady. It says nothing about distance.
#
# ## What to try next
#
# 1. Point the parameters at `Qwen/Qwen2-VL-2B-Instruct` on a GPU. Does its vision tower bear four bits better?
# 2. Quantise only some layers: `kept_modules` of `load_model` takes any paths, such as
#    `("model.visual.blocks.0", "lm_head")`. Which of the layers with a large output error matter for the boxes?
# 3. Raise `SAMPLES` to 128. Which intervals of section 3 still hold 0?
# 4. Set `lora_rank=8` in `r1-llm-only`, reckon its memory with `estimate_memory`, and then measure it with
#    `python -m helpers.benchmark`.
# 5. Compare LoRA's gradients once more from a trained adapter in place of a new one: is A's gradient as close?
