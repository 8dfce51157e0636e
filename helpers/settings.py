"""One check of all settings, before anything is loaded.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace


def is_text(value: object) -> bool:
    """Whether a value is a text or a path that says something."""
    return isinstance(value, str | Path) and bool(str(value).strip()) and "\0" not in str(value)


def is_number(value: object, lowest: float, highest: float, kinds=(int, float, str)) -> bool:
    """Whether a value is a number from `lowest` to `highest`, or the text that YAML takes 1e-3 for; True is none."""
    try:
        return type(value) in kinds and lowest <= float(value) <= highest
    except (OverflowError, ValueError):
        return False


def is_count(value: object, lowest: int = 1, highest: int = 10**9) -> bool:
    """Whether a value is a whole number from `lowest` to `highest`."""
    return is_number(value, lowest, highest, (int,))


COUNT = "a whole number above 0"
TRACKERS = ["tensorboard", "wandb", "trackio", "none"]
RULES = [  # settings, with ? where None is right as well; what they have to be; how that is told
    ("MODEL_ID DATASET_ID OUTPUT_DIR TRAIN_SPLIT EVAL_SPLIT SYSTEM_MESSAGE? QUESTION?", "a text", is_text),
    (
        "LABELS?",
        "a text such as 'barcode, logo'",
        lambda v: v != [] and all(map(is_text, v if isinstance(v, list) else [v])),
    ),
    ("TRAIN_SAMPLES? EVAL_SAMPLES? VALIDATION_SAMPLES EVALUATIONS MAX_PIXELS MAX_NEW_TOKENS", COUNT, is_count),
    ("BATCH_SIZE MICRO_BATCH_SIZE? EVAL_BATCH_SIZE? LORA_RANK?", COUNT, is_count),
    ("MAX_STEPS", f"{COUNT}, or -1", lambda v: is_count(v, -1) and v != 0),
    ("COLLATOR_STEPS", "a whole number, 0 or above", lambda v: is_count(v, 0)),
    ("SEED", "a whole number from 0 to 4294967295", lambda v: is_count(v, 0, 2**32 - 1)),
    ("NUM_EPOCHS", "a number above 0", lambda v: is_number(v, 1e-6, 1e6, (int, float))),
    ("FLIP_PROBABILITY", "a number from 0 to 1", lambda v: is_number(v, 0, 1, (int, float))),
    ("AGAIN CACHE_FEATURES COMPILE? GRADIENT_CHECKPOINTING?", "True or False", lambda v: isinstance(v, bool)),
    ("PRECISION?", "one of 'bf16', 'nf4', 'fp8'", lambda v: v in ["bf16", "nf4", "fp8"]),
    ("REPORT_TO", f"one of {TRACKERS}", lambda v: v in TRACKERS),
    ("PUSH_TO_HUB", "a hub id such as 'me/detector', or ''", lambda v: re.fullmatch(r"([\w.-]+/)?[\w.-]*", str(v))),
]


def check_settings(settings: SimpleNamespace, recipes: Sequence[str]) -> None:
    """Raise ValueError with a line for each setting that cannot be meant; `recipes` are the names that there are."""

    def are_recipes(value: object) -> bool:
        return isinstance(value, list) and all(name in recipes and value.count(name) == 1 for name in value)

    given, problems = {name.upper(): value for name, value in vars(settings).items()}, []
    if isinstance(rates := given.get("LEARNING_RATES"), dict):  # those that are wrong
        is_wrong = {name: name not in recipes or not is_number(rate, 1e-12, 0.999) for name, rate in rates.items()}
        given["LEARNING_RATES"] = {name: rate for name, rate in rates.items() if is_wrong[name]}
    known = ", ".join(recipes)
    rules = [*RULES, ("RECIPES", f"a list out of {known}, each once", lambda v: v and are_recipes(v))]
    rules.append(("LEARNING_RATES", f"numbers between 0 and 1, by recipe: {known}", lambda v: v == {}))
    for name, words, is_right in ((name, *rule) for names, *rule in rules for name in names.split()):
        optional, name = name.endswith("?"), name.rstrip("?")
        if name in given and not (optional and given[name] is None) and not is_right(given[name]):
            problems.append(f"{name}={given[name]!r:.110}: give {words}{', or None' if optional else ''}.")
    if is_text(split := given.get("TRAIN_SPLIT")) and split == given.get("EVAL_SPLIT"):
        problems.append(f"TRAIN_SPLIT and EVAL_SPLIT are both {split!r}: evaluate on images that are not trained on.")
    if problems:
        raise ValueError("\n".join(problems))
