"""A duel: a specialist detector beside the fine-tuned VLM, trained on the same images, measured by the same records.

    python -m helpers.duel --parameters helpers/tiny/demo.yaml --output-dir outputs/duel
    python -m helpers.duel --parameters FILE.yaml --sizes 25 100 all --pretrained    # COCO's weights, from torchvision

The specialist is torchvision's Faster R-CNN with a MobileNetV3 (19 million parameters). Without --pretrained it starts
from nothing, while the VLM starts from a model that has seen such images: then the duel says what that is worth, not
which architecture is better. For each number of labelled images both are trained for a fixed number of steps and asked
about the evaluation split; OUTPUT_DIR/duel.json gathers metrics with intervals and seconds. What is there is not done
again.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from helpers.analysis import compute_map
from helpers.boxes import flip_horizontally
from helpers.conversation import Task
from helpers.data import Mirroring, Splits, load_splits, read_row
from helpers.detection import evaluate_detector, number_labels, to_record
from helpers.loading import release_memory
from helpers.metrics import (
    assigned_ious,
    bootstrap_intervals,
    compute_ious,
    percentile_interval,
    resample_weights,
    summarize,
)
from helpers.recipes import CATALOGUE
from helpers.runs import RunFolder, write_json
from helpers.train_recipe import build_parser, parse, read_notebook_settings, to_settings
from helpers.training import load_detector, run_recipe

SHOWN = 0.5  # a box with at least this score counts for the mean IoU; average precision takes all of them
METRICS = ["mean_iou", "iou_gt_0.5", "iou_gt_0.7"]


@dataclass(frozen=True)
class Schedule:
    """How the specialist is trained: AdamW with a learning rate that rises, then falls along a cosine."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 5e-4


# The specialist


def build_specialist(labels: Sequence[str], side: int, pretrained: bool) -> torch.nn.Module:
    """Faster R-CNN for these labels and the background; the shorter side of an image is resized to `side` pixels."""
    weights = {"weights": "DEFAULT"} if pretrained else {"weights": None, "weights_backbone": None}
    model = fasterrcnn_mobilenet_v3_large_fpn(**weights, min_size=side, max_size=2 * side)
    width = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(width, len(labels) + 1)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def to_example(row: dict, labels: Sequence[str], mirrored: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A row as torchvision takes it: image (3, height, width) in 0..1, boxes in pixels, labels from 1 on."""
    image, boxes, names = read_row(row)
    if mirrored:
        image, boxes = flip_horizontally(image, boxes)
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)}
    return to_tensor(image), target | {"labels": torch.tensor([1 + labels.index(name) for name in names]).long()}


def draw_batches(splits: Splits, schedule: Schedule, mirroring: Mirroring) -> DataLoader:
    """Batches of `to_example` for all steps: the images in a new order each epoch, mirrored as for the VLM."""
    size, wanted = len(splits.train), schedule.steps * schedule.batch_size
    generator = np.random.default_rng(mirroring.seed)
    order = np.concatenate([generator.permutation(size) for _ in range(-(-wanted // size))])[:wanted]

    def collate(places: list[tuple[int, int]]) -> list:
        rows = [(place // size, splits.train[int(number)]) for place, number in places]
        flips = [replace(mirroring, epoch=epoch).applies_to(row["image_id"]) for epoch, row in rows]
        return [to_example(row, splits.labels, flip) for (_, row), flip in zip(rows, flips, strict=True)]

    workers = min(8, os.cpu_count() // 2) if torch.cuda.is_available() else 0
    return DataLoader(list(enumerate(order)), batch_size=schedule.batch_size, collate_fn=collate, num_workers=workers)


def train_specialist(splits: Splits, schedule: Schedule, settings: SimpleNamespace, pretrained: bool):
    """Train the specialist on the training split; returned in evaluation mode."""
    torch.manual_seed(settings.seed)
    side = min(read_row(splits.train[0])[0].size)
    model = build_specialist(splits.labels, side, pretrained).train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, schedule.steps, pct_start=0.1)
    batches = draw_batches(splits, schedule, Mirroring(settings.flip_probability, settings.seed))
    for batch in tqdm(batches, desc="specialist", unit="step", mininterval=5):
        images = [image.to(device) for image, _ in batch]
        targets = [{name: tensor.to(device) for name, tensor in target.items()} for _, target in batch]
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        rates.step()
    return model.eval()


@torch.inference_mode()
def evaluate_specialist(model: torch.nn.Module, rows: Dataset, labels: Sequence[str]) -> list[dict]:
    """One record per image, as of `evaluate_detector`; predictions are all boxes that the model gives, with scores."""
    records, device, task = [], next(model.parameters()).device, Task("", labels)
    loader = DataLoader(range(len(rows)), batch_size=16, collate_fn=lambda numbers: [rows[n] for n in numbers])
    for batch in tqdm(loader, desc="evaluating", unit="batch", mininterval=5):
        found = model([to_tensor(read_row(row)[0]).to(device) for row in batch])
        for row, answer in zip(batch, found, strict=True):
            columns = (answer[name].tolist() for name in ("labels", "boxes", "scores"))
            boxes = [
                {"label": labels[n - 1], "box": box, "score": score} for n, box, score in zip(*columns, strict=True)
            ]
            record = to_record(row, task) | {"prediction": number_labels(boxes, labels)}
            records.append(record | {"raw": "", "unread": []} | {"iou": mean_iou_of(record)})
    return records


def mean_iou_of(record: dict) -> float | None:
    """Mean one-to-one IoU of the true boxes of a record with boxes that are sure enough; None without true boxes."""
    ious = assigned_ious(compute_ious(record["truth"], keep_sure(record)["prediction"]))
    return float(ious.mean()) if len(ious) else None


def keep_sure(record: dict) -> dict:
    """A record with the predicted boxes whose score is at least SHOWN; boxes without a score are kept."""
    return record | {"prediction": [box for box in record["prediction"] if box.get("score", 1.0) >= SHOWN]}


# The duel


def take(splits: Splits, size: int) -> Splits:
    """The splits with `size` training images."""
    return replace(splits, train=splits.train.select(range(size)))


def bootstrap_map(records: Sequence[dict], resamples: int = 200) -> tuple[float, float] | None:
    """95 % interval of `compute_map`'s mAP over resampled images: COCO's evaluation, once for each resample."""
    drawn = np.concatenate(list(resample_weights(records, resamples)))
    samples = ([r for r, count in zip(records, row, strict=True) for _ in range(count)] for row in drawn)
    values = [compute_map(sample)["mAP"] for sample in tqdm(samples, "resampling", resamples, mininterval=5)]
    return percentile_interval(np.array(values, dtype=float))


def measure(records: Sequence[dict], is_specialist: bool) -> dict:
    """Average precision of all boxes; IoU of those that are sure enough; 95 % intervals."""
    shown = [keep_sure(record) for record in records] if is_specialist else records
    values, intervals = summarize(shown), bootstrap_intervals(shown)
    precision = compute_map(records) | {"mAP_interval": bootstrap_map(records)}
    return precision | {name: [values[name], *intervals[name]] for name in METRICS}


def fight(who: str, splits: Splits, settings: SimpleNamespace, options: argparse.Namespace) -> dict:
    """Train one of the two on the splits and measure it: metrics, seconds of training, images per second."""
    started = time.perf_counter()
    if who == "specialist":
        model = train_specialist(splits, Schedule(options.steps), settings, options.pretrained)
    else:
        run = run_recipe(CATALOGUE[who], settings, splits)
        release_memory()
        model = load_detector(run.path, settings)
    trained = time.perf_counter()
    if who == "specialist":
        records = evaluate_specialist(model, splits.evaluation, splits.labels)
    else:
        records = evaluate_detector(model, splits.evaluation)
    seconds = time.perf_counter() - trained
    RunFolder(Path(settings.output_dir) / who).write_records(records)
    numbers = {"seconds of training": trained - started, "images per second": len(records) / seconds}
    return measure(records, who == "specialist") | numbers


def build_duel_parser(settings: dict) -> argparse.ArgumentParser:
    """The options of helpers.train_recipe, and those of the duel."""
    parser = build_parser(settings)
    parser.description = __doc__
    parser.set_defaults(recipe=["r4-joint"])
    next(action for action in parser._actions if action.dest == "recipe").required = False
    parser.add_argument("--sizes", nargs="+", default=["25", "50", "100", "200", "500", "all"], help="training images")
    parser.add_argument("--steps", type=int, default=2000, help="of the specialist, 16 images each")
    parser.add_argument("--pretrained", action="store_true", help="start the specialist from COCO's weights")
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Command line; see the module's docstring. Returns what it writes."""
    known = read_notebook_settings()
    options = parse(parser := build_duel_parser(known), known, argv)
    settings, output = to_settings(options), Path(options.output_dir)
    try:
        splits = load_splits(settings)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    whole = len(splits.train)
    sizes = [whole if size == "all" else int(size) for size in options.sizes]
    if max(sizes) > whole or min(sizes) < 1:
        parser.error(f"--sizes {' '.join(options.sizes)}: there are {whole} images to train on")
    for size in sizes:
        for who in (*options.recipe, "specialist"):
            file = output / str(size) / who / "duel.json"
            if not file.exists():
                settings.output_dir = str(output / str(size))
                write_json(file, {"who": who, "images": size} | fight(who, take(splits, size), settings, options))
                release_memory()
    results = [json.loads(file.read_text()) for file in output.glob("*/*/duel.json")]
    results.sort(key=lambda line: (line["images"], line["who"]))
    write_json(output / "duel.json", results)
    print("\n".join(map(json.dumps, results)))
    return results


if __name__ == "__main__":
    main()
