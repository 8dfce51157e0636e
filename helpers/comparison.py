"""What a result is held against: the base, the box that never looks, the other recipes; the best of them, merged."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

from helpers.conversation import create_task
from helpers.data import Splits, describe_boxes, median_box
from helpers.detection import answer_with_same_box, evaluate_detector
from helpers.loading import best_dtype, load_model, load_processor, release_memory
from helpers.locks import take_turns
from helpers.metrics import compare_records, compare_table
from helpers.results import merge_whole
from helpers.runs import RunFolder, save_comparison, write_json
from helpers.training import create_detector, hash_rows, hash_weights

BASELINES = ("base", "same-box")
SHOWN = ["mean_iou", "iou_gt_0.5", "iou_gt_0.7", "f1", "malformed_rate", "n"]
DIFFERENCE = "{first} -> {second}: {difference:+.3f} [{low:+.3f}, {high:+.3f}] mean IoU: {verdict}"


def measure_baselines(settings: SimpleNamespace, splits: Splits) -> None:
    """Records and metrics of the base in 4 bits and of the box that never looks, in OUTPUT_DIR/base and /same-box.

    Nobody is asked where both are there, made from the same weights, images, task and limits.
    """
    about = describe_baselines(settings, splits)
    base, same_box = (RunFolder(Path(settings.output_dir) / name) for name in BASELINES)
    base.path.mkdir(parents=True, exist_ok=True)
    with take_turns(base.path):
        if read_about(base) == read_about(same_box) == about:
            return
        records = ask_base(settings, splits)
        boxes = describe_boxes(splits.train)
        always = answer_with_same_box(records, median_box(boxes), boxes.category.mode()[0])
        base.write_records(records, about)
        same_box.write_records(always, about)


def describe_baselines(settings: SimpleNamespace, splits: Splits) -> dict:
    """All that the baselines' figures depend on."""
    task = create_task(load_processor(settings.model_id, settings.max_pixels), splits.labels, settings)
    about = {"max_new_tokens": settings.max_new_tokens, "max_pixels": settings.max_pixels} | asdict(task)
    about |= {"base_hash": hash_weights(settings.model_id), "rows": hash_rows(splits.evaluation)}
    return json.loads(json.dumps(about | {"train_rows": hash_rows(splits.train)}))


def read_about(run: RunFolder) -> dict | None:
    """What the figures in a folder are about, None where there are none."""
    file = run.path / "metrics.json"
    return json.loads(file.read_text())["about"] if file.exists() else None


def ask_base(settings: SimpleNamespace, splits: Splits) -> list[dict]:
    """The records of the model before training, in 4 bits as in the notebook."""
    model = load_model(settings.model_id, quantized=True, dtype=best_dtype())
    records = evaluate_detector(create_detector(model.eval(), settings, splits.labels), splits.evaluation)
    del model
    release_memory()
    return records


def compare(output_dir: Path) -> tuple[dict[str, dict], list[dict]]:
    """Write `comparison.json` and `differences.json`; returns metrics by model, and paired differences with verdicts.

    Returned is what was measured on the base's images; the merged model is not one more.
    """
    with take_turns(output_dir):
        metrics = save_comparison(output_dir)
        records = {name: RunFolder(output_dir / name).read_records() for name in metrics if name != "merged"}
        if others := drop_other_images(records):
            print(f"measured on other images than the base, not compared with it: {', '.join(others)}")
        differences = compare_pairs({name: r for name, r in records.items() if metrics[name]["mean_iou"] is not None})
        write_json(output_dir / "differences.json", differences)
    print(describe(records, differences))
    return {name: metrics[name] for name in records}, differences


def drop_other_images(records_by_name: dict[str, Sequence[dict]]) -> list[str]:
    """Take out the models that were measured on other images than the first one; returns their names."""
    images = {name: [record["id"] for record in records] for name, records in records_by_name.items()}
    others = [name for name in images if images[name] != next(iter(images.values()))]
    for name in others:
        del records_by_name[name]
    return others


def compare_pairs(records_by_name: dict[str, Sequence[dict]]) -> list[dict]:
    """`compare_records` for every pair of models: how much more the second one has."""
    pairs = combinations(records_by_name.items(), 2)
    return [{"first": a, "second": b} | compare_records(first, second) for (a, first), (b, second) in pairs]


def describe(records_by_name: dict[str, Sequence[dict]], differences: Sequence[dict]) -> str:
    """Metrics with 95 % intervals as a table, and a line for each difference."""
    lines = [DIFFERENCE.format(**difference) for difference in differences]
    note = ["About one in twenty such intervals excludes 0 by chance."] if lines else []
    return "\n".join([compare_table(records_by_name)[SHOWN].to_string(), "", *lines, *note])


def merge_best(output_dir: Path, metrics: dict[str, dict], settings: SimpleNamespace) -> Path:
    """Write the recipe with the highest mean IoU without adapters into OUTPUT_DIR/merged, which is returned.

    It gets its name when it was measured and found no further off than 0.01 mean IoU; else ValueError.
    """
    best, merged = find_best(output_dir, metrics), output_dir / "merged"
    if is_merged(best, merged) and not settings.again:
        print(f"{merged}: {best.path.name} was merged already, skipped")
        return merged
    merge_whole(best, settings, merged)
    print(f"{merged}: {best.path.name} without adapters, mean IoU at most 0.01 off")
    return merged


def find_best(output_dir: Path, metrics: dict[str, dict]) -> RunFolder:
    """Of the trained recipes, the one with the highest mean IoU."""
    ious = {name: values["mean_iou"] or 0 for name, values in metrics.items() if name not in BASELINES}
    return RunFolder(output_dir / max(ious, key=ious.get))


def is_merged(run: RunFolder, merged: Path) -> bool:
    """Whether a folder holds what this run trained, merged and measured."""
    made = RunFolder(merged)
    return (merged / "metrics.json").exists() and made.read_recipe() == run.read_recipe() | {"precision": "bf16"}
