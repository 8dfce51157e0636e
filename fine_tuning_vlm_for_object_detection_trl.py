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
# does, teaches it with a few hundred labelled pictures, and measures again, on pictures it has not seen.
#
# Everything needed is defined here, in the order in which it is used. The road of one picture:
#
# ```text
# dataset row                        image + boxes [y_min, x_min, y_max, x_max] in 0..1
#   -> upright RGB picture           + boxes [x1, y1, x2, y2] in pixels
#   -> conversation                  system, user (picture, question), assistant (boxes on a 0..1000 grid, as text)
#   -> collator                      token ids, image patches, labels (-100 where the loss does not look)
#   -> SFTTrainer                    an adapter on disk
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
import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

# when imported on a CPU it asks for an optional package that would download kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from faster_coco_eval import COCO, COCOeval_faster
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from peft import LoraConfig, PeftModel
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou
from tqdm import tqdm
from transformers import (
    BitsAndBytesConfig,
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
# MAX_STEPS 50`). The defaults are the real thing: the 7B model, the Open Food Facts dataset, all pictures, a GPU with
# 24 GB. `MODEL_ID` and `DATASET_ID` take a hub id or a local folder.

# %% tags=["parameters"]
MODEL_ID = "Qwen/Qwen2-VL-7B-Instruct"  # hub id or folder
DATASET_ID = "openfoodfacts/nutrition-table-detection"  # hub id or folder
TRAIN_SPLIT = "train"
EVAL_SPLIT = "val"
OUTPUT_DIR = "outputs/qwen2-vl-7b"
RECIPES = ["r1-llm-only"]  # what to train, in this order
NUM_EPOCHS = 3
MAX_STEPS = -1  # optimiser steps; -1: NUM_EPOCHS decides
TRAIN_SAMPLES = None  # None: all pictures of the split
EVAL_SAMPLES = None  # None: all pictures of the split
MAX_PIXELS = 1280 * 28 * 28  # a picture costs at most this many pixels, 28 * 28 of them make one token
BATCH_SIZE = 2
GRADIENT_ACCUMULATION_STEPS = 8
GRADIENT_CHECKPOINTING = True  # less memory for a quarter more time
LEARNING_RATE = None  # None: the recipe's own
FLIP_PROBABILITY = (
    0.0  # mirror training pictures with their boxes; mirrored letters are a price worth paying on few data
)
EVAL_BATCH_SIZE = 16
MAX_NEW_TOKENS = 128  # one box takes 23 tokens
SEED = 42
REPORT_TO = "tensorboard"  # or "wandb", "trackio", "none"

# %%
RECIPES_TO_RUN = list(RECIPES)  # below, RECIPES becomes the catalogue that these names are looked up in

# %% [markdown]
# A **recipe** says which weights are trained and how. The first one is QLoRA on the language model: its linear layers
# are stored in 4 bits and stay as they are, a pair of thin matrices beside each of them is trained, and the vision
# tower is left alone.
#
# The names of the layers are matched with a regular expression on the full path. A plain list such as `["q_proj",
# "proj"]` would also match `attn.proj` in the vision tower.


# %%
#| export recipes
LLM_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class TrainingRecipe:
    """One way to fine-tune: which weights, in which precision, how fast."""

    name: str
    description: str
    quantized: bool  # language model in 4-bit NF4
    lora_target_modules: str  # regular expression on module paths
    lora_rank: int = 64
    lora_alpha: int = 128
    learning_rate: float = 1e-4  # peak; TRL's default for full fine-tuning (2e-5) is too slow for LoRA


RECIPES = {
    recipe.name: recipe
    for recipe in [
        TrainingRecipe(
            name="r1-llm-only",
            description="QLoRA on the language model, vision tower frozen",
            quantized=True,
            lora_target_modules=LLM_LAYERS,
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
        image = Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"]))
        image.draft("RGB", (256, 256))  # a JPEG is read to its end, but unpacked at a fraction of its size: faster
        image.load()
    except UnidentifiedImageError:
        return "picture cannot be decoded (not a picture, or of an unknown format)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"picture cannot be decoded ({error})"
    return None


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
train_rows = drop_bad_rows(load_rows(DATASET_ID, TRAIN_SPLIT, TRAIN_SAMPLES, SEED))
eval_rows = drop_bad_rows(load_rows(DATASET_ID, EVAL_SPLIT, EVAL_SAMPLES, SEED))
train_rows

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
    figure, grid = plt.subplots(lines, columns, figsize=size, dpi=80, squeeze=False, layout="constrained")
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
# Most pictures hold one table, which fills anything from a corner to the whole frame. A detector that always answered
# with the same box in the middle would be right now and then; the distribution tells how often.

# %%
table_areas = [
    (y_max - y_min) * (x_max - x_min)
    for objects in train_rows["objects"]
    for y_min, x_min, y_max, x_max in objects["bbox"]
]
tables_per_picture = pd.Series([len(objects["bbox"]) for objects in train_rows["objects"]]).value_counts().sort_index()
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.hist(table_areas, bins=np.linspace(0, 1, 21), color="#4575b4")
left.set(xlabel="box area / picture area", ylabel="boxes", title="Size of the tables")
right.bar(tables_per_picture.index.astype(str), tables_per_picture, color="#4575b4")
right.bar_label(right.containers[0])
right.set(xlabel="tables in a picture", ylabel="pictures", title="Tables per picture")
plt.show()

# %% [markdown]
# ## 3. Boxes as text
#
# Qwen2-VL was trained to write a box as two corners on a grid of 0 to 1000 in both directions, whatever the size of
# the picture: `(x1,y1),(x2,y2)`. Qwen3-VL does the same, but Qwen2.5-VL, between the two, writes pixels of the picture
# as its processor resized it. A box read in the wrong convention is not an error, it is only somewhere else. So the
# convention is looked up by the model's own `config.model_type`, a family that is not listed is refused, and pixels
# become model coordinates here, and model coordinates pixels; nowhere else.
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
# ## 5. What the loss looks at: the collator
#
# A collator turns a list of conversations into one batch. Its labels decide what is learned: position *i* of `labels`
# is the token the model should have written there, and -100 means "do not care". The system message, the question and
# the picture are given, not written, so only the assistant's answer counts. The `<|im_end|>` that closes the answer
# counts too: a model that never learns to stop goes on writing boxes.
#
# TRL's option `completion_only_loss` does nothing when a custom collator is passed; the masking below is all there
# is.


# %%
#| export collators
@dataclass(frozen=True)
class AssistantOnlyCollator:
    """Batch `{"image", "messages"}` examples; labels are the assistant's answers with their end-of-turn token."""

    processor: Qwen2VLProcessor

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Processor tensors plus `labels` of the shape of `input_ids` (batch, tokens)."""
        texts = [self.processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [[example["image"]] for example in examples]
        batch = self.processor(text=texts, images=images, padding=True, pad_to_multiple_of=8, return_tensors="pt")
        trained = find_assistant_tokens(batch["input_ids"], self.processor.tokenizer)
        batch["labels"] = batch["input_ids"].masked_fill(~trained, -100)
        return dict(batch)


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


# %%
def show_trained_tokens(batch: dict[str, torch.Tensor], row: int = 0) -> None:
    """Print one row of a batch twice: what the model is given, and what it is trained to write."""
    given = batch["input_ids"][row][(batch["labels"][row] == -100) & batch["attention_mask"][row].bool()]
    text = processor.decode(given)
    print("GIVEN  ", re.sub(r"(<\|image_pad\|>)+", lambda m: f"<|image_pad|> x {m[0].count('image')}", text))
    print("TRAINED", processor.decode(batch["labels"][row][batch["labels"][row] != -100]))


collator = AssistantOnlyCollator(processor)
show_trained_tokens(collator([{"image": image, "messages": to_conversation(question, answer)}]))

# %% [markdown]
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
batch = collator([train_dataset[index] for index in range(min(4, len(train_dataset)))])
trained_tokens = (batch["labels"] != -100).sum(dim=1)
print(f"{batch['input_ids'].shape[1]} tokens a row, trained: {trained_tokens.tolist()}")

# %% [markdown]
# ## 6. Loading the model in 4 bits
#
# NF4 stores four bits per weight, in blocks that share a scale, and multiplies in the dtype chosen above. What is
# kept out of it matters as much: quantising the vision tower costs accuracy and saves little (it holds 8 % of the
# weights of the 7B model), and `lm_head` chooses the digits. The skip list names modules by their path in memory,
# `model.visual`: the shorter `visual` matches nothing in transformers 5, silently. Hence the check.


# %%
#| export loading
def load_model(model_id: str, quantized: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Load Qwen2-VL, its language model in NF4 if `quantized`. Raises RuntimeError if vision was quantised too."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],  # the name is historic, it holds for 4 bits too
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        model_id,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map="auto" if torch.cuda.is_available() else "cpu",
        quantization_config=quantization if quantized else None,
    )
    check_quantization(model, quantized)
    return model


def check_quantization(model: PreTrainedModel, quantized: bool) -> None:
    """Raise RuntimeError unless 4-bit layers are in the language model, and only there."""
    found = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    strays = [name for name in found if "language_model" not in name]
    if strays or bool(found) != quantized:
        raise RuntimeError(f"4-bit layers: {len(found)} in all, {strays[:3]} outside the language model.")


def release_memory() -> None:
    """Free what a finished function held. Models are in reference cycles with their trainers: `del` is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# %%
def summarize_memory(model: PreTrainedModel) -> pd.DataFrame:
    """Weights of a model by area: stored elements, megabytes, and the types they are stored in."""
    rows = []
    for area in ("visual", "language_model", "lm_head"):
        tensors = [p for name, p in model.named_parameters() if area in name]
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
        megabytes = sum(p.numel() * p.element_size() for p in tensors) / 1e6
        rows.append({"area": area, "megabytes": round(megabytes, 2), "stored as": ", ".join(kinds)})
    return pd.DataFrame(rows).set_index("area")


model = load_model(MODEL_ID, quantized=True, dtype=best_dtype())
summarize_memory(model)

# %% [markdown]
# Two NF4 weights share one `uint8`. Norms and embeddings stay in the chosen dtype.
#
# ## 7. Asking and reading the answer
#
# Answers are generated in batches, greedily. Three details decide whether they are right, and none of them raises an
# error:
#
# - The padding goes to the left, so that the last token of every row is the last token of its question; with padding
#   on the right a decoder continues from padding.
# - Lengths are padded to a multiple of 8, here and in the collator. CUDA's memory-efficient attention misread the
#   masks of other lengths (torch 2.11, float32): in a batch of 32 pictures of mixed sizes every row of full length
#   was answered wrongly.
# - All that the processor returned is passed on. `generate` without `mm_token_type_ids` runs, but gives the image
#   tokens positions on a line instead of in a plane.


# %%
#| export evaluation
@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    images: Sequence[Image.Image],
    prompt: str,
    max_new_tokens: int,
) -> list[str]:
    """One greedy answer per picture, special tokens included, padding removed. The pictures make one batch."""
    text = processor.apply_chat_template(to_conversation(prompt), tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[text] * len(images),
        images=[[image] for image in images],
        padding=True,
        padding_side="left",
        pad_to_multiple_of=8,
        return_tensors="pt",
    ).to(model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    return [answer.replace(processor.tokenizer.pad_token, "") for answer in answers]


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


def parse_answer(answer: str) -> ParsedAnswer:
    """Read every box that a Qwen-VL model wrote, as text or as JSON. Never raises.

    Corners are put in order. A box without a label of its own takes the one before it.
    """
    text, objects, unread = END_PATTERN.sub("", answer), [], []
    label, end = "", 0
    for piece in PIECE_PATTERN.finditer(text):
        label = (read_json_label(piece[0]) if piece["json"] else read_label(text[end : piece.start()])) or label
        boxes = [] if piece["attempt"] else [read_numbers(box) for box in re.findall(BOX, piece[0])]
        objects += [(label, box) for box in boxes if has_area(box)]
        if not all(map(has_area, boxes)) or (not boxes and promises_box(piece)):
            unread.append(piece[0].strip())
        end = piece.end()
    return ParsedAnswer(objects, unread)


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
# The first four are read, the fourth in part; the fifth was cut off; the last holds nothing, and nothing is wrong with
# that. Now the answers from above, drawn:

# %%
predictions = [
    [from_model_coordinates(box, *image.size, model.config.model_type) for _, box in parse_answer(answer).objects]
    for answer, (image, _, _) in zip(answers, samples, strict=True)
]
show_pictures([image for image, _, _ in samples], [boxes for _, boxes, _ in samples], predictions)
plt.show()

# %% [markdown]
# ## 8. Measuring
#
# How good is a detector that writes its boxes, and how sure can one be of the figure? The overlap of two boxes is
# their IoU: intersection over union of their areas, 1 for the same box and 0 for boxes that do not touch. With several
# tables in a picture the field uses two readings, and both are given:
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
# facts" has found the table. `multi-class` wants them to agree; `table-only` looks for the label `nutrition-table`
# in the truth, and takes every predicted box for one.


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
# COCO's average precision ranks all predicted boxes by score, which a model that writes text does not give: without a
# `score` every box counts as equally sure (1.0) and the order of the pictures decides the ranking, so the figure says
# less than for other detectors.


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
    dataset, found = to_coco(records, policy)
    if not dataset["annotations"]:
        return dict.fromkeys(["mAP", "mAP50", "mAP75"])
    truth = COCO(dataset)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # 10 thresholds, 101 recalls, labels; boxes of all sizes
    precision = precision[:, :, (precision > -1).all(axis=(0, 1))]  # -1: a label without true boxes
    return {"mAP": float(precision.mean()), "mAP50": float(precision[0].mean()), "mAP75": float(precision[5].mean())}


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
    batch_size: int,
    max_new_tokens: int,
) -> list[dict]:
    """Ask the model about every row. One record per picture: see `to_record`.

    `group` is added where rows have `meta.barcode`. Raises ValueError for a model of an unknown family.
    """
    model.eval()
    family, budget = model.config.model_type, pixel_budget(processor)
    records = []
    with tqdm(total=len(rows), desc="evaluating", unit="picture", mininterval=1) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows.select(range(start, min(start + batch_size, len(rows))))
            examples = [read_row(row) for row in batch]
            answers = generate_answers(model, processor, [e[0] for e in examples], prompt, max_new_tokens)
            for image_id, example, answer in zip(batch["image_id"], examples, answers, strict=True):
                resized = resized_size(*example[0].size, **budget)
                records.append(to_record(image_id, example, answer, family, resized))
            progress.update(len(batch))
    if "meta" in rows.column_names:
        records = [record | {"group": meta["barcode"]} for record, meta in zip(records, rows["meta"], strict=True)]
    return records


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
) -> dict:
    """What is kept of one picture, boxes `[x1, y1, x2, y2]` in pixels of the upright picture.

    id, width, height, resized (the size that the model saw), truth, prediction (label and box each), raw (the answer),
    unread (what of it could not be read), iou (mean over true boxes, one to one; None where there are none).
    """
    image, boxes, labels = example
    found = read_answer(answer, *image.size, family, resized)
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


def read_answer(answer: str, width: int, height: int, family: str, resized: tuple[int, int] | None) -> dict[str, list]:
    """`prediction` (label and pixel box each) and `unread` of an answer; a box outside the picture is unread."""
    parsed = parse_answer(answer)
    prediction, unread = [], [*parsed.unread]
    for label, written in parsed.objects:
        box = from_model_coordinates(written, width, height, family, resized)
        if has_area(box):
            prediction.append({"label": label, "box": box})
        else:
            unread.append(f"{label}{written}")
    return {"prediction": prediction, "unread": unread}


# %% [markdown]
# Every result goes to disk as soon as it is there: `predictions.jsonl` with one line per picture, `metrics.json` with
# the summary. A later question ("which pictures got worse?") is then a matter of reading files, not of a GPU.


# %%
#| export evaluation
def save_results(folder: Path, records: Sequence[dict]) -> dict[str, float | None]:
    """Write `predictions.jsonl` and `metrics.json` into `folder`; returns the metrics."""
    metrics = summarize(records)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
    """Gather every `metrics.json` below `output_dir` into its `comparison.json`: `base` first, then by name."""
    files = sorted(output_dir.glob("*/metrics.json"), key=lambda file: (file.parent.name != "base", file.parent.name))
    comparison = {file.parent.name: json.loads(file.read_text()) for file in files}
    write_text(output_dir / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    return comparison


def write_text(file: Path, text: str) -> None:
    """Write through a temporary file: whoever is interrupted keeps the old file, never half of the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


# %% [markdown]
# The same measure for answers from elsewhere, such as another model's or another program's: as a command,
# `python -m helpers.evaluation --predictions FILE.jsonl`. Lines hold the picture's size, the raw answer and the truth;
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
    """All figures, their intervals, errors by kind, and figures by label where labels count and there are several."""
    labels = summarize_labels(records, threshold) if policy == "multi-class" else {}
    return summarize(records, threshold, policy) | {
        "iou_threshold": threshold,
        "policy": policy,
        "intervals": bootstrap_intervals(records, threshold, policy),
        "errors": count_errors(records, threshold, policy),
        "labels": labels if len(labels) > 1 else {},
    }


def print_report(report: dict) -> None:
    """A report as tables for people."""
    for name in [*report["intervals"], "mAP", "mAP50", "mAP75"]:
        value, interval = report[name], report["intervals"].get(name)
        shown = "n/a" if value is None else f"{value:.3f}"
        print(f"{name:<16}{shown:>7}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))
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

# %%
base_records = evaluate_model(model, processor, eval_rows, question, EVAL_BATCH_SIZE, MAX_NEW_TOKENS)
base_metrics = save_results(output_dir / "base", base_records)
del model
release_memory()
compare_table({"base": base_records}).T

# %%
pd.Series(count_errors(base_records), name="base").to_frame()

# %% [markdown]
# ## 9. Training
#
# TRL's `SFTTrainer` runs the loop. Five settings are there because something else fails without an error:
#
# - `max_length=None`: the default of 1,024 tokens would cut picture tokens off.
# - `remove_unused_columns=False`, `skip_prepare_dataset`: the examples are built above; TRL is not to touch them.
# - trainable weights are cast to float32 after the trainer is built. TRL stores them in bfloat16, where a step of the
#   size of a usual learning rate is mostly rounded away. The forward pass still runs in 16 bits where there is a GPU.
# - the frozen vision tower runs under `no_grad`: gradient checkpointing would make it build a backward graph that
#   nobody needs.
# - the number of trainable parameters is asserted, and so is that they are where the recipe wants them.
#
# Checkpoints are written on the way. When a run was interrupted, running it again goes on from the last one; when it
# has ended they are deleted, because the adapter holds what matters.


# %%
#| export recipes
def to_training_arguments(
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
    """TRL's settings for every recipe; precision follows from the hardware."""
    dtype = best_dtype()
    return SFTConfig(
        output_dir=str(output_dir),
        run_name=output_dir.name,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # under 1: a share of all steps
        num_train_epochs=num_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=min(8, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="steps",
        save_steps=0.25,  # under 1: a share of all steps
        save_total_limit=1,
        seed=seed,
        report_to=report_to,
        disable_tqdm=True,  # TrainingProgress takes its place
    )


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


# %%
#| export recipes
def build_trainer(
    model: PreTrainedModel,
    processor: Qwen2VLProcessor,
    recipe: TrainingRecipe,
    dataset: Dataset,
    arguments: SFTConfig,
) -> SFTTrainer:
    """A trainer with LoRA adapters where the recipe wants them, in float32. Raises RuntimeError if they are not."""
    freeze_vision(model)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=AssistantOnlyCollator(processor),
        processing_class=processor,
        peft_config=LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules=recipe.lora_target_modules,
            task_type="CAUSAL_LM",
        ),
        callbacks=[TrainingProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable_parameters(trainer.model, recipe)
    return trainer


def freeze_vision(model: PreTrainedModel) -> None:
    """No gradients for the vision tower, and none through it (checkpointing would otherwise build its graph)."""
    visual = model.model.visual
    visual.requires_grad_(False)
    visual.forward = torch.no_grad()(visual.forward)


def check_trainable_parameters(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Raise RuntimeError unless something is trained, in float32, and only in the recipe's modules."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pattern = re.compile(recipe.lora_target_modules + r"\.lora_[AB]\..*")
    strays = [name for name, p in trained.items() if not pattern.fullmatch(name) or p.dtype != torch.float32]
    if strays or not trained:
        raise RuntimeError(f"{recipe.name}: {len(trained)} trainable tensors, unexpected ones: {strays[:3]}.")
    print(f"{recipe.name}: {sum(p.numel() for p in trained.values()):,} trainable parameters")


# %%
#| export recipes
def train_recipe(
    recipe: TrainingRecipe,
    model_id: str,
    processor: Qwen2VLProcessor,
    dataset: Dataset,
    arguments: SFTConfig,
) -> None:
    """Train and save adapter, processor and training log into `arguments.output_dir`; resumes an interrupted run."""
    folder = Path(arguments.output_dir)
    model = load_model(model_id, recipe.quantized, best_dtype())
    trainer = build_trainer(model, processor, recipe, dataset, arguments)
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint:
        print(f"going on from {checkpoint} (delete it to start again)")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    for leftover in folder.glob("checkpoint-*"):
        shutil.rmtree(leftover)


def load_trained_model(model_id: str, recipe: TrainingRecipe, folder: Path) -> PreTrainedModel:
    """The base as the recipe loads it, with the trained adapter from `folder` on top."""
    base = load_model(model_id, recipe.quantized, best_dtype())
    return PeftModel.from_pretrained(base, str(folder)).eval()


# %% [markdown]
# The model that was trained is thrown away, and what is evaluated is loaded anew from disk: a result that only exists
# in memory is worth nothing. Since each step is a function, its model is out of reach when it returns and the memory
# is free for the next recipe.


# %%
def run_recipe(recipe: TrainingRecipe) -> dict[str, float]:
    """Train, reload from disk, evaluate, write the results to OUTPUT_DIR/<recipe>."""
    folder = output_dir / recipe.name
    arguments = to_training_arguments(
        output_dir=folder,
        learning_rate=LEARNING_RATE or recipe.learning_rate,
        num_epochs=NUM_EPOCHS,
        max_steps=MAX_STEPS,
        batch_size=BATCH_SIZE,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS,
        gradient_checkpointing=GRADIENT_CHECKPOINTING,
        seed=SEED,
        report_to=REPORT_TO,
    )
    train_recipe(recipe, MODEL_ID, processor, train_dataset, arguments)
    release_memory()
    trained = load_trained_model(MODEL_ID, recipe, folder)
    records = evaluate_model(trained, processor, eval_rows, question, EVAL_BATCH_SIZE, MAX_NEW_TOKENS)
    return save_results(folder, records)


for recipe in recipes:
    print(f"{recipe.name}: {recipe.description}")
    run_recipe(recipe)
    release_memory()


# %%
#| export figures
def plot_losses(folders: Iterable[Path]) -> plt.Figure:
    """Training loss over optimiser steps, from the `trainer_state.json` of every folder."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for folder in folders:
        log = [
            entry
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], label=folder.name)
    axes.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


# %%
plot_losses([output_dir / recipe.name for recipe in recipes])
plt.show()

# %% [markdown]
# ## 10. Before and after
#
# The table holds everything that was ever evaluated into this output folder; `n` is the number of pictures.

# %%
comparison = save_comparison(output_dir)
table = pd.DataFrame.from_dict(comparison, orient="index")
table.style.format("{:.3f}", subset=table.columns[:-1])


# %%
#| export figures
def load_records(folder: Path) -> list[dict]:
    """The lines of a `predictions.jsonl`."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def plot_iou_distribution(records_by_name: dict[str, Sequence[dict]]) -> plt.Figure:
    """Share of pictures with at least a given IoU, one line per model: the further up and right, the better."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for name, records in records_by_name.items():
        ious = np.sort([record["iou"] for record in records])[::-1]
        axes.step(ious, np.arange(1, len(ious) + 1) / len(ious), label=name, where="post")
    axes.set(xlabel="IoU", ylabel="share of pictures with at least this IoU", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


# %%
evaluated = ["base", *[recipe.name for recipe in recipes]]
plot_iou_distribution({name: load_records(output_dir / name) for name in evaluated})
plt.show()

# %% [markdown]
# Numbers hide how a model fails. The upper row shows the four worst pictures of the last recipe, the lower row four
# from the middle of the field.

# %%
records = load_records(output_dir / recipes[-1].name)
by_iou = np.argsort([record["iou"] for record in records])
middle = len(records) // 2
chosen = [int(i) for i in [*by_iou[:4], *by_iou[max(4, middle - 2) : max(4, middle - 2) + 4]]]
show_pictures(
    [read_row(eval_rows[i])[0] for i in chosen],
    [[thing["box"] for thing in records[i]["truth"]] for i in chosen],
    [[thing["box"] for thing in records[i]["prediction"]] for i in chosen],
    titles=[f"{records[i]['id']}: IoU {records[i]['iou']:.2f}" for i in chosen],
)
plt.savefig(output_dir / "predictions.png", dpi=120)
plt.show()

# %% [markdown]
# How far can the difference in the table be trusted? With *n* pictures the mean of the IoU is uncertain by about two
# standard errors.

# %%
for name in evaluated:
    ious = np.array([record["iou"] for record in load_records(output_dir / name)])
    print(f"{name}: mean IoU {ious.mean():.3f} ± {2 * ious.std(ddof=1) / len(ious) ** 0.5:.3f} ({len(ious)} pictures)")
