"""Trackers, offline: each training is a run of its own there, with its name, settings and table; and it ends."""

import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.recipes import CATALOGUE
from helpers.trackers import log_result
from helpers.training import evaluate_run, run_recipe

R1, R2, R3, R4 = CATALOGUE.values()
COLLATOR_RUN = replace(R1, name="collators/v1-all-tokens", collator="v1-all-tokens")
NAMES = ["collators/v1-all-tokens", "r3-two-stage/stage1", "r3-two-stage"]

pytestmark = [pytest.mark.slow, pytest.mark.campaign]


@pytest.fixture(scope="module")
def tracked(make_settings, splits, tmp_path_factory):
    """The folder in which recipes were trained one after the other in this process, as the notebook does."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported, as TRL's GRPO does
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            patch.delitem(sys.modules, name)

        def train(tracker):
            changes = {"report_to": tracker, "max_steps": 2, "evaluations": 1, "max_new_tokens": 4}
            settings = make_settings(folder / f"my-{tracker}", **changes)
            for recipe in (COLLATOR_RUN, R3):
                run = run_recipe(recipe, settings, splits)
                log_result(run, settings, evaluate_run(run, settings, splits.evaluation.select(range(2))))
            return Path(settings.output_dir)

        yield train


def read_wandb(file):
    """The records of a run that W&B keeps in a file: blocks of 32 KiB, in which records have 7 bytes in front."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 < len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb(tracked):
    folder = tracked("wandb").parent / "wandb"
    import wandb

    wandb.teardown()  # its service writes what it has
    runs = [list(read_wandb(file)) for file in sorted(folder.glob("offline-run-*/*.wandb"), key=os.path.getctime)]
    begun = [next(record.run for record in run if record.HasField("run")) for run in runs]
    assert [(run.project, run.display_name) for run in begun] == [("my-wandb", name) for name in NAMES]
    made = [{i.key: i.value_json for r in run for i in r.config.update} for run in runs]
    assert [settings.get("train_vision") for settings in made] == ['"frozen"', None, '"frozen"']
    assert [settings["max_steps"] for settings in made] == ["2", "2", "2"]
    for run in runs:
        assert [record.exit.exit_code for record in run if record.HasField("exit")] == [0]
        logged = [{"/".join(i.nested_key) or i.key: i.value_json for i in r.history.item} for r in run]
        steps = [int(row["train/global_step"]) for row in logged if "train/global_step" in row]
        assert steps == sorted(steps)
        assert steps[-1] == 2
    finals = [{"/".join(i.nested_key) or i.key for r in run for i in r.summary.update} for run in runs]
    assert ["final/mean_iou" in names for names in finals] == [True, False, True]
    tables = [*folder.glob("offline-run-*/files/media/table/*.json")]
    assert [json.loads(file.read_text())["columns"] for file in tables] == [["metric", "value", "low", "high"]] * 2


def test_trackio(tracked):
    folder = tracked("trackio").parent / "trackio"
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    assert folder == TRACKIO_DIR
    assert SQLiteStorage.get_runs("my-trackio") == NAMES
    for name in NAMES:
        logged = SQLiteStorage.get_logs("my-trackio", name)
        steps = [row["train/global_step"] for row in logged if "train/global_step" in row]
        assert steps == sorted(steps)
        assert steps[-1] == 2
        assert (len(logged[-1]["final"]["_value"]) > 5 if "stage1" not in name else "final" not in logged[-1]) is True
    made = SQLiteStorage.get_run_config("my-trackio", "r3-two-stage")
    assert (made["precision"], made["settings"]["max_steps"]) == ("nf4", 2)


def test_tensorboard(tracked):
    folder = tracked("tensorboard")
    assert sorted(str(file.parent.relative_to(folder)) for file in folder.rglob("events.out*")) == [
        "collators/v1-all-tokens/tensorboard",
        "collators/v1-all-tokens/tensorboard",
        "r3-two-stage/stage1/tensorboard",
        "r3-two-stage/tensorboard",
        "r3-two-stage/tensorboard",
    ]
    events = EventAccumulator(str(folder / "r3-two-stage/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/mean_iou")] == [0, 2]
    assert {"eval/loss", "train/grad_norm_language_model", "final/mean_iou"} <= set(events.Tags()["scalars"])
    assert '"precision": "nf4"' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
