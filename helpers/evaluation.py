"""Measure a file of answers against true boxes.

    python -m helpers.evaluation --predictions FILE.jsonl [--iou 0.5] [--policy merge] [--family qwen2_vl] [--json]

The metrics are those of `helpers.metrics` and `helpers.analysis`; `--help` says what each means.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from helpers.analysis import POLICIES, build_report, list_metrics
from helpers.boxes import FAMILIES, has_area
from helpers.conversation import Task
from helpers.detection import add_answer, normalize_label
from helpers.generation import Answer
from helpers.metrics import boxes_of

LINE_FORMAT = (
    'a line is {"id": ..., "width": pixels, "height": pixels, "raw": "the answer", '
    '"truth": [{"label": ..., "box": [x1, y1, x2, y2] in pixels}, ...]}, with an empty list where there is nothing'
)

LARGEST = 10**7  # pixels that a picture can be wide or high

DEFINITIONS = """\
input: one JSON object a line;
  {line_format}.
  Lines may also have `group` (images of one group are not independent, such as those of one barcode), `resized`
  ([width, height] of the image as the model saw it) and `prediction` (as written by a run: its scores are used where
  its boxes are those in the answer).

metrics (`null` or n/a: not defined, such as a mean over no true boxes):
  mean_iou, median_iou   IoU of an image: mean over its true boxes, predicted boxes assigned one to one so that the sum
                         is largest, 0 where none is left; then mean or median over images with true boxes
  detection_rate         share of images whose answer holds a readable box, right or wrong
  iou_gt_0.5, _0.7       share of images with true boxes whose IoU is above 0.5, above 0.7
  mean_best_iou          for every true box the best IoU, whatever else that box is used for; mean over all true boxes
  precision              hits / predicted boxes, 0 without any. A hit (true positive) is an assigned pair with an IoU
                         from --iou on; boxes are assigned so that there are as many hits as possible
  recall                 hits / true boxes
  f1                     2 hits / (predicted boxes + true boxes)
  malformed_rate         share of images whose answer holds something that looks like a box and cannot be read
  boxes_per_empty_image  predicted boxes on images without true boxes, mean over these images
  mAP, mAP50, mAP75      COCO's average precision: over IoU 0.50, 0.55 ... 0.95; at 0.50; at 0.75; mean over labels.
                         A box without a score counts as 1.0, equal scores rank in the order of the lines
  calibration_error      distance between score and share of hits among boxes of like score, mean over ten bins

  The score of a box is the geometric mean of the probabilities of its tokens. In brackets: 95 % bootstrap intervals,
  2,000 resamples of the images, or of their groups.

boxes: correct (a hit), shifted (IoU from 0.1 up to --iou), duplicate (its true box is taken), background (the rest);
  missed are true boxes without a correct or shifted one, malformed the pieces that could not be read.

confusions: how often each true label was answered with each label, boxes paired by place alone; "(no box)" where
  nothing shares that IoU.

policies: merge: labels do not count (default where the truth has one label). multi-class: labels must agree, up to
  case, spaces, `_` and `-` (default where it has several). table-only: of the true boxes those labelled
  nutrition-table, and all predicted ones.

families (`config.model_type`): Qwen2-VL and Qwen3-VL write boxes on a grid from 0 to 1000, Qwen2.5-VL in pixels of the
  resized image (without `resized`, the model's published pixel budget is assumed).

notebooks/04_evaluation_analysis explains all of it at length.
"""


def read_predictions(path: Path, family: str) -> list[dict]:
    """The records of a JSON Lines file, their answers parsed anew. Blank lines are skipped.

    Raises OSError for a file that cannot be read, ValueError (naming the line) for one that holds something else.
    """
    lines = path.read_bytes().splitlines()
    records = [read_line(line, f"{path}, line {n}", family) for n, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise ValueError(f"{path} is empty: write one line per picture; {LINE_FORMAT}.")
    return records


def read_line(text: bytes, place: str, family: str) -> dict:
    """One line as a record; `place` is for the message. Raises ValueError."""
    try:
        line = json.loads(text)
        json.dumps(line, ensure_ascii=False).encode()  # half a surrogate pair can be read, but not written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {LINE_FORMAT}.") from error
    if problem := describe_line_problem(line):
        raise ValueError(f"{place}: {problem}; {LINE_FORMAT}.")
    return keep_scores(add_answer(line, Answer(line["raw"]), Task("", family=family)), line.get("prediction"))


def keep_scores(record: dict, stored: object) -> dict:
    """The record with the scores of a stored prediction, if that has the same boxes in the same order."""
    if not isinstance(stored, list) or not all(map(is_labelled_box, stored)):
        return record
    if [labelled["box"] for labelled in stored] != boxes_of(record, "prediction"):
        return record
    scores = [{"score": old["score"]} if is_score(old.get("score")) else {} for old in stored]
    return record | {"prediction": [new | score for new, score in zip(record["prediction"], scores, strict=True)]}


def describe_line_problem(line: object) -> str | None:
    """What is wrong with a line of predictions, or None."""
    if not isinstance(line, dict):
        return "not a JSON object"
    missing = [name for name in ("id", "width", "height", "raw", "truth") if name not in line]
    if missing:
        return f"no field {', '.join(missing)}"
    if not is_size([line["width"], line["height"]]) or not is_size(line.get("resized", [1, 1])):
        return "width, height (and resized, where given) must be whole numbers of pixels, at least 1"
    if not isinstance(line.get("group"), str | int | float | None):
        return "group must be a text or a number"
    if not isinstance(line["raw"], str):
        return "raw must be a text"
    if not isinstance(line["truth"], list) or not all(map(is_labelled_box, line["truth"])):
        return "truth must be a list of labelled boxes with x1 < x2 and y1 < y2"
    return None


def is_size(value: object) -> bool:
    """Whether a JSON value is `[width, height]`."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and 1 <= v <= LARGEST for v in value)


def is_score(value: object) -> bool:
    """Whether a JSON value can be a probability."""
    return isinstance(value, int | float) and 0 <= value <= 1


def is_coordinate(value: object) -> bool:
    """Whether a JSON value is a number that pixels can be."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def is_labelled_box(value: object) -> bool:
    """Whether a JSON value is `{"label": text, "box": [x1, y1, x2, y2]}` with an area."""
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return False
    box = value.get("box")
    is_box = isinstance(box, list) and len(box) == 4 and all(map(is_coordinate, box))
    return is_box and has_area(box)


def choose_policy(records: Sequence[dict]) -> str:
    """Labels count where the truth has several of them."""
    labels = {normalize_label(labelled["label"]) for record in records for labelled in record["truth"]}
    return "multi-class" if len(labels) > 1 else "merge"


def print_report(report: dict) -> None:
    """A report as tables for people."""
    for name, value, interval in list_metrics(report):
        print(f"{name:<22}{value:>6}  {interval and f'[{interval}]'}".rstrip())
    print(f"{report['n']} pictures; hits from IoU {report['iou_threshold']} on; labels: {report['policy']}")
    print("boxes: " + ", ".join(f"{count} {kind}" for kind, count in report["errors"].items()))
    if report["labels"]:
        print(pd.DataFrame(report["labels"]).T.to_string(float_format="{:.3f}".format))
        print("true labels (lines), and how they were answered:")
        print(pd.DataFrame(report["confusions"]).T.to_string())


def create_parser() -> argparse.ArgumentParser:
    """The options of the command; `--help` ends with the definitions of the metrics."""
    parser = argparse.ArgumentParser(
        description="Measure predicted boxes against true ones.",
        epilog=DEFINITIONS.format(line_format=LINE_FORMAT.replace('answer", ', 'answer",\n  ')),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU from which on a pair of boxes is a hit")
    parser.add_argument("--policy", choices=POLICIES, help="which labels count, and whether they do")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a file of answers: `python -m helpers.evaluation --predictions FILE.jsonl`. Exit code 2 on bad input."""
    parser = create_parser()
    options = parser.parse_args(arguments)
    if not 0 < options.iou <= 1:
        parser.error(f"--iou {options.iou} is not an IoU: give a number above 0, up to 1")
    try:
        records = read_predictions(options.predictions, options.family)
    except OSError as error:
        parser.error(f"{options.predictions} cannot be read ({error.strerror}): give --predictions an existing file")
    except ValueError as error:
        parser.error(str(error))
    report = build_report(records, options.iou, options.policy or choose_policy(records))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
