"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from collections.abc import Sequence

import numpy as np


def describe_difference(records: Sequence[dict], others: Sequence[dict]) -> str:
    """How much better `others` are than `records` on the same pictures, in words."""
    gain = np.array([b["iou"] - a["iou"] for a, b in zip(records, others, strict=True)])
    error = 2 * gain.std() / len(gain) ** 0.5
    verdict = "no difference seen, within the noise" if abs(gain.mean()) <= error else "a difference beyond the noise"
    return f"{gain.mean():+.3f} ± {error:.3f} mean IoU: {verdict}"
