"""Labels ranked by how much a model that did not see them disagrees; mistakes planted to try that.

Printed from notebooks/08_trust.py: edit that, then run `make sync`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from datasets import Dataset

from helpers.analysis import collect_scores, drop_categories
from helpers.boxes import Box, box_iou
from helpers.data import read_row
from helpers.detection import normalize_label
from helpers.metrics import assign_boxes, compute_ious
from helpers.trust import calibrate, fit_platt

SAME_PLACE = 0.1  # IoU from which on a found box of the same name is about a label's object; of another name, SWAPPED
SWAPPED = 0.5
NOTHING_FOUND = {"found_label": None, "found_box": None, "score": None, "iou": None}
NO_LABEL = {"number": None, "label": None, "box": None, "iou": None}


def list_suspects(records: Sequence[dict]) -> list[dict]:
    """Every label of the records (their truth), and every box found where there is none, most suspicious first.

    Each has image_id, kind, suspicion (0..1), number (of the label on its image), label, box (pixels), and of what was
    found there found_label, found_box, score (calibrated) and iou, None where there is nothing. The records are to be
    those of models that did not see the labels. Raises ValueError where scores cannot be calibrated.
    """
    rescored = calibrate(records, fit_platt(*collect_scores(records)))
    suspects = [suspect for record in rescored for suspect in suspect_image(record)]
    labels = pd.DataFrame([suspect for suspect in suspects if suspect["kind"] != "missing"])
    seen = 1 - (labels.kind == "surplus").groupby(labels.label.map(normalize_label)).mean()
    ious = labels.iou[labels.kind == "shifted"].to_numpy(dtype=float)
    for suspect in suspects:
        if suspect["kind"] == "surplus":
            suspect["suspicion"] = float(seen[normalize_label(suspect["label"])])
        if suspect["kind"] == "shifted":
            suspect["suspicion"] *= float(np.mean(ious > suspect["iou"]))
    return sorted(suspects, key=lambda suspect: -suspect["suspicion"])


def pair_by_place(record: dict) -> dict[int, int]:
    """For each label the found box that is about the same object, if there is one; by their numbers."""
    sides = [record["truth"], record["prediction"]]
    names = [[normalize_label(labelled["label"]) for labelled in side] for side in sides]
    ious = compute_ious(*map(drop_categories, sides))
    same = np.reshape([[one == other for other in names[1]] for one in names[0]], ious.shape)
    ious = ious * (ious >= np.where(same, SAME_PLACE, SWAPPED))
    rows, columns = assign_boxes(ious, SAME_PLACE)
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True) if ious[row, column] > 0}


def suspect_image(record: dict) -> list[dict]:
    """The suspects of one image, each as suspicious as the found box is probable, 1 where nothing was found."""
    truth, found, pairs = record["truth"], record["prediction"], pair_by_place(record)
    suspects = [
        suspect_label(label, found[pairs[number]] if number in pairs else None) | {"number": number}
        for number, label in enumerate(truth)
    ]
    for number, box in enumerate(found):
        if number not in pairs.values():
            suspects.append({"kind": "missing", "suspicion": box["score"]} | NO_LABEL | describe_found(box))
    return [{"image_id": record["id"]} | suspect for suspect in suspects]


def describe_found(box: dict) -> dict:
    """A found box as a suspect names it."""
    return {"found_label": box["label"], "found_box": box["box"], "score": box["score"]}


def suspect_label(label: dict, box: dict | None) -> dict:
    """What may be wrong with a label, given the box that was found in its place, if any."""
    known = {"label": label["label"], "box": label["box"]}
    if box is None:
        return {"kind": "surplus", "suspicion": 1.0} | known | NOTHING_FOUND
    kind = "shifted" if normalize_label(label["label"]) == normalize_label(box["label"]) else "swapped"
    iou = float(box_iou([label["box"]], [box["box"]])[0, 0])
    return {"kind": kind, "suspicion": box["score"]} | known | describe_found(box) | {"iou": iou}


MISTAKES = ("shifted", "missing", "swapped", "surplus")


def plant_mistakes(rows: Dataset, share: float, seed: int) -> tuple[Dataset, list[dict]]:
    """Rows with a share of their labels spoilt, at most one an image, and what was planted.

    Planted: image_id, mistake, number (of the spoilt label on its image, None if it is missing) and box (pixels, of
    the object whose label was spoilt). The kinds of mistakes take turns; without a second class, none is swapped.
    """
    generator, objects = np.random.default_rng(seed), [split_objects(columns) for columns in rows["objects"]]
    labels = {labelled["category_name"]: labelled for row in objects for labelled in row}
    kinds, planted = [kind for kind in MISTAKES if kind != "swapped" or len(labels) > 1], []
    places = [(row, number) for row, labelled in enumerate(objects) for number in range(len(labelled))]
    one_each = dict(places[n] for n in generator.permutation(len(places)))  # image: label
    for turn, (row, number) in enumerate(list(one_each.items())[: round(share * len(places))]):
        mistake, box, name = (
            kinds[turn % len(kinds)],
            read_row(rows[row])[1][number],
            objects[row][number]["category_name"],
        )
        other = generator.choice([labels[other] for other in labels if other != name] or [objects[row][number]])
        objects[row] = spoil(objects[row], number, mistake, other, generator)
        place = {"missing": None, "surplus": len(objects[row]) - 1}.get(mistake, number)
        planted.append({"image_id": rows["image_id"][row], "mistake": mistake, "number": place, "box": box})
    names = list(rows["objects"][0])

    def join(_: dict, row: int) -> dict:
        return {"objects": {name: [labelled[name] for labelled in objects[row]] for name in names}}

    return rows.map(join, with_indices=True, input_columns="objects"), planted


def split_objects(columns: dict[str, list]) -> list[dict]:
    """The objects of a row, one dictionary each."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def spoil(
    objects: Sequence[dict], number: int, mistake: str, other: dict, generator: np.random.Generator
) -> list[dict]:
    """The objects of an image with a mistake in one of them; `other` is an object of another class."""
    spoilt = [*objects]
    if mistake == "missing":
        del spoilt[number]
    elif mistake == "swapped":
        spoilt[number] = other | {"bbox": objects[number]["bbox"]}
    elif mistake == "shifted":
        spoilt[number] = objects[number] | {"bbox": shift(objects[number]["bbox"])}
    else:
        room = find_room(objects[number]["bbox"], [labelled["bbox"] for labelled in objects], generator)
        spoilt.append(objects[number] | {"bbox": room})
    return spoilt


def shift(box: Box, by: float = 0.3) -> list[float]:
    """A box in 0..1 moved by a part of its width and height, away from the nearer edges, and clamped to the image."""
    first, last = np.reshape(box, (2, 2))
    moved = np.reshape(box, (2, 2)) + by * (last - first) * np.where(first + last < 1, 1, -1)
    return moved.clip(0, 1).ravel().tolist()


def find_room(box: Box, others: Sequence[Box], generator: np.random.Generator) -> list[float]:
    """Where on the image a copy of a box in 0..1 overlaps the others least, of 200 random places."""
    size = np.array(box[2:]) - box[:2]
    corners = generator.random((200, 2)) * (1 - size)
    places = np.concatenate([corners, corners + size], axis=1)
    return places[box_iou(places, others).max(axis=1).argmin()].tolist()


def rank_planted(suspects: Sequence[dict], planted: Sequence[dict]) -> list[int | None]:
    """For every planted mistake its place in the list of suspects, from 0 on; None where it is not in it."""

    def is_it(suspect: dict, mistake: dict) -> bool:
        if suspect["image_id"] != mistake["image_id"] or suspect["number"] != mistake["number"]:
            return False
        return mistake["number"] is not None or box_iou([suspect["found_box"]], [mistake["box"]])[0, 0] >= 0.5

    return [next((n for n, suspect in enumerate(suspects) if is_it(suspect, one)), None) for one in planted]
