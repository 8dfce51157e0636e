"""What leaves the project: merged weights, and a card that says how to ask them."""

from dataclasses import asdict, replace
from io import BytesIO

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import ExifTags, Image

from helpers import training
from helpers.conversation import Task
from helpers.data import load_splits
from helpers.deployment import save_merged, write_model_card
from helpers.generation import Detector, generate, to_questions
from helpers.loading import load_model, load_processor
from helpers.metrics import summarize
from helpers.recipes import CATALOGUE
from helpers.runs import RunFolder, write_json
from helpers.tiny.packages import draw_package
from helpers.training import create_training_config, load_detector, run_recipe


@pytest.fixture(scope="module")
def settings(make_settings, tmp_path_factory):
    rates = {"learning_rates": {"r4-joint": 1e-2}}
    return make_settings(tmp_path_factory.mktemp("out"), validation_samples=1, max_new_tokens=24, **rates)


@pytest.fixture(scope="module")
def trained(settings):
    """An adapter on both towers that moves the weights a good deal."""

    def keep_last(*arguments):  # the last one, which has moved most
        config = create_training_config(*arguments)
        config.load_best_model_at_end = False
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "create_training_config", keep_last)
        return run_recipe(CATALOGUE["r4-joint"], settings, load_splits(settings)).path


@pytest.mark.slow
def test_an_adapter_computes_in_the_precision_of_its_base(trained, settings, monkeypatch):
    monkeypatch.setattr("helpers.training.best_dtype", lambda: torch.bfloat16)  # as on a GPU
    detector = replace(load_detector(trained, settings), max_new_tokens=4)
    kinds = {parameter.dtype for name, parameter in detector.model.named_parameters() if "lora_" in name}
    assert kinds == {torch.bfloat16}
    answer = generate(detector, to_questions([draw_package(0)[0]], detector))[0]
    assert len(answer.probabilities) == 4


@pytest.mark.slow
def test_merged_model_is_the_model_with_its_adapter(base, trained, settings, tmp_path):
    adapted = load_detector(trained, settings, "bf16")
    questions = to_questions([draw_package(seed)[0] for seed in range(4)], adapted)
    with torch.no_grad():
        wanted = adapted.model(**questions).logits
    save_merged(adapted, RunFolder(trained), tmp_path)
    merged = load_detector(tmp_path, settings)
    assert merged.task == RunFolder(trained).read_task()
    with torch.no_grad():
        torch.testing.assert_close(merged.model(**questions).logits, wanted, atol=1e-3, rtol=1e-3)
        plain = load_model(str(base), quantized=False, dtype=torch.float32).eval()
        assert (plain(**questions).logits - wanted).abs().max() > 0.1  # the adapter did change something
    assert not (tmp_path / "adapter_config.json").exists()
    own = replace(merged, processor=load_processor(str(tmp_path), 10**9))
    assert [a.text for a in generate(own, questions)] == [a.text for a in generate(merged, questions)]


def test_model_without_adapters_is_saved_as_it_is(base, tmp_path):
    model = load_model(str(base), quantized=False, dtype=torch.float32)
    write_json(tmp_path / "run/recipe.json", {"precision": "bf16"})
    detector = Detector(model, load_processor(str(base), 16 * 28 * 28), Task("?"))
    save_merged(detector, RunFolder(tmp_path / "run"), tmp_path)
    saved = load_model(str(tmp_path), quantized=False, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert load_processor(str(tmp_path), 10**9).image_processor.size["longest_edge"] == 16 * 28 * 28


@pytest.mark.parametrize(
    ("family", "example", "coordinates"),
    [
        ("qwen2_vl", "nutrition-table<|object_ref_end|><|box_start|>(120,240),(480,960)", "on a grid from 0 to 1000"),
        ("qwen2_5_vl", '{"bbox_2d": [120, 240, 480, 960], "label": "nutrition-table"}', "in pixels of the image as"),
    ],
)
def test_model_card_says_how_to_ask(tmp_path, family, example, coordinates):
    task = Task("Where are they?", ["nutrition-table", "logo"], family, "You see labels.", {"max_pixels": 12544})
    settings = {"model_id": "some/base", "dataset_id": "some/dataset"}
    write_json(tmp_path / "recipe.json", asdict(CATALOGUE["r4-joint"]) | asdict(task) | {"settings": settings})
    records = [{"id": "a", "truth": [{"label": "t", "box": [0, 0, 1, 1]}], "prediction": [], "iou": 0.0}]
    write_model_card(tmp_path, summarize(records))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("some/base", ["some/dataset"])
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers")
    assert "> `Where are they?`\n" in card.text
    assert "> `You see labels.`\n" in card.text
    assert "to detect: `nutrition-table`, `logo`." in card.text
    assert example in card.text
    assert coordinates in card.text
    assert "at most 12544 pixels" in card.text


def test_the_processor_does_not_turn_an_image_upright_as_the_card_says(base):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = BytesIO()
    Image.new("RGB", (112, 56)).save(content, "JPEG", exif=exif)
    grid = load_processor(str(base), 66 * 28 * 28).image_processor(Image.open(content), return_tensors="pt")
    assert grid["image_grid_thw"].tolist() == [[1, 4, 8]]  # as stored: 4 rows of 8 patches
