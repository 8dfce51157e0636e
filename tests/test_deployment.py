"""What leaves the project: merged weights, a call for one picture, cards that tell what was measured."""

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image

from helpers.card import write_card
from helpers.collators import AssistantOnlyCollator
from helpers.conversation import PROMPT
from helpers.data import load_rows, to_training_dataset
from helpers.deployment import detect, save_merged, write_model_card
from helpers.evaluation import evaluate_model, generate_answers, save_results, to_questions
from helpers.loading import load_model, load_processor, load_trained_model
from helpers.metrics import summarize
from helpers.recipes import RECIPES, IoUAtEvaluation, create_training_config, run_recipe
from helpers.tiny.packages import draw_package

QUESTION = PROMPT.format(label="barcode")


@pytest.fixture(scope="module")
def processor(base):
    return load_processor(str(base), 66 * 28 * 28)


@pytest.fixture(scope="module")
def trained(base, processor, dataset_folder, tmp_path_factory):
    """An adapter on both towers that moves the weights a good deal."""
    rows = load_rows(str(dataset_folder), "train", 8, 0)
    dataset = to_training_dataset(rows, QUESTION, 0.0)
    config = create_training_config(
        "r4-joint", tmp_path_factory.mktemp("out"), learning_rate=1e-2, num_epochs=1, max_steps=4, batch_size=2,
        gradient_accumulation_steps=1, gradient_checkpointing=False, seed=0, report_to="none",
    )  # fmt: skip
    config.load_best_model_at_end = False  # the last one, which has moved most
    watch = [IoUAtEvaluation(processor, rows.select([0]), QUESTION, 1)]
    return run_recipe(
        RECIPES["r4-joint"], str(base), processor, dataset, dataset.select([0]), config,
        AssistantOnlyCollator(processor), watch,
    )  # fmt: skip


@pytest.mark.slow
def test_an_adapter_computes_in_the_precision_of_its_base(trained, processor, monkeypatch):
    monkeypatch.setattr("helpers.loading.best_dtype", lambda: torch.bfloat16)  # as on a GPU
    model = load_trained_model(trained)
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert kinds == {torch.bfloat16}
    assert generate_answers(model, processor, [draw_package(0)[0]], QUESTION, 4)[0].startswith("<|object_ref_start|>")


@pytest.mark.slow
def test_merged_model_is_the_model_with_its_adapter(base, processor, trained, tmp_path):
    adapted = load_trained_model(trained, quantized=False)
    images = [draw_package(seed)[0] for seed in range(4)]
    questions = to_questions(images, processor, QUESTION)
    with torch.no_grad():
        wanted = adapted(**questions).logits
    save_merged(adapted, tmp_path, processor)
    merged = load_model(str(tmp_path), quantized=False, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**questions).logits, wanted, atol=1e-3, rtol=1e-3)
        plain = load_model(str(base), quantized=False, dtype=torch.float32).eval()
        assert (plain(**questions).logits - wanted).abs().max() > 0.1  # the adapter did change something
    assert not (tmp_path / "adapter_config.json").exists()
    own = load_processor(str(tmp_path), 10**9)
    assert generate_answers(merged, own, images, QUESTION, 24) == generate_answers(
        merged, processor, images, QUESTION, 24
    )


def test_one_picture_is_detected_upright(base, processor):
    model = load_model(str(base), quantized=False, dtype=torch.float32).eval()
    image = draw_package(0)[0]
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    found = detect(image, model, processor, QUESTION)
    assert set(found[0]) == {"label", "box", "score"}
    assert 0 < found[0]["score"] <= 1
    assert [thing["box"] for thing in detect(turned, model, processor, QUESTION)] == [thing["box"] for thing in found]


def test_model_card_says_how_to_ask(tmp_path):
    records = [{"id": "a", "truth": [{"label": "t", "box": [0, 0, 1, 1]}], "prediction": [], "iou": 0.0}]
    write_model_card(tmp_path, "some/base", "some/dataset", RECIPES["r4-joint"], QUESTION, 51_744, summarize(records))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/base"
    result = card.data.eval_results[0]
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("some/dataset", "mean_iou", 0.0)
    assert QUESTION in card.text
    assert "51,744 pixels" in card.text
    assert "Measured on 1 pictures" in card.text
    assert "| n |" not in card.text


@pytest.mark.slow
def test_evaluation_card(base, processor, dataset_folder, tmp_path):
    rows = load_dataset(str(dataset_folder))["val"]
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    records = evaluate_model(model, processor, rows, QUESTION, None, 40)
    save_results(tmp_path, records)
    write_card(tmp_path, records, rows)
    text = (tmp_path / "card.md").read_text()
    assert "8 pictures, hits from IoU 0.5 on." in text
    assert "| detection_rate | 1.000 | 1.000, 1.000 |" in text
    for name in ("figures.png", "worst.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800
        assert name in text
