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
# # 0. The tiny world
#
# **What you will learn:** what the drawn packages look like that stand in for photographs here, and how like the real
# dataset they are in size and place of the tables; what the model of 6 million parameters that ships with this
# repository can do before any fine-tuning, what it cannot do, and what it was shown.
#
# **How long it takes:** about a minute on two CPU cores.
#
# Everything in this repository runs without a hub and without a GPU, because it ships with a small world of its own: a
# generator of labelled food packages, and a Qwen2-VL that was pretrained on them. It exists to be quick. No number in
# it is one of a 7B model on photographs.

# %% tags=["parameters"]
MODEL_ID = "helpers/tiny/base"  # hub id or folder
DATASET_ID = "outputs/tiny_dataset"  # hub id or folder; for sizes and places of the tables
TRAIN_SPLIT = "train"
SCORED_IMAGES = 48  # drawn images that the model is asked about
FIRST_SEED = 3_000_000_000  # neither the dataset nor the pretraining uses seeds from here on
MAX_PIXELS = 1003520

# %%
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
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

from helpers.boxes import from_grid
from helpers.collators import VISION_TOKENS
from helpers.conversation import PROMPT, Task, to_conversation
from helpers.data import describe_boxes, load_rows
from helpers.generation import Detector, generate, to_questions
from helpers.loading import best_dtype, load_model, load_processor
from helpers.metrics import match_boxes
from helpers.parsing import parse_answer
from helpers.plots import BLUE, ORANGE, PREDICTION_COLOUR, TRUTH_COLOUR, draw_boxes, plot_images, to_jpeg
from helpers.tiny.packages import LABELS, TABLE_LABEL, draw_package
from helpers.tiny.pretrain import PLAIN_PROMPT

transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()

# %% [markdown]
# ## 1. Packages
#
# A seed is an image. Tables, texts in seventeen languages, labels, hands, shelves and light are drawn; the boxes are
# read off the finished image, so they follow every fold and turn. Here are eight, with their nutrition tables.

# %%
drawn = [draw_package(FIRST_SEED + number) for number in range(max(8, SCORED_IMAGES))]
images = [image for image, _ in drawn]
tables = [[box for label, box in objects if label == TABLE_LABEL] for _, objects in drawn]
to_jpeg(plot_images(images[:8], tables[:8]), dpi=80)

# %% [markdown]
# Eight other kinds of objects are drawn and labelled too. These are what the model was pretrained to find. The dataset
# on disk leaves them out: like the real one, it knows tables only.

# %%
figure, places = plt.subplots(1, 4, figsize=(13, 4.6), layout="constrained")
for axes, (image, objects) in zip(places, drawn, strict=False):
    axes.imshow(image)
    axes.axis("off")
    for label, box in objects:
        colour = TRUTH_COLOUR if label == TABLE_LABEL else BLUE
        draw_boxes(axes, [box], colour, "--" if label == TABLE_LABEL else "-")
        axes.text(*box[:2], label, color="white", fontsize=7, bbox={"fc": colour, "ec": "none", "pad": 1})
to_jpeg(figure, dpi=90)

# %%
counts = Counter(label for _, objects in drawn for label in {label for label, _ in objects})
print(f"of {len(drawn)} images, so many show a")
pd.Series({label: counts[label] for label in [TABLE_LABEL, *LABELS]}, name="images").to_frame().T

# %% [markdown]
# ## 2. Sizes of the tables
#
# The generator draws the sizes after five quantiles of the real dataset's training boxes. Lines are the drawn tables;
# crosses are the quantiles of the photographs (5, 25, 50, 75 and 95 %).

# %%
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
PHOTOGRAPHS = {
    "area": [0.02, 0.09, 0.195, 0.345, 0.94],
    "width": [0.13, 0.34, 0.51, 0.76, 0.99],
    "height": [0.08, 0.24, 0.40, 0.58, 0.99],
}
rows = load_rows(DATASET_ID, TRAIN_SPLIT, None, 0)
boxes = describe_boxes(rows.select_columns("objects"))
boxes = boxes.assign(width=boxes.x2 - boxes.x1, height=boxes.y2 - boxes.y1)
figure, places = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", sharey=True)
for axes, (name, quantiles) in zip(places, PHOTOGRAPHS.items(), strict=True):
    axes.ecdf(boxes[name], color=BLUE, label=f"drawn ({len(boxes):,} tables)")
    axes.plot(quantiles, QUANTILES, "x", color=ORANGE, ms=9, mew=2.5, label="photographs")
    axes.set(xlabel=f"{name} of the box / {name} of the image", xlim=(0, 1))
places[0].set(ylabel="share of boxes up to this size", ylim=(0, 1))
places[0].legend(frameon=False, loc="lower right")
plt.show()

# %%
both = {"drawn": boxes[list(PHOTOGRAPHS)].quantile(QUANTILES), "photographs": pd.DataFrame(PHOTOGRAPHS, QUANTILES)}
table = pd.concat(both, axis=1).swaplevel(axis=1)[list(PHOTOGRAPHS)].rename_axis("quantile")
table["largest", "difference"] = (both["drawn"] - both["photographs"]).abs().max(axis=1)
table.round(2)

# %% [markdown]
# The last column is the largest difference in its line. Widths and heights were aimed at one by one; areas follow from
# the two, and what a fold or a hand hides makes a box smaller, so the agreement is not exact. Nor does it
# say anything about light, blur and clutter, in which photographs differ from drawings at least as much.
#
# ## 3. Where the tables lie
#
# Each place of the left map tells which share of the tables covers it, as if all images had one shape. Right, the
# centres. A detector that has learned only this map is the same-box yardstick of the story.

# %%
edges = np.linspace(0, 1, 61)
middles = (edges[:-1] + edges[1:]) / 2
across = (boxes.x1.to_numpy()[:, None] <= middles) & (middles <= boxes.x2.to_numpy()[:, None])
down = (boxes.y1.to_numpy()[:, None] <= middles) & (middles <= boxes.y2.to_numpy()[:, None])
covered = down.T.astype(float) @ across / len(boxes)
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
shown = left.imshow(100 * covered, extent=(0, 1, 1, 0), cmap="Blues", vmin=0)
figure.colorbar(shown, ax=left, label="tables that cover the place (%)")
right.scatter((boxes.x1 + boxes.x2) / 2, (boxes.y1 + boxes.y2) / 2, s=6, color=BLUE, alpha=0.3, lw=0)
right.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", title="Centres")
left.set_title("Coverage")
for axes in (left, right):
    axes.set(xlabel="x / width", ylabel="y / height")
plt.show()

# %% [markdown]
# ## 4. What the base was shown, and what it finds
#
# The base was pretrained in two phases (`helpers/tiny/pretrain.py`):
#
# 1. **The vision tower alone**, through a linear head that was thrown away: each token tells which objects cover it,
#    and their boxes. That holds for the eight kinds of objects in every image, and for the nutrition table in one
#    image of four. So the tower *has* been shown where tables are.
# 2. **The whole model**, on conversations. It was asked for each of the eight kinds, for all of them, and for the mere
#    name of each kind, that of the table included. No answer ever contained the box of a table.
#
# What is left for fine-tuning is to bring the two together: a tower that has seen tables, and a language model that
# knows what they are called. This gap was built in, so that there is something to teach. How well the base finds each
# kind, on images that it has not seen:

# %%
model = load_model(MODEL_ID, quantized=False, dtype=best_dtype()).eval()
processor = load_processor(MODEL_ID, MAX_PIXELS)


def ask(label: str, chosen: Sequence[int]) -> list[list[list[float]]]:
    """The boxes, in pixels, that the model gives for a label in each of the chosen images."""
    detector = Detector(model, processor, Task(PROMPT.format(label=label.replace("-", " "))), max_new_tokens=96)
    answers = []
    for start in range(0, len(chosen), 32):
        batch = [images[number] for number in chosen[start : start + 32]]
        answers += generate(detector, to_questions(batch, detector))
    found = [[box for _, box in parse_answer(answer.text).objects] for answer in answers]
    return [[from_grid(box, *images[n].size) for box in b] for n, b in zip(chosen, found, strict=True)]


def score(label: str) -> tuple[dict[int, list], list[float]]:
    """Boxes by image number, and mean IoU of each image that shows the label."""
    truths = {
        n: [box for name, box in objects if name == label] for n, (_, objects) in enumerate(drawn[:SCORED_IMAGES])
    }
    chosen = [number for number, truth in truths.items() if truth]
    found = dict(zip(chosen, ask(label, chosen), strict=True))
    return found, [float(np.mean(match_boxes(truths[number], found[number]))) for number in chosen]


results = {label: score(label) for label in [*LABELS, TABLE_LABEL]}
ious = {label: np.array(values) for label, (_, values) in results.items()}
pd.DataFrame(
    {
        "images": len(v),
        "mean IoU": v.mean() if len(v) else np.nan,
        "IoU over 0.5": (v > 0.5).sum(),
        "IoU over 0.7": (v > 0.7).sum(),
    }
    for v in ious.values()
).set_axis(list(ious)).round(2)

# %%
figure, axes = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
noise = np.random.default_rng(0)
for line, (label, values) in enumerate(ious.items()):
    colour = PREDICTION_COLOUR if label == TABLE_LABEL else BLUE
    axes.barh(line, values.mean() if len(values) else 0, color=colour, alpha=0.35)
    axes.plot(values, line + noise.uniform(-0.25, 0.25, len(values)), "o", ms=3, color=colour)
axes.set_yticks(range(len(ious)), ious)
axes.set(
    xlabel="IoU: a dot is an image, the bar is their mean", xlim=(0, 1.02), title="What the base finds when asked"
)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# The last line is the room for fine-tuning. What does the base do when it is asked for a table? It answers with a box
# nevertheless:

# %%
table_answers = results[TABLE_LABEL][0]
to_jpeg(plot_images(images[:8], tables[:8], [table_answers.get(number, []) for number in range(8)]), dpi=80)


# %%
def object_under(box: Sequence[float], objects: Sequence[tuple]) -> str:
    """The label of the object that a box fits best, if it fits at all."""
    best, label = max((match_boxes([truth], [box])[0], name) for name, truth in objects)
    return label if best > 0.5 else "none of these"


under = Counter(
    object_under(box, drawn[n][1]) for n, boxes_of_image in table_answers.items() for box in boxes_of_image
)
order = [*LABELS, TABLE_LABEL, "none of these"]
figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
bars = axes.barh(order, [under[label] for label in order], color=[BLUE] * len(LABELS) + [PREDICTION_COLOUR, "grey"])
axes.bar_label(bars, padding=3)
axes.set(xlabel="boxes", title="What lies under the boxes of the answers to “nutrition table” (IoU over 0.5)")
axes.xaxis.get_major_locator().set_params(integer=True)
axes.invert_yaxis()
axes.margins(x=0.1)
plt.show()

# %% [markdown]
# Its boxes mostly fit something that it knows, price tables above all. These share a word of their name with nutrition
# tables, and lines and columns. Which of the two leads it there was not tried; the last section says how one could.
#
# ## 5. The words of the question
#
# In the second phase the loss looked at the whole conversation, at the question with a tenth of the answer's weight.
# This matters for one experiment of the story, which trains on the question as well. A model chooses its next token by
# the row of `lm_head` that fits best. If the rows of two tokens point the same way, it can hardly prefer one of them,
# and while `lm_head` is frozen, as with LoRA on the other layers, fine-tuning has to work against that.
#
# Left: the cosine between the rows of all tokens that occur in prompts. Right: the same as a histogram, beside pairs
# of tokens that occur in no prompt. Most of these were never to be written at all.


# %%
def prompt_tokens() -> list[int]:
    """All tokens of system message and questions, in order of appearance; those of images have no label."""
    tokenizer, labels = processor.tokenizer, [label.replace("-", " ") for label in [*LABELS, TABLE_LABEL, "object"]]
    prompts = [wording.format(label=label) for wording in (PROMPT, PLAIN_PROMPT) for label in labels]
    texts = [processor.apply_chat_template(to_conversation(Task(prompt)), tokenize=False) for prompt in prompts]
    image_tokens = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    tokens = dict.fromkeys(token for text in texts for token in tokenizer.encode(text))
    return [token for token in tokens if token not in image_tokens]


def cosines(tokens: Sequence[int]) -> torch.Tensor:
    """Cosine between the rows of `lm_head` of each two tokens."""
    rows = torch.nn.functional.normalize(model.lm_head.weight.detach()[list(tokens)].float().cpu(), dim=1)
    return rows @ rows.T


def of_pairs(matrix: torch.Tensor) -> np.ndarray:
    """The part of a symmetric matrix above its diagonal."""
    return matrix[np.triu_indices(len(matrix), k=1)].numpy()


# %%
used = prompt_tokens()
others = np.setdiff1d(np.arange(len(model.lm_head.weight)), used)
others = np.random.default_rng(0).permutation(others)[:500]  # enough of a large vocabulary
groups = {"in prompts": of_pairs(cosines(used)), "in no prompt": of_pairs(cosines(others))}
figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 6), layout="constrained", width_ratios=[1.35, 1])
shown = left.imshow(cosines(used), cmap="RdBu_r", vmin=-1, vmax=1)
names = [processor.tokenizer.decode([token]).replace(" ", "␣").replace("\n", "↵") for token in used]
left.set_xticks(range(len(used)), names, rotation=90, fontsize=6)
left.set_yticks(range(len(used)), names, fontsize=6)
figure.colorbar(shown, ax=left, label="cosine", shrink=0.7)
for (name, values), colour in zip(groups.items(), (BLUE, "grey"), strict=True):
    share = 100 * np.full(len(values), 1 / len(values))
    right.hist(values, np.linspace(-0.5, 1, 61), weights=share, color=colour, alpha=0.7, label=name)
right.set(xlabel="cosine between the rows of two tokens", ylabel="pairs (%)")
right.legend(frameon=False)
plt.show()
for name, values in groups.items():
    print(f"{name}: cosine over 0.99 in {(values > 0.99).mean():.0%} of the pairs, median {np.median(values):.2f}")

# %% [markdown]
# The words of the question can be told apart, so that a training run that includes them measures what it is meant to.
#
# ## What to try next
#
# - `fine_tuning_vlm_for_object_detection_trl.ipynb` at the top of the repository begins where this notebook ends.
# - Draw other packages: `python -m helpers.tiny.packages FOLDER --train 500 --validation 100 --seed 1`, with
#   `DATASET_ID` pointing there. Which quantiles move by chance alone?
# - Ask the base about a photograph of yours, with `detect` of `helpers.detection`. Which of the eight kinds survive?
# - Ask the base for a "nutrition", a "table", a "price" (`ask("table", range(8))`). Which word leads it to the price
#   tables?
# - Point `MODEL_ID` at a model that was fine-tuned on tables. What did it forget about the other eight kinds?
