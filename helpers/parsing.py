"""Answers of Qwen-VL models, text or JSON, to labels and boxes.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import json
import re
from dataclasses import dataclass, field

from helpers.boxes import has_area

NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
# (x1,y1),(x2,y2), also [x1,y1,x2,y2] and mixtures
BOX = rf"[(\[]{NUMBER},{NUMBER}(?:[)\]]\s*,?\s*[(\[]|,){NUMBER},{NUMBER}[)\]]"
ATTEMPT = "|".join(
    [
        rf"[(\[]{NUMBER},(?:(?!{BOX})[-\d\s.,()\[\]])*",  # begins like a box
        r"[(\[]\s*-?[\d.]*\s*$",  # cut off after the bracket
        rf"<\|?box(?:_start)?\|?>(?!\s*{BOX})[^<]*",  # a box is announced and something else follows
        r"<\|object_ref_start\|>[^<]*(?:<\|object_ref_end\|>)?\s*$",  # cut off after the label
    ]
)
PIECE_PATTERN = re.compile(rf"(?P<json>\{{[^{{}}]*(?:\}}|$))|(?P<box>{BOX})|(?P<attempt>{ATTEMPT})")
END_PATTERN = re.compile(r"<\|(?:im_end|endoftext)\|>")
REFERENCE_PATTERN = re.compile(r"<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>")
MARKUP_PATTERN = re.compile(r"<[^<>]*>|```(?:json)?")
JSON_LABEL_PATTERN = re.compile(r"""["']label["']\s*:\s*("(?:[^"\\]|\\.)*"|'[^']*')""")


@dataclass(frozen=True)
class ParsedAnswer:
    """What a model's answer holds. Boxes are `[x1, y1, x2, y2]` in the model's own coordinates, not clamped."""

    objects: list[tuple[str, list[float]]]  # label (may be empty) and box
    unread: list[str]  # pieces of the text that look like an attempt at a box, and are none
    spans: list[tuple[int, int]] = field(default_factory=list, compare=False)  # where the boxes are in the text


def parse_answer(answer: str) -> ParsedAnswer:
    """Read every box that a Qwen-VL model wrote, as text or as JSON. Never raises.

    Corners are put in order. A box without a label of its own takes the one before it.
    """
    text, parsed = END_PATTERN.sub(lambda end: " " * len(end[0]), answer), ParsedAnswer([], [])
    label, end = "", 0
    for piece in PIECE_PATTERN.finditer(text):
        label = (read_json_label(piece[0]) if piece["json"] else read_label(text[end : piece.start()])) or label
        found = [] if piece["attempt"] else list(re.finditer(BOX, piece[0]))
        boxes = [(read_numbers(match[0]), match) for match in found]
        for box, match in boxes:
            if has_area(box):
                parsed.objects.append((label, box))
                parsed.spans.append((piece.start() + match.start(), piece.start() + match.end()))
        if not all(has_area(box) for box, _ in boxes) or (not boxes and promises_box(piece)):
            parsed.unread.append(piece[0].strip())
        end = piece.end()
    return parsed


def read_label(words: str) -> str:
    """The label in the words before a box: what the special tokens enclose, else the words without markup."""
    if references := REFERENCE_PATTERN.findall(words):
        return references[-1]
    label = MARKUP_PATTERN.sub(" ", words).strip(" \t\n\r,;:.-*'\"`<>()[]{}|")
    return "" if label.lower() == "and" else label


def read_json_label(piece: str) -> str:
    """The value of `label` in one JSON object, whole or cut off; empty where there is none."""
    quoted = (JSON_LABEL_PATTERN.findall(piece) or ['""'])[0]
    try:
        return json.loads(quoted, strict=False)
    except ValueError:  # in single quotes, or with an escape that JSON does not know
        return quoted[1:-1]


def read_numbers(box: str) -> list[float]:
    """The text of a box as `[x1, y1, x2, y2]`, corners in order."""
    xa, ya, xb, yb = map(float, re.findall(r"-?\d+(?:\.\d+)?", box))
    return [min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)]


def promises_box(piece: re.Match) -> bool:
    """Whether a piece without a box should have had one: `{"objects": null}` says that there is nothing."""
    return not piece[0].endswith("}") or re.search("box|label", piece[0]) is not None
