"""How start, memory and evaluation grow with the number of pictures: a table.

    PYTHONPATH=.:tests python tests/growth.py OUTPUT --rows 1000 10000 50000    # 11 GB of disk

Pictures are 200 drawn packages, enlarged to 1,024 pixels and repeated under other ids. Each line is measured in
processes of their own: the first start reads and checks every picture, the second one finds what was found; both end
when the first step of r1 begins, after the evaluation before it. Evaluating is `python -m helpers.evaluation` on that
many lines.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from interruptions import create_settings
from tqdm import tqdm
from transformers import TrainerCallback

from helpers.data import load_splits
from helpers.loading import best_dtype, load_model
from helpers.recipes import CATALOGUE
from helpers.tiny.packages import FEATURES, draw_package
from helpers.training import build_trainer, create_detector

SIDE, DRAWN, ROWS_AT_ONCE = 1024, 200, 500
TABLE = "nutrition-table"


def draw_rows() -> list[dict]:
    """Packages as rows of a dataset, their longer side SIDE pixels."""
    rows = []
    for seed in tqdm(range(DRAWN), desc="drawing"):
        image, objects = draw_package(seed)
        (width, height), corners = image.size, [box for label, box in objects if label == TABLE]
        boxes = [[y1 / height, x1 / width, y2 / height, x2 / width] for x1, y1, x2, y2 in corners]
        scale, file = SIDE / max(width, height), BytesIO()
        image.resize((round(width * scale), round(height * scale))).save(file, "JPEG", quality=80)
        objects = {"bbox": boxes, "category_id": [0] * len(boxes), "category_name": [TABLE] * len(boxes)}
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "objects": objects})
    return rows


def name_row(row: dict, name: str) -> dict:
    """A row under another id, and with a barcode of its own."""
    meta = {"barcode": name, "off_image_id": "", "image_url": ""}
    return row | {"image_id": name, "width": SIDE, "height": SIDE, "meta": meta}


def write_dataset(folder: Path, rows: list[dict], count: int) -> None:
    """`count` rows to train on, and DRAWN to evaluate on."""
    (folder / "data").mkdir(parents=True)
    for split, number in {"train": count, "val": DRAWN}.items():
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        with pyarrow.parquet.ParquetWriter(file, FEATURES.arrow_schema) as writer:
            for start in range(0, number, ROWS_AT_ONCE):
                numbers = range(start, min(start + ROWS_AT_ONCE, number))
                some = [name_row(rows[n % DRAWN], f"{split}{n}") for n in numbers]
                writer.write_table(pyarrow.Table.from_pylist(some, schema=FEATURES.arrow_schema))


def write_answers(file: Path, count: int) -> None:
    """`count` lines of two labels, truth and answers of up to two boxes each; one line in five has no true box."""
    random = np.random.default_rng(0)
    with file.open("w") as lines:
        for number in range(count):
            truth, answer = [], ""
            for _ in range(random.choice([0, 1, 1, 1, 2])):
                corner, size = random.integers(0, 600, 2), random.integers(50, 390, 2)
                box, label = [*corner.tolist(), *(corner + size).tolist()], str(random.choice(["barcode", "logo"]))
                truth.append({"label": label, "box": box})
                x1, y1, x2, y2 = np.clip(box + random.integers(-40, 40, 4), 0, 1000).tolist()
                answer += (
                    f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
                )
            line = {"id": str(number), "width": 1000, "height": 1000, "raw": answer, "truth": truth}
            lines.write(json.dumps(line) + "\n")


class FirstStep(TrainerCallback):
    """Ends the process when the first step begins."""

    def __init__(self, begun: float):
        self.begun = begun

    def on_step_begin(self, args, state, control, **kwargs):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"seconds": time.time() - self.begun, "GB": peak}), flush=True)
        sys.exit(0)


def start(output: Path, begun: float) -> None:
    """What `helpers.train_recipe` does until its first step."""
    settings, recipe = create_settings(output), CATALOGUE["r1-llm-only"]
    settings.validation_samples, settings.train_samples, settings.eval_samples = 64, None, None
    splits = load_splits(settings)
    detector = create_detector(load_model(settings.model_id, True, best_dtype()), settings, splits.labels)
    trainer = build_trainer(detector, recipe, settings, splits)
    trainer.add_callback(FirstStep(begun))
    trainer.train()


def measure(*command: str) -> dict[str, float]:
    """Seconds, and gigabytes at the most, of a process; or what it says of itself."""
    begun = time.time()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    found = json.loads(printed.splitlines()[-1]) if command[0] == __file__ else {}
    return {"seconds": time.time() - begun, "GB": usage.ru_maxrss / 1e6} | found


def measure_rows(output: Path, rows: list[dict], count: int) -> dict:
    """One line of the table."""
    write_dataset(output / "dataset", rows, count)
    write_answers(output / "answers.jsonl", count)
    line = {"pictures": count}
    for name in ("first start", "second start"):
        found = measure(__file__, str(output), "--begun", str(time.time()))
        line |= {f"{name} (s)": round(found["seconds"]), f"{name} (GB)": round(found["GB"], 2)}
    found = measure("-m", "helpers.evaluation", "--predictions", str(output / "answers.jsonl"), "--json")
    return line | {"evaluating (s)": round(found["seconds"]), "evaluating (GB)": round(found["GB"], 2)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="an empty folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000, 50000])
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.begun:
        return start(options.output, options.begun)
    rows = draw_rows()
    lines = []
    for count in options.rows:
        lines.append(measure_rows(options.output / str(count), rows, count))
        print(lines[-1], flush=True)
    print(pd.DataFrame(lines).to_string(index=False))


if __name__ == "__main__":
    main()
