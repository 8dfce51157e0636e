"""Records of two models on the same images, held against each other by more than the mean IoU.

Printed from notebooks/07_beyond_sft.py: edit that, then run `make sync`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers.metrics import check_same_images, resample_weights

MEASURES = ["mean IoU", "IoU > 0.5", "IoU > 0.7", "IoU > 0.9", "boxes", "malformed"]


def measure_images(records: Sequence[dict]) -> pd.DataFrame:
    """MEASURES of each image with a true box: its IoU, whether above a threshold; boxes; whether any was unread."""
    kept = [record for record in records if record["truth"]]
    rows = [
        (r["iou"], *(r["iou"] > t for t in (0.5, 0.7, 0.9)), len(r["prediction"]), bool(r["unread"])) for r in kept
    ]
    return pd.DataFrame(rows, columns=MEASURES, dtype=float)


def compare_images(pairs: Sequence[tuple[Sequence[dict], Sequence[dict]]]) -> pd.DataFrame:
    """Difference, low and high (95 %, images drawn by their group) of MEASURES, over pairs of records of two models.

    A pair is what two models made of the same images; several pairs are several runs of both, whose images are drawn
    together. Raises ValueError where the images of a pair differ.
    """
    for one, other in pairs:
        check_same_images(one, other)
    records = [record for one, _ in pairs for record in one if record["truth"]]
    records = [record | {"group": record["group"] or record["id"]} for record in records]
    differences = pd.concat([measure_images(other) - measure_images(one) for one, other in pairs])
    weights = np.concatenate(list(resample_weights(records)))
    drawn = weights @ differences.to_numpy() / weights.sum(axis=1, keepdims=True)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return pd.DataFrame({"difference": differences.mean(), "low": low, "high": high})
