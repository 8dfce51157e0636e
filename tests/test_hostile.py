"""Labels, answers and ids that hold formulas, HTML, Markdown or paths stay what they are, wherever they are shown."""

import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import matplotlib.pyplot as plt
import mistune
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image

from helpers.analysis import write_card
from helpers.conversation import Task, format_answer
from helpers.deployment import as_code, write_model_card
from helpers.detect import build_parser, detect_files, write_results
from helpers.detection import add_answer
from helpers.export import ROOT
from helpers.generation import Answer
from helpers.parsing import parse_answer
from helpers.plots import plot_images, plot_token_probabilities, to_jpeg
from helpers.preprocessing import plot_trained_tokens
from helpers.recipes import CATALOGUE
from helpers.runs import RunFolder, write_json

HOSTILE = [r"a$\frac$b", "<img src=x onerror=1>", "../../x", "[x](http://y)", "|", "`x` <b>", "![](http://y)"]
IMAGE = Image.new("RGB", (56, 56))


def to_html(text):
    """Markdown as the hub and code hosts show it, HTML in it kept."""
    html = mistune.html(text)
    assert re.search(r"<(?!img src=\"(plots|worst)\.png\")(img|b|a)\b", html) is None, html
    return html


def to_record(label, image_id):
    truth = [{"label": label, "box": [5.6, 5.6, 28, 28], "category_id": 1}]
    found = {"label": label, "box": [5.6, 5.6, 28, 28], "score": 0.5, "category_id": 1}
    return {
        "id": image_id,
        "truth": truth,
        "prediction": [found],
        "unread": [label],
        "iou": 1.0,
        "width": 56,
        "height": 56,
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_figures(text):
    to_jpeg(plot_images([IMAGE], [[[1, 1, 5, 5]]], titles=[text]))
    to_jpeg(plot_token_probabilities({"model": Answer(text, range(1, len(text) + 1), [0.5] * len(text))}))
    to_jpeg(plot_token_probabilities({"model": Answer(text, [len(text)], [0.5])}))


def test_tokens_that_are_coloured(base):
    from helpers.loading import load_processor

    tokenizer = load_processor(str(base), 16 * 28 * 28).tokenizer
    ids = tokenizer(r"a$\frac$b", return_tensors="pt")["input_ids"]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids * 0 + 1}
    to_jpeg(plot_trained_tokens({"v1": batch}, tokenizer))


def test_evaluation_card(tmp_path):
    objects = [{"bbox": [[0.1, 0.1, 0.5, 0.5]], "category_name": [label]} for label in HOSTILE]
    rows = Dataset.from_dict({"image_id": HOSTILE, "image": [IMAGE] * len(HOSTILE), "objects": objects})
    folder = tmp_path / "card"
    folder.mkdir()
    write_card(folder, [to_record(label, label) for label in HOSTILE], rows, "multi-class")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "card",
        "card/card.md",
        "card/plots.png",
        "card/worst.png",
    ]
    html = to_html((folder / "card.md").read_text())
    assert html.count("<td>|</td>") == html.count("<td>../../x</td>") > 0
    assert "<code>a$\\frac$b</code>" in html
    assert plt.get_fignums() == []


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_model_card(tmp_path, family):
    task = Task(" and ".join(HOSTILE), HOSTILE, family, "# you\n\n> see " + HOSTILE[1], {"max_pixels": 12544})
    settings = {"model_id": HOSTILE[1], "dataset_id": HOSTILE[3]}
    write_json(tmp_path / "recipe.json", asdict(CATALOGUE["r4-joint"]) | asdict(task) | {"settings": settings})
    write_model_card(tmp_path, {"mean_iou": 0.5})
    html = to_html(ModelCard.load(tmp_path / "README.md").text)
    assert "<code># you &gt; see &lt;img src=x onerror=1&gt;</code>" in html
    assert html.count("<h1>") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_code_is_the_text_itself(text):
    shown = re.fullmatch(r"<p>.*<code>(.*)</code></p>\s*", mistune.html("a " + as_code(text)))[1]
    assert shown.replace("&lt;", "<").replace("&gt;", ">").strip() == text


@pytest.mark.parametrize("text", HOSTILE)
def test_answers_and_records(tmp_path, text):
    truth = [{"label": text, "box": [10.0, 10.0, 20.0, 20.0]}]
    record = {"id": text, "width": 100, "height": 100, "truth": truth}
    answer = format_answer([text], [[100, 100, 200, 200]])
    found = add_answer(record, Answer(answer), Task("?", (text, "other")))
    assert [labelled["box"] for labelled in found["prediction"]] == [[10.0, 10.0, 20.0, 20.0]]
    RunFolder(tmp_path / "run").write_records([found])
    assert [entry["id"] for entry in RunFolder(tmp_path / "run").read_records()] == [text]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    parse_answer(text)


def test_pictures_of_any_name_stay_in_the_output_folder(tmp_path):
    names = [name.replace("/", "_") + ".png" for name in HOSTILE] + ["..png", "...png"]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in names:
        IMAGE.save(tmp_path / "in" / name, "png")
    pictures = [tmp_path / "out/../in" / name for name in names]
    records = [to_record(label, label) for label in (HOSTILE * 2)[: len(names)]]
    asked = SimpleNamespace(ask=lambda files, **options: records)
    argv = ["--model", "unused", "--output", str(tmp_path / "out"), *map(str, pictures)]
    found = detect_files(asked, pictures, build_parser().parse_args(argv))
    write_results(pictures, found, HOSTILE[:2], tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(written) == len(names) + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    categories = json.loads((tmp_path / "out/images.json").read_text())["categories"]
    assert {category["name"] for category in categories} == set(HOSTILE)


def test_tables_of_the_story_are_escaped():
    cells = (ROOT / "fine_tuning_vlm_for_object_detection_trl.py").read_text().split("\n# %%")
    shown = [
        cell for cell in cells if ".style" in cell and re.search(r"answer\.text|\.decode\(|trained_texts|raw", cell)
    ]
    assert len(shown) == 3
    assert all('.style.format(escape="html")' in cell for cell in shown)
