"""Training: the right weights, in float32; checkpoints are chosen, saved, reloaded, and not lost when interrupted."""

import json
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trl import SFTConfig

from helpers import recipes, training
from helpers.collators import AllTokensCollator
from helpers.conversation import PROMPT, Task
from helpers.data import Mirroring, load_splits, to_training_dataset
from helpers.loading import allocated_megabytes, load_model, release_memory
from helpers.recipes import CATALOGUE
from helpers.runs import OtherRunError, RunFolder, write_json
from helpers.speed import MemoryPlan
from helpers.training import (
    build_trainer,
    check_trainable_parameters,
    create_detector,
    create_training_config,
    describe_run,
    evaluate_run,
    gradient_norms,
    load_trained_model,
    run_recipe,
)

TASK = Task(PROMPT.format(label="nutrition table"))

R1, R2, R3, R4 = CATALOGUE.values()


@pytest.fixture
def settings(make_settings, tmp_path):
    return make_settings(tmp_path)


@pytest.fixture
def make_trainer(settings, splits):
    """A trainer of a recipe on the base, as `train` makes it."""

    def make(recipe):
        model = load_model(settings.model_id, recipe.quantized, torch.float32)
        return build_trainer(create_detector(model, settings, splits.labels), recipe, settings, splits)

    return make


@pytest.fixture
def _keep_last(monkeypatch):
    """The last weights are the result: the best may be those after the first step, which have learned little."""

    def create(*arguments):
        config = create_training_config(*arguments)
        config.load_best_model_at_end = False
        return config

    monkeypatch.setattr(training, "create_training_config", create)


# What is trained


@pytest.mark.parametrize(
    ("recipe", "tensors", "parameters"),
    [
        # r * (in + out) per linear layer: q, o 192+192, k, v 192+64, gate, up, down 192+512
        (R1, 6 * 7 * 2, 6 * 64 * (2 * 384 + 2 * 256 + 3 * 704)),
        (R2, 6 * 12 + 1 + 6, 3_633_600),
        # and for the vision blocks: qkv 192+576, fc1, fc2 192+768
        (R4, 6 * 7 * 2 + 6 * 3 * 2, 6 * 64 * (2 * 384 + 2 * 256 + 3 * 704 + 768 + 2 * 960)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_a_recipe_trains_is_in_float32(make_trainer, recipe, tensors, parameters):
    trained = [p for p in make_trainer(recipe).model.parameters() if p.requires_grad]
    assert len(trained) == tensors
    assert sum(p.numel() for p in trained) == parameters
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_model_that_trains_elsewhere_is_refused(make_trainer):
    model = make_trainer(R1).model
    model.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"unexpectedly trained: \['base_model.model.lm_head.weight'\]"):
        check_trainable_parameters(model, R1)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"nothing is trained in \['language_model'\]"):
        check_trainable_parameters(model, R1)


def test_joint_training_reaches_both_towers(make_trainer):
    trainer = make_trainer(R4)
    trainer.model(**trainer.data_collator([trainer.train_dataset[0]])).loss.backward()
    norms = gradient_norms(trainer.model)
    assert set(norms) == {"visual", "language_model"}
    assert min(norms.values()) > 0


@pytest.mark.parametrize(("factor", "cause"), [(0.0, "check freezing"), (float("nan"), "check the loss")])
def test_training_without_a_usable_gradient_is_stopped(make_trainer, factor, cause):
    trainer = make_trainer(R4)
    for name, parameter in trainer.model.named_parameters():
        if "visual" in name and parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * factor)
    with pytest.raises(RuntimeError, match=rf"'visual': {factor}.*{cause}"):
        trainer.train()


def test_gradient_norms_are_logged_before_clipping(make_trainer, settings):
    settings.max_steps = 1
    trainer = make_trainer(R2)
    assert trainer.args.max_grad_norm == 1
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: 1000 * gradient)
    trainer.train()
    norms = [entry["grad_norm_visual"] for entry in trainer.state.log_history if "grad_norm_visual" in entry]
    assert len(norms) == 1
    assert norms[0] > 10  # clipped, it would be 1


def test_data_parallel_is_off_where_several_gpus_are_visible(settings, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 2))  # what it finds there; here is none
    assert create_training_config(R1, settings, MemoryPlan(1, False, 0.0))._n_gpu == 1


def test_settings_reach_the_trainer(make_trainer, settings, splits):
    settings.max_steps, settings.batch_size, settings.seed, settings.flip_probability = 7, 3, 5, 1.0
    trainer = make_trainer(replace(R2, name="mine", learning_rate=3e-4, collator="v1-all-tokens"))
    config = trainer.args
    assert (config.learning_rate, config.max_steps, config.per_device_train_batch_size, config.seed) == (3e-4, 7, 3, 5)
    assert config.output_dir == f"{settings.output_dir}/mine"
    assert isinstance(trainer.data_collator, AllTokensCollator)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (22, 2)
    texts = [dataset[0]["messages"][2] for dataset in (trainer.train_dataset, trainer.eval_dataset)]
    rows = [(splits.train, 1.0), (splits.validation, 0.0)]  # images are mirrored in training only
    assert texts == [to_training_dataset(rows, TASK, Mirroring(flip))[0]["messages"][2] for rows, flip in rows]


def test_several_stages_and_their_learning_rates(settings, splits, monkeypatch):
    trained = []

    def note(recipe, settings, splits, start):
        trained.append((recipe, start))
        return RunFolder(Path(settings.output_dir) / recipe.name)

    monkeypatch.setattr(training, "train", note)
    settings.learning_rates = {"r1-llm-only": 0.5, "r4-joint": 0.25}
    for recipe in (R4, R2, R3):
        run_recipe(recipe, settings, splits)
    stage1 = f"{settings.output_dir}/r3-two-stage/stage1"
    assert [(recipe.name, recipe.learning_rate, recipe.precision, start) for recipe, start in trained] == [
        ("r4-joint", 0.25, "nf4", settings.model_id),
        ("r2-vision-only", 1e-5, "bf16", settings.model_id),
        ("r3-two-stage/stage1", 1e-5, "bf16", settings.model_id),
        ("r3-two-stage", 0.5, "nf4", stage1),
    ]


# What was begun, and what has ended


@pytest.mark.slow
def test_what_has_ended_is_not_done_again(settings, splits, tmp_path, monkeypatch, capsys):
    """All three trainings and evaluations once; a second time nothing is loaded; AGAIN starts anew."""
    settings.max_steps = settings.evaluations = 1
    run = run_recipe(R3, settings, splits)
    metrics = evaluate_run(run, settings, splits.evaluation)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()

    def fail(*arguments):
        raise AssertionError("loaded again")

    monkeypatch.setattr(training, "load_model", fail)
    again = run_recipe(R3, settings, splits)
    assert json.loads(json.dumps(metrics)) == evaluate_run(again, settings, splits.evaluation)
    printed = capsys.readouterr().out
    assert "r3-two-stage: trained already, skipped (AGAIN=True trains it anew)" in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == files
    with pytest.raises(AssertionError, match="loaded again"):  # on other images it is another evaluation
        evaluate_run(again, settings, splits.evaluation.select(range(3)))
    settings.again = True
    with pytest.raises(AssertionError, match="loaded again"):
        run_recipe(R3, settings, splits)
    assert [path.name for path in run.path.iterdir()] == ["stage1"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"schedule was \{.*'seed': 0\}, is \{.*'seed': 1\}"),
        ({"max_steps": 8}, "'max_steps': 4, .* 'max_steps': 8"),
        ({"learning_rates": {"r1-llm-only": 0.5}}, "learning_rate was 0.0001, is 0.5"),
        ({"question": "Where?"}, "question was 'Detect every .*, is 'Where\\?'"),
        ({"max_pixels": 40 * 28 * 28}, "pixel_budget was"),
        ({"validation_samples": 3}, "rows was"),
    ],
)
def test_a_run_with_other_settings_is_not_mixed_with_an_older_one(settings, monkeypatch, change, named):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_model", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(R1, settings, load_splits(settings))
    before = (Path(settings.output_dir) / "r1-llm-only/run.json").read_bytes()
    vars(settings).update(change)
    with pytest.raises(OtherRunError, match=named) as refused:
        run_recipe(R1, settings, load_splits(settings))
    assert "To keep it set another OUTPUT_DIR; to replace it delete it, or all recipes' with AGAIN=True." in str(
        refused.value
    )
    assert (Path(settings.output_dir) / "r1-llm-only/run.json").read_bytes() == before


def test_more_layers_with_lora_are_another_run(settings, splits, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "r4-joint")
    run.begin(describe_run(R4, settings, splits, settings.model_id))
    monkeypatch.setattr(recipes, "VISION_LAYERS", recipes.VISION_LAYERS + "|.*merger.*")
    with pytest.raises(OtherRunError, match="lora_target_modules was"):
        run.begin(describe_run(R4, settings, splits, settings.model_id))


def test_again_does_not_delete_what_it_starts_from(settings, splits, base, tmp_path):
    settings.again = True
    stage1 = tmp_path / "r3-two-stage/stage1"
    shutil.copytree(base, stage1)
    with pytest.raises(ValueError, match=r"AGAIN deletes .*r3-two-stage, and with it the weights to start from"):
        run_recipe(R3, settings, splits, stage1)
    assert (stage1 / "model.safetensors").exists()


def test_a_second_stage_goes_on_from_what_it_was_begun_from(settings, splits, base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "r2-vision-only")
    second = replace(R1, name=R3.name)
    described = describe_run(second, settings, splits, str(tmp_path / "r2-vision-only"))
    RunFolder(tmp_path / R3.name).begin(described | {"base": "../r2-vision-only"})
    trained = []
    monkeypatch.setattr(training, "train", lambda *arguments: trained.append(Path(arguments[-1]).resolve()))
    run_recipe(R3, settings, splits)
    assert trained == [tmp_path / "r2-vision-only"]


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_does_none_more(settings, splits, monkeypatch):
    settings.max_steps, settings.evaluations = 3, 1  # not at the end of an epoch
    save = training.save_trained

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_trained", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(R1, settings, splits)
    monkeypatch.setattr(training, "save_trained", save)
    moved = Path(shutil.move(settings.output_dir, f"{settings.output_dir}-moved"))
    settings.output_dir = str(moved)
    best = load_file(moved / "r1-llm-only/checkpoint-3/adapter_model.safetensors")
    run = run_recipe(R1, settings, splits)
    assert run.read_recipe()["steps"] == 3
    assert run.read_log("eval_mean_iou").index.max() == 3
    kept = load_file(run.path / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())


def test_a_run_from_other_weights_is_refused(settings, splits, base, tmp_path, monkeypatch):
    run, weights = RunFolder(tmp_path / "r1-llm-only"), tmp_path / "other/model.safetensors"
    run.begin(describe_run(R1, settings, splits, settings.model_id))
    shutil.copytree(base, tmp_path / "other")
    run.begin(describe_run(R1, settings, splits, str(tmp_path / "other")))  # the same weights elsewhere
    tensors = load_file(weights)
    tensors["lm_head.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(OtherRunError, match="holds another run: base_hash was"):
        run.begin(describe_run(R1, settings, splits, str(tmp_path / "other")))


# By what checkpoints are chosen


def test_checkpoints_are_chosen_under_the_limits_of_the_final_table(make_trainer, settings, splits, monkeypatch):
    settings.max_new_tokens, settings.eval_batch_size, settings.max_pixels = 17, 3, 40 * 28 * 28
    asked = []

    def evaluate_detector(detector, rows, show_progress=True):
        asked.append(
            (detector.task.question, detector.max_new_tokens, detector.batch_size, detector.processor, len(rows))
        )
        return [{"id": "a", "truth": [{"label": "t", "box": [0, 0, 10, 10]}], "prediction": [], "iou": 0.0}]

    monkeypatch.setattr(training, "evaluate_detector", evaluate_detector)
    monkeypatch.setattr(training, "load_trained_model", lambda folder, precision: None)
    trainer = make_trainer(R1)
    metrics = trainer.evaluate()
    run = RunFolder(Path(trainer.args.output_dir))
    trainer.processing_class.save_pretrained(run.path)
    write_json(run.path / "recipe.json", asdict(trainer.detector.task))
    evaluate_run(run, settings, splits.evaluation)
    assert [call[:3] + call[4:] for call in asked] == [(TASK.question, 17, 3, 2), (TASK.question, 17, 3, 8)]
    assert [call[3].image_processor.size["longest_edge"] for call in asked] == [40 * 28 * 28] * 2
    assert metrics["eval_mean_iou"] == 0
    assert metrics["eval_selection"] == pytest.approx(-1e-6 * metrics["eval_loss"])
    assert trainer.detector.model is trainer.model


@pytest.mark.slow
def test_training_reports_loss_gradients_and_iou(settings, splits, tmp_path):
    settings.report_to = "tensorboard"
    run = run_recipe(replace(R4, collator="v1-all-tokens"), settings, splits)
    log = json.loads((run.path / "trainer_state.json").read_text())
    keys = set().union(*log["log_history"])
    assert keys >= {"eval_loss", "eval_mean_iou", "grad_norm_visual", "grad_norm_language_model"}
    ious = run.read_log("eval_mean_iou")
    assert [*ious.index] == [0, 1, 2, 3, 4]  # with the model as it was before training
    assert [*run.read_log("eval_loss").index] == [0, 1, 2, 3, 4]
    assert log["best_metric"] == pytest.approx(max(ious[1:]), abs=1e-4)
    assert list(run.path.rglob("events.out.tfevents*"))


# What is left on disk


@pytest.mark.slow
@pytest.mark.usefixtures("_keep_last")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("recipe", [R1, R4], ids=lambda recipe: recipe.name)
def test_an_adapter_is_saved_and_reloads(settings, splits, recipe, gradient_checkpointing):
    settings.gradient_checkpointing = gradient_checkpointing
    folder = run_recipe(recipe, settings, splits).path
    files = {path.name for path in folder.iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"}
    assert files >= {"trainer_state.json", "recipe.json"}
    assert not [name for name in files if name.startswith("checkpoint")]
    weights = load_file(folder / "adapter_model.safetensors")
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 6 * (7 if recipe is R1 else 10)  # B starts at zero: every adapter has learned something
    model = load_trained_model(folder)
    assert isinstance(model, PeftModel)
    loaded = dict(model.named_parameters())
    for name, tensor in weights.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.slow
@pytest.mark.usefixtures("_keep_last")
def test_a_full_checkpoint_is_saved_and_reloads(settings, splits):
    folder = run_recipe(R2, settings, splits).path
    assert (folder / "model.safetensors").exists()
    assert not (folder / "adapter_config.json").exists()
    assert "visual.patch_embed.proj.weight" in load_file(folder / "model.safetensors")  # the names of the hub
    trained = load_trained_model(folder).state_dict()
    before = load_model(settings.model_id, quantized=False, dtype=torch.float32).state_dict()
    changed = {name.split(".")[1] for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    assert changed == {"visual"}


@pytest.mark.slow
def test_a_result_tells_how_it_was_made(settings, splits):
    settings.max_steps, settings.seed = 1, 11
    settings.learning_rates = {"r1-llm-only": 2e-3}
    made = run_recipe(R1, settings, splits).read_recipe()
    assert (made["name"], made["precision"], made["lora_rank"], made["learning_rate"]) == (
        "r1-llm-only",
        "nf4",
        64,
        2e-3,
    )
    assert (made["started_from"], made["steps"], made["collator"]) == (settings.model_id, 1, "v2-assistant-only")
    assert made["settings"] == vars(settings)
    assert (made["settings"]["seed"], made["settings"]["dataset_id"]) == (11, settings.dataset_id)
    assert made["question"].startswith("Detect every nutrition table. Answer with label and box")
    assert made["system_message"].startswith("You are a vision language model")
    assert made["pixel_budget"] == {"factor": 28, "min_pixels": 3136, "max_pixels": 66 * 28 * 28}
    packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"]
    assert made["versions"] == {package: version(package) for package in packages}


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first(settings, splits, make_settings, tmp_path):
    folder = run_recipe(R3, settings, splits).path
    assert folder == tmp_path / "r3-two-stage"
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "stage1")
    first = load_file(folder / "stage1/model.safetensors")["visual.patch_embed.proj.weight"]
    assert torch.equal(load_trained_model(folder).get_base_model().model.visual.patch_embed.proj.weight, first)
    # moved as a whole, it finds its base beside itself
    moved = shutil.copytree(folder, tmp_path / "elsewhere/r3")
    Path(folder / "stage1/model.safetensors").rename(tmp_path / "gone")
    assert torch.equal(load_trained_model(moved).get_base_model().model.visual.patch_embed.proj.weight, first)
    Path(tmp_path / "gone").rename(folder / "stage1/model.safetensors")
    # a checkpoint takes the place of the first stage
    again = run_recipe(R3, make_settings(tmp_path / "again"), splits, folder / "stage1").path
    assert not (again / "stage1").exists()
    weights = [load_file(path / "adapter_model.safetensors") for path in (folder, again)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# Interruptions


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [R1, R2], ids=lambda recipe: recipe.name)
def test_interrupted_training_goes_on(settings, splits, tmp_path, capsys, monkeypatch, recipe):
    whole, steps = training.DetectionTrainer.training_step, []

    def interrupted(*arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(training.DetectionTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, settings, splits)
    monkeypatch.undo()
    left = tmp_path / recipe.name / "checkpoint-3"
    assert left.exists()
    run = run_recipe(recipe, settings, splits)
    assert f"going on from {left}" in capsys.readouterr().out
    assert run.read_recipe()["steps"] == 4
    assert run.read_log("eval_mean_iou").index[-1] == 4
    assert not list(run.path.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_resumed_full_training_has_the_weights_of_its_checkpoint(make_trainer, settings, tmp_path):
    settings.max_steps = 2
    make_trainer(R2).train()
    checkpoint = tmp_path / "r2-vision-only/checkpoint-2"
    wanted = load_file(checkpoint / "model.safetensors")
    assert {name.split(".")[1] for name in wanted} == {"visual"}  # a checkpoint holds what is trained
    other = make_trainer(R2)
    other._load_from_checkpoint(str(checkpoint))
    loaded = dict(other.model.named_parameters())
    for name, tensor in wanted.items():
        torch.testing.assert_close(loaded[name], tensor)


def test_a_checkpoint_that_does_not_fit_is_refused(make_trainer, tmp_path):
    trainer, file = make_trainer(R2), tmp_path / "model.safetensors"
    trainer._save(str(tmp_path))
    trainer._load_from_checkpoint(str(tmp_path))  # as it was saved, it fits
    weights = load_file(file)
    patches = weights.pop("model.visual.patch_embed.proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"does not fit .*\['model.visual.patch_embed.proj.weight'\]. Delete it"):
        trainer._load_from_checkpoint(str(tmp_path))
    weights |= {"model.visual.patch_embed.proj.weight": patches, "visual.stranger": patches.clone()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"does not fit .*\['visual.stranger'\]"):
        trainer._load_from_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_memory_is_free_after_each_of_two_recipes(settings, splits):
    settings.batch_size = 16  # a batch this large leaves hundreds of megabytes where they are not released

    def megabytes_after(recipe):
        run_recipe(recipe, settings, splits)
        release_memory()
        return allocated_megabytes()

    megabytes_after(replace(R1, name="first"))  # what is loaded once and stays: kernels, caches
    before = allocated_megabytes()
    for recipe in (R2, R4):
        after = megabytes_after(recipe)
        assert after - before < max(0.05 * before, 150), f"{recipe.name}: {before:.0f} -> {after:.0f} MB"
        before = after
