"""Boxes for pictures, found by what a training left: an adapter, a full checkpoint, or the merged model.

    python -m helpers.detect --model OUTPUT_DIR/r4-joint PICTURE_OR_FOLDER ... --output FOLDER

FOLDER gets detections.json (COCO results: `bbox` is [x, y, width, height] in pixels of the picture as it is displayed,
`score` the geometric mean of the probabilities of its tokens), images.json (the pictures and categories that the
results refer to by their ids), and every picture with its boxes. With --accept-threshold (`python -m helpers.trust`
names one that keeps a promise) every result says whether it is `accepted`, and boxes that are not are drawn in grey.
--mirrored asks about the mirrored copy of each picture as well: twice the time, somewhat better boxes, other scores
(notebooks/08_trust). In Python:

    from helpers.detect import Detector

    detector = Detector.from_pretrained("OUTPUT_DIR/merged")
    print(detector.detect([Image.open("photograph.jpg")]))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from matplotlib.font_manager import findfont
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from helpers import generation
from helpers.data import describe_problem, to_upright_rgb
from helpers.detection import evaluate_detector
from helpers.import_dataset import SUFFIXES
from helpers.ladder import evaluate_best_rung
from helpers.plots import PREDICTION_COLOUR
from helpers.runs import write_json
from helpers.training import load_detector

AT_ONCE = 256  # pictures after which drawings are written
ABSTAINED_COLOUR = "#737373"


class Detector(generation.Detector):
    """A detector that is loaded from what a training left."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, max_new_tokens: int = 256, batch_size: int | None = None) -> Detector:
        """The model in `folder`, asked as it was trained. Raises FileNotFoundError for a folder of something else."""
        if not (Path(folder) / "recipe.json").is_file():
            reason = "there is no recipe.json in it, which says what to ask"
            raise FileNotFoundError(f"{folder} is not what a training of this project left: {reason}.")
        limits = SimpleNamespace(max_pixels=10**9, max_new_tokens=max_new_tokens, eval_batch_size=batch_size)
        return cls(**vars(load_detector(Path(folder), limits)))

    def detect(self, images: Sequence[Image.Image | str], mirrored: bool = False) -> list[list[dict]]:
        """The objects in each image or file: `{"label", "box", "score"}`, boxes in pixels of the upright image."""
        return [record["prediction"] for record in self.ask(list(images), mirrored=mirrored)]

    def ask(
        self, images: Sequence[Image.Image | str], show_progress: bool = False, mirrored: bool = False
    ) -> list[dict]:
        """Records of images, as of `helpers.detection.evaluate_detector`; `mirrored`: by `helpers.ladder.BEST`."""
        nothing, encoded = [{"bbox": [], "category_name": []}] * len(images), [*map(encode, images)]
        rows = Dataset.from_dict({"image_id": [*map(str, range(len(images)))], "image": encoded, "objects": nothing})
        evaluate = evaluate_best_rung if mirrored else evaluate_detector
        return evaluate(self, rows.cast_column("image", ImageFeature()), show_progress)


def encode(image: Image.Image | str) -> dict:
    """An image, or the content of an image file, as a dataset stores it."""
    if isinstance(image, Image.Image):
        return ImageFeature().encode_example(image)
    return {"bytes": Path(image).read_bytes(), "path": None}


def find_pictures(places: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures among files and below folders, and what cannot be used, with the reason."""
    files, pictures, problems = [], [], []
    for place in places:
        below = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        files += below if place.is_dir() else [place]
    for file in dict.fromkeys(files):
        problem = describe_file_problem(file)
        problems += [f"{file}: {problem}"] if problem else []
        pictures += [] if problem else [file]
    return pictures, problems


def describe_file_problem(file: Path) -> str | None:
    """Why a file cannot be asked about, or None: what keeps a row of a dataset out keeps it out, too."""
    try:
        return describe_problem({"image": {"bytes": file.read_bytes(), "path": None}, "objects": {"bbox": []}})
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def draw(file: Path, found: Sequence[dict]) -> Image.Image:
    """The picture as it is displayed, with boxes, labels and scores; what is not accepted is grey."""
    with Image.open(file) as image:
        upright = to_upright_rgb(image)
    if not found:
        return upright
    boxes = torch.tensor([labelled["box"] for labelled in found])
    names = [f"{labelled['label']} {labelled['score']:.2f}" for labelled in found]
    size = max(12, max(upright.size) // 50)
    font = {"font": findfont("DejaVu Sans"), "font_size": size}
    chosen = [PREDICTION_COLOUR if labelled.get("accepted", True) else ABSTAINED_COLOUR for labelled in found]
    colours = {"colors": chosen, "label_background_colors": chosen, "label_colors": "white"}
    style = font | colours | {"fill_labels": True, "width": max(2, size // 8)}
    return to_pil_image(draw_bounding_boxes(pil_to_tensor(upright), boxes, names, **style))


def to_results(records: Sequence[dict], labels: Sequence[str]) -> list[dict]:
    """COCO's results of the records of images 1, 2, ...; labels are numbered from 1."""
    numbers = {label: number for number, label in enumerate(labels, start=1)}
    return [
        {
            "image_id": number,
            "category_id": numbers[labelled["label"]],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": labelled["score"],
        }
        | {name: labelled[name] for name in ("accepted",) if name in labelled}
        for number, record in enumerate(records, start=1)
        for labelled in record["prediction"]
        for x1, y1, x2, y2 in [labelled["box"]]
    ]


def write_results(pictures: Sequence[Path], records: Sequence[dict], known: Sequence[str], output: Path) -> None:
    """detections.json and images.json; labels that the task does not name come after those that it does."""
    answered = {labelled["label"] for record in records for labelled in record["prediction"]}
    labels = [*known, *sorted(answered - set(known))]
    sizes = [{"width": record["width"], "height": record["height"]} for record in records]
    images = [
        {"id": n, "file_name": str(p)} | s for n, (p, s) in enumerate(zip(pictures, sizes, strict=True), start=1)
    ]
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, start=1)]
    write_json(output / "images.json", {"images": images, "categories": categories})
    write_json(output / "detections.json", to_results(records, labels))


def mark_accepted(boxes: Sequence[dict], threshold: float | None) -> list[dict]:
    """Boxes that say whether they are `accepted`, from this score on; without a threshold as they are."""
    return [box if threshold is None else box | {"accepted": box["score"] >= threshold} for box in boxes]


def describe_accepted(records: Sequence[dict]) -> str:
    """How many boxes are accepted, and how many pictures are left for a person."""
    accepted = [[box["accepted"] for box in record["prediction"]] for record in records]
    doubtful = sum(not (any(boxes) and all(boxes)) for boxes in accepted)
    return f"{sum(map(sum, accepted))} boxes accepted; {doubtful} pictures with another box, or none, are for a person"


def detect_files(detector: Detector, pictures: Sequence[Path], options: argparse.Namespace) -> list[dict]:
    """Ask about the pictures, and write each with its boxes; returns their records."""
    records = []
    for start in range(0, len(pictures), AT_ONCE):
        some = pictures[start : start + AT_ONCE]
        found = detector.ask([*map(str, some)], show_progress=True, mirrored=options.mirrored)
        for number, (file, record) in enumerate(zip(some, found, strict=True), start + 1):
            kept = [labelled for labelled in record["prediction"] if labelled["score"] >= options.threshold]
            kept = mark_accepted(kept, options.accept_threshold)
            records.append(record | {"prediction": kept})
            draw(file, kept).save(options.output / f"{number:05d}-{file.stem}.jpg")
    return records


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path, help="files, or folders that are searched for pictures")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="what a training left, or merged/")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--threshold", type=float, default=0.0, help="boxes with a lower score are left out")
    accepted = "boxes from this score on are marked as accepted, others as not: see helpers.trust"
    parser.add_argument("--accept-threshold", type=float, metavar="SCORE", help=accepted)
    mirrored = "ask about the mirrored copy as well: twice the time, somewhat better boxes, other scores"
    parser.add_argument("--mirrored", action="store_true", help=mirrored)
    parser.add_argument("--batch-size", type=int, help="pictures at once; default: what fits into the memory")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="one box takes 23 tokens or so")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    pictures, problems = find_pictures(options.pictures)
    for problem in problems:
        print(f"left out: {problem}")
    if not pictures:
        parser.error("no picture can be read: give files or folders of pictures")
    try:
        detector = Detector.from_pretrained(options.model, options.max_new_tokens, options.batch_size)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    records = detect_files(detector, pictures, options)
    write_results(pictures, records, detector.task.labels, options.output)
    boxes = sum(len(record["prediction"]) for record in records)
    print(f"{boxes} boxes on {len(pictures)} pictures: {options.output / 'detections.json'}")
    if options.accept_threshold is not None:
        print(describe_accepted(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
