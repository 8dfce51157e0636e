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
# # Fine-tuning a vision-language model for object detection with TRL
#
# A vision-language model reads an image and writes text. If the text says where things are, the model is a detector.
# This notebook takes Qwen2-VL, asks it for the nutrition tables on images of food packages, measures how well it does,
# fine-tunes it in four ways with TRL, PEFT and bitsandbytes, measures again on images it has not seen, and packs the
# best result for use. Everything it needs is defined here, in the order in which it is used.
#
# > **What the outputs below are.** The settings default to the real thing: `Qwen/Qwen2-VL-7B-Instruct` and about a
# > thousand photographs from Open Food Facts. The outputs that you see were made with something else, so that they can
# > be repeated on two CPU cores without a GPU (`make demo`), and so that a test can check that they belong to this
# > code:
# >
# > - The model is a Qwen2-VL of **6 million** parameters in place of 7 billion. It was made for this repository:
# >   pretrained from nothing on drawn food packages, to find eight kinds of objects. It was never asked for the box of
# >   a nutrition table, so that there is something left to teach. Its vision tower was shown some tables during that
# >   pretraining, and its language model knows what they are called.
# > - The images are **drawings** of packages, 2,400 to train on and 128 to evaluate on.
# > - The learning rates were chosen while looking at these 128 images, which flatters all recipes a little.
# >
# > So **no accuracy shown below is that of a 7B model**, and the ranking of the recipes need not carry over: on 123
# > photographs of real packages, which are not in this repository, the recipes of an earlier version of this demo came
# > out within the noise of each other.
# > What does carry over is the road, every check on it, and the code. Figures measured on a 7B-sized model say so
# > where they stand. What others reached with real weights on the real photographs is quoted in section 15.
#
# What you need to know: PyTorch, and what a transformer is. What you will have at the end: a detector, its measured
# quality with intervals, and an idea of which checks keep such a result honest. Nine topic notebooks beside this one
# go deeper where a section says so; none of them is needed to follow it.

# %% [markdown]
# ## 1. Settings
#
# The next cell holds every setting. papermill can replace each of them from a command line (`papermill in.ipynb
# out.ipynb -p MAX_STEPS 50`), and so can `python -m helpers.train_recipe --max-steps 50`, which runs the same code in
# batch. Three of them decide what a run costs:
#
# - `MODEL_ID` and `RECIPES` decide how much memory it takes: with the 7B model r1 and r4 fit into 24 GB, r2 and with
#   it r3 take 28 GiB (section 7 has the table; `notebooks/06_quantization_and_trainable_params` estimates other
#   sizes).
# - `MAX_PIXELS` decides how many tokens an image is, and with it time and memory of every step.
# - `BATCH_SIZE` images make one step of the optimiser: that matters for what is learned. How many of them are computed
#   at once does not; it follows from the free memory (section 10).

# %% tags=["parameters"]
MODEL_ID = "Qwen/Qwen2-VL-7B-Instruct"  # hub id or folder
DATASET_ID = "openfoodfacts/nutrition-table-detection"  # hub id or folder
LABELS = None  # what to detect, such as "barcode, logo"; None: every label of the training split
SYSTEM_MESSAGE = None  # what the model is told before the question; None: that of section 4
QUESTION = None  # None: asks for the labels, in the words of section 4
TRAIN_SPLIT = "train"
EVAL_SPLIT = "val"
OUTPUT_DIR = "outputs/qwen2-vl-7b"
RECIPES = ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]  # what to train, in this order
NUM_EPOCHS = 3
MAX_STEPS = -1  # optimiser steps; -1: NUM_EPOCHS decides
COLLATOR_STEPS = 100  # optimiser steps of each of the two runs that compare collators; 0 leaves them out
TRAIN_SAMPLES = None  # None: all images of the split
EVAL_SAMPLES = None  # None: all images of the split
VALIDATION_SAMPLES = 64  # images of the training split that are held back to choose checkpoints with
EVALUATIONS = 4  # of each run on these images, at equal distances, besides the one before the first step
MAX_PIXELS = 1003520  # an image costs at most this many pixels; 28 * 28 of them make one token, so 1,280 tokens
BATCH_SIZE = 16  # images of one optimiser step
MICRO_BATCH_SIZE = None  # images that are computed at once; None: what fits into the free memory
GRADIENT_CHECKPOINTING = None  # less memory, more time: activations are computed twice; None: where memory is short
COMPILE = None  # layers become fused kernels, which takes half a minute; None: on GPUs
PRECISION = None  # of the frozen language model under LoRA: "bf16", "nf4" or "fp8"; None: the recipe's own
CACHE_FEATURES = True  # a frozen vision tower sees each image once; 9 MB of disk for an image of 1,280 tokens at 7B
LORA_RANK = None  # of all adapters, with an alpha of twice that; None: the recipe's own, 64
LEARNING_RATES = {}  # recipe -> peak learning rate, where it is not to be the recipe's own
FLIP_PROBABILITY = 0.0  # mirror training images with their boxes: worth its mirrored letters when data are few
EVAL_BATCH_SIZE = None  # images asked about at once; None: what fits into the free memory
MAX_NEW_TOKENS = 256  # one box takes 23 tokens, so an answer has room for ten objects
SEED = 42
AGAIN = False  # train anew what OUTPUT_DIR holds already; else what has ended is skipped, and the rest goes on
REPORT_TO = "tensorboard"  # or "wandb", "trackio", "none"
PUSH_TO_HUB = ""  # hub id to push the best model to, such as "me/nutrition-table-detector"; empty: nothing is pushed

DEFAULTS = {name: value for name, value in globals().items() if name.isupper()}

# %% [markdown]
# On Colab the packages are installed here; elsewhere they come from `requirements.txt`.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:
    packages = ["transformers>=5.17,<5.24", "trl>=1.16,<1.17", "peft>=0.21,<0.22", "bitsandbytes>=0.50,<0.51"]
    packages += ["datasets>=5.2,<5.3"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"], check=True)  # too old for PEFT

# %%
import ctypes
import gc
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

# when imported on a CPU it asks for an optional package that would download kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else its threads warn of every fork of a data loader

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import safetensors.torch
import torch
import xxhash
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi, ModelCard, ModelCardData
from IPython.display import Image as DisplayImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import ExifTags, Image, ImageOps
from scipy.optimize import linear_sum_assignment
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils._triton import has_triton
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers import BitsAndBytesConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PrinterCallback
from transformers import ProcessorMixin, ProgressCallback
from transformers.integrations import TensorBoardCallback
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures as VisionOutput
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

# TRL 1.16 itself uses the old name; the new one does not exist in all versions allowed here
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)

# %%
#| export loading: Model and processor, in 4 bits or not; precision and memory.
PACKAGES = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"]  # whose versions a result depends on

# %%
pd.Series({package: importlib.metadata.version(package) for package in PACKAGES}).to_frame("version").T

# %% [markdown]
# From here on `settings` holds the settings of this run under their names in lower case. What is passed on together
# becomes one value, made once: the settings here, later the splits of the data, the detector, and the folder that a
# run leaves.
#
# The precision follows from the hardware: bfloat16 where the GPU has it, float16 on older ones such as a T4, float32
# on a CPU. The table shows it, and below it every setting that was not left at its default, with that default beside
# it.


# %%
#| export loading
def best_dtype() -> torch.dtype:
    """bfloat16 where the GPU computes in it (emulation does not count), float16 on other GPUs, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# %%
settings = SimpleNamespace(**{name.lower(): globals()[name] for name in DEFAULTS})
if isinstance(settings.recipes, str):  # papermill's -p hands a list over as text
    settings.recipes = re.findall(r"[\w-]+", settings.recipes)
output_dir = Path(settings.output_dir)
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
device = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else f"CPU, {os.cpu_count()} cores"
changed = {name: [globals()[name], default] for name, default in DEFAULTS.items() if globals()[name] != default}
rows = {"device": [device, ""], "dtype": [best_dtype(), ""]} | changed
pd.DataFrame.from_dict(rows, orient="index", columns=["this run", "default"]).astype(str)

# %% [markdown]
# What cannot be meant stops here, before anything is loaded, and all of it at once: a word in place of a number, a
# misspelt recipe, numbers of steps or images that train nothing.


# %%
#| export settings: One check of all settings, before anything is loaded.
def is_text(value: object) -> bool:
    """Whether a value is a text or a path that says something."""
    return isinstance(value, str | Path) and bool(str(value).strip()) and "\0" not in str(value)


def is_number(value: object, lowest: float, highest: float, kinds=(int, float, str)) -> bool:
    """Whether a value is a number from `lowest` to `highest`, or the text that YAML takes 1e-3 for; True is none."""
    try:
        return type(value) in kinds and lowest <= float(value) <= highest
    except (OverflowError, ValueError):
        return False


def is_count(value: object, lowest: int = 1, highest: int = 10**9) -> bool:
    """Whether a value is a whole number from `lowest` to `highest`."""
    return is_number(value, lowest, highest, (int,))


COUNT = "a whole number above 0"
TRACKERS = ["tensorboard", "wandb", "trackio", "none"]
RULES = [  # settings, with ? where None is right as well; what they have to be; how that is told
    ("MODEL_ID DATASET_ID OUTPUT_DIR TRAIN_SPLIT EVAL_SPLIT SYSTEM_MESSAGE? QUESTION?", "a text", is_text),
    (
        "LABELS?",
        "a text such as 'barcode, logo'",
        lambda v: v != [] and all(map(is_text, v if isinstance(v, list) else [v])),
    ),
    ("TRAIN_SAMPLES? EVAL_SAMPLES? VALIDATION_SAMPLES EVALUATIONS MAX_PIXELS MAX_NEW_TOKENS", COUNT, is_count),
    ("BATCH_SIZE MICRO_BATCH_SIZE? EVAL_BATCH_SIZE? LORA_RANK?", COUNT, is_count),
    ("MAX_STEPS", f"{COUNT}, or -1", lambda v: is_count(v, -1) and v != 0),
    ("COLLATOR_STEPS", "a whole number, 0 or above", lambda v: is_count(v, 0)),
    ("SEED", "a whole number from 0 to 4294967295", lambda v: is_count(v, 0, 2**32 - 1)),
    ("NUM_EPOCHS", "a number above 0", lambda v: is_number(v, 1e-6, 1e6, (int, float))),
    ("FLIP_PROBABILITY", "a number from 0 to 1", lambda v: is_number(v, 0, 1, (int, float))),
    ("AGAIN CACHE_FEATURES COMPILE? GRADIENT_CHECKPOINTING?", "True or False", lambda v: isinstance(v, bool)),
    ("PRECISION?", "one of 'bf16', 'nf4', 'fp8'", lambda v: v in ["bf16", "nf4", "fp8"]),
    ("REPORT_TO", f"one of {TRACKERS}", lambda v: v in TRACKERS),
    ("PUSH_TO_HUB", "a hub id such as 'me/detector', or ''", lambda v: re.fullmatch(r"([\w.-]+/)?[\w.-]*", str(v))),
]


# %%
#| export settings
def check_settings(settings: SimpleNamespace, recipes: Sequence[str]) -> None:
    """Raise ValueError with a line for each setting that cannot be meant; `recipes` are the names that there are."""

    def are_recipes(value: object) -> bool:
        return isinstance(value, list) and all(name in recipes and value.count(name) == 1 for name in value)

    given, problems = {name.upper(): value for name, value in vars(settings).items()}, []
    if isinstance(rates := given.get("LEARNING_RATES"), dict):  # those that are wrong
        is_wrong = {name: name not in recipes or not is_number(rate, 1e-12, 0.999) for name, rate in rates.items()}
        given["LEARNING_RATES"] = {name: rate for name, rate in rates.items() if is_wrong[name]}
    known = ", ".join(recipes)
    rules = [*RULES, ("RECIPES", f"a list out of {known}, each once", lambda v: v and are_recipes(v))]
    rules.append(("LEARNING_RATES", f"numbers between 0 and 1, by recipe: {known}", lambda v: v == {}))
    for name, words, is_right in ((name, *rule) for names, *rule in rules for name in names.split()):
        optional, name = name.endswith("?"), name.rstrip("?")
        if name in given and not (optional and given[name] is None) and not is_right(given[name]):
            problems.append(f"{name}={given[name]!r:.110}: give {words}{', or None' if optional else ''}.")
    if is_text(split := given.get("TRAIN_SPLIT")) and split == given.get("EVAL_SPLIT"):
        problems.append(f"TRAIN_SPLIT and EVAL_SPLIT are both {split!r}: evaluate on images that are not trained on.")
    if problems:
        raise ValueError("\n".join(problems))


# %%
check_settings(settings, DEFAULTS["RECIPES"])

# %% [markdown]
# The road again, drawn. The upper row is training, the lower one is using what was trained. Each arrow is one function
# below; a box changes its coordinates in exactly one place each way.


# %%
#| export plots: Images with boxes, diagrams, curves and comparisons.
BLUE = "#4575b4"
ORANGE = "#f28e2b"
LIGHT = "#e8eef6"
TRUTH_COLOUR = "#1a9850"
PREDICTION_COLOUR = "#d73027"


def plot_steps(rows: Sequence[Sequence[str]]) -> plt.Figure:
    """Rows of texts in boxes, joined by arrows from left to right."""
    figure, axes = plt.subplots(figsize=(13, 1.2 * len(rows)), layout="constrained")
    style = {"ha": "center", "va": "center", "fontsize": 9}
    style["bbox"] = {"boxstyle": "round,pad=0.6", "fc": LIGHT, "ec": BLUE}
    for y, texts in enumerate(rows):
        drawn = [axes.text(x, -y, text, **style) for x, text in enumerate(texts)]
        for x, patches in enumerate(pairwise(text.get_bbox_patch() for text in drawn)):
            ends = dict(zip(("patchA", "patchB"), patches, strict=True))
            axes.annotate("", (x + 1, -y), (x, -y), arrowprops={"arrowstyle": "-|>"} | ends)
    axes.set(xlim=(-0.5, max(map(len, rows)) - 0.5), ylim=(0.5 - len(rows), 0.5))
    axes.axis("off")
    return figure


# %%
training = [
    "DATASET ROW\nboxes [y_min, x_min,\ny_max, x_max] in 0..1",
    "UPRIGHT IMAGE\nboxes [x1, y1, x2, y2]\nin pixels",
]
training += ["CONVERSATION\nquestion and answer,\nboxes as text, 0..1000", "COLLATOR\ntoken ids, patches,\nlabels"]
use = ["GENERATE\ntext, probability\nof each token", "PARSE\nlabels, pixel boxes,\nscores"]
use += ["MATCH\neach true box with\none predicted box", "METRICS\nintervals, paired\ncomparisons"]
plot_steps([[*training, "SFTTrainer\nadapter or weights\non disk"], [*use, "DEPLOY\nmerged weights,\nprompt, card"]])
plt.show()

# %% [markdown]
# ## 2. The data
#
# What is in the dataset, and can all of it be used? The dataset has one row per image. `objects` holds the boxes, each
# `[y_min, x_min, y_max, x_max]` as a fraction of the image's height and width, and their category names.
#
# People point notebooks at their own data, so the first thing is to look for what would fail an hour later, or worse,
# would not fail: a missing column stops here with a message; a row whose image cannot be decoded or whose box is
# impossible is counted, named and left out.


# %%
#| export data: Rows of a dataset: loading, checking, splitting, reading.
def load_rows(dataset_id: str, split: str, samples: int | None, seed: int) -> Dataset:
    """Load `samples` random rows (all when None) of one split from a hub id or a local folder.

    Raises FileNotFoundError when the dataset cannot be found and ValueError when it is not a detection dataset of the
    expected form; both messages say what to do.
    """
    dataset = open_dataset(dataset_id)
    if split not in dataset:
        raise ValueError(f"{dataset_id} has no split {split!r}, only {list(dataset)}: set TRAIN_SPLIT / EVAL_SPLIT.")
    rows = dataset[split]
    check_columns(rows, dataset_id)
    return rows if samples is None else rows.shuffle(seed=seed).select(range(min(samples, len(rows))))


def open_dataset(dataset_id: str) -> DatasetDict:
    """`load_dataset` whose error says what to do. Raises FileNotFoundError."""
    try:
        return load_dataset(dataset_id)
    except (FileNotFoundError, ConnectionError) as error:
        where = f"neither a folder below {Path.cwd()} nor, as far as the network tells, on the hub"
        remedy = "Set DATASET_ID to one (`python -m helpers.tiny.packages outputs/tiny_dataset` draws a tiny one)."
        raise FileNotFoundError(f"No dataset {dataset_id!r}: {where}. {remedy}") from error
    except DatasetGenerationError as error:
        remedy = "Convert COCO, YOLO or VOC with `python -m helpers.import_dataset`"
        raise ValueError(f"{dataset_id} cannot be read as rows of a dataset. {remedy}.") from error


def check_columns(rows: Dataset, dataset_id: str) -> None:
    """Raise ValueError unless `rows` has the columns image_id, image and objects{bbox, category_name}."""
    wanted = {"image_id", "image", "objects.bbox", "objects.category_name"}
    if missing := ", ".join(sorted(wanted - set(rows.flatten().column_names))):
        present = ", ".join(rows.column_names)
        remedy = "Rename its columns as in openfoodfacts/nutrition-table-detection, or convert COCO, YOLO or VOC"
        remedy += " with `python -m helpers.import_dataset`"
        raise ValueError(f"{dataset_id} has no column {missing} (it has {present}). {remedy}.")


# %%
#| export data
def drop_bad_rows(rows: Dataset) -> Dataset:
    """The rows that can be used; the others are printed. Raises ValueError when none is left.

    Large datasets are checked by several processes; `datasets` remembers what was found of the same rows.
    """
    raw, workers = rows.cast_column("image", ImageFeature(decode=False)), min(os.cpu_count(), len(rows) // 5000)
    find = {"function": find_problem, "remove_columns": raw.column_names, "desc": "checking rows"}
    problems = raw.map(**find, num_proc=workers if workers > 1 else None)["problem"] if len(rows) else []
    kept = [number for number, problem in enumerate(problems) if not problem]
    for image_id, problem in zip(rows["image_id"], problems, strict=True) if len(kept) < len(rows) else []:
        if problem:
            print(f"left out: {image_id}: {problem}")
    print(f"{len(kept)} of {len(rows)} rows are usable")
    if not kept:
        raise ValueError("No usable row is left: mend the rows listed above, or set DATASET_ID to another dataset.")
    return rows.select(kept)


LARGEST_RATIO = 200  # of the sides of an image, beyond which Qwen's processors raise an error


def find_problem(row: dict) -> dict[str, str]:
    """`describe_problem` as a column of a dataset, empty where there is none."""
    return {"problem": describe_problem(row) or ""}


def describe_problem(row: dict) -> str | None:
    """Why a row with an undecoded image (`{"bytes", "path"}`) cannot be used, or None."""
    if problem := describe_objects_problem(row["objects"]):
        return problem
    try:
        image = open_encoded(row["image"])
        size = image.size
        image.draft("RGB", (256, 256))  # a JPEG is read to its end, but unpacked at a fraction of its size: faster
        ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds of them
        return f"image cannot be decoded ({type(error).__name__})" if row["image"] else "there is no image"
    if image.mode == "F":
        return "the image is in floating point: save it in 8 or 16 bits"
    if max(size) > LARGEST_RATIO * min(size):
        return f"one side of {size[0]} x {size[1]} pixels is more than {LARGEST_RATIO} times the other"
    return None


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """An image as it is displayed, 8 bits a colour; of 16 bits the upper 8 are kept, where Pillow makes most white."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 256).astype(np.uint8))
    return upright.convert("RGB")


def describe_objects_problem(objects: dict[str, list]) -> str | None:
    """What is wrong with the boxes and labels of a row, or None."""
    boxes, labels = (objects or {}).get("bbox"), (objects or {}).get("category_name", [])
    if boxes is None or labels is None:
        return "there are no objects: give empty lists for an image that has none"
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            return f"box {box} is not four numbers"
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            return f"box {box} is not 0 <= min < max <= 1"
    if wrong := [v for v in labels if not isinstance(v, str) or not v.strip() or re.search(r"[<{}\x00-\x1f]", v)]:
        return f"label {wrong[0]!r} is not a text, or holds <, braces or a line break, which would not be read back"
    return None if len(labels) == len(boxes) else f"{len(boxes)} boxes, but {len(labels)} labels"


def open_encoded(encoded: dict) -> Image.Image:
    """Open an undecoded image; only its header is read until its pixels are asked for."""
    return Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"]))


# %%
print(describe_problem({"objects": {"bbox": [[0.2, 0.5, 0.1, 0.9]]}}))

# %% [markdown]
# Such a row is printed with its id and the sentence above, and the others go on.
#
# Two photographs of one package, one in each split, would turn the evaluation into a test of memory. So training
# images that share a barcode with an evaluation image are left out. A part of the rest, again by barcode, is held back
# as the validation split, on which checkpoints are chosen: the evaluation split is for the final table only.
#
# What is to be found are the labels of the training split, or those of them that `LABELS` names. An image that shows
# none of them stays: it teaches, and tests, that there may be nothing to find. (Pictures of your own with boxes in
# COCO, YOLO or Pascal VOC format become such a dataset with `python -m helpers.import_dataset`.)


# %%
#| export data
@dataclass(frozen=True)
class Splits:
    """The rows to train on, to choose checkpoints with, and to evaluate the result on; the labels of their boxes."""

    train: Dataset
    validation: Dataset
    evaluation: Dataset
    labels: tuple[str, ...]


def load_splits(settings: SimpleNamespace) -> Splits:
    """Load, check and split the dataset of the settings, no barcode in two splits; bad rows are printed and left out.

    Raises FileNotFoundError and ValueError that say what to do.
    """
    s = settings
    usable = drop_bad_rows(load_rows(s.dataset_id, s.train_split, s.train_samples, s.seed))
    labels = choose_labels(usable, s.labels)
    usable = keep_labels(usable, labels)
    evaluation = drop_bad_rows(load_rows(s.dataset_id, s.eval_split, s.eval_samples, s.seed))
    evaluation = keep_labels(evaluation, labels)
    train, validation = hold_back(drop_shared_barcodes(usable, evaluation), s.validation_samples, s.seed)
    print(f"{len(train)} images to train on, {len(validation)} for validation, {len(evaluation)} to evaluate on")
    return Splits(train, validation, evaluation, labels)


def choose_labels(rows: Dataset, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """The labels of the rows, in alphabetical order, or those that are wanted. Raises ValueError for others."""
    known = sorted({label for objects in rows["objects"] for label in objects["category_name"]})
    labels = re.split(r"\s*,\s*", wanted.strip()) if isinstance(wanted, str) else list(wanted or known)
    if not labels or not set(labels) <= set(known):
        raise ValueError(f"LABELS={wanted!r}: choose from those of the training split, {known}.")
    return tuple(labels)


def keep_labels(rows: Dataset, labels: Sequence[str]) -> Dataset:
    """Rows without boxes of other labels; an image may have none left. Says how many boxes of which are left out."""
    others = pd.Series([label for row in rows["objects"] for label in row["category_name"] if label not in labels])
    if others.empty:
        return rows
    print("boxes left out:", ", ".join(f"{count} {label}" for label, count in others.value_counts().items()))

    def keep(objects: dict[str, list]) -> dict[str, dict[str, list]]:
        kept = [number for number, label in enumerate(objects["category_name"]) if label in labels]
        return {"objects": {name: [values[number] for number in kept] for name, values in objects.items()}}

    return rows.map(keep, input_columns="objects")


# %% [markdown]
# Barcodes stand in the column `meta`, where a dataset has one; an image without a barcode is a package of its own. The
# order in which they are held back follows from `SEED`, so that the same settings give the same three sets, and a run
# that goes on trains on the same images as before.


# %%
#| export data
def read_barcode(meta: object) -> str | None:
    """The barcode in what is known of an image, None where there is none."""
    return (meta.get("barcode") or None) if isinstance(meta, dict) else None


def read_barcodes(rows: Dataset) -> list[str | None]:
    """The barcode of every row, None where the dataset gives none."""
    return [read_barcode(meta) for meta in (rows["meta"] if "meta" in rows.column_names else [None] * len(rows))]


def drop_shared_barcodes(rows: Dataset, others: Dataset) -> Dataset:
    """`rows` without the packages that are in `others` too; says how many were left out."""
    seen = set(read_barcodes(others)) - {None}
    kept = [number for number, barcode in enumerate(read_barcodes(rows)) if barcode not in seen]
    print(f"{len(rows) - len(kept)} training images show a package of the evaluation split: left out")
    return rows.select(kept)


def hold_back(rows: Dataset, samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows in two, about `samples` in the second one, all images of a barcode on the same side.

    Raises ValueError when one of the two would be empty.
    """
    groups = [barcode or number for number, barcode in enumerate(read_barcodes(rows))]
    order = np.random.default_rng(seed).permutation(len(rows))
    held = {groups[number] for number in order[:samples]}
    back = [number for number, group in enumerate(groups) if group in held]
    if not 0 < len(back) < len(rows):
        remedy = "hold back at least 1 image, by which checkpoints are chosen, and leave some to train on"
        raise ValueError(f"VALIDATION_SAMPLES={samples} of {len(rows)} rows: {remedy}.")
    return rows.select([number for number, group in enumerate(groups) if group not in held]), rows.select(back)


# %%
splits = load_splits(settings)
splits.train

# %% [markdown]
# Phones store images as the sensor saw them, with a note (EXIF orientation) on how to turn them for display. The boxes
# refer to the image as displayed, so it is turned first and the note is dropped; otherwise boxes and pixels no longer
# fit together. From here on a box is `[x1, y1, x2, y2]` in pixels of the upright image: `read_row` is the only place
# where the dataset's own convention is read.


# %%
#| export data
def read_row(row: dict) -> tuple[Image.Image, list[list[float]], list[str]]:
    """A dataset row as upright RGB image, its boxes `[x1, y1, x2, y2]` in pixels, and their labels."""
    image = to_upright_rgb(row["image"])
    fractions = np.reshape(row["objects"]["bbox"], (-1, 4))[:, [1, 0, 3, 2]]
    return image, (fractions * (image.size * 2)).tolist(), list(row["objects"]["category_name"])


# %%
#| export plots
def draw_boxes(axes: plt.Axes, boxes: Iterable[Sequence[float]], colour: str, linestyle: str) -> None:
    """Outline boxes `[x1, y1, x2, y2]` (pixels) on an image."""
    for x1, y1, x2, y2 in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=3.5, alpha=0.6))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2, ls=linestyle))


def plot_images(images: Sequence[Image.Image], truths, predictions=None, titles=None, columns: int = 4) -> plt.Figure:
    """A grid of images, their true boxes (dashed), and if given predicted boxes (solid) and titles, one list each.

    Boxes are `[x1, y1, x2, y2]` in pixels.
    """
    lines = math.ceil(len(images) / columns)
    size = (3.4 * columns, 3.7 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    kinds = {"truth": (truths, TRUTH_COLOUR, "--"), "prediction": (predictions, PREDICTION_COLOUR, "-")}
    kinds = {name: kind for name, kind in kinds.items() if kind[0] is not None}
    for number, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(image)
        axes.set_title(titles[number] if titles is not None else "", fontsize=10, parse_math=False)
        for boxes, colour, linestyle in kinds.values():
            draw_boxes(axes, boxes[number], colour, linestyle)
    for axes in grid.flat:
        axes.axis("off")
    handles = [Line2D([], [], color=colour, ls=style, lw=2, label=name) for name, (_, colour, style) in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def to_jpeg(figure: plt.Figure, dpi: int = 110) -> DisplayImage:
    """The figure for display as JPEG, which takes a fifth of the space of PNG where there are photographs."""
    buffer = BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=dpi, pil_kwargs={"quality": 82})
    plt.close(figure)
    return DisplayImage(buffer.getvalue(), format="jpeg")


# %%
samples = [read_row(row) for row in splits.train.select(range(min(4, len(splits.train))))]
sample_images, sample_boxes, sample_labels = zip(*samples, strict=True)
titles = [f"{image.width} x {image.height}, {', '.join(labels)}" for image, _, labels in samples]
to_jpeg(plot_images(sample_images, sample_boxes, titles=titles))

# %% [markdown]
# Tables are small or fill the frame, lie straight or at an angle, are printed on paper, foil or board, and next to
# them are things that look like tables: lists of ingredients, prices, barcodes. A box is drawn around the whole table,
# its heading included.
#
# What is in the images decides what can be learned. How large the tables are and where they lie is a prior that a
# model can learn without looking at the image; `notebooks/01_dataset_exploration` goes on from here (shapes, EXIF,
# barcodes, extremes, doubtful labels).
#
# So the honest yardstick is a detector that never looks: it always answers with the same box, whose corners are the
# medians of the training boxes. **A prediction, before you read on:** what mean IoU (overlap with the true box, 1 is
# perfect) does that detector reach? Close to 0, about 0.1, 0.3 or 0.5?


# %%
#| export data
def describe_boxes(rows: Dataset) -> pd.DataFrame:
    """One line per box: image number, category, corners x1, y1, x2, y2, and area, all as fractions of the image."""
    objects = pd.DataFrame(list(rows["objects"])).explode(["category_name", "bbox"]).dropna(subset="bbox")
    boxes = pd.DataFrame(objects.bbox.tolist(), columns=["y1", "x1", "y2", "x2"])
    boxes = boxes.assign(image=objects.index, category=objects.category_name.to_numpy())
    return boxes.assign(area=(boxes.x2 - boxes.x1) * (boxes.y2 - boxes.y1))


def median_box(boxes: pd.DataFrame) -> list[float]:
    """`[x1, y1, x2, y2]` as fractions of the image: the median of each corner over `describe_boxes`."""
    return boxes[["x1", "y1", "x2", "y2"]].median().tolist()


# %%
#| export plots
def plot_prior(boxes: pd.DataFrame, median: Sequence[float]) -> plt.Figure:
    """Area of the boxes of `describe_boxes`, and where they lie, with the median box `[x1, y1, x2, y2]` in 0..1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.hist(boxes.area, bins=np.linspace(0, 1, 26), color=BLUE)
    left.set(xlabel="area of the box / area of the image", ylabel="boxes", title="Size")
    for x1, y1, x2, y2 in boxes[["x1", "y1", "x2", "y2"]].head(300).to_numpy():
        right.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fc=BLUE, alpha=0.01))
    draw_boxes(right, [median], PREDICTION_COLOUR, "-")
    right.set(xlabel="x / width", ylabel="y / height", title="Place; red: always this", xlim=(0, 1), ylim=(1, 0))
    return figure


# %%
train_boxes = describe_boxes(splits.train)
constant_box = median_box(train_boxes)
plot_prior(train_boxes, constant_box)
plt.show()

# %% [markdown]
# How well do two boxes agree? Their IoU is the area that they share, divided by the area that they cover together: 1
# for the same box, 0 for boxes that do not touch.


# %%
#| export boxes: Boxes in pixels and in the coordinates that a model family writes.
def box_iou(boxes: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """IoU of every box `[x1, y1, x2, y2]` with every other, (boxes, others); each has an area."""
    first, second = np.reshape(boxes, (-1, 1, 4)), np.reshape(others, (1, -1, 4))
    sides = np.minimum(first, second)[..., 2:] - np.maximum(first, second)[..., :2]
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


# %%
overlaps = box_iou([constant_box], describe_boxes(splits.evaluation)[["x1", "y1", "x2", "y2"]])
print(f"always answering {np.round(constant_box, 2).tolist()}: mean IoU {overlaps.mean():.3f} on the evaluation split")

# %% [markdown]
# That is what a result has to be measured against, not 0: most tables lie around the middle and are of middling size,
# so that a box which never looks overlaps most of them a little. It returns in every table and figure of results as
# `same box`.

# %% [markdown]
# ## 3. Boxes as text
#
# A model that answers in text has to write its boxes as numbers, so the first question is in which. Qwen2-VL was
# trained to write a box as two corners on a grid of 0 to 1000 in both directions, whatever the size of
# the image: `(x1,y1),(x2,y2)`. Qwen3-VL writes on the same grid, but as JSON, `{"bbox_2d": [x1, y1, x2, y2], "label":
# ...}`. Qwen2.5-VL, between the two, writes JSON with pixels of the image as its processor resized it. A box read in
# the wrong convention is not an error, it is only somewhere else. So the convention is looked up by the model's own
# `config.model_type`, a family that is not listed is refused (Qwen3.5 is: no public source states what it writes), and
# pixels become model coordinates here, and model coordinates pixels; nowhere else.
#
# Rounding (not cutting off) keeps the error under half a unit: on the grid, half a pixel in an image of 1,000.


# %%
#| export boxes
GRID = 1000  # the largest coordinate of a box on the grid
Box = Sequence[float]  # [x1, y1, x2, y2]
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Family:
    """How the models of a family were taught to write boxes."""

    coordinates: str  # "grid": 0..1000 in both directions; "pixels": of the image as the processor resized it
    answer: str  # "tokens": label and box between special tokens; "json": a list of bbox_2d and label


FAMILIES = {  # by `config.model_type`; from the models' cards and cookbooks (github.com/QwenLM/Qwen3-VL)
    "qwen2_vl": Family("grid", "tokens"),
    "qwen2_5_vl": Family("pixels", "json"),
    "qwen3_vl": Family("grid", "json"),
    "qwen3_vl_moe": Family("grid", "json"),
}


def get_family(model_type: str) -> Family:
    """The family by its `config.model_type`. Raises ValueError for one whose convention is not known."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"How {model_type!r} models write boxes is not known: use one whose model_type is {known}.")
    return FAMILIES[model_type]


def resized_size(width: int, height: int, factor=28, min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28) -> Size:
    """To what a Qwen-VL processor resizes an image; the defaults are those Qwen2-VL and Qwen2.5-VL came with."""
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)[::-1]


def coordinate_range(width: int, height: int, family: str, resized: Size | None) -> Size:
    """The largest x and y that models of a family write for an image of `width` x `height` pixels.

    `resized` is the size at which the model saw it; only families that write pixels need it, and None stands for
    their published pixel budget. Raises ValueError for a family whose convention is not known.
    """
    if get_family(family).coordinates == "grid":
        return GRID, GRID
    return resized or resized_size(width, height)


def to_model_coordinates(box: Box, width: int, height: int, family: str, resized: Size | None = None) -> list[int]:
    """Pixel box -> what models of `family` write: rounded, clamped to the image; see `coordinate_range`."""
    limits = coordinate_range(width, height, family, resized) * 2
    scaled = [v / size * limit for v, size, limit in zip(box, (width, height) * 2, limits, strict=True)]
    return [min(limit, max(0, round(v))) for v, limit in zip(scaled, limits, strict=True)]


def from_model_coordinates(box: Box, width: int, height: int, family: str, resized: Size | None = None) -> list[float]:
    """Box as written by a model of `family` -> pixels, clamped to the image; see `coordinate_range`."""
    limits = coordinate_range(width, height, family, resized) * 2
    clamped = [min(limit, max(0, v)) for v, limit in zip(box, limits, strict=True)]
    return [v / limit * size for v, size, limit in zip(clamped, (width, height) * 2, limits, strict=True)]


# %%
#| export boxes
def to_grid(box: Box, width: int, height: int) -> list[int]:
    """Pixel box -> Qwen2-VL's grid, rounded, clamped to 0..1000."""
    return to_model_coordinates(box, width, height, "qwen2_vl")


def from_grid(box: Box, width: int, height: int) -> list[float]:
    """Box on Qwen2-VL's grid -> pixels of an image of `width` x `height`, clamped to it."""
    return from_model_coordinates(box, width, height, "qwen2_vl")


def has_area(box: Box) -> bool:
    """Whether a box is finite, its corners are in order, and it covers something."""
    x1, y1, x2, y2 = box
    return 0 < x2 - x1 < math.inf and 0 < y2 - y1 < math.inf


def flip_horizontally(image: Image.Image, boxes: Iterable[Box]) -> tuple[Image.Image, list[list[float]]]:
    """Mirror an image left to right, and its pixel boxes with it."""
    return ImageOps.mirror(image), [[image.width - x2, y1, image.width - x1, y2] for x1, y1, x2, y2 in boxes]


# %% [markdown]
# One box in three conventions, for a photograph of 900 x 1200 pixels. Read with the wrong one of the last two, the box
# is still a box.

# %%
box, size = [243, 584, 657, 768], (900, 1200)
on_grid, resized = (to_model_coordinates(box, *size, family) for family in ("qwen2_vl", "qwen2_5_vl"))
print("pixels of the photograph           ", box)
print("on the grid (Qwen2-VL)             ", on_grid, "-> back:", np.round(from_grid(on_grid, *size), 1))
print("pixels as resized (Qwen2.5-VL)     ", resized, "of", resized_size(*size))
misread = from_grid(resized, *size)
iou = box_iou([box], [misread]).item()
print("Qwen2.5-VL's pixels read as a grid ", np.round(misread).tolist(), f"IoU {iou:.2f}")

# %% [markdown]
# The way to the grid and back costs less than a pixel here. Read in the convention of another family, nothing stops:
# the numbers are in range, the box has an area, and it lies elsewhere.
#
# ## 4. An image as a conversation
#
# The question states what to look for and how to answer. Base models are asked with the same words that the
# fine-tuned ones are trained with. Stating the format matters, because a "zero-shot baseline" otherwise measures the
# prompt rather than the model: on the real photographs the public figures for the untrained 7B model are 0.10 with
# one prompt and parser and 0.59 with another (section 15).
#
# The answer is written the way the family was pretrained to write it: by Qwen2-VL with special tokens around label and
# box, by the later ones as JSON. When there are several objects they are listed from the top left, because a model
# cannot learn an order that changes by chance. An image without objects gets an answer, too, so that a model can learn
# to say that there is nothing.
#
# What is asked, for which labels, in which convention and at which resolution: that is the *task*. A model that was
# trained for one answers another badly, so it is one value, and it is saved with every result.


# %%
#| export conversation: Prompts, the format of answers, and chat messages.
SYSTEM_MESSAGE = "You are a vision language model that locates objects on food packages."
PROMPT = "Detect every {label}. Answer with label and box of each as label(x1,y1),(x2,y2) on a grid from 0 to 1000."
JSON_PROMPT = 'Detect every {label}. Answer in JSON, a list of {{"bbox_2d": [x1, y1, x2, y2], "label": "..."}}.'
NOTHING = {"tokens": "", "json": "```json\n[]\n```"}  # where there is no object: ends at once, or an empty list


@dataclass(frozen=True)
class Task:
    """What a model is asked about an image, and in which convention it answers."""

    question: str
    labels: Sequence[str] = ()
    family: str = "qwen2_vl"  # a key of FAMILIES
    system_message: str = SYSTEM_MESSAGE
    pixel_budget: dict[str, int] = field(default_factory=dict)  # arguments of `resized_size`


def format_answer(labels: Iterable[str], boxes: Iterable[Sequence[int]], family: str = "qwen2_vl") -> str:
    """What a family's models are taught to write: objects from the top left, boxes in the family's coordinates."""
    objects, kind = sorted(zip(labels, boxes, strict=True), key=lambda pair: pair[1][1::-1]), get_family(family).answer
    if not objects:
        return NOTHING[kind]
    if kind == "json":
        lines = [json.dumps({"bbox_2d": list(box), "label": label}, ensure_ascii=False) for label, box in objects]
        return "```json\n[\n\t" + ",\n\t".join(lines) + "\n]\n```"
    return "".join(
        f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        for label, (x1, y1, x2, y2) in objects
    )


def to_conversation(task: Task, answer: str | None = None) -> list[dict]:
    """System, user (one image, then the question) and, when given, the assistant's answer."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": task.system_message}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.question}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


# %% [markdown]
# The processor turns this into what the model sees. Its chat template writes the roles as text; the image is cut into
# patches of 14 x 14 pixels, and each block of 2 x 2 patches becomes one `<|image_pad|>` token.
#
# The number of pixels decides what an image costs, in time and memory. The budget is set once, in the processor, which
# is saved with every result, so that a model is asked at the resolution at which it was trained. The function asserts
# that the budget is kept, because a version of transformers that ignores it would only be slow and hungry, not wrong,
# and nobody would notice.


# %%
#| export loading
def load_processor(model_id: str, max_pixels: int) -> ProcessorMixin:
    """The model's processor, with its pixel budget lowered to `max_pixels` if it is above.

    Raises ValueError when the budget is under the smallest image, or is not kept.
    """
    processor = AutoProcessor.from_pretrained(model_id)
    image_processor, size = processor.image_processor, processor.image_processor.size
    size["longest_edge"] = max_pixels = min(max_pixels, size["longest_edge"])
    if max_pixels < size["shortest_edge"]:
        raise ValueError(f"MAX_PIXELS={max_pixels} is under the processor's smallest image: {size['shortest_edge']}.")
    grid = image_processor(images=[Image.new("RGB", (4000, 3000))], return_tensors="pt")["image_grid_thw"]
    if grid.prod() * image_processor.patch_size**2 > max_pixels:
        raise ValueError(f"The budget of {size['longest_edge']} pixels is not kept: try another transformers version.")
    return processor


def pixel_budget(processor: ProcessorMixin) -> dict[str, int]:
    """The processor's settings as arguments of `resized_size`."""
    images, size = processor.image_processor, processor.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {"factor": images.patch_size * images.merge_size} | limits


# %%
#| export conversation
def create_task(processor: ProcessorMixin, labels: Sequence[str], settings: SimpleNamespace) -> Task:
    """The task of the settings for these labels. Raises ValueError for a model of an unknown family."""
    family = AutoConfig.from_pretrained(settings.model_id).model_type
    wording = {"tokens": PROMPT, "json": JSON_PROMPT}[get_family(family).answer]
    *others, last = [re.sub("[-_]", " ", label) for label in labels]
    question = settings.question or wording.format(label=f"{', '.join(others)} and {last}" if others else last)
    return Task(question, labels, family, settings.system_message or SYSTEM_MESSAGE, pixel_budget(processor))


def write_answer(image: Image.Image, boxes: Sequence[Box], labels: Sequence[str], task: Task) -> str:
    """The right answer for an image with these boxes, in pixels."""
    resized = resized_size(*image.size, **task.pixel_budget)
    return format_answer(
        labels, [to_model_coordinates(box, *image.size, task.family, resized) for box in boxes], task.family
    )


# %%
processor = load_processor(settings.model_id, settings.max_pixels)
task = create_task(processor, splits.labels, settings)
image, boxes, labels = samples[0]
answer = write_answer(image, boxes, labels, task)
to_conversation(task, answer)

# %%
text = processor.apply_chat_template(to_conversation(task, answer), tokenize=False)
inputs = processor(text=[text], images=[[image]], return_tensors="pt")
print(text)
print(f"image {image.width} x {image.height} -> grid of patches {inputs['image_grid_thw'][0].tolist()}")
print({name: tuple(tensor.shape) for name, tensor in inputs.items()})
phone = [math.prod(resized_size(4032, 3024, max_pixels=budget)) // 28**2 for budget in (10**9, 1003520)]
print("tokens of a photograph of 4032 x 3024, without and with the default budget:", phone)

# %% [markdown]
# The answer, token by token: labels and boxes are framed by tokens of their own, and each digit is one token. A box is
# at most 20 decisions, most of them between ten digits. An error in the first digit of a coordinate moves an edge by a
# hundred units of the grid or more, an error in the last digit by a few; the loss counts both alike.

# %%
tokens = processor.tokenizer.encode(answer + "<|im_end|>")
rows = {"id": tokens, "token": [processor.tokenizer.decode([token]) for token in tokens]}
pd.DataFrame.from_dict(rows, orient="index").style.format(escape="html").hide(axis="columns")

# %% [markdown]
# `pixel_values` holds one row of numbers for each patch, `image_grid_thw` how the patches of each image are arranged
# (time, height, width), and `mm_token_type_ids` which tokens are image tokens. The model needs the last two to give
# image tokens a place in the plane: in Qwen2-VL a token's position has three parts (M-RoPE), one for time, one for the
# row and one for the column; `notebooks/02_model_understanding` draws them.
#
# The last line: a phone photograph costs twelve times as much without a budget as with the default.
# Text that is recognised by its shape survives a good deal of shrinking, boxes that are a few pixels wide do not:
# `notebooks/03_data_preprocessing` shows what the model gets to see at each budget.
#
# ## 5. What the loss looks at: the collator
#
# The same conversation can teach different things, depending on which of its tokens the loss looks at. A collator
# turns a list of conversations into one batch. Its labels decide what is learned: position *i* of `labels` is the
# token that the model should have written there, and -100 means that the loss does not look. Padding never counts, and
# neither do image tokens: the model reads features there, it has no word to write. About the rest one can differ:
#
# - `AllTokensCollator` trains on all text: system message, question and answer, as in language modelling.
# - `AssistantOnlyCollator` trains on the answer alone: the rest is given, not written.
#
# The model shifts the labels by one place itself: what it computes at token *i* is compared with the label at *i + 1*.
# So a label of -100 does not hide a token from the model. It is read like any other; it is just not asked for.
#
# In both, the `<|im_end|>` that closes the answer counts: a model that never learns to stop goes on writing boxes. The
# two share everything but the mask. TRL's option `completion_only_loss` does nothing when a custom collator is
# passed; the masking below is all there is.
#
# Padding goes to the right, although Qwen2-VL's own processor pads on the left. On the left, a token of padding has
# nothing before it that it may look at, and one of the attention kernels on a GPU answers that with NaN in every
# gradient, while the loss looks as it should (cuDNN's, with torch 2.11 on an H100; CHANGELOG).


# %%
#| export collators: Conversations to batches, and which of their tokens have labels.
VISION_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]


@dataclass(frozen=True)
class AllTokensCollator:
    """Batch `{"image", "messages"}` examples; labels are all text: system message, question and answer."""

    processor: ProcessorMixin

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        return add_labels(to_batch(examples, self.processor), find_text_tokens, self.processor.tokenizer)


@dataclass(frozen=True)
class AssistantOnlyCollator:
    """Batch `{"image", "messages"}` examples; labels are the assistant's answers with their end-of-turn token."""

    processor: ProcessorMixin

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        return add_labels(to_batch(examples, self.processor), find_assistant_tokens, self.processor.tokenizer)


COLLATORS = {"v1-all-tokens": AllTokensCollator, "v2-assistant-only": AssistantOnlyCollator}


# %%
#| export collators
def to_batch(examples: Sequence[dict], processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """What the model is given: token ids, masks, patches of the images and their grids; padded on the right."""
    texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
    padding = {"padding": True, "padding_side": "right", "pad_to_multiple_of": 8, "return_tensors": "pt"}
    return dict(processor(text=texts, images=[[example["image"]] for example in examples], **padding))


def add_labels(batch: dict[str, torch.Tensor], find_trained: Callable, tokenizer) -> dict[str, torch.Tensor]:
    """The batch with `labels` (batch, tokens): the token ids where `find_trained` says so, -100 elsewhere."""
    trained = find_trained(batch["input_ids"], tokenizer)
    return batch | {"labels": batch["input_ids"].masked_fill(~trained, -100)}


def find_text_tokens(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Mask (batch, tokens) of all that is neither padding nor part of an image."""
    excluded = tokenizer.convert_tokens_to_ids([tokenizer.pad_token, *VISION_TOKENS])
    return ~torch.isin(input_ids, torch.tensor(excluded))


def find_assistant_tokens(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Mask (batch, tokens) of the assistant's words: after `<|im_start|>assistant\\n`, up to `<|im_end|>` included."""
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, tokens in enumerate(input_ids.tolist()):
        for start in range(len(tokens) - len(header)):
            if tokens[start : start + len(header)] == header:
                stop = tokens.index(end, start)
                mask[row, start + len(header) : stop + 1] = True
    return mask


# %% [markdown]
# What each of the two trains on, for one example:

# %%
example = {"image": image, "messages": to_conversation(task, answer)}
batches = {variant: collator(processor)([example]) for variant, collator in COLLATORS.items()}
labels = {variant: batch["labels"][batch["labels"] != -100] for variant, batch in batches.items()}
trained_texts = {variant: [len(tokens), processor.tokenizer.decode(tokens)] for variant, tokens in labels.items()}
columns = ["trained tokens", "what the loss looks at"]
pd.DataFrame.from_dict(trained_texts, orient="index", columns=columns).style.format(escape="html")

# %% [markdown]
# In v1 more than two thirds of the trained tokens are the same in every example. `notebooks/03_data_preprocessing`
# colours them, for images with several objects too. Which of the two collators gives the better detector is a question
# for an experiment, in section 12.
#
# Training examples are made when they are asked for, so that a dataset of phone photographs need not fit in memory
# and an image can be mirrored in one epoch and not in the next.


# %%
#| export data
@dataclass
class Mirroring:
    """Whether an image is mirrored: by chance, but always the same in one epoch of a run, also of one that goes on."""

    probability: float = 0.0
    seed: int = 0
    epoch: int = 0

    def applies_to(self, image_id: object) -> bool:
        return xxhash.xxh3_64_intdigest(f"{self.seed} {self.epoch} {image_id}".encode()) < self.probability * 2**64


def to_training_dataset(rows: Dataset, task: Task, mirroring: Mirroring) -> Dataset:
    """The rows as lazily built `{"image", "messages"}` examples."""

    def transform(columns: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        examples = [to_training_example(row, task, mirroring.applies_to(row["image_id"])) for row in rows]
        return {key: [example[key] for example in examples] for key in ("image", "messages")}

    return rows.with_transform(transform)


def to_training_example(row: dict, task: Task, mirrored: bool = False) -> dict:
    """One dataset row as image and conversation."""
    image, boxes, labels = read_row(row)
    if mirrored:
        image, boxes = flip_horizontally(image, boxes)
    return {"image": image, "messages": to_conversation(task, write_answer(image, boxes, labels, task))}


# %%
train_dataset = to_training_dataset(splits.train, task, Mirroring(settings.flip_probability, settings.seed))
batch = AssistantOnlyCollator(processor)([train_dataset[index] for index in range(min(4, len(train_dataset)))])
trained_tokens = (batch["labels"] != -100).sum(dim=1)
print(f"{batch['input_ids'].shape[1]} tokens a row, trained: {trained_tokens.tolist()}")

# %% [markdown]
# One table takes some twenty trained tokens, out of about a hundred and fifty; the rest of the batch is read, not
# learned. At 1,280 image tokens to an image the share is under two percent: reading the image is what costs.

# %% [markdown]
# ## 6. The model, and what each recipe trains
#
# Qwen2-VL has two towers. The **vision tower** (`visual`) turns the image into a sequence of features; a *merger* at
# its end brings four patches to one token of the language model's width. The **language model** reads these beside
# the words and writes, and its `lm_head` chooses each token.
#
# Fine-tuning addresses layers by name, so the names come first. A model can be built on PyTorch's `meta` device: all
# modules with names and shapes, and no memory behind them, in seconds even at 7 billion parameters. In memory the
# towers are `model.visual` and `model.language_model`; the files on disk, and older tutorials, name them otherwise.


# %%
#| export loading
AREAS = ["visual", "language_model", "lm_head"]  # parts of the paths in `named_parameters`


def build_empty_model(model_id: str) -> PreTrainedModel:
    """The model without weights, on the meta device: names, shapes and counts cost no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model_id))


def area_of(name: str) -> str:
    """The area a parameter or module belongs to, by its path; "other" when it belongs to none."""
    return next((area for area in AREAS if area in name), "other")


def summarize_trainables_by_area(model: torch.nn.Module) -> pd.DataFrame:
    """Parameters of each area, and how many of them are trained. Packed 4-bit weights count as they are stored."""
    counts = [(area_of(name), p.numel(), p.numel() * p.requires_grad) for name, p in model.named_parameters()]
    table = pd.DataFrame(counts, columns=["area", "parameters", "trained"]).groupby("area").sum()
    table = table.reindex([*AREAS, "other"], fill_value=0)
    return pd.concat([table, table.sum().to_frame("total").T])


# %%
empty_model = build_empty_model(settings.model_id)
summarize_trainables_by_area(empty_model)[["parameters"]].style.format("{:,}")

# %% [markdown]
# In the 7B model the vision tower holds 8 % of the weights; in the tiny one it holds more than half. That alone is a
# reason why the two need not profit from the same recipe: "train the vision tower" means something else in each.
#
# **LoRA** leaves a weight matrix as it is and trains a pair of thin matrices beside it. Their product has the shape of
# the matrix, but the pair holds only `rank * (in + out)` numbers. **QLoRA** stores the frozen matrix in 4 bits: NF4
# knows 16 levels, a block of 64 weights shares a scale, and a multiplication unpacks the block to 16 bits first.
#
# B starts at zero, so that the layer begins as it was and training moves it away from there. The factor `alpha / rank`
# keeps the size of a step about the same when the rank is changed; here it is 2. A higher rank can express more and
# costs more: rank 64 of a 3,584 x 3,584 matrix is 3.6 % of its numbers.

# %%
frozen = ["x", "W: out x in\nfrozen, 4 bits", "W x", "y = W x + (alpha / rank) B A x"]
plot_steps([frozen, ["the same x", "A: rank x in\ntrained", "B: out x rank\ntrained", "(alpha / rank) B A x"]])
plt.show()

# %% [markdown]
# A **recipe** says which weights are trained and how. Each tower is frozen, or gets LoRA, or, for the vision tower, is
# trained whole. Some combinations cannot work, and a recipe refuses them when it is made, not after an hour.
#
# The layers that get LoRA are chosen by a regular expression on their full path. A plain list such as `["q_proj",
# "proj"]` would match more than one thinks: `proj` is also the first convolution of the vision tower. A pattern that
# matches nothing at all stops PEFT with an error, but of a pattern with two halves one half may match nothing, and
# nobody is told; so what is trained is checked later, area by area. `r4-joint` leaves out the vision tower's
# `attn.proj` and the merger, as the public run that it follows did (section 15); whether they would help was not tried
# here, and is an exercise at the end.


# %%
#| export recipes: Which weights a recipe trains, and how.
LLM_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
BITS = {"bf16": 16, "nf4": 4, "fp8": 8}  # precisions; bf16 stands for float16 or float32 where there is no bfloat16
VISION_LAYERS = r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.((linear_)?fc[12]|(gate|up|down)_proj))"  # of all families


@dataclass(frozen=True)
class TrainingRecipe:
    """One way to fine-tune: which weights, in which precision, how fast. Raises ValueError where that cannot work."""

    name: str
    description: str
    precision: str = "bf16"  # of the frozen layers of the language model, a key of BITS
    train_vision: str = "frozen"  # or "lora", or "full": all weights of the vision tower, merger included
    train_llm: str = "frozen"  # or "lora"
    lora_rank: int = 64
    lora_alpha: int = 128
    learning_rate: float = 1e-4  # peak; TRL's default for full fine-tuning (2e-5) is too slow for LoRA
    collator: str = "v2-assistant-only"  # a key of COLLATORS
    loss_function: Callable | None = None  # of a processor: the loss of logits and labels; None: cross-entropy
    stages: tuple[str, ...] = ()  # recipes to train one after the other, each from the weights of the one before

    def __post_init__(self):
        full, frozen = self.train_vision == "full", self.train_vision == self.train_llm == "frozen"
        known = self.train_vision in ("frozen", "lora", "full") and self.train_llm in ("frozen", "lora")
        problems = {
            "train_vision is frozen, lora or full, train_llm is frozen or lora": not known,
            f"collator is one of {', '.join(COLLATORS)}": self.collator not in COLLATORS,
            f"precision is one of {', '.join(BITS)}": self.precision not in BITS,
            "it either trains something or has stages": frozen != bool(self.stages),
            "4-bit or 8-bit weights cannot be saved as a full checkpoint": self.precision != "bf16" and full,
            "with LoRA, all else is frozen: train one after the other, in stages": full and self.train_llm == "lora",
            "lora_rank and learning_rate are positive": self.lora_rank < 1 or self.learning_rate <= 0,
        }
        if found := [problem for problem, is_there in problems.items() if is_there]:
            raise ValueError(f"Recipe {self.name!r}: {found[0]}.")

    @property
    def quantized(self) -> bool:
        """Whether the language model is loaded in 4 bits; to 8 bits it is converted after loading."""
        return self.precision == "nf4"

    @property
    def lora_target_modules(self) -> str | None:
        """Regular expression on the paths of the layers that get LoRA; None without LoRA."""
        towers = {LLM_LAYERS: self.train_llm, VISION_LAYERS: self.train_vision}
        return "|".join(f"({layers})" for layers, mode in towers.items() if mode == "lora") or None


# %%
#| export recipes
R1 = TrainingRecipe("r1-llm-only", "QLoRA on the language model", precision="nf4", train_llm="lora")
R2 = TrainingRecipe("r2-vision-only", "all weights of the vision tower", train_vision="full", learning_rate=1e-5)
R3 = TrainingRecipe("r3-two-stage", "r2, then r1 from its weights", stages=("r2-vision-only", "r1-llm-only"))
R4 = replace(R1, name="r4-joint", description="r1 and LoRA on the vision tower", train_vision="lora")
CATALOGUE = {recipe.name: recipe for recipe in (R1, R2, R3, R4)}


# %%
stages = {name: CATALOGUE[name] for name in CATALOGUE if not CATALOGUE[name].stages}
stages |= {f"{R3.name}, stage {n}": CATALOGUE[name] for n, name in enumerate(R3.stages, start=1)}
table = pd.DataFrame(
    {name: {"vision tower": r.train_vision, "language model": r.train_llm} for name, r in stages.items()}
)
colours = {"frozen": "#eeeeee", "lora": "#f9d3a8", "full": ORANGE}
table.T.sort_index().style.map(lambda mode: f"background-color: {colours[mode]}; color: black")

# %% [markdown]
# Four answers to one question: when a model does not find an object, is it because it does not see it, or because it
# does not know what to write? r1 trains the writing alone, r2 the seeing alone, r3 one after the other, r4 both at
# once. `r3-two-stage` trains r2 first, then r1 on its result. (16 bits: on a CPU, 32.) What each recipe will train can
# be counted on the empty model, before anything is loaded. The same functions prepare the real model in section 11.


# %%
#| export recipes
def apply_freeze_policy(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Freeze everything but a vision tower that is trained whole; adapters are added later, by PEFT.

    A frozen tower runs without building a backward graph, which gradient checkpointing would otherwise make it do.
    """
    visual = model.model.visual
    model.requires_grad_(False)
    visual.requires_grad_(recipe.train_vision == "full")
    if recipe.train_vision == "frozen":
        visual.forward = torch.no_grad()(visual.forward)


def build_lora_config_for_recipe(recipe: TrainingRecipe) -> LoraConfig | None:
    """PEFT's settings for a recipe; None where it trains no adapter."""
    layers, rank, alpha = recipe.lora_target_modules, recipe.lora_rank, recipe.lora_alpha
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM") if layers else None


def count_trainables(model_id: str, recipe: TrainingRecipe) -> pd.DataFrame:
    """`summarize_trainables_by_area` of a recipe, without loading weights."""
    model = build_empty_model(model_id)
    apply_freeze_policy(model, recipe)
    config = build_lora_config_for_recipe(recipe)
    return summarize_trainables_by_area(model if config is None else get_peft_model(model, config))


# %%
trained = {recipe.name: count_trainables(settings.model_id, recipe)["trained"] for recipe in (R1, R2, R4)}
pd.DataFrame(trained).T.style.format("{:,}")

# %% [markdown]
# For the 7B model the same table reads 161,480,704 (r1), 675,759,104 (r2) and 198,180,864 (r4): a test asserts it. So
# r2 trains four times as many numbers as r1 there, with gradients and optimiser states for each of them.
#
# ## 7. Loading: 16 bits, 4 bits, and which parts
#
# What is kept out of the four bits matters. The vision tower of the 7B model is small beside its language model, so
# quantising it saves little, and `lm_head` chooses the digits. The skip list names modules by their path in memory,
# `model.visual`: the shorter `visual` matches nothing in transformers 5, silently. Hence the check after loading.


# %%
#| export loading
KEPT_MODULES = ("model.visual", "lm_head")  # not quantised


def load_model(model_id: str, quantized: bool, dtype: torch.dtype, kept_modules=KEPT_MODULES) -> PreTrainedModel:
    """Load a model, in NF4 but for `kept_modules` if `quantized`; weights that could run code (.bin) are not read.

    Raises RuntimeError if tensors were missing, which would be random now, or have another precision.
    """
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(kept_modules)}  # a historic name
    arguments = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": choose_device_map()}
    arguments |= {"quantization_config": BitsAndBytesConfig(**nf4)} if quantized else {}
    arguments |= {"use_safetensors": True, "output_loading_info": True}
    model, found = AutoModelForImageTextToText.from_pretrained(model_id, **arguments)
    if found["missing_keys"]:
        raise RuntimeError(
            f"{model_id} lacks {len(found['missing_keys'])} tensors, {min(found['missing_keys'])} first."
        )
    check_placement(model)
    check_quantization(model, quantized, kept_modules)
    return model


def check_placement(model: torch.nn.Module) -> None:
    """Raise RuntimeError where a part of a model was put beside the GPUs, on CPU or disk."""
    aside = [name for name, p in model.named_parameters() if p.device.type != "cuda"]
    if torch.cuda.is_available() and aside:
        remedy = "Free memory on the GPUs, take more of them, or a smaller MODEL_ID"
        raise RuntimeError(f"The GPUs are full: {len(aside)} weights are not on them, {aside[0]} first. {remedy}.")


def choose_device_map() -> str | dict[str, int]:
    """CPU without a GPU; under torchrun the GPU of this process; else the layers are spread over all visible GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


def check_quantization(model: PreTrainedModel, quantized: bool, kept_modules=KEPT_MODULES) -> None:
    """Raise RuntimeError unless 4-bit layers are everywhere but in `kept_modules`, or nowhere if not `quantized`."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name: quantized and not name.startswith(tuple(kept_modules)) for name in linear}
    wrong = [name for name, module in linear.items() if isinstance(module, Linear4bit) != wanted[name]]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(linear)} linear layers have the wrong precision, first {wrong[0]}.")


# %%
#| export loading
def release_memory() -> None:
    """Free what a finished function held. Models are in reference cycles with their trainers: `del` is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # the C library keeps what was freed unless it is asked


def allocated_megabytes() -> float:
    """Memory that tensors hold on all GPUs; without a GPU, the memory that this process holds."""
    if torch.cuda.is_available():
        return sum(torch.cuda.memory_allocated(gpu) for gpu in range(torch.cuda.device_count())) / 1e6
    return psutil.Process().memory_info().rss / 1e6


# %%
model = load_model(settings.model_id, quantized=True, dtype=best_dtype())
small, large = model.get_memory_footprint() / 1e6, empty_model.num_parameters() * best_dtype().itemsize / 1e6
print(f"{small:,.1f} MB in NF4, vision tower and lm_head kept; {large:,.1f} MB without")
print(model.model.language_model.layers[0].mlp)

# %% [markdown]
# `Linear4bit` is what bitsandbytes put in place of a linear layer. What four bits cost in accuracy, and where, is
# measured in `notebooks/06_quantization_and_trainable_params`.
#
# At the size of 7B the choice decides which GPU will do. Besides the weights, training holds gradients and two numbers
# per trained parameter for AdamW (12 bytes each in all, in float32), and the activations that the backward pass needs.
# LoRA makes the first small, gradient checkpointing the second: it keeps only the inputs of each layer and computes
# the rest again. Measured on one H200 with random weights of the 7B shape, 1,225 image tokens per image and gradient
# checkpointing, peak of a training step:
#
# | recipe | trained | micro-batch 1 | micro-batch 2 |
# |---|---|---|---|
# | `r1-llm-only` | 161,480,704 | 9.8 GiB | 10.3 GiB |
# | `r2-vision-only` | 675,759,104 | 26.7 GiB | 27.5 GiB |
# | `r3-two-stage` | as r2, then as r1 | as r2, then as r1 | 27.5, then 10.4 GiB |
# | `r4-joint` | 198,180,864 | 10.8 GiB | 11.7 GiB |
#
# So r1 and r4 fit into a GPU of 24 GB, r2 does not. `python -m helpers.benchmark --processor FOLDER` measures the
# same on your GPU, without downloading weights.

# %% [markdown]
# ## 8. Asking, and reading the answer
#
# A model is asked together with its processor, its prompt and the limits on its answer: change one of them and the
# boxes change. So they travel as one value, the `Detector`.
#
# Answers are generated in batches, and greedily: the likeliest token is taken each time. Sampling would give another
# box at every call, which is no use in a measurement. The probability of each token is kept: it tells how sure the
# model was. Three details decide whether batched answers are right, and none of them raises an error:
#
# - The padding goes to the left, so that the last token of every row is the last token of its question; with padding
#   on the right a decoder continues from padding.
# - Rows of different lengths are padded to a multiple of 8, here and in the collator. CUDA's memory-efficient
#   attention misread the masks of other lengths (torch 2.11, float32): in a batch of 32 images of mixed sizes every
#   row of full length was answered wrongly.
# - All that the processor returned is passed on. `generate` without `mm_token_type_ids` runs, but gives the image
#   tokens positions on a line instead of in a plane.


# %%
#| export generation: Questions about images in batches, answers with the probability of each token.
@dataclass(frozen=True)
class Detector:
    """A model that writes boxes, with all that its answers depend on."""

    model: PreTrainedModel
    processor: ProcessorMixin
    task: Task
    max_new_tokens: int = 256
    batch_size: int | None = None  # None: what fits into the free memory


def to_question(image: Image.Image, detector: Detector) -> dict[str, torch.Tensor]:
    """The detector's question about one image as processor tensors."""
    messages = to_conversation(detector.task)
    text = detector.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    question = dict(detector.processor(text=[text], images=[[image]], return_tensors="pt"))
    return question | {"pixel_values": question["pixel_values"].to(detector.model.dtype)}


def join_questions(questions: Sequence[dict[str, torch.Tensor]], detector: Detector) -> dict[str, torch.Tensor]:
    """Questions about single images as one batch; if lengths differ, padded on the left to a multiple of 8."""
    lengths = {question["input_ids"].shape[1] for question in questions}
    longest = 8 * math.ceil(max(lengths) / 8) if len(lengths) > 1 else max(lengths)
    batch = {}
    for name, tensor in questions[0].items():
        rows = [question[name] for question in questions]
        if tensor.shape == questions[0]["input_ids"].shape:
            fill = detector.processor.tokenizer.pad_token_id if name == "input_ids" else 0
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows]
        batch[name] = torch.cat([row.to(detector.model.device, non_blocking=True) for row in rows])
    return batch


def to_questions(images: Sequence[Image.Image], detector: Detector) -> dict[str, torch.Tensor]:
    """The detector's question about each image as one batch of processor tensors: see `join_questions`."""
    return join_questions([to_question(image, detector) for image in images], detector)


# %%
#| export generation
@dataclass(frozen=True)
class Answer:
    """What a model wrote, and how sure it was of each token: where the token ends in the text, its probability."""

    text: str
    ends: Sequence[int] = ()
    probabilities: Sequence[float] = ()

    def score(self, start: int, end: int) -> float:
        """Geometric mean of the probabilities of the tokens in `text[start:end]`."""
        begins = [0, *self.ends]
        inside = [p for p, a, b in zip(self.probabilities, begins, self.ends, strict=False) if b > start and a < end]
        return float(np.exp(np.mean(np.log(np.maximum(inside, 1e-12)))))


class ProbabilityRecorder(LogitsProcessor):
    """Keeps the probability of each token that greedy decoding chooses; all scores of all steps take gigabytes."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().softmax(dim=-1).amax(dim=-1))
        return scores


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()  # inference_mode is not for sharded models
def generate(detector: Detector, questions: dict[str, torch.Tensor]) -> list[Answer]:
    """Greedy answers to the batch of `to_questions`, special tokens included, padding removed."""
    recorder, batch = ProbabilityRecorder(), {k: v.to(detector.model.device) for k, v in questions.items()}
    limits = {"max_new_tokens": detector.max_new_tokens, "logits_processor": LogitsProcessorList([recorder])}
    tokens = detector.model.generate(**batch, **limits, **GREEDY)
    written = tokens[:, batch["input_ids"].shape[1] :].tolist()
    probabilities = torch.stack(recorder.steps, dim=1).tolist()
    return [to_answer(*row, detector.processor.tokenizer) for row in zip(written, probabilities, strict=True)]


def to_answer(tokens: Sequence[int], probabilities: Sequence[float], tokenizer) -> Answer:
    """One row of token ids and their probabilities as text; a letter of several tokens ends with the last of them."""
    length = max((n for n, token in enumerate(tokens, start=1) if token != tokenizer.pad_token_id), default=0)
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=False) for n in range(1, length + 1)]
    return Answer(texts[-1] if texts else "", [len(text) for text in texts], list(probabilities[:length]))


# %%
#| export training: From a recipe and the settings to trained weights on disk.
def create_detector(model: PreTrainedModel, settings: SimpleNamespace, labels: Sequence[str]) -> Detector:
    """A model with the base's processor and the settings' limits, asked about the labels."""
    processor = load_processor(settings.model_id, settings.max_pixels)
    task = create_task(processor, labels, settings)
    return Detector(model, processor, task, settings.max_new_tokens, settings.eval_batch_size)


# %%
base = create_detector(model.eval(), settings, splits.labels)
samples = [read_row(row) for row in splits.evaluation.select(range(min(4, len(splits.evaluation))))]
sample_images, sample_boxes, _ = zip(*samples, strict=True)
answers = generate(base, to_questions(sample_images, base))
truth = [write_answer(*sample, task) for sample in samples]
pd.DataFrame({"truth": truth, "answer": [answer.text for answer in answers]}).style.format(escape="html").hide()

# %% [markdown]
# The base model's boxes are well-formed: the format is known, and training need not teach it. Whether they are in the
# right place is another question, for the next section.
#
# Which part of an answer is a box? Models that were not fine-tuned write boxes in many ways: with
# special tokens or without, with spaces, with `<box>` in place of the token, with corners swapped, as JSON like
# Qwen2.5-VL and Qwen3-VL. A strict parser would count these as misses and make every fine-tuned model look good. So
# this one looks for four numbers in brackets and takes the words before them, or JSON's `label`, as the label.
#
# What looks like an attempt at a box but is none (cut off, three numbers, no area) is returned as well, as `unread`:
# an answer in a broken format is a different failure from a box in the wrong place, and is counted apart. An answer
# that says there is nothing to find has neither boxes nor unread pieces.


# %%
#| export parsing: Answers of Qwen-VL models, text or JSON, to labels and boxes.
NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
# (x1,y1),(x2,y2), also [x1,y1,x2,y2] and mixtures
BOX = rf"[(\[]{NUMBER},{NUMBER}(?:[)\]]\s*,?\s*[(\[]|,){NUMBER},{NUMBER}[)\]]"
ATTEMPT = "|".join(
    [
        rf"[(\[]{NUMBER},(?:(?!{BOX})[-\d\s.,()\[\]])*",  # begins like a box
        r"[(\[]\s*-?[\d.]*\s*$",  # cut off after the bracket
        rf"<\|?box(?:_start)?\|?>(?!\s*{BOX})[^<]*",  # a box is announced and something else follows
        r"<\|object_ref_start\|>[^<]*(?:<\|object_ref_end\|>)?\s*$",  # cut off after the label
    ]
)
PIECE_PATTERN = re.compile(rf"(?P<json>\{{[^{{}}]*(?:\}}|$))|(?P<box>{BOX})|(?P<attempt>{ATTEMPT})")
END_PATTERN = re.compile(r"<\|(?:im_end|endoftext)\|>")
REFERENCE_PATTERN = re.compile(r"<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>")
MARKUP_PATTERN = re.compile(r"<[^<>]*>|```(?:json)?")
JSON_LABEL_PATTERN = re.compile(r"""["']label["']\s*:\s*("(?:[^"\\]|\\.)*"|'[^']*')""")


@dataclass(frozen=True)
class ParsedAnswer:
    """What a model's answer holds. Boxes are `[x1, y1, x2, y2]` in the model's own coordinates, not clamped."""

    objects: list[tuple[str, list[float]]]  # label (may be empty) and box
    unread: list[str]  # pieces of the text that look like an attempt at a box, and are none
    spans: list[tuple[int, int]] = field(default_factory=list, compare=False)  # where the boxes are in the text


def parse_answer(answer: str) -> ParsedAnswer:
    """Read every box that a Qwen-VL model wrote, as text or as JSON. Never raises.

    Corners are put in order. A box without a label of its own takes the one before it.
    """
    text, parsed = END_PATTERN.sub(lambda end: " " * len(end[0]), answer), ParsedAnswer([], [])
    label, end = "", 0
    for piece in PIECE_PATTERN.finditer(text):
        label = (read_json_label(piece[0]) if piece["json"] else read_label(text[end : piece.start()])) or label
        found = [] if piece["attempt"] else list(re.finditer(BOX, piece[0]))
        boxes = [(read_numbers(match[0]), match) for match in found]
        for box, match in boxes:
            if has_area(box):
                parsed.objects.append((label, box))
                parsed.spans.append((piece.start() + match.start(), piece.start() + match.end()))
        if not all(has_area(box) for box, _ in boxes) or (not boxes and promises_box(piece)):
            parsed.unread.append(piece[0].strip())
        end = piece.end()
    return parsed


# %%
#| export parsing
def read_label(words: str) -> str:
    """The label in the words before a box: what the special tokens enclose, else the words without markup."""
    if references := REFERENCE_PATTERN.findall(words):
        return references[-1]
    label = MARKUP_PATTERN.sub(" ", words).strip(" \t\n\r,;:.-*'\"`<>()[]{}|")
    return "" if label.lower() == "and" else label


def read_json_label(piece: str) -> str:
    """The value of `label` in one JSON object, whole or cut off; empty where there is none."""
    quoted = (JSON_LABEL_PATTERN.findall(piece) or ['""'])[0]
    try:
        return json.loads(quoted, strict=False)
    except ValueError:  # in single quotes, or with an escape that JSON does not know
        return quoted[1:-1]


def read_numbers(box: str) -> list[float]:
    """The text of a box as `[x1, y1, x2, y2]`, corners in order."""
    xa, ya, xb, yb = map(float, re.findall(r"-?\d+(?:\.\d+)?", box))
    return [min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)]


def promises_box(piece: re.Match) -> bool:
    """Whether a piece without a box should have had one: `{"objects": null}` says that there is nothing."""
    return not piece[0].endswith("}") or re.search("box|label", piece[0]) is not None


# %%
answers_in_the_wild = [
    "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(14,57),(991,603)<|box_end|><|im_end|>",
    "nutrition-table<box>(265,492),(735,842)>",
    "The nutrition table is at (991, 603), (14, 57).",
    '```json\n[{"bbox_2d": [14, 57, 991, 603], "label": "nutrition-table"}, {"bbox_2d": [12, 4',
    "nutrition-table(14,57),(99",
    "There is no nutrition table in this image.",
]
table = pd.DataFrame([{"answer": text} | vars(parse_answer(text)) for text in answers_in_the_wild])
table.drop(columns="spans").astype(str).style.format(escape="html").hide()

# %% [markdown]
# The first four are read, the fourth in part; the fifth was cut off; the last holds nothing, and nothing is wrong with
# that.

# %% [markdown]
# How sure was the model? One answer with the probability of each of its tokens. Most tokens of the format are certain;
# the digits are where a model decides. The first digit of a coordinate is worth hundreds of the grid's units, the last
# one only single units, so that a model may be unsure of it and the box good all the same.


# %%
#| export plots
def plot_token_probabilities(answers: dict[str, Answer]) -> plt.Figure:
    """Answers token by token, one row each: the bar is the probability that the model gave its choice."""
    figure, grid = plt.subplots(len(answers), 1, figsize=(12, 2.2 * len(answers)), layout="constrained", squeeze=False)
    for axes, (name, answer) in zip(grid.flat, answers.items(), strict=True):
        texts = [answer.text[a:b] for a, b in zip([0, *answer.ends], answer.ends, strict=False)]
        colours = [ORANGE if text.isdigit() else BLUE for text in texts]
        axes.bar(range(len(texts)), answer.probabilities, color=colours)
        marks = [text.replace("<|", "").replace("|>", "") for text in texts]
        axes.set_xticks(range(len(texts)), marks, rotation=60, ha="right", fontsize=7, parse_math=False)
        axes.set(ylim=(0, 1.05), ylabel="probability", title=name)
    return figure


# %%
first_answer = answers[0]
plot_token_probabilities({"The base model's answer about the first image (digits in orange)": first_answer})
plt.show()

# %% [markdown]
# ## 9. Measuring
#
# How good is a detector that writes its boxes, and how sure can one be of the number? A box is judged by its IoU with
# the true one. With several tables in an image, boxes have to be paired first. A predicted box may claim one table
# only; of all assignments the one with the largest sum of IoU counts, and a table for which no box is left counts 0.
# On two tables and two boxes it can be checked by hand: taking the best pair first, 0.67, leaves nothing for the
# second table.


# %%
#| export metrics: Boxes matched one to one, metrics with intervals, paired comparisons.
def boxes_of(record: dict, side: str) -> list[list[float]]:
    """The boxes of a record's "truth" or "prediction", `[x1, y1, x2, y2]` in pixels."""
    return [labelled["box"] for labelled in record[side]]


def compute_ious(truth: Sequence[dict], prediction: Sequence[dict]) -> np.ndarray:
    """IoU of every true with every predicted box, (true, predicted); 0 where a `category_id` of the two differs."""
    ious = box_iou(*([labelled["box"] for labelled in side] for side in (truth, prediction)))
    same = [[t.get("category_id") == p.get("category_id") for p in prediction] for t in truth]
    return ious * np.reshape(same, ious.shape)


def assign_boxes(ious: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns of an IoU matrix one to one: the indices of both. Pairs may have an IoU of 0.

    As many pairs as can be have at least `threshold`; then the sum is largest (Kuhn, "The Hungarian method", 1955).
    """
    tie_breaker = ious / (min(ious.shape) + 1)  # sums to less than one more pair would add
    return linear_sum_assignment((ious >= threshold) + tie_breaker, maximize=True)


def assigned_ious(ious: np.ndarray) -> np.ndarray:
    """Of an IoU matrix (true, predicted): what each true box gets in the assignment with the largest sum."""
    assigned, pairs = np.zeros(len(ious)), assign_boxes(ious)
    assigned[pairs[0]] = ious[pairs]
    return assigned


def match_boxes(truth: Sequence[Sequence[float]], prediction: Sequence[Sequence[float]]) -> list[float]:
    """IoU of every true box with the predicted box assigned to it, one to one; 0 where none was left."""
    return assigned_ious(compute_ious(*([{"box": box} for box in side] for side in (truth, prediction)))).tolist()


# %%
tables, predicted = [[0, 0, 10, 10], [0, 5, 10, 15]], [[0, 2, 10, 12], [0, 0, 10, 5]]
ious = box_iou(tables, predicted)
print(pd.DataFrame(ious.round(2), ["table 1", "table 2"], ["box 1", "box 2"]))
print("assigned:", np.round(match_boxes(tables, predicted), 2), "best box of each:", ious.max(axis=1).round(2))

# %% [markdown]
# The second line shows the other reading in use, in which every table takes the box that overlaps it most, even if
# another table took the same. The command `python -m helpers.evaluation` gives both; this notebook counts one to one.
#
# A parsed answer becomes part of a *record*: what is kept of one image, with boxes in pixels. A box that leaves the
# image is clamped to it, and one that has no area then counts as unread. The score of a box is the geometric mean of
# the probabilities of the tokens that write its coordinates. `iou` is the mean over the image's true boxes.


# %%
#| export detection: Detectors asked about single images and whole datasets; what is kept of the answers.
def to_record(row: dict, task: Task) -> dict:
    """What is known of an image before it is asked about.

    id, group (the barcode), width, height, resized (width and height as the model sees it), and truth: labels and
    boxes in pixels of the upright image; where the task has several labels, each with its `category_id`.
    """
    image, boxes, labels = read_row(row)
    truth = [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)]
    known = {"id": row["image_id"], "group": read_barcode(row.get("meta"))}
    known |= {"width": image.width, "height": image.height}
    resized = list(resized_size(*image.size, **task.pixel_budget))
    return known | {"resized": resized, "truth": number_labels(truth, task.labels)}


def normalize_label(label: str) -> str:
    """Labels that differ in case, spaces, underscores or hyphens only are the same."""
    return re.sub(r"[\s_-]+", "-", label.strip().lower())


def number_labels(boxes: Sequence[dict], labels: Sequence[str]) -> list[dict]:
    """Labelled boxes with the place of their label among `labels` as `category_id`, 0 for others; one needs none."""
    numbers = {normalize_label(label): number for number, label in enumerate(labels, start=1)}
    if len(numbers) < 2:
        return list(boxes)
    return [labelled | {"category_id": numbers.get(normalize_label(labelled["label"]), 0)} for labelled in boxes]


def add_answer(record: dict, answer: Answer, task: Task) -> dict:
    """A record with what a model made of it: raw (the answer), prediction, unread, iou.

    A prediction has label, box in pixels of the upright image, and score if token probabilities are known; iou is the
    mean over true boxes, None where there are none.
    """
    parsed = parse_answer(answer.text)
    place = record["width"], record["height"], task.family, record.get("resized")
    prediction, unread = [], [*parsed.unread]
    for (label, written), span in zip(parsed.objects, parsed.spans, strict=True):
        box = from_model_coordinates(written, *place)
        score = {"score": answer.score(*span)} if answer.probabilities else {}
        if has_area(box):
            prediction.append({"label": label, "box": box} | score)
        else:
            unread.append(f"{label}{written}")
    prediction = number_labels(prediction, task.labels)
    ious = assigned_ious(compute_ious(record["truth"], prediction))
    found = {"raw": answer.text, "prediction": prediction, "unread": unread}
    return record | found | {"iou": float(ious.mean()) if len(ious) else None}


def detect(image: Image.Image, detector: Detector) -> list[dict]:
    """The objects in one image: `{"label", "box", "score"}`, boxes in pixels of the upright image."""
    upright = to_upright_rgb(image)
    resized = resized_size(*upright.size, **detector.task.pixel_budget)
    record = {"width": upright.width, "height": upright.height, "resized": resized, "truth": []}
    answer = generate(detector, to_questions([upright], detector))[0]
    return add_answer(record, answer, detector.task)["prediction"]


# %%
found = [[labelled["box"] for labelled in detect(image, base)] for image in sample_images]
first_found = found[0]
to_jpeg(plot_images(sample_images, sample_boxes, found))

# %% [markdown]
# Now the loop over the images. It sorts them by size, so that a batch needs little padding, and it loses nothing of an
# answer: the raw text is kept beside what was read of it, so that a doubt about the parser can be settled later. What
# it keeps of each image is enough to compute every metric again later.


# %%
#| export detection
def evaluate_detector(detector: Detector, rows: Dataset, show_progress: bool = True) -> list[dict]:
    """Ask the detector about every row. One record per image, in the order of the rows: see `add_answer`.

    Processes of torchrun ask about a share each, and all get the records of all; of a sharded model all ask together.
    """
    if not torch.distributed.is_initialized() or isinstance(detector.model, FSDPModule):
        return ask_about_all(detector, rows, show_progress)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = rows.select(range(len(rows) * rank // processes, len(rows) * (rank + 1) // processes))
    shares = [None] * processes
    torch.distributed.all_gather_object(shares, ask_about_all(detector, share, show_progress and rank == 0))
    return [record for share in shares for record in share]


def ask_about_all(detector: Detector, rows: Dataset, show_progress: bool) -> list[dict]:
    """`evaluate_detector` in one process. Batches that do not fit into a GPU's memory are halved."""
    detector.model.eval()
    batch_size = detector.batch_size or (64 if torch.cuda.is_available() else 32)
    try:
        return ask_in_batches(replace(detector, batch_size=batch_size), rows, show_progress)
    except torch.cuda.OutOfMemoryError:
        if batch_size == 1:
            raise
    print(f"out of memory with {batch_size} images at once: going on with {batch_size // 2}")
    release_memory()
    return ask_about_all(replace(detector, batch_size=batch_size // 2), rows, show_progress)


def ask_in_batches(detector: Detector, rows: Dataset, show_progress: bool) -> list[dict]:
    """`evaluate_detector` with a batch size that is set; images of like size share a batch."""
    sizes = [resized_size(*header[:2], **detector.task.pixel_budget) for header in read_headers(rows)]
    order = np.argsort([-width * height for width, height in sizes], kind="stable")

    def prepare(number: int) -> tuple[int, dict, dict[str, torch.Tensor]]:
        row = rows[int(number)]
        return number, to_record(row, detector.task), to_question(read_row(row)[0], detector)

    workers, done = min(8, os.cpu_count() // 2) if torch.cuda.is_available() else 0, {}
    ahead = {"num_workers": workers, "prefetch_factor": max(2, detector.batch_size // workers) if workers else None}
    prepared = iter(DataLoader(order, batch_size=None, collate_fn=prepare, pin_memory=workers > 0, **ahead))
    with tqdm(total=len(rows), desc="evaluating", unit="image", disable=not show_progress) as progress:
        while batch := list(islice(prepared, detector.batch_size)):
            numbers, records, questions = zip(*batch, strict=True)
            answers = generate(detector, join_questions(questions, detector))
            for number, record, answer in zip(numbers, records, answers, strict=True):
                done[number] = add_answer(record, answer, detector.task)
            progress.update(len(batch))
    return [done[number] for number in range(len(rows))]


# %%
#| export data
def read_headers(rows: Dataset) -> list[tuple[int, int, int]]:
    """Width and height in pixels when upright, and EXIF orientation, of every image; no pixel is decoded."""
    headers = []
    for row in rows.select_columns("image").cast_column("image", ImageFeature(decode=False)):
        image = open_encoded(row["image"])
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        on_its_side = orientation >= 5
        headers.append((*(image.size[::-1] if on_its_side else image.size), orientation))
    return headers


# %% [markdown]
# A zero-shot baseline measures the prompt as much as the model. The base is asked with the words that the fine-tuned
# models are trained with, so that the difference will be due to training alone. (Other words are an exercise.)

# %%
base_records = evaluate_detector(base, splits.evaluation)
print(f"{task.question}\n-> {base_records[0]['raw']}")

# %% [markdown]
# Nearly every metric is a ratio of two sums over images. So each image is reduced to a row of counts first; then a
# metric, and its value on any resample of the images, is a weighted sum over these rows. A predicted box is a *true
# positive* if its IoU with the table it is assigned to is at least 0.5.
#
# | | |
# |---|---|
# | `mean_iou`, `median_iou` | IoU of an image (mean over its tables, one to one), over images with tables |
# | `iou_gt_0.5`, `iou_gt_0.7` | share of these images above that IoU |
# | `precision`, `recall`, `f1` | true positives over predicted boxes; over tables; the harmonic mean of the two |
# | `detection_rate` | share of images whose answer held a readable box, right or wrong |
# | `malformed_rate` | share of images whose answer held something that could not be read |
#
# The mean IoU rewards every bit of overlap; the shares above 0.5 and 0.7 ask whether a box is good enough for a
# purpose. To crop a table for reading its text, a box at 0.5 has usually lost some lines or taken in a lot of
# surroundings, one at 0.7 rarely. An answer without a readable box counts as IoU 0, so that silence is not rewarded.
#
# Labels do not count here: a base model that writes "nutrition facts" has found the table.
# `notebooks/04_evaluation_analysis` holds the exact definitions, COCO's average precision, what changes when labels do
# count, the kinds of errors, and how far the scores can be believed.


# %%
#| export metrics
RATIOS = {  # metric: numerator, denominator; columns of `score_images`
    "mean_iou": ("iou", "with_truth"),
    "detection_rate": ("detected", "images"),
    "iou_gt_0.5": ("iou_gt_0.5", "with_truth"),
    "iou_gt_0.7": ("iou_gt_0.7", "with_truth"),
    "mean_best_iou": ("best_iou", "truths"),
    "precision": ("true_positives", "predictions"),
    "recall": ("true_positives", "truths"),
    "malformed_rate": ("malformed", "images"),
    "boxes_per_empty_image": ("predictions_on_empty", "empty"),
}


def score_image(record: dict, threshold: float) -> dict[str, float]:
    """One record of `evaluate_detector` as the counts and sums that the metrics are made of."""
    truth, prediction = record["truth"], record["prediction"]
    ious = compute_ious(truth, prediction)
    iou = assigned_ious(ious).mean() if truth else 0.0
    counts = {"images": 1, "with_truth": len(truth) > 0, "truths": len(truth), "predictions": len(prediction)}
    counts |= {"empty": not truth, "predictions_on_empty": 0 if truth else len(prediction)}
    counts |= {"iou": iou, "iou_gt_0.5": iou > 0.5, "iou_gt_0.7": iou > 0.7}
    counts |= {"detected": len(prediction) > 0, "malformed": len(record.get("unread", [])) > 0}
    counts["true_positives"] = (ious[assign_boxes(ious, threshold)] >= threshold).sum()
    return counts | {"best_iou": ious.max(axis=1, initial=0).sum()}


def score_images(records: Sequence[dict], threshold: float) -> pd.DataFrame:
    """`score_image` for every record, one row each. Raises ValueError when there is none."""
    if not records:
        raise ValueError("No image was evaluated: EVAL_SAMPLES must be at least 1.")
    return pd.DataFrame([score_image(record, threshold) for record in records], dtype=float)


# %%
#| export metrics
def compute_metrics(scores: pd.DataFrame, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of weighted images: `weights` is (resamples, images), every metric (resamples,).

    What is not defined is NaN, such as a mean over true boxes where there are none; precision without any predicted
    box is 0, as in scikit-learn.
    """
    sums = dict(zip(scores.columns, (weights @ scores.to_numpy()).T, strict=True))
    with np.errstate(invalid="ignore"):  # 0 / 0
        metrics = {name: sums[part] / sums[whole] for name, (part, whole) in RATIOS.items()}
        metrics["f1"] = 2 * sums["true_positives"] / (sums["truths"] + sums["predictions"])
    return metrics | {"precision": np.nan_to_num(metrics["precision"])}


def summarize(records: Sequence[dict], threshold: float = 0.5) -> dict[str, float | None]:
    """Every metric over the records of `evaluate_detector`; None (JSON has no NaN) where it is not defined.

    `threshold` is the IoU from which on an assigned pair is a true positive. Raises ValueError without records.
    """
    scores = score_images(records, threshold)
    metrics = {name: value[0] for name, value in compute_metrics(scores, np.ones((1, len(records)))).items()}
    median = scores["iou"][scores["with_truth"] > 0].median()
    metrics = {"mean_iou": metrics["mean_iou"], "median_iou": median} | metrics
    return {name: None if math.isnan(value) else float(value) for name, value in metrics.items()} | {"n": len(records)}


# %% [markdown]
# The yardstick of section 2 gets records too, so that it can be measured and shown like any model.


# %%
#| export detection
def answer_with_same_box(records: Sequence[dict], box: Sequence[float], label: str) -> list[dict]:
    """Records of the same images for a detector that always answers with `box`, fractions of the image in 0..1."""
    answer = Answer(format_answer([label], [to_grid(box, 1, 1)]))
    return [add_answer(record, answer, Task("", (label,))) for record in records]


# %%
same_box_records = answer_with_same_box(base_records, constant_box, train_boxes.category.mode()[0])
measured = {"same box": same_box_records, "base": base_records}
SHOWN = ["mean_iou", "iou_gt_0.5", "precision", "recall", "detection_rate", "malformed_rate", "n"]
pd.DataFrame({name: summarize(records) for name, records in measured.items()}).loc[SHOWN].style.format(precision=3)

# %% [markdown]
# The base of this demo nearly always writes well-formed boxes, of other things: it knows the format and eight kinds of
# objects, and answers with one of those. The box that never looks beats it by far. (Section 2 printed a slightly lower
# mean for it, over boxes; here the mean is over images.)
#
# **Noise.** With a hundred images, a difference of two hundredths is often chance: other images from the same source
# would have given other numbers. The bootstrap imitates this. It draws as many images as there are, with replacement,
# 2,000 times; the middle 95 % of the results are the interval. Images of the same product (the same `group`, here the
# barcode) are not independent, so whole groups are drawn.
#
# Two models are compared on the *same* draws. What is hard in a draw is hard for both, so the interval of their
# difference is much narrower than the two intervals suggest. Only if it excludes 0 is one called better. With many
# comparisons one of them will exclude 0 by chance, about one in twenty; no correction is made for that here.


# %%
#| export metrics
def resample_weights(records: Sequence[dict], resamples: int = 2000, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each image is in each bootstrap resample of whole groups, (100, images) at a time."""
    keys = [record.get("group") or ("image", number) for number, record in enumerate(records)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    columns, shares = [numbers[key] for key in keys], np.full(len(numbers), 1 / len(numbers))
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 100):
        yield generator.multinomial(len(numbers), shares, min(100, resamples - start))[:, columns]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of bootstrap values; None where the metric is not defined."""
    defined = values[~np.isnan(values)]
    return tuple(map(float, np.quantile(defined, [0.025, 0.975]))) if len(defined) else None


def bootstrap_metrics(records: Sequence[dict], threshold: float = 0.5, seed: int = 0) -> dict[str, np.ndarray]:
    """All metrics of `summarize` but the median, on every resample, (resamples,) each."""
    scores = score_images(records, threshold)
    blocks = [compute_metrics(scores, weights) for weights in resample_weights(records, seed=seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def bootstrap_intervals(records: Sequence[dict], threshold: float = 0.5, seed: int = 0) -> dict[str, tuple | None]:
    """95 % percentile intervals (Efron, 1979) of the metrics of `bootstrap_metrics`."""
    return {name: percentile_interval(values) for name, values in bootstrap_metrics(records, threshold, seed).items()}


# %%
#| export metrics
def check_same_images(records: Sequence[dict], others: Sequence[dict]) -> None:
    """Raise ValueError unless both are about the same images, in the same order."""
    if [record["id"] for record in records] != [record["id"] for record in others]:
        found, remedy = f"{len(records)} and {len(others)} records", "the same EVAL_SPLIT, EVAL_SAMPLES and SEED"
        raise ValueError(f"Not the same images in the same order ({found}): evaluate both models with {remedy}.")


def compare_records(records: Sequence[dict], others: Sequence[dict], metric: str = "mean_iou") -> dict:
    """Paired bootstrap of how much more `others` have of a metric than `records` of the same images.

    Gives difference, low and high (95 %), and a verdict: "better", "worse", or "no difference seen" unless the
    interval excludes 0. Raises ValueError if the images differ.
    """
    check_same_images(records, others)
    difference = summarize(others)[metric] - summarize(records)[metric]
    low, high = percentile_interval(bootstrap_metrics(others)[metric] - bootstrap_metrics(records)[metric])
    more, less = ("worse", "better") if metric in ("malformed_rate", "boxes_per_empty_image") else ("better", "worse")
    verdict = more if low > 0 else less if high < 0 else "no difference seen"
    return {"difference": difference, "low": low, "high": high, "verdict": verdict}


def describe_difference(records: Sequence[dict], others: Sequence[dict]) -> str:
    """How much better `others` are than `records` on the same images, and whether that is more than noise."""
    result = compare_records(records, others)
    return "{difference:+.3f} [{low:+.3f}, {high:+.3f}] mean IoU: {verdict}".format(**result)


# %%
#| export metrics
def compare_table(records_by_name: dict[str, Sequence[dict]], threshold: float = 0.5) -> pd.DataFrame:
    """All metrics of several models as text with 95 % intervals, `0.729 [0.68, 0.78]`, one row per model."""
    rows = {}
    for name, records in records_by_name.items():
        values, intervals = summarize(records, threshold), bootstrap_intervals(records, threshold)
        texts = {metric: "n/a" if value is None else f"{value:.3f}" for metric, value in values.items()}
        texts |= {m: "{} [{:.2f}, {:.2f}]".format(texts[m], *pair) for m, pair in intervals.items() if pair}
        rows[name] = texts | {"n": values["n"]}
    return pd.DataFrame.from_dict(rows, orient="index")


# %%
print("the same box against the base:", describe_difference(base_records, same_box_records))
print("the same box against itself:  ", describe_difference(same_box_records, same_box_records))
compare_table(measured)[SHOWN].T

# %% [markdown]
# How to read it: the intervals of two columns may overlap although one model is better, because both were asked about
# the same images; and a model compared with itself has a difference of 0, whatever its interval. So tables give a
# feeling for the size of things, and the paired difference decides.
#
# Every result goes to disk as soon as it is there. A later question ("which images got worse?") is then a matter of
# reading files, not of a GPU. One class knows what is in the folder that a run leaves; it is the third of the values
# that are passed on.


# %%
#| export runs: The folder that a run leaves: how it was made, its log, its results.
HOW = ["train_vision", "precision", "lora_target_modules", "lora_rank", "lora_alpha", "learning_rate", "collator"]
DECISIVE = [*HOW, "loss_function", *(part.name for part in fields(Task)), "schedule", "rows", "base_hash"]


class OtherRunError(ValueError):
    """A folder holds a run that was made otherwise."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one model: weights or adapter, processor and log if it was trained, and its results."""

    path: Path

    @property
    def is_trained(self) -> bool:
        """Whether a training has ended here."""
        return (self.path / "recipe.json").exists()

    def read_state(self) -> dict:
        """`run.json`, what was begun here; of older runs `recipe.json`, and empty where there is neither."""
        file = next((file for name in ("run", "recipe") if (file := self.path / f"{name}.json").exists()), None)
        return json.loads(file.read_text()) if file else {}

    def begin(self, description: dict) -> None:
        """Note what is to be trained here. Raises OtherRunError with the differences where it is something else."""
        known, wanted = self.read_state(), json.loads(json.dumps(description))
        others = [name for name in DECISIVE if known and known.get(name) != wanted[name]]
        if others:
            different = "; ".join(f"{name} was {known.get(name)!r}, is {wanted[name]!r}" for name in others)
            remedy = "To keep it set another OUTPUT_DIR; to replace it delete it, or all recipes' with AGAIN=True"
            raise OtherRunError(f"{self.path} holds another run: {different}. {remedy}.")
        if not self.is_trained:
            (self.path / "metrics.json").unlink(missing_ok=True)  # of an older training
            write_json(self.path / "run.json", wanted)

    def read_recipe(self) -> dict:
        """`recipe.json`: the recipe's fields, what it started from, task, settings and versions."""
        return json.loads((self.path / "recipe.json").read_text())

    def read_task(self) -> Task:
        """What the model was trained to answer, from `recipe.json`."""
        saved = self.read_recipe()
        return Task(**{part.name: saved[part.name] for part in fields(Task)})

    def read_log(self, key: str) -> pd.Series:
        """One logged number by optimiser step, from `trainer_state.json`."""
        log = json.loads((self.path / "trainer_state.json").read_text())["log_history"]
        return pd.Series({entry["step"]: entry[key] for entry in log if key in entry}, dtype=float)

    def read_records(self) -> list[dict]:
        """The lines of `predictions.jsonl`."""
        return [json.loads(line) for line in (self.path / "predictions.jsonl").read_text().splitlines()]

    def write_records(self, records: Sequence[dict], about: dict | None = None) -> dict:
        """Write `predictions.jsonl`, and `metrics.json` with metrics, intervals and what they are about: returned."""
        metrics = summarize(records) | {"iou_threshold": 0.5, "intervals": bootstrap_intervals(records)}
        metrics |= {"about": about}
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(self.path / "predictions.jsonl", lines.encode())
        write_json(self.path / "metrics.json", metrics)
        return metrics


# %%
#| export runs
def write_json(file: Path, value: dict) -> None:
    """Write JSON for people to read."""
    write_file(file, json.dumps(value, indent=2).encode() + b"\n")


def write_file(file: Path, content: bytes) -> None:
    """Write through a temporary file: whoever is interrupted keeps the old file, never half of the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # a part of it would fill a disk that is full already


# %%
RunFolder(output_dir / "same-box").write_records(same_box_records)
RunFolder(output_dir / "base").write_records(base_records)
print((output_dir / "base/predictions.jsonl").read_text().splitlines()[0])

# %% [markdown]
# ## 10. Making it fast
#
# The plain way to fine-tune a 7B model uses a quarter of what the GPU can do. What was done about it here, in the
# order of what it gains. All of it but the 8 bits is on where it holds, and changes what is computed by no more than
# rounding. Measured on one H200 with random weights of the 7B shape, 1,225 image tokens per image and 16 images a
# step; "stock" is TRL as its documentation shows it, without checkpointing (`python -m helpers.benchmark`):
#
# | images per second, GiB that PyTorch took at most | r1 | r2 | r4 |
# |---|---|---|---|
# | stock: 2 images at once, 8 times | 4.5, 34 | 4.2, 62 | 2.9, 52 |
# | as planned here | **11.5**, 115 | **6.7**, 117 | **6.2**, 118 |
# | with `PRECISION = "fp8"` | 15.5, 128 | | 6.7, 74 |
# | planned for a GPU of 24 GB | 8.0, 16 | | 4.5, 20 |
# | images of four sizes: stock, as planned | 3.6, 12.0 | | 2.7, 5.6 |
#
# Left out one at a time, r1 falls from 11.5 to 4.5 with 2 images at once and activations computed twice, to 7.8
# without compiling, and to 8.7 without keeping features. Over 30 steps the mean loss of r4 differs from that of stock
# (the vision tower in 16 bits in both) by 0.1 %. It was 1.6 % with compiled layers as PyTorch makes them, which skip
# the rounding between two operations of one kernel: made to round as the others do, they are as fast.
#
# **Many images at once, activations kept if there is room.** Gradient checkpointing computes each layer twice to save
# memory. Where memory is not short, that is a third more work for nothing. So the plan is made from the free memory:
# as many images at once as fit without checkpointing, and if that is less than four, with it. What one step of the
# optimiser learns from, `BATCH_SIZE` images, stays the same; the data loader hands it over whole, and it is computed
# in micro-batches. More images at once keep a GPU busy whose kernels end sooner than Python can launch the next.
#
# The estimate counts what backward needs of each layer, in numbers per token: `6 width + 3.6 inner width` where it is
# trained, `4 width + 2.5 inner width` where gradients only pass through. Qwen3 normalises queries and keys: 3.5 times
# their width more. The factors were chosen to be above what was measured. When memory runs out all the same, the
# micro-batch is halved, and the step is computed again.


# %%
#| export speed: What makes training fast: a memory plan, micro-batches, compiled layers, kept features, 8 bits.
@dataclass(frozen=True)
class MemoryPlan:
    """How a step is computed: images at once, whether activations are computed twice, the estimated peak in bytes."""

    micro_batch_size: int
    checkpointing: bool
    peak: float


def count_activations(model: PreTrainedModel, recipe: TrainingRecipe, checkpointing: bool, max_pixels: int) -> float:
    """Numbers that the backward pass needs of one image of `max_pixels` pixels and its conversation; from above."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    patches = max_pixels / vision.patch_size**2
    tokens = patches / vision.spatial_merge_size**2 + 128
    block = model.model.visual.blocks[0]
    vision_width = block.attn.qkv.in_features
    inner = max(layer.out_features for layer in block.mlp.modules() if isinstance(layer, torch.nn.Linear))
    attention = model.model.language_model.layers[0].self_attn  # in Qwen3 queries and keys are normalised
    queries = attention.q_proj.out_features if "q_norm" in dict(attention.named_children()) else 0
    sizes = text.hidden_size, text.intermediate_size, queries, text.num_hidden_layers
    towers = [(tokens, *sizes, recipe.train_llm != "frozen")]
    if recipe.train_vision != "frozen":
        towers.append((patches, vision_width, inner, 0, vision.depth, True))
    total, largest = 0.0, 0.0
    for count, width, inner, queries, depth, is_trained in towers:
        layer = count * (3.5 * queries + (6 * width + 3.6 * inner if is_trained else 4 * width + 2.5 * inner))
        total += depth * (count * width if checkpointing else layer)
        largest = max(largest, layer)
    return total + 3 * largest if checkpointing else total


def count_trained(model: PreTrainedModel, recipe: TrainingRecipe) -> int:
    """Numbers that a recipe will train: rank x (in + out) for each layer with LoRA, or all of the vision tower."""
    pattern = re.compile(recipe.lora_target_modules or "nothing")
    layers = [layer for name, layer in model.named_modules() if pattern.fullmatch(name)]
    whole = sum(p.numel() for p in model.model.visual.parameters()) if recipe.train_vision == "full" else 0
    return whole + sum(recipe.lora_rank * (layer.in_features + layer.out_features) for layer in layers)


def free_memory() -> int:
    """Bytes that can still be taken, of all visible GPUs together; without a GPU, of the machine's memory.

    Under torchrun a process has one of the GPUs.
    """
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    if "LOCAL_RANK" in os.environ:
        return torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))[0]
    return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))


# %%
#| export speed
def can_compile(settings: SimpleNamespace) -> bool:
    """Whether layers are to be compiled: as COMPILE says, else where there is a GPU that it works on."""
    if settings.compile is not None:
        return settings.compile
    if torch.cuda.is_available() and not has_triton():
        print("layers are not compiled: Triton is missing or does not know this GPU")
    return torch.cuda.is_available() and has_triton()


def plan_memory(detector: Detector, recipe: TrainingRecipe, settings: SimpleNamespace, free: float) -> MemoryPlan:
    """The largest micro-batch that fits into 95 % of `free` bytes without checkpointing; if that is under 4, with it.

    MICRO_BATCH_SIZE and GRADIENT_CHECKPOINTING of the settings take its place where they are given.
    """
    pixels = detector.task.pixel_budget["max_pixels"]
    # in float32: weight, gradient, two moments; a vision tower that is trained whole was loaded in 16 bits before
    fixed = count_trained(detector.model, recipe) * (14 if recipe.train_vision == "full" else 16)
    sizes = [settings.micro_batch_size] if settings.micro_batch_size else halvings(settings.batch_size)
    asked, plans = settings.gradient_checkpointing, []
    for checkpointing in [False, True] if asked is None else [asked]:
        image = best_dtype().itemsize * count_activations(detector.model, recipe, checkpointing, pixels)
        image *= 1 if can_compile(settings) else 1.5  # layers that are not compiled keep more
        plans += [MemoryPlan(size, checkpointing, fixed + size * image) for size in sizes]
    enough = min(4, sizes[0])
    fitting = [plan for plan in plans if plan.peak < 0.95 * free]
    return next((p for p in fitting if p.checkpointing or p.micro_batch_size >= enough), plans[-1])


def describe_plan(plan: MemoryPlan) -> str:
    """What was planned, in a sentence."""
    how = "activations computed twice" if plan.checkpointing else "activations kept"
    return f"{plan.micro_batch_size} images at once, {how}: about {plan.peak / 2**30:.1f} GiB besides the loaded model"


def halvings(size: int) -> list[int]:
    """16, 8, 4, 2, 1 for 16."""
    return [size, *halvings(size // 2)] if size > 1 else [1]


# %%
columns = {}
for gibibytes in (0.1, 0.3, 1, 24):
    plans = [plan_memory(base, recipe, settings, gibibytes * 2**30) for recipe in (R1, R2, R4)]
    columns[f"{gibibytes} GiB free"] = [describe_plan(plan) for plan in plans]
pd.DataFrame(columns, index=[recipe.name for recipe in (R1, R2, R4)]).style


# %%
#| export speed
def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of `size` rows of like length, the longest first; columns that none of the rows uses are cut off.

    `batch` is what a collator made, one image a row; rows stay a multiple of 8 tokens long.
    """
    if len(batch["input_ids"]) <= size:
        return (yield batch)
    mask, grid = batch["attention_mask"].bool(), batch["image_grid_thw"]
    images = batch["pixel_values"].split(grid.prod(dim=1).tolist())
    for rows in mask.sum(dim=1).argsort(descending=True, stable=True).split(size):
        columns = slice(8 * math.ceil(mask[rows].sum(dim=1).max().item() / 8))  # padding is on the right
        part = {name: tensor[rows, columns] for name, tensor in batch.items() if tensor.shape[:2] == mask.shape}
        yield part | {"pixel_values": torch.cat([images[row] for row in rows]), "image_grid_thw": grid[rows]}


# %% [markdown]
# **Layers are compiled.** Between its matrix products a layer does many small things: norms, activations, rotations.
# `torch.compile` makes a few kernels of them. Each layer is compiled by itself, so that all layers of a kind share one
# compilation; it takes about half a minute. If shapes change too often, PyTorch goes back to the slow road without a
# word; here that is an error. While a model writes answers it is not compiled: their shapes change with every token.


# %%
#| export speed
def describe_compilation() -> str:
    """What torch.compile made of the layers since `compile_layers`."""
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    return f"compiled {counters['frames']['ok']} of {counters['frames']['total']} frames, {breaks} graph breaks"


def compile_layers(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Compile each decoder layer, and each block of a vision tower that is trained. Raises where it falls back."""
    torch._dynamo.reset()  # what was compiled for another recipe counts towards the limit of recompilations
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.emulate_precision_casts = True  # rounds where layers that are not compiled round
    blocks = [] if recipe.train_vision == "frozen" else model.model.visual.blocks
    for layer in [*model.model.language_model.layers, *blocks]:
        layer.compile()


# %% [markdown]
# **A frozen vision tower sees each image once.** It gives the same features for the same image in every epoch. So in
# r1 and in the second stage of r3 they are kept on disk, in `OUTPUT_DIR/features`, under a hash of the tower's weights
# and of the image as the processor made it. A mirrored image, another pixel budget, or other weights are another hash,
# so that nothing stale can be found. The runs of the next sections and every evaluation on the way share what they
# have in common.


# %%
#| export speed
def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """xxHash of the bytes of some tensors, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_features(visual: PreTrainedModel, folder: Path) -> None:
    """Let a frozen vision tower compute the features of each image once; they are kept in `folder`.

    Images go through it one at a time and without autocast, so that their features do not depend on the batch.
    """
    compute, weights = visual.forward, hash_tensors(visual.parameters())

    def recall(patches: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        file = folder / weights / f"{hash_tensors([patches, grid])}.safetensors"
        try:
            return list(safetensors.torch.load_file(file, device=str(patches.device)).values())
        except FileNotFoundError:
            with torch.autocast(patches.device.type, enabled=False):
                output = compute(patches, grid_thw=grid, return_dict=True)
            features = [output.pooler_output, *output.get("deepstack_features", [])]
            named = {f"{place}": tensor.contiguous() for place, tensor in enumerate(features)}
            write_file(file, safetensors.torch.save(named))
            return features

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **options) -> VisionOutput:
        images = zip(hidden_states.split(grid_thw.prod(dim=1).tolist()), grid_thw.split(1), strict=True)
        first, *others = map(torch.cat, zip(*(recall(*image) for image in images), strict=True))
        return VisionOutput(pooler_output=first, deepstack_features=others)

    visual.forward = forward


# %% [markdown]
# **Attention in the vision tower, all images at once.** The patches of a batch are one long row, and each patch may
# look at its own image only (in Qwen2.5-VL mostly at its own window). transformers cuts the row into pieces and goes
# through them in a loop, in every block, and asks the GPU for their lengths each time. Pieces of equal size can be
# stacked instead, others filled up to the longest, with a mask. Where all images have one size that gains little (13.6
# images per second in place of 13.3 when a batch of 64 is answered); for windows of three sizes it is the difference
# between 2.0 and 7.6 images per second (r4 of Qwen2.5-VL-7B).


# %%
#| export speed
PACKED = "packed_sdpa_not_flash"  # transformers hands the lengths of the images to names that hold "flash"


def attend_images(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, max_length_q=None, **options):
    """Attention within each of several packed images or windows, (1, heads, patches, width); all of them at once."""
    images, packed = len(cu_seq_lens_q) - 1, [tensor.squeeze(0) for tensor in (query, key, value)]
    places = torch.arange(query.shape[2], device=query.device)
    if images * max_length_q == query.shape[2]:  # the mean length is the largest: all are equal
        stacked = [tensor.unflatten(1, (images, max_length_q)).transpose(0, 1) for tensor in packed]
        return scaled_dot_product_attention(*stacked).transpose(1, 2).flatten(0, 1)[None], None
    starts, ends = cu_seq_lens_q[:-1, None], cu_seq_lens_q[1:, None]
    filled = starts + torch.arange(8 * math.ceil(max_length_q / 8), device=query.device)  # (images, longest)
    # the backward pass of `embedding` is faster than that of an index
    stacked = [embedding(filled.clamp(max=len(places) - 1), tensor.transpose(0, 1).flatten(1)) for tensor in packed]
    stacked = [tensor.unflatten(2, (query.shape[1], -1)).transpose(1, 2) for tensor in stacked]
    attended = scaled_dot_product_attention(*stacked, (filled < ends)[:, None, None]).transpose(1, 2)
    image = torch.bucketize(places, ends.flatten(), right=True)
    return attended[image, places - starts.flatten()[image]][None], None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the vision tower attend through `attend_images`."""
    AttentionInterface.register(PACKED, attend_images)
    model.model.visual.config._attn_implementation = PACKED


# %%
questions, visual = to_questions(sample_images, base), deepcopy(base.model.model.visual)
cache_features(visual, output_dir / "features")
for kind in ("computed", "recalled"):
    clock = time.perf_counter()
    features = visual(questions["pixel_values"], grid_thw=questions["image_grid_thw"]).pooler_output.cpu()
    print(f"features {tuple(features.shape)} {kind} in {1000 * (time.perf_counter() - clock):.0f} ms")

# %% [markdown]
# **Frozen matrices in 8 bits.** NF4 saves memory and costs time, since every multiplication unpacks the weights first.
# GPUs since Ada and Hopper multiply numbers of 8 bits (e4m3: 4 bits of exponent, 3 of fraction) twice as fast as those
# of 16. Weights get a scale for each row once, and what comes in gets one for each token on the way. Only frozen
# layers of the language model can take it, and it is on for no recipe by default: `PRECISION = "fp8"`.
#
# What does it cost? r1 and r4 on the tiny base on one H200, three seeds each, 240 steps, rank 64, mean IoU on 512
# unseen images (`python -m helpers.train_recipe --recipe r4-joint --parameters helpers/tiny/demo.yaml`, with
# `--max-steps 240 --evaluations 2 --no-compile`, `--precision`, `--seed`, on a dataset drawn with `--validation
# 512`):
#
# | | nf4 | bf16 | fp8 | fp8 - nf4, three seeds together |
# |---|---|---|---|---|
# | r1 | 0.708, 0.696, 0.702 | 0.704, 0.669, 0.672 | 0.703, 0.682, 0.689 | -0.011 [-0.016, -0.005] |
# | r4 | 0.828, 0.825, 0.791 | 0.820, 0.802, 0.818 | 0.824, 0.822, 0.816 | +0.006 [+0.002, +0.011] |
#
# One interval says worse, the other better: they know of other images, not of other seeds, and from seed to seed the
# same precision moves by up to 0.037. Merged into 16 bits, each of the 18 models stayed within 0.003 of itself. So a
# loss by 8 bits is not shown, and neither is that there is none.


# %%
#| export speed
def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8 bits, and what to multiply each with to get it back: (rows, 1), float32."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (rows / scale).to(torch.float8_e4m3fn), scale


class Float8Product(torch.autograd.Function):
    """x W^T with both in 8 bits, a scale for each row; the gradient of x in the same way, none for W."""

    @staticmethod
    def forward(context, x, weight, weight_transposed, scale):
        context.save_for_backward(weight_transposed, scale)
        rows, row_scale = to_float8(x.flatten(0, -2))
        product = torch._scaled_mm(rows, weight.t(), row_scale, scale, out_dtype=x.dtype, use_fast_accum=True)
        return product.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(context, gradient):
        weight_transposed, scale = context.saved_tensors
        rows, row_scale = to_float8(gradient.flatten(0, -2) * scale.to(gradient.dtype))  # W's rows are its columns
        ones, dtype = torch.ones(1, weight_transposed.shape[0], device=gradient.device), gradient.dtype
        product = torch._scaled_mm(rows, weight_transposed.t(), row_scale, ones, out_dtype=dtype, use_fast_accum=True)
        return product.unflatten(0, gradient.shape[:-1]), None, None, None


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer in 8 bits. The matrix is kept twice, since the GPU reads the second factor by columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = Float8Product.apply(x.bfloat16(), self.weight, self.weight_transposed, self.scale)
        return product if self.bias is None else product + self.bias


def convert_to_float8(model: torch.nn.Module) -> None:
    """Turn every frozen linear layer of the language model into one of 8 bits, where the GPU can multiply them."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return print("8-bit products need an Ada or Hopper GPU: the language model stays in 16 bits")
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and "language_model" in name and "lora_" not in name:
            quantized, scale = to_float8(layer.weight.data)
            layer.__class__, layer.weight = Float8Linear, torch.nn.Parameter(quantized, requires_grad=False)
            layer.register_buffer("weight_transposed", quantized.t().contiguous(), persistent=False)
            layer.register_buffer("scale", scale.t().contiguous(), persistent=False)


# %% [markdown]
# The error of one product, in relation to its size, for a matrix of random numbers:

# %%
layer, x = torch.nn.Linear(1024, 1024, bias=False).requires_grad_(False), torch.randn(64, 1024)
example = torch.nn.ModuleDict({"language_model": torch.nn.ModuleList([layer])})
exact = layer(x)
convert_to_float8(example)
print(f"FP8 against {exact.dtype}: {(layer(x) - exact).norm() / exact.norm():.1%} off")

# %% [markdown]
# ## 11. Training
#
# The loop itself is the usual one: AdamW, a learning rate that rises over the first 3 % of the steps and then falls
# along a cosine, gradients clipped at a norm of 1, the next-token loss on the labelled tokens. TRL's `SFTTrainer` runs
# it. Most of what goes wrong with it goes wrong without an error, so some settings are
# here for what they prevent:
#
# - `remove_unused_columns=False`, `skip_prepare_dataset`: the examples are built above; TRL is not to touch them.
#   `max_length=None` says that nothing is to be cut; with a collator of one's own TRL cuts nothing either way.
# - Trainable weights are cast to float32 after the trainer is built. TRL stores those of a quantised model in
#   bfloat16, which keeps eight bits of a number: a step of the size of a usual learning rate is mostly rounded away
#   (`notebooks/05_dtype_and_device` shows it). The forward pass still runs in 16 bits where there is a GPU.
# - Several visible GPUs hold one model, layer by layer, or belong to the processes of `torchrun`. `DataParallel`,
#   which the Trainer would otherwise wrap around the model by itself, breaks both, so it is told of one GPU only.
# - bitsandbytes repacks 4-bit weights for speed at the first evaluation on some CPUs and cannot train them afterwards;
#   while training this is switched off.


# %%
#| export training
OPTIMISATION = {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "warmup_steps": 0.03}  # 0.03 of all steps
EXAMPLES = {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
VALIDATION = {"eval_on_start": True, "eval_strategy": "steps", "prediction_loss_only": True}
CHECKPOINTS = {"save_strategy": "steps"}  # the last and the best are kept: `CheckpointingTrainer`
SELECTION = {"load_best_model_at_end": True, "metric_for_best_model": "selection", "greater_is_better": True}


def create_training_config(recipe: TrainingRecipe, settings: SimpleNamespace, plan: MemoryPlan) -> SFTConfig:
    """TRL's settings for a run, which writes into OUTPUT_DIR/<recipe's name>; precision follows from the hardware."""
    on_gpu, dtype = torch.cuda.is_available(), best_dtype()
    config = SFTConfig(
        output_dir=str(Path(settings.output_dir) / recipe.name),
        run_name=recipe.name,
        learning_rate=recipe.learning_rate,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=max(1, settings.batch_size // int(os.environ.get("WORLD_SIZE", 1))),
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_checkpointing=plan.checkpointing,
        use_cpu=not on_gpu,  # else torchrun would not connect its processes on a CPU
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        dataloader_num_workers=min(8, os.cpu_count() // 2) if on_gpu else 0,
        seed=settings.seed,
        report_to=settings.report_to,
        project=os.environ.get("WANDB_PROJECT", Path(settings.output_dir).resolve().name),  # of trackers
        logging_steps=5,
        disable_tqdm=True,  # TrainingProgress takes its place
        **OPTIMISATION,
        **EXAMPLES,
        eval_steps=min(1 / settings.evaluations, 0.999999),  # of all steps; 1 would be every step
        save_steps=min(1 / settings.evaluations, 0.999999),
        **VALIDATION,
        **CHECKPOINTS,
        **SELECTION,
    )
    if config.n_gpu > 1:  # reading it sets it
        config._n_gpu = 1
    return config


# %%
#| export training
class TrainingProgress(ProgressCallback):
    """One bar with the latest loss, the same in notebooks, terminals and log files; `progress.json` for who watches.

    Tells `mirroring` the epoch.
    """

    def __init__(self, mirroring: Mirroring):
        super().__init__()
        self.mirroring = mirroring

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.mirroring.epoch = int(state.epoch)

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=self.current_step, unit="step", mininterval=5)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
        if state.is_world_process_zero:
            shown = ("loss", "eval_mean_iou")
            latest = {name: entry[name] for entry in state.log_history for name in shown if name in entry}
            progress = {"step": state.global_step, "steps": state.max_steps} | latest
            write_json(Path(args.output_dir) / "progress.json", progress)

    def on_prediction_step(self, *arguments, **options):
        """No bar for the validation loss."""


# %% [markdown]
# `notebooks/05_dtype_and_device` takes the effective batch apart.
#
# What is frozen and what gets LoRA is decided by the recipe; whether it came out so is checked on the result. The
# check at work, on the empty model and a LoRA pattern of which one half matches nothing. PEFT accepts it without a
# word:


# %%
#| export training
def check_trainable_parameters(model: torch.nn.Module, recipe: TrainingRecipe) -> None:
    """Raise RuntimeError unless the recipe's areas are trained, in float32, and nothing else is."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    full = r"model\.visual\..*" if recipe.train_vision == "full" else "nothing"
    pattern = re.compile(rf"({recipe.lora_target_modules})\.lora_[AB]\..*|{full}")
    strays = [name for name, p in trained.items() if not pattern.fullmatch(name) or p.dtype != torch.float32]
    wanted = {"visual": recipe.train_vision != "frozen", "language_model": recipe.train_llm != "frozen"}
    missing = [area for area, is_trained in wanted.items() if is_trained and area not in map(area_of, trained)]
    if strays or missing:
        raise RuntimeError(f"{recipe.name}: nothing is trained in {missing}, unexpectedly trained: {strays[:3]}.")
    print(f"{recipe.name}: {sum(p.numel() for p in trained.values()):,} trainable parameters")


# %%
half_wrong = LoraConfig(target_modules=rf"({LLM_LAYERS})|(.*vision_tower\..*qkv)", task_type="CAUSAL_LM")
try:
    check_trainable_parameters(get_peft_model(build_empty_model(settings.model_id), half_wrong), CATALOGUE["r4-joint"])
except RuntimeError as error:
    print(error)

# %% [markdown]
# The loss does not say whether boxes get better, so the trainer is extended in five places:
#
# - An evaluation also asks about the validation split. The mean IoU chooses the checkpoint; between equal ones, the
#   lower loss. It starts at step 0, so that the curve shows where the training began.
# - The norm of the gradient of each tower is logged, before clipping (`notebooks/06_quantization_and_trainable_params`
#   draws it). A tower that is to be trained and gets no gradient stops the run: that is how a wrong LoRA target, or a
#   tower frozen by mistake, shows itself. So does a gradient that is not a number, which the Trainer would log as a
#   loss of 0.
# - A checkpoint of a model that is trained without adapters holds what is trained and nothing else, by its names in
#   memory. By default it holds all weights under the names of the hub, of which the Trainer recognises none when it
#   reads them back; it warns, and goes on with other weights.
# - A checkpoint is written under another name first. Who is interrupted while writing keeps the one before it.
# - Where a checkpoint lacks a trained weight, or holds an unknown one, reading it back is an error.


# %%
#| export training
class CheckpointingTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are whole, hold what is trained, and are read back or refused."""

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint gets its name when it is whole; then an older one may go."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.args.output_dir = str(folder / "unfinished")
        super()._save_checkpoint(model, trial)
        self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        self.find_best()
        if self.is_world_process_zero():
            self.state.save_to_json(folder / "unfinished" / name / "trainer_state.json")
            (folder / "unfinished" / name).replace(folder / name)
            rotate_checkpoints(str(folder), 1, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def find_best(self) -> None:
        """Where the best checkpoint is, also after the folder was moved."""
        step = self.state.best_global_step
        self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{step}" if step else None

    def _run_epoch(self, *arguments, **options) -> None:
        """Nothing is left to do where the checkpoint to go on from was that of the last step."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*arguments, **options)
        self.control.should_training_stop = True

    def _finalize_training(self, *arguments):
        self.find_best()
        return super()._finalize_training(*arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapters as usual; of other models the trained weights, by their names in memory.

        Of a sharded model `state_dict` has the whole weights, in the first process only.
        """
        if isinstance(self.model, PeftModel):
            return super()._save(output_dir, state_dict)
        if not self.is_world_process_zero():
            return
        trained = {name: p.data for name, p in self.model.named_parameters() if p.requires_grad}
        if self.is_fsdp_enabled:
            trained = {name: state_dict[name] for name in trained}
        trained = {name: tensor.contiguous() for name, tensor in trained.items()}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained, Path(output_dir) / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result) -> None:
        """Raise RuntimeError unless a checkpoint held each trained weight and nothing unknown."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        lost = [*trained.intersection(load_result.missing_keys), *load_result.unexpected_keys]
        if lost:
            raise RuntimeError(f"The checkpoint does not fit what is trained: {lost[:3]}. Delete it to start again.")


# %%
names = [name for name, _ in empty_model.named_parameters()]
trained = [name for name in names if area_of(name) == "visual"]
print(f"a checkpoint of r2 holds {len(trained)} of the model's {len(names)} tensors, the first as {trained[0]}")


# %%
#| export training
class DetectionTrainer(CheckpointingTrainer):
    """Trains a detector, and asks it about `validation_rows` at every evaluation."""

    def __init__(
        self,
        detector: Detector,
        validation_rows: Dataset,
        micro_batch_size: int,
        loss_function: Callable | None = None,
        **arguments,
    ):
        super().__init__(model=detector.model, processing_class=detector.processor, **arguments)
        self.detector, self.validation_rows = replace(detector, model=self.model), validation_rows
        self.micro_batch_size, self.loss_function = micro_batch_size, loss_function

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        """The loss as usual, the mean IoU, and `eval_selection`, by which the best checkpoint is chosen."""
        with torch.compiler.set_stance("force_eager"):
            metrics = super().evaluate(*arguments, **options)
            records = evaluate_detector(self.detector, self.validation_rows, show_progress=False)
        mean_iou = summarize(records)["mean_iou"]
        self.log({"eval_mean_iou": mean_iou})
        return metrics | {"eval_mean_iou": mean_iou, "eval_selection": mean_iou - 1e-6 * metrics["eval_loss"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The recipe's loss, if it has its own; evaluations keep cross-entropy, in which recipes can be compared."""
        if self.loss_function is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, others = inputs["labels"], {name: inputs[name] for name in inputs if name != "labels"}
        first = max(1, (labels != -100).any(dim=0).nonzero()[0].item())  # no logits before: the vocabulary is large
        logits = model(**others, use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits
        loss = self.loss_function(logits[:, :-1], labels[:, first:], num_items_in_batch)
        return loss * self.accelerator.num_processes  # which share the tokens that were counted; DDP takes the mean

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """A step in micro-batches; logs gradient norms by area. Raises RuntimeError where one is 0, or no number."""
        loss = self.add_gradients(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.state.global_step % self.args.logging_steps == 0:
            scaler = self.accelerator.scaler  # in float16 only; it skips steps whose gradients overflow
            scale = scaler.get_scale() if scaler else 1.0
            norms = {area: norm / scale for area, norm in gradient_norms(self.model).items()}
            self.log({f"grad_norm_{area}": norm for area, norm in norms.items()})
            if 0.0 in norms.values() or not (scaler or math.isfinite(sum(norms.values()))):
                remedy = "0: check freezing and LoRA targets; nan or inf: check the loss, precision and padding"
                raise RuntimeError(f"Trained, but without a usable gradient: {norms}. {remedy}.")
        return loss

    def add_gradients(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Loss of a batch, and its gradients; where memory runs out, once more in micro-batches of half the size."""
        try:
            parts = split_batch(inputs, self.micro_batch_size)
            return sum(super(DetectionTrainer, self).training_step(model, part, num_items_in_batch) for part in parts)
        except torch.cuda.OutOfMemoryError as error:
            if self.micro_batch_size == 1 or self.args.world_size > 1:  # others of torchrun's processes would wait
                remedy = "Lower MICRO_BATCH_SIZE; at 1, set GRADIENT_CHECKPOINTING=True or a lower MAX_PIXELS."
                raise RuntimeError(f"Out of memory with {self.micro_batch_size} images at once. {remedy}") from error
        self.micro_batch_size //= 2
        print(f"out of memory: going on with {self.micro_batch_size} images at once")
        model.zero_grad()
        release_memory()
        return self.add_gradients(model, inputs, num_items_in_batch)


# %% [markdown]
# Two towers of one layer each, of which the first has no part in the result. Its norm is 0: that would stop the run.


# %%
#| export training
def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norm of the gradient of all trained parameters, by area."""
    gradients = [(area_of(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    by_area = {area: [gradient for other, gradient in gradients if other == area] for area, _ in gradients}
    return {area: torch.nn.utils.get_total_norm(tensors).item() for area, tensors in by_area.items()}


# %%
towers = torch.nn.ModuleDict({area: torch.nn.Linear(2, 1) for area in ("visual", "language_model")})
seen, read = (tower(torch.ones(1, 2)) for tower in towers.values())
(0 * seen + read).backward()
print(gradient_norms(towers))

# %% [markdown]
# One function puts it together, in an order that matters: what is frozen is settled before adapters are added, weights
# become float32 before the check, and layers are compiled last, when nothing in them changes any more.


# %%
#| export training
def build_trainer(
    detector: Detector, recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits
) -> DetectionTrainer:
    """A trainer for what the recipe trains, in float32. Raises RuntimeError if it would train anything else."""
    model = detector.model
    apply_freeze_policy(model, recipe)
    use_packed_attention(model)
    if settings.cache_features and recipe.train_vision == "frozen":
        cache_features(model.model.visual, Path(settings.output_dir) / "features")
    plan = plan_memory(detector, recipe, settings, free_memory())
    mirroring = Mirroring(settings.flip_probability, settings.seed)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    trainer = DetectionTrainer(
        detector,
        splits.validation,
        plan.micro_batch_size,
        recipe.loss_function and recipe.loss_function(detector.processor),
        args=create_training_config(recipe, settings, plan),
        train_dataset=to_training_dataset(splits.train, detector.task, mirroring),
        eval_dataset=to_training_dataset(splits.validation, detector.task, Mirroring()),
        data_collator=COLLATORS[recipe.collator](detector.processor),
        peft_config=build_lora_config_for_recipe(recipe),
        callbacks=[TrainingProgress(mirroring)],
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise RuntimeError("FSDP was asked for, but accelerate shards on GPUs only: leave it out, or use GPUs.")
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = f"{trainer.args.output_dir}/tensorboard"  # else named by date and host
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    if recipe.precision == "fp8":
        convert_to_float8(model)
    if can_compile(settings):
        compile_layers(model, recipe)
    print(describe_plan(plan))
    if (processes := trainer.args.world_size) > 1:
        images = trainer.args.per_device_train_batch_size
        print(f"{processes} processes with {images} images each: {processes * images} images a step")
    return trainer


# %%
untracked = SimpleNamespace(**vars(settings) | {"report_to": "none"})
trainer = build_trainer(base, replace(R1, name="example"), untracked, splits)
print({name: round(value, 4) for name, value in trainer.evaluate().items()})
del model, base, trainer
release_memory()

# %% [markdown]
# That is the base on the validation split, before any training: its loss on the answers, its mean IoU, and what would
# choose a checkpoint. With a loss of 1.6 nats a token is chosen about as well as among five that are equally likely.
#
# A run starts from the base, or from the result of an earlier run. `run.json` notes what it is; whoever runs it
# again with other settings, data or weights is told the difference, so that two runs are never mixed. When it was
# interrupted, it goes on from its last checkpoint, on one CPU process to the same bytes: which images are mirrored
# depends on seed, epoch and image alone, and a checkpoint gets its name only when it is whole. When it has ended it
# is not trained again, and checkpoints are deleted, because the result holds what matters. The model lives inside
# one function only: when that returns, its memory can be released.
#
# What is left tells itself apart by its files: an adapter (`adapter_config.json` names the base it belongs to) or a
# full checkpoint (`config.json` and all weights). With it go the processor, the training log, and in `recipe.json`
# how it was made: recipe, settings, prompt, pixel budget, versions.


# %%
#| export training
def describe_run(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str) -> dict:
    """All that makes a result: recipe, task, settings, the weights it starts from, data, versions."""
    task = create_task(load_processor(settings.model_id, settings.max_pixels), splits.labels, settings)
    names = "num_epochs", "max_steps", "batch_size", "evaluations", "flip_probability", "max_new_tokens", "seed"
    made = {"started_from": start, "base_hash": hash_weights(start)}
    made["lora_target_modules"] = recipe.lora_target_modules
    made["loss_function"] = recipe.loss_function and recipe.loss_function.__name__
    made["schedule"] = {name: getattr(settings, name) for name in names}
    made["rows"] = {"train": hash_rows(splits.train), "validation": hash_rows(splits.validation)}
    given = json.loads(json.dumps(vars(settings), default=str))
    versions = {package: importlib.metadata.version(package) for package in [*PACKAGES, "accelerate"]}
    return asdict(recipe) | asdict(task) | made | {"settings": given, "versions": versions}


def hash_rows(rows: Dataset) -> str:
    """xxHash of the ids and objects of rows; images are told apart by their ids."""
    digest = xxhash.xxh3_128()
    for image_id, objects in zip(rows["image_id"], rows["objects"], strict=True):
        digest.update(f"{image_id} {objects}".encode())
    return digest.hexdigest()


def hash_weights(folder: str) -> str:
    """xxHash of the weights in a folder's safetensors files; of a hub id, that id."""
    files = [str(file) for file in sorted(Path(folder).glob("*.safetensors"))]
    read = (torch.from_file(file, size=os.path.getsize(file), dtype=torch.uint8) for file in files)
    return hash_tensors(read) if files else folder


# %%
description = describe_run(R1, settings, splits, settings.model_id)
pd.Series({name: description[name] for name in DECISIVE}).astype(str).str.slice(0, 90).to_frame(R1.name)


# %%
#| export training
def run_recipe(
    recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: Path | None = None
) -> RunFolder:
    """Train a recipe into OUTPUT_DIR/<its name>, from the base or from the full checkpoint in the folder `start`.

    Of a recipe in two stages the first one goes into the folder's `stage1`; `start` takes its place.
    """
    stages = [adjust(CATALOGUE[name], settings) for name in recipe.stages] or [adjust(recipe, settings)]
    run = RunFolder(Path(settings.output_dir) / recipe.name)
    if settings.again:
        if Path(start or settings.model_id).resolve().is_relative_to(run.path.resolve()):
            raise ValueError(f"AGAIN deletes {run.path}, and with it the weights to start from: move those elsewhere.")
        clear(run.path)
    if recipe.stages and start is None and run.read_state():
        start = run.path / run.read_state()["base"]  # what it was begun from
    if recipe.stages and start is None:
        start = train(replace(stages[0], name=f"{recipe.name}/stage1"), settings, splits, settings.model_id).path
        release_memory()
    return train(replace(stages[-1], name=recipe.name), settings, splits, str(start or settings.model_id))


def adjust(recipe: TrainingRecipe, settings: SimpleNamespace) -> TrainingRecipe:
    """A recipe with the learning rate, precision and rank that the settings name for it, if they do."""
    changes = {"learning_rate": float(settings.learning_rates.get(recipe.name, recipe.learning_rate))}
    if settings.precision and recipe.train_llm == "lora":
        changes["precision"] = settings.precision
    if settings.lora_rank:
        changes |= {"lora_rank": settings.lora_rank, "lora_alpha": 2 * settings.lora_rank}
    return replace(recipe, **changes)


def train(recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits, start: str) -> RunFolder:
    """Train a recipe without stages from the weights in `start`; what was interrupted goes on, what has ended stays.

    Raises OtherRunError where the folder holds a run with other settings, data or weights.
    """
    run = RunFolder(Path(settings.output_dir) / recipe.name)
    description = describe_run(recipe, settings, splits, start) | {"base": os.path.relpath(start, run.path)}
    run.begin(description)
    if run.is_trained:
        print(f"{recipe.name}: trained already, skipped (AGAIN=True trains it anew)")
        delete_checkpoints(run.path)
        return run
    detector = create_detector(load_model(start, recipe.quantized, best_dtype()), settings, splits.labels)
    trainer = build_trainer(detector, recipe, settings, splits)
    if interrupted := find_checkpoint(run.path):
        print(f"going on from {interrupted}")
        trainer.args.eval_on_start = False
    if settings.report_to == "wandb" and trainer.is_world_process_zero():
        wandb = importlib.import_module("wandb")  # the Trainer would go on with the run of the recipe before
        wandb.finish()
        wandb.init(project=trainer.args.project, name=recipe.name)
    trainer.train(resume_from_checkpoint=interrupted)
    if can_compile(settings):
        print(describe_compilation())
    save_trained(trainer, run, description)
    trainer.accelerator.free_memory()
    return run


# %% [markdown]
# Rates and precisions that the settings name take the place of the recipes' own. In this run:

# %%
named = {name: asdict(adjust(recipe, settings)) for name, recipe in CATALOGUE.items() if not recipe.stages}
pd.DataFrame(named).loc[["learning_rate", "precision", "lora_rank"]]


# %%
#| export training
def clear(folder: Path) -> None:
    """Delete what a run left."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", "train.log"):  # of the process that does this
            path.unlink()


def find_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in a folder, None where there is none."""
    return get_last_checkpoint(folder) if folder.is_dir() else None


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run, also one that was never finished."""
    for leftover in [*folder.glob("checkpoint-*"), *folder.glob("unfinished")]:
        shutil.rmtree(leftover, ignore_errors=True)


def save_trained(trainer: DetectionTrainer, run: RunFolder, provenance: dict) -> None:
    """Write weights, processor, log and provenance; checkpoints of the way are deleted."""
    if not isinstance(trainer.model, PeftModel):
        trainer.model.to(best_dtype())  # trained in float32, used in what it was loaded in
    trainer.save_state()
    whole = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    trainer.accelerator.wait_for_everyone()  # under torchrun, others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(run.path, state_dict=whole)
        trainer.processing_class.save_pretrained(run.path)
        write_json(run.path / "recipe.json", provenance | {"steps": trainer.state.global_step})
        delete_checkpoints(run.path)
    trainer.accelerator.wait_for_everyone()  # the next stage reads what the first process wrote


# %% [markdown]
# What is on disk comes back in the precision of its training, or in another one that is asked for. On a GPU with room
# for it, weights of 4 bits are unpacked once: the same numbers, without unpacking them again for every product.


# %%
#| export training
def load_trained_model(folder: Path, precision: str | None = None) -> PreTrainedModel:
    """A full checkpoint, or an adapter on its base, in the precision of its training, or in another.

    Raises ValueError where the base's weights are not those that the adapter was trained on.
    """
    saved, is_adapter = RunFolder(folder).read_recipe(), (folder / "adapter_config.json").exists()
    precision, beside = precision or saved["precision"], folder / saved["base"]  # which was moved with it, if it was
    base = str(folder) if not is_adapter else str(beside) if beside.is_dir() else saved["started_from"]
    if is_adapter and "base_hash" in saved and Path(base).is_dir() and hash_weights(base) != saved["base_hash"]:
        raise ValueError(f"{folder} was trained on other weights than those in {base}: bring its base back there.")
    model = load_model(base, precision == "nf4", best_dtype())
    if precision == "nf4" and torch.cuda.is_available() and free_memory() > 5 * model.get_memory_footprint():
        model.dequantize(best_dtype())
    use_packed_attention(model)
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(folder)).to(best_dtype())  # its weights come in float32
    if precision == "fp8":
        convert_to_float8(model)
    return model.eval()


def load_detector(folder: Path, settings: SimpleNamespace, precision: str | None = None) -> Detector:
    """What a training left, asked as it was trained, under the settings' limits."""
    model, task = load_trained_model(folder, precision), RunFolder(folder).read_task()
    processor = load_processor(str(folder), settings.max_pixels)
    return Detector(model, processor, task, settings.max_new_tokens, settings.eval_batch_size)


def evaluate_run(run: RunFolder, settings: SimpleNamespace, rows: Dataset) -> dict:
    """Load from disk what a training left, evaluate it on the rows, write records and metrics; returns the metrics.

    Nothing is loaded where that was done already.
    """
    file = run.path / "metrics.json"
    limits = {"max_new_tokens": settings.max_new_tokens, "max_pixels": settings.max_pixels}
    about = limits | {"rows": hash_rows(rows)}
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("about") == about:
        return known
    records = evaluate_detector(load_detector(run.path, settings), rows)
    if int(os.environ.get("RANK", 0)) > 0:  # of torchrun's processes, which had a share each, the first one writes
        return summarize(records)
    return run.write_records(records, about)


# %% [markdown]
# ## 12. Experiment: what should the loss look at?
#
# Two runs of `r1-llm-only` that differ in the collator alone: same steps, same seed, same images in the same order.
# The losses are averages over different tokens, so their curves cannot be compared with each other; the IoU on the
# validation split, and on the evaluation split at the end, can.
#
# **Predict first:** v1 trains on the same answers, and on some sixty tokens of system message and question besides.
# Will its boxes be better, worse, or the same?


# %%
def compare_collators() -> list[RunFolder]:
    """Train and evaluate r1 once per collator, with all else equal."""
    steps = min(COLLATOR_STEPS, MAX_STEPS) if MAX_STEPS > 0 else COLLATOR_STEPS
    short = SimpleNamespace(**vars(settings) | {"max_steps": steps, "evaluations": 2})
    rate, runs = settings.learning_rates.get(R1.name, R1.learning_rate), []
    for variant in COLLATORS:
        recipe = replace(R1, name=f"collators/{variant}", collator=variant, learning_rate=rate)
        runs.append(run_recipe(recipe, short, splits))
        release_memory()
        evaluate_run(runs[-1], short, splits.evaluation)
        release_memory()
    return runs


collator_runs = compare_collators() if COLLATOR_STEPS else []
shown = ["collator", "steps", "learning_rate", "started_from", "question", "pixel_budget"]
pd.DataFrame({run.path.name: run.read_recipe() for run in collator_runs}, index=shown)

# %%
#| export plots
# the same in every figure; runs with other names take the colours in turn
MODEL_COLOURS = {"same-box": "black", "base": "grey"} | {name: f"C{n}" for n, name in enumerate(CATALOGUE)}


def plot_training(runs: Iterable[RunFolder], same_box: float) -> plt.Figure:
    """Loss, and IoU on the validation split, over optimiser steps; one line per run, dashed the same-box detector."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for run in runs:
        style = {"label": run.path.name, "color": MODEL_COLOURS.get(run.path.name)}
        left.plot(run.read_log("loss"), **style)
        right.plot(run.read_log("eval_mean_iou"), marker="o", **style)
    right.axhline(same_box, color="black", ls="--", lw=1, label="same box")
    left.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title="Training loss", ylim=(0, None))
    right.set(xlabel="optimiser step", ylabel="mean IoU", title="IoU on the validation split", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    return figure


# %%
same_box_iou = summarize(same_box_records)["mean_iou"]
if collator_runs:
    plot_training(collator_runs, same_box_iou)
    plt.show()

# %%
by_collator = {run.path.name: run.read_records() for run in collator_runs}
if by_collator:
    print("v2-assistant-only against v1-all-tokens:", describe_difference(*by_collator.values()))
compare_table({"same box": same_box_records} | by_collator)[SHOWN].T

# %% [markdown]
# In this run v2 is ahead by 0.06, and the paired interval excludes 0. Is v2 better, then? What such an interval knows
# is how much the result would change with other evaluation images. It knows nothing of what else is chance, such as
# which images are mirrored, or the choice of the checkpoint, by 32 validation images. The same experiment with other
# mirrored images came out with a difference of 0.005, well within its interval; with 60 steps in place of 30 it came
# out twice with an interval that excludes 0, once for each side: 0.489 for v1 and 0.530 for v2 with an evaluation
# every 15 steps, 0.521 and 0.477 with one every 30; on a GPU, in bfloat16, it was 0.501 and 0.471 (CHANGELOG). So
# between the two nothing is established here, whatever one interval says.
#
# What the loss of v1 shows: it is small from the beginning, because the base was pretrained on whole conversations and
# knows the question by heart; three quarters of the tokens that v1 averages over have next to nothing to teach. On an
# earlier base, pretrained on answers alone, v1 was behind by a tenth, and that was a defect of the base: its output
# head had never met the words of a prompt and could not tell them apart. A comparison of two losses is a comparison on
# a model, too.
#
# Nothing speaks for v1, which learns to write questions that nobody asks it to write. The recipes use
# `AssistantOnlyCollator`.
#
# ## 13. The four recipes
#
# Which weights are worth training? Each recipe starts from the base as published, in a function of its own, so that
# nothing of one can leak into the next. The table shows the memory that is held before and after: on a GPU what its
# tensors take, on a CPU what the whole process takes, where it says little more than that nothing piles up. A recipe
# that an earlier run into this folder has finished is skipped, and took no minutes then.
#
# The first stage of `r3-two-stage` is `r2-vision-only`, with the same data, steps and seed. Where r2 was trained in
# this run, r3 starts from its weights; otherwise it trains them itself, into `r3-two-stage/stage1`.


# %%
def train_and_measure(recipe: TrainingRecipe, costs: dict[str, dict]) -> dict[str, float]:
    """Train and evaluate one recipe; what the training took.

    Minutes (with those of a first stage in `costs`), and megabytes before, at the peak, after.
    """
    print(f"{recipe.name}: {recipe.description}")
    before, started = allocated_megabytes(), time.perf_counter()
    is_new = not RunFolder(output_dir / recipe.name).read_state() or settings.again
    first_stage = next((stage for stage in recipe.stages[:1] if stage in costs and is_new), None)
    run = run_recipe(recipe, settings, splits, output_dir / first_stage if first_stage else None)
    release_memory()
    minutes = (time.perf_counter() - started) / 60 + (costs[first_stage]["minutes"] if first_stage else 0)
    peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else math.nan
    megabytes = {"before (MB)": before, "peak on the GPU (MB)": peak, "after (MB)": allocated_megabytes()}
    evaluate_run(run, settings, splits.evaluation)
    release_memory()
    return {"minutes": minutes} | megabytes


training_costs = {}
for recipe in (CATALOGUE[name] for name in settings.recipes):
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    training_costs[recipe.name] = train_and_measure(recipe, training_costs)
shutil.rmtree(output_dir / "features", ignore_errors=True)  # no longer needed
pd.DataFrame(training_costs).T.style.format("{:,.1f}", na_rep="-")

# %% [markdown]
# The memory that is held does not pile up: what a recipe trained is on disk, and its model is gone. The minutes of
# `r3-two-stage` include those of its first stage: it is the longest training of the four, with twice the steps. In the
# curves, what to look for is whether the IoU still rises at the end (more steps would help), and whether it falls
# while the loss falls too (the training images are being learned by heart).

# %%
runs = [RunFolder(output_dir / name) for name in settings.recipes]
plot_training(runs, same_box_iou)
plt.show()

# %% [markdown]
# ## 14. Before and after
#
# Did it help, and by how much? What was trained is loaded anew from disk and evaluated: a result that only exists in
# memory is worth nothing. All recipes of the catalogue are looked for, also those of an earlier run into the same
# folder; what is not there is named.


# %%
#| export runs
def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
    """Gather the metrics of every `metrics.json` below `output_dir` in its `comparison.json`; untrained ones first."""
    runs = [file.parent for file in sorted(output_dir.glob("*/metrics.json"))]
    runs.sort(key=lambda path: RunFolder(path).is_trained)
    comparison = {path.name: json.loads((path / "metrics.json").read_text()) for path in runs}
    for metrics in comparison.values():
        del metrics["intervals"], metrics["about"]
    write_json(output_dir / "comparison.json", comparison)
    return comparison


# %%
for name in CATALOGUE:
    run = RunFolder(output_dir / name)
    if run.is_trained:
        evaluate_run(run, settings, splits.evaluation)
        release_memory()
    else:
        print(f"{name}: skipped, {run.path} holds no trained model")
comparison = save_comparison(output_dir)
records_by_name = {name: RunFolder(output_dir / name).read_records() for name in comparison}
compare_table(records_by_name)[["median_iou", "iou_gt_0.7", "f1", *SHOWN]].T

# %% [markdown]
# In brackets the 95 % interval. On the left of the next figure the same as bars; on the right, for each IoU, the share
# of images that reach it: the higher a line, the better, and where it falls shows where a model fails. A line that
# stays high until 0.8 and then drops belongs to a model that finds nearly all tables and draws their edges a little
# off.


# %%
#| export plots
def plot_comparison(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Mean IoU as bars with 95 % intervals, and the share of images with at least a given IoU as lines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for number, (name, records) in enumerate(records_by_name.items()):
        ious = np.sort([record["iou"] for record in records if record["iou"] is not None])[::-1]
        mean, (low, high) = ious.mean(), bootstrap_intervals(records)["mean_iou"]
        colour = MODEL_COLOURS.get(name)
        left.bar(name, mean, yerr=[[max(0, mean - low)], [max(0, high - mean)]], capsize=4, color=colour)
        left.text(number, high + 0.02, f"{mean:.2f}", ha="center", fontweight="bold")
        right.step(ious, np.arange(1, len(ious) + 1) / len(ious), label=name, where="post", color=colour)
    left.set(ylabel="mean IoU, 95 % interval", ylim=(0, 1.08), title="Mean IoU")
    left.tick_params(axis="x", labelsize=7)
    right.set(xlabel="IoU", ylabel="share of images with at least this IoU", xlim=(0, 1), ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    return figure


# %%
plot_comparison(records_by_name)
plt.show()

# %% [markdown]
# What may be concluded? Two recipes are compared on the same images, so what counts is the difference image by image.
# A difference whose interval holds 0 is within the noise, however the table is sorted.


# %%
#| export plots
def plot_differences(records_by_name: dict[str, Sequence[dict]], pairs: Sequence[tuple[str, str]]) -> plt.Figure:
    """Paired differences in mean IoU (second minus first of each pair) with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(pairs) + 1.1), layout="constrained")
    for number, (one, other) in enumerate(pairs):
        result = compare_records(records_by_name[one], records_by_name[other])
        colour = "grey" if result["verdict"] == "no difference seen" else "black"
        axes.plot([result["low"], result["high"]], [number, number], color=colour, lw=2)
        axes.plot(result["difference"], number, "o", color=colour)
        text = f"{result['difference']:+.3f} {result['verdict']}"
        axes.text(1.02, number, text, va="center", color=colour, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(pairs)), [f"{one} -> {other}" for one, other in pairs])
    axes.axvline(0, color="grey", lw=1)
    axes.set(xlabel="difference in mean IoU", title="Is it more than noise?")
    axes.invert_yaxis()
    return figure


# %%
r1, r2, r3, r4 = CATALOGUE
pairs = [("same-box", "base"), ("same-box", r1), (r1, r2), (r1, r4), (r2, r3), (r2, r4), (r3, r4)]
plot_differences(records_by_name, [pair for pair in pairs if set(pair) <= set(records_by_name)])
plt.show()

# %% [markdown]
# In this run every recipe beats both the base and the detector that never looks. Those that train the vision tower are
# ahead of the one that does not by 0.13 to 0.17, and r4 is ahead of r2 and r3 by 0.04. The second stage of r3 adds
# nothing here: its curve in section 13 starts at r2's IoU and stays there. The intervals are about other images, not
# about other training runs; of each recipe there was one, and in an earlier run, with other mirrored images, no
# difference was seen between r4 and r2 (CHANGELOG).
#
# What this does not say is why. The recipes differ in more than one thing: r2 trains all weights of a tower in 32
# bits, r1 adapters in 4 bits, at other learning rates; r2 trains 3.6 million numbers, r1 1.3 million; r3 takes twice
# the steps. And the toy is a toy: its vision tower is more than half of it and carries all that is known about places,
# in the 7B model it is a twelfth. "Seeing matters more than writing" is not a conclusion that these columns can carry
# to 7B.
#
# Numbers hide how a model fails. The upper row shows the four worst images of the best recipe, the lower row four from
# the middle.

# %%
best = max([name for name in CATALOGUE if name in comparison], key=lambda name: comparison[name]["mean_iou"])
worst, others = np.split(np.argsort([record["iou"] for record in records_by_name[best]]), [4])
middle = max(0, len(others) // 2 - 2)
chosen = [*worst, *others[middle : middle + 4]]
images = [read_row(splits.evaluation[int(number)])[0] for number in chosen]
shown = [records_by_name[best][number] for number in chosen]
boxes = [[boxes_of(record, side) for record in shown] for side in ("truth", "prediction")]
failures = plot_images(images, *boxes, [f"IoU {record['iou']:.2f}" for record in shown])
failures.suptitle(f"{best}: the four worst images, and four from the middle")
failures.savefig(output_dir / "predictions.png", dpi=100)
to_jpeg(failures)

# %% [markdown]
# Look at the upper row first. What is missed are small tables, of about one image token, and the second of two tables
# in an image; the prediction then sits on another printed block. The lower row shows what an ordinary answer looks
# like. With a model of your own, this grid is the first place to look for wrong labels: a confident prediction in the
# right place, far from the truth, is often the better label.
#
# ## 15. What to expect at full size
#
# Nothing above tells how well a 7B model does on the real photographs, and it was not measured for this repository:
# neither the weights nor the dataset were at hand. What others published about Qwen2-VL-7B on the same dataset:
#
# | source (GitHub or hub name) | training | images | mean IoU |
# |---|---|---|---|
# | ZhuoyuanJiang/vlm_Qwen2VL_object_detection_LOCAL | r1 / r2 / r3 / r4 | 50 | 0.835 / 0.833 / 0.837 / 0.864 |
# | MKDehdashti/qwen2-vl-nutrition-table | best in training / as shipped | 123 | 0.870-0.893 / 0.82 |
# | kulsoom-abdullah/qwen2-vl-nutrition-detection | LoRA on the language model / on both | 123 | 0.771 / 0.748 |
# | the first two, before training | none | 50 / 123 | 0.098 / 0.590 |
#
# Read them with care. Each has a protocol of its own, none gives intervals, and with 50 images a 95 % interval is
# about 0.06 wide on either side, so that the recipes of the first line do not differ beyond noise. The first and the
# last line show how much a prompt and a parser can do: the same untrained weights reach 0.10 with one and 0.59 with
# another. A model that always answers with the same box reaches about 0.3 on the drawings above; on the photographs
# it is the first thing this notebook will tell you.
#
# How long does it take? On one H200, with random weights of the 7B shape and the default settings, training ran at
# 11.5 images per second for r1, 6.7 for r2 and 6.2 for r4 (section 10), so that three epochs of 1,083 images take
# about 5 to 9 minutes a recipe, and evaluations besides. A smaller GPU takes several times as long.
#
# Before a long run, a short one: `TRAIN_SAMPLES = 100`, `EVAL_SAMPLES = 20`, `MAX_STEPS = 10` and `COLLATOR_STEPS = 2`
# take the whole notebook, with the real model, through every step of the road. It shows whether the memory suffices,
# whether the dataset's rows are usable and its boxes lie where they should, and whether everything that is written
# ends up where you want it. Its table says nothing yet: ten steps teach the format at best.
#
# The default learning rates (1e-4 with LoRA, 1e-5 for the whole vision tower) are usual ones, and were not tuned on
# the photographs.
#
# ## 16. Deployment
#
# How does a result leave the notebook and stay the same? An adapter needs its base and PEFT at run time. Merging adds
# its product to the weights of the base, and leaves an ordinary checkpoint that every server reads. Three rules keep
# the merged model the model that was measured: merge into the base in 16 bits, never into 4-bit weights, which would
# round the change away; save, and load what was saved; measure again. The table shows the same recipe three times: on
# its 4-bit base, where it was trained; on the base in 16 bits; and merged. The notebook stops here if the merged model
# is off by more than 0.01 mean IoU.


# %%
#| export deployment: Merging an adapter into its base, and the card of the merged model.
def save_merged(detector: Detector, run: RunFolder, target: Path) -> None:
    """Write what a run trained without its adapters, if it has any, into `target`. Not for a base in 4 bits."""
    is_adapted = isinstance(detector.model, PeftModel)
    model = detector.model.merge_and_unload(safe_merge=True) if is_adapted else detector.model
    model.save_pretrained(target)
    detector.processor.save_pretrained(target)
    write_json(target / "recipe.json", run.read_recipe() | {"precision": "bf16"})


# %%
merged_dir = output_dir / "merged"
unmerged = load_detector(output_dir / best, settings, "bf16")
unmerged_records = evaluate_detector(unmerged, splits.evaluation)
save_merged(unmerged, RunFolder(output_dir / best), merged_dir)
del unmerged
release_memory()
merged = load_detector(merged_dir, settings)
merged_records = evaluate_detector(merged, splits.evaluation)
versions = {f"{best}, as trained": records_by_name[best], f"{best}, base not quantised": unmerged_records}
versions["merged, saved, loaded"] = merged_records
compare_table(versions)[["mean_iou", "iou_gt_0.5", "f1", "n"]]

# %%
difference = abs(summarize(merged_records)["mean_iou"] - summarize(unmerged_records)["mean_iou"])
assert difference <= 0.01, f"merging changed the model: mean IoU differs by {difference:.3f}"
print(f"merged against adapter on the same base: mean IoU differs by {difference:.4f}")

# %% [markdown]
# The first image of section 8 again, which no model was trained on: the base's answer beside that of the merged model.
# Which digits has the training made certain?

# %%
image, boxes, _ = samples[0]
after = generate(merged, to_questions([image], merged))[0]
plot_token_probabilities({"before: the base's answer": first_answer, f"after: {best}, merged": after})
plt.show()

# %%
found = detect(image, merged)
print([labelled | {"box": np.round(labelled["box"]).tolist()} for labelled in found])
titles = ["before: the base", f"after: {best}, score {found[0]['score']:.2f}" if found else "after: no box"]
to_jpeg(plot_images([image] * 2, [boxes] * 2, [first_found, boxes_of({"found": found}, "found")], titles, 2), dpi=140)

# %% [markdown]
# The first digits of a coordinate are settled now, the last ones stay a guess, as they may: a unit of the grid is less
# than half a pixel of this image. Where a first digit is unsure although the box is right, the edge lies near a full
# hundred, so that two different digits are both nearly right. A score that multiplies the probabilities of all digits
# therefore looks more doubtful than the box is; `notebooks/04_evaluation_analysis` measures by how much.
#
# `detect(image, detector)` is all that an application calls. A model without its task is not the model that was
# measured, so the card that is written beside weights says what to ask and what comes back. `PUSH_TO_HUB` uploads the
# merged folder (log in first with `hf auth login`).


# %%
#| export deployment
MODEL_CARD = """# {base}, fine-tuned for object detection on {dataset}

Trained with the recipe `{recipe}` ({description}) to detect: {labels}. Ask it with the system message

> {system_message}

and, after the image, with the prompt

> {question}

It answers as in {example}, with boxes x1, y1, x2, y2 {coordinates}. The processor in this folder resizes images to
at most {max_pixels} pixels. It does not turn a PIL image upright: apply its EXIF orientation first
(`PIL.ImageOps.exif_transpose`). Measured on the evaluation split, greedy answers:

{metrics}
"""
COORDINATES = {
    "grid": "on a grid from 0 to 1000 in both directions",
    "pixels": "in pixels of the image as the processor resized it",
}


def as_code(text: str) -> str:
    """A text on one line, of which Markdown and HTML change no letter."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def write_model_card(folder: Path, metrics: dict) -> None:
    """Write `README.md` for a run or a merged model: metadata that the hub reads, task, metrics."""
    saved, task = RunFolder(folder).read_recipe(), RunFolder(folder).read_task()
    base, dataset = saved["settings"]["model_id"], saved["settings"]["dataset_id"]
    lines = "\n".join(f"- {name}: {value:.3f}" for name, value in metrics.items() if value is not None)
    text = MODEL_CARD.format(
        base=as_code(base),
        dataset=as_code(dataset),
        recipe=saved["name"],
        description=saved["description"],
        labels=", ".join(map(as_code, task.labels)),
        system_message=as_code(task.system_message),
        question=as_code(task.question),
        example=as_code(format_answer(task.labels[:1], [[120, 240, 480, 960]], task.family)),
        coordinates=COORDINATES[get_family(task.family).coordinates],
        max_pixels=task.pixel_budget["max_pixels"],
        metrics=lines,
    )
    data = ModelCardData(base_model=base, datasets=[dataset], pipeline_tag="image-text-to-text")
    data.library_name = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    data.tags = ["object-detection", "trl"]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


# %%
for name in settings.recipes:
    write_model_card(output_dir / name, summarize(records_by_name[name]))
write_model_card(merged_dir, summarize(merged_records))
if PUSH_TO_HUB:
    HfApi().create_repo(PUSH_TO_HUB, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=PUSH_TO_HUB, folder_path=merged_dir)
print((merged_dir / "README.md").read_text())
del merged
release_memory()

# %% [markdown]
# The merged folder is an ordinary checkpoint, so a server that knows Qwen2-VL serves it. What has to travel with a
# request is more than the prompt: the system message, upright images without loss, the pixel budget, and
# `skip_special_tokens: false`, or the labels lose their marks. One command prints the line that starts vLLM and the
# exact request; another asks the server about the evaluation images, and compares answer by answer:
#
# ```text
# python -m helpers.results --model OUTPUT_DIR/merged --evaluate-only
# python -m helpers.serving --model OUTPUT_DIR/merged --request photo.jpg
# python -m helpers.serving --model OUTPUT_DIR/merged --server http://localhost:8000/v1 --output FOLDER
# ```
#
# If answers differ, it names the usual causes where they show: lost marks, answers cut off, images not upright, a
# prompt of another length (system message, template, or pixel budget), boxes in another convention. A few other
# digits with the same mean IoU are rounding, and harmless.
#
# ## Summary
#
# - A vision-language model detects by writing boxes as text. Its family decides the coordinates; reading them in
#   another convention is not an error, only wrong.
# - What is not checked fails without a word: a pixel budget that is ignored, padding on the wrong side, a LoRA pattern
#   that matches one tower only, checkpoints that are not read back. Each has its check here.
# - A recipe is a choice of what is trained in which precision. In 4 bits with LoRA a 7B model fits into 24 GB; its
#   whole vision tower does not.
# - A result is a number with an interval, on images that were not trained on, beside the detector that never looks and
#   beside the model before training. Two models are compared image by image.
# - What is deployed is measured again, after merging and loading.
# - Settings, splits, task, detector and run folder go through all of it as values, and are written down with each
#   result: what was asked, how, and under which limits is known for every number.
#
# ## Exercises
#
# With the demo's settings (`helpers/tiny/demo.yaml`) each takes minutes; give each an `OUTPUT_DIR` of its own, since a
# folder that holds a run refuses another. Write your prediction down first.
#
# 1. `r4-joint` leaves out the vision tower's `attn.proj` and the merger. Add them to `VISION_LAYERS` (section 6), run
#    with `RECIPES = ["r4-joint"]`, and compare with the paired test of section 9. Watch the count of what is trained.
# 2. Double the rank of `r1-llm-only` with `LORA_RANK = 128`. Predict the memory and the number of trained weights
#    first. Is the difference more than noise? If not, how many images would show one of 0.02?
# 3. Ask the base with a prompt of your own (section 9), in another language or without the word "nutrition". Which
#    part of the change is the model's, and which the parser's? Look at `malformed_rate` and at the raw answers.
#
# 4. Two classes, and images with neither: draw a dataset with `python -m helpers.tiny.packages outputs/two --labels
#    barcode logo`, and run with `DATASET_ID = "outputs/two"`. Which of the two is harder, and what does the detector
#    write where there is nothing (`python -m helpers.evaluation`)?
#
# Where to go on: the topic notebooks in `notebooks/`, from the tiny world (00) over data, model, preprocessing,
# evaluation and data types to quantisation (06), then beyond supervised training (07), and to when a box may be acted
# on (08).
