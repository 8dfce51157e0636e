"""Which labels of a dataset look wrong? Models that did not see them are asked, and disagreement is ranked.

    python -m helpers.audit --dataset FOLDER --output FOLDER
    python -m helpers.audit --dataset FOLDER --output FOLDER --folds 3 --recipe r1-llm-only --parameters FILE.yaml

The training split is cut into folds, all images of a barcode in one. For each fold the recipe is trained on the
others, and asked about it. The output gets suspects.jsonl, every label and every box found where there is none, the
most suspicious first (notebooks/08_trust explains how they are ranked), and contact_sheet.png with the first of them.
Labels are not changed. Settings are those of the notebook's parameters cell, over them those of --parameters, as
helpers.train_recipe reads it; the dataset may also be in the layout of YOLO, COCO or Pascal VOC. What was interrupted
goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset

from helpers.analysis import find_images
from helpers.data import Splits, choose_labels, drop_bad_rows, hold_back, keep_labels, load_rows, read_barcodes
from helpers.loading import release_memory
from helpers.plots import plot_images
from helpers.recipes import CATALOGUE
from helpers.runs import write_file
from helpers.settings import check_settings
from helpers.suspects import list_suspects
from helpers.train_recipe import prepare, read_notebook_settings, read_parameters_file
from helpers.training import evaluate_run, run_recipe


def assign_folds(rows: Dataset, folds: int, seed: int) -> np.ndarray:
    """The fold 0, 1, ... of each row; all images of a barcode share one. Raises ValueError for too few images."""
    groups = [barcode or number for number, barcode in enumerate(read_barcodes(rows))]
    known = list(dict.fromkeys(groups))
    if len(known) < 2 * folds:
        raise ValueError(f"{len(known)} images or barcodes do for {len(known) // 2} folds at most: lower --folds.")
    fold_of = dict(zip(known, np.random.default_rng(seed).permutation(len(known)) % folds, strict=True))
    return np.array([fold_of[group] for group in groups])


def split_fold(rows: Dataset, is_asked: np.ndarray, labels: Sequence[str], settings: SimpleNamespace) -> Splits:
    """The rows to ask about as `evaluation`; the others to train on, less those by which checkpoints are chosen."""
    others, asked = (rows.select(np.flatnonzero(chosen)) for chosen in (~is_asked, is_asked))
    return Splits(*hold_back(others, settings.validation_samples, settings.seed), asked, tuple(labels))


def cross_fit(settings: SimpleNamespace, recipe: str, folds: int) -> tuple[Dataset, list[dict]]:
    """The usable rows of the training split, and for each the record of a model that did not see it.

    Raises FileNotFoundError and ValueError that say what to do.
    """
    rows = drop_bad_rows(load_rows(settings.dataset_id, settings.train_split, settings.train_samples, settings.seed))
    labels = choose_labels(rows, settings.labels)
    rows = keep_labels(rows, labels)
    fold_of, records = assign_folds(rows, folds, settings.seed), {}
    for fold in range(folds):
        print(f"fold {fold + 1} of {folds}")
        inside = SimpleNamespace(**vars(settings) | {"output_dir": Path(settings.output_dir) / f"fold-{fold + 1}"})
        splits = split_fold(rows, fold_of == fold, labels, inside)
        run = run_recipe(CATALOGUE[recipe], inside, splits)
        release_memory()
        evaluate_run(run, inside, splits.evaluation)
        release_memory()
        records |= dict(zip(np.flatnonzero(fold_of == fold).tolist(), run.read_records(), strict=True))
    return rows, [records[number] for number in range(len(rows))]


def describe(suspect: dict) -> str:
    """A suspect in a few words: what is wrong if the model is right."""
    names = {"swapped": f"{suspect['label']}, found {suspect['found_label']}", "missing": suspect["found_label"]}
    return f"{suspect['kind']}? {names.get(suspect['kind'], suspect['label'])}"


def draw_suspects(suspects: Sequence[dict], images: Sequence) -> plt.Figure:
    """The images of suspects: the label in question dashed, what was found there solid."""
    sides = ([[suspect[side]] if suspect[side] else [] for suspect in suspects] for side in ("box", "found_box"))
    return plot_images(images, *sides, [f"{n}: {describe(suspect)}" for n, suspect in enumerate(suspects, start=1)])


def write_suspects(suspects: Sequence[dict], rows: Dataset, folder: Path, shown: int) -> None:
    """suspects.jsonl and contact_sheet.png, with the first `shown` of them."""
    lines = "".join(json.dumps(suspect) + "\n" for suspect in suspects)
    write_file(folder / "suspects.jsonl", lines.encode())
    first = suspects[:shown]
    figure = draw_suspects(first, find_images(rows, [{"id": suspect["image_id"]} for suspect in first]))
    figure.savefig(folder / "contact_sheet.png", dpi=80)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(
        "helpers.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, metavar="FOLDER", help="a dataset folder, or hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--folds", type=int, default=2, help="parts that the training split is cut into, at least 2")
    parser.add_argument("--recipe", choices=sorted(CATALOGUE), default="r4-joint", help="what is trained on each")
    parser.add_argument("--parameters", type=Path, metavar="FILE.yaml", help="settings as papermill takes them")
    parser.add_argument("--max-steps", type=int, help="of each training, in place of what the settings say")
    parser.add_argument("--shown", type=int, default=16, help="suspects on the contact sheet")
    return parser


def read_settings(options: argparse.Namespace) -> SimpleNamespace:
    """The notebook's settings, over them those of the parameters file, over them the options. Raises ValueError."""
    notebook = read_notebook_settings()
    settings = {name.lower(): default for name, (default, _) in notebook.items()}
    settings |= read_parameters_file(options.parameters, set(notebook)) if options.parameters else {}
    settings |= {"max_steps": options.max_steps} if options.max_steps else {}
    settings |= {"dataset_id": prepare(options.dataset, options.output), "output_dir": options.output}
    settings |= {"evaluations": 1}  # no checkpoint is chosen
    check_settings(SimpleNamespace(**settings), list(CATALOGUE))
    return SimpleNamespace(**settings)


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.folds < 2 or options.shown < 1:
        parser.error("--folds is at least 2, --shown at least 1")
    try:
        rows, records = cross_fit(read_settings(options), options.recipe, options.folds)
        suspects = list_suspects(records)
    except (FileNotFoundError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    write_suspects(suspects, rows, options.output, options.shown)
    kinds = Counter(suspect["kind"] for suspect in suspects[: options.shown])
    print("the first ones:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    print(
        f"{len(suspects)} labels and boxes without one, the most suspicious first: {options.output / 'suspects.jsonl'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
