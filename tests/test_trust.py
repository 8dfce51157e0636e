"""Scores become probabilities; a threshold is chosen so that a promise about accepted boxes holds."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.trust import (
    Promise,
    append_to_card,
    calibrate,
    chance_of,
    choose_threshold,
    fit_isotonic,
    fit_platt,
    main,
    plot_risk_coverage,
    split_groups,
)


def record(number, score, is_right, group=None):
    """An image of 100 x 100 pixels with one true box and one that is right or beside it."""
    box = [0, 0, 50, 50] if is_right else [50, 50, 100, 100]
    known = {"id": str(number), "group": group, "width": 100, "height": 100}
    found = {"label": "table", "box": box} | ({} if score is None else {"score": score})
    x1, y1, x2, y2 = (10 * v for v in box)
    return known | {
        "truth": [{"label": "table", "box": [0, 0, 50, 50]}],
        "raw": f"table({x1},{y1}),({x2},{y2})",
        "prediction": [found],
    }


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_a_curve_gives_the_share_of_right_boxes(fit):
    scores, right = np.repeat([0.3, 0.1], 100), np.array([True] * 90 + [False] * 10 + [True] * 20 + [False] * 80)
    curve = fit(scores, right)
    assert curve(np.array([0.1, 0.3])) == pytest.approx([0.2, 0.9], abs=1e-3)
    low, middle, high = curve(np.array([0.0, 0.2, 1.0]))
    assert 0 <= low <= 0.2 < middle < 0.9 <= high <= 1
    records = [record(0, 0.3, True), record(1, None, True)]
    assert [r["prediction"][0].get("score") for r in calibrate(records, curve)] == [pytest.approx(0.9, abs=1e-3), None]


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
@pytest.mark.parametrize(("right", "said"), [([True, True], "all of them right"), ([False], "none of them right")])
def test_a_curve_needs_right_and_wrong_boxes(fit, right, said):
    with pytest.raises(ValueError, match=f"{len(right)} boxes, {said}: a curve needs both kinds"):
        fit(np.full(len(right), 0.5), np.array(right))


def test_images_of_a_barcode_stay_together():
    records = [record(n, 0.5, True, group=f"{n // 3}") for n in range(30)]
    ones, others = split_groups(records, 0.3, seed=1)
    assert (len(ones), len(others)) == (21, 9)
    assert not {r["group"] for r in ones} & {r["group"] for r in others}
    assert len(split_groups([record(n, 0.5, True) for n in range(10)], 0.5, seed=1)[0]) == 5


def test_the_chance_of_so_few_wrong_boxes_is_counted_out():
    # of 2 + 2 boxes one or two are wrong later, if the rate of 0.9 is broken; of 4 boxes one is wrong: first or later
    assert chance_of(0, 2, 0.9) == pytest.approx(1 / 2)
    # 3 of 4 are wrong, 1 of them here: the right one is here in 2 of 4 places
    assert chance_of(1, 2, 0.5) == pytest.approx(1 / 2)
    assert chance_of(0, 29, 0.9) > 0.1 > chance_of(0, 30, 0.9)  # fewer boxes prove nothing


def test_the_threshold_stands_at_the_last_tenth_that_keeps_the_promise():
    scores = np.linspace(1, 0, 101)[:100]
    right = np.array([True] * 50 + [False] * 50)
    assert choose_threshold(scores, right, Promise()) == {
        "threshold": pytest.approx(0.51), "coverage": 0.5, "accepted": 50, "wrong": 0,
    }  # fmt: skip
    assert choose_threshold(scores, right, Promise(rate=0.5))["accepted"] == 80
    assert choose_threshold(scores, ~right, Promise()) is None
    shuffled = np.random.default_rng(0).permutation(100)
    assert choose_threshold(scores[shuffled], right[shuffled], Promise())["accepted"] == 50


def test_few_boxes_prove_nothing():
    assert choose_threshold(np.full(29, 0.5), np.full(29, True), Promise()) is None
    assert choose_threshold(np.full(30, 0.5), np.full(30, True), Promise())["accepted"] == 30
    assert choose_threshold(np.array([]), np.array([], dtype=bool), Promise()) is None


def test_the_promise_is_kept_as_often_as_it_says():
    """Accepting from a score of 0.206 on, 90 % of these boxes are right; the promise is tried on 300 others."""
    generator, kept, coverage = np.random.default_rng(0), [], []
    for _ in range(500):
        (known, right), (scores, others) = (draw_boxes(generator, 300) for _ in range(2))
        found = choose_threshold(known, right, Promise())
        accepted = scores >= (found["threshold"] if found else np.inf)
        kept.append(not accepted.any() or others[accepted].mean() >= 0.9)
        coverage.append(accepted.mean())
    assert np.mean(kept) >= 0.9
    assert np.mean(coverage) > 0.5  # and not by accepting next to nothing


def draw_boxes(generator, count):
    """Scores, and whether the boxes are right: 0.8 (1 - score)^3 of them are wrong."""
    scores = generator.random(count)
    return scores, generator.random(count) > 0.8 * (1 - scores) ** 3


def test_promises_are_between_0_and_1():
    with pytest.raises(ValueError, match="rate, confidence: give numbers between 0 and 1"):
        Promise(rate=1.0, confidence=0)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_the_command_names_the_threshold(tmp_path, capsys):
    records = [record(n, 1 - n / 100, n < 50) for n in range(100)]
    main(["--predictions", write(tmp_path / "a.jsonl", records)])
    assert capsys.readouterr().out.splitlines() == [
        "accept boxes with a score of at least 0.5100: 50.0% of the boxes",
        "0 of 50 accepted boxes had an IoU under 0.7",
    ]


@pytest.mark.parametrize(
    ("records", "options", "code", "said"),
    [
        ([record(0, 0.5, True)], [], 1, "1 of 1 boxes are right: that promise cannot be kept; give more images"),
        ([record(0, 0.5, True)], ["--rate", "1.5"], 2, "rate: give numbers between 0 and 1"),
        ([{"id": "0"}], [], 2, "line 1: no field width, height, raw, truth"),
    ],
)
def test_the_command_says_what_cannot_be(tmp_path, capsys, records, options, code, said):
    with pytest.raises(SystemExit) as stopped:
        main(["--predictions", write(tmp_path / "a.jsonl", records), *options])
    assert stopped.value.code == code
    assert said in capsys.readouterr().err


def test_the_card_says_when_to_accept(tmp_path):
    records = [record(n, 1 - n / 100, n < 50) for n in range(100)]
    (tmp_path / "card.md").write_text("# r4\n\nknown before\n")
    append_to_card(tmp_path, [record(0, 0.5, True)], Promise())
    append_to_card(tmp_path, records, Promise())
    text = (tmp_path / "card.md").read_text()
    assert text.startswith("# r4\n\nknown before\n\n## When to accept a box\n")
    assert text.count("## When to accept a box") == 1
    assert "Accept boxes with a score of 0.510 or more: 50.0% of the boxes." in text
    assert (tmp_path / "risk.png").stat().st_size > 5000


def test_risk_is_drawn_without_scores_too():
    _, axes = plt.subplots()
    plot_risk_coverage(axes, [record(0, None, True)], Promise())
    assert axes.get_title() == "no scores"
    plt.close()
