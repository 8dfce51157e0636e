"""A served model is asked as the notebook asks it; where a server answers otherwise, the cause is named."""

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from helpers import results, serving
from helpers.conversation import PROMPT, Task
from helpers.detection import add_answer
from helpers.generation import Answer, generate
from helpers.loading import load_processor, pixel_budget
from helpers.parsing import END_PATTERN, MARKUP_PATTERN
from helpers.recipes import CATALOGUE
from helpers.runs import RunFolder, write_json
from helpers.serving import Service, build_request, check, find_causes, main, read_answer
from helpers.tiny.packages import draw_package
from helpers.training import load_detector

TASK = Task(
    "Where?", ["barcode"], system_message="Look.", pixel_budget={"factor": 28, "min_pixels": 1, "max_pixels": 9}
)
ANSWER = "<|object_ref_start|>barcode<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"


# ---- the model, its pictures, and what the notebook answers ---------------------------------------------------------


def draw_barcodes(wide: bool, count: int) -> list[tuple[Image.Image, list[float]]]:
    """Packages with one barcode each, wider than high or not: image, box."""
    drawn = (draw_package(seed) for seed in range(100, 400))
    labelled = ((image, [box for label, box in objects if label == "barcode"]) for image, objects in drawn)
    fitting = (
        (image, boxes[0]) for image, boxes in labelled if len(boxes) == 1 and wide == (image.width > image.height)
    )
    return [pair for pair, _ in zip(fitting, range(count), strict=False)]


def to_row(number: int, image: Image.Image, box: list[float], turned: bool) -> dict:
    """A picture as a dataset's row; `turned`: it lies on its side in the file, and EXIF says so."""
    (x1, y1, x2, y2), (width, height), file, exif = box, image.size, BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if turned else 1  # 6: to be turned a quarter clockwise for display
    stored = image.transpose(Image.Transpose.ROTATE_90) if turned else image
    stored.save(file, "PNG", exif=exif)
    objects = {"bbox": [[y1 / height, x1 / width, y2 / height, x2 / width]], "category_name": ["barcode"]}
    return {"image_id": f"picture {number}", "image": {"bytes": file.getvalue(), "path": None}, "objects": objects}


@pytest.fixture(scope="module")
def merged(base, tmp_path_factory) -> Path:
    """The base as a merged model that finds barcodes, measured on six pictures; EXIF turns the two wide ones."""
    folder = tmp_path_factory.mktemp("served")
    pictures = [(*pair, False) for pair in draw_barcodes(False, 4)] + [
        (*pair, True) for pair in draw_barcodes(True, 2)
    ]
    rows = Dataset.from_list([to_row(number, *picture) for number, picture in enumerate(pictures)])
    rows.cast_column("image", ImageFeature()).to_parquet(folder / "dataset/data/val-00000-of-00001.parquet")
    shutil.copytree(base, folder / "merged")
    task = Task(
        PROMPT.format(label="barcode"), ["barcode"], pixel_budget=pixel_budget(load_processor(str(base), 10**9))
    )
    settings = {"model_id": "base", "dataset_id": str(folder / "dataset"), "eval_split": "val", "eval_samples": None}
    settings |= {"seed": 0, "max_pixels": 10**9, "max_new_tokens": 40, "eval_batch_size": 4}
    recipe = (
        asdict(CATALOGUE["r2-vision-only"])
        | asdict(task)
        | {"base": ".", "started_from": "base", "settings": settings}
    )
    write_json(folder / "merged/recipe.json", recipe)
    assert results.main(["--model", str(folder / "merged"), "--evaluate-only"]) == 0
    return folder / "merged"


# ---- a server ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """The servers of these tests are on this machine, whatever proxy it uses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def serve(respond: Callable[[dict], tuple[int, object]], models=("tiny",), keys: list | None = None) -> Iterator[str]:
    """A server of `models` whose chat completions are `respond`'s, status and JSON; gives its address, keeps keys."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if keys is not None:
                keys.append(self.headers["Authorization"])
            self.reply(200, {"object": "list", "data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*(respond(body) if self.path == "/v1/chat/completions" else (404, {"detail": "Not Found"})))

        def reply(self, status: int, value: dict):
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def respond(merged) -> Callable[..., tuple[int, dict]]:
    """A server's chat completions by vLLM's rules, read from the request alone: what is not asked for is left out."""
    settings, lock = SimpleNamespace(**RunFolder(merged).read_recipe()["settings"]), threading.Lock()
    detectors = {dtype: load_detector(merged, settings) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, detector in detectors.items():
        detector.model.to(dtype)

    @cache
    def write(prompt: str, pixels: bytes, extent: tuple, budget: tuple, max_tokens: int, dtype: torch.dtype):
        detector, image = replace(detectors[dtype], max_new_tokens=max_tokens), Image.frombytes("RGB", extent, pixels)
        inputs = dict(detector.processor(text=[prompt], images=[[image]], return_tensors="pt", size=dict(budget)))
        inputs |= {"pixel_values": inputs["pixel_values"].to(dtype)}
        return generate(detector, inputs)[0], inputs["input_ids"].shape[1]

    def respond(body: dict, image: Image.Image | None = None, dtype=torch.float32) -> tuple[int, dict]:
        image, processor = image or decode(body), detectors[dtype].processor
        prompt = processor.apply_chat_template(to_template_messages(body), tokenize=False, add_generation_prompt=True)
        budget = body.get("mm_processor_kwargs", {}).get("size", processor.image_processor.size)
        with lock:
            picture = image.tobytes(), image.size, tuple(dict(budget).items())
            answer, length = write(prompt, *picture, body["max_tokens"], dtype)
        return 200, to_completion(answer, length, body)

    return respond


def to_template_messages(body: dict) -> list[dict]:
    """The messages of a request as chat templates take them: an image in place of its address."""
    messages = []
    for message in body["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [part if part["type"] == "text" else {"type": "image"} for part in content]
        messages.append(message | {"content": content})
    return messages


def decode(body: dict) -> Image.Image:
    """The picture of a request."""
    (part,) = [part for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    kind, data = part["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    return Image.open(BytesIO(base64.b64decode(data, validate=True)))


def to_completion(answer, prompt_tokens: int, body: dict) -> dict:
    """An answer as vLLM sends it, who leaves out special tokens and the last one unless told not to."""
    text, tokens = answer.text, [answer.text[a:b] for a, b in zip([0, *answer.ends], answer.ends, strict=False)]
    finish = "stop" if END_PATTERN.search(text) else "length"
    text = text if body.get("include_stop_str_in_output") else END_PATTERN.sub("", text)
    text = MARKUP_PATTERN.sub("", text) if body.get("skip_special_tokens", True) else text
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if body.get("logprobs"):
        content = [
            {"token": t, "logprob": float(np.log(p))} for t, p in zip(tokens, answer.probabilities, strict=True)
        ]
        choice["logprobs"] = {"content": content}
    return {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(tokens)}}


# ---- the request ---------------------------------------------------------------------------------------------------


def test_request_holds_what_the_answer_depends_on():
    service = Service("http://localhost:8000/v1", "tiny", max_tokens=40, repetition_penalty=1.05)
    body = build_request(Image.new("RGB", (30, 20)), TASK, service)
    url = body["messages"][1]["content"][0]["image_url"].pop("url")
    assert url.startswith("data:image/png;base64,")
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "Where?"}]},
        ],
        "temperature": 0,
        "max_tokens": 40,
        "logprobs": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "repetition_penalty": 1.05,
        "mm_processor_kwargs": {"size": {"shortest_edge": 1, "longest_edge": 9}},
    }


def test_plain_request_keeps_to_the_protocol_of_openai():
    body = build_request(Image.new("RGB", (30, 20)), TASK, Service("", "tiny", 40, plain=True))
    assert body.keys() == {"model", "messages", "temperature", "max_tokens", "logprobs"}


def test_picture_arrives_upright_with_its_pixels_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(file, "PNG", exif=exif, icc_profile=b"a profile", transparency=tuple(pixels[0, 0].tolist()))
    sent = decode(build_request(Image.open(file), TASK, Service("", "tiny", 40)))
    assert (np.asarray(sent) == np.rot90(pixels, -1)).all()
    assert sent.mode == "RGB"
    assert sent.info == {}
    assert not sent.getexif()


def test_command_prints_server_request_and_how_to_send_it(merged, tmp_path, capsys):
    Image.new("RGB", (30, 20)).save(tmp_path / "a picture.png")
    command = ["--model", str(merged), "--request", str(tmp_path / "a picture.png")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    limits = """--dtype float16 --max-model-len 192 --limit-mm-per-prompt '{"image": 1, "video": 0}'"""
    budget = """--mm-processor-kwargs '{"size": {"shortest_edge": 3136, "longest_edge": 51744}}'"""
    assert f"\nvllm serve {merged} --served-model-name {merged} {limits} {budget}\n" in printed
    assert re.search(r'"url": "data:image/png;base64,\w+\.\.\. \(\d+ characters\)"', printed)
    assert "a picture.png' --json | curl http://localhost:8000/v1/chat/completions -H" in printed
    assert main([*command, "--json"]) == 0
    assert decode(json.loads(capsys.readouterr().out)).size == (30, 20)


# ---- the answers ---------------------------------------------------------------------------------------------------


def test_right_server_gives_the_answers_of_the_notebook(merged, respond, tmp_path, capsys):
    with serve(respond) as url:
        assert main(["--model", str(merged), "--server", url, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 answers are identical" in printed
    assert "server against notebook: +0.000 [+0.000, +0.000] mean IoU: no difference seen" in printed
    assert "\n- " not in printed
    ours, theirs = RunFolder(merged).read_records(), RunFolder(tmp_path).read_records()
    assert [them.pop("finish_reason") for them in theirs] == ["stop"] * 6
    assert all(them.pop("prompt_tokens") > 100 for them in theirs)
    for us, them in zip(ours, theirs, strict=True):
        assert them["prediction"][0].pop("score") == pytest.approx(us["prediction"][0].pop("score"), abs=1e-4)
    assert theirs == ours
    assert main(["--model", str(merged), "--answers", str(tmp_path / "predictions.jsonl")]) == 0
    assert "6 of 6 answers are identical" in capsys.readouterr().out


def lose_marks(respond, body):
    del body["skip_special_tokens"]
    return respond(body)


def cut_off(respond, body):
    return respond(body | {"max_tokens": 12})


def forget_to_turn(respond, body):
    image = decode(body)
    return respond(body, image.transpose(Image.Transpose.ROTATE_90) if image.width > image.height else image)


def drop_system_message(respond, body):
    return respond(body | {"messages": body["messages"][1:]})


def ignore_budget(respond, body):
    return respond(body | {"mm_processor_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 12544}}})


def write_pixels(respond, body):
    status, completion = respond(body)
    message = completion["choices"][0]["message"]
    message["content"] = re.sub(r"\d+", lambda number: str(round(int(number[0]) * 0.448)), message["content"])
    return status, completion


def pad_pictures(respond, body):
    image = decode(body)
    padded = Image.new("RGB", (image.width * 5 // 4, image.height * 5 // 4), "white")
    padded.paste(image, (image.width // 4, image.height // 4))
    return respond(body, padded)


def write_prose(respond, body):
    status, completion = respond(body)
    completion["choices"][0]["message"]["content"] = "There is a barcode near the lower edge."
    return status, completion


def round_to_16_bits(respond, body):
    return respond(body, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (lose_marks, 0, "no answer of the server has special tokens such as <|box_start|>: send `skip_special_tokens"),
        (cut_off, 1, "6 of 6 answers are cut off, the first after '"),
        (
            forget_to_turn,
            1,
            "2 of 2 pictures with an EXIF orientation have their boxes elsewhere, of the others 0 of 4",
        ),
        (
            drop_system_message,
            0,
            "the server's prompts have +1 tokens: another system message, question or chat template",
        ),
        (ignore_budget, 1, "tokens, by picture: another pixel budget (`mm_processor_kwargs`)"),
        (
            write_pixels,
            1,
            "x of its boxes are 0.45 times the notebook's +0, y 0.45 times +0, on all pictures: it answers in",
        ),
        (pad_pictures, 1, "it answers in another convention (pixels, or the grid), or pads or crops pictures before"),
        (
            write_prose,
            1,
            "6 of 6 answers have lost their boxes, the first is 'There is a barcode near the lower edge.'",
        ),
        (round_to_16_bits, 0, "other kernels round otherwise, mostly in 16 bits; harmless"),
    ],
)
def test_error_of_a_server_is_named(merged, respond, tmp_path, capsys, error, code, cause):
    with serve(lambda body: error(respond, body)) as url:
        left = main(["--model", str(merged), "--server", url, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    causes = [line for line in printed.splitlines() if line.startswith("- ")]
    assert len(causes) == 1
    assert cause in causes[0]
    assert left == code


# ---- the checker, answer by answer ---------------------------------------------------------------------------------


def to_records(*answers: str, orientations: tuple[int, ...] = ()) -> list[dict]:
    """Records of answers about pictures of 1,000 x 1,000 pixels, each with the same barcode."""
    truth = [{"label": "barcode", "box": [100, 200, 300, 400]}]
    known = {"width": 1000, "height": 1000, "resized": [280, 280], "truth": truth, "prompt_tokens": 130}
    turns = orientations or (1,) * len(answers)
    return [
        add_answer({"id": number, "orientation": turn} | known, Answer(answer), TASK)
        for number, (answer, turn) in enumerate(zip(answers, turns, strict=True))
    ]


def test_answer_without_the_ending_token_is_the_same(capsys):
    assert check(to_records(ANSWER + "<|im_end|>"), to_records(ANSWER)) == 0
    assert "1 of 1 answers are identical" in capsys.readouterr().out


def test_answer_that_breaks_off_is_cut_off_also_where_the_server_does_not_say_so():
    assert "1 of 2 answers are cut off" in find_causes(to_records(ANSWER, ANSWER), to_records(ANSWER[:-20], ANSWER))[0]


def test_prompt_of_another_length_on_pictures_of_one_size_may_be_text_or_pixels():
    ours, theirs = to_records(ANSWER), [record | {"prompt_tokens": 120} for record in to_records(ANSWER[:-1])]
    text = "another system message, question or chat template, or another pixel budget (`mm_processor_kwargs`)"
    assert find_causes(ours, theirs) == [f"the server's prompts have -10 tokens: {text}"]


def test_difference_without_a_usual_cause_says_where_to_look():
    other = ANSWER.replace("(100,200),(300,400)", "(600,600),(700,900)")
    causes = find_causes(to_records(ANSWER, ANSWER, ANSWER), to_records(ANSWER, ANSWER, other))
    assert causes == ["none of the usual causes shows: look at the answers about 2"]


def test_boxes_that_lie_elsewhere_on_all_pictures_are_not_blamed_on_their_orientation():
    other = ANSWER.replace("(100,200),(300,400)", "(600,600),(700,900)")
    turned = {"orientations": (6, 1)}
    causes = find_causes(to_records(ANSWER, ANSWER, **turned), to_records(other, other, **turned))
    assert causes == ["none of the usual causes shows: look at the answers about 0, 1"]


def test_nothing_can_be_said_of_pictures_without_objects():
    empty = [record | {"truth": []} for record in to_records(ANSWER)]
    with pytest.raises(ValueError, match="None of the 1 pictures has a true box: ask about more"):
        check(empty, empty)


def test_scores_come_from_the_tokens_of_the_text():
    tokens = [("bar", 0.5), ("code", 0.25), ("(1,2),(3,4)", 0.81), ("<|im_end|>", 1.0)]
    logprobs = {"content": [{"token": token, "logprob": float(np.log(p))} for token, p in tokens]}
    answer = read_answer({"message": {"content": "barcode(1,2),(3,4)"}, "logprobs": logprobs})
    assert answer.ends == [3, 7, 18, 28]
    assert answer.score(7, 18) == pytest.approx(0.81)
    other = read_answer({"message": {"content": "code(1,2),(3,4)"}, "logprobs": logprobs})
    assert other == Answer("code(1,2),(3,4)")


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def run(capsys, *arguments: object) -> str:
    """What the command says before it ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_server_that_is_not_there(merged, tmp_path, capsys):
    with serve(lambda body: (200, {})) as url:
        pass
    error = run(capsys, "--model", merged, "--server", url, "--output", tmp_path)
    assert f"{url}/models: no server answers (" in error
    assert "(`vllm serve`)" in error


def test_model_that_is_not_served(merged, tmp_path, capsys):
    with serve(lambda body: (200, {}), ("a", "b")) as url:
        error = run(capsys, "--model", merged, "--server", url, "--output", tmp_path, "--name", "c")
        assert f"{url} has no model 'c': give --name one that it serves: a, b." in error
        error = run(capsys, "--model", merged, "--server", url, "--output", tmp_path)
        assert f"{url} has 2 models: give --name one that it serves: a, b." in error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (400, {"error": {"message": "too many tokens", "code": 400}}),
            "/chat/completions answered 400: too many tokens",
        ),
        ((422, {"detail": "Unexpected fields"}), "/chat/completions answered 422: Unexpected fields"),
        ((401, "no key"), '/chat/completions answered 401: "no key"'),
        ((200, {"choices": []}), '/chat/completions gave no answer: {"choices": []}'),
        ((200, "hello"), "give --server an address that ends in /v1"),
    ],
)
def test_what_a_server_refuses_is_passed_on(merged, tmp_path, capsys, answer, message):
    with serve(lambda body: answer) as url:
        assert message in run(capsys, "--model", merged, "--server", url, "--output", tmp_path)
    assert not (tmp_path / "predictions.jsonl").exists()


def test_busy_server_is_asked_again(merged, respond, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "PAUSES", (0.01, 0.01))
    asked = []

    def be_busy(body: dict) -> tuple[int, dict]:
        asked.append(body)
        return respond(body) if len(asked) > 2 else (503, {"detail": "busy"})

    with serve(be_busy) as url:
        assert main(["--model", str(merged), "--server", url, "--output", str(tmp_path), "--eval-samples", "1"]) == 0
    assert len(asked) == 3
    assert "1 of 1 answers are identical" in capsys.readouterr().out


def test_key_is_sent(monkeypatch):
    keys = []
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with serve(lambda body: (200, {}), keys=keys) as url:
        serving.call(Service(url, "tiny", 40), "/models")
    assert keys == ["Bearer secret"]


def test_answers_of_other_pictures_are_refused(merged, tmp_path, capsys):
    lines = (merged / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[:4]))
    error = run(capsys, "--model", merged, "--answers", tmp_path / "some.jsonl")
    assert "of the 6 pictures that were measured it lacks 2, and has 0 others; --eval-samples compares" in error
    (tmp_path / "bad.jsonl").write_text("{}")
    assert "bad.jsonl, line 1: no field id" in run(capsys, "--model", merged, "--answers", tmp_path / "bad.jsonl")


def test_what_cannot_be_is_refused(merged, tmp_path, capsys):
    assert "--server needs --output" in run(capsys, "--model", merged, "--server", "x", "--output", merged)
    assert "there is no recipe.json in it" in run(capsys, "--model", tmp_path, "--request", "x.png")
    assert "--request x.png: it cannot be read" in run(capsys, "--model", merged, "--request", "x.png")
    other = Dataset.from_list([to_row(9, Image.new("RGB", (30, 20)), [3, 2, 20, 10], turned=False)])
    other.cast_column("image", ImageFeature()).to_parquet(tmp_path / "other/data/val-00000-of-00001.parquet")
    error = run(capsys, "--model", merged, "--answers", "x", "--dataset-id", tmp_path / "other")
    assert "split val, has no picture 'picture 0'" in error
    copy = shutil.copytree(merged, tmp_path / "copy")
    (copy / "predictions.jsonl").unlink()
    error = run(capsys, "--model", copy, "--server", "x", "--output", tmp_path)
    assert f"`python -m helpers.results --model {copy} --evaluate-only` writes it" in error
    (copy / "adapter_config.json").write_text("{}")
    error = run(capsys, "--model", copy, "--server", "x", "--output", tmp_path)
    assert (
        f"is an adapter: merge it with `python -m helpers.results --model {copy} --merge OUTPUT_DIR/merged`" in error
    )
