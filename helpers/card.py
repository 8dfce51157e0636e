"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset

from helpers.data import read_row
from helpers.evaluation import build_report, list_figures, write_text
from helpers.figures import plot_card, show_pictures


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
