"""From answers to records and files, and the command that measures a file of answers."""

import json

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers import evaluation
from helpers.conversation import PROMPT
from helpers.evaluation import (
    Answer,
    evaluate_model,
    generate,
    generate_answers,
    main,
    measure_agreement,
    prepare_ahead,
    save_comparison,
    save_results,
    to_questions,
    to_record,
)
from helpers.loading import load_model
from helpers.tiny.packages import draw_package


def record(boxes, unread=()):
    truth, prediction = ([{"label": "t", "box": box} for box in side] for side in ([[0, 0, 10, 10]], boxes))
    return {"id": "a", "truth": truth, "prediction": prediction, "unread": list(unread)}


def test_record_by_hand():
    example = (Image.new("RGB", (200, 100)), [[20, 10, 100, 50]], ["table"])
    answer = "table(100,100),(500,300)b(1200,0),(1300,10)c(1,2"
    assert to_record("a", example, answer, "qwen2_vl", (196, 112)) == {
        "id": "a",
        "width": 200,
        "height": 100,
        "resized": [196, 112],
        "truth": [{"label": "table", "box": [20, 10, 100, 50]}],
        "raw": answer,
        "iou": pytest.approx(0.5),
        "prediction": [{"label": "table", "box": [20, 10, 100, 30]}],
        "unread": ["(1,2", "b[1200.0, 0.0, 1300.0, 10.0]"],  # the second is outside of the picture
    }


def test_answer_in_pixels_of_the_resized_picture():
    example = (Image.new("RGB", (200, 100)), [[100, 50, 200, 100]], ["table"])
    answer = '[{"bbox_2d": [98, 56, 196, 112], "label": "table"}]'
    assert to_record("a", example, answer, "qwen2_5_vl", (196, 112))["iou"] == 1


def test_record_of_a_picture_without_truth():
    assert to_record("a", (Image.new("RGB", (9, 9)), [], []), "", "qwen2_vl", (28, 28))["iou"] is None


def test_records_of_a_model(base, dataset_folder):
    rows = load_dataset(str(dataset_folder))["val"].select(range(3))
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    processor = Qwen2VLProcessor.from_pretrained(base)
    records = evaluate_model(model, processor, rows, PROMPT.format(label="barcode"), 2, 40)
    assert [r["id"] for r in records] == rows["image_id"]
    assert [r["group"] for r in records] == [meta["barcode"] for meta in rows["meta"]]
    patches = processor.image_processor([r.convert("RGB") for r in rows["image"]])["image_grid_thw"]
    assert [r["resized"] for r in records] == [[14 * w, 14 * h] for _, h, w in patches.tolist()]
    assert all(r["prediction"] for r in records)


def test_results_and_comparison_on_disk(tmp_path):
    for name, width in [("r1-llm-only", 8), ("base", 1)]:
        save_results(tmp_path / name, [record([[0, 0, width, 10]])])
    comparison = save_comparison(tmp_path)
    assert list(comparison) == ["base", "r1-llm-only"]
    assert json.loads((tmp_path / "comparison.json").read_text())["r1-llm-only"]["mean_iou"] == 0.8
    assert json.loads((tmp_path / "base/predictions.jsonl").read_text())["prediction"][0]["box"] == [0, 0, 1, 10]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *("comparison.json", "metrics.json", "metrics.json", "predictions.jsonl", "predictions.jsonl"),
    ]


def test_batched_answers_equal_those_given_one_by_one(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(base)
    images = [draw_package(seed)[0] for seed in range(6)]
    assert len({image.size for image in images}) > 1  # so that rows are padded
    prompt = PROMPT.format(label="barcode")
    together = generate_answers(model, processor, images, prompt, 40)
    assert together == [generate_answers(model, processor, [image], prompt, 40)[0] for image in images]
    assert all(answer.endswith("<|im_end|>") for answer in together)


def test_picture_of_a_unit_size_is_answered(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(base)
    assert len(generate_answers(model, processor, [Image.new("RGB", (1, 1))], "?", 4)) == 1


def test_scores_are_the_models_own_probabilities(base):
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(base)
    images = [draw_package(seed)[0] for seed in range(3)]
    prompt = PROMPT.format(label="barcode")
    batch = generate(model, processor.tokenizer, to_questions(images, processor, prompt), 40)
    alone = generate(model, processor.tokenizer, to_questions(images[1:2], processor, prompt), 40)[0]
    assert batch[1].text == alone.text
    assert batch[1].probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    # the same probabilities from one forward pass over question and answer
    tokens = processor.tokenizer.encode(alone.text)
    questions = to_questions(images[1:2], processor, prompt)
    questions["input_ids"] = torch.cat([questions["input_ids"], torch.tensor([tokens])], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        questions[name] = torch.cat([questions[name], torch.full((1, len(tokens)), value)], dim=1)
    with torch.no_grad():
        logits = model(**questions).logits[0, -len(tokens) - 1 : -1]
    wanted = logits.softmax(-1)[torch.arange(len(tokens)), tokens]
    assert alone.probabilities == pytest.approx(wanted.tolist(), abs=1e-4)
    assert alone.ends[-1] == len(alone.text)


def test_score_of_a_box_is_the_geometric_mean_of_its_tokens():
    answer = Answer("a(1,2),(3,4)<|im_end|>", ends=[1, 6, 12, 22], probabilities=[0.1, 0.5, 0.08, 0.9])
    assert answer.score(1, 12) == pytest.approx(0.2)  # the square root of 0.5 * 0.08
    record = to_record("a", (Image.new("RGB", (9, 9)), [], []), answer.text, "qwen2_vl", (28, 28), answer.score)
    assert record["prediction"][0]["score"] == pytest.approx(0.2)


def test_order_and_batches_do_not_change_the_records(base, dataset_folder):
    rows = load_dataset(str(dataset_folder))["val"]
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    processor = Qwen2VLProcessor.from_pretrained(base)
    prompt = PROMPT.format(label="barcode")
    together, alone = (evaluate_model(model, processor, rows, prompt, size, 40) for size in (None, 1))
    assert [r["id"] for r in together] == rows["image_id"]
    assert [(r["id"], r["raw"]) for r in together] == [(r["id"], r["raw"]) for r in alone]


def test_the_next_pictures_are_prepared_while_these_are_used():
    done = []
    items = prepare_ahead(lambda number: done.append(number) or number, range(4), ahead=2)
    assert next(items) == 0
    while len(done) < 3:  # the thread goes on by itself
        pass
    assert done == [0, 1, 2]
    assert list(items) == [1, 2, 3]
    assert done == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        list(prepare_ahead(lambda number: 1 / number, [1, 0], ahead=1))


def test_questions_are_padded_on_the_left_and_only_where_lengths_differ(base):
    processor = Qwen2VLProcessor.from_pretrained(base)
    small, large = Image.new("RGB", (56, 56)), Image.new("RGB", (112, 84))
    mixed = to_questions([small, large], processor, "?")
    alone = to_questions([small], processor, "?")
    assert mixed["input_ids"].shape[1] % 8 == 0
    padding = mixed["input_ids"].shape[1] - alone["input_ids"].shape[1]
    assert padding >= 8
    assert mixed["attention_mask"][0].tolist() == [0] * padding + [1] * alone["input_ids"].shape[1]
    assert mixed["input_ids"][0, padding:].tolist() == alone["input_ids"][0].tolist()
    assert (mixed["input_ids"][0, :padding] == processor.tokenizer.pad_token_id).all()
    assert mixed["pixel_values"].shape[0] == (4 + 12) * 4
    equal = to_questions([small, small], processor, "?")
    assert equal["attention_mask"].all()


def test_agreement_of_two_models():
    same, other, nothing = record([[0, 0, 10, 10]]), record([[0, 0, 10, 5]]), record([])
    assert measure_agreement([same, nothing], [same, nothing]) == 1
    assert measure_agreement([other, same], [same, nothing]) == 0.25


# The command

LINES = [
    {  # IoU 1/3, see tests/test_metrics.py; 1000 x 1000 pixels, so that grid and pixels are the same
        "raw": "table(5,0),(15,10)",
        "truth": [[0, 0, 10, 10]],
    },
    {"raw": "table(0,0),(10,20)", "truth": [[0, 0, 10, 10], [0, 0, 10, 20]]},  # best IoU 0.5 and 1
    {"raw": "table(0,0),(10,8),(20,20),(30,30),(50,0),(60,10)", "truth": [[0, 0, 10, 10]]},  # 0.8 and two others
    {"raw": "table(0,0),(10", "truth": []},
]


def write_lines(path, lines):
    things = [[{"label": "nutrition-table", "box": box} for box in line["truth"]] for line in lines]
    full = [
        {"id": str(n), "width": 1000, "height": 1000, "raw": line["raw"], "truth": truth}
        for n, (line, truth) in enumerate(zip(lines, things, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in full))
    return str(path)


def test_command_gives_the_figures_computed_by_hand(tmp_path, capsys):
    main(["--predictions", write_lines(tmp_path / "p.jsonl", LINES), "--json"])
    report = json.loads(capsys.readouterr().out)
    wanted = {
        "mean_best_iou": (1 / 3 + 0.5 + 1 + 0.8) / 4,
        "precision": 2 / 5,
        "recall": 2 / 4,
        "f1": 2 * 0.4 * 0.5 / 0.9,
        "malformed_rate": 1 / 4,
        "n": 4,
    }
    assert {name: report[name] for name in wanted} == pytest.approx(wanted)
    assert report["intervals"]["precision"][0] < 2 / 5 < report["intervals"]["precision"][1]
    assert report["errors"] == {
        **{"correct": 2, "shifted": 1, "duplicate": 0, "background": 2, "missed": 1, "malformed": 1}
    }


def test_command_prints_a_table(tmp_path, capsys):
    main(["--predictions", write_lines(tmp_path / "p.jsonl", LINES), "--iou", "0.9"])
    printed = capsys.readouterr().out
    assert "precision          0.200  [" in printed  # one of five
    assert "4 pictures; hits from IoU 0.9 on; labels: merge" in printed


def test_command_prints_labels_where_they_count(tmp_path, capsys):
    lines = [{"id": 1, "width": 9, "height": 9, "raw": "", "truth": [{"label": x, "box": [0, 0, 1, 1]} for x in "ab"]}]
    (tmp_path / "p.jsonl").write_text(json.dumps(lines[0]))
    main(["--predictions", str(tmp_path / "p.jsonl"), "--policy", "multi-class", "--json"])
    assert list(json.loads(capsys.readouterr().out)["labels"]) == ["a", "b"]


def test_command_reads_what_was_saved(tmp_path, capsys):
    example = (Image.new("RGB", (200, 100)), [[20, 10, 100, 50]], ["table"])
    records = [to_record("a", example, "table(100,100),(500,300)", "qwen2_vl", (196, 112))]
    metrics = save_results(tmp_path, records)
    main(["--predictions", str(tmp_path / "predictions.jsonl"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json.dumps(metrics))  # JSON has no tuples


GOOD = {"id": 1, "width": 10, "height": 10, "raw": "", "truth": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.jsonl is empty: write one line per picture; a line is \{"),
        ("\n\n", "is empty"),
        (json.dumps(GOOD) + "\n{oops\n", "line 2 is not JSON: a line is"),
        (b"\xff\xfe\xff", "line 1 is not JSON"),
        ("[1]", "line 1: not a JSON object; a line is"),
        (json.dumps({"id": 1, "raw": "", "truth": []}), "line 1: no field width, height; a line is"),
        (json.dumps(GOOD | {"width": 0}), "line 1: width, height .* must be whole numbers of pixels"),
        (json.dumps(GOOD | {"raw": None}), "line 1: raw must be a text"),
        (json.dumps(GOOD | {"truth": None}), "line 1: truth must be a list"),
        (json.dumps(GOOD | {"truth": [{"label": "a", "box": [1, 2, 1, 4]}]}), "line 1: truth must be .* x1 < x2"),
        (json.dumps(GOOD | {"truth": [{"label": "a", "box": [1, 2, float("nan"), 4]}]}), "line 1: truth must be"),
    ],
)
def test_command_names_the_line_that_is_wrong(tmp_path, capsys, text, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stopped:
        main(["--predictions", str(path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1
    with pytest.raises(ValueError, match=message):
        evaluation.read_predictions(path, "qwen2_vl")


@pytest.mark.parametrize("name", ["missing.jsonl", ""])  # no such file; a folder
def test_command_without_a_file(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main(["--predictions", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert "give --predictions an existing file" in capsys.readouterr().err


def test_command_refuses_an_impossible_threshold(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--predictions", str(tmp_path), "--iou", "50"])
    assert "--iou 50.0 is not an IoU" in capsys.readouterr().err
