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
# # 1. The tiny world
#
# Everything in this repository runs without a hub and without a GPU, because it ships with a small world of its own:
# a generator of labelled food packages and a Qwen2-VL of 6 million parameters that was pretrained on them. This
# notebook looks at both. How like the real thing are the pictures, and what does the model know before it is
# fine-tuned?

# %%
import sys
from pathlib import Path

ROOT = Path.cwd() if Path("helpers").is_dir() else Path.cwd().parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from helpers.figures import show_pictures
from helpers.loading import load_model, load_processor
from helpers.tiny.packages import TABLE_LABEL, draw_package
from helpers.tiny.pretrain import score

# %% tags=["parameters"]
PICTURES = 200  # for the statistics
SCORED = 48  # pictures that the base is asked about
FIRST_SEED = 3_000_000_000  # neither the dataset nor the pretraining uses seeds from here on

# %% [markdown]
# ## Packages
#
# A seed is a picture. Labels, tables, text in seventeen languages, hands, shelves and light are drawn; the boxes are
# read off the final picture, so they follow every fold and turn.

# %%
drawn = [draw_package(FIRST_SEED + number) for number in tqdm(range(PICTURES), desc="drawing", mininterval=1)]
show_pictures(
    [image for image, _ in drawn[:8]],
    [[box for label, box in objects if label == TABLE_LABEL] for _, objects in drawn[:8]],
)
plt.show()

# %% [markdown]
# ## Sizes of the tables
#
# The sizes are drawn after the real dataset: the table below puts quantiles of its training boxes beside those of the
# pictures above. With a few hundred pictures the outer quantiles are uncertain by some hundredths.

# %%
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
REAL = {
    "area": [0.02, 0.09, 0.195, 0.345, 0.94],
    "width": [0.13, 0.34, 0.51, 0.76, 0.99],
    "height": [0.08, 0.24, 0.40, 0.58, 0.99],
}


def table_sizes(image, objects) -> list[dict[str, float]]:
    """Area, width and height of every nutrition table as shares of the picture's."""
    boxes = [np.array(box) / (image.size * 2) for label, box in objects if label == TABLE_LABEL]
    return [{"area": (x2 - x1) * (y2 - y1), "width": x2 - x1, "height": y2 - y1} for x1, y1, x2, y2 in boxes]


sizes = pd.DataFrame([size for image, objects in drawn for size in table_sizes(image, objects)])
measured = sizes.quantile(QUANTILES).T
real = pd.DataFrame(REAL, index=QUANTILES).T
pd.concat({"drawn": measured, "photographs": real}, axis=1).swaplevel(axis=1).sort_index(axis=1).round(2)

# %% [markdown]
# ## The base
#
# It was trained to find eight kinds of objects, one at a time or all at once. Nutrition tables were in its pictures,
# but it was never told where one is.

# %%
model = load_model(str(ROOT / "helpers/tiny/base"), quantized=False, dtype=torch.float32).eval()
processor = load_processor(str(ROOT / "helpers/tiny/base"), max_pixels=10**6)

scores = pd.DataFrame(score(model, processor, range(FIRST_SEED, FIRST_SEED + SCORED))).T
scores

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
colours = ["#d73027" if label == TABLE_LABEL else "#4575b4" for label in scores.index]
bars = axes.barh(scores.index, scores["mean_iou"], color=colours)
axes.bar_label(bars, fmt="%.2f", padding=3)
axes.set(xlabel="mean IoU", xlim=(0, 1.1), title="What the base finds when asked for it")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# The last bar is the room for fine-tuning: `fine_tuning_vlm_for_object_detection_trl.ipynb` at the top of the
# repository begins where this one ends.
