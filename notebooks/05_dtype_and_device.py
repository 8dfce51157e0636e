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
# # 5. Data types and devices
#
# A training that fails with an error message is half mended. This notebook is about the other ones: weights that do
# not move because their steps are rounded away, values that leave the range of float16, batches that are weighted
# wrongly, and copies of a model that were not asked for.
#
# **What you will learn**
#
# - what bfloat16, float16 and float32 can hold, and which of training's numbers fall outside;
# - why the story stores what it trains in float32, by experiment;
# - what autocast does to each layer, and how far answers move;
# - what "effective batch" means when answers differ in length;
# - how DataParallel, a sharded model and DistributedDataParallel differ;
# - which symptom points to which cause.
#
# **How long it takes**: about two minutes on two CPU cores. Everything shown ran on a CPU, with the embedded base of
# six million parameters and drawn packages: the rounding is that of any hardware, the sizes of activations and
# gradients are this model's and no 7B model's. What needs a GPU was not run here, and the text says so where it comes
# up.

# %% tags=["parameters"]
MODEL_ID = "helpers/tiny/base"  # hub id or folder
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder
TRAIN_SPLIT = "train"
EVAL_SPLIT = "val"
MAX_PIXELS = 1003520
LABELS = ["nutrition table", "barcode"]  # what section 4 asks about; the embedded base knows only the second
LEARNING_RATES = [1e-5, 1e-4, 1e-3]
STEPS = 8  # optimiser steps of each training in section 2
TRAIN_BATCH_SIZE = 2  # images of each of these steps
BATCH_SIZE = 4  # images of a batch in the other sections
ANSWERS = 16  # images asked about in section 4
PROCESSES_MODEL_ID = "helpers/tiny/base"  # trained whole, on the CPU, by two processes in section 6: a small one
SEED = 42

# %%
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # section 6 names GPUs that are not there
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for an optional package

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import infer_auto_device_map
from matplotlib.patches import Rectangle
from peft import get_peft_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

from helpers.collators import AssistantOnlyCollator
from helpers.conversation import PROMPT, Task
from helpers.data import Mirroring, load_rows, read_row, to_training_dataset
from helpers.generation import Detector, generate, to_questions
from helpers.loading import area_of, load_model, load_processor, release_memory
from helpers.plots import BLUE, LIGHT, ORANGE
from helpers.recipes import R1, apply_freeze_policy, build_lora_config_for_recipe

TASK = Task(PROMPT.format(label="nutrition table"))

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's
GREEN, RED, GREY = "#1a9850", "#d73027", "#888888"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST = {name: torch.finfo(dtype).tiny * torch.finfo(dtype).eps for name, dtype in DTYPES.items()}  # above zero
COLOURS = {"float32": GREEN, "bfloat16": BLUE, "float16": ORANGE}

# %% [markdown]
# ## 1. Three formats
#
# A floating-point number is a sign, an exponent and a fraction. The exponent's bits decide the range, the fraction's
# bits how close together two neighbours are. bfloat16 is float32 with its lower half cut off: the same range, far
# fewer digits. float16 spends its 16 bits the other way.


# %%
def read_bits(value: float, dtype: torch.dtype) -> str:
    """The stored bits of a number, sign first."""
    size = torch.finfo(dtype).bits
    stored = torch.tensor(value, dtype=dtype).view({16: torch.int16, 32: torch.int32}[size]).item()
    return format(stored % 2**size, f"0{size}b")


EXPONENT_BITS = {"float32": 8, "bfloat16": 8, "float16": 5}
VALUE = 0.03  # the size of a usual weight
figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
for line, (name, dtype) in enumerate(DTYPES.items()):
    for place, bit in enumerate(read_bits(VALUE, dtype)):
        part = 0 if place == 0 else 1 if place <= EXPONENT_BITS[name] else 2
        axes.add_patch(Rectangle((place, line), 0.9, 0.7, fc=["#dddddd", "#fdd9b5", "#cfdcee"][part], ec="white"))
        axes.text(place + 0.45, line + 0.35, bit, ha="center", va="center", family="monospace")
    stored = torch.tensor(VALUE, dtype=dtype).item()
    axes.text(32.4, line + 0.35, f"= {stored:.9f}", va="center", family="monospace")
axes.set(xlim=(0, 40), ylim=(3, -0.1), title=f"{VALUE} as stored: sign (grey), exponent (orange), fraction (blue)")
axes.set_yticks([0.35, 1.35, 2.35], list(DTYPES))
axes.tick_params(length=0)
axes.xaxis.set_visible(False)
axes.spines[:].set_visible(False)
plt.show()

# %%
VALUES = {"1 + 0.001": 1.001, "256 + 1": 257.0, "70,000": 7e4, "1e-6": 1e-6, "1e-8": 1e-8, "1e-39": 1e-39}
limits = {
    name: {
        "largest": torch.finfo(dtype).max,
        "smallest normal": torch.finfo(dtype).tiny,
        "smallest of all": SMALLEST[name],
        "spacing at 1": torch.finfo(dtype).eps,
    }
    | {f"{text} becomes": torch.tensor(value, dtype=dtype).item() for text, value in VALUES.items()}
    for name, dtype in DTYPES.items()
}
pd.DataFrame(limits).map(lambda value: f"{value:.8g}")

# %% [markdown]
# bfloat16 reads 1.001 as 1 and 257 as 256, but holds 70,000 and 1e-39 with two or three digits. float16 is finer and
# makes infinity of the one and zero of the other. The plot shows the same for all magnitudes: how far the next
# number is. Numbers under half of that disappear when they are added.


# %%
def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance from each value to the next larger one of the format (float64)."""
    info = torch.finfo(dtype)
    exponents = torch.frexp(values.abs().double().clamp(min=info.tiny))[1] - 1
    return info.eps * torch.exp2(exponents.double())


magnitudes = torch.logspace(-12, 8, 2000, dtype=torch.float64)
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for name, dtype in DTYPES.items():
    inside = (magnitudes <= torch.finfo(dtype).max) & (magnitudes >= SMALLEST[name])
    axes.loglog(magnitudes[inside], spacing(magnitudes[inside], dtype), color=COLOURS[name], label=name)
axes.axvspan(0.01, 0.1, color=LIGHT, label="usual weights")
axes.axhline(1e-5, color=GREY, ls=":", label="a step at learning rate 1e-5")
axes.axvline(65504, color=ORANGE, ls="--", lw=1)
axes.text(8e4, 1e-17, "float16\nends here", fontsize=8)
axes.set(xlabel="magnitude", ylabel="distance to the next number", title="Spacing")
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# In the shaded band the dotted line runs far below bfloat16's spacing: a step of 1e-5 on a weight of 0.03 is less than
# half of the way to the next number, so the sum is rounded back to where it was.
#
# ## 2. Steps that are rounded away
#
# AdamW divides each gradient by its own recent size, so that a step has about the size of the learning rate whatever
# the gradient. That makes the effect predictable: a weight moves if half of its spacing is under the learning rate.
# QLoRA in TRL stores the trained weights in bfloat16; the story turns them into float32 after the trainer is built.
# What does that change?
#
# The base is loaded in 4 bits with LoRA on its language model, as in `r1-llm-only`. Its vision tower, not quantised,
# is trained too, so that three kinds of weights can be watched at once. First the prediction.


# %%
def build_adapted(dtype: torch.dtype) -> torch.nn.Module:
    """The base in NF4 with LoRA and a trained vision tower; what is trained is stored in `dtype`."""
    torch.manual_seed(SEED)
    model = get_peft_model(load_model(MODEL_ID, True, torch.float32), build_lora_config_for_recipe(R1))
    model.base_model.model.model.visual.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def collect_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained weights, flat, by kind: LoRA A, LoRA B, vision weights."""
    kinds = {"LoRA A": [], "LoRA B": [], "vision weights": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "LoRA A" if "lora_A" in name else "LoRA B" if "lora_B" in name else "vision weights"
            kinds[kind].append(parameter.detach().flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


start = collect_trained(build_adapted(torch.float32))
figure, grid = plt.subplots(1, 2, figsize=(11, 3.6), sharex=True, layout="constrained")
bins = np.logspace(-12, -1.5, 120)
for axes, kind in zip(grid, ["LoRA A", "vision weights"], strict=True):
    for name in ("float32", "bfloat16"):
        axes.hist(spacing(start[kind], DTYPES[name]) / 2, bins, color=COLOURS[name], label=name)
    for rate in LEARNING_RATES:
        axes.axvline(rate, color=GREY, ls=":")
        axes.text(rate, 1.0, f" {rate:g}", rotation=90, va="top", ha="right", transform=axes.get_xaxis_transform())
    axes.set(xscale="log", xlabel="half of the spacing at each weight", ylabel="weights", title=kind)
    axes.legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# A weight moves at a learning rate (dotted) if it stands to the left of it. In float32 all but a few do at every
# rate; in bfloat16 most need the largest. LoRA's B matrices are not drawn: they start at zero, where every format is
# dense.
#
# Now the training itself: a few real steps for each rate and each format, the same weights, batches and order.


# %%
processor = load_processor(MODEL_ID, MAX_PIXELS)
collate = AssistantOnlyCollator(processor)
rows = load_rows(DATASET_ID, TRAIN_SPLIT, max(STEPS * TRAIN_BATCH_SIZE, 4 * BATCH_SIZE), SEED)
examples = to_training_dataset(rows, TASK, Mirroring())


def cut_batches(count: int, size: int) -> list[dict]:
    """The first `count` batches of `size` images; starts again where the images end."""
    chosen = [examples[number % len(examples)] for number in range(count * size)]
    return [collate(chosen[first : first + size]) for first in range(0, count * size, size)]


step_batches = cut_batches(STEPS, TRAIN_BATCH_SIZE)


def train_steps(name: str, rate: float) -> list[dict]:
    """AdamW on weights stored in format `name`: after each step the loss and the share of weights that differ."""
    model = build_adapted(DTYPES[name])
    device, at_start, lines = model.device, collect_trained(model), []
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0, fused=True
    )
    for step, batch in enumerate(step_batches, 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**{key: tensor.to(device) for key, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for kind, now in collect_trained(model).items():
            changed = (now != at_start[kind]).float().mean().item()
            lines.append(
                {"stored in": name, "rate": rate, "step": step, "kind": kind, "changed": changed, "loss": loss.item()}
            )
    return lines


moves = pd.DataFrame(
    [line for rate in LEARNING_RATES for name in ("float32", "bfloat16") for line in train_steps(name, rate)]
)
release_memory()

# %%
figure, grid = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
widths = dict(zip(LEARNING_RATES, [1, 2, 3], strict=False))
for axes, kind in zip(grid, start, strict=True):
    for (name, rate), lines in moves[moves.kind == kind].groupby(["stored in", "rate"]):
        style = {"color": COLOURS[name], "lw": widths.get(rate, 1), "marker": "o", "ms": 3}
        axes.plot(lines.step, lines.changed, **style, label=f"{name}, {rate:g}")
    axes.set(xlabel="step", title=kind, ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)
grid[0].set(ylabel="share of weights that are\nnot where they started")
figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper", title="stored in, rate", frameon=False)
plt.show()

# %%
predicted = {
    (kind, rate, name): ((spacing(start[kind], DTYPES[name]) / 2) < rate).double().mean().item()
    for kind in ("LoRA A", "vision weights")
    for rate in LEARNING_RATES
    for name in ("float32", "bfloat16")
}
shares = moves.pivot_table(index=["kind", "rate", "stored in"], columns="step", values="changed")[[1, STEPS]]
shares.columns = ["after 1 step", f"after {STEPS} steps"]
shares.insert(0, "could move in 1 step", pd.Series(predicted))
shares["last loss"] = moves[moves.step == STEPS].groupby(["kind", "rate", "stored in"]).loss.first()
shares.index = shares.index.set_levels([f"{rate:g}" for rate in shares.index.levels[1]], level=1)
shares.map(lambda value: "" if pd.isna(value) else f"{value:.3f}")

# %% [markdown]
# The lines of float32 lie on one another at the top, and all lines of LoRA B do. Read `LoRA A` after one step with
# care: its gradient is exactly zero then, in every format, because B is still zero. After that the picture is that of
# the prediction. At the smallest rate hardly any A or vision weight leaves its place in bfloat16, and more steps do
# not help: each starts from the same rounded value, so small steps are not saved up. B does move: it starts at zero,
# where numbers lie close together.
#
# The loss falls in either format, and one seed with so few steps cannot tell which falls further. That is what makes
# this fault hard to see: **the loss falls, and a part of the model is not trained.** The check is the share above, the
# remedy one line, `parameter.data = parameter.data.float()`. It costs two bytes more for each trained weight and for
# each of AdamW's two averages; the frozen weights stay as they are.
#
# ## 3. Overflow and underflow
#
# bfloat16 has the range of float32, so nothing overflows there that would not in float32. float16 ends at 65,504 and
# begins at about 6e-8; older GPUs such as a T4 have nothing else in 16 bits. How much room does a model have?


# %%
def find_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Vision blocks and language layers in the order in which they run, under short names."""
    pattern = re.compile(r".*(visual\.blocks|language_model\.layers)\.(\d+)")
    found = {name: pattern.fullmatch(name) for name, _ in model.named_modules()}
    modules = dict(model.named_modules())
    short = {"visual.blocks": "vision", "language_model.layers": "language"}
    return {f"{short[match[1]]} {match[2]}": modules[name] for name, match in found.items() if match}


def watch_activations(model: torch.nn.Module, batch: dict, backward: bool = False) -> tuple[dict, dict]:
    """Output of every block, and its gradient if `backward`, for one batch; both by block."""
    outputs, gradients, hooks = {}, {}, []
    for name, block in find_blocks(model).items():

        def keep(module, inputs, output, name=name):
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[name] = hidden.detach()
            if backward:
                hidden.register_hook(lambda gradient: gradients.update({name: gradient.detach()}))

        hooks.append(block.register_forward_hook(keep))
    loss = model(**{key: tensor.to(model.device) for key, tensor in batch.items()}).loss
    if backward:
        loss.backward()
    for hook in hooks:
        hook.remove()
    return outputs, gradients


batches = cut_batches(4, BATCH_SIZE)
model = load_model(MODEL_ID, False, torch.float32).train()
outputs, activation_gradients = watch_activations(model, batches[0], backward=True)
weight_gradients = {}
for name, parameter in model.named_parameters():
    weight_gradients.setdefault(area_of(name), []).append(parameter.grad.flatten())
weight_gradients = {area: torch.cat(parts) for area, parts in weight_gradients.items()}
model.zero_grad()

# %%
sizes = {
    "largest value": [hidden.abs().max().item() for hidden in outputs.values()],
    "its square": [hidden.square().max().item() for hidden in outputs.values()],
    "sum of squares of one token": [hidden.square().sum(-1).max().item() for hidden in outputs.values()],
}
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for (name, values), colour in zip(sizes.items(), [BLUE, ORANGE, RED], strict=True):
    axes.semilogy(range(len(outputs)), values, "o-", color=colour, label=name)
axes.axhline(65504, color="black", ls="--", label="largest float16")
axes.set_xticks(range(len(outputs)), list(outputs), rotation=90 if len(outputs) > 12 else 30, fontsize=8)
axes.set(ylabel="size", title="Outputs of the blocks")
axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The values themselves are far from the limit. What a normalisation computes from them, a sum of squares, is not: it
# comes closer by orders of magnitude. So the same model can run in float16 or not, depending on which operations
# are done in float32. Qwen2-VL's own norms take care of it:

# %%
norm = model.model.language_model.norm


def naive_rms(hidden: torch.Tensor) -> torch.Tensor:
    """Root mean square without a change of type: sum first, divide after."""
    return (hidden.square().sum(-1) / hidden.shape[-1]).sqrt()


lines = {}
for factor in (1, 4, 16, 64):
    hidden = (outputs[list(outputs)[-1]] * factor).half()
    lines[f"x {factor}"] = {
        "largest value": hidden.abs().max().item(),
        "largest naive RMS": naive_rms(hidden).max().item(),
        "infinite naive RMS (share of tokens)": naive_rms(hidden).isinf().float().mean().item(),
        "all finite after the model's own norm": norm(hidden).isfinite().all().item(),
    }
half = load_model(MODEL_ID, False, torch.float16).eval()
with torch.no_grad():
    half_outputs, _ = watch_activations(half, collate([examples[0], examples[1 % len(examples)]]))
print("all of the base in float16, every block finite:", all(h.isfinite().all().item() for h in half_outputs.values()))
pd.DataFrame(lines).T

# %% [markdown]
# The rows scale the last layer's output up. The hand-made root mean square in float16 is infinite for ever more tokens
# while the values themselves are all still finite; the model's own norm, which computes in float32 inside, is not
# bothered. The base as a whole runs in float16 without an infinity.
#
# Gradients have the opposite problem: they are small. The histogram shows the gradients of one batch in float32, those
# of the weights and those that travel backwards through the blocks. Shaded is what float16 holds with fewer digits
# (between its smallest number and its smallest normal number) and what it makes zero.


# %%
def plot_gradients(gradients: dict[str, torch.Tensor], axes: plt.Axes, scale: float) -> None:
    """Histogram of the sizes of gradients times `scale`, with the ranges of float16."""
    info, bins = torch.finfo(torch.float16), np.logspace(-14, 7, 140)
    for (name, values), colour in zip(gradients.items(), [BLUE, ORANGE, GREEN], strict=False):
        sizes = (values.flatten().abs() * scale).numpy(force=True)
        weights = np.full(sizes.shape, 1 / len(sizes))
        axes.hist(sizes, bins, weights=weights, histtype="step", color=colour, lw=1.6, label=name)
    axes.axvspan(1e-14, SMALLEST["float16"] / 2, color=RED, alpha=0.15, label="zero in float16")
    axes.axvspan(SMALLEST["float16"] / 2, info.tiny, color=ORANGE, alpha=0.15, label="fewer digits")
    axes.axvspan(info.max, 1e7, color="black", alpha=0.15, label="infinite")
    axes.set(xscale="log", xlim=(1e-14, 1e7), xlabel=f"size of the gradient x {scale:,.0f}", ylabel="share")


flowing = {
    "blocks, vision": torch.cat([g.flatten() for name, g in activation_gradients.items() if "vision" in name]),
    "blocks, language": torch.cat([g.flatten() for name, g in activation_gradients.items() if "language" in name]),
}
figure, grid = plt.subplots(2, 2, figsize=(12, 6), layout="constrained", sharey="row", sharex=True)
for column, scale in enumerate((1, 2**16)):
    plot_gradients(weight_gradients, grid[0, column], scale)
    plot_gradients(flowing, grid[1, column], scale)
    grid[0, column].set_title(f"loss x {scale:,}")
for axes in grid[:, 0]:
    axes.legend(frameon=False, fontsize=8, loc="upper left")
plt.show()

# %%
info, lost = torch.finfo(torch.float16), {}
for scale in (1, 2**8, 2**16, 2**20):
    for name, values in (weight_gradients | flowing).items():
        nonzero = values[values != 0] * scale
        lost[(name, scale)] = {
            "zero in float16": (nonzero.half() == 0).float().mean().item(),
            "fewer digits": ((nonzero.abs() < info.tiny) & (nonzero.half() != 0)).float().mean().item(),
            "infinite (count)": nonzero.half().isinf().sum().item(),
        }
table = pd.DataFrame(lost).T.rename_axis(["gradient", "loss x"])
table.round(4).astype({"infinite (count)": int}).unstack("loss x")[["zero in float16", "infinite (count)"]]

# %% [markdown]
# Multiplying the loss by 65,536 multiplies every gradient and moves the histogram to the right, out of the shaded
# part; the optimiser divides again, in float32. Where the factor is too large the other end overflows.
# `torch.amp.GradScaler` therefore starts there, halves the factor and leaves the step out whenever a gradient is
# infinite, and doubles it again after 2,000 good steps. A few skipped steps at the start of a float16 training are
# normal; a factor that falls at every step means that something else is infinite. bfloat16 needs none of this.
#
# ## 4. Autocast
#
# Autocast keeps the weights as they are and chooses a type for each operation: matrix products in 16 bits, what needs
# digits in float32, the rest in the type of what comes in. Hooks on the modules show the outcome.

# %%
seen, hooks = Counter(), []
for module in model.modules():
    if not list(module.children()) or type(module).__name__.endswith(("Block", "DecoderLayer")):

        def count(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(output) and output.is_floating_point():
                seen[type(module).__name__, str(output.dtype).removeprefix("torch.")] += 1

        hooks.append(module.register_forward_hook(count))
model.eval()
with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
    logits = model(**{key: tensor.to(model.device) for key, tensor in batches[0].items()}).logits
for hook in hooks:
    hook.remove()
counts = pd.Series(seen).unstack(fill_value=0)
counts = counts.loc[counts.sum(axis=1).sort_values().index]
axes = counts.plot.barh(stacked=True, figsize=(8, 3.6), color=[COLOURS[name] for name in counts], width=0.75)
axes.margins(x=0.05)
axes.set(xlabel="modules", title=f"Type of the output under autocast on {model.device.type}")
axes.legend(frameon=False)
plt.tight_layout()
plt.show()


# %%
def output_types(device: str) -> pd.Series:
    """Type of the result of operations under autocast, for inputs in float32 and in bfloat16."""
    f, x, target = (
        torch.nn.functional,
        torch.ones(4, 8, device=device),
        torch.zeros(4, dtype=torch.long, device=device),
    )
    operations = {
        "matrix product": lambda x: x @ x.T,
        "attention": lambda x: f.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        "softmax": lambda x: x.softmax(-1),
        "layer norm": lambda x: f.layer_norm(x, (8,)),
        "cross entropy": lambda x: f.cross_entropy(x, target),
        "sum": lambda x: x.sum(),
        "silu": f.silu,
        "x + float32": lambda x: x + torch.ones(8, device=device),
    }
    with torch.autocast(device, torch.bfloat16):
        return pd.DataFrame(
            {
                f"input {name}": {key: str(op(x.to(dtype)).dtype)[6:] for key, op in operations.items()}
                for name, dtype in list(DTYPES.items())[:2]
            }
        )


output_types(model.device.type)

# %% [markdown]
# Products and attention leave in bfloat16, and the loss is computed in float32. What travels from block to block
# differs between the towers: the language model starts from an embedding, which is looked up in float32, so its sums
# and norms stay in float32; the vision tower starts with a convolution, whose result is bfloat16, and stays there.
#
# The lists differ by device: on a CPU a softmax of bfloat16 stays in bfloat16; PyTorch's documentation lists softmax,
# layer norm and sum among those that CUDA's autocast does in float32 (not run here). So autocast is no guarantee that
# a certain line is precise; a norm that matters should convert for itself, as Qwen2-VL's does.
#
# How far does it move the answers? First the logits at the positions of the true answer, against float32. An answer
# changes where the best token is ahead of the second by less than the logits move.


# %%
def answer_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Logits (positions, vocabulary) that predict the labelled tokens, in float32."""
    inputs = {key: tensor.to(model.device) for key, tensor in batch.items() if key != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100].float()


rounded = load_model(MODEL_ID, False, torch.bfloat16).eval()
reference = torch.cat([answer_logits(model, batch) for batch in batches])
with torch.autocast(model.device.type, torch.bfloat16):
    autocast = torch.cat([answer_logits(model, batch) for batch in batches])
versions = {
    "bfloat16 autocast": (autocast, GREEN),
    "bfloat16 weights": (torch.cat([answer_logits(rounded, batch) for batch in batches]), BLUE),
    "float16 weights": (torch.cat([answer_logits(half, batch) for batch in batches]), ORANGE),
}
first, second = reference.topk(2).values.T
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for name, (logits, colour) in versions.items():
    moved = (logits - reference).abs().amax(-1)
    flipped = logits.argmax(-1) != reference.argmax(-1)
    axes.loglog(first - second, moved, ".", color=colour, label=f"{name}: {flipped.sum()} of {len(moved)} changed")
    axes.loglog((first - second)[flipped], moved[flipped], "o", mfc="none", mec=RED, ms=9)
line = np.array(axes.get_xlim())
axes.plot(line, line / 2, color=GREY, ls=":", label="half the lead: below, nothing can change")
axes.set(xlabel="lead of the best token over the second, float32", ylabel="largest change of a logit")
axes.set(title="Each dot a token of a true answer; circled: another token is best")
axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The order is that of the fractions' lengths: float16 moves the logits least, bfloat16 weights and bfloat16 autocast
# several times as far, with three bits less. Only tokens left of the dotted line can change. Does it show in whole
# answers?


# %%
def ask(model: torch.nn.Module, label: str, autocast: bool = False) -> list[str]:
    """Answers about the images of the evaluation split."""
    detector, texts = Detector(model, processor, Task(PROMPT.format(label=label)), max_new_tokens=64), []
    context = torch.autocast(model.device.type, torch.bfloat16) if autocast else nullcontext()
    for first in range(0, len(images), 8):
        with context:
            answers = generate(detector, to_questions(images[first : first + 8], detector))
        texts += [answer.text for answer in answers]
    return texts


def coordinate_shift(one: str, other: str) -> float:
    """Largest difference between the coordinates of two answers, NaN when they do not have the same number."""
    numbers = [[int(n) for n in re.findall(r"\d+", text)] for text in (one, other)]
    same = len(numbers[0]) == len(numbers[1]) > 0
    return max(abs(a - b) for a, b in zip(*numbers, strict=True)) if same else float("nan")


images = [read_row(row)[0] for row in load_rows(DATASET_ID, EVAL_SPLIT, ANSWERS, SEED)]
lines = []
for label in LABELS:
    exact = ask(model, label)
    for name, texts in {
        "bfloat16 autocast": ask(model, label, autocast=True),
        "bfloat16 weights": ask(rounded, label),
    }.items():
        shifts = [coordinate_shift(one, other) for one, other in zip(exact, texts, strict=True)]
        changed = [shift for shift in shifts if shift > 0]
        equal = np.mean([one == other for one, other in zip(exact, texts, strict=True)])
        line = {"asked for": label, "precision": name, "images": len(images), "equal answers": equal}
        lines.append(line | {"median shift of the others": np.median(changed) if changed else 0.0})
del half, rounded
release_memory()
pd.DataFrame(lines).set_index(["asked for", "precision"]).round(2)

# %% [markdown]
# The shift is the largest difference of a coordinate, in thousandths of the image's side, and its median over the
# answers that differ. So "another precision, other answers" is normal and no sign of an error: a greedy answer turns
# at the first token whose lead is too small. What counts is whether the metrics move beyond their intervals, and two
# models are compared in the same precision: the one that will be deployed.
#
# ## 5. The effective batch
#
# An optimiser's step sees `batch size x accumulation x processes` images. Settings that agree in the product take the
# same steps, if the loss is normalised alike:

# %%
settings = pd.DataFrame(
    [(16, 1, 1), (2, 8, 1), (1, 16, 1), (2, 4, 2), (2, 1, 8)], columns=["batch size", "accumulation", "processes"]
)
settings.assign(effective=settings.prod(axis=1))

# %% [markdown]
# The loss is a mean over labelled tokens. If each micro-batch takes the mean over its own tokens, a token in a
# micro-batch of short answers weighs more than one among long answers. To have one mean over all, the Trainer counts
# the labelled tokens of all micro-batches beforehand, over all processes, and hands the model this number as
# `num_items_in_batch`. Below, the gradient of one batch is computed three ways. Half of its answers are made long:
# they hold all the objects of two images.


# %%
def make_micro_batches(collate: AssistantOnlyCollator, first: int) -> list[list[dict]]:
    """Two lists of conversations, the second with answers twice as long."""
    chosen = [examples[(first + number) % len(examples)] for number in range(2 * BATCH_SIZE)]
    short, long = chosen[:BATCH_SIZE], chosen[BATCH_SIZE:]
    for example, other in zip(long, short, strict=True):
        text = example["messages"][-1]["content"][0]
        text["text"] += other["messages"][-1]["content"][0]["text"]
    return [short, long]


def gradients_of(batches: list[dict], items: int | None, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients summed over micro-batches, by area; each loss is a sum over `items`, or the mean over its own."""
    model.zero_grad()
    for batch in batches:
        options = {} if items is None else {"num_items_in_batch": items}
        loss = model(**{key: tensor.to(model.device) for key, tensor in batch.items()}, **options).loss
        (loss * weight).backward()
    areas = {}
    for name, parameter in model.named_parameters():
        areas.setdefault(area_of(name), []).append(parameter.grad.flatten().clone())
    return {area: torch.cat(parts) for area, parts in areas.items()}


short, long = make_micro_batches(collate, 0)
micro_batches = [collate(short), collate(long)]
tokens = [int((batch["labels"] != -100).sum()) for batch in micro_batches]
whole = gradients_of([collate(short + long)], None)
ways = {
    "one mean over all tokens": gradients_of(micro_batches, sum(tokens)),
    "each micro-batch its own mean": gradients_of(micro_batches, None, weight=0.5),
}
print(f"labelled tokens: {tokens[0]} + {tokens[1]} = {sum(tokens)}, which is num_items_in_batch")
differences = pd.DataFrame(
    {
        way: {area: ((g[area] - whole[area]).abs().max() / whole[area].abs().max()).item() for area in whole}
        for way, g in ways.items()
    }
)
differences.map("{:.1e}".format)

# %%
axes = differences.plot.bar(figsize=(8, 3.4), logy=True, rot=0, color=[GREEN, RED], width=0.6)
axes.set(
    ylabel="largest difference /\nlargest gradient", title=f"2 x {BATCH_SIZE} against one batch of {2 * BATCH_SIZE}"
)
axes.axhline(torch.finfo(torch.float32).eps, color=GREY, ls=":", label="spacing of float32 at 1")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.tight_layout()
plt.show()

# %% [markdown]
# With the common count the two agree up to the order of additions in float32; with means of their own they do not.
# The Trainer does it right as long as the loss takes `num_items_in_batch`. A loss of one's own that ignores it brings
# the difference back, without an error.
#
# ## 6. Three ways to use several devices
#
# They are easily mixed up, and they need different settings.


# %%
def draw_layers(axes: plt.Axes, x: float, y: float, layers: str, label: str) -> None:
    """A device as a frame with one slot for each of four layers; a space is an empty slot."""
    axes.add_patch(Rectangle((x, y), 1.5, 2.6, fc="white", ec="black"))
    axes.text(x + 0.75, y - 0.2, label, ha="center", va="top", fontsize=8)
    for place, layer in enumerate(layers):
        if layer != " ":
            axes.add_patch(Rectangle((x + 0.15, y + 0.15 + 0.6 * place), 1.2, 0.5, fc=LIGHT, ec=BLUE))
            axes.text(x + 0.75, y + 0.4 + 0.6 * place, f"layer {layer}", ha="center", va="center", fontsize=8)


DIAGRAMS = {
    "DataParallel": ("1234", "1234", [(0, 4.2)], "one process copies the model\nto every GPU at every step"),
    "sharded (device_map)": ("12  ", "  34", [(0, 4.2)], "one process, one model,\nits layers spread"),
    "DistributedDataParallel": (
        "1234",
        "1234",
        [(0, 1.7), (2.5, 4.2)],
        "a process and a model for each GPU;\ngradients averaged",
    ),
}
figure, grid = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for axes, (title, (left, right, processes, text)) in zip(grid, DIAGRAMS.items(), strict=True):
    draw_layers(axes, 0.1, 0.9, left, "GPU 0")
    draw_layers(axes, 2.6, 0.9, right, "GPU 1")
    for number, (low, high) in enumerate(processes):
        axes.add_patch(Rectangle((low, 0.1), high - low, 3.9, fill=False, ec=ORANGE, ls="--", lw=1.5))
        axes.text((low + high) / 2, 3.7, f"process {number}", ha="center", color=ORANGE, fontsize=8)
    if title != "DataParallel":
        shape = "<->" if len(processes) == 2 else "-|>"
        word = "average" if len(processes) == 2 else "activations"
        axes.annotate("", (2.6, 2.2), (1.6, 2.2), arrowprops={"arrowstyle": shape, "color": RED})
        axes.text(2.1, 1.95, word, ha="center", va="top", fontsize=7, color=RED)
    else:
        axes.annotate("", (2.6, 2.2), (1.6, 2.2), arrowprops={"arrowstyle": "-|>", "color": RED})
        axes.text(2.1, 1.95, "copy", ha="center", va="top", fontsize=7, color=RED)
    axes.set(xlim=(-0.1, 4.3), ylim=(-0.75, 4.1), title=title)
    axes.text(2.1, -0.75, text, ha="center", fontsize=9)
    axes.axis("off")
plt.show()

# %% [markdown]
# **DataParallel** is what the Trainer falls back to when one process sees several GPUs. Nobody asks for it, and it
# copies the model from Python at every step: that breaks 4-bit weights and models whose layers lie on several GPUs.
# The copying itself was not run here, the decision can be: the Trainer is told of four GPUs, and wraps.

# %%
with tempfile.TemporaryDirectory() as folder:
    options = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(folder, **options)
    for gpus in (1, 4):
        arguments._n_gpu = gpus
        wrapped = Trainer(torch.nn.Linear(2, 2), arguments)._wrap_model(torch.nn.Linear(2, 2))
        print(f"{gpus} GPUs seen: {type(wrapped).__name__}, images in a step: {arguments.train_batch_size}")

# %% [markdown]
# The batch has also become four times as large. The story's `create_training_config` therefore sets `_n_gpu` to 1.
#
# **A sharded model** is one model whose layers lie on several devices and run one after the other, each waiting for
# the one before. It is for models that do not fit on one GPU; it is no faster. accelerate decides which layer goes
# where from the sizes and the memory it is given, for which neither weights nor GPUs are needed. Here is the shape of
# Qwen2-VL-7B in bfloat16, for three made-up machines.

# %%
text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
text |= {"num_key_value_heads": 4, "vocab_size": 152064}
text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16}
with torch.device("meta"):
    large = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
large = large.to(torch.bfloat16)
print(f"{large.num_parameters():,} parameters, {large.get_memory_footprint() / 2**30:.1f} GiB in bfloat16")

MACHINES = {
    "1 x 24 GiB": {0: "24GiB", "cpu": "64GiB"},
    "2 x 10 GiB": {0: "10GiB", 1: "10GiB", "cpu": "64GiB"},
    "2 x 6 GiB": {0: "6GiB", 1: "6GiB", "cpu": "64GiB"},
}
names = [f"model.visual.blocks.{n}" for n in range(32)] + ["model.visual.merger", "model.language_model.embed_tokens"]
names += [f"model.language_model.layers.{n}" for n in range(28)] + ["lm_head"]
device_colours = {0: BLUE, 1: ORANGE, "cpu": RED}
figure, axes = plt.subplots(figsize=(12, 2.8), layout="constrained")
for line, memory in enumerate(MACHINES.values()):
    placed = infer_auto_device_map(large, memory, no_split_module_classes=list(large._no_split_modules))
    for place, name in enumerate(names):
        device = next(
            device for prefix, device in placed.items() if f"{name}.".startswith(f"{prefix}." if prefix else "")
        )
        axes.add_patch(Rectangle((place, line - 0.35), 1, 0.7, fc=device_colours[device], ec="white", lw=0.5))
axes.set(xlim=(-0.5, len(names) + 0.5), ylim=(len(MACHINES) - 0.4, -0.6))
axes.set_yticks(range(len(MACHINES)), list(MACHINES))
axes.set_xticks([16, 32.5, 48, 62.5], ["32 vision blocks", "merger,\nembeddings", "28 language layers", "lm_head"])
axes.tick_params(length=0)
for device, colour in device_colours.items():
    axes.plot([], [], "s", color=colour, label="CPU" if device == "cpu" else f"GPU {device}")
figure.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# The last row is the trap of `device_map="auto"`: where the GPUs do not suffice, layers go to the CPU, and everything
# still works, only many times more slowly (the speed was not measured here). The check is
# `set(model.hf_device_map.values())`.
#
# **DistributedDataParallel** starts one process per GPU (`torchrun`), each with a whole model and its own part of the
# batch. After the backward pass the gradients are averaged, so all take the same step. This works between CPU
# processes too. The function below makes two steps. It runs in a script with two processes, each with one micro-batch
# a step, and here, in one process that accumulates both.


# %%
def make_two_steps(model, steps, rank, processes):
    """Two steps of AdamW; returns gradients and weights, flat. `model` is wrapped if there are several processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    own, averaged, saved = "gradients of its own part", "gradients after averaging", {}
    contexts = {own: model.no_sync if processes > 1 else nullcontext, averaged: nullcontext}
    for step, batches in enumerate(steps):
        items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        mine = batches[rank::processes]
        for name, context in contexts.items():  # first without exchange, to look at; then with it
            optimizer.zero_grad()
            for batch in mine:
                with context():
                    loss = model(**batch, num_items_in_batch=items).loss
                    (loss * processes).backward()  # gradients are averaged over processes, the loss is to be summed
            if step == 0:
                saved[name] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        optimizer.step()
    saved[own] /= processes
    return saved | {"weights after two steps": torch.cat([p.detach().flatten() for p in model.parameters()])}


SCRIPT = """
import sys
from contextlib import nullcontext
import torch
from transformers import Qwen2VLForConditionalGeneration

{function}

folder, model_id = sys.argv[1:]
torch.distributed.init_process_group("gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = Qwen2VLForConditionalGeneration.from_pretrained(model_id, dtype=torch.float32).train()
model = torch.nn.parallel.DistributedDataParallel(model)
torch.save(make_two_steps(model, torch.load(f"{{folder}}/steps.pt"), rank, processes), f"{{folder}}/{{rank}}.pt")
torch.distributed.destroy_process_group()
"""

# %%
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
small_collate = AssistantOnlyCollator(load_processor(PROCESSES_MODEL_ID, MAX_PIXELS))
steps = [[small_collate(part) for part in make_micro_batches(small_collate, first)] for first in (0, BATCH_SIZE)]
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "two_steps.py").write_text(SCRIPT.format(function=inspect.getsource(make_two_steps)))
    torch.save(steps, f"{folder}/steps.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*COMMAND, f"{folder}/two_steps.py", folder, PROCESSES_MODEL_ID]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    first, second = (torch.load(f"{folder}/{rank}.pt") for rank in (0, 1))

threads = torch.get_num_threads()
torch.set_num_threads(1)  # as in the two processes, so that sums are taken in the same order
small = Qwen2VLForConditionalGeneration.from_pretrained(PROCESSES_MODEL_ID, dtype=torch.float32).train()
one = make_two_steps(small, steps, rank=0, processes=1)
torch.set_num_threads(threads)
pd.DataFrame(
    {
        "process 0 against process 1": {key: (first[key] - second[key]).abs().max().item() for key in first},
        "two processes against one": {key: (first[key] - one[key]).abs().max().item() for key in first},
        "largest value": {key: one[key].abs().max().item() for key in first},
    }
).map("{:.2e}".format)

# %% [markdown]
# Columns one and two hold the largest difference. The processes see different images, so their own gradients differ;
# after averaging they agree, and so do the weights after two steps, between the two processes and with the single one.
# Note the factor `processes` in the function: because gradients are averaged, a loss that is divided by the token
# count of all processes has to be multiplied by their number, or the gradient comes out too small by that factor. The
# Trainer does so.
#
# In practice: `torchrun --nproc-per-node 2 -m helpers.train_recipe ...` starts one process per GPU, and the story's
# `choose_device_map` then puts the whole model on the GPU of its process. Neither a GPU nor more than one machine was
# used here.
#
# ## 7. From the symptom to the cause
#
# Some of the errors can be provoked in a line or two:


# %%
def provoke(cause) -> str:
    """What a faulty piece of code raises or returns, as one line."""
    try:
        return str(cause())
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def scale_half_weights():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.step(torch.optim.AdamW([weight]))


nothing_labelled = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
nothing_labelled = {key: tensor.to(model.device) for key, tensor in nothing_labelled.items()}
mask = torch.tensor([-1e9, -1e9])
causes = {
    "no token of the batch has a label": lambda: model(**nothing_labelled).loss.item(),
    "softmax over -1e9, all masked, float32": lambda: mask.softmax(-1).tolist(),
    "softmax over -1e9, all masked, float16": lambda: mask.half().softmax(-1).tolist(),
    "float32 input, bfloat16 weights": lambda: torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.bfloat16),
    "tensors on two devices": lambda: torch.ones(2) + torch.ones(2, device="meta"),
    "float16 weights, GradScaler": scale_half_weights,
}
pd.DataFrame({"result": {name: provoke(cause) for name, cause in causes.items()}}).style

# %% [markdown]
# And one that raises nothing: a tower that is marked as trained, but runs under `no_grad`, as the story's
# `apply_freeze_policy` arranges for frozen ones.

# %%
apply_freeze_policy(model, R1)
model.requires_grad_(True)  # the tower's forward still builds no graph
model.zero_grad()
loss = model.train()(**{key: tensor.to(model.device) for key, tensor in batches[0].items()}).loss
loss.backward()
without = pd.DataFrame(
    [(area_of(name), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
    columns=["area", "requires gradient", "has none"],
)
print(f"loss {loss.item():.3f}")
without.groupby("area").mean()

# %% [markdown]
# The loss is an ordinary number, and a whole area gets no gradient. The story's trainer logs gradient norms by area
# and stops where one is zero.
#
# The list, with rows marked * that were not run here because they need a GPU:
#
# | symptom | likely cause | check | remedy |
# |---|---|---|---|
# | loss `nan` at once | no labelled token | `(labels != -100).sum(1)` | mend the collator |
# | `nan` later, float16 | overflow | hooks of section 3 | bfloat16 |
# | `nan` later, else | learning rate too high | gradient norm just before | lower rate, warm-up |
# | loss does not move | nothing trained, or rate 0 | trainable count, logged rate | freezing, LoRA pattern |
# | weights do not move | steps rounded away | dtype, share that changed | `p.data = p.data.float()` |
# | tower without gradient | `no_grad`, or LoRA misses it | gradient norm by area | unfreeze, mend the pattern |
# | float16 steps skipped on and on | infinite gradients | `scaler.get_scale()` | bfloat16, find the overflow |
# | `Attempting to unscale FP16 gradients` | weights stored in float16 | their dtype | float32 and autocast |
# | `expected ... to have the same dtype` | float32 pixels, 16-bit model | both dtypes | `x.to(model.dtype)` |
# | other losses with another accumulation | a mean for each micro-batch | section 5 | `num_items_in_batch` |
# | `Expected all tensors to be on the same device` * | inputs elsewhere | `x.device` | `x.to(model.device)` |
# | errors of `DataParallel` or its replicas * | one process, several GPUs | `type(model)` | `torchrun`, one GPU |
# | 4-bit model refused under `torchrun` * | `device_map="auto"` | `hf_device_map` | `{"": local_rank}` |
# | GPU slow, memory double * | float32 without autocast | dtypes of the weights | `dtype=torch.bfloat16` |
# | GPU idle * | layers on the CPU, slow loader | `hf_device_map`, time of a batch | smaller model, workers |
#
# ## What to keep
#
# - Weights that are trained are stored in float32; 16 bits are for computing and for what is frozen.
# - bfloat16 loses digits, float16 loses range: the one needs care with small steps, the other a scaled loss.
# - A step is defined by the images and the labelled tokens behind it, however they are cut into micro-batches.
# - One process with several GPUs shards a model, several processes copy it, and DataParallel is to be avoided.
#
# ## What to try next
#
# 1. Add `3e-6` to `LEARNING_RATES`, the sort of rate used for full fine-tuning. Predict the column "could move in 1
#    step" with the spacing plot first.
# 2. Set `STEPS` to 60. Does the share of vision weights that moved in bfloat16 grow, and by which weights: the small
#    or the large ones?
# 3. Replace AdamW in section 2 by SGD. Which part of the prediction is lost?
# 4. Point `MODEL_ID` at a real Qwen2-VL and draw section 3's first plot again: how close do its activations come to
#    65,504?
# 5. Read on in `06_quantization_and_trainable_params`: what four bits do to frozen weights.
