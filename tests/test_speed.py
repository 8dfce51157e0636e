"""What makes training fast computes the same: plans, micro-batches, compiled layers, kept features, 8 bits."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from trl import SFTTrainer

from helpers.collators import AssistantOnlyCollator
from helpers.conversation import PROMPT, Task
from helpers.data import Mirroring, to_training_dataset
from helpers.loading import load_model, load_processor
from helpers.quantization import build_published_model
from helpers.recipes import CATALOGUE
from helpers.speed import (
    Float8Linear,
    attend_images,
    cache_features,
    compile_layers,
    convert_to_float8,
    describe_compilation,
    plan_memory,
    split_batch,
    to_float8,
    use_packed_attention,
)
from helpers.training import build_trainer, create_detector, load_trained_model, run_recipe

TASK = Task(PROMPT.format(label="nutrition table"))

R1, R2, R3, R4 = CATALOGUE.values()
GIB = 2**30


@pytest.fixture
def settings(make_settings, tmp_path):
    return make_settings(tmp_path)


@pytest.fixture
def make_trainer(settings, splits):
    """A trainer of a recipe on the base, as `train` makes it."""

    def make(recipe, **changes):
        vars(settings).update(changes)
        model = load_model(settings.model_id, recipe.quantized, torch.float32)
        return build_trainer(create_detector(model, settings, splits.labels), recipe, settings, splits)

    return make


@pytest.fixture
def published_7b(settings):
    """A detector whose model has the shape of the 7B one, without weights, and a budget of 1,280 image tokens."""
    detector = create_detector(build_published_model("7B"), settings, ["nutrition-table"])
    budget = detector.task.pixel_budget | {"max_pixels": 1280 * 28 * 28}
    return replace(detector, task=replace(detector.task, pixel_budget=budget))


@pytest.fixture
def batch(settings, splits):
    """Six images of the training split, of several sizes, as the collator hands them on."""
    examples = to_training_dataset(splits.train, TASK, Mirroring())
    processor = load_processor(settings.model_id, settings.max_pixels)
    return AssistantOnlyCollator(processor)([examples[number] for number in range(6)])


def gradients_of(trainer, batch):
    """What one step adds to the gradients of all that is trained, and its loss."""
    trainer.model.train()
    tokens = (batch["labels"] != -100).sum()
    loss = trainer.add_gradients(trainer.model, batch, tokens)
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_step(trainer, others, batch, rtol=1e-4):
    loss, gradients = gradients_of(trainer, batch)
    other_loss, other_gradients = gradients_of(others, batch)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - other_gradients[name]).norm() / gradient.norm().clamp(min=1e-9)
        assert difference < rtol or gradient.norm() == other_gradients[name].norm() == 0, name


# The memory plan


@pytest.mark.parametrize(
    ("recipe", "free", "images", "checkpointing"),
    [
        (R1, 73, 8, False),  # GiB: what an 80 GB GPU has left when the model is loaded
        (R2, 63, 4, False),
        (R4, 73, 4, False),
        (R1, 17, 8, True),  # and one of 24 GB
        (R4, 17, 8, True),
        (R1, 1, 1, True),  # what cannot fit is tried all the same
    ],
)
def test_plans_of_the_7b_model(published_7b, settings, monkeypatch, recipe, free, images, checkpointing):
    monkeypatch.setattr("helpers.speed.best_dtype", lambda: torch.bfloat16)
    settings.batch_size, settings.compile = 16, True
    plan = plan_memory(published_7b, recipe, settings, free * GIB)
    assert (plan.micro_batch_size, plan.checkpointing) == (images, checkpointing)
    assert plan.peak < free * GIB or free == 1


def test_what_is_set_takes_the_place_of_the_plan(published_7b, settings):
    settings.batch_size, settings.micro_batch_size = 16, 2
    plan = plan_memory(published_7b, R4, settings, 10 * GIB)
    assert (plan.micro_batch_size, plan.checkpointing) == (2, True)
    settings.gradient_checkpointing = False
    assert not plan_memory(published_7b, R4, settings, 10 * GIB).checkpointing


# Micro-batches


def test_micro_batches_hold_each_row_once_and_less_padding(batch):
    parts = list(split_batch(batch, 4))
    assert [len(part["input_ids"]) for part in parts] == [4, 2]
    assert sum(part["attention_mask"].sum() for part in parts) == batch["attention_mask"].sum()
    assert sum(part["pixel_values"].double().sum() for part in parts) == pytest.approx(
        batch["pixel_values"].double().sum()
    )
    lengths = [part["input_ids"].shape[1] for part in parts]
    assert lengths[0] == batch["input_ids"].shape[1]
    assert lengths[1] < lengths[0]
    assert all(length % 8 == 0 for length in lengths)


@pytest.mark.parametrize("recipe", [R1, R2, R4], ids=lambda recipe: recipe.name)
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(make_trainer, batch, recipe):
    assert_same_step(make_trainer(recipe, micro_batch_size=6), make_trainer(recipe, micro_batch_size=4), batch)


def test_out_of_memory_halves_the_micro_batch_and_loses_nothing(make_trainer, batch, monkeypatch, capsys):
    step, sizes = SFTTrainer.training_step, []

    def small_memory(self, model, inputs, *arguments):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError
        return step(self, model, inputs, *arguments)

    whole, halved = make_trainer(R1, micro_batch_size=6), make_trainer(R1, micro_batch_size=4)
    expected = gradients_of(whole, batch)
    monkeypatch.setattr(SFTTrainer, "training_step", small_memory)
    loss, gradients = gradients_of(halved, batch)
    assert sizes == [4, 2, 2, 2]
    assert "out of memory: going on with 2 images at once" in capsys.readouterr().out
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("images", "processes"), [(1, 1), (4, 2)], ids=["a single image", "torchrun"])
def test_what_cannot_be_halved_names_what_to_change(make_trainer, batch, monkeypatch, images, processes):
    trainer = make_trainer(R1, micro_batch_size=images)

    def no_memory(*arguments):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(SFTTrainer, "training_step", no_memory)
    monkeypatch.setattr(type(trainer.args), "world_size", processes)
    with pytest.raises(RuntimeError, match=rf"with {images} images at once\. Lower MICRO_BATCH_SIZE.* MAX_PIXELS"):
        trainer.add_gradients(trainer.model, batch, None)


# Compiled layers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo asks
@pytest.mark.parametrize("recipe", [pytest.param(R1, marks=pytest.mark.campaign), R4], ids=lambda recipe: recipe.name)
def test_compiled_layers_compute_the_same(make_trainer, batch, recipe):
    plain, compiled = make_trainer(recipe, compile=False), make_trainer(recipe, compile=True)
    assert_same_step(plain, compiled, batch, rtol=1e-3)
    frames, breaks = describe_compilation().split(" frames, ")
    assert frames.split(" of ")[0] == f"compiled {frames.split(' of ')[1]}"
    assert breaks == "0 graph breaks"


def test_recompiling_too_often_is_an_error(settings):
    model = load_model(settings.model_id, False, torch.float32)
    compile_layers(model, R1)
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        [double(torch.ones(size)) for size in range(2, 20)]
    assert [layer._compiled_call_impl is not None for layer in model.model.language_model.layers] == [True] * 6
    assert all(block._compiled_call_impl is None for block in model.model.visual.blocks)  # frozen


# A frozen vision tower


@pytest.fixture
def two_images(settings, splits):
    processor = load_processor(settings.model_id, settings.max_pixels)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((224, 168), (168, 224))]
    batch = processor.image_processor(images=images, return_tensors="pt")
    return batch["pixel_values"], batch["image_grid_thw"]


def test_a_frozen_tower_computes_each_image_once(settings, two_images, tmp_path, monkeypatch):
    visual = load_model(settings.model_id, False, torch.float32).model.visual.requires_grad_(False)
    compute, seen = visual.forward, []
    monkeypatch.setattr(visual, "forward", lambda *a, **k: seen.append(k["grid_thw"].tolist()) or compute(*a, **k))
    cache_features(visual, tmp_path / "features")
    first = visual(*two_images).pooler_output
    assert seen == [[[1, 12, 16]], [[1, 16, 12]]]
    torch.testing.assert_close(first, compute(*two_images).pooler_output, rtol=1e-4, atol=1e-5)
    patches, grids = two_images
    again = visual(patches.flip(0)[:192].flip(0), grids[1:]).pooler_output  # the second image alone
    assert torch.equal(again, first[48:])
    assert len(seen) == 2
    visual(-patches, grids)  # other images
    assert len(seen) == 4


def test_features_of_other_weights_are_not_taken(settings, two_images, tmp_path):
    for scale in (1.0, 1.5):
        visual = load_model(settings.model_id, False, torch.float32).model.visual
        visual.merger.mlp[2].weight.data *= scale
        expected = visual(*two_images).pooler_output
        cache_features(visual, tmp_path / "features")
        torch.testing.assert_close(visual(*two_images).pooler_output, expected, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_kept_features_do_not_change_a_training(make_settings, splits, tmp_path):
    """The losses on the validation split with and without them, and with those that another run left."""
    losses = []
    for folder, cached in [("without", False), ("with", True), ("again", True)]:
        settings = make_settings(tmp_path / "runs", cache_features=cached)
        run = run_recipe(replace(R1, name=folder), settings, splits)
        losses.append(run.read_log("eval_loss").tolist())
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# Attention in the vision tower


@pytest.mark.parametrize("sizes", [[(224, 168), (224, 168)], [(224, 168), (168, 224), (112, 112)]])
def test_images_attend_to_themselves_only(settings, sizes):
    processor = load_processor(settings.model_id, settings.max_pixels)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    batch = processor.image_processor(images=images, return_tensors="pt")
    model = load_model(settings.model_id, False, torch.float32)
    expected = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    use_packed_attention(model)
    packed = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


def test_attention_over_two_images():
    """Each patch sees one value only, that of its own image."""
    query = torch.zeros(1, 1, 4, 2)
    value = torch.tensor([[1.0, 1], [1, 1], [5, 5], [5, 5]])[None, None]
    for ends in ([0, 2, 4], [0, 2, 3, 4]):
        seen, _ = attend_images(None, query, query, value, cu_seq_lens_q=torch.tensor(ends), max_length_q=2)
        assert seen[0, :, 0, 0].tolist() == [1, 1, 5, 5]


# 8 bits


def test_eight_bits_keep_the_largest_number_of_a_row():
    quantized, scale = to_float8(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))
    assert (quantized.float() * scale).tolist() == [[1.0, -2.0], [0.5, 0.25]]
    assert quantized.float().abs().amax(dim=1).tolist() == [448, 448]


def test_products_in_eight_bits_and_their_gradients_are_close():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 32).requires_grad_(False), torch.randn(16, 64, requires_grad=True)
    exact = layer(x)
    (wanted,) = torch.autograd.grad(exact.square().sum(), x)
    model = torch.nn.ModuleDict({"language_model": torch.nn.ModuleList([layer])})
    convert_to_float8(model)
    found = layer(x)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), x)
    assert 0.01 < (found - exact).norm() / exact.norm() < 0.06
    assert 0.01 < (gradient - wanted).norm() / wanted.norm() < 0.09


@pytest.mark.slow
def test_a_recipe_in_eight_bits_is_trained_saved_and_loaded(settings, splits):
    settings.precision, settings.max_steps = "fp8", 2
    run = run_recipe(R4, settings, splits)
    assert run.read_recipe()["precision"] == "fp8"
    in_8_bits = [module for module in load_trained_model(run.path).modules() if isinstance(module, Float8Linear)]
    assert len(in_8_bits) == 6 * 7  # the language model's; not the adapters, the vision tower, lm_head
    plain = load_trained_model(run.path, "bf16")
    assert not [module for module in plain.modules() if isinstance(module, Float8Linear)]


def test_precision_is_that_of_recipes_with_adapters(make_trainer):
    trainer = make_trainer(replace(R1, precision="fp8"))
    kinds = {type(m).__name__ for name, m in trainer.model.named_modules() if name.endswith("q_proj.base_layer")}
    assert kinds == {"Float8Linear"}
