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
# # 1. The dataset, before anything is trained
#
# **What you will learn:** how large the objects are and where they lie, and how far a detector gets that knows only
# that; whether the two splits are alike and share a package; what an EXIF orientation does to boxes; what changes when
# labels are merged or told apart; how to find copies and doubtful labels, and which mistakes no such search finds.
#
# **How long it takes:** about a minute on two CPU cores, no model is loaded.
#
# The outputs below are about the *drawn* food packages of this repository. Put `DATASET_ID` to your own dataset (a hub
# id or a folder with the same columns): the code asks for nothing else, and the text says what to look for.

# %% tags=["parameters"]
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder
TRAIN_SPLIT = "train"
EVAL_SPLIT = "val"
TRAIN_SAMPLES = None  # None: all images of the split
EVAL_SAMPLES = None
PLANTED = 100  # mistakes of each kind that are planted to see whether the audit finds them
SEED = 42

# %%
import logging
import os
import re
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for an optional package

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from IPython.display import display
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from scipy.stats import ks_2samp
from torchvision.ops import box_iou

from helpers.data import describe_boxes, drop_bad_rows, drop_shared_barcodes, load_rows, median_box
from helpers.data import open_encoded, read_barcodes, read_headers, read_row
from helpers.plots import BLUE, ORANGE, PREDICTION_COLOUR, plot_images, to_jpeg

# %% [markdown]
# ## What is there
#
# `drop_bad_rows` decodes every image once and prints each row that cannot be used: an impossible box, an image
# that is cut off. What it leaves out would have stopped a training run, or worse, gone into it.

# %%
train = drop_bad_rows(load_rows(DATASET_ID, TRAIN_SPLIT, TRAIN_SAMPLES, SEED))
evaluation = drop_bad_rows(load_rows(DATASET_ID, EVAL_SPLIT, EVAL_SAMPLES, SEED))
splits = {TRAIN_SPLIT: train, EVAL_SPLIT: evaluation}
split_colours = {TRAIN_SPLIT: BLUE, EVAL_SPLIT: ORANGE}

# %% [markdown]
# Two tables hold all that the rest needs, one line per image and one per box. Neither decodes an image: the size is in
# its header.


# %%
#| export exploration: What a detection dataset holds: sizes, places, copies, doubtful labels.
def describe_images(rows: Dataset) -> pd.DataFrame:
    """One line per image: size when upright (pixels), EXIF orientation (1: stored upright), boxes, barcode, id."""
    boxes = [len(objects["bbox"]) for objects in rows["objects"]]
    others = {"boxes": boxes, "barcode": read_barcodes(rows), "image_id": list(rows["image_id"])}
    return pd.DataFrame(read_headers(rows), columns=["width", "height", "orientation"]).assign(**others)


def add_shapes(boxes: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """`describe_boxes` with width and height as fractions of the image, and `aspect` as displayed (width / height)."""
    width, height = boxes.x2 - boxes.x1, boxes.y2 - boxes.y1
    shape_of_image = (images.width / images.height).loc[boxes.image].to_numpy()
    return boxes.assign(width=width, height=height, aspect=width / height * shape_of_image)


# %%
images = {split: describe_images(rows) for split, rows in splits.items()}
boxes = {split: add_shapes(describe_boxes(rows), images[split]) for split, rows in splits.items()}
overview = {
    split: {
        "images": len(images[split]),
        "different barcodes": images[split].barcode.nunique(),
        "to be turned (EXIF)": (images[split].orientation != 1).sum(),
        "boxes": len(boxes[split]),
        "images with several boxes": (images[split].boxes > 1).sum(),
        "most boxes in an image": images[split].boxes.max(),
    }
    for split in splits
}
pd.DataFrame(overview)

# %% [markdown]
# Numbers are not enough: look at images, more of them than you think you need.

# %%
shown = [read_row(row) for row in train.select(range(min(8, len(train))))]
titles = [f"{image.width} x {image.height}, {', '.join(labels)}" for image, _, labels in shown]
to_jpeg(plot_images([image for image, *_ in shown], [boxes for _, boxes, _ in shown], titles=titles), dpi=70)

# %% [markdown]
# ## Which way is up
#
# A phone stores the image as its sensor saw it, and writes into the header (EXIF orientation) how to turn it. Boxes
# refer to the image as displayed. The table counts the orientations; 1 needs no turning, 6 and 8 a quarter turn, 3 a
# half turn.

# %%
orientations = {split: images[split].orientation.value_counts() for split in splits}
pd.DataFrame(orientations).fillna(0).astype(int).rename_axis("orientation")

# %% [markdown]
# If all are upright, here is one that is not, made from the first image: stored on its side, with the note to turn it.
# Left, what a program sees that ignores the note; right, what `read_row` returns.


# %%
def store_sideways(row: dict) -> dict:
    """The row as a phone would store it: turned by a quarter, with the EXIF note that turns it back."""
    exif, buffer = Image.Exif(), BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    upright = ImageOps.exif_transpose(row["image"]).convert("RGB")
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=90, exif=exif)
    return row | {"image": Image.open(buffer)}


sideways = store_sideways(train[0])
without_note = Image.fromarray(np.asarray(sideways["image"]))  # the pixels as they are stored
ignored = read_row(sideways | {"image": without_note})
heeded = read_row(sideways)
pair = [ignored, heeded]
titles = [
    f"note ignored: {ignored[0].width} x {ignored[0].height}",
    f"read_row: {heeded[0].width} x {heeded[0].height}",
]
to_jpeg(plot_images([image for image, *_ in pair], [boxes for _, boxes, _ in pair], titles=titles, columns=2), dpi=90)

# %% [markdown]
# Nothing fails on the left: image and box are both valid, they only belong to different views. How wrong are such
# boxes? A point at (x, y) of the upright image lies at (y, 1 - x) of the image on its side, both as fractions.

# %%
upright_boxes = torch.tensor(boxes[TRAIN_SPLIT][["x1", "y1", "x2", "y2"]].to_numpy())
x1, y1, x2, y2 = upright_boxes.T
lying_boxes = torch.stack([y1, 1 - x2, y2, 1 - x1], dim=1)
misplaced = box_iou(upright_boxes, lying_boxes).diagonal()
print(f"boxes beside their object if all {TRAIN_SPLIT} images were lying: mean IoU with the right place "
      f"{misplaced.mean():.2f}, under 0.5 in {(misplaced < 0.5).double().mean():.0%}")  # fmt: skip

# %% [markdown]
# A dataset with a few per cent of such images gets that many wrong labels, without a message.
#
# ## Images
#
# The sizes decide what an image costs (`03_data_preprocessing` turns them into tokens), and whether several can share
# a batch without much padding.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for split, table in images.items():
    sizes = table.value_counts(["width", "height"]).reset_index()
    area = 30 + 800 * sizes["count"] / len(table)
    left.scatter(sizes.width, sizes.height, s=area, alpha=0.5, color=split_colours[split], label=split)
    right.hist(
        table.width / table.height,
        bins=np.geomspace(0.3, 3.3, 33),
        weights=np.full(len(table), 1 / len(table)),
        alpha=0.55, color=split_colours[split], label=split,
    )  # fmt: skip
left.set(xlabel="width (pixels)", ylabel="height (pixels)", title="Size; a larger dot is more images")
left.margins(0.2)
right.set(xlabel="width / height", ylabel="share of the split's images", title="Shape", xscale="log")
right.set_xticks([0.5, 1, 2], ["1 : 2", "1 : 1", "2 : 1"])
right.minorticks_off()
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Boxes: how many, how large, of what shape
#
# Two splits are alike if their curves lie on each other. Each line says which share of the boxes is at most that
# large. `ks_2samp` gives the largest vertical distance between the two lines, and how often chance alone gives a
# larger one when both splits come from the same source.

# %%
features = {"area": "box area / image area", "width": "box width / image width",
            "height": "box height / image height", "aspect": "box width / height, as displayed"}  # fmt: skip
figure, grid = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained", sharey=True)
for axes, (feature, label) in zip(grid, features.items(), strict=True):
    one, other = (boxes[split][feature] for split in splits)
    for split, values in zip(splits, (one, other), strict=True):
        axes.ecdf(values, color=split_colours[split], label=f"{split}, n = {len(values)}")
    test = ks_2samp(one, other)
    axes.set(xlabel=label, title=f"distance {test.statistic:.2f}, p = {test.pvalue:.2f}")
    axes.grid(alpha=0.3)
grid[3].set_xscale("log")
grid[0].set_ylabel("share of boxes")
grid[0].legend(frameon=False, loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
# Four tests are made here, so one p of a few per cent is no news. If a split does differ, its score answers another
# question than the one you asked.

# %%
per_image = {split: table.boxes.value_counts() for split, table in images.items()}
counts = pd.DataFrame(per_image).fillna(0).astype(int).rename_axis("boxes in an image")
quantiles = pd.concat({split: table[list(features)].quantile([0.05, 0.5, 0.95]) for split, table in boxes.items()})
display(counts, quantiles.rename_axis(["split", "quantile"]).round(2))

# %% [markdown]
# The quantiles tell what a model has to cope with at both ends: boxes of a few hundredths of the image, and boxes that
# are nearly the image. Images with several boxes are few. A model that always writes one box is then wrong so rarely
# that the mean IoU of the best box hides it: the metric has to count missed objects too. It also means that little can
# be learned about several objects from such data.
#
# ## Where boxes lie
#
# Each point of the map tells how many of the boxes cover it. The brighter the middle, the more can be had without
# looking at the image.


# %%
#| export exploration
def cover_map(boxes: pd.DataFrame, cells: int = 50) -> np.ndarray:
    """Share of the boxes that cover each of `cells` x `cells` points of the image, rows from top to bottom."""
    points = (np.arange(cells) + 0.5) / cells
    inside_x = (boxes.x1.to_numpy()[:, None] <= points) & (points < boxes.x2.to_numpy()[:, None])
    inside_y = (boxes.y1.to_numpy()[:, None] <= points) & (points < boxes.y2.to_numpy()[:, None])
    return np.einsum("ny,nx->yx", inside_y.astype(float), inside_x.astype(float)) / len(boxes)


# %%
figure, grid = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for axes, (split, table) in zip(grid, boxes.items(), strict=False):
    heat = axes.imshow(cover_map(table), extent=(0, 1, 1, 0), cmap="viridis", vmin=0, vmax=1)
    axes.set(title=split, xlabel="x / width", ylabel="y / height")
figure.colorbar(heat, ax=grid[:2], label="share of boxes that cover a point")
centres = boxes[TRAIN_SPLIT]
dots = grid[2].scatter(
    (centres.x1 + centres.x2) / 2, (centres.y1 + centres.y2) / 2, c=np.log10(centres.area), s=6, cmap="plasma"
)
grid[2].set(title=f"{TRAIN_SPLIT}: centres", xlabel="x / width", xlim=(0, 1), ylim=(1, 0), aspect="equal")
figure.colorbar(dots, ax=grid[2], label="log10 of the area")
plt.show()

# %% [markdown]
# ## The detector that never looks
#
# It answers every image with the same box. The main notebook takes the median of each corner. Is there a better
# constant box? The second candidate is the training box that overlaps best with all others.

# %%
corners = {split: torch.tensor(table[["x1", "y1", "x2", "y2"]].to_numpy()) for split, table in boxes.items()}
medoid = corners[TRAIN_SPLIT][box_iou(corners[TRAIN_SPLIT], corners[TRAIN_SPLIT]).mean(dim=1).argmax()]
constants = {"median of each corner": torch.tensor(median_box(boxes[TRAIN_SPLIT])), "best training box": medoid}
constants["whole image"] = torch.tensor([0.0, 0.0, 1.0, 1.0])
scores = {}
for name, box in constants.items():
    ious = {split: box_iou(box.double()[None], corners[split])[0] for split in splits}
    scores[name] = {"box": np.round(box.numpy(), 2).tolist()} | {split: v.mean().item() for split, v in ious.items()}
pd.DataFrame(scores).T.rename(columns={split: f"mean IoU, {split}" for split in splits})

# %% [markdown]
# Any constant box fits tables of its own size. So the yardstick depends on the size of the table, and a model's mean
# IoU has to be read with the mix of sizes in mind: small tables are where looking pays.

# %%
yardstick = box_iou(constants["median of each corner"].double()[None], corners[EVAL_SPLIT])[0].numpy()
edges = np.array([0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0])
bins = pd.cut(boxes[EVAL_SPLIT].area, edges, include_lowest=True)
by_size = pd.Series(yardstick).groupby(bins, observed=False).agg(["mean", "count"])
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.scatter(boxes[EVAL_SPLIT].area, yardstick, s=12, color=BLUE, alpha=0.5, label=f"one box of {EVAL_SPLIT}")
axes.stairs(
    by_size["mean"], edges, baseline=None, color=PREDICTION_COLOUR, lw=2, label="mean of the boxes in the range"
)
for left_edge, right_edge, count in zip(edges, edges[1:], by_size["count"], strict=False):
    axes.text((left_edge + right_edge) / 2, 1.03, f"n={count}", ha="center", fontsize=7)
x1, y1, x2, y2 = median_box(boxes[TRAIN_SPLIT])
axes.axvline((x2 - x1) * (y2 - y1), color="grey", ls=":", label="area of the constant box")
axes.set(xlabel="area of the true box / area of the image", ylabel="IoU with the constant box", ylim=(0, 1.1))
axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))
plt.show()

# %% [markdown]
# ## The same package twice
#
# Two images of one package in different splits turn an evaluation into a test of memory. The diagonal counts
# packages with more than one image in their split, the other cells packages that two splits share.


# %%
#| export exploration
def count_shared_barcodes(barcodes: dict[str, Sequence[str | None]]) -> pd.DataFrame:
    """Barcodes that each two splits share; on the diagonal those with several images in the split itself."""
    counts = {split: pd.Series(values, dtype=object).dropna().value_counts() for split, values in barcodes.items()}
    table = pd.DataFrame(0, index=list(counts), columns=list(counts))
    for one in counts:
        for other in counts:
            shared = (
                counts[one][counts[one] > 1] if one == other else counts[one].index.intersection(counts[other].index)
            )
            table.loc[one, other] = len(shared)
    return table


# %%
count_shared_barcodes({split: read_barcodes(rows) for split, rows in splits.items()})

# %% [markdown]
# In the drawn dataset every image is a package of its own. To see what the splitting would do otherwise, ten
# training rows get the barcode of an evaluation row; `drop_shared_barcodes` has to find exactly these.

# %%
copied = evaluation.select(range(1))["meta"][0] if "meta" in evaluation.column_names else {"barcode": "made up"}
metas = [dict(copied) if number < 10 else {"barcode": str(number)} for number in range(min(200, len(train)))]
leaking = train.select(range(len(metas))).select_columns("image_id").add_column("meta", metas)
kept = drop_shared_barcodes(leaking, Dataset.from_dict({"meta": [copied]}))
print(f"{len(leaking)} rows before, {len(kept)} after")

# %% [markdown]
# A barcode is as good as the person who entered it, and many datasets have none. Copies can also be found by looking.
# A difference hash shrinks an image to 9 x 8 grey pixels and keeps 64 bits: is a pixel brighter than its right
# neighbour? Copies that were scaled, brightened or compressed again differ in few bits.


# %%
#| export exploration
def hash_image(image: Image.Image) -> np.ndarray:
    """Difference hash of the upright image: 64 bits that change little when it is scaled, brightened, compressed."""
    small = ImageOps.exif_transpose(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=int)
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def hash_images(rows: Dataset) -> np.ndarray:
    """`hash_image` of every row, (rows, 64). JPEGs are unpacked at a fraction of their size, which is faster."""
    hashes = []
    for row in rows.select_columns("image").cast_column("image", ImageFeature(decode=False)):
        image = open_encoded(row["image"])
        image.draft("RGB", (72, 64))
        hashes.append(hash_image(image))
    return np.array(hashes).reshape(-1, 64)


def find_near_duplicates(hashes: np.ndarray, limit: int) -> pd.DataFrame:
    """Pairs `one` < `other` of images whose hashes differ in at most `limit` bits, nearest first."""
    signs = hashes * 2.0 - 1
    distances = ((64 - signs @ signs.T) / 2).round().astype(int)
    one, other = np.where(np.triu(distances <= limit, k=1))
    pairs = pd.DataFrame({"one": one, "other": other, "bits": distances[one, other]})
    return pairs.sort_values("bits", kind="stable", ignore_index=True)


# %% [markdown]
# How few? Forty images are changed in five ways, and each copy is compared with its original. Beside them stands the
# distance of each training image to the one most like it, which a limit has to stay below.

# %%
hashes = hash_images(train)
rng = np.random.default_rng(SEED)
chosen = rng.permutation(len(train))[:40]


def recompress(image: Image.Image) -> Image.Image:
    """The image as a JPEG of low quality."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=25)
    return Image.open(buffer)


changes = {
    "compressed again": recompress,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "4 % cut off all around": lambda image: ImageOps.crop(image, round(min(image.size) * 0.04)),
    "mirrored": ImageOps.mirror,
}
originals = [read_row(train[int(number)])[0] for number in chosen]
distances = {
    name: [int((hash_image(change(image)) != hash_image(image)).sum()) for image in originals]
    for name, change in changes.items()
}
nearest = find_near_duplicates(hashes, 64).groupby("one").bits.min()

# %%
figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
axes.boxplot([*distances.values(), nearest], orientation="horizontal", whis=(0, 100),
             tick_labels=[*distances, "nearest other image"], medianprops={"color": PREDICTION_COLOUR})  # fmt: skip
axes.axvline(4, color="grey", ls=":", lw=1)
axes.set(xlabel="bits of 64 that differ; whiskers to the extremes, dotted the limit used below")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# Most copies of the first three kinds stay within the limit. Cutting moves every pixel of so small a thumbnail, and a
# mirrored copy is another image to this hash: it finds neither safely. The last line is the price of a higher limit:
# images of different packages that would be called copies. Look at what a limit of 4 bits brings up.

# %%
everything = np.concatenate([hashes, hash_images(evaluation)])
names = [f"{split} {number}" for split, rows in splits.items() for number in range(len(rows))]
pairs = find_near_duplicates(everything, 4)
print(f"{len(pairs)} pairs among {len(names)} images differ in at most 4 bits")
nearest_pairs = (pairs if len(pairs) else find_near_duplicates(everything, 64)).head(4)
numbers = nearest_pairs[["one", "other"]].to_numpy().ravel()
rows = [(train[int(n)] if n < len(train) else evaluation[int(n - len(train))]) for n in numbers]
shown = [read_row(row) for row in rows]
titles = [f"{names[n]}, pair differs in {nearest_pairs.bits[i // 2]} bits" for i, n in enumerate(numbers)]
to_jpeg(plot_images([image for image, *_ in shown], [boxes for _, boxes, _ in shown], titles=titles), dpi=60)

# %% [markdown]
# A pair of the same package belongs into one split; a pair that only looks alike in 72 pixels is the hash's mistake,
# and both may stay. Tables that fill the image are prone to it: lines of text on paper, light from one side.
#
# ## Labels
#
# The categories, how they are spelt, and how their boxes differ.

# %%
categories = pd.concat(
    {split: table.groupby("category").area.agg(["count", "median"]) for split, table in boxes.items()}
)
spellings = pd.Series({name: re.sub(r"[\W_]+", "-", name.lower()).strip("-") for name in boxes[TRAIN_SPLIT].category})
several = spellings.groupby(spellings).groups
print("names that differ in spelling only:", [list(names) for names in several.values() if len(names) > 1] or "none")
categories.rename(columns={"count": "boxes", "median": "median area"}).rename_axis(["split", "category"]).round(3)

# %% [markdown]
# The drawn dataset has one category. The dataset of photographs has a few boxes of others (small tables, tables as
# text). Then a *policy* decides what counts when truth and answer are compared:
#
# - `merge`: all categories are one; every box counts, the label does not.
# - `multi-class`: every box counts, and its label has to be right.
# - `table-only`: of the true boxes only those labelled `nutrition-table` count.
#
# What they would change is shown on labels that are **made up here**: half of the boxes with less than a tenth of the
# image are called `nutrition-table-small`, as by two annotators who disagree.


# %%
def count_by_policy(boxes: pd.DataFrame, images: int) -> pd.DataFrame:
    """Boxes, kinds of boxes and images without a true box under each label policy, from the rows' labels."""
    tables = boxes[boxes.category == "nutrition-table"]
    counted = {"merge": boxes.assign(category="any"), "multi-class": boxes, "table-only": tables}
    return pd.DataFrame(
        {
            policy: {
                "true boxes": len(table),
                "labels to tell apart": table.category.nunique(),
                "images left without a box": images - table.image.nunique(),
            }
            for policy, table in counted.items()
        }
    )


invented = boxes[TRAIN_SPLIT].copy()
renamed = (invented.area < 0.1) & (np.random.default_rng(SEED).random(len(invented)) < 0.5)
invented.loc[renamed, "category"] = "nutrition-table-small"
pd.concat(
    {
        name: count_by_policy(table, len(train))
        for name, table in [("as it is", boxes[TRAIN_SPLIT]), ("made up", invented)]
    },
    axis=1,
)

# %% [markdown]
# Under `table-only` a right answer on an image that is left without a box becomes a false one. Under `multi-class` a
# model has to guess which annotator it was. What each policy does to a metric is measured in `04_evaluation_analysis`.
# Whatever you choose, look at the boxes of each category first:

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for (name, table), colour in zip(invented.groupby("category"), (BLUE, ORANGE, "C2", "C3", "C4"), strict=False):
    axes.scatter(table.width, table.height, s=7, alpha=0.5, color=colour, label=f"{name}: {len(table)}")
axes.set(xlabel="box width / image width", ylabel="box height / image height", title="Made-up labels")
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Of the small boxes half have one colour and half the other, in the same place: size does not tell these two
# categories apart, and they cannot be learned from it. If you see that in your data, merge them.
#
# ## Doubtful boxes
#
# Annotations are wrong at the extremes first. The audit names every box that is extreme in some way, and why. None of
# the reasons proves a mistake; together they make a list that is short enough to be looked at.


# %%
#| export exploration
def find_overlaps(boxes: pd.DataFrame, limit: float = 0.5) -> pd.DataFrame:
    """Pairs of boxes in one image, by their index in `boxes`, of which more than `limit` of the smaller is covered."""
    lines = []
    for _, group in boxes[boxes.duplicated("image", keep=False)].groupby("image"):
        corners = group[["x1", "y1", "x2", "y2"]].to_numpy()
        low, high = np.maximum(corners[:, None, :2], corners[:, :2]), np.minimum(corners[:, None, 2:], corners[:, 2:])
        area = group.area.to_numpy()
        covered = np.clip(high - low, 0, None).prod(axis=2) / np.minimum(area[:, None], area)
        for i, j in zip(*np.where(np.triu(covered > limit, k=1)), strict=True):
            lines.append({"one": group.index[i], "other": group.index[j], "covered": covered[i, j]})
    return pd.DataFrame(lines, columns=["one", "other", "covered"])


def is_unusual(values: pd.Series, limit: float = 4.0) -> pd.Series:
    """Whether a logarithm is over `limit` robust standard deviations (of the median) away from the median."""
    away = (np.log(values) - np.log(values).median()).abs()
    return away > limit * 1.4826 * away.median()


def find_doubtful_boxes(boxes: pd.DataFrame, edge: float = 0.003) -> pd.DataFrame:
    """One line per box of `add_shapes` and reason to look at it: `box` (its index), `image`, `reason`.

    A side within `edge` of the image's border touches it.
    """
    touched = (boxes[["x1", "y1"]] <= edge).sum(axis=1) + (boxes[["x2", "y2"]] >= 1 - edge).sum(axis=1)
    overlapping = find_overlaps(boxes)
    by_category = boxes.groupby("category")
    reasons = {
        "under 1 % of the image": boxes.area < 0.01,
        "the whole image": boxes.area > 0.97,
        "touches 2 or 3 borders": (touched >= 2) & (touched <= 3) & (boxes.area <= 0.97),
        "over 6 times as long as wide": np.maximum(boxes.aspect, 1 / boxes.aspect) > 6,
        "over half of it in another box": boxes.index.isin([*overlapping.one, *overlapping.other]),
        "unusual size for its label": by_category.area.transform(is_unusual),
        "unusual shape for its label": by_category.aspect.transform(is_unusual),
    }
    found = [boxes.loc[mask, ["image"]].assign(reason=reason) for reason, mask in reasons.items()]
    return pd.concat(found).rename_axis("box").reset_index()


# %%
doubtful = {split: find_doubtful_boxes(table) for split, table in boxes.items()}
counts = pd.DataFrame({split: table.reason.value_counts() for split, table in doubtful.items()}).fillna(0).astype(int)
counts.loc["boxes with any of them"] = {split: table.box.nunique() for split, table in doubtful.items()}
counts.loc["all boxes"] = {split: len(table) for split, table in boxes.items()}
counts

# %% [markdown]
# The contact sheet: the image with the largest and the smallest box, the longest, the one with most boxes, and then
# those with the rarest reasons.

# %%
table, sheet = boxes[TRAIN_SPLIT], {}
stretch = np.maximum(table.aspect, 1 / table.aspect)
for title, box in [("largest", table.area.idxmax()), ("smallest", table.area.idxmin()), ("longest", stretch.idxmax())]:
    sheet.setdefault(int(table.image[box]), title)
sheet.setdefault(int(images[TRAIN_SPLIT].boxes.idxmax()), "most boxes")
doubts = doubtful[TRAIN_SPLIT]
doubts = doubts.assign(frequency=doubts.reason.map(doubts.reason.value_counts()))
reasons_of = doubts.groupby("image").reason.unique()
for number in doubts.sort_values("frequency", kind="stable").image.unique()[:12]:
    sheet.setdefault(int(number), "\n".join(reasons_of[number][:3]))
sheet = dict(list(sheet.items())[:12])
shown = [read_row(train[number]) for number in sheet]
titles = [f"{TRAIN_SPLIT} {number}: {title}" for number, title in sheet.items()]
to_jpeg(plot_images([image for image, *_ in shown], [boxes for _, boxes, _ in shown], titles=titles), dpi=60)

# %% [markdown]
# Boxes of drawn images are read off the drawing, so what is listed here is extreme rather than misplaced. Where two
# boxes overlap, one table was drawn in the other's way. With photographs you would now correct or drop rows, and note
# which.
#
# ## What the audit does not find
#
# A search that is never tested is trusted too much. So mistakes that annotators and converters make are planted in
# copies of training boxes that the audit does not list as they are, and it is run again. Whatever it lists now, it
# lists for the mistake.


# %%
def swap_axes(box: np.ndarray) -> np.ndarray:
    """x and y exchanged: the dataset's own order read as x first."""
    return box[[1, 0, 3, 2]]


def shift(box: np.ndarray) -> np.ndarray:
    """Moved by half its width, kept inside the image."""
    by = (box[2] - box[0]) / 2
    by = by if box[2] + by <= 1 else -min(by, box[0])
    return box + np.array([by, 0, by, 0])


def read_as_size(box: np.ndarray) -> np.ndarray:
    """Width and height read as the second corner, then cut off at the image's border."""
    return np.array([box[0], box[1], min(1, box[0] + box[2]), min(1, box[1] + box[3])])


def shrink(box: np.ndarray) -> np.ndarray:
    """A tenth of the side length around the centre."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 20
    return np.concatenate([centre - half, centre + half])


mistakes = {"x and y exchanged": swap_axes, "corner read as size": read_as_size, "shifted by half a width": shift,
            "whole image": lambda box: np.array([0, 0, 1, 1]), "a tenth of its side": shrink}  # fmt: skip

# %% [markdown]
# A sixth mistake needs no function: the same box entered twice.

# %%
columns = ["x1", "y1", "x2", "y2"]
clean_doubts = set(doubtful[TRAIN_SPLIT].box)
targets = [box for box in table.index if box not in clean_doubts]
targets = np.random.default_rng(SEED).permutation(targets)[:PLANTED]
found = {}
for name, spoil in mistakes.items():
    spoilt = table[["image", "category", *columns]].copy()
    spoilt.loc[targets, columns] = np.array([spoil(box) for box in spoilt.loc[targets, columns].to_numpy()])
    spoilt["area"] = (spoilt.x2 - spoilt.x1) * (spoilt.y2 - spoilt.y1)
    audited = find_doubtful_boxes(add_shapes(spoilt, images[TRAIN_SPLIT]))
    found[name] = len(set(audited.box) & set(targets)) / len(targets)
doubled = pd.concat([table, table.loc[targets]], ignore_index=True)
found["box entered twice"] = len(set(find_doubtful_boxes(doubled).box) & set(targets)) / len(targets)

# %%
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
bars = axes.barh(list(found), list(found.values()), color=BLUE)
axes.bar_label(bars, fmt="{:.0%}", padding=3)
axes.axvline(
    len(clean_doubts) / len(table),
    color="grey",
    ls="--",
    label="share of all boxes listed without any mistake planted",
)
axes.set(xlabel=f"share of {len(targets)} planted mistakes that the audit lists", xlim=(0, 1.12))
axes.invert_yaxis()
axes.legend(frameon=False, fontsize=8, loc="upper right")
plt.show()

# %% [markdown]
# Extremes are found, misplaced boxes of ordinary size are not: no rule about boxes alone can see that the object is
# beside the box. The first two are typical of converters, which make them for all boxes at once. Does the cover map
# show them?

# %%
figure, grid = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
examples = [("as they are", lambda box: box), ("x and y exchanged", swap_axes), ("corner read as size", read_as_size)]
for axes, (name, spoil) in zip(grid, examples, strict=True):
    spoilt = pd.DataFrame(np.array([spoil(box) for box in table[columns].to_numpy()]), columns=columns)
    heat = axes.imshow(cover_map(spoilt), extent=(0, 1, 1, 0), cmap="viridis", vmin=0, vmax=1)
    axes.set(title=f"all boxes: {name}", xlabel="x / width", ylabel="y / height")
figure.colorbar(heat, ax=grid, label="share of boxes that cover a point")
plt.show()

# %% [markdown]
# The second mistake moves the whole map. An exchange of x and y hardly changes it when objects are in the middle and
# about as wide as high: only a look at images with their boxes shows it, so look before you train.
#
# ## What to try next
#
# - Point `DATASET_ID` at your own data and read the notebook from the top. Which split would you trust?
# - A trained model is the better audit: where a good one disagrees strongly with a label, one of the two is wrong
#   (`04_evaluation_analysis` lists the worst images). Plant ten shifted boxes in the evaluation split and see how many
#   are among the worst twenty.
# - Make the hash find mirrored copies: hash each image twice. What does it do to the nearest other image?
# - `03_data_preprocessing` goes on from here: what the model gets to see of these images.
