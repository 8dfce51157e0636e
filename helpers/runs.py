"""The folder that a run leaves: how it was made, its log, its results.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.metrics import bootstrap_intervals, summarize


@dataclass(frozen=True)
class RunFolder:
    """The folder of one model: weights or adapter, processor and log if it was trained, and its results."""

    path: Path

    @property
    def is_trained(self) -> bool:
        """Whether a training has ended here."""
        return (self.path / "recipe.json").exists()

    def read_recipe(self) -> dict:
        """`recipe.json`: the recipe's fields, what it started from, settings, prompt and versions."""
        return json.loads((self.path / "recipe.json").read_text())

    def write_recipe(self, provenance: dict) -> None:
        """Write `recipe.json`, which says that the training has ended."""
        write_text(self.path / "recipe.json", json.dumps(provenance, indent=2) + "\n")

    def read_log(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged number, from `trainer_state.json`."""
        history = json.loads((self.path / "trainer_state.json").read_text())["log_history"]
        entries = [entry for entry in history if key in entry]
        return [entry["step"] for entry in entries], [entry[key] for entry in entries]

    def read_records(self) -> list[dict]:
        """The lines of `predictions.jsonl`."""
        return [json.loads(line) for line in (self.path / "predictions.jsonl").read_text().splitlines()]

    def write_records(self, records: Sequence[dict]) -> dict:
        """Write `predictions.jsonl`, and `metrics.json` with metrics and intervals, which are returned."""
        metrics = summarize(records) | {"iou_threshold": 0.5, "intervals": bootstrap_intervals(records)}
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        write_text(self.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics


def write_text(file: Path, text: str) -> None:
    """Write through a temporary file: whoever is interrupted keeps the old file, never half of the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


def save_comparison(output_dir: Path) -> dict[str, dict[str, float | None]]:
    """Gather the metrics of every `metrics.json` below `output_dir` in its `comparison.json`; untrained ones first."""
    files = sorted(output_dir.glob("*/metrics.json"))
    files.sort(key=lambda file: RunFolder(file.parent).is_trained)
    comparison = {
        file.parent.name: {k: v for k, v in json.loads(file.read_text()).items() if not isinstance(v, dict)}
        for file in files
    }
    write_text(output_dir / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    return comparison
