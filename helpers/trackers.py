"""What trackers get besides the curves, which the Trainer sends: how a run was made, and its final table."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from helpers.runs import RunFolder


def log_result(run: RunFolder, settings: SimpleNamespace, metrics: dict) -> None:
    """Add settings and final metrics to what the tracker of REPORT_TO has of a run, and end it there."""
    intervals = {name: pair for name, pair in metrics["intervals"].items() if pair}
    values = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    table = pd.Series(values, name="value").to_frame().join(pd.DataFrame(intervals, index=["low", "high"]).T)
    scalars = {f"final/{name}": float(value) for name, value in values.items()}
    add = {"tensorboard": add_to_tensorboard, "trackio": add_to_trackio, "wandb": add_to_wandb}
    if settings.report_to in add:
        add[settings.report_to](run, table, scalars)


def add_to_tensorboard(run: RunFolder, table: pd.DataFrame, scalars: dict[str, float]) -> None:
    """Texts are indented: Markdown leaves them as they are then."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        for name, text in {"settings": json.dumps(run.read_recipe(), indent=2), "final": str(table)}.items():
            writer.add_text(name, re.sub("^", "    ", text, flags=re.MULTILINE))
        for name, value in scalars.items():
            writer.add_scalar(name, value)


def add_to_trackio(run: RunFolder, table: pd.DataFrame, scalars: dict[str, float]) -> None:
    """The Trainer has ended the run: it is opened again by its name."""
    import trackio

    made = run.read_recipe()
    project = os.environ.get("WANDB_PROJECT", Path(made["settings"]["output_dir"]).resolve().name)  # as in training
    trackio.init(project, made["name"], config=made, resume="allow")
    trackio.log(scalars | {"final": trackio.Table(dataframe=table.reset_index(names="metric"))})
    trackio.finish()


def add_to_wandb(run: RunFolder, table: pd.DataFrame, scalars: dict[str, float]) -> None:
    """The run is still open, unless its training was skipped."""
    import wandb

    if wandb.run:
        wandb.config.update(run.read_recipe(), allow_val_change=True)
        wandb.summary.update(scalars)
        wandb.log({"final": wandb.Table(dataframe=table.reset_index(names="metric"))})
        wandb.finish()
