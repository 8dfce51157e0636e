"""Ways of going on from a trained detector, in the same time: the numbers behind notebooks/07_beyond_sft.

    python -m helpers.beyond_experiment OUTPUT --jobs 6                # on a GPU: six cases side by side
    python -m helpers.beyond_experiment OUTPUT --seconds 5 --samples 8 --train 64 --start-steps 2    # a trial anywhere

Each case is a seed and a share of the training pictures. A short supervised run (r4) is its start; from that one, each
arm trains for the same wall-clock time, evaluations not counted: plain cross-entropy ("sft", the opponent), digits
spread over near numbers ("distance-…"), GRPO ("reward", once also without its penalty for surplus boxes). The learning
rate follows the time, not the steps. The last weights are loaded from disk and asked about drawings of an unseen seed.

OUTPUT keeps a run folder of every arm, with its answers in predictions.jsonl, and OUTPUT/results.json: what the
notebook reads, as notebooks/results/07_beyond_sft.json. Given again, the command goes on with what is missing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from transformers import PrinterCallback, SchedulerType, TrainerCallback

from helpers.beyond import MEASURES, compare_images, measure_images
from helpers.collators import COLLATORS
from helpers.data import Mirroring, Splits, load_rows, load_splits, to_training_dataset
from helpers.distance import DistanceLoss
from helpers.loading import release_memory
from helpers.recipes import CATALOGUE, TrainingRecipe
from helpers.reward import R5, WEIGHTS, build_reward_trainer, find_base, follow, load_adapted
from helpers.runs import RunFolder, write_json
from helpers.speed import free_memory, plan_memory
from helpers.tiny.packages import SEEDS_PER_SPLIT
from helpers.train_recipe import read_notebook_settings
from helpers.training import (
    DetectionTrainer,
    TrainingProgress,
    adjust,
    create_detector,
    create_training_config,
    describe_run,
    evaluate_run,
    run_recipe,
    save_trained,
)

TINY = Path(__file__).parent / "tiny"
TRAINED_ON, UNSEEN = 0, 7001  # seeds of the generator of drawings
EVALUATIONS = 4  # of each arm, on validation pictures, at equal distances of time
OPPONENT = "sft"
START = "r4-joint"


@dataclass(frozen=True)
class Arm:
    """A way of going on: with which loss, or with which rewards."""

    name: str
    spread: float | None = None  # of the distance-aware loss, in units of the grid
    rewards: dict[str, float] | None = None


ARMS = [Arm(OPPONENT), *(Arm(f"distance-{spread}", spread) for spread in (2, 5, 12)), Arm("reward", None, WEIGHTS)]
UNPUNISHED = Arm("reward-unpunished", None, WEIGHTS | {"surplus": 0.0})


class WithinTime(TrainerCallback):
    """Ends a training after so many seconds; learning rate and evaluations follow the time that has passed."""

    def __init__(self, seconds: float):
        self.seconds, self.evaluated, self.curve = seconds, 0, []

    @property
    def share(self) -> float:
        """How much of the time has passed."""
        return min(1.0, (time.monotonic() - self.begun) / self.seconds)

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = time.monotonic()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        factor = min(1.0, 0.1 + self.share / 0.03) * (1 + math.cos(math.pi * self.share)) / 2  # warm-up, then cosine
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor

    def on_step_end(self, args, state, control, **kwargs):
        self.paused = time.monotonic()
        self.passed = self.paused - self.begun
        control.should_training_stop = self.passed >= self.seconds
        if self.passed >= self.seconds * (self.evaluated + 1) / EVALUATIONS:
            self.evaluated, control.should_evaluate = self.evaluated + 1, True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_mean_iou" in logs:  # the last that an evaluation logs
            self.curve.append([round(self.passed, 1), round(logs["eval_mean_iou"], 4)])
            self.begun += time.monotonic() - self.paused


# One case


def create_settings(folder: Path, seed: int, options: argparse.Namespace) -> SimpleNamespace:
    """The story's settings, as the demo has them, for one case."""
    settings = {name.lower(): default for name, (default, _) in read_notebook_settings().items()}
    demo = yaml.safe_load((TINY / "demo.yaml").read_text())
    settings |= {name.lower(): value for name, value in demo.items()}
    settings |= {"model_id": str(TINY / "base"), "dataset_id": str(options.output / "pictures"), "output_dir": folder}
    settings |= {"max_steps": options.start_steps, "evaluations": 1, "validation_samples": options.validation}
    settings |= {"seed": seed, "compile": False, "cache_features": False, "report_to": "none", "eval_samples": 8}
    return SimpleNamespace(**settings | {"max_new_tokens": 128, "batch_size": options.batch_size})


def run_case(seed: int, share: float, options: argparse.Namespace) -> None:
    """Train and evaluate the start and every arm of one seed and one share of the training pictures."""
    settings = create_settings(name_case(seed, share, options), seed, options)
    splits = load_splits(settings)
    kept = splits.train.shuffle(seed=seed).select(range(max(settings.batch_size, round(share * len(splits.train)))))
    splits = replace(splits, train=kept)
    unseen = load_rows(str(options.output / "unseen"), "val", None, 0)
    start = run_recipe(CATALOGUE[START], settings, splits)
    release_memory()
    evaluate_run(start, settings, unseen)
    for arm in choose_arms(seed, share, options):
        evaluate_run(go_on(arm, start.path, settings, splits, options), settings, unseen)
        release_memory()


def name_case(seed: int, share: float, options: argparse.Namespace) -> Path:
    """The folder of a case."""
    return options.output / f"seed{seed}-{share:.0%}"


def choose_arms(seed: int, share: float, options: argparse.Namespace) -> list[Arm]:
    """The arms that were asked for; what happens without the penalty is tried once."""
    arms = [*ARMS, UNPUNISHED] if (seed, share) == (0, max(options.shares)) else ARMS
    return [arm for arm in arms if arm.name in options.arms]


def go_on(arm: Arm, start: Path, settings: SimpleNamespace, splits: Splits, options: argparse.Namespace) -> RunFolder:
    """Train an arm from the start for the time that every arm has."""
    recipe = R5 if arm.rewards else CATALOGUE[START]
    recipe, base = follow(start, adjust(replace(recipe, name=arm.name), settings)), find_base(start)
    recipe = replace(recipe, learning_rate=options.reward_rate if arm.rewards else options.sft_rate)
    settings = SimpleNamespace(**vars(settings) | {"max_steps": 10**6})
    run = RunFolder(Path(settings.output_dir) / arm.name)
    if (run.path / "arm.json").exists():
        return run
    description = describe_run(recipe, settings, splits, base) | {"base": os.path.relpath(base, run.path)}
    description |= {"trained_from": str(start), "arm": asdict(arm)}
    detector = create_detector(load_adapted(start, recipe), settings, splits.labels)
    if arm.rewards:
        rewarded = SimpleNamespace(**vars(settings) | {"batch_size": options.reward_images})
        trainer = build_reward_trainer(detector, recipe, rewarded, splits, arm.rewards)
    else:
        loss = partial(DistanceLoss, spread=arm.spread) if arm.spread else None
        trainer = build_sft_trainer(detector, replace(recipe, loss_function=loss), settings, splits)
    about = train_within(trainer, options)
    save_trained(trainer, run, description)
    write_json(run.path / "arm.json", about)
    return run


def build_sft_trainer(detector, recipe: TrainingRecipe, settings: SimpleNamespace, splits: Splits) -> DetectionTrainer:
    """As the story's `build_trainer`, of an adapter that is trained already."""
    inner = replace(detector, model=detector.model.get_base_model())
    plan = plan_memory(inner, recipe, settings, free_memory() / 2)
    mirroring = Mirroring(settings.flip_probability, settings.seed)
    trainer = DetectionTrainer(
        detector,
        splits.validation,
        plan.micro_batch_size,
        recipe.loss_function and recipe.loss_function(detector.processor),
        args=create_training_config(recipe, settings, plan),
        train_dataset=to_training_dataset(splits.train, detector.task, mirroring),
        eval_dataset=to_training_dataset(splits.validation, detector.task, Mirroring()),
        data_collator=COLLATORS[recipe.collator](detector.processor),
        callbacks=[TrainingProgress(mirroring)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_within(trainer, options: argparse.Namespace) -> dict:
    """Train for the time of the options; returns steps, seconds, the curve of IoU by seconds and that of rewards."""
    clock = WithinTime(options.seconds)
    trainer.add_callback(clock)
    trainer.args.eval_on_start = trainer.args.load_best_model_at_end = False
    trainer.args.save_strategy = "no"
    trainer.args.lr_scheduler_type, trainer.args.warmup_steps = SchedulerType.CONSTANT, 0
    trainer.args.dataloader_num_workers = min(trainer.args.dataloader_num_workers, 2)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "rewards/iou/mean" in entry]
    names = {"reward": "reward", "rewards/iou/mean": "iou", "rewards/surplus/mean": "surplus"}
    rewards = {short: thin([entry[name] for entry in log]) for name, short in names.items()} if log else {}
    about = {"steps": trainer.state.global_step, "seconds": round(clock.passed, 1), "curve": clock.curve}
    return about | {"rewards": rewards, "rate": trainer.args.learning_rate}


def thin(values: Sequence[float], points: int = 20) -> list[float]:
    """At most so many means of neighbours."""
    return [round(float(np.mean(part)), 4) for part in np.array_split(values, min(points, len(values)))]


# All cases


def draw(options: argparse.Namespace) -> None:
    """Draw the pictures to train on, and those of the unseen seed, where they are not there yet."""
    wanted = {"pictures": (options.train, 8, TRAINED_ON), "unseen": (1, options.samples, UNSEEN)}
    for name, (train, validation, seed) in wanted.items():
        if not (options.output / name / "README.md").exists():
            sizes = ["--train", str(train), "--validation", str(validation), "--seed", str(seed)]
            command = [sys.executable, "-m", "helpers.tiny.packages", str(options.output / name), *sizes]
            subprocess.run(command, check=True)  # a process of its own: each of its workers imports it again


def launch(cases: Sequence[tuple[int, float]], argv: Sequence[str], options: argparse.Namespace) -> int:
    """A process for each case, so many at a time, its output in case.log; returns how many failed."""
    waiting, running, failures = deque(cases), {}, 0
    while waiting or running:
        while waiting and len(running) < options.jobs:
            seed, share = waiting.popleft()
            folder = name_case(seed, share, options)
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "helpers.beyond_experiment", *argv, "--case", str(seed), str(share)]
            with (folder / "case.log").open("a") as log:
                environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # all that is needed is here
                running[folder] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        time.sleep(0.5)
        for folder in [folder for folder, process in running.items() if process.poll() is not None]:
            code = running.pop(folder).returncode
            failures += code != 0
            print(f"{folder.name}: exit code {code}", flush=True)
    return failures


def gather(cases: Sequence[tuple[int, float]], argv: Sequence[str], options: argparse.Namespace) -> dict:
    """What was measured of all arms that have ended, how they differ from the opponent, and on which pictures most."""
    records, arms = {}, []
    for seed, share in cases:
        for file in sorted(name_case(seed, share, options).glob("*/metrics.json")):
            run = RunFolder(file.parent)
            records[share, run.path.name, seed] = run.read_records()
            means = measure_images(records[share, run.path.name, seed]).mean().round(4).to_dict()
            about = run.path / "arm.json"
            about = json.loads(about.read_text()) if about.exists() else {}
            arms.append({"seed": seed, "share": share, "arm": run.path.name} | means | about)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    made = {"command": " ".join(["python -m helpers.beyond_experiment", *argv]), "device": device}
    made |= {"seconds": options.seconds, "pictures": options.samples, "unseen_seed": UNSEEN, "arms": arms}
    made |= {"differences": list_differences(records, OPPONENT), "from_start": list_differences(records, START)}
    return made | {"largest": list_largest(records)}


def list_differences(records: dict, opponent: str) -> list[dict]:
    """Of each share and arm: how MEASURES differ from an opponent's, over the seeds that both have; and by seed."""
    found = []
    for share, name in dict.fromkeys((share, name) for share, name, _ in records):
        seeds = [seed for seed in range(100) if {(share, name, seed), (share, opponent, seed)} <= records.keys()]
        pairs = [(records[share, opponent, seed], records[share, name, seed]) for seed in seeds]
        for group in [pairs, *([pair] for pair in pairs)] if name != opponent and pairs else []:
            table = compare_images(group).round(4)
            which = seeds if group is pairs else [seeds[pairs.index(group[0])]]
            about = {"share": share, "arm": name, "seeds": which, "images": len(group[0][0])}
            found += [about | {"measure": measure} | table.loc[measure].to_dict() for measure in MEASURES]
    return found


def list_largest(records: dict, count: int = 8) -> list[dict]:
    """Of each arm, the pictures of its first case where its IoU differs most from the opponent's, half each way."""
    found = []
    for name in dict.fromkeys(name for _, name, _ in records if name != OPPONENT):
        case = next((key for key in records if key[1] == name and (key[0], OPPONENT, key[2]) in records), None)
        if case is None:
            continue
        opponent, own = records[case[0], OPPONENT, case[2]], records[case]
        gains = np.array([b["iou"] - a["iou"] for a, b in zip(opponent, own, strict=True)])
        order = np.argsort(gains, kind="stable")
        for k in [*order[: count // 2], *order[len(order) - count // 2 :]]:
            seed = (2 * UNSEEN + 1) * SEEDS_PER_SPLIT + int(k)
            sides = {"truth": own[k]["truth"], OPPONENT: opponent[k]["prediction"], "own": own[k]["prediction"]}
            boxes = {side: [np.round(known["box"], 1).tolist() for known in found] for side, found in sides.items()}
            found.append({"arm": name, "share": case[0], "seed": case[2], "drawing": seed, "gain": gains[k]} | boxes)
    return found


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(
        "helpers.beyond_experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="where everything goes")
    parser.add_argument("--seconds", type=float, default=60, help="that each arm trains, evaluations not counted")
    parser.add_argument("--samples", type=int, default=512, help="drawings of the unseen seed")
    parser.add_argument("--train", type=int, default=2400, help="drawings to train on")
    parser.add_argument("--validation", type=int, default=32, help="of them, held back for the curves")
    parser.add_argument("--start-steps", type=int, default=140, help="steps of the start")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures of a supervised step")
    parser.add_argument("--reward-images", type=int, default=8, help="pictures of a step of GRPO")
    parser.add_argument("--sft-rate", type=float, default=4e-4, help="peak learning rate of supervised arms")
    parser.add_argument("--reward-rate", type=float, default=1e-4, help="peak learning rate of GRPO")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.1], help="of the drawings to train on")
    names = [arm.name for arm in (*ARMS, UNPUNISHED)]
    parser.add_argument("--arms", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=1, help="cases side by side")
    parser.add_argument(
        "--case", nargs=2, type=float, metavar=("SEED", "SHARE"), help="only this one, in this process"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring; returns the exit code, 1 if a case failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(argv)
    if options.case:
        run_case(int(options.case[0]), options.case[1], options)
        return 0
    draw(options)
    cases = [(seed, share) for seed in options.seeds for share in options.shares]
    failures = launch(cases, argv, options)
    write_json(options.output / "results.json", gather(cases, argv, options))
    print(options.output / "results.json")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
