"""GRPO on boxes: what an answer is worth, a step with the tiny model, and the same run folder as other recipes."""

import json
from dataclasses import replace

import pytest
from peft import PeftModel

from helpers import beyond_experiment
from helpers.beyond import compare_images, measure_images
from helpers.conversation import Task
from helpers.data import Mirroring
from helpers.recipes import CATALOGUE
from helpers.reward import R5, WEIGHTS, create_reward_config, judge, run_reward_recipe, to_prompt, to_prompts
from helpers.runs import OtherRunError, RunFolder
from helpers.speed import MemoryPlan
from helpers.training import evaluate_run, load_trained_model, run_recipe

TASK = Task("", ("table",))
TABLE = {"label": "table", "box": [0.0, 0.0, 50.0, 50.0]}
RIGHT, FAR = "table(0,0),(500,500)", "table(600,600),(900,900)"


def rewards(text, truth=(TABLE,)):
    return judge(text, {"width": 100, "height": 100, "truth": list(truth)}, TASK)


def test_right_box_is_worth_its_overlap():
    assert rewards(f"{RIGHT}<|im_end|>") == {"iou": 1.0, "format": 0.0, "surplus": 0.0}
    assert rewards("table(0,0),(500,250)<|im_end|>")["iou"] == pytest.approx(0.5)


def test_surplus_box_costs_although_the_overlap_stays():
    assert rewards(f"{FAR}{RIGHT}{FAR}<|im_end|>") == {"iou": 1.0, "format": 0.0, "surplus": -2.0}


def test_missing_box_costs_overlap_only():
    assert rewards("<|im_end|>") == {"iou": 0.0, "format": 0.0, "surplus": 0.0}
    assert rewards(f"{RIGHT}<|im_end|>", [TABLE, {"label": "table", "box": [60, 60, 90, 90]}])["iou"] == 0.5


def test_nothing_is_right_where_there_is_nothing():
    assert rewards("<|im_end|>", [])["iou"] == 1.0
    assert rewards(f"{FAR}<|im_end|>", []) == {"iou": 0.0, "format": 0.0, "surplus": -1.0}


@pytest.mark.parametrize("text", [f"{RIGHT}table(14,57),(99<|im_end|>", RIGHT], ids=["cut off", "without an end"])
def test_format_counts(text):
    assert rewards(text)["format"] == -1.0


def test_mirrored_prompt_has_mirrored_truth(splits):
    row = splits.train[0]
    plain, mirrored = (to_prompt(row, TASK, is_mirrored) for is_mirrored in (False, True))
    width, (x1, y1, x2, y2) = plain["image"].width, plain["record"]["truth"][0]["box"]
    assert mirrored["record"]["truth"][0]["box"] == pytest.approx([width - x2, y1, width - x1, y2])
    assert [message["role"] for message in plain["prompt"]] == ["system", "user"]
    assert to_prompts(splits.train, TASK, Mirroring())[0]["record"]["id"] == plain["record"]["id"]


@pytest.fixture(scope="module")
def settings(make_settings, tmp_path_factory):
    return make_settings(tmp_path_factory.mktemp("runs"), max_steps=1, batch_size=1, evaluations=1)


@pytest.fixture(scope="module")
def start(settings, splits):
    """A trained r1, to start from."""
    return run_recipe(CATALOGUE["r1-llm-only"], settings, splits)


@pytest.fixture(scope="module")
def run(settings, splits, start):
    return run_reward_recipe(settings, splits, start.path)


def test_run_is_like_any_other(run, start, settings, splits):
    recipe = run.read_recipe()
    assert (recipe["name"], recipe["precision"], recipe["train_vision"]) == ("r5-iou-reward", "nf4", "frozen")
    assert recipe["started_from"] == settings.model_id
    assert recipe["rewards"] == WEIGHTS
    assert recipe["trained_from"] == str(start.path)
    assert run.read_task() == start.read_task()
    assert {"rewards/iou/mean", "rewards/surplus/mean"} <= set(json_log(run)[1])
    assert evaluate_run(run, settings, splits.evaluation)["n"] == 8
    assert isinstance(load_trained_model(run.path), PeftModel)


def json_log(run):
    return json.loads((run.path / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    ("images", "eval_batch_size", "micro_batch", "batches"),
    [(16, None, 128, (64, 2, 1)), (16, None, 16, (16, 8, 4)), (2, 2, 16, (8, 2, 1)), (6, 40, 32, (8, 6, 3))],
)
def test_answers_are_written_and_learned_from_in_batches(images, eval_batch_size, micro_batch, batches, make_settings):
    """At once in a backward pass; such passes a step; such passes for which answers are written together."""
    settings = make_settings("unused", batch_size=images, eval_batch_size=eval_batch_size)
    config = create_reward_config(R5, settings, MemoryPlan(micro_batch, False, 0.0))
    found = config.per_device_train_batch_size, config.gradient_accumulation_steps, config.steps_per_generation
    assert found == batches
    assert config.gradient_accumulation_steps * config.per_device_train_batch_size == 8 * images


def test_ended_run_stays_and_another_one_is_refused(run, settings, splits, start, capsys):
    run_reward_recipe(settings, splits, start.path)
    assert "trained already" in capsys.readouterr().out
    with pytest.raises(OtherRunError, match="learning_rate was"):
        run_reward_recipe(settings, splits, start.path, replace(R5, learning_rate=0.5))


def test_differences_are_paired_and_groups_are_drawn_together():
    def record(number, iou):
        found = [TABLE] if iou else []
        return {"id": number, "group": None, "truth": [TABLE], "prediction": found, "unread": [], "iou": iou}

    one = [record(number, 0.6) for number in range(20)]
    other = [record(number, 0.95 if number % 2 else 0.6) for number in range(20)]
    table = compare_images([(one, other), (one, other)])
    assert table.loc["mean IoU", "difference"] == pytest.approx(0.175)
    assert table.loc["IoU > 0.9", "difference"] == 0.5
    assert table.loc["IoU > 0.5", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert 0 < table.loc["IoU > 0.9", "low"] < 0.35  # of 20 images, not of 40
    assert measure_images(one).mean().to_dict() == {
        "mean IoU": pytest.approx(0.6), "IoU > 0.5": 1, "IoU > 0.7": 0, "IoU > 0.9": 0, "boxes": 1, "malformed": 0
    }  # fmt: skip


@pytest.mark.slow
def test_experiment_compares_arms_of_the_same_time(tmp_path, dataset_folder):
    small = "--seconds 1 --validation 2 --start-steps 1 --batch-size 2 --reward-images 1 --arms sft reward"
    options = beyond_experiment.build_parser().parse_args([str(tmp_path), *small.split()])
    for name in ("pictures", "unseen"):
        (tmp_path / name).symlink_to(dataset_folder)
    beyond_experiment.run_case(0, 1.0, options)
    results = beyond_experiment.gather([(0, 1.0)], small.split(), options)
    steps = {arm["arm"]: arm.get("steps") for arm in results["arms"]}
    assert set(steps) == {"r4-joint", "sft", "reward"}
    assert steps["sft"] > 0
    assert steps["reward"] > 0
    assert {(row["arm"], row["images"]) for row in results["differences"]} == {("r4-joint", 8), ("reward", 8)}
    assert {row["arm"] for row in results["from_start"]} == {"sft", "reward"}
    assert RunFolder(tmp_path / "seed0-100%/reward").read_recipe()["arm"]["rewards"] == WEIGHTS
