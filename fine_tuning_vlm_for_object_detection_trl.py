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
# A vision-language model reads a picture and writes text. If the text says where things are, the model is a detector.
# This notebook takes Qwen2-VL, asks it for the nutrition tables on photographs of food packages, measures how well it
# does, teaches it in four different ways with about a thousand labelled pictures, measures again on pictures it has
# not seen, and packs the best result for use.
#
# Everything needed is defined here, in the order in which it is used. The road of one picture:
#
# ```text
# dataset row                        image + boxes [y_min, x_min, y_max, x_max] in 0..1
#   -> upright RGB picture           + boxes [x1, y1, x2, y2] in pixels
#   -> conversation                  system, user (picture, question), assistant (boxes on a 0..1000 grid, as text)
#   -> collator                      token ids, image patches, labels (-100 where the loss does not look)
#   -> SFTTrainer                    an adapter, or all weights, on disk
#   -> generate -> parse             text -> boxes in pixels
#   -> match -> metrics              IoU per picture, a table, figures
# ```
#
# Cells that begin with `#| export name` are also printed to `helpers/name.py`, for use in scripts.

# %% [markdown]
# ## 1. Setting up
#
# On Colab the packages are installed here; elsewhere they come from `requirements.txt`.

# %%
import subprocess
import sys

COLAB_PACKAGES = [
    "transformers>=5.17,<5.24",
    "trl>=1.16,<1.17",
    "peft>=0.21,<0.22",
    "bitsandbytes>=0.50,<0.51",
    "datasets>=5.2,<5.3",
    "faster-coco-eval>=1.8,<1.9",
]
if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *COLAB_PACKAGES], check=True)

# %%
import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

# when imported on a CPU it asks for an optional package that would download kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from faster_coco_eval import COCO, COCOeval_faster
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou
from tqdm import tqdm
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PrinterCallback,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    TrainerCallback,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

# TRL 1.16 itself uses the old name; the new one does not exist in all versions allowed here
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)

# %% [markdown]
# The next cell holds every setting, and papermill can replace each of them (`papermill in.ipynb out.ipynb -p
# MAX_STEPS 50`). The defaults are the real thing: the 7B model, the Open Food Facts dataset, all pictures. With them
# `r1-llm-only` and `r4-joint` fit into a GPU of 24 GB, `r2-vision-only` and with it `r3-two-stage` take 28 GiB.
# `MODEL_ID` and `DATASET_ID` take a hub id or a local folder.

# %% tags=["parameters"]
MODEL_ID = "Qwen/Qwen2-VL-7B-Instruct"  # hub id or folder
DATASET_ID = "openfoodfacts/nutrition-table-detection"  # hub id or folder
TRAIN_SPLIT = "train"
EVAL_SPLIT = "val"
OUTPUT_DIR = "outputs/qwen2-vl-7b"
RECIPES = ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]  # what to train, in this order
NUM_EPOCHS = 3
MAX_STEPS = -1  # optimiser steps; -1: NUM_EPOCHS decides
COLLATOR_STEPS = 100  # optimiser steps of each of the two runs that compare collators; 0 leaves them out
TRAIN_SAMPLES = None  # None: all pictures of the split
EVAL_SAMPLES = None  # None: all pictures of the split
WATCH_SAMPLES = 64  # pictures of the training split that are held back to watch training and choose checkpoints
MAX_PIXELS = 1280 * 28 * 28  # a picture costs at most this many pixels, 28 * 28 of them make one token
BATCH_SIZE = 2
GRADIENT_ACCUMULATION_STEPS = 8
GRADIENT_CHECKPOINTING = True  # less memory, more time: activations are computed twice
LEARNING_RATES = {}  # recipe -> peak learning rate, where it is not to be the recipe's own
FLIP_PROBABILITY = 0.0  # mirror training pictures with their boxes: worth its mirrored letters on few data
EVAL_BATCH_SIZE = None  # pictures asked about at once; None: what fits into the free memory
MAX_NEW_TOKENS = 256  # one box takes 23 tokens, so ten objects get to the end
SEED = 42
REPORT_TO = "tensorboard"  # or "wandb", "trackio", "none"
PUSH_TO_HUB = ""  # hub id to push the best model to, such as "me/nutrition-table-detector"; empty: nothing is pushed

# %%
# papermill's -p hands a list over as text. Below, RECIPES becomes the catalogue that these names are looked up in.
RECIPES_TO_RUN = re.findall(r"[\w-]+", RECIPES) if isinstance(RECIPES, str) else list(RECIPES)

# %% [markdown]
# A **recipe** says which weights are trained and how. Two towers can be trained: the vision tower, which sees, and
# the language model, which writes. Each is frozen, or gets LoRA (the weights stay as they are, a pair of thin
# matrices beside each linear layer is trained), or, for the vision tower, is trained whole.
#
# | recipe | vision tower | language model | precision of the language model |
# |---|---|---|---|
# | `r1-llm-only` | frozen | LoRA | 4 bits |
# | `r2-vision-only` | all weights | frozen | 16 bits |
# | `r3-two-stage` | as r2, then frozen | then as r1, from that checkpoint | 16 bits, then 4 |
# | `r4-joint` | LoRA | LoRA | 4 bits |
#
# Some combinations cannot work, and a recipe refuses them when it is made, not after an hour. The layers that get
# LoRA are chosen by a regular expression on their full path. A plain list such as `["q_proj", "proj"]` would match
# more than one thinks: `proj` is also the first convolution of the vision tower.


# %%
#| export recipes
LLM_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION_LAYERS = r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.fc[12])"


@dataclass(frozen=True)
class TrainingRecipe:
    """One way to fine-tune: which weights, in which precision, how fast. Raises ValueError where that cannot work."""

    name: str
    description: str
    quantized: bool = False  # language model in 4-bit NF4
    train_vision: str = "frozen"  # or "lora", or "full": all weights of the vision tower, merger included
    train_llm: str = "frozen"  # or "lora"
    lora_rank: int = 64
    lora_alpha: int = 128
    learning_rate: float = 1e-4  # peak; TRL's default for full fine-tuning (2e-5) is too slow for LoRA
    stages: tuple[str, ...] = ()  # recipes to train one after the other, each from the weights of the one before

    def __post_init__(self):
        trained = (self.train_vision != "frozen") + (self.train_llm != "frozen")
        refusals = {
            "train_vision is frozen, lora or full": self.train_vision not in ("frozen", "lora", "full"),
            "train_llm is frozen or lora": self.train_llm not in ("frozen", "lora"),
            "it either trains something or has stages": bool(trained) == bool(self.stages),
            "4-bit weights cannot be saved as a full checkpoint": self.quantized and self.train_vision == "full",
            "with LoRA, PEFT freezes all other weights: train one after the other, in stages": trained == 2
            and self.train_vision == "full",
            "lora_rank and learning_rate are positive": self.lora_rank < 1 or self.learning_rate <= 0,
        }
        for reason, refused in refusals.items():
            if refused:
                raise ValueError(f"Recipe {self.name!r}: {reason}.")

    @property
    def lora_target_modules(self) -> str | None:
        """Regular expression on the paths of the layers that get LoRA; None without LoRA."""
        towers = {LLM_LAYERS: self.train_llm, VISION_LAYERS: self.train_vision}
        return "|".join(f"({layers})" for layers, mode in towers.items() if mode == "lora") or None


RECIPES = {
    recipe.name: recipe
    for recipe in [
        TrainingRecipe(
            name="r1-llm-only",
            description="QLoRA on the language model, vision tower frozen",
            quantized=True,
            train_llm="lora",
        ),
        TrainingRecipe(
            name="r2-vision-only",
            description="all weights of the vision tower, language model frozen",
            train_vision="full",
            learning_rate=1e-5,
        ),
        TrainingRecipe(
            name="r3-two-stage",
            description="first the vision tower (r2), then the language model (r1) from that checkpoint",
            stages=("r2-vision-only", "r1-llm-only"),
        ),
        TrainingRecipe(
            name="r4-joint",
            description="QLoRA on the language model and LoRA on the vision tower, at once",
            quantized=True,
            train_vision="lora",
            train_llm="lora",
        ),
    ]
}


def get_recipes(names: Sequence[str]) -> list[TrainingRecipe]:
    """Look up recipes by name. Raises ValueError for an unknown or missing name, with the names that exist."""
    unknown = [name for name in names if name not in RECIPES]
    if unknown or not names:
        raise ValueError(f"Unknown recipe {unknown}: set RECIPES to a list out of {sorted(RECIPES)}.")
    return [RECIPES[name] for name in names]


# %% [markdown]
# Names are checked now, before anything is loaded or written. The precision follows from the hardware: bfloat16 where
# the GPU has it, float16 on older ones such as a T4, float32 on a CPU.


# %%
#| export loading
def best_dtype() -> torch.dtype:
    """bfloat16 where the GPU computes in it (emulation does not count), float16 on other GPUs, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# %%
def describe_environment() -> pd.Series:
    """Versions, hardware and inputs of this run."""
    packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"]
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    report = {"python": platform.python_version()}
    report |= {package: importlib.metadata.version(package) for package in packages}
    report["device"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else f"CPU, {os.cpu_count()} cores"
    report["dtype"] = str(best_dtype()).removeprefix("torch.")
    report |= {"model": MODEL_ID, "dataset": DATASET_ID, "recipes": ", ".join(r.name for r in recipes)}
    return pd.Series(report, name="this run")


recipes = get_recipes(RECIPES_TO_RUN)
output_dir = Path(OUTPUT_DIR)
describe_environment().to_frame()

# %% [markdown]
# ## 2. The data
#
# The dataset has one row per photograph. `objects` holds the boxes, each `[y_min, x_min, y_max, x_max]` as a fraction
# of the picture's height and width, and their category names.
#
# People point notebooks at their own data, so the first thing is to look for what would fail an hour later, or worse,
# would not fail: a missing column stops here with a message; a row whose picture cannot be decoded or whose box is
# impossible is counted, named and left out.


# %%
#| export data
def load_rows(dataset_id: str, split: str, samples: int | None, seed: int) -> Dataset:
    """Load `samples` random rows (all when None) of one split from a hub id or a local folder.

    Raises FileNotFoundError when the dataset cannot be found and ValueError when it is not a detection dataset of the
    expected form; both messages say what to do.
    """
    dataset = open_dataset(dataset_id)
    if split not in dataset:
        raise ValueError(
            f"{dataset_id} has no split {split!r}: set TRAIN_SPLIT / EVAL_SPLIT to one of {list(dataset)}."
        )
    rows = dataset[split]
    check_columns(rows, dataset_id)
    return rows if samples is None else rows.shuffle(seed=seed).select(range(min(samples, len(rows))))


def open_dataset(dataset_id: str) -> DatasetDict:
    """`load_dataset` whose error says what to do. Raises FileNotFoundError."""
    try:
        return load_dataset(dataset_id)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"No dataset {dataset_id!r}: there is no such folder below {Path.cwd()}, and the hub did not give one of "
            "that name. Set DATASET_ID to an existing folder or hub id, and check the network for the latter "
            "(the tiny dataset is drawn by `python -m helpers.tiny.packages outputs/tiny_dataset`)."
        ) from error


def check_columns(rows: Dataset, dataset_id: str) -> None:
    """Raise ValueError unless `rows` has the columns image_id, image and objects{bbox, category_name}."""
    missing = [name for name in ("image_id", "image", "objects") if name not in rows.column_names]
    if not missing:
        objects = rows.features["objects"]
        fields = objects if isinstance(objects, dict) else objects.feature
        missing = [f"objects.{name}" for name in ("bbox", "category_name") if name not in fields]
    if missing:
        raise ValueError(
            f"{dataset_id} has no column {', '.join(missing)} (it has {', '.join(rows.column_names)}). Rename its "
            "columns as in openfoodfacts/nutrition-table-detection: image_id, image, objects{bbox, category_name}."
        )


# %%
#| export data
def find_bad_rows(rows: Dataset) -> dict[int, str]:
    """Row number -> what is wrong with it, for pictures that cannot be decoded and boxes that cannot be."""
    raw = rows.cast_column("image", ImageFeature(decode=False))
    problems = {}
    for number, row in enumerate(tqdm(raw, desc="checking rows", unit="row", mininterval=1)):
        problem = describe_box_problem(row["objects"]["bbox"]) or describe_picture_problem(row["image"])
        if problem:
            problems[number] = f"{row['image_id']}: {problem}"
    return problems


def describe_box_problem(boxes: Sequence[Sequence[float]]) -> str | None:
    """What is wrong with boxes `[y_min, x_min, y_max, x_max]` in 0..1, or None."""
    if len(boxes) == 0:
        return "no box"
    for box in boxes:
        y_min, x_min, y_max, x_max = box
        if not (0 <= y_min < y_max <= 1 and 0 <= x_min < x_max <= 1):
            return f"box {list(box)} is not 0 <= min < max <= 1"
    return None


def describe_picture_problem(encoded: dict) -> str | None:
    """Why an undecoded picture (`{"bytes", "path"}`) cannot be read, or None."""
    try:
        image = open_encoded(encoded)
        image.draft("RGB", (256, 256))  # a JPEG is read to its end, but unpacked at a fraction of its size: faster
        image.load()
    except UnidentifiedImageError:
        return "picture cannot be decoded (not a picture, or of an unknown format)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"picture cannot be decoded ({error})"
    return None


def open_encoded(encoded: dict) -> Image.Image:
    """Open an undecoded picture; only its header is read until its pixels are asked for."""
    return Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"]))


def drop_bad_rows(rows: Dataset) -> Dataset:
    """The rows that can be used; the others are printed. Raises ValueError when none is left."""
    problems = find_bad_rows(rows)
    for problem in problems.values():
        print(f"left out: {problem}")
    print(f"{len(rows) - len(problems)} of {len(rows)} rows are usable")
    if len(problems) == len(rows):
        raise ValueError("No usable row is left: mend the rows listed above, or set DATASET_ID to another dataset.")
    return rows.select([number for number in range(len(rows)) if number not in problems])


# %%
all_train_rows = drop_bad_rows(load_rows(DATASET_ID, TRAIN_SPLIT, TRAIN_SAMPLES, SEED))
eval_rows = drop_bad_rows(load_rows(DATASET_ID, EVAL_SPLIT, EVAL_SAMPLES, SEED))
pd.Series({name: str(kind) for name, kind in all_train_rows.features.items()}, name="type").to_frame()

# %% [markdown]
# Two photographs of one package, one in each split, would turn the evaluation into a test of memory. So training
# pictures that share a barcode with an evaluation picture are left out. A part of the rest, again by barcode, is held
# back to watch the training and to choose checkpoints: the evaluation split is for the final table only.


# %%
#| export data
def read_barcodes(rows: Dataset) -> list[str | None]:
    """The barcode of every row, None where the dataset gives none."""
    if "meta" not in rows.column_names:
        return [None] * len(rows)
    return [meta.get("barcode") or None for meta in rows["meta"]]


def drop_shared_barcodes(rows: Dataset, others: Dataset) -> Dataset:
    """`rows` without the packages that are in `others` too; says how many were left out."""
    seen = set(read_barcodes(others)) - {None}
    kept = [number for number, barcode in enumerate(read_barcodes(rows)) if barcode not in seen]
    print(f"{len(rows) - len(kept)} training pictures show a package of the evaluation split: left out")
    return rows.select(kept)


def hold_back(rows: Dataset, samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows in two, about `samples` in the second one, all pictures of a barcode on the same side.

    Raises ValueError when one of the two would be empty.
    """
    if samples < 1:
        raise ValueError(f"WATCH_SAMPLES={samples}: checkpoints are chosen on these pictures, hold back at least 1.")
    groups = {}
    for number, barcode in enumerate(read_barcodes(rows)):
        groups.setdefault(barcode or number, []).append(number)
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [number for group in order for number in list(groups.values())[group]]
    held = {barcode for barcode, members in groups.items() if set(members) & set(shuffled[:samples])}
    back = sorted(number for barcode in held for number in groups[barcode])
    if len(back) >= len(rows):
        raise ValueError(f"WATCH_SAMPLES={samples} leaves nothing to train on: {len(rows)} rows in all.")
    return rows.select(sorted(set(range(len(rows))) - set(back))), rows.select(back)


# %%
train_rows, watch_rows = hold_back(drop_shared_barcodes(all_train_rows, eval_rows), WATCH_SAMPLES, SEED)
print(f"{len(train_rows)} pictures to train on, {len(watch_rows)} to watch with, {len(eval_rows)} to evaluate on")

# %% [markdown]
# Phones store pictures as the sensor saw them, with a note (EXIF orientation) on how to turn them for display. The
# boxes refer to the picture as displayed. Turn first, and drop the note, or boxes and pixels part ways.
#
# From here on a box is `[x1, y1, x2, y2]` in pixels of the upright picture: this function is the only place where the
# dataset's convention is read.


# %%
#| export data
def read_row(row: dict) -> tuple[Image.Image, list[list[float]], list[str]]:
    """A dataset row as upright RGB picture, its boxes `[x1, y1, x2, y2]` in pixels, and their labels."""
    image = ImageOps.exif_transpose(row["image"]).convert("RGB")
    width, height = image.size
    boxes = [
        [x_min * width, y_min * height, x_max * width, y_max * height]
        for y_min, x_min, y_max, x_max in row["objects"]["bbox"]
    ]
    return image, boxes, list(row["objects"]["category_name"])


# %%
#| export figures
TRUTH_COLOUR = "#1a9850"
PREDICTION_COLOUR = "#d73027"


def draw_boxes(axes: plt.Axes, boxes: Iterable[Sequence[float]], colour: str, linestyle: str) -> None:
    """Outline boxes `[x1, y1, x2, y2]` (pixels) on a picture."""
    for x1, y1, x2, y2 in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=3.5, alpha=0.6))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2, ls=linestyle))


def show_pictures(
    images: Sequence[Image.Image],
    truths: Sequence[Sequence[Sequence[float]]],
    predictions: Sequence[Sequence[Sequence[float]]] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> plt.Figure:
    """A grid of pictures with true boxes (dashed) and, if given, predicted boxes (solid), all in pixels."""
    lines = -(-len(images) // columns)
    size = (3 * columns, 3.3 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, dpi=60, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for number, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(image)
        draw_boxes(axes, truths[number], TRUTH_COLOUR, "--")
        if predictions is not None:
            draw_boxes(axes, predictions[number], PREDICTION_COLOUR, "-")
        axes.set_title(titles[number] if titles is not None else "", fontsize=9)
    handles = [Line2D([], [], color=TRUTH_COLOUR, ls="--", lw=2, label="truth")]
    if predictions is not None:
        handles.append(Line2D([], [], color=PREDICTION_COLOUR, ls="-", lw=2, label="prediction"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


# %%
samples = [read_row(row) for row in train_rows.select(range(min(8, len(train_rows))))]
show_pictures(
    [image for image, _, _ in samples],
    [boxes for _, boxes, _ in samples],
    titles=[f"{image.width} x {image.height}, {', '.join(labels)}" for image, _, labels in samples],
)
plt.show()

# %% [markdown]
# What is in the pictures decides what can be learned. One line per picture and one line per box hold all that the
# following figures need; the pictures themselves need not be decoded for it.


# %%
#| export data
def describe_pictures(rows: Dataset) -> pd.DataFrame:
    """One line per picture: size when upright (pixels), EXIF orientation (1: stored upright), boxes, barcode."""
    boxes = [len(objects["bbox"]) for objects in rows["objects"]]
    others = {"boxes": boxes, "barcode": read_barcodes(rows), "image_id": list(rows["image_id"])}
    return pd.DataFrame(read_headers(rows), columns=["width", "height", "orientation"]).assign(**others)


def undecoded(rows: Dataset) -> Iterator[dict]:
    """The pictures of all rows as they are stored, `{"bytes", "path"}`."""
    return (row["image"] for row in rows.select_columns("image").cast_column("image", ImageFeature(decode=False)))


def read_headers(rows: Dataset) -> list[tuple[int, int, int]]:
    """Width and height in pixels when upright, and EXIF orientation, of every picture; no pixel is decoded."""
    headers = []
    for encoded in undecoded(rows):
        image = open_encoded(encoded)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        lies = orientation >= 5  # 5 to 8 lie on their side
        headers.append((*(image.size[::-1] if lies else image.size), orientation))
    return headers


def describe_boxes(rows: Dataset, pictures: pd.DataFrame) -> pd.DataFrame:
    """One line per box: picture number, category, corners, width, height and area in 0..1, aspect as displayed."""
    lines = []
    for number, objects in enumerate(rows["objects"]):
        for category, (y1, x1, y2, x2) in zip(objects["category_name"], objects["bbox"], strict=True):
            lines.append({"picture": number, "category": category, "x1": x1, "y1": y1, "x2": x2, "y2": y2})
    boxes = pd.DataFrame(lines)
    boxes["width"], boxes["height"] = boxes.x2 - boxes.x1, boxes.y2 - boxes.y1
    boxes["area"] = boxes.width * boxes.height
    shape = (pictures.width / pictures.height).loc[boxes.picture].to_numpy()
    return boxes.assign(aspect=boxes.width / boxes.height * shape)


# %%
pictures, eval_pictures = describe_pictures(train_rows), describe_pictures(eval_rows)
train_boxes, eval_boxes = describe_boxes(train_rows, pictures), describe_boxes(eval_rows, eval_pictures)
pd.DataFrame(
    {
        split: {
            "pictures": len(some),
            "different barcodes": some.barcode.nunique(),
            "stored upright": (some.orientation == 1).sum(),
            "to be turned (EXIF)": (some.orientation != 1).sum(),
            "boxes": len(boxes),
        }
        | boxes.category.value_counts().add_prefix("boxes: ").to_dict()
        for split, some, boxes in [("train", pictures, train_boxes), ("eval", eval_pictures, eval_boxes)]
    }
).fillna(0).astype(int)


# %%
#| export figures
BAR_COLOUR = "#4575b4"
# the same in every figure; runs with other names take the colours in turn
MODEL_COLOURS = {
    "base": "grey",
    "r1-llm-only": "C0",
    "r2-vision-only": "C1",
    "r3-two-stage": "C2",
    "r4-joint": "C3",
}


def plot_boxes(boxes: pd.DataFrame) -> plt.Figure:
    """How many, how large, of what shape, and where: six panels about the lines of `describe_boxes`."""
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    per_picture = boxes.groupby("picture").size().value_counts().sort_index()
    bars = grid[0, 0].bar(per_picture.index.astype(str), per_picture, color=BAR_COLOUR)
    grid[0, 0].bar_label(bars)
    grid[0, 0].margins(y=0.12)
    grid[0, 0].set(title="Boxes in a picture", xlabel="boxes", ylabel="pictures")
    for axes, name in zip(grid.flat[1:4], ["area", "width", "height"], strict=True):
        axes.hist(boxes[name], bins=np.linspace(0, 1, 26), color=BAR_COLOUR)
        axes.set(title=f"Box {name}", xlabel=f"share of the picture's {name}", ylabel="boxes")
    grid[1, 1].hist(boxes.aspect, bins=np.geomspace(0.1, 10, 31), color=BAR_COLOUR)
    grid[1, 1].set(title="Box shape", xlabel="width / height", ylabel="boxes", xscale="log", xlim=(0.1, 10))
    heat = grid[1, 2].imshow(cover_map(boxes), extent=(0, 1, 1, 0), cmap="viridis", vmin=0, vmax=1)
    grid[1, 2].set(title="Where boxes lie", xlabel="x / width", ylabel="y / height")
    figure.colorbar(heat, ax=grid[1, 2], label="share of boxes that cover it")
    return figure


def cover_map(boxes: pd.DataFrame, cells: int = 50) -> np.ndarray:
    """Share of the boxes that cover each of `cells` x `cells` points of the picture, rows from top to bottom."""
    points = (np.arange(cells) + 0.5) / cells
    inside_x = (boxes.x1.to_numpy()[:, None] <= points) & (points < boxes.x2.to_numpy()[:, None])
    inside_y = (boxes.y1.to_numpy()[:, None] <= points) & (points < boxes.y2.to_numpy()[:, None])
    return np.einsum("ny,nx->yx", inside_y.astype(float), inside_x.astype(float)) / len(boxes)


# %%
plot_boxes(train_boxes)
plt.show()

# %% [markdown]
# Most pictures hold one table. The tables lie around the middle, which is a prior that a model can learn without
# looking at the picture; the honest yardstick is a detector that always answers with the average box.

# %%
average_box = train_boxes[["x1", "y1", "x2", "y2"]].median().to_numpy()
constant = box_iou(torch.tensor(average_box)[None], torch.tensor(eval_boxes[["x1", "y1", "x2", "y2"]].to_numpy()))
print(f"always answering {average_box.round(2).tolist()}: mean IoU {constant.mean():.3f} on the evaluation split")

# %% [markdown]
# Averages hide the extremes, and annotations are wrong at the extremes first: the largest box, the smallest, and the
# picture with the most boxes.

# %%
extremes = {
    "largest box": train_boxes.picture[train_boxes.area.idxmax()],
    "smallest box": train_boxes.picture[train_boxes.area.idxmin()],
    "widest shape": train_boxes.picture[train_boxes.aspect.idxmax()],
    "most boxes": pictures.boxes.idxmax(),
}
extreme_samples = [read_row(train_rows[int(number)]) for number in extremes.values()]
show_pictures(
    [image for image, _, _ in extreme_samples],
    [boxes for _, boxes, _ in extreme_samples],
    titles=[f"{kind} ({len(boxes)} in all)" for kind, (_, boxes, _) in zip(extremes, extreme_samples, strict=True)],
)
plt.show()

# %% [markdown]
# ## 3. Boxes as text
#
# Qwen2-VL was trained to write a box as two corners on a grid of 0 to 1000 in both directions, whatever the size of
# the picture: `(x1,y1),(x2,y2)`. Qwen3-VL does the same, but Qwen2.5-VL, between the two, writes pixels of the
# picture as its processor resized it. A box read in the wrong convention is not an error, it is only somewhere else.
# So the convention is looked up by the model's own `config.model_type`, a family that is not listed is refused, and
# pixels become model coordinates here, and model coordinates pixels; nowhere else.
#
# Rounding (not cutting off) keeps the error under half a unit: on the grid, half a pixel in a picture of 1,000.


# %%
#| export boxes
GRID = 1000  # Qwen2-VL writes coordinates as integers from 0 to 1000
GRID_FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")  # values of `config.model_type`
PIXEL_FAMILIES = ("qwen2_5_vl",)


def resized_size(
    width: int, height: int, factor: int = 28, min_pixels: int = 4 * 28 * 28, max_pixels: int = 16384 * 28 * 28
) -> tuple[int, int]:
    """Width and height in pixels to which a Qwen-VL processor resizes a picture: multiples of `factor`.

    The defaults are those that Qwen2-VL and Qwen2.5-VL were published with.
    """
    height, width = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return width, height


def coordinate_range(width: int, height: int, family: str, resized: tuple[int, int] | None) -> tuple[int, int]:
    """The largest x and y that models of a family write for a picture of `width` x `height` pixels.

    `resized` is (width, height) as the model saw the picture; None stands for the published pixel budget. Only
    families that write pixels need it. Raises ValueError for a family whose convention is not known.
    """
    if family in GRID_FAMILIES:
        return GRID, GRID
    if family in PIXEL_FAMILIES:
        return resized or resized_size(width, height)
    raise ValueError(
        f"How {family!r} models write coordinates is not known: use a model whose config.model_type is one of "
        f"{[*GRID_FAMILIES, *PIXEL_FAMILIES]}, or find its convention out and add it to one of these two lists."
    )


def to_model_coordinates(
    box: Sequence[float], width: int, height: int, family: str, resized: tuple[int, int] | None = None
) -> list[int]:
    """Pixel box `[x1, y1, x2, y2]` -> what models of `family` write: rounded, clamped to the picture.

    `family` and `resized` as in `coordinate_range`, which raises ValueError.
    """
    limits = coordinate_range(width, height, family, resized) * 2
    return [
        min(limit, max(0, round(v / size * limit)))
        for v, size, limit in zip(box, (width, height) * 2, limits, strict=True)
    ]


def from_model_coordinates(
    box: Sequence[float], width: int, height: int, family: str, resized: tuple[int, int] | None = None
) -> list[float]:
    """Box `[x1, y1, x2, y2]` as written by a model of `family` -> pixels, clamped to the picture.

    `family` and `resized` as in `coordinate_range`, which raises ValueError.
    """
    limits = coordinate_range(width, height, family, resized) * 2
    return [
        min(limit, max(0, v)) / limit * size for v, size, limit in zip(box, (width, height) * 2, limits, strict=True)
    ]


def to_grid(box: Sequence[float], width: int, height: int) -> list[int]:
    """Pixel box `[x1, y1, x2, y2]` -> Qwen2-VL's grid, rounded, clamped to 0..1000."""
    return to_model_coordinates(box, width, height, "qwen2_vl")


def from_grid(box: Sequence[float], width: int, height: int) -> list[float]:
    """Box `[x1, y1, x2, y2]` on Qwen2-VL's grid -> pixels of a picture of `width` x `height`, clamped to it."""
    return from_model_coordinates(box, width, height, "qwen2_vl")


def has_area(box: Sequence[float]) -> bool:
    """Whether `[x1, y1, x2, y2]` is finite, its corners are in order, and it covers something."""
    x1, y1, x2, y2 = box
    return 0 < x2 - x1 < math.inf and 0 < y2 - y1 < math.inf


def flip_horizontally(image: Image.Image, boxes: Iterable[Sequence[float]]) -> tuple[Image.Image, list[list[float]]]:
    """Mirror a picture left to right, and its pixel boxes `[x1, y1, x2, y2]` with it."""
    return ImageOps.mirror(image), [[image.width - x2, y1, image.width - x1, y2] for x1, y1, x2, y2 in boxes]


# %%
image, boxes, labels = samples[0]
grid_box = to_grid(boxes[0], *image.size)
print("pixels", [round(v, 1) for v in boxes[0]], "of", image.size)
print("grid  ", grid_box)
print("back  ", [round(v, 1) for v in from_grid(grid_box, *image.size)])
print("Qwen2.5-VL would write", to_model_coordinates(boxes[0], *image.size, "qwen2_5_vl"))

# %% [markdown]
# ## 4. A picture as a conversation
#
# The question states what to look for and how to answer. Base models are judged with the same words that the
# fine-tuned ones are trained with, and stating the format matters: without it the base model often answers with a
# sentence that holds no box, and a "zero-shot baseline" then measures the prompt rather than the model.
#
# The answer is written the way Qwen2-VL was pretrained to write it, with special tokens around label and box. When
# there are several objects they are listed from the top left, because a model cannot learn an order that changes by
# chance.


# %%
#| export conversation
SYSTEM_MESSAGE = "You are a vision language model that locates objects on food packages."
PROMPT = "Detect every {label}. Answer with label and box of each as label(x1,y1),(x2,y2) on a grid from 0 to 1000."
PLAIN_PROMPT = "Detect the bounding box of the {label}."


def format_answer(labels: Iterable[str], grid_boxes: Iterable[Sequence[int]]) -> str:
    """The text Qwen2-VL is taught to write: objects from the top left, boxes `[x1, y1, x2, y2]` on 0..1000."""
    objects = sorted(zip(labels, grid_boxes, strict=True), key=lambda pair: (pair[1][1], pair[1][0]))
    return "".join(
        f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        for label, (x1, y1, x2, y2) in objects
    )


def to_conversation(prompt: str, answer: str | None = None) -> list[dict]:
    """System, user (one picture, then the prompt) and, when given, the assistant's answer."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


# %%
question = PROMPT.format(label="nutrition table")
answer = format_answer(labels, [to_grid(box, *image.size) for box in boxes])
to_conversation(question, answer)

# %% [markdown]
# The processor turns this into what the model sees. Its chat template writes the roles as text; the picture is cut
# into patches of 14 x 14 pixels, and each block of 2 x 2 patches becomes one `<|image_pad|>` token.
#
# The number of pixels decides what a picture costs, in time and memory. The budget is set once, in the processor,
# which is saved with every result: a model that was trained at one resolution and asked at another misplaces its
# boxes. The function asserts that the budget is kept, because a version of transformers that ignores it would only be
# slow and hungry, not wrong, and nobody would notice.


# %%
#| export loading
def load_processor(model_id: str, max_pixels: int) -> Qwen2VLProcessor:
    """The model's processor, with its pixel budget lowered to `max_pixels` if it is above.

    Raises ValueError when the budget is under the smallest picture, or is not kept.
    """
    processor = Qwen2VLProcessor.from_pretrained(model_id)
    image_processor, size = processor.image_processor, processor.image_processor.size
    size["longest_edge"] = min(max_pixels, size["longest_edge"])
    if size["longest_edge"] < size["shortest_edge"]:
        raise ValueError(
            f"MAX_PIXELS={max_pixels} is under the processor's smallest picture: {size['shortest_edge']}."
        )
    grid = image_processor(images=[Image.new("RGB", (4000, 3000))], return_tensors="pt")["image_grid_thw"]
    if grid.prod() * image_processor.patch_size**2 > size["longest_edge"]:
        raise ValueError(f"The budget of {size['longest_edge']} pixels is not kept: try another transformers version.")
    return processor


# %%
processor = load_processor(MODEL_ID, MAX_PIXELS)
text = processor.apply_chat_template(to_conversation(question, answer), tokenize=False)
inputs = processor(text=[text], images=[[image]], return_tensors="pt")
print(text)
print(f"picture {image.width} x {image.height} -> grid of patches {inputs['image_grid_thw'][0].tolist()}")
print({name: tuple(tensor.shape) for name, tensor in inputs.items()})

# %% [markdown]
# The answer, token by token: labels and boxes are framed by tokens of their own, and each digit is one token. A box
# is at most 20 decisions, most of them between ten digits.

# %%
answer_tokens = processor.tokenizer.encode(answer + "<|im_end|>")
pd.DataFrame(
    [answer_tokens, [processor.tokenizer.decode([token]) for token in answer_tokens]], index=["id", "token"]
).style.hide(axis="columns")

# %% [markdown]
# What the budget does to the dataset: `smart_resize` keeps the aspect ratio, rounds both sides to multiples of 28,
# and shrinks what is above the budget. Left the sizes as they come, right the tokens that remain. Text that is read
# by its shape survives a good deal of shrinking; boxes that are a few pixels wide do not.


# %%
#| export data
def count_tokens(pictures: pd.DataFrame, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Image tokens of every line of `describe_pictures`: one for each 28 x 28 pixels of the resized picture."""
    factor = 28  # patches of 14 x 14, merged two by two
    sizes = [
        smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        for width, height in zip(pictures.width, pictures.height, strict=True)
    ]
    return np.array([height * width // factor**2 for height, width in sizes])


# %%
budget = processor.image_processor.size
tokens = count_tokens(pictures, budget["shortest_edge"], budget["longest_edge"])
unlimited = count_tokens(pictures, budget["shortest_edge"], 10**9)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.scatter(pictures.width, pictures.height, s=12, alpha=0.3, color=BAR_COLOUR, linewidths=0)
left.set(xlabel="width (pixels)", ylabel="height (pixels)", title="Pictures as stored, upright", xlim=0, ylim=0)
right.hist(tokens, bins=30, color=BAR_COLOUR)
right.set(
    xlabel="image tokens",
    ylabel="pictures",
    title=f"Tokens: {tokens.mean():.0f} on average, {unlimited.mean():.0f} without budget",
)
plt.show()

# %% [markdown]
# ## 5. What the loss looks at: the collator
#
# A collator turns a list of conversations into one batch. Its labels decide what is learned: position *i* of `labels`
# is the token the model should have written there, and -100 means "do not care". Padding never counts, and neither do
# picture tokens: no word stands at their place. About the rest one can differ:
#
# - `AllTokensCollator` trains on all text: the system message, the question and the answer, as in language modelling.
# - `AssistantOnlyCollator` trains on the answer alone: the rest is given, not written.
#
# In both the `<|im_end|>` that closes the answer counts: a model that never learns to stop goes on writing boxes. The
# two share everything but the mask. TRL's option `completion_only_loss` does nothing when a custom collator is
# passed; the masking below is all there is.


# %%
#| export collators
VISION_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]


@dataclass(frozen=True)
class AllTokensCollator:
    """Batch `{"image", "messages"}` examples; labels are all text: system message, question and answer."""

    processor: Qwen2VLProcessor

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Processor tensors plus `labels` of the shape of `input_ids` (batch, tokens)."""
        batch = to_batch(examples, self.processor)
        return add_labels(batch, find_text_tokens(batch["input_ids"], self.processor.tokenizer))


@dataclass(frozen=True)
class AssistantOnlyCollator:
    """Batch `{"image", "messages"}` examples; labels are the assistant's answers with their end-of-turn token."""

    processor: Qwen2VLProcessor

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Processor tensors plus `labels` of the shape of `input_ids` (batch, tokens)."""
        batch = to_batch(examples, self.processor)
        return add_labels(batch, find_assistant_tokens(batch["input_ids"], self.processor.tokenizer))


def to_batch(examples: Sequence[dict], processor: Qwen2VLProcessor) -> dict[str, torch.Tensor]:
    """What the model is given: token ids, masks, patches of the pictures and their grids; padded on the right."""
    texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
    images = [[example["image"]] for example in examples]
    return dict(processor(text=texts, images=images, padding=True, pad_to_multiple_of=8, return_tensors="pt"))


def add_labels(batch: dict[str, torch.Tensor], trained: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch with `labels`: the token ids where `trained` (batch, tokens) holds, -100 elsewhere."""
    return batch | {"labels": batch["input_ids"].masked_fill(~trained, -100)}


def find_text_tokens(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Mask (batch, tokens) of all that is neither padding nor part of a picture."""
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


COLLATORS = {"v1-all-tokens": AllTokensCollator, "v2-assistant-only": AssistantOnlyCollator}


# %%
#| export collators
def analyze_token_distribution(batch: dict[str, torch.Tensor], tokenizer) -> pd.DataFrame:
    """Tokens of a batch by kind: how many there are, and how many of them have a label."""
    ids, trained = batch["input_ids"], batch["labels"] != -100
    is_picture = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(VISION_TOKENS)))
    is_answer = find_assistant_tokens(ids, tokenizer)
    is_end = is_answer & (ids == tokenizer.convert_tokens_to_ids("<|im_end|>"))
    is_padding = ids == tokenizer.pad_token_id
    kinds = {
        "picture": is_picture,
        "system message, question, roles": ~(is_picture | is_answer | is_padding),
        "answer": is_answer & ~is_end,
        "end of turn": is_end,
        "padding": is_padding,
    }
    counts = {kind: [int(mask.sum()), int((mask & trained).sum())] for kind, mask in kinds.items()}
    return pd.DataFrame.from_dict(counts, orient="index", columns=["tokens", "trained"])


# %%
example = {"image": image, "messages": to_conversation(question, answer)}
batches = {variant: collator(processor)([example]) for variant, collator in COLLATORS.items()}
distribution = {variant: analyze_token_distribution(batch, processor.tokenizer) for variant, batch in batches.items()}
pd.DataFrame(
    {"tokens": distribution["v2-assistant-only"]["tokens"]}
    | {f"trained by {variant}": table["trained"] for variant, table in distribution.items()}
)

# %% [markdown]
# The same, token by token. The run of picture tokens is shown as one cell; what is coloured has a label.


# %%
#| export figures
def plot_trained_tokens(batches: dict[str, dict[str, torch.Tensor]], tokenizer, per_line: int = 14) -> plt.Figure:
    """The first row of one batch per collator as a strip of tokens, coloured where the loss looks."""
    figure, grid = plt.subplots(len(batches), 1, figsize=(12, 3.4 * len(batches)), layout="constrained", squeeze=False)
    for axes, (variant, batch) in zip(grid.flat, batches.items(), strict=True):
        cells = list_token_cells(batch, tokenizer)
        for number, (text, trained) in enumerate(cells):
            x, y = number % per_line, -(number // per_line)
            colour = TRUTH_COLOUR if trained else "#eeeeee"
            axes.add_patch(Rectangle((x + 0.03, y + 0.1), 0.94, 0.8, color=colour))
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6.5,
                      color="white" if trained else "black")  # fmt: skip
        axes.set(xlim=(0, per_line), ylim=(-((len(cells) - 1) // per_line), 1))
        axes.set_title(
            f"{variant}: {sum(trained for _, trained in cells)} of {len(cells)} cells are trained", loc="left"
        )
        axes.axis("off")
    return figure


def list_token_cells(batch: dict[str, torch.Tensor], tokenizer) -> list[tuple[str, bool]]:
    """Text and "has a label" of each token in the batch's first row; a run of picture tokens is one cell."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    cells = []
    for token, label, previous in zip(ids, labels, [None, *ids], strict=False):
        if token == tokenizer.pad_token_id or token == previous == image:
            continue
        text = tokenizer.decode([token]).replace("\n", "\\n").replace("<|", "").replace("|>", "")
        cells.append((f"{ids.count(image)} x {text}" if token == image else text, label != -100))
    return cells


# %%
plot_trained_tokens(batches, processor.tokenizer)
plt.show()

# %% [markdown]
# Which of the two gives the better detector is a question for an experiment, in section 11.
#
# Training examples are made when they are asked for, so that a dataset of phone photographs need not fit in memory
# and a picture can be mirrored in one epoch and not in the next.


# %%
#| export data
def to_training_dataset(rows: Dataset, prompt: str, flip_probability: float) -> Dataset:
    """The rows as lazily built `{"image", "messages"}` examples; pictures are mirrored with `flip_probability`."""

    def transform(batch: dict[str, list]) -> dict[str, list]:
        examples = [to_training_example(dict(zip(batch, row, strict=True)), prompt, flip_probability)
                    for row in zip(*batch.values(), strict=True)]  # fmt: skip
        return {key: [example[key] for example in examples] for key in ("image", "messages")}

    return rows.with_transform(transform)


def to_training_example(row: dict, prompt: str, flip_probability: float) -> dict:
    """One dataset row as picture and conversation, mirrored with `flip_probability`."""
    image, boxes, labels = read_row(row)
    if torch.rand(()) < flip_probability:  # torch's generator is seeded anew in every worker of a data loader
        image, boxes = flip_horizontally(image, boxes)
    answer = format_answer(labels, [to_grid(box, *image.size) for box in boxes])
    return {"image": image, "messages": to_conversation(prompt, answer)}


# %%
train_dataset = to_training_dataset(train_rows, question, FLIP_PROBABILITY)
batch = AssistantOnlyCollator(processor)([train_dataset[index] for index in range(min(4, len(train_dataset)))])
trained_tokens = (batch["labels"] != -100).sum(dim=1)
print(f"{batch['input_ids'].shape[1]} tokens a row, trained: {trained_tokens.tolist()}")

# %% [markdown]
# ## 6. The model and its parts
#
# Fine-tuning addresses layers by name, so the names come first. A model can be built on PyTorch's `meta` device: all
# modules with names and shapes, and no memory behind them, in seconds even at 7 billion parameters.
#
# In memory the two towers are `model.visual` and `model.language_model`; the files on disk, and older tutorials, name
# them otherwise, and a pattern that matches nothing raises no error.


# %%
#| export loading
AREAS = ["visual", "language_model", "lm_head"]  # parts of the paths in `named_parameters`


def build_empty_model(model_id: str) -> PreTrainedModel:
    """The model without weights, on the meta device: names, shapes and counts cost no memory."""
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(model_id))


def area_of(name: str) -> str:
    """The area a parameter or module belongs to, by its path; "other" when it belongs to none."""
    return next((area for area in AREAS if area in name), "other")


def list_linear_modules(model: torch.nn.Module, prefix: str = "") -> pd.DataFrame:
    """The linear layers below `prefix`: path with `{i}` for layer numbers, how many of them, their shape."""
    found = Counter(
        (re.sub(r"\.\d+\.", ".{i}.", name), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    )
    lines = [(*key, count) for key, count in found.items()]
    return pd.DataFrame(lines, columns=["module", "in", "out", "count"]).set_index("module")


def find_modules_by_pattern(model: torch.nn.Module, pattern: str) -> list[str]:
    """Paths of the modules that a regular expression matches in full, as PEFT matches `target_modules`."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def summarize_trainables_by_area(model: torch.nn.Module) -> pd.DataFrame:
    """Parameters of each area, and how many of them are trained. Packed 4-bit weights count as they are stored."""
    counts = {area: [0, 0] for area in [*AREAS, "other"]}
    for name, parameter in model.named_parameters():
        counts[area_of(name)][0] += parameter.numel()
        counts[area_of(name)][1] += parameter.numel() * parameter.requires_grad
    table = pd.DataFrame.from_dict(counts, orient="index", columns=["parameters", "trained"])
    table.loc["total"] = table.sum()
    return table


# %%
empty_model = build_empty_model(MODEL_ID)
summarize_trainables_by_area(empty_model)[["parameters"]].style.format("{:,}")

# %%
list_linear_modules(empty_model)

# %% [markdown]
# The two patterns of the recipes, and what the name `proj` alone would have hit: PEFT takes a list of plain names as
# endings of paths.

# %%
hits = {
    "LLM_LAYERS": find_modules_by_pattern(empty_model, LLM_LAYERS),
    "VISION_LAYERS": find_modules_by_pattern(empty_model, VISION_LAYERS),
    'the plain name "proj"': find_modules_by_pattern(empty_model, r".*\.proj"),
}
pd.DataFrame(
    {
        pattern: {"modules": len(names)}
        | {area: sum(area_of(name) == area for name in names) for area in ("visual", "language_model")}
        | {"first": names[0]}
        for pattern, names in hits.items()
    }
).T

# %% [markdown]
# What each recipe will train can be counted on the empty model too, before anything is loaded. The same functions
# prepare the real model in section 10.


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
    if recipe.lora_target_modules is None:
        return None
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=recipe.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def count_trainables(model_id: str, recipe: TrainingRecipe) -> pd.DataFrame:
    """`summarize_trainables_by_area` of a recipe, without loading weights."""
    model = build_empty_model(model_id)
    apply_freeze_policy(model, recipe)
    config = build_lora_config_for_recipe(recipe)
    return summarize_trainables_by_area(model if config is None else get_peft_model(model, config))


# %%
pd.DataFrame(
    {name: count_trainables(MODEL_ID, recipe)["trained"] for name, recipe in RECIPES.items() if not recipe.stages}
).T.style.format("{:,}")

# %% [markdown]
# ## 7. Loading: 16 bits, 4 bits, and which parts
#
# NF4 stores four bits per weight, in blocks that share a scale, and multiplies in the dtype chosen above. What is
# kept out of it matters as much: the vision tower holds 8 % of the weights of the 7B model, so quantising it saves
# little, and `lm_head` chooses the digits. The skip list names modules by their path in memory, `model.visual`: the
# shorter `visual` matches nothing in transformers 5, silently. Hence the check.


# %%
#| export loading
KEPT_MODULES = ("model.visual", "lm_head")  # not quantised


def load_model(
    model_id: str, quantized: bool, dtype: torch.dtype, kept_modules: Sequence[str] = KEPT_MODULES
) -> PreTrainedModel:
    """Load Qwen2-VL, in NF4 but for `kept_modules` if `quantized`. Raises RuntimeError if it came out otherwise."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(kept_modules),  # the name is historic, it holds for 4 bits too
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        model_id,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map=choose_device_map(),
        quantization_config=quantization if quantized else None,
    )
    check_quantization(model, quantized, kept_modules)
    return model


def choose_device_map() -> str | dict[str, int]:
    """CPU without a GPU; under torchrun the GPU of this process; else the layers are spread over all visible GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


def check_quantization(model: PreTrainedModel, quantized: bool, kept_modules: Sequence[str] = KEPT_MODULES) -> None:
    """Raise RuntimeError unless 4-bit layers are everywhere but in `kept_modules`, or nowhere if not `quantized`."""
    linear = {n: type(m).__name__ == "Linear4bit" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wrong = [n for n, packed in linear.items() if packed != (quantized and not n.startswith(tuple(kept_modules)))]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(linear)} linear layers have the wrong precision, first {wrong[0]}.")


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


def summarize_memory(model: PreTrainedModel) -> pd.DataFrame:
    """Weights of a model by area: megabytes, the types they are stored in, and how many layers are in 4 bits."""
    lines = []
    for area in AREAS:
        tensors = [p for name, p in model.named_parameters() if area in name]
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
        layers = [m for name, m in model.named_modules() if area in name and isinstance(m, torch.nn.Linear)]
        packed = sum(type(m).__name__ == "Linear4bit" for m in layers)
        megabytes = sum(p.numel() * p.element_size() for p in tensors) / 1e6
        lines.append([area, round(megabytes, 2), ", ".join(kinds), f"{packed} of {len(layers)}"])
    return pd.DataFrame(lines, columns=["area", "megabytes", "stored as", "layers in 4 bits"]).set_index("area")


# %%
model = load_model(MODEL_ID, quantized=True, dtype=best_dtype())
plain = summarize_memory(empty_model.to(best_dtype()))
pd.concat({str(best_dtype()).removeprefix("torch."): plain, "NF4": summarize_memory(model)}, axis=1)

# %% [markdown]
# Two NF4 weights share one `uint8`. Norms and embeddings stay in the chosen dtype.
#
# ## 8. Asking and reading the answer
#
# Answers are generated in batches, greedily. The probability of each token is kept: it will tell how sure the model
# was of a box. Three details decide whether batched answers are right, and none of them raises an error:
#
# - The padding goes to the left, so that the last token of every row is the last token of its question; with padding
#   on the right a decoder continues from padding.
# - Rows of different lengths are padded to a multiple of 8, here and in the collator. CUDA's memory-efficient
#   attention misread the masks of other lengths (torch 2.11, float32): in a batch of 32 pictures of mixed sizes every
#   row of full length was answered wrongly.
# - All that the processor returned is passed on. `generate` without `mm_token_type_ids` runs, but gives the image
#   tokens positions on a line instead of in a plane.


# %%
#| export evaluation
def to_question(image: Image.Image, processor: Qwen2VLProcessor, prompt: str) -> dict[str, torch.Tensor]:
    """The question about one picture as processor tensors, one row."""
    text = processor.apply_chat_template(to_conversation(prompt), tokenize=False, add_generation_prompt=True)
    return dict(processor(text=[text], images=[[image]], return_tensors="pt"))


def to_batch_of_questions(questions: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of `to_question` as one batch, padded on the left to a multiple of 8; equal lengths are not padded."""
    lengths = [question["input_ids"].shape[1] for question in questions]
    longest = lengths[0] if len(set(lengths)) == 1 else 8 * -(-max(lengths) // 8)
    batch = {}
    for name in questions[0]:
        rows = [question[name] for question in questions]
        if name not in ("pixel_values", "image_grid_thw"):
            value = pad_token_id if name == "input_ids" else 0
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows]
        batch[name] = torch.cat(rows)
    return batch


def to_questions(images: Sequence[Image.Image], processor: Qwen2VLProcessor, prompt: str) -> dict[str, torch.Tensor]:
    """One question per picture as one batch."""
    questions = [to_question(image, processor, prompt) for image in images]
    return to_batch_of_questions(questions, processor.tokenizer.pad_token_id)


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and how sure it was of each token: where the token ends in the text, its probability."""

    text: str
    ends: list[int]
    probabilities: list[float]

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


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer, questions: dict[str, torch.Tensor], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to a batch of `to_questions`, special tokens included, padding removed.

    A row that has ended is padded while the others go on; the batch ends with its last row.
    """
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    recorder = ProbabilityRecorder()
    inputs = {name: tensor.to(model.device) for name, tensor in questions.items()}
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList([recorder]), **greedy
    )
    written = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    probabilities = torch.stack(recorder.steps, dim=1).tolist()
    return [to_answer(*row, tokenizer) for row in zip(written, probabilities, strict=True)]


def to_answer(tokens: Sequence[int], probabilities: Sequence[float], tokenizer) -> Answer:
    """One row of token ids and their probabilities as text; a letter of several tokens ends with the last of them."""
    length = len(tokens) - next((n for n, token in enumerate(reversed(tokens)) if token != tokenizer.pad_token_id), 0)
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=False) for n in range(1, length + 1)]
    return Answer(texts[-1] if texts else "", [len(text) for text in texts], list(probabilities[:length]))


def generate_answers(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    images: Sequence[Image.Image],
    prompt: str,
    max_new_tokens: int,
) -> list[str]:
    """One greedy answer per picture, special tokens included, padding removed. The pictures make one batch."""
    questions = to_questions(images, processor, prompt)
    return [answer.text for answer in generate(model, processor.tokenizer, questions, max_new_tokens)]


# %%
model.eval()
answers = generate_answers(model, processor, [image for image, _, _ in samples], question, MAX_NEW_TOKENS)
pd.DataFrame(
    {"truth": [str([to_grid(b, *i.size) for b in bs]) for i, bs, _ in samples], "answer": answers}
).style.hide()

# %% [markdown]
# What did the model say, and which of it is a box? Models that were not fine-tuned write boxes in many ways: with
# special tokens or without, with spaces, with `<box>` in place of the token, with corners swapped, as JSON like
# Qwen2.5-VL and Qwen3-VL. A strict parser would count these as misses and make every fine-tuned model look good. So
# this one looks for four numbers in brackets and takes the words before them, or JSON's `label`, as the label.
#
# What looks like an attempt at a box but is none (cut off, three numbers, no area) is returned as well, as `unread`:
# an answer in a broken format is a different failure from a box in the wrong place, and is counted apart. An answer
# that says there is nothing to find has neither boxes nor unread pieces.


# %%
#| export parsing
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
JSON_LABEL_PATTERN = re.compile(r"""["']label["']\s*:\s*["']([^"']*)["']""")


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
    text, objects, unread, spans = END_PATTERN.sub(lambda end: " " * len(end[0]), answer), [], [], []
    label, end = "", 0
    for piece in PIECE_PATTERN.finditer(text):
        label = (read_json_label(piece[0]) if piece["json"] else read_label(text[end : piece.start()])) or label
        found = [] if piece["attempt"] else list(re.finditer(BOX, piece[0]))
        boxes = [read_numbers(box[0]) for box in found]
        objects += [(label, box) for box in boxes if has_area(box)]
        spans += [(piece.start() + match.start(), piece.start() + match.end())
                  for match, box in zip(found, boxes, strict=True) if has_area(box)]  # fmt: skip
        if not all(map(has_area, boxes)) or (not boxes and promises_box(piece)):
            unread.append(piece[0].strip())
        end = piece.end()
    return ParsedAnswer(objects, unread, spans)


def read_label(words: str) -> str:
    """The label in the words before a box: what the special tokens enclose, else the words without markup."""
    if references := REFERENCE_PATTERN.findall(words):
        return references[-1]
    label = MARKUP_PATTERN.sub(" ", words).strip(" \t\n\r,;:.-*'\"`<>()[]{}|")
    return "" if label.lower() == "and" else label


def read_json_label(piece: str) -> str:
    """The value of `label` in one JSON object, whole or cut off; empty where there is none."""
    match = JSON_LABEL_PATTERN.search(piece)
    return match[1] if match else ""


def read_numbers(box: str) -> list[float]:
    """The text of a box as `[x1, y1, x2, y2]`, corners in order."""
    xa, ya, xb, yb = map(float, re.findall(r"-?\d+(?:\.\d+)?", box))
    return [min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)]


def promises_box(piece: re.Match) -> bool:
    """Whether a piece without a box should have had one: `{"objects": null}` says that there is nothing."""
    return not piece[0].endswith("}") or re.search("box|label", piece[0]) is not None


# %%
examples = [
    "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(14,57),(991,603)<|box_end|><|im_end|>",
    "nutrition-table<box>(265,492),(735,842)>",
    "The nutrition table is at (991, 603), (14, 57).",
    '```json\n[{"bbox_2d": [14, 57, 991, 603], "label": "nutrition-table"}, {"bbox_2d": [12, 4',
    "nutrition-table(14,57),(99",
    "There is no nutrition table in this picture.",
]
read = [{"answer": example} | vars(parse_answer(example)) for example in examples]
pd.DataFrame(read).astype(str).style.format(escape="html").hide()

# %% [markdown]
# The first four are read, the fourth in part; the fifth was cut off; the last holds nothing, and nothing is wrong
# with that. Now the answers from above, drawn:

# %%
predictions = [
    [from_model_coordinates(box, *image.size, model.config.model_type) for _, box in parse_answer(answer).objects]
    for answer, (image, _, _) in zip(answers, samples, strict=True)
]
show_pictures([image for image, _, _ in samples], [boxes for _, boxes, _ in samples], predictions)
plt.show()

# %% [markdown]
# ## 9. Measuring
#
# How good is a detector that writes its boxes, and how sure can one be of the figure? The overlap of two boxes is
# their IoU: intersection over union of their areas, 1 for the same box and 0 for boxes that do not touch. With
# several tables in a picture the field uses two readings, and both are given:
#
# - *one to one*: a predicted box may claim one table only; of all assignments the one with the largest sum of IoU
#   counts. A table for which no box is left counts 0.
# - *best IoU*: every table takes the predicted box that overlaps it most, even if another table took the same.
#
# | | |
# |---|---|
# | `mean_iou`, `median_iou` | IoU of a picture (mean over its tables, one to one), over pictures with tables |
# | `iou_gt_0.5`, `iou_gt_0.7` | share of these pictures above that IoU |
# | `mean_best_iou` | best IoU, over all tables of all pictures |
# | `precision`, `recall`, `f1` | hits over predicted boxes, hits over tables, their harmonic mean; a hit: IoU >= 0.5 |
# | `mAP`, `mAP50`, `mAP75` | COCO's average precision |
# | `detection_rate` | share of pictures whose answer held a readable box, right or wrong |
# | `malformed_rate` | share of pictures whose answer held something that could not be read |
#
# Whether labels count is a policy. By default they are all of one kind (`merge`): a base model that writes "nutrition
# facts" has found the table. `multi-class` wants them to agree; `table-only` looks for the label `nutrition-table` in
# the truth, and takes every predicted box for one.


# %%
#| export metrics
POLICIES = ("merge", "multi-class", "table-only")
TABLE = "nutrition-table"


def normalize_label(label: str) -> str:
    """Labels that differ in case, spaces, underscores or hyphens only are the same."""
    return re.sub(r"[\s_-]+", "-", label.strip().lower())


def apply_policy(record: dict, policy: str) -> tuple[list[dict], list[dict]]:
    """Truth and prediction of a picture, with the labels that are to be compared. Raises ValueError for others."""
    if policy not in POLICIES:
        raise ValueError(f"Unknown policy {policy!r}: use one of {', '.join(POLICIES)}.")
    truth, prediction = record["truth"], record["prediction"]
    if policy == "table-only":
        truth = [thing for thing in truth if normalize_label(thing["label"]) == TABLE]
    if policy == "multi-class":
        return tuple(
            [thing | {"label": normalize_label(thing["label"])} for thing in side] for side in (truth, prediction)
        )
    return tuple([thing | {"label": TABLE} for thing in side] for side in (truth, prediction))


def compute_ious(truth: Sequence[dict], prediction: Sequence[dict]) -> np.ndarray:
    """IoU of every true with every predicted `{"label", "box"}`, (true, predicted); 0 where the labels differ."""
    boxes = [torch.tensor([thing["box"] for thing in side], dtype=torch.float64) for side in (truth, prediction)]
    ious = box_iou(boxes[0].reshape(-1, 4), boxes[1].reshape(-1, 4)).numpy()
    same = [[t["label"] == p["label"] for p in prediction] for t in truth]
    return ious * np.array(same, dtype=bool).reshape(ious.shape)


def assign_boxes(ious: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns of an IoU matrix one to one; returns their indices.

    First there are as many pairs with an IoU of at least `threshold` as possible, then the sum of IoU is largest
    (Kuhn, "The Hungarian method for the assignment problem", 1955). Pairs may have an IoU of 0.
    """
    tie_breaker = ious / (min(ious.shape) + 1)  # sums to less than one more pair would add
    return linear_sum_assignment((ious >= threshold) + tie_breaker, maximize=True)


def match_boxes(truth: Sequence[Sequence[float]], prediction: Sequence[Sequence[float]]) -> list[float]:
    """IoU of every true box with the predicted box assigned to it, one to one; 0 where none was left.

    Boxes are `[x1, y1, x2, y2]` in any common unit; labels are left out of account.
    """
    ious = compute_ious(*([{"label": "", "box": box} for box in side] for side in (truth, prediction)))
    return claimed_ious(ious).tolist()


def claimed_ious(ious: np.ndarray) -> np.ndarray:
    """Of an IoU matrix (true, predicted): what each true box gets in the assignment with the largest sum."""
    claimed = np.zeros(len(ious))
    pairs = assign_boxes(ious)
    claimed[pairs[0]] = ious[pairs]
    return claimed


# %% [markdown]
# Nearly every figure is a ratio of two sums over pictures. So each picture is boiled down to a row of counts first;
# then a figure, and its value on any resample of the pictures, is a weighted sum over these rows.


# %%
#| export metrics
RATIOS = {  # figure: numerator, denominator; columns of `score_pictures`
    "mean_iou": ("iou", "with_truth"),
    "detection_rate": ("detected", "pictures"),
    "iou_gt_0.5": ("iou_gt_0.5", "with_truth"),
    "iou_gt_0.7": ("iou_gt_0.7", "with_truth"),
    "mean_best_iou": ("best_iou", "truths"),
    "precision": ("hits", "predictions"),
    "recall": ("hits", "truths"),
    "f1": ("twice_hits", "boxes"),  # 2 TP / (2 TP + FP + FN), the harmonic mean of the two
    "malformed_rate": ("malformed", "pictures"),
}


def score_picture(record: dict, threshold: float, policy: str) -> dict[str, float]:
    """One record of `evaluate_model` as the counts and sums that the figures are made of."""
    truth, prediction = apply_policy(record, policy)
    ious = compute_ious(truth, prediction)
    iou = claimed_ious(ious).mean() if truth else 0.0
    hits = (ious[assign_boxes(ious, threshold)] >= threshold).sum()
    return {
        "pictures": 1,
        "with_truth": len(truth) > 0,
        "iou": iou,
        "iou_gt_0.5": iou > 0.5,
        "iou_gt_0.7": iou > 0.7,
        "best_iou": ious.max(axis=1, initial=0).sum(),
        "truths": len(truth),
        "predictions": len(prediction),
        "boxes": len(truth) + len(prediction),
        "hits": hits,
        "twice_hits": 2 * hits,
        "detected": len(prediction) > 0,
        "malformed": len(record.get("unread", [])) > 0,
    }


def score_pictures(records: Sequence[dict], threshold: float, policy: str) -> pd.DataFrame:
    """`score_picture` for every record, one row each. Raises ValueError when there is none."""
    if not records:
        raise ValueError("No picture was evaluated: EVAL_SAMPLES must be at least 1.")
    return pd.DataFrame([score_picture(record, threshold, policy) for record in records], dtype=float)


def compute_figures(scores: pd.DataFrame, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of weighted pictures: `weights` is (resamples, pictures), every figure (resamples,).

    What is not defined is NaN, such as a mean over true boxes where there are none; precision without any predicted
    box is 0, as in scikit-learn.
    """
    sums = dict(zip(scores.columns, (weights @ scores.to_numpy()).T, strict=True))
    with np.errstate(invalid="ignore"):  # 0 / 0
        figures = {name: sums[part] / sums[whole] for name, (part, whole) in RATIOS.items()}
    figures["precision"] = np.nan_to_num(figures["precision"])
    median = weighted_median(scores["iou"].to_numpy(), weights * scores["with_truth"].to_numpy())
    return {"mean_iou": figures.pop("mean_iou"), "median_iou": median, **figures}


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of (n,) values that are repeated `weights` times, whole numbers (resamples, n); NaN without weight."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    total = reached[:, -1:]
    lower, upper = (np.argmax(reached > (total - odd) // 2, axis=1) for odd in (1, 0))
    return np.where(total[:, 0] > 0, (values[order][lower] + values[order][upper]) / 2, np.nan)


def summarize(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> dict[str, float | None]:
    """Every figure over the records of `evaluate_model`; None where it is not defined.

    `threshold` is the IoU from which on a pair of boxes counts as a hit, in precision, recall and F1. Raises
    ValueError when there is no record or the policy is unknown.
    """
    figures = compute_figures(score_pictures(records, threshold, policy), np.ones((1, len(records))))
    values = {name: none_if_nan(value[0]) for name, value in figures.items()}
    return values | compute_map(records, policy) | {"n": len(records)}


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


# %% [markdown]
# COCO's average precision ranks all predicted boxes by score. A model that writes text gives none, so the
# probabilities of its tokens have to do: the score of a box is the geometric mean over the tokens of its coordinates.
# Whether that number means anything is a question of its own, the *calibration*: among boxes with a score of about
# 0.8, are about 80 % right? For answers from elsewhere, without a `score`, every box counts as equally sure (1.0) and
# the order of the pictures decides the ranking.


# %%
#| export metrics
def to_coco(records: Sequence[dict], policy: str) -> tuple[dict, list[dict]]:
    """Records as a data set and a list of results in COCO's format, boxes `[x, y, width, height]` in pixels."""
    sides = [apply_policy(record, policy) for record in records]
    labels = sorted({thing["label"] for pair in sides for side in pair for thing in side})
    truth, found = [], []
    for number, pair in enumerate(sides, start=1):
        for things, target in zip(pair, (truth, found), strict=True):
            for thing in things:
                x1, y1, x2, y2 = thing["box"]
                size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                place = {"id": len(target) + 1, "image_id": number, "category_id": labels.index(thing["label"]) + 1}
                target.append(place | size | {"iscrowd": 0, "score": thing.get("score", 1.0)})
    dataset = {
        "images": [{"id": number} for number in range(1, len(sides) + 1)],
        "categories": [{"id": number, "name": label} for number, label in enumerate(labels, start=1)],
        "annotations": truth,
    }
    return dataset, found


def compute_map(records: Sequence[dict], policy: str = "merge") -> dict[str, float | None]:
    """COCO's average precision: `mAP` over IoU thresholds .50, .55 ... .95, `mAP50`, `mAP75`; None without true boxes.

    The mean is over labels that occur in the truth; at most 100 boxes of a picture and label count
    (cocodataset.org/#detection-eval).
    """
    precision = compute_precision(records, policy)
    if precision is None:
        return dict.fromkeys(["mAP", "mAP50", "mAP75"])
    return {"mAP": float(precision.mean()), "mAP50": float(precision[0].mean()), "mAP75": float(precision[5].mean())}


def compute_precision(records: Sequence[dict], policy: str = "merge") -> np.ndarray | None:
    """COCO's precision at (10 IoU thresholds, 101 recalls in 0..1, labels of the truth); None without true boxes."""
    dataset, found = to_coco(records, policy)
    if not dataset["annotations"]:
        return None
    truth = COCO(dataset)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # boxes of all sizes
    return precision[:, :, (precision > -1).all(axis=(0, 1))]  # -1: a label without true boxes


def collect_scores(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> tuple[np.ndarray, ...]:
    """Score of every predicted box, and whether it hit a true one; a box without a score is left out."""
    scores, hits = [], []
    for record in records:
        truth, prediction = apply_policy(record, policy)
        ious = compute_ious(truth, prediction)
        rows, columns = assign_boxes(ious, threshold)
        hit = {column for row, column in zip(rows, columns, strict=True) if ious[row, column] >= threshold}
        for column, thing in enumerate(prediction):
            if "score" in thing:
                scores.append(thing["score"])
                hits.append(column in hit)
    return np.array(scores, dtype=float), np.array(hits, dtype=bool)


def bin_scores(scores: np.ndarray, hits: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Boxes by score in bins of equal width: how many, their mean score, and the share of them that hit."""
    number = np.minimum((scores * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": number, "score": scores, "hit rate": hits})
    return table.groupby("bin").agg(boxes=("score", "size"), score=("score", "mean"), hits=("hit rate", "mean"))


def calibration_error(records: Sequence[dict], threshold: float = 0.5, policy: str = "merge") -> float | None:
    """Expected calibration error: mean distance of score and hit rate over ten bins; None without scored boxes.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 5.
    """
    scores, hits = collect_scores(records, threshold, policy)
    if not len(scores):
        return None
    table = bin_scores(scores, hits)
    return float(np.average((table.score - table.hits).abs(), weights=table.boxes))


def summarize_labels(records: Sequence[dict], threshold: float = 0.5) -> dict[str, dict[str, float | None]]:
    """The figures for every label of the truth, as if it were the only one; labels must agree.

    Rates over pictures are left out: whether a picture was answered at all is not a matter of one label.
    """
    labels = sorted({normalize_label(thing["label"]) for record in records for thing in record["truth"]})
    figures = {}
    for label in labels:
        alone = [
            {side: [thing for thing in record[side] if normalize_label(thing["label"]) == label]
             for side in ("truth", "prediction")} for record in records]  # fmt: skip
        values = summarize(alone, threshold)
        figures[label] = {name: values[name] for name in values if name not in ("detection_rate", "malformed_rate")}
        figures[label]["n"] = sum(len(record["truth"]) > 0 for record in alone)
    return figures


# %% [markdown]
# **Noise.** With a hundred pictures, a difference of two hundredths is often chance: other pictures from the same
# source would have given other figures. The bootstrap imitates this. It draws as many pictures as there are, with
# replacement, 2,000 times; the middle 95 % of the figures are the interval. Pictures of the same product (the same
# `group`, here the barcode) are not independent, so whole groups are drawn.
#
# Two models are compared on the *same* draws. What is hard in a draw is hard for both, so the interval of their
# difference is much narrower than the two intervals suggest. Only if it excludes 0 is one called better. Average
# precision has no interval: it takes too long to compute 2,000 times.


# %%
#| export metrics
LOWER_IS_BETTER = ("malformed_rate",)


def resample_weights(records: Sequence[dict], resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each picture is in each bootstrap resample, (resamples, pictures).

    Groups are drawn (records with the same `group`; a picture without one is its own), with replacement.
    """
    keys = [
        ("picture", n) if record.get("group") is None else ("group", record["group"])
        for n, record in enumerate(records)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    drawn = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    return drawn[:, [numbers[key] for key in keys]]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of bootstrap values; None where the figure is not defined."""
    defined = values[~np.isnan(values)]
    return tuple(map(float, np.quantile(defined, [0.025, 0.975]))) if len(defined) else None


def bootstrap_intervals(
    records: Sequence[dict], threshold: float = 0.5, policy: str = "merge", resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals (Efron, 1979) of all figures of `summarize` but average precision."""
    scores = score_pictures(records, threshold, policy)
    figures = compute_figures(scores, resample_weights(records, resamples, seed))
    return {name: percentile_interval(values) for name, values in figures.items()}


def align_records(records: Sequence[dict], like: Sequence[dict]) -> list[dict]:
    """`records` in the order of `like`, by `id`. Raises ValueError unless both hold the same pictures."""
    by_id = {record["id"]: record for record in records}
    wanted = [record["id"] for record in like]
    if len(by_id) != len(records) or len(set(wanted)) != len(wanted) or set(by_id) != set(wanted):
        raise ValueError(
            f"Not the same pictures ({len(records)} and {len(like)} records, {len(set(by_id) & set(wanted))} ids in "
            "common; no id may come twice): evaluate both models with the same EVAL_SPLIT, EVAL_SAMPLES and SEED."
        )
    return [by_id[id] for id in wanted]


def compare_recipes(
    records_a: Sequence[dict],
    records_b: Sequence[dict],
    metric: str = "mean_iou",
    threshold: float = 0.5,
    policy: str = "merge",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float | str | None]:
    """Paired bootstrap of `metric` (a figure of `bootstrap_intervals`) of a minus b, on the same pictures.

    Gives difference, low and high (95 %), and a verdict: "a is better", "b is better", or "no difference" unless
    the interval excludes 0. Raises ValueError if the pictures differ.
    """
    sides = [score_pictures(side, threshold, policy) for side in (records_a, align_records(records_b, records_a))]
    weights = np.vstack([np.ones((1, len(records_a))), resample_weights(records_a, resamples, seed)])
    difference = np.subtract(*(compute_figures(scores, weights)[metric] for scores in sides))
    low, high = percentile_interval(difference[1:]) or (None, None)
    return {
        "difference": none_if_nan(difference[0]),
        "low": low,
        "high": high,
        "verdict": {1: "a is better", -1: "b is better", 0: "no difference"}[better_side(difference[1:], metric)],
    }


def better_side(differences: np.ndarray, metric: str) -> int:
    """1 where bootstrap differences a - b say that a is better, -1 for b, 0 where their interval holds 0."""
    low, high = percentile_interval(differences) or (0, 0)
    sign = int(low > 0) - int(high < 0)
    return -sign if metric in LOWER_IS_BETTER else sign


def compare_table(
    records_by_name: dict[str, Sequence[dict]], threshold: float = 0.5, policy: str = "merge", seed: int = 0
) -> pd.DataFrame:
    """All figures of several models on the same pictures as text, `0.729 [0.68, 0.78]`, one row per model.

    "best" is added where the paired bootstrap finds a model better than each of the others; it is not corrected for
    the number of comparisons. Raises ValueError if the pictures differ.
    """
    first = next(iter(records_by_name.values()))
    aligned = {name: align_records(records, first) for name, records in records_by_name.items()}
    weights = resample_weights(first, seed=seed)
    draws = {name: compute_figures(score_pictures(side, threshold, policy), weights) for name, side in aligned.items()}
    rows = {}
    for name, side in aligned.items():
        others = [draws[other] for other in draws if other != name]
        rows[name] = {
            figure: describe_figure(value, figure, draws[name], others)
            for figure, value in summarize(side, threshold, policy).items()
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def describe_figure(value: float | None, figure: str, draws: dict, others: Sequence[dict]) -> str:
    """A figure, its interval if it was bootstrapped, and "best" if it is better than that of all others."""
    if value is None or figure == "n":
        return "n/a" if value is None else str(value)
    if figure not in draws:
        return f"{value:.3f}"
    low, high = percentile_interval(draws[figure])
    best = others and all(better_side(draws[figure] - other[figure], figure) == 1 for other in others)
    return f"{value:.3f} [{low:.2f}, {high:.2f}]" + (" best" if best else "")


# %% [markdown]
# A figure says how often a model fails, not how. Every predicted box is put into one of four drawers, after
# [TIDE](https://arxiv.org/abs/2008.08115): *correct*; *shifted*, an IoU from 0.1 up to the threshold; *duplicate*, on
# a table that another box has already hit; *background*, an IoU under 0.1. Tables with no correct or shifted box are
# *missed*; *malformed* counts the pieces of text that could not be read.


# %%
#| export metrics
ERROR_KINDS = ("correct", "shifted", "duplicate", "background", "missed", "malformed")
SHIFTED_IOU = 0.1  # a box with less overlap is not about that object; TIDE's value


def count_picture_errors(record: dict, threshold: float = 0.5, policy: str = "merge") -> dict[str, int]:
    """The predicted boxes, missed true boxes and unread pieces of one picture, counted by ERROR_KINDS.

    With the policy `multi-class` a box with the wrong label is background.
    """
    truth, prediction = apply_policy(record, policy)
    ious = compute_ious(truth, prediction)
    rows, columns = assign_boxes(ious, threshold)
    hit = ious[rows, columns] >= threshold
    rest = np.delete(ious, columns[hit], axis=1)
    best = rest.max(axis=0, initial=0)
    shifted = (best >= SHIFTED_IOU) & (best < threshold)
    reached = {*rows[hit], *rest[:, shifted].argmax(axis=0)} if truth else set()
    return {
        "correct": int(hit.sum()),
        "shifted": int(shifted.sum()),
        "duplicate": int((best >= threshold).sum()),
        "background": int((best < min(SHIFTED_IOU, threshold)).sum()),
        "missed": len(truth) - len(reached),
        "malformed": len(record.get("unread", [])),
    }


def count_errors(records: Iterable[dict], threshold: float = 0.5, policy: str = "merge") -> dict[str, int]:
    """Sums of `count_picture_errors` over records."""
    counts = [count_picture_errors(record, threshold, policy) for record in records]
    return {kind: sum(count[kind] for count in counts) for kind in ERROR_KINDS}


# %% [markdown]
# Now the loop over the pictures. What it keeps of each is enough to compute everything above again.


# %%
#| export evaluation
def evaluate_model(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    rows: Dataset,
    prompt: str,
    batch_size: int | None,
    max_new_tokens: int,
) -> list[dict]:
    """Ask the model about every row. One record per picture, in the order of the rows: see `to_record`.

    Pictures of like size share a batch; a `batch_size` of None takes what the memory allows; the next pictures are
    prepared while the model answers. `group` is the barcode. Raises ValueError for a model of an unknown family.
    """
    model.eval()
    family, budget = model.config.model_type, pixel_budget(processor)
    sizes = [resized_size(width, height, **budget) for width, height, _ in read_headers(rows)]
    order = sorted(range(len(rows)), key=lambda number: sizes[number][0] * sizes[number][1], reverse=True)
    batch_size = batch_size or choose_batch_size(model, max((w * h for w, h in sizes), default=0))
    ids, barcodes = list(rows["image_id"]), read_barcodes(rows)

    def prepare(number: int) -> tuple[int, tuple, dict[str, torch.Tensor]]:
        example = read_row(rows[number])
        question = to_question(example[0], processor, prompt)
        return number, example, question | {"pixel_values": question["pixel_values"].to(model.dtype)}

    prepared = prepare_ahead(prepare, order, ahead=2 * batch_size)
    records = {}
    with tqdm(total=len(rows), desc="evaluating", unit="picture", mininterval=1) as progress:
        while batch := list(itertools.islice(prepared, batch_size)):
            questions = to_batch_of_questions([question for *_, question in batch], processor.tokenizer.pad_token_id)
            answers = generate(model, processor.tokenizer, questions, max_new_tokens)
            for (number, example, _), answer in zip(batch, answers, strict=True):
                record = to_record(ids[number], example, answer.text, family, sizes[number], answer.score)
                records[number] = record | {"group": barcodes[number]}
            progress.update(len(batch))
    return [records[number] for number in range(len(rows))]


def prepare_ahead(function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`function(item)` for every item, in order; up to `ahead` are computed in threads before they are used."""
    workers = min(8, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 1
    with ThreadPoolExecutor(workers or 1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def choose_batch_size(model: PreTrainedModel, pixels: int) -> int:
    """How many pictures of `pixels` pixels the model can be asked about at once: 1 to 64 on a GPU, 32 on a CPU.

    An estimate from the model's shape, on four fifths of the memory that is free: per token the keys and values of all
    layers, and what the largest layers of both towers hold while the question is read.
    """
    if not torch.cuda.is_available():
        return 32
    text, vision = model.config.get_text_config(), model.config.vision_config
    keys = 2 * text.num_hidden_layers * text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layers = 6 * text.intermediate_size + 16 * vision.embed_dim * vision.mlp_ratio  # four patches make a token
    token_bytes = (keys + layers) * best_dtype().itemsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(min(64, max(1, 0.8 * free // (token_bytes * (pixels / 28**2 + 256)))))


def pixel_budget(processor: Qwen2VLProcessor) -> dict[str, int]:
    """The processor's settings as arguments of `resized_size`."""
    settings = processor.image_processor
    return {
        "factor": settings.patch_size * settings.merge_size,
        "min_pixels": settings.size["shortest_edge"],
        "max_pixels": settings.size["longest_edge"],
    }


def to_record(
    image_id: str,
    example: tuple[Image.Image, list, list[str]],
    answer: str,
    family: str,
    resized: tuple[int, int],
    score: Callable[[int, int], float] | None = None,
) -> dict:
    """What is kept of one picture, boxes `[x1, y1, x2, y2]` in pixels of the upright picture.

    id, width, height, resized (the size that the model saw), truth, prediction (label, box, and score if `score`
    tells it for a part of the answer), raw (the answer), unread (what of it could not be read), iou (mean over true
    boxes, one to one; None where there are none).
    """
    image, boxes, labels = example
    found = read_answer(answer, *image.size, family, resized, score)
    overlaps = match_boxes(boxes, [thing["box"] for thing in found["prediction"]])
    return {
        "id": image_id,
        "width": image.width,
        "height": image.height,
        "resized": list(resized),
        "truth": [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)],
        "raw": answer,
        "iou": float(np.mean(overlaps)) if overlaps else None,
    } | found


def read_answer(
    answer: str,
    width: int,
    height: int,
    family: str,
    resized: tuple[int, int] | None,
    score: Callable[[int, int], float] | None = None,
) -> dict[str, list]:
    """`prediction` (label, pixel box, score) and `unread` of an answer; a box outside the picture is unread."""
    parsed = parse_answer(answer)
    prediction, unread = [], [*parsed.unread]
    for (label, written), span in zip(parsed.objects, parsed.spans, strict=True):
        box = from_model_coordinates(written, width, height, family, resized)
        if has_area(box):
            prediction.append({"label": label, "box": box} | ({"score": score(*span)} if score else {}))
        else:
            unread.append(f"{label}{written}")
    return {"prediction": prediction, "unread": unread}


# %% [markdown]
# Every result goes to disk as soon as it is there: `predictions.jsonl` with one line per picture, `metrics.json` with
# the summary. A later question ("which pictures got worse?") is then a matter of reading files, not of a GPU.


# %%
#| export evaluation
def save_results(folder: Path, records: Sequence[dict]) -> dict:
    """Write `predictions.jsonl` and `metrics.json` (see `build_report`) into `folder`; returns the metrics."""
    metrics = build_report(records, threshold=0.5, policy="merge")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
    """Gather the figures of every `metrics.json` below `output_dir` in its `comparison.json`, `base` first."""
    files = sorted(output_dir.glob("*/metrics.json"), key=lambda file: (file.parent.name != "base", file.parent.name))
    comparison = {
        file.parent.name: {k: v for k, v in json.loads(file.read_text()).items() if not isinstance(v, dict | str)}
        for file in files
    }
    write_text(output_dir / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    return comparison


def write_text(file: Path, text: str) -> None:
    """Write through a temporary file: whoever is interrupted keeps the old file, never half of the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


# %% [markdown]
# The same measure for answers from elsewhere, such as another model's or another program's: as a command, `python -m
# helpers.evaluation --predictions FILE.jsonl`. Lines hold the picture's size, the raw answer and the truth;
# `predictions.jsonl` is such a file. The notebook itself does not call it.


# %%
#| export evaluation
LINE_FORMAT = (
    'a line is {"id": ..., "width": pixels, "height": pixels, "raw": "the answer", '
    '"truth": [{"label": ..., "box": [x1, y1, x2, y2] in pixels}, ...]}, with an empty list where there is nothing'
)


def read_predictions(path: Path, family: str) -> list[dict]:
    """The records of a JSON Lines file, their answers parsed anew. Blank lines are skipped.

    Raises OSError for a file that cannot be read, ValueError (naming the line) for one that holds something else.
    """
    lines = path.read_bytes().splitlines()
    records = [read_line(line, f"{path}, line {n}", family) for n, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise ValueError(f"{path} is empty: write one line per picture; {LINE_FORMAT}.")
    return records


def read_line(text: bytes, place: str, family: str) -> dict:
    """One line as a record; `place` is for the message. Raises ValueError."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {LINE_FORMAT}.") from error
    if problem := describe_line_problem(line):
        raise ValueError(f"{place}: {problem}; {LINE_FORMAT}.")
    resized = tuple(line["resized"]) if "resized" in line else None
    return line | read_answer(line["raw"], line["width"], line["height"], family, resized)


def describe_line_problem(line: object) -> str | None:
    """What is wrong with a line of predictions, or None."""
    if not isinstance(line, dict):
        return "not a JSON object"
    missing = [name for name in ("id", "width", "height", "raw", "truth") if name not in line]
    if missing:
        return f"no field {', '.join(missing)}"
    if not is_size([line["width"], line["height"]]) or not is_size(line.get("resized", [1, 1])):
        return "width, height (and resized, where given) must be whole numbers of pixels, at least 1"
    if not isinstance(line["raw"], str):
        return "raw must be a text"
    if not isinstance(line["truth"], list) or not all(map(is_labelled_box, line["truth"])):
        return "truth must be a list of labelled boxes with x1 < x2 and y1 < y2"
    return None


def is_size(value: object) -> bool:
    """Whether a JSON value is `[width, height]`."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v >= 1 for v in value)


def is_labelled_box(value: object) -> bool:
    """Whether a JSON value is `{"label": text, "box": [x1, y1, x2, y2]}` with an area."""
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return False
    box = value.get("box")
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    return is_box and has_area(box)


def build_report(records: Sequence[dict], threshold: float, policy: str) -> dict:
    """All figures, calibration, intervals, errors by kind; figures by label where labels count and there are many."""
    labels = summarize_labels(records, threshold) if policy == "multi-class" else {}
    return summarize(records, threshold, policy) | {
        "calibration_error": calibration_error(records, threshold, policy),
        "iou_threshold": threshold,
        "policy": policy,
        "intervals": bootstrap_intervals(records, threshold, policy),
        "errors": count_errors(records, threshold, policy),
        "labels": labels if len(labels) > 1 else {},
    }


def list_figures(report: dict) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval (empty where there is none) of every figure of a report, as text."""
    lines = []
    for name in [*report["intervals"], "mAP", "mAP50", "mAP75", "calibration_error"]:
        value, interval = report[name], report["intervals"].get(name)
        shown = "n/a" if value is None else f"{value:.3f}"
        lines.append((name, shown, "{:.3f}, {:.3f}".format(*interval) if interval else ""))
    return lines


def print_report(report: dict) -> None:
    """A report as tables for people."""
    for name, value, interval in list_figures(report):
        print(f"{name:<18}{value:>6}  {interval and f'[{interval}]'}".rstrip())
    print(f"{report['n']} pictures; hits from IoU {report['iou_threshold']} on; labels: {report['policy']}")
    print("boxes: " + ", ".join(f"{count} {kind}" for kind, count in report["errors"].items()))
    if report["labels"]:
        print(pd.DataFrame(report["labels"]).T.to_string(float_format="{:.3f}".format))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a file of answers: `python -m helpers.evaluation --predictions FILE.jsonl`. Exit code 2 on bad input."""
    parser = argparse.ArgumentParser(description="Measure predicted boxes against true ones.", epilog=LINE_FORMAT)
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU from which on a pair of boxes is a hit")
    parser.add_argument("--policy", choices=POLICIES, default="merge", help="which labels count, and whether they do")
    parser.add_argument("--family", choices=[*GRID_FAMILIES, *PIXEL_FAMILIES], default="qwen2_vl")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(arguments)
    if not 0 < options.iou <= 1:
        parser.error(f"--iou {options.iou} is not an IoU: give a number above 0, up to 1")
    try:
        records = read_predictions(options.predictions, options.family)
    except OSError as error:
        parser.error(f"{options.predictions} cannot be read ({error.strerror}): give --predictions an existing file")
    except ValueError as error:
        parser.error(str(error))
    report = build_report(records, options.iou, options.policy)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


# %% [markdown]
# First the base model, as loaded above: in 4 bits, like the models that are trained from it, so that the difference
# in the table is due to training alone. In brackets, the interval of 95 %.
#
# A zero-shot baseline measures the prompt as much as the model. Three wordings make it fair: the plain request, the
# one that states the format (it is what the fine-tuned models are trained with), and the request for all objects.

# %%
prompts = {
    "plain": PLAIN_PROMPT.format(label="nutrition table"),
    "with the format": question,
    "all objects": PROMPT.format(label="object"),
}
base_records = {
    kind: evaluate_model(model, processor, eval_rows, prompt, EVAL_BATCH_SIZE, MAX_NEW_TOKENS)
    for kind, prompt in prompts.items()
}
save_results(output_dir / "base", base_records["with the format"])
compare_table(base_records).T

# %%
pd.DataFrame({kind: count_errors(some) for kind, some in base_records.items()}).T

# %%
for kind, some in base_records.items():
    print(f"{kind}: {prompts[kind]}\n    -> {some[0]['raw']}")

# %% [markdown]
# In the run of this repository the base model writes well-formed boxes, of other things. That is where the training
# starts: it does not have to teach the format.
#
# What does quantisation cost before any training? Three ways to load the same model, asked the same two questions
# about the pictures that were held back. The IoU with the truth says little where the base model does not know the
# object, so the last column compares each model's answers about all objects with those of the model that is not
# quantised: 1 means that every box is the same.


# %%
#| export evaluation
def measure_agreement(records: Sequence[dict], reference: Sequence[dict]) -> float:
    """Mean IoU between the boxes of two models on the same pictures; 1 where both found nothing."""
    scores = []
    for record, other in zip(records, reference, strict=True):
        boxes, wanted = [[thing["box"] for thing in some["prediction"]] for some in (record, other)]
        scores.append(np.mean(match_boxes(wanted, boxes)) if wanted else float(not boxes))
    return float(np.mean(scores))


# %%
def ask_as_loaded(model: PreTrainedModel) -> dict:
    """Size of a model, its IoU on the held-back pictures, and its answers about all objects."""
    about_tables, about_all = [
        evaluate_model(model, processor, watch_rows, prompts[kind], EVAL_BATCH_SIZE, MAX_NEW_TOKENS)
        for kind in ("with the format", "all objects")
    ]
    megabytes = summarize_memory(model)["megabytes"].sum()
    return {"megabytes": megabytes, "mean_iou": summarize(about_tables)["mean_iou"], "about_all": about_all}


ablation = {"NF4, vision in 16 bits": ask_as_loaded(model)}
del model
release_memory()
for kind, quantized, kept_modules in [("NF4 everywhere", True, ["lm_head"]), ("not quantised", False, KEPT_MODULES)]:
    ablation[kind] = ask_as_loaded(load_model(MODEL_ID, quantized, best_dtype(), kept_modules))
    release_memory()
reference = ablation["not quantised"]["about_all"]
for line in ablation.values():
    line["agreement with not quantised"] = measure_agreement(line.pop("about_all"), reference)
pd.DataFrame(ablation).T.style.format({"megabytes": "{:,.1f}"}, precision=3)

# %% [markdown]
# In the run of this repository four bits move the boxes by about two percent of their overlap, and by seven if the
# vision tower is quantised as well, which in a large model would save little: the recipes keep vision in 16 bits.
#
# ## 10. Training
#
# TRL's `SFTTrainer` runs the loop. These settings are there because something else fails without an error:
#
# - `max_length=None`: the default of 1,024 tokens would cut picture tokens off.
# - `remove_unused_columns=False`, `skip_prepare_dataset`: the examples are built above; TRL is not to touch them.
# - trainable weights are cast to float32 after the trainer is built. TRL stores them in bfloat16, where a step of the
#   size of a usual learning rate is mostly rounded away. The forward pass still runs in 16 bits where there is a GPU.
# - the number of trainable parameters is asserted, and so is that they are where the recipe wants them.
# - several visible GPUs hold one model, layer by layer, or belong to the processes of `torchrun`. `DataParallel`,
#   which the Trainer would otherwise wrap around the model by itself, breaks both, so it is switched off by its own
#   number of GPUs.
# - bitsandbytes repacks 4-bit weights for speed at the first evaluation on some CPUs and cannot train them
#   afterwards; while training this is switched off.
#
# Checkpoints are written on the way, each with the IoU on the pictures held back, and the best one is kept. When a
# run was interrupted, running it again goes on from the last checkpoint; when it has ended they are deleted, because
# the result holds what matters.


# %%
#| export recipes
def create_training_config(
    variant: str,
    output_dir: Path,
    learning_rate: float,
    num_epochs: float,
    max_steps: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    gradient_checkpointing: bool,
    seed: int,
    report_to: str,
) -> SFTConfig:
    """TRL's settings for the run `variant`, which names its folder below `output_dir` and its curve in the tracker.

    Precision and the number of data loader workers follow from the hardware.
    """
    dtype = best_dtype()
    config = SFTConfig(
        output_dir=str(output_dir / variant),
        run_name=variant,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # under 1: a share of all steps
        num_train_epochs=num_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),  # else torchrun would not connect its processes on a CPU
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=min(8, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=0.25,  # under 1: a share of all steps
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=0.25,
        save_total_limit=1,  # the last one, besides the best one
        load_best_model_at_end=True,
        metric_for_best_model="selection",  # see IoUAtEvaluation
        greater_is_better=True,
        seed=seed,
        report_to=report_to,
        disable_tqdm=True,  # TrainingProgress takes its place
    )
    if config.n_gpu > 1:  # reading it sets it
        config._n_gpu = 1
    return config


# %% [markdown]
# Three callbacks tell what happens during the training. The second one also stops a run whose adapters get no
# gradient, which is how a wrong target, or a tower that was frozen by mistake, shows itself. What they report goes
# through the trainer's own log, and so to TensorBoard (`tensorboard --logdir OUTPUT_DIR`) or whatever `REPORT_TO`
# names.


# %%
#| export recipes
class TrainingProgress(TrainerCallback):
    """A bar with the latest loss that reads the same in notebooks, terminals and log files."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=5)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class GradientNorms(TrainerCallback):
    """Logs the gradient norm, after clipping, of each trained area. Raises RuntimeError when an area gets none."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step % args.logging_steps:
            return
        norms = gradient_norms(model)
        self.trainer.log({f"grad_norm_{area}": norm for area, norm in norms.items()})
        if 0.0 in norms.values():
            raise RuntimeError(f"Trained, but without any gradient: {norms}. Check freezing and LoRA targets.")


class IoUAtEvaluation(TrainerCallback):
    """Answers questions about a few pictures at every evaluation; their mean IoU chooses the checkpoint.

    Between checkpoints of the same IoU the loss decides.
    """

    def __init__(self, processor: Qwen2VLProcessor, rows: Dataset, prompt: str, batch_size: int | None):
        self.processor, self.rows, self.prompt, self.batch_size = processor, rows, prompt, batch_size

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        records = evaluate_model(model, self.processor, self.rows, self.prompt, self.batch_size, max_new_tokens=64)
        mean_iou = summarize(records)["mean_iou"]
        metrics["eval_selection"] = mean_iou - 1e-6 * metrics["eval_loss"]
        self.trainer.log({"eval_mean_iou": mean_iou})
        model.train()


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """L2 norm of the gradient of all trained parameters, by area."""
    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            area = area_of(name)
            squares[area] = squares.get(area, 0.0) + float(parameter.grad.float().pow(2).sum())
    return {area: square**0.5 for area, square in squares.items()}


# %% [markdown]
# `build_trainer` puts a recipe on a loaded model. What `freeze` and `LoRA` are to do is decided by the recipe;
# whether they did it is checked on the result.


# %%
#| export recipes
def build_trainer(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    recipe: TrainingRecipe,
    train_dataset: Dataset,
    watch_dataset: Dataset,
    config: SFTConfig,
    collator: AllTokensCollator | AssistantOnlyCollator,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """A trainer for what the recipe trains, in float32. Raises RuntimeError if it would train anything else."""
    apply_freeze_policy(model, recipe)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    if recipe.train_vision == "full":
        shrink_checkpoints(model)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=watch_dataset,
        data_collator=collator,
        processing_class=processor,
        peft_config=build_lora_config_for_recipe(recipe),
        callbacks=[TrainingProgress(), GradientNorms(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        callback.trainer = trainer
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    return trainer


def shrink_checkpoints(model: PreTrainedModel) -> None:
    """Save what is trained and nothing else, by its names in memory, by which the Trainer reads checkpoints back.

    By default a checkpoint holds all weights under the names of the hub, of which the Trainer recognises none.
    """
    model._keys_to_ignore_on_save = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)


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


def load_model_for_recipe(model_id: str, recipe: TrainingRecipe, checkpoint: Path | None = None) -> PreTrainedModel:
    """The model in the precision that the recipe trains it in, with the weights of `checkpoint` if there is one."""
    return load_model(str(checkpoint or model_id), recipe.quantized, best_dtype())


# %% [markdown]
# A finished run leaves what its recipe trained, in one of two forms that tell themselves apart by their files: an
# adapter (`adapter_config.json` names the base it belongs to) or a full checkpoint (`config.json` and all weights).
# With it go the processor, the training log, and in `recipe.json` how it was made.


# %%
#| export recipes
def run_recipe(
    recipe: TrainingRecipe,
    model_id: str,
    processor: Qwen2VLProcessor,
    train_dataset: Dataset,
    watch_dataset: Dataset,
    config: SFTConfig,
    collator: AllTokensCollator | AssistantOnlyCollator,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
) -> Path:
    """Train from `model_id`, or from the weights in `checkpoint`; returns the folder with the result.

    An interrupted run goes on from its last checkpoint. The model lives in this function only: when it returns, its
    memory can be released.
    """
    folder = Path(config.output_dir)
    model = load_model_for_recipe(model_id, recipe, checkpoint)
    trainer = build_trainer(model, processor, recipe, train_dataset, watch_dataset, config, collator, callbacks)
    interrupted = get_last_checkpoint(folder) if folder.is_dir() else None
    if interrupted:
        print(f"going on from {interrupted} (delete it to start again)")
    trainer.train(resume_from_checkpoint=interrupted)
    save_trained(trainer, recipe, str(checkpoint or model_id))
    trainer.accelerator.free_memory()
    return folder


def save_trained(trainer: SFTTrainer, recipe: TrainingRecipe, started_from: str) -> None:
    """Write weights, processor, log and provenance; checkpoints of the way are deleted."""
    folder = Path(trainer.args.output_dir)
    if recipe.train_vision == "full":
        trainer.model.to(best_dtype())  # trained in float32, used in what it was loaded in
        del trainer.model.save_pretrained  # from here on all weights, by the names that everyone expects
        trainer.model._keys_to_ignore_on_save = set()
    trainer.save_model()
    trainer.save_state()
    provenance = asdict(recipe) | {
        "started_from": started_from,
        "learning_rate": trainer.args.learning_rate,
        "steps": trainer.state.global_step,
    }
    trainer.accelerator.wait_for_everyone()  # under torchrun, others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        write_text(folder / "recipe.json", json.dumps(provenance, indent=2) + "\n")
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()  # the next stage reads what the first process wrote


def run_two_stage_recipe(
    recipe: TrainingRecipe,
    model_id: str,
    processor: Qwen2VLProcessor,
    train_dataset: Dataset,
    watch_dataset: Dataset,
    configs: Sequence[SFTConfig],
    collator: AllTokensCollator | AssistantOnlyCollator,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
) -> Path:
    """Train the recipe's two stages, the second from the weights of the first; returns the second one's folder.

    With `checkpoint`, a folder that holds a full checkpoint, the first stage is taken from there. Where the second
    stage was interrupted, the first one is there already.
    """
    first, second = get_recipes(recipe.stages)
    shared = (model_id, processor, train_dataset, watch_dataset)
    folders = [Path(config.output_dir) for config in configs]
    if folders[1].is_dir() and get_last_checkpoint(folders[1]) and (folders[0] / "recipe.json").exists():
        checkpoint = checkpoint or folders[0]
    if checkpoint is None:
        checkpoint = run_recipe(first, *shared, configs[0], collator, callbacks)
        release_memory()
    return run_recipe(second, *shared, configs[1], collator, callbacks, checkpoint)


# %%
training_settings = {
    "num_epochs": NUM_EPOCHS,
    "batch_size": BATCH_SIZE,
    "gradient_accumulation_steps": GRADIENT_ACCUMULATION_STEPS,
    "gradient_checkpointing": GRADIENT_CHECKPOINTING,
    "seed": SEED,
    "report_to": REPORT_TO,
}
watch_dataset = to_training_dataset(watch_rows, question, flip_probability=0.0)


def learning_rate_of(recipe: TrainingRecipe) -> float:
    """The recipe's own learning rate, unless LEARNING_RATES names another."""
    return LEARNING_RATES.get(recipe.name, recipe.learning_rate)


def watch() -> list[TrainerCallback]:
    """What is reported at each evaluation during training."""
    return [IoUAtEvaluation(processor, watch_rows, question, EVAL_BATCH_SIZE)]


# %% [markdown]
# ## 11. Experiment: what should the loss look at?
#
# Two runs of `r1-llm-only` that differ in the collator alone: same steps, same seed, same pictures in the same order.
# The losses are averages over different tokens, so their curves cannot be compared with each other; the IoU on the
# pictures held back, and on the evaluation split at the end, can.


# %%
#| export loading
def load_trained_model(folder: Path, quantized: bool | None = None) -> PreTrainedModel:
    """A full checkpoint, or an adapter on its base, whose precision `quantized` can override.

    Which of the two it is shows by the files in `folder`. An adapter computes in the precision of its base, as it did
    in training; its weights come in float32, which would be slower on a GPU.
    """
    recipe = json.loads((folder / "recipe.json").read_text())
    quantized = recipe["quantized"] if quantized is None else quantized
    if not (folder / "adapter_config.json").exists():
        return load_model(str(folder), quantized, best_dtype()).eval()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(load_model(base, quantized, best_dtype()), str(folder))
    return adapted.to(best_dtype()).eval()


# %%
#| export evaluation
def load_and_evaluate_demo(
    folder: Path,
    processor: Qwen2VLProcessor,
    rows: Dataset,
    prompt: str,
    batch_size: int | None,
    max_new_tokens: int,
) -> dict[str, float] | None:
    """Evaluate what a recipe left in `folder` and write the results there; None, and a line, if nothing is there."""
    if not (folder / "recipe.json").exists():
        print(f"{folder.name}: skipped, {folder} holds no trained model")
        return None
    records = evaluate_model(load_trained_model(folder), processor, rows, prompt, batch_size, max_new_tokens)
    return save_results(folder, records)


def load_records(folder: Path) -> list[dict]:
    """The lines of a `predictions.jsonl`."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# %%
#| export metrics
def describe_difference(records: Sequence[dict], others: Sequence[dict]) -> str:
    """How much better `others` are than `records` on the same pictures, and whether that is more than noise."""
    result = compare_recipes(others, records)
    verdict = {"a is better": "better", "b is better": "worse"}.get(result["verdict"], "no difference seen")
    return f"{result['difference']:+.3f} [{result['low']:+.3f}, {result['high']:+.3f}] mean IoU: {verdict}"


# %%
def compare_collators() -> None:
    """Train and evaluate one model per collator, with all else equal."""
    recipe = RECIPES["r1-llm-only"]
    steps = min(COLLATOR_STEPS, MAX_STEPS) if MAX_STEPS > 0 else COLLATOR_STEPS
    for variant, collator in COLLATORS.items():
        config = create_training_config(
            variant, output_dir / "collators", learning_rate_of(recipe), max_steps=steps, **training_settings
        )
        folder = run_recipe(
            recipe, MODEL_ID, processor, train_dataset, watch_dataset, config, collator(processor), watch()
        )
        release_memory()
        load_and_evaluate_demo(folder, processor, eval_rows, question, EVAL_BATCH_SIZE, MAX_NEW_TOKENS)
        release_memory()


if COLLATOR_STEPS:
    compare_collators()


# %%
#| export figures
def read_log(folder: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged number, from the `trainer_state.json` in `folder`."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def plot_training(folders: Iterable[Path]) -> plt.Figure:
    """Loss and IoU on the pictures held back, over optimiser steps; one line per run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for folder in folders:
        style = {"label": folder.name, "color": MODEL_COLOURS.get(folder.name)}
        left.plot(*read_log(folder, "loss"), **style)
        right.plot(*read_log(folder, "eval_mean_iou"), marker="o", **style)
    left.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title="Training loss")
    right.set(xlabel="optimiser step", ylabel="mean IoU", title="IoU on the pictures held back", ylim=(0, 1))
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    return figure


# %%
if COLLATOR_STEPS:
    plot_training([output_dir / "collators" / variant for variant in COLLATORS])
    plt.show()

# %%
by_collator = {variant: load_records(output_dir / "collators" / variant) for variant in COLLATORS if COLLATOR_STEPS}
if by_collator:
    print("v2-assistant-only against v1-all-tokens:", describe_difference(*by_collator.values()))
compare_table(by_collator).T if by_collator else "COLLATOR_STEPS is 0: left out"

# %% [markdown]
# In the run of this repository v2 is ahead by more than the noise. The question is the same in every picture, so what
# v1 learns from it is to recite it, and in so few steps that takes the larger part of the gradient. It is one run
# with one seed, and a longer one may close the gap; nothing speaks for v1, and the recipes use
# `AssistantOnlyCollator`.

# %% [markdown]
# ## 12. The four recipes
#
# Each recipe starts from the base as published, in a function of its own, so that nothing of one can leak into the
# next. The lines before and after show the memory that is held: on a GPU what its tensors take, on a CPU what the
# whole process takes.
#
# The first stage of `r3-two-stage` is `r2-vision-only`, with the same data, steps and seed. Where r2 was trained in
# this run, r3 starts from its weights; otherwise it trains them itself, into `r3-two-stage/stage1`.


# %%
def config_for(variant: str, recipe: TrainingRecipe, folder: Path = output_dir) -> SFTConfig:
    """The notebook's settings for one run."""
    return create_training_config(variant, folder, learning_rate_of(recipe), max_steps=MAX_STEPS, **training_settings)


def train(recipe: TrainingRecipe) -> Path:
    """Train one recipe of the catalogue, in one stage or two."""
    collator = AssistantOnlyCollator(processor)
    shared = (MODEL_ID, processor, train_dataset, watch_dataset)
    if not recipe.stages:
        return run_recipe(recipe, *shared, config_for(recipe.name, recipe), collator, watch())
    first, second = get_recipes(recipe.stages)
    configs = [config_for("stage1", first, output_dir / recipe.name), config_for(recipe.name, second)]
    trained_here = recipes[: recipes.index(recipe)]
    checkpoint = output_dir / first.name if first in trained_here else None
    return run_two_stage_recipe(recipe, *shared, configs, collator, watch(), checkpoint)


held = {}
for recipe in recipes:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before, started = allocated_megabytes(), time.perf_counter()
    print(f"{recipe.name}: {recipe.description}")
    train(recipe)
    release_memory()
    held[recipe.name] = {
        "before (MB)": before,
        "after (MB)": allocated_megabytes(),
        "minutes": (time.perf_counter() - started) / 60,
    }
    if torch.cuda.is_available():
        held[recipe.name]["peak (MB)"] = torch.cuda.max_memory_allocated() / 1e6
pd.DataFrame(held).T.style.format("{:,.1f}")

# %%
plot_training([output_dir / recipe.name for recipe in recipes])
plt.show()


# %% [markdown]
# The norm of the gradient tells which part of the model is being moved. A tower that is trained and shows nothing
# here would not be learning.


# %%
#| export figures
def plot_gradient_norms(folders: Sequence[Path]) -> plt.Figure:
    """Gradient norm (after clipping at 1) of the two towers over optimiser steps, one line per run."""
    figure, grid = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    for axes, (area, title) in zip(grid, {"visual": "Vision tower", "language_model": "Language model"}.items(),
                                   strict=True):  # fmt: skip
        for folder in folders:
            steps, norms = read_log(folder, f"grad_norm_{area}")
            if steps:
                axes.plot(steps, norms, label=folder.name, color=MODEL_COLOURS.get(folder.name))
        axes.set(title=title, xlabel="optimiser step", ylabel="gradient norm, clipped at 1", ylim=(0, 1.3))
        axes.legend(loc="upper center", ncols=3, frameon=False)
    return figure


# %%
plot_gradient_norms([output_dir / recipe.name for recipe in recipes])
plt.show()

# %% [markdown]
# ## 13. Before and after
#
# What was trained is loaded anew from disk and evaluated: a result that only exists in memory is worth nothing. All
# recipes of the catalogue are looked for, also those of an earlier run into the same folder; what is not there is
# named. `n` is the number of pictures.

# %%
for name in RECIPES:
    load_and_evaluate_demo(output_dir / name, processor, eval_rows, question, EVAL_BATCH_SIZE, MAX_NEW_TOKENS)
    release_memory()
comparison = save_comparison(output_dir)
records_by_name = {name: load_records(output_dir / name) for name in comparison}
compare_table(records_by_name).T

# %% [markdown]
# In brackets the interval of 95 %; "best" stands only where the pictures in pairs support it against every other
# model. How the boxes fail differs more than how often:

# %%
pd.DataFrame({name: count_errors(some) for name, some in records_by_name.items()}).T


# %%
#| export figures
def plot_comparison(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Mean IoU as bars with 95 % intervals, and the share of pictures with at least a given IoU as lines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for number, (name, records) in enumerate(records_by_name.items()):
        ious = np.sort([record["iou"] for record in records])[::-1]
        mean, (low, high) = ious.mean(), bootstrap_intervals(records)["mean_iou"]
        colour = MODEL_COLOURS.get(name)
        left.bar(name, mean, yerr=[[max(0, mean - low)], [max(0, high - mean)]], capsize=4, color=colour)
        left.text(number, high + 0.02, f"{mean:.2f}", ha="center", fontweight="bold")
        right.step(ious, np.arange(1, len(ious) + 1) / len(ious), label=name, where="post", color=colour)
    left.set(ylabel="mean IoU, interval of 95 %", ylim=(0, 1), title="Mean IoU")
    left.tick_params(axis="x", labelsize=8)
    right.set(xlabel="IoU", ylabel="share of pictures with at least this IoU", xlim=(0, 1), ylim=(0, 1.02))
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    return figure


def plot_against(records: dict[str, Sequence[dict]], reference: str) -> plt.Figure:
    """IoU of each picture under every other model against its IoU under `reference`; above the line is better."""
    others = [name for name in records if name != reference]
    figure, grid = plt.subplots(1, len(others), figsize=(3.2 * len(others), 3.4), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, others, strict=True):
        pairs = [[record["iou"] for record in records[model]] for model in (reference, name)]
        axes.scatter(*pairs, s=14, alpha=0.5, linewidths=0, color=BAR_COLOUR)
        axes.plot([0, 1], [0, 1], color="grey", lw=1)
        axes.set(xlabel=f"IoU, {reference}", ylabel=f"IoU, {name}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
    return figure


# %%
plot_comparison(records_by_name)
plt.show()

# %% [markdown]
# How sure is the model of its boxes, and is it right when it is sure? From the left: the precision among the surest
# boxes, as more and more of the tables are found; the IoU of the pictures; the score of the boxes against the share
# of them that hit (on the diagonal, a score of 0.8 means right in 80 of 100 cases; the calibration error is the mean
# distance from it); and how the boxes failed.


# %%
#| export figures
def plot_card(records: Sequence[dict], title: str) -> plt.Figure:
    """Precision-recall curves, IoU histogram, reliability diagram and kinds of error of one model."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
    plot_precision_recall(axes[0], records)
    axes[1].hist([record["iou"] for record in records], bins=np.linspace(0, 1, 21), color=BAR_COLOUR)
    axes[1].set(title="IoU of the pictures", xlabel="IoU", ylabel="pictures", xlim=(0, 1))
    plot_reliability(axes[2], records)
    errors = count_errors(records)
    bars = axes[3].barh(list(errors), list(errors.values()), color=BAR_COLOUR)
    axes[3].bar_label(bars, padding=2)
    axes[3].invert_yaxis()
    axes[3].margins(x=0.15)
    axes[3].set(title="Boxes by kind", xlabel="boxes")
    figure.suptitle(title)
    return figure


def plot_precision_recall(axes: plt.Axes, records: Sequence[dict]) -> None:
    """COCO's precision-recall curves for an IoU of 0.5 and of 0.75."""
    precision = compute_precision(records)
    for index, threshold in ((0, 0.5), (5, 0.75)) if precision is not None else ():
        axes.plot(np.linspace(0, 1, 101), precision[index].mean(axis=1), label=f"IoU {threshold}")
    axes.set(title="Precision and recall", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower left")


def plot_reliability(axes: plt.Axes, records: Sequence[dict]) -> None:
    """Share of hits against the score, in ten bins; the size of a point tells how many boxes there are."""
    table = bin_scores(*collect_scores(records))
    axes.plot([0, 1], [0, 1], color="grey", lw=1)
    axes.scatter(table.score, table.hits, s=300 * table.boxes / max(1, table.boxes.sum()) + 10, color=BAR_COLOUR)
    error = calibration_error(records)
    title = "Reliability" if error is None else f"Reliability: error {error:.2f}"
    axes.set(title=title, xlabel="score", ylabel="share of hits", xlim=(0, 1), ylim=(0, 1.02))


# %%
trained = {name: some for name, some in records_by_name.items() if name != "base"}
best = max(trained, key=lambda name: comparison[name]["mean_iou"])
plot_card(trained[best], title=best)
plt.show()

# %% [markdown]
# In the run of this repository the scores are too low rather than too high: the last digit of a coordinate is a
# matter of chance even when the box is right, and it counts as much as the first. They rank the boxes well all the
# same: the precision falls only where the last tables are found.
#
# One point per picture: do the recipes fail on the same pictures?

# %%
if len(trained) > 1:
    plot_against(trained, reference=next(iter(trained)))
    plt.show()

# %% [markdown]
# Numbers hide how a model fails. The upper row shows the four worst pictures of the best recipe, the lower row four
# from the middle.

# %%
records = trained[best]
worst, others = np.split(np.argsort([record["iou"] for record in records]), [4])
middle = max(0, len(others) // 2 - 2)
chosen = [int(i) for i in [*worst, *others[middle : middle + 4]]]
show_pictures(
    [read_row(eval_rows[i])[0] for i in chosen],
    [[thing["box"] for thing in records[i]["truth"]] for i in chosen],
    [[thing["box"] for thing in records[i]["prediction"]] for i in chosen],
    titles=[f"{best}, {records[i]['id']}: IoU {records[i]['iou']:.2f}" for i in chosen],
)
plt.savefig(output_dir / "predictions.png", dpi=120)
plt.show()

# %% [markdown]
# The same for every model goes to disk as an evaluation card: `card.md` with all figures and their intervals, and the
# pictures that it shows.


# %%
#| export card
def write_card(folder: Path, records: Sequence[dict], rows: Dataset) -> None:
    """Write `card.md`, `figures.png` and `worst.png` into `folder`, about the records of `rows`, in their order."""
    plot_card(records, folder.name).savefig(folder / "figures.png", dpi=100)
    worst = [int(number) for number in np.argsort([record["iou"] for record in records])[:8]]
    show_pictures(
        [read_row(rows[number])[0] for number in worst],
        [[thing["box"] for thing in records[number]["truth"]] for number in worst],
        [[thing["box"] for thing in records[number]["prediction"]] for number in worst],
        titles=[f"{records[number]['id']}: IoU {records[number]['iou']:.2f}" for number in worst],
    ).savefig(folder / "worst.png", dpi=100)
    plt.close("all")
    write_text(folder / "card.md", describe_card(folder.name, build_report(records, threshold=0.5, policy="merge")))


def describe_card(name: str, report: dict) -> str:
    """The text of an evaluation card from `build_report`."""
    lines = [f"# {name}", "", f"{report['n']} pictures, hits from IoU {report['iou_threshold']} on.", ""]
    lines += ["| figure | value | 95 % interval |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(figure) + " |" for figure in list_figures(report)]
    lines += ["", "Boxes: " + ", ".join(f"{count} {kind}" for kind, count in report["errors"].items()) + ".", ""]
    lines += ["![Precision and recall, IoU, reliability, errors](figures.png)", "", "The worst pictures:", ""]
    return "\n".join([*lines, "![Worst pictures: truth dashed, prediction solid](worst.png)", ""])


# %%
for name, some in records_by_name.items():
    write_card(output_dir / name, some, eval_rows)
print((output_dir / best / "card.md").read_text())

# %% [markdown]
# What may be concluded? Two recipes are compared on the same pictures, so what counts is the difference picture by
# picture: a difference whose interval holds 0 is within the noise, however the table is sorted.


# %%
questions_asked = {
    "Does any training help? (base -> r1)": ("base", "r1-llm-only"),
    "Is seeing worth more than writing? (r1 -> r2)": ("r1-llm-only", "r2-vision-only"),
    "Two stages instead of one? (r1 -> r3)": ("r1-llm-only", "r3-two-stage"),
    "Both towers at once? (r1 -> r4)": ("r1-llm-only", "r4-joint"),
    "At once, or in stages? (r3 -> r4)": ("r3-two-stage", "r4-joint"),
}
for asked, (one, other) in questions_asked.items():
    if {one, other} <= set(records_by_name):
        print(f"{asked}: {describe_difference(records_by_name[one], records_by_name[other])}")

# %% [markdown]
# In the run of this repository every recipe helps, and those that train the vision tower are ahead of the one that
# does not. Among the three of them the intervals decide, not the order in the table.
#
# ## 14. Deployment
#
# An adapter needs its base and PEFT at run time. Merging adds its product to the weights of the base, and leaves an
# ordinary checkpoint that every server reads. Three rules keep the merged model the model that was measured: merge
# into the base in 16 bits, never into 4-bit weights, which would round the change away; save, and load what was
# saved; measure again. The notebook stops here if the merged model is off by more than 0.01 mean IoU.


# %%
#| export deployment
def save_merged(model: PreTrainedModel | PeftModel, target: Path, processor: Qwen2VLProcessor) -> None:
    """Write a model without its adapters, if it has any, and its processor into `target`. Not for 4-bit bases."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    model.save_pretrained(target)
    processor.save_pretrained(target)


# %%
def evaluate_folder(model: PreTrainedModel) -> list[dict]:
    """Ask a model about the evaluation split."""
    return evaluate_model(model, processor, eval_rows, question, EVAL_BATCH_SIZE, MAX_NEW_TOKENS)


merged_dir = output_dir / "merged"
unmerged = load_trained_model(output_dir / best, quantized=False)
unmerged_records = evaluate_folder(unmerged)
save_merged(unmerged, merged_dir, processor)
del unmerged
release_memory()
merged = load_model(str(merged_dir), quantized=False, dtype=best_dtype()).eval()
merged_records = evaluate_folder(merged)
versions = {
    f"{best}, as trained": trained[best],
    f"{best}, base not quantised": unmerged_records,
    "merged, saved, loaded": merged_records,
}
compare_table(versions)[["mean_iou", "iou_gt_0.5", "f1", "n"]]

# %%
difference = abs(summarize(merged_records)["mean_iou"] - summarize(unmerged_records)["mean_iou"])
assert difference <= 0.01, f"merging changed the model: mean IoU differs by {difference:.3f}"
print(f"merged against adapter on the same base: mean IoU differs by {difference:.4f}")

# %% [markdown]
# One call for one picture:


# %%
#| export deployment
def detect(
    image: Image.Image, model: PreTrainedModel, processor: Qwen2VLProcessor, prompt: str, max_new_tokens: int = 256
) -> list[dict]:
    """The objects in one picture: `{"label", "box", "score"}`, boxes in pixels of the upright picture."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    answer = generate(model, processor.tokenizer, to_questions([upright], processor, prompt), max_new_tokens)[0]
    resized = resized_size(*upright.size, **pixel_budget(processor))
    return read_answer(answer.text, *upright.size, model.config.model_type, resized, answer.score)["prediction"]


# %%
image = eval_rows[0]["image"]
found = detect(image, merged, processor, question)
print(found)
titles = [", ".join(f"{thing['label']}, score {thing['score']:.2f}" for thing in found)]
show_pictures([image], [read_row(eval_rows[0])[1]], [[thing["box"] for thing in found]], titles, columns=1)
plt.show()
del merged
release_memory()

# %% [markdown]
# A model without its prompt and pixel budget is not the model that was measured, so the card says both. It is written
# beside the merged weights; `PUSH_TO_HUB` uploads the folder (log in first with `hf auth login`).


# %%
#| export deployment
MODEL_CARD = """{metadata}
# {base}, fine-tuned for object detection on {dataset}

Trained with the recipe `{recipe}` ({description}). Ask it with the system message

> {system}

and, after the picture, with the prompt

> {prompt}

It answers with boxes as `label(x1,y1),(x2,y2)` on a grid from 0 to 1000 in both directions. Pictures are turned
upright (EXIF) and resized to at most {max_pixels:,} pixels, as the processor in this folder does by itself.

| metric | value |
| --- | --- |
{metrics}

Measured on {n} pictures of the evaluation split, merged weights, greedy answers.
"""


def write_model_card(
    folder: Path, base: str, dataset: str, recipe: TrainingRecipe, prompt: str, max_pixels: int, metrics: dict
) -> None:
    """Write `README.md` with metadata that the hub reads, prompt, pixel budget and metrics."""
    data = ModelCardData(
        base_model=base,
        datasets=[dataset],
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["object-detection", "trl"],
        model_name=folder.name,
        eval_results=[
            EvalResult(
                task_type="object-detection",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="mean_iou",
                metric_value=round(metrics["mean_iou"], 3),
            )
        ],
    )
    text = MODEL_CARD.format(
        metadata=f"---\n{data.to_yaml()}\n---\n",
        base=base,
        dataset=dataset,
        recipe=recipe.name,
        description=recipe.description,
        system=SYSTEM_MESSAGE,
        prompt=prompt,
        max_pixels=max_pixels,
        metrics="\n".join(
            f"| {name} | {value:.3f} |" for name, value in metrics.items() if name != "n" and value is not None
        ),
        n=metrics["n"],
    )
    ModelCard(text).save(folder / "README.md")


# %%
write_model_card(
    merged_dir, MODEL_ID, DATASET_ID, RECIPES[best], question, processor.image_processor.size["longest_edge"],
    summarize(merged_records),
)  # fmt: skip
if PUSH_TO_HUB:
    HfApi().create_repo(PUSH_TO_HUB, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=PUSH_TO_HUB, folder_path=merged_dir)
print((merged_dir / "README.md").read_text())

# %% [markdown]
# The merged folder is an ordinary checkpoint, so a server that knows Qwen2-VL serves it, for example
#
# ```text
# vllm serve OUTPUT_DIR/merged --limit-mm-per-prompt '{"image": 1}'
# ```
#
# Three things have to travel with the request: the system message, the prompt, and upright pictures; and
# `skip_special_tokens` has to be false if the labels are to keep their marks (the parser reads both). Measure once
# more through the server, with the same pictures: `python -m helpers.evaluation --predictions FILE.jsonl` takes its
# raw answers.
