"""What would stop a run, found before anything is loaded: settings, model, tracker, output folder, room on the disk.

`check_before_loading` names all of it at once; `describe_os_error` says in a line what a full or locked disk means.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, ProcessorMixin
from transformers.utils import logging

from helpers.boxes import get_family, resized_size
from helpers.data import open_encoded
from helpers.loading import best_dtype, build_empty_model, load_processor, pixel_budget
from helpers.recipes import CATALOGUE, TrainingRecipe
from helpers.runs import RunFolder
from helpers.settings import check_settings
from helpers.speed import count_trained
from helpers.training import adjust

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TO_SAFETENSORS = (
    'python -c "from transformers import AutoModelForImageTextToText as M; '
    "M.from_pretrained('FOLDER').save_pretrained('NEW_FOLDER')\""
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OS_ERROR = re.compile(r"os error (\d+)")  # how safetensors tells of one
TORN = re.compile(r"inline_container|PytorchStreamWriter|iostream error")  # all that torch says of a full disk
REASONS = {  # what the system calls it: what it means, what to do
    errno.ENOSPC: ("the disk is full", "free some room and give the same command again; nothing whole was lost"),
    errno.EDQUOT: ("the quota is used up", "free some room and give the same command again"),
    errno.EFBIG: ("the file is larger than is allowed here", "raise the limit (`ulimit -f`), or use another folder"),
    errno.EROFS: ("the file system is read-only", "name a folder that can be written to"),
    errno.EACCES: ("that is not permitted", "name a folder that you may write to, or have it made yours"),
    errno.EPERM: ("that is not permitted", "name a folder that you may write to, or have it made yours"),
    errno.EIO: ("the disk reports an error", "check the disk, or use another one"),
    errno.ENOTDIR: ("a part of that path is a file", "name another folder"),
    errno.EEXIST: ("there is a file of that name", "name another folder"),
    errno.ENAMETOOLONG: ("that name is too long", "name a folder with a shorter path"),
}


def check_before_loading(settings: SimpleNamespace, recipes: Sequence[str]) -> None:
    """Raise ValueError with a line for each thing that would stop the training of `recipes`.

    Reads the weights of a model in a local folder once, which is all that takes time.
    """
    check_settings(settings, list(CATALOGUE))
    output = Path(settings.output_dir)
    problems = [*describe_tracker(settings.report_to), *describe_model(settings.model_id, settings.max_pixels)]
    problems += describe_output(output, "OUTPUT_DIR") or ([] if problems else describe_room(output, settings, recipes))
    if problems:
        raise ValueError("\n".join(problems))


def describe_os_error(error: BaseException | None) -> str:
    """One line for an error of disk or file system, also one that a library wrapped; empty for any other."""
    while error is not None:
        if (number := find_errno(error)) in REASONS:
            place = error.filename if isinstance(error, OSError) and error.filename else "A file could not be written"
            return f"{place}: {'; '.join(REASONS[number])}."
        error = error.__cause__ or error.__context__
    return ""


def find_errno(error: BaseException) -> int | None:
    """The system's number of an error, None where it has none."""
    if isinstance(error, OSError):
        return error.errno
    named = OS_ERROR.search(str(error))
    return int(named[1]) if named else errno.ENOSPC if TORN.search(str(error)) else None


def describe_tracker(name: str) -> Iterator[str]:
    """What is wrong with REPORT_TO here."""
    if name != "none" and importlib.util.find_spec(name) is None:
        yield f"REPORT_TO={name!r} is not installed: `pip install {name}`, or set REPORT_TO to 'none'."


# The model


def describe_model(model_id: str, max_pixels: int) -> list[str]:
    """What is wrong with a model's folder, or with the name of one on the hub."""
    folder = Path(model_id)
    if not folder.is_dir():
        return describe_missing_model(model_id)
    finders = [describe_config, describe_files, partial(describe_processor, max_pixels=max_pixels), describe_weights]
    for find in finders:
        if problems := [f"MODEL_ID={model_id}: {problem}." for problem in find(folder)]:
            return problems  # what comes after would only repeat it
    return []


def describe_missing_model(model_id: str) -> list[str]:
    """What is wrong with a name that is no folder; empty where the hub, or its cache, knows the model."""
    if Path(model_id).exists():
        return [f"MODEL_ID={model_id} is a file: give the folder that it is in."]
    try:
        get_family(AutoConfig.from_pretrained(model_id).model_type)
    except ValueError as error:
        return [f"MODEL_ID={model_id}: {first_line(error)}"]
    except OSError:
        where = f"neither a folder (looked for in {Path.cwd()}) nor, as far as the network tells, on the hub"
        return [f"MODEL_ID={model_id} is {where}: check its spelling; a gated model needs `hf auth login`."]
    return []


def describe_config(folder: Path) -> Iterator[str]:
    """What is wrong with config.json: without one it is no model; only known families, in 16 bits, can be trained."""
    file = folder / "config.json"
    if not file.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        remedy = "merge the adapter into its base first, `python -m helpers.results --model FOLDER --merge NEW_FOLDER`"
        yield f"there is no config.json in it: {remedy if is_adapter else 'give the folder of a whole model'}"
        return
    try:
        config = json.loads(file.read_bytes())
        get_family(config["model_type"])
    except (UnicodeDecodeError, json.JSONDecodeError):
        yield "config.json is not JSON: download it again"
    except (KeyError, TypeError):
        yield "config.json names no model_type: download it again"
    except ValueError as error:
        yield first_line(error).rstrip(".")
    else:
        if "quantization_config" in config:
            yield "its weights are quantised already: give the 16-bit model, and set PRECISION"


def describe_files(folder: Path) -> Iterator[str]:
    """What is wrong with the safetensors files: missing, pickled instead, damaged, or not those of the index."""
    files, pickled = sorted(folder.glob("*.safetensors")), [file for name in PICKLED for file in folder.glob(name)]
    if not files and pickled:
        yield f"{pickled[0].name} is pickled, and could run any code when read: convert it, `{TO_SAFETENSORS}`"
    elif not files:
        yield "there are no weights (*.safetensors) in it: copy or download it again"
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            is_pointer = file.stat().st_size < 1000 and file.read_bytes().startswith(b"version https://git-lfs")
            remedy = "it is a Git LFS pointer: `git lfs pull`" if is_pointer else "copy or download it again"
            yield f"{file.name} is damaged or not whole ({first_line(error)}): {remedy}"
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        yield from describe_index(index)


def describe_index(index: Path) -> Iterator[str]:
    """What is wrong with the list of a model's several files."""
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{index.name} is damaged: download it again"
        return
    if missing := sorted(name for name in map(str, named) if not (index.parent / name).is_file()):
        yield f"{len(missing)} of the files that {index.name} names are missing, {missing[0]} first: download them"


def describe_processor(folder: Path, max_pixels: int) -> Iterator[str]:
    """What is wrong with tokenizer, image processor or chat template, or with MAX_PIXELS for them."""
    try:
        processor = load_processor(str(folder), max_pixels)
    except Exception as error:  # whatever half a processor raises, it cannot be used
        yield f"its processor cannot be loaded: {first_line(error).rstrip('.')}"
        return
    if not processor.tokenizer.encode("box"):
        yield "its tokenizer knows no words: download tokenizer.json again"
    if not processor.chat_template:
        yield "its processor has no chat template: add chat_template.jinja from the original model"


def describe_weights(folder: Path) -> Iterator[str]:
    """Tensors that are missing, have another shape, or hold nan or infinity; the model is built without memory."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report names the same in many lines
    logging.disable_progress_bar()
    try:
        _, found = AutoModelForImageTextToText.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # a config that does not fit raises anything
        yield f"it cannot be built from its config.json: {first_line(error).rstrip('.')}"
        return
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        yield f"{len(missing)} tensors are missing, {missing[0]} first: download it again"
    if others := sorted(found["mismatched_keys"]):
        name, is_there, wanted = others[0]
        yield f"{name} has shape {[*is_there]}, config.json says {[*wanted]}: download it again"
    if not_finite := [name for name, tensor in read_tensors(folder) if not tensor.float().isfinite().all()]:
        yield f"{len(not_finite)} tensors hold nan or infinity, {not_finite[0]} first: download or train it again"


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all tensors in a folder's safetensors files, one at a time."""
    for file in tqdm(sorted(folder.glob("*.safetensors")), desc="checking weights", unit="file", disable=None):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                yield name, tensors.get_tensor(name)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# What a training left


def describe_result(folder: Path) -> list[str]:
    """What is wrong with the folder that a training left: its recipe.json, its weights, the base of an adapter."""
    if not (folder / "recipe.json").is_file():
        return [f"{folder} is not what a training of this project left: there is no recipe.json in it."]
    run = RunFolder(folder)
    try:
        saved, _ = run.read_recipe(), run.read_task()
        base, start = folder / saved["base"], saved["started_from"]
        _ = saved["settings"]["dataset_id"], saved["precision"]  # whoever loads the result reads them
    except (KeyError, TypeError, ValueError) as error:
        return [f"{folder}/recipe.json is damaged or of another kind ({type(error).__name__}): copy it again."]
    problems = [f"{folder}: {problem}." for problem in describe_files(folder)]
    is_adapter, is_on_hub = (folder / "adapter_config.json").is_file(), HUB_ID.fullmatch(str(start))
    if is_adapter and not base.is_dir() and not Path(start).is_dir() and not is_on_hub:
        problems.append(f"{folder}: its base {start} is not there: bring it back, to where it was or to {base}.")
    return problems


# Room for what will be written


def describe_output(folder: Path, setting: str) -> list[str]:
    """What is wrong with an output folder, which is made: it, or a part of its path, cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        reason = describe_os_error(error) or f"{error.strerror}; name another folder."
        return [f"{setting}={folder} cannot be written to: {reason}"]
    return []


def describe_room(folder: Path, settings: SimpleNamespace, recipes: Sequence[str]) -> list[str]:
    """Whether the disk has too little room for what the recipes will write."""
    sizes, free = estimate_bytes(settings, recipes), shutil.disk_usage(folder).free
    if sum(sizes.values()) <= free:
        return []
    parts = ", ".join(f"{name} {describe_bytes(size)}" for name, size in sizes.items() if size)
    needed = f"{describe_bytes(sum(sizes.values()))} will be needed ({parts}), {describe_bytes(free)} are free"
    return [f"OUTPUT_DIR={folder}: {needed}. Free some, name a folder on another disk, or set CACHE_FEATURES=False."]


def describe_bytes(count: float) -> str:
    """A size in GB, small ones in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def estimate_bytes(settings: SimpleNamespace, recipes: Sequence[str]) -> dict[str, int]:
    """About how much will be written besides what is there: results, checkpoints of the way, features of images."""
    output, results, checkpoints = Path(settings.output_dir), 0, 0
    open_ones = [name for name in recipes if settings.again or not (output / name / "recipe.json").is_file()]
    for name in open_ones:
        sizes = [measure_stage(adjust(CATALOGUE[stage], settings), settings.model_id) for stage in list_stages(name)]
        there = folder_bytes(output / name)
        results += max(0, sum(result for result, _ in sizes) - there)
        checkpoints = max(checkpoints, *(checkpoint - there for _, checkpoint in sizes))
    towers = [CATALOGUE[stage].train_vision for name in open_ones for stage in list_stages(name)]
    frozen = settings.cache_features and "frozen" in towers
    features = max(0, estimate_features(settings) - folder_bytes(output / "features")) if frozen else 0
    return {"results": results, "checkpoints": max(0, checkpoints), "features": features}


def list_stages(name: str) -> Sequence[str]:
    """The recipes that a recipe trains one after the other, or itself alone."""
    return CATALOGUE[name].stages or (name,)


def measure_stage(recipe: TrainingRecipe, model_id: str) -> tuple[int, int]:
    """Bytes of what a recipe without stages leaves, and of its checkpoints: last, best, and the one being written."""
    model = build_empty_model(model_id)
    trained, whole = count_trained(model, recipe), model.num_parameters() * best_dtype().itemsize
    return whole if recipe.train_vision == "full" else 4 * trained, 3 * 12 * trained  # weight, two moments of AdamW


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def estimate_features(settings: SimpleNamespace) -> int:
    """Bytes of the kept features of all training images of a local dataset; 0 for one that is not there yet."""
    files = sorted(Path(settings.dataset_id).glob(f"data/{settings.train_split}-*.parquet"))
    if not files:
        return 0
    rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    images = min(rows, settings.train_samples or rows) * (2 if settings.flip_probability else 1)
    if settings.max_steps > 0:
        images = min(images, settings.max_steps * settings.batch_size + settings.validation_samples)
    config = build_empty_model(settings.model_id).config
    levels = 1 + len(config.vision_config.to_dict().get("deepstack_visual_indexes", []))  # Qwen3-VL keeps several
    image = mean_tokens(files[0], load_processor(settings.model_id, settings.max_pixels))
    return int(images * image * levels * config.get_text_config().hidden_size * best_dtype().itemsize)


def mean_tokens(file: Path, processor: ProcessorMixin) -> float:
    """Tokens of an image, the mean over the first of a Parquet file that can be opened; 0 where none can."""
    first = next(pyarrow.parquet.ParquetFile(file).iter_batches(20, columns=["image"]), None)
    tokens = [count_tokens(encoded, processor) for encoded in (first["image"].to_pylist() if first else [])]
    return sum(tokens) / max(1, len(tokens))


def count_tokens(encoded: dict, processor: ProcessorMixin) -> int:
    """Tokens of an undecoded image, 0 for one that cannot be opened."""
    try:
        width, height = open_encoded(encoded).size
        budget = pixel_budget(processor)
        resized = resized_size(width, height, **budget)
    except Exception:  # the check of the rows names it
        return 0
    return resized[0] * resized[1] // budget["factor"] ** 2
