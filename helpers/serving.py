"""A merged model on a server with OpenAI's chat completions, such as vLLM: what to send, and whether it answers alike.

    python -m helpers.serving --model OUTPUT_DIR/merged --request PICTURE
    python -m helpers.serving --model OUTPUT_DIR/merged --server http://localhost:8000/v1 --output FOLDER
    python -m helpers.serving --model OUTPUT_DIR/merged --answers FOLDER/predictions.jsonl

The first line prints how to start vLLM, the request about one picture, and how to send it. The second asks a server
about the pictures that the model was measured on, writes its answers to FOLDER/predictions.jsonl (the lines of a run,
with what the server told of its prompt), and compares them with OUTPUT_DIR/merged/predictions.jsonl, which
`python -m helpers.results --model OUTPUT_DIR/merged --evaluate-only` writes. The third compares answers that are
there already, also those of a client of yours. If answers differ, the usual causes are named where they show. Exit
code 0 if the mean IoU is the same to within 0.01, else 1; 2 for what cannot be done. A server that wants a key gets
that in VLLM_API_KEY.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from datasets import Dataset
from PIL import Image
from scipy.stats import theilslopes
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

from helpers.boxes import box_iou, resized_size
from helpers.conversation import Task, to_conversation
from helpers.data import read_headers, read_row, to_upright_rgb
from helpers.detect import describe_file_problem
from helpers.detection import add_answer, to_record
from helpers.evaluation import read_predictions
from helpers.generation import Answer
from helpers.metrics import assigned_ious, compare_table, compute_ious, describe_difference, summarize
from helpers.parsing import END_PATTERN, parse_answer
from helpers.results import TOLERANCE, load_evaluation_rows
from helpers.runs import RunFolder

AT_ONCE = 8  # requests under way
TIMEOUT = 300  # seconds that an answer may take
PAUSES = (1, 4)  # seconds before a server that is busy, or breaks off, is asked again
BUSY = (429, 502, 503, 504)


@dataclass(frozen=True)
class Service:
    """Where a model is served, under which name, and the limits of its answers."""

    url: str  # up to /v1
    model: str
    max_tokens: int
    repetition_penalty: float = 1.0
    plain: bool = False  # leave out what is not in OpenAI's protocol


def create_service(folder: Path, url: str, model: str, plain: bool) -> Service:
    """The limits that the model in `folder` was measured with; `generate` takes its penalty from the same file."""
    file = folder / "generation_config.json"
    penalty = json.loads(file.read_text()).get("repetition_penalty") if file.exists() else None
    return Service(url, model, RunFolder(folder).read_recipe()["settings"]["max_new_tokens"], penalty or 1.0, plain)


def build_request(image: Image.Image, task: Task, service: Service) -> dict:
    """The notebook's question about an image as the body of a request to `/chat/completions`."""
    picture = {"type": "image_url", "image_url": {"url": to_data_url(image)}}
    content = [picture, {"type": "text", "text": task.question}]
    messages = [{"role": "system", "content": task.system_message}, {"role": "user", "content": content}]
    body = {"model": service.model, "messages": messages, "temperature": 0, "max_tokens": service.max_tokens}
    return body | {"logprobs": True} | ({} if service.plain else build_extensions(task, service))


def build_extensions(task: Task, service: Service) -> dict:
    """What vLLM knows beyond OpenAI's protocol, and the same answers depend on."""
    return {
        "skip_special_tokens": False,  # labels and boxes keep their marks
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,  # <|im_end|>, as in the notebook's answers
        "repetition_penalty": service.repetition_penalty,
        "mm_processor_kwargs": {"size": to_processor_size(task)},
    }


def to_processor_size(task: Task) -> dict[str, int]:
    """The pixel budget as processors of transformers 5 take it; `min_pixels` and `max_pixels` are going."""
    return {"shortest_edge": task.pixel_budget["min_pixels"], "longest_edge": task.pixel_budget["max_pixels"]}


def to_data_url(image: Image.Image) -> str:
    """The upright image as PNG, without loss; only its pixels, as servers may apply transparency or an orientation."""
    pixels, file = np.asarray(to_upright_rgb(image)), BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def shorten(body: dict) -> dict:
    """A request for people to read: of the image only the beginning."""
    short = json.loads(json.dumps(body))
    picture = short["messages"][1]["content"][0]["image_url"]
    picture["url"] = f"{picture['url'][:40]}... ({len(picture['url']):,} characters)"
    return short


def count_text_tokens(processor: ProcessorMixin, task: Task) -> int:
    """Tokens of the notebook's prompt without those of the image."""
    text = processor.apply_chat_template(to_conversation(task), tokenize=False, add_generation_prompt=True)
    return len(processor.tokenizer(text)["input_ids"]) - 1  # one stands for the image


def write_serve_command(folder: Path, task: Task, service: Service) -> str:
    """The line that starts vLLM with the precision and the pixel budget of the model in `folder`."""
    dtype = str(AutoConfig.from_pretrained(folder).dtype or "auto").removeprefix("torch.")
    image_tokens = task.pixel_budget["max_pixels"] // task.pixel_budget["factor"] ** 2
    tokens = image_tokens + count_text_tokens(AutoProcessor.from_pretrained(folder), task) + service.max_tokens
    limits = ["--dtype", dtype, "--max-model-len", str(64 * math.ceil(tokens / 64))]
    images = ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
    budget = ["--mm-processor-kwargs", json.dumps({"size": to_processor_size(task)})]
    return shlex.join(["vllm", "serve", str(folder), "--served-model-name", service.model, *limits, *images, *budget])


def print_request(picture: Path, folder: Path, service: Service, as_json: bool) -> None:
    """The request about a picture as JSON and nothing else, or for people, with the commands around it."""
    task = RunFolder(folder).read_task()
    with Image.open(picture) as image:
        body = build_request(image, task, service)
    if as_json:
        print(json.dumps(body))
        return
    this = ["python", "-m", "helpers.serving", "--model", str(folder), "--request", str(picture), "--json"]
    curl = ["curl", f"{service.url}/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
    print(f"# start the server\n{write_serve_command(folder, task, service)}\n")
    print(f"# the request\n{json.dumps(shorten(body), indent=2)}\n")
    print(f"# send it\n{shlex.join(this)} | {shlex.join(curl)}")


def call(service: Service, path: str, body: dict | None = None) -> dict:
    """One request, its answer as JSON. Only questions (with a body) are repeated.

    Raises ConnectionError where no server answers, ValueError for what a server refuses; both say what to do.
    """
    for pause in (*(PAUSES if body else ()), None):
        try:
            return send(service, path, body)
        except HTTPError as error:
            with error:
                if error.code not in BUSY or pause is None:
                    raise ValueError(f"{service.url}{path} answered {error.code}: {read_message(error)}") from error
        except (OSError, HTTPException) as error:
            if pause is None:
                remedy = "start one, as `python -m helpers.serving --model ... --request PICTURE` says (`vllm serve`)"
                raise ConnectionError(f"{service.url}{path}: no server answers ({error}): {remedy}.") from error
        time.sleep(pause)


def send(service: Service, path: str, body: dict | None) -> dict:
    """One request, tried once. Raises ValueError for an answer that is no JSON object."""
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(service.url + path, data, headers), timeout=TIMEOUT) as answer:
        text = answer.read()
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        remedy = "give --server an address that ends in /v1, of a server with OpenAI's chat completions"
        raise ValueError(f"{service.url}{path} answered {text[:60]!r}: {remedy}.") from error


def read_message(error: HTTPError) -> str:
    """What a server says of an error: {"error": {"message"}}, {"message"}, {"detail"}, or text."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message") or found.get("detail") or text)
    except (AttributeError, ValueError):
        return text[:300]


def find_model(service: Service) -> str:
    """The wanted name, or the only one where none is wanted. Raises ValueError for one that is not served."""
    try:
        served = [model["id"] for model in call(service, "/models").get("data", [])]
    except ValueError:
        if not service.model:
            raise
        return service.model  # not every server lists its models
    if service.model in served:
        return service.model
    if not service.model and len(served) == 1:
        return served[0]
    wanted = f"no model {service.model!r}" if service.model else f"{len(served)} models"
    raise ValueError(f"{service.url} has {wanted}: give --name one that it serves: {', '.join(served)}.")


def ask(image: Image.Image, task: Task, service: Service) -> tuple[Answer, dict]:
    """A server's answer about an image, and what it tells of it: why it ended, how long its prompt was."""
    answer = call(service, "/chat/completions", build_request(image, task, service))
    if not answer.get("choices"):
        raise ValueError(f"{service.url}/chat/completions gave no answer: {json.dumps(answer)[:300]}")
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    told = {"finish_reason": choice.get("finish_reason"), "prompt_tokens": usage.get("prompt_tokens")}
    return read_answer(choice), told


def read_answer(choice: dict) -> Answer:
    """Text and probabilities; without probabilities where the tokens are not those of the text."""
    text, tokens = choice["message"]["content"] or "", (choice.get("logprobs") or {}).get("content") or []
    written = [token["token"] for token in tokens]
    if not text or not "".join(written).startswith(text):
        return Answer(text)
    return Answer(text, list(accumulate(map(len, written))), [math.exp(token["logprob"]) for token in tokens])


def ask_about(rows: Dataset, task: Task, service: Service) -> list[dict]:
    """Ask a server about every row, a few at once: records as `evaluate_detector` makes them, in the rows' order."""

    def ask_row(number: int) -> dict:
        row = rows[number]
        answer, told = ask(read_row(row)[0], task, service)
        return add_answer(to_record(row, task), answer, task) | told

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = pool.map(ask_row, range(len(rows)))
        return list(tqdm(asked, total=len(rows), desc="asking", unit="image"))


def read_records(file: Path, task: Task) -> list[dict]:
    """The records of a file as `helpers.evaluation` reads them, labels numbered as in the task. Raises its errors."""
    return [add_answer(record, Answer(record["raw"]), task) for record in read_predictions(file, task.family)]


def read_answers(file: Path, task: Task, ours: Sequence[dict]) -> list[dict]:
    """Answers from a file, in the order of `ours`. Raises ValueError unless they are about the same pictures."""
    answers = {record["id"]: record for record in read_records(file, task)}
    ids = [record["id"] for record in ours]
    if answers.keys() != set(ids):
        missing, more = len(set(ids) - answers.keys()), len(answers.keys() - set(ids))
        found = f"of the {len(ids)} pictures that were measured it lacks {missing}, and has {more} others"
        raise ValueError(f"{file}: {found}; --eval-samples compares only the first ones that were measured.")
    return [answers[image_id] for image_id in ids]


def read_measured(run: RunFolder, samples: int | None) -> list[dict]:
    """The notebook's own answers, the first `samples` of them. Raises FileNotFoundError that says what writes them."""
    file = run.path / "predictions.jsonl"
    if not file.exists():
        remedy = f"`python -m helpers.results --model {run.path} --evaluate-only` writes it"
        raise FileNotFoundError(f"{file}, the answers to compare with, is missing: {remedy}.")
    return read_records(file, run.read_task())[:samples]


def load_measured_rows(run: RunFolder, options: argparse.Namespace, ours: Sequence[dict]) -> Dataset:
    """The rows that the answers are about, in their order. Raises ValueError where the dataset does not have them."""
    given = {name: getattr(options, name) for name in ("dataset_id", "eval_split") if getattr(options, name)}
    settings = SimpleNamespace(**run.read_recipe()["settings"] | given | {"eval_samples": None})
    rows = load_evaluation_rows(run, settings)
    numbers = {image_id: number for number, image_id in enumerate(rows["image_id"])}
    missing = [record["id"] for record in ours if record["id"] not in numbers]
    if missing:
        where = f"{settings.dataset_id}, split {settings.eval_split}"
        remedy = f"name the dataset that {run.path / 'predictions.jsonl'} was measured on with --dataset-id"
        raise ValueError(f"{where}, has no picture {missing[0]!r}: {remedy}.")
    return rows.select([numbers[record["id"]] for record in ours])


def add_expectations(ours: Sequence[dict], rows: Dataset, folder: Path, task: Task) -> list[dict]:
    """The notebook's records with the length of its prompts, in tokens, and the EXIF orientation of the pictures."""
    text_tokens, known = count_text_tokens(AutoProcessor.from_pretrained(folder), task), []
    for record, (width, height, orientation) in zip(ours, read_headers(rows), strict=True):
        resized = resized_size(width, height, **task.pixel_budget)
        tokens = text_tokens + math.prod(resized) // task.pixel_budget["factor"] ** 2
        known.append(record | {"resized": resized, "prompt_tokens": tokens, "orientation": orientation})
    return known


MARK_PATTERN = re.compile(r"<\|[a-z_]+\|>")


def to_text(record: dict) -> str:
    """An answer without the token that ends it."""
    return END_PATTERN.sub("", record["raw"]).strip()


def to_words(record: dict) -> str:
    """An answer without special tokens."""
    return MARK_PATTERN.sub("", record["raw"]).strip()


def measure_agreement(ours: dict, theirs: dict) -> float:
    """Mean IoU of the boxes of two answers, one to one, 0 for those that are in one only; 1 without any."""
    ious = compute_ious(ours["prediction"], theirs["prediction"])
    return float(assigned_ious(ious).sum() / max(ious.shape)) if max(ious.shape) else 1.0


def find_lost_marks(ours: Sequence[dict], theirs: Sequence[dict]) -> str | None:
    """The server's answers have boxes as the notebook's have, but no special tokens."""
    marks = [sum(len(MARK_PATTERN.findall(to_text(record))) for record in side) for side in (ours, theirs)]
    boxes = [sum(len(record["prediction"]) for record in side) for side in (ours, theirs)]
    if marks[0] == 0 or marks[1] > 0 or boxes[1] < boxes[0] / 2:
        return None
    return "no answer of the server has special tokens such as <|box_start|>: send `skip_special_tokens: false`"


def find_cut_answers(ours: Sequence[dict], theirs: Sequence[dict]) -> str | None:
    """The server's answers end earlier."""
    cut = [them for us, them in zip(ours, theirs, strict=True) if to_words(us) != to_words(them) and is_cut(us, them)]
    if not cut:
        return None
    remedy = "raise `max_tokens`, or the server's --max-model-len"
    return f"{len(cut)} of {len(theirs)} answers are cut off, the first after {to_text(cut[0])[-30:]!r}: {remedy}"


def is_cut(ours: dict, theirs: dict) -> bool:
    """Whether a server's answer was cut off, as far as it tells, else whether it breaks off within the notebook's."""
    if theirs.get("finish_reason"):
        return theirs["finish_reason"] == "length"
    return len(theirs["unread"]) > 0 and to_words(ours).startswith(to_words(theirs))


def find_turned_pictures(ours: Sequence[dict], theirs: Sequence[dict]) -> str | None:
    """Boxes lie elsewhere on most pictures with an EXIF orientation, and not on the others."""
    elsewhere = np.array([measure_agreement(*pair) < 0.5 for pair in zip(ours, theirs, strict=True)])
    turned = np.array([record["orientation"] > 1 for record in ours])
    if not turned.any() or turned.all() or elsewhere[turned].mean() < 0.5:
        return None
    if elsewhere[~turned].mean() > elsewhere[turned].mean() / 2:
        return None
    found = f"{elsewhere[turned].sum()} of {turned.sum()} pictures with an EXIF orientation have their boxes elsewhere"
    found += f", of the others {elsewhere[~turned].sum()} of {(~turned).sum()}"
    return f"{found}: turn pictures upright before they are sent (`PIL.ImageOps.exif_transpose`)"


def find_other_prompt(ours: Sequence[dict], theirs: Sequence[dict]) -> str | None:
    """The server's prompts are longer or shorter than the notebook's."""
    told = [(us, them) for us, them in zip(ours, theirs, strict=True) if them.get("prompt_tokens")]
    more = sorted({them["prompt_tokens"] - us["prompt_tokens"] for us, them in told})
    if not more or more == [0]:
        return None
    text, pixels = "another system message, question or chat template", "another pixel budget (`mm_processor_kwargs`)"
    if len(more) > 1:
        return f"the server's prompts have {more[0]:+} to {more[-1]:+} tokens, by picture: {pixels}"
    one_size = len({tuple(us["resized"]) for us, _ in told}) == 1
    return f"the server's prompts have {more[0]:+} tokens: {f'{text}, or {pixels}' if one_size else text}"


def find_other_form(ours: Sequence[dict], theirs: Sequence[dict]) -> str | None:
    """Many of the server's answers hold no box where the notebook's do, and were not cut off."""
    pairs = [(us, them) for us, them in zip(ours, theirs, strict=True) if us["prediction"]]
    lost = [them for us, them in pairs if not them["prediction"] and not is_cut(us, them)]
    if len(lost) <= 0.1 * len(pairs):
        return None
    found = f"{len(lost)} of {len(pairs)} answers have lost their boxes, the first is {to_text(lost[0])[:60]!r}"
    return f"{found}: the system message, the question or the chat template is another, or another model is served"


def find_scaling(ours: Sequence[dict], theirs: Sequence[dict]) -> str | None:
    """The server's boxes are the notebook's, multiplied and shifted alike on all pictures."""
    boxes = pair_written_boxes(ours, theirs)[:, :300]  # enough to see it
    if boxes.shape[1] < 3:
        return None
    fits = [theilslopes(boxes[1, :, axis::2].ravel(), boxes[0, :, axis::2].ravel())[:2] for axis in (0, 1)]
    (factor_x, shift_x), (factor_y, shift_y) = fits
    if min(factor_x, factor_y) <= 0:
        return None
    undone = (boxes[1] - [shift_x, shift_y] * 2) / ([factor_x, factor_y] * 2)
    before, after = (np.diag(box_iou(boxes[0], other)).mean() for other in (boxes[1], undone))
    if after < max(0.8, before + 0.05):
        return None
    found = f"x of its boxes are {factor_x:.2f} times the notebook's {round(shift_x):+d}"
    found += f", y {factor_y:.2f} times {round(shift_y):+d}, on all pictures"
    return f"{found}: it answers in another convention (pixels, or the grid), or pads or crops pictures before"


def pair_written_boxes(ours: Sequence[dict], theirs: Sequence[dict]) -> np.ndarray:
    """Boxes in the model's coordinates, (2, boxes, 4), of the answers with the same number of boxes."""
    pairs = [[parse_answer(record["raw"]).objects for record in pair] for pair in zip(ours, theirs, strict=True)]
    alike = [pair for pair in pairs if len(pair[0]) == len(pair[1])]
    return np.array([[box for pair in alike for _, box in pair[side]] for side in (0, 1)]).reshape(2, -1, 4)


CAUSES = (find_lost_marks, find_cut_answers, find_turned_pictures, find_other_prompt, find_other_form, find_scaling)


def find_causes(ours: Sequence[dict], theirs: Sequence[dict]) -> list[str]:
    """Why a server's answers differ from the notebook's: the usual causes that show; rounding; where to look."""
    if causes := [found for find in CAUSES if (found := find(ours, theirs))]:
        return causes
    agreements = [measure_agreement(*pair) for pair in zip(ours, theirs, strict=True)]
    if np.mean(agreements) >= 0.9 and abs(measure_difference(ours, theirs)) <= TOLERANCE:
        found = f"few digits differ, the boxes of all pictures agree to a mean IoU of {np.mean(agreements):.3f}"
        return [f"{found}: other kernels round otherwise, mostly in 16 bits; harmless"]
    worst = [str(ours[number]["id"]) for number in np.argsort(agreements)[:3] if agreements[number] < 1]
    return [f"none of the usual causes shows: look at the answers about {', '.join(worst)}"]


def measure_difference(ours: Sequence[dict], theirs: Sequence[dict]) -> float:
    """How much more mean IoU the server's answers have."""
    return summarize(theirs)["mean_iou"] - summarize(ours)["mean_iou"]


def check(ours: Sequence[dict], theirs: Sequence[dict]) -> int:
    """Print how a server's answers compare with the notebook's, and why they differ; returns the exit code.

    Raises ValueError if they are about other pictures, or about none with a true box.
    """
    if not any(record["truth"] for record in ours):
        raise ValueError(f"None of the {len(ours)} pictures has a true box: ask about more (--eval-samples).")
    difference = describe_difference(ours, theirs)
    table = compare_table({"notebook": ours, "server": theirs})
    print(table[["mean_iou", "iou_gt_0.5", "f1", "malformed_rate", "n"]].to_string())
    print(f"server against notebook: {difference}")
    same = sum(to_text(us) == to_text(them) for us, them in zip(ours, theirs, strict=True))
    print(f"{same} of {len(ours)} answers are identical")
    for cause in find_causes(ours, theirs) if same < len(ours) else []:
        print(f"- {cause}")
    return int(abs(measure_difference(ours, theirs)) > TOLERANCE)


def compare(run: RunFolder, options: argparse.Namespace, service: Service) -> int:
    """Ask the server unless its answers are there, and compare them with the notebook's; returns the exit code."""
    ours, task = read_measured(run, options.eval_samples), run.read_task()
    rows = load_measured_rows(run, options, ours)
    if options.answers:
        theirs = read_answers(options.answers, task, ours)
    else:
        service = replace(service, model=find_model(service))
        theirs = ask_about(rows, task, service)
        RunFolder(options.output).write_records(theirs)
        print(f"answers of {service.model}: {options.output / 'predictions.jsonl'}")
    return check(add_expectations(ours, rows, run.path, task), theirs)


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the merged model, or a full one")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--request", type=Path, metavar="PICTURE", help="print the request about a picture")
    what.add_argument("--server", metavar="URL", help="ask it, and compare; an address that ends in /v1")
    what.add_argument("--answers", type=Path, metavar="FILE.jsonl", help="compare these")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the server's answers")
    parser.add_argument("--name", help="of the model on the server; default: the only one, for --request the folder")
    parser.add_argument("--plain", action="store_true", help="for servers that refuse vLLM's extensions")
    parser.add_argument("--json", action="store_true", help="print the request and nothing else")
    parser.add_argument("--eval-samples", type=int, help="compare only the first ones that were measured")
    parser.add_argument("--dataset-id", help="default: that of the training")
    parser.add_argument("--eval-split", help="default: that of the training")
    return parser


def describe_option_problem(options: argparse.Namespace) -> str | None:
    """What keeps the command from running, or None."""
    if not RunFolder(options.model).is_trained:
        return f"{options.model} is not what a training of this project left: there is no recipe.json in it"
    if (options.model / "adapter_config.json").exists():
        merge = f"python -m helpers.results --model {options.model} --merge OUTPUT_DIR/merged"
        return f"{options.model} is an adapter: merge it with `{merge}`"
    if options.server and (not options.output or options.output.resolve() == options.model.resolve()):
        return "--server needs --output, a folder for the answers that is not --model, which has those of the notebook"
    if options.eval_samples is not None and options.eval_samples < 1:
        return "--eval-samples must be at least 1"
    if options.request and (problem := describe_file_problem(options.request)):
        return f"--request {options.request}: {problem}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if problem := describe_option_problem(options):
        parser.error(problem)
    url = (options.server or "http://localhost:8000/v1").rstrip("/")
    name = options.name or (str(options.model) if options.request else "")
    service = create_service(options.model, url, name, options.plain)
    if options.request:
        print_request(options.request, options.model, service, options.json)
        return 0
    try:
        return compare(RunFolder(options.model), options, service)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
