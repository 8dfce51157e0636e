"""Scores as probabilities, and a threshold from which on a promise about boxes holds.

Printed from notebooks/08_trust.py: edit that, then run `make sync`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import beta, hypergeom
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from helpers.analysis import collect_scores
from helpers.evaluation import read_predictions
from helpers.plots import BLUE
from helpers.runs import write_file

Calibrator = Callable[[np.ndarray], np.ndarray]  # scores (boxes,) to probabilities (boxes,)


def to_log_odds(scores: np.ndarray) -> np.ndarray:
    """Log-odds of scores in 0..1 as a column, (boxes, 1)."""
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped)).reshape(-1, 1)


def check_both(right: np.ndarray) -> None:
    """Raise ValueError unless there are right and wrong boxes, which a curve can tell apart."""
    if right.all() or not right.any():
        known = f"{len(right)} boxes, {'all' if len(right) and right.all() else 'none'} of them right"
        raise ValueError(f"{known}: a curve needs both kinds, so calibrate on more images.")


def fit_platt(scores: np.ndarray, right: np.ndarray) -> Calibrator:
    """Logistic regression of `right` on the log-odds of the score (Platt, 1999). Raises ValueError: `check_both`."""
    check_both(right)
    model = LogisticRegression(C=np.inf).fit(to_log_odds(scores), right)
    return lambda others: model.predict_proba(to_log_odds(others))[:, 1]


def fit_isotonic(scores: np.ndarray, right: np.ndarray) -> Calibrator:
    """The rising step function that fits best (Zadrozny and Elkan, 2002). Raises ValueError: `check_both`."""
    check_both(right)
    return IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, right).predict


def calibrate(records: Sequence[dict], calibrator: Calibrator) -> list[dict]:
    """Records with calibrated scores; a box without a score stays without."""

    def change(labelled: dict) -> dict:
        return labelled | {"score": float(calibrator(np.array([labelled["score"]]))[0])}

    return [
        record | {"prediction": [change(box) if "score" in box else box for box in record["prediction"]]}
        for record in records
    ]


def split_groups(records: Sequence[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Records in two parts, about `share` of the groups (the barcode; else each image) in the second one."""
    groups = [record.get("group") or ("image", number) for number, record in enumerate(records)]
    known = list(dict.fromkeys(groups))
    chosen = {known[n] for n in np.random.default_rng(seed).permutation(len(known))[: round(share * len(known))]}
    paired = [(group in chosen, record) for group, record in zip(groups, records, strict=True)]
    return [record for held, record in paired if not held], [record for held, record in paired if held]


@dataclass(frozen=True)
class Promise:
    """Of the accepted boxes at least `rate` are right, from this IoU on; kept in `confidence` of all calibrations."""

    iou: float = 0.7
    rate: float = 0.9
    confidence: float = 0.9

    def __post_init__(self):
        wrong = [name for name, value in vars(self).items() if not 0 < value < 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: give numbers between 0 and 1.")


SHARES = np.arange(3, 11) / 10  # of the boxes, that are tried in turn


def chance_of(wrong: int, accepted: int, rate: float) -> float:
    """How probable so few wrong boxes are if among as many again more than 1 - rate are wrong (hypergeometric)."""
    too_many = int((1 - rate) * accepted + 1e-9) + 1
    return float(hypergeom.cdf(wrong, 2 * accepted, min(wrong + too_many, 2 * accepted), accepted))


def choose_threshold(scores: np.ndarray, right: np.ndarray, promise: Promise) -> dict | None:
    """The score from which on boxes can be accepted, with `coverage`, `accepted`, `wrong` on these boxes; or None.

    Guarantee: of as many boxes again that are accepted later, at least `rate` are right, for `confidence` of all draws
    of both, if all are drawn independently from one source and accepting more of them does not lower the share of
    wrong ones. Fixed-sequence testing of SHARES (Angelopoulos et al., "Learn then test", 2021), each test exact. Boxes
    of one image or barcode are not independent: where many images hold several, give one of each.
    """
    order, chosen, level = np.argsort(-scores, kind="stable"), None, 1 - promise.confidence
    for accepted in sorted({math.ceil(share * len(scores) - 1e-9) for share in SHARES} - {0}):
        wrong = int((~right[order][:accepted]).sum())
        if chance_of(0, accepted, promise.rate) > level:
            continue  # so few boxes prove nothing, even if all of them are right
        if chance_of(wrong, accepted, promise.rate) > level:
            break
        chosen = {"threshold": float(scores[order][accepted - 1]), "coverage": accepted / len(scores)}
        chosen |= {"accepted": accepted, "wrong": wrong}
    return chosen


def bound_risk(wrong: np.ndarray, accepted: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """The largest long-run share of wrong boxes that agrees with what was seen (Clopper and Pearson, 1934)."""
    return np.where(wrong < accepted, beta.ppf(confidence, wrong + 1, np.maximum(accepted - wrong, 1e-9)), 1.0)


def plot_risk_coverage(axes: plt.Axes, records: Sequence[dict], promise: Promise, colour: str = BLUE) -> None:
    """Share of wrong boxes among the accepted against the share accepted, its upper bound, and what is promised."""
    scores, right = collect_scores(records, promise.iou)
    axes.set(xlabel="share of boxes accepted", ylabel="share of them wrong", xlim=(0, 1), ylim=(0, 0.5))
    axes.axhline(1 - promise.rate, color="grey", ls="--", lw=1)
    if not len(scores):
        axes.set_title("no scores")
        return
    accepted = np.arange(1, len(scores) + 1)
    wrong = np.cumsum(~right[np.argsort(-scores, kind="stable")])
    axes.plot(accepted / len(scores), wrong / accepted, color=colour)
    bound = bound_risk(wrong, accepted, promise.confidence)
    axes.fill_between(accepted / len(scores), wrong / accepted, bound, color=colour, alpha=0.15, lw=0)
    chosen = choose_threshold(scores, right, promise)
    if chosen:
        axes.axvline(chosen["coverage"], color="black", lw=1)
    kept = "accept from {threshold:.2f} on: {coverage:.0%}".format(**chosen) if chosen else "no promise can be kept"
    axes.set_title(f"IoU {promise.iou}, {kept}", fontsize=9)


HEADING = "## When to accept a box"


def append_to_card(folder: Path, records: Sequence[dict], promise: Promise) -> None:
    """Write risk.png into a model's folder, and what it says into its card.md, in place of what stood there of it."""
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    plot_risk_coverage(axes, records, promise)
    figure.savefig(folder / "risk.png", dpi=80)
    plt.close(figure)
    lines = [f"Promised: at least {promise.rate:.0%} of the accepted boxes have an IoU of {promise.iou} or more."]
    chosen = choose_threshold(*collect_scores(records, promise.iou), promise)
    advice = "Accept boxes with a score of {threshold:.3f} or more: {coverage:.1%} of the boxes."
    lines.append(advice.format(**chosen) if chosen else "No score keeps that.")
    card = folder / "card.md"
    known = card.read_text().partition(HEADING)[0].rstrip() if card.exists() else f"# {folder.name}"
    text = [known, HEADING, " ".join(lines), "![Risk and coverage](risk.png)"]
    write_file(card, ("\n\n".join(text) + "\n").encode())


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser("helpers.trust", description="From which score on may boxes be accepted?")
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE.jsonl", help="see helpers.evaluation")
    parser.add_argument("--iou", type=float, default=0.7, help="IoU from which on a box is right")
    parser.add_argument("--rate", type=float, default=0.9, help="share of right boxes that is promised")
    parser.add_argument("--confidence", type=float, default=0.9, help="how often that has to hold")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the threshold for a file of answers; exit code 1 where no promise can be kept, 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        promise = Promise(options.iou, options.rate, options.confidence)
        scores, right = collect_scores(read_predictions(options.predictions, "qwen2_vl"), promise.iou)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    chosen = choose_threshold(scores, right, promise)
    if chosen is None:
        remedy = "give more images, a lower --rate or a lower --iou"
        parser.exit(1, f"{right.sum()} of {len(right)} boxes are right: that promise cannot be kept; {remedy}\n")
    print("accept boxes with a score of at least {threshold:.4f}: {coverage:.1%} of the boxes".format(**chosen))
    print(f"{{wrong}} of {{accepted}} accepted boxes had an IoU under {promise.iou}".format(**chosen))


if __name__ == "__main__":
    main()
