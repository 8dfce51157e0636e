"""The folder that a run leaves: how it was made, its log, its results.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from helpers.conversation import Task
from helpers.metrics import bootstrap_intervals, summarize

HOW = ["train_vision", "precision", "lora_target_modules", "lora_rank", "lora_alpha", "learning_rate", "collator"]
DECISIVE = [*HOW, "loss_function", *(part.name for part in fields(Task)), "schedule", "rows", "base_hash"]


class OtherRunError(ValueError):
    """A folder holds a run that was made otherwise."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one model: weights or adapter, processor and log if it was trained, and its results."""

    path: Path

    @property
    def is_trained(self) -> bool:
        """Whether a training has ended here."""
        return (self.path / "recipe.json").exists()

    def read_state(self) -> dict:
        """`run.json`, what was begun here; of older runs `recipe.json`, and empty where there is neither."""
        file = next((file for name in ("run", "recipe") if (file := self.path / f"{name}.json").exists()), None)
        return json.loads(file.read_text()) if file else {}

    def begin(self, description: dict) -> None:
        """Note what is to be trained here. Raises OtherRunError with the differences where it is something else."""
        known, wanted = self.read_state(), json.loads(json.dumps(description))
        others = [name for name in DECISIVE if known and known.get(name) != wanted[name]]
        if others:
            different = "; ".join(f"{name} was {known.get(name)!r}, is {wanted[name]!r}" for name in others)
            remedy = "To keep it set another OUTPUT_DIR; to replace it delete it, or all recipes' with AGAIN=True"
            raise OtherRunError(f"{self.path} holds another run: {different}. {remedy}.")
        if not self.is_trained:
            (self.path / "metrics.json").unlink(missing_ok=True)  # of an older training
            write_json(self.path / "run.json", wanted)

    def read_recipe(self) -> dict:
        """`recipe.json`: the recipe's fields, what it started from, task, settings and versions."""
        return json.loads((self.path / "recipe.json").read_text())

    def read_task(self) -> Task:
        """What the model was trained to answer, from `recipe.json`."""
        saved = self.read_recipe()
        return Task(**{part.name: saved[part.name] for part in fields(Task)})

    def read_log(self, key: str) -> pd.Series:
        """One logged number by optimiser step, from `trainer_state.json`."""
        log = json.loads((self.path / "trainer_state.json").read_text())["log_history"]
        return pd.Series({entry["step"]: entry[key] for entry in log if key in entry}, dtype=float)

    def read_records(self) -> list[dict]:
        """The lines of `predictions.jsonl`."""
        return [json.loads(line) for line in (self.path / "predictions.jsonl").read_text().splitlines()]

    def write_records(self, records: Sequence[dict], about: dict | None = None) -> dict:
        """Write `predictions.jsonl`, and `metrics.json` with metrics, intervals and what they are about: returned."""
        metrics = summarize(records) | {"iou_threshold": 0.5, "intervals": bootstrap_intervals(records)}
        metrics |= {"about": about}
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(self.path / "predictions.jsonl", lines.encode())
        write_json(self.path / "metrics.json", metrics)
        return metrics


def write_json(file: Path, value: dict) -> None:
    """Write JSON for people to read."""
    write_file(file, json.dumps(value, indent=2).encode() + b"\n")


def write_file(file: Path, content: bytes) -> None:
    """Write through a temporary file: whoever is interrupted keeps the old file, never half of the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # a part of it would fill a disk that is full already


def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
    """Gather the metrics of every `metrics.json` below `output_dir` in its `comparison.json`; untrained ones first."""
    runs = [file.parent for file in sorted(output_dir.glob("*/metrics.json"))]
    runs.sort(key=lambda path: RunFolder(path).is_trained)
    comparison = {path.name: json.loads((path / "metrics.json").read_text()) for path in runs}
    for metrics in comparison.values():
        del metrics["intervals"], metrics["about"]
    write_json(output_dir / "comparison.json", comparison)
    return comparison
