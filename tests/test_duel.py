"""The duel of a specialist detector and the VLM: one step of each, on a few images."""

import json

import pytest

from helpers.duel import keep_sure, main, mean_iou_of

TRUTH = [{"label": "a", "box": [0, 0, 10, 10]}]


def test_only_boxes_that_are_sure_enough_count_for_the_iou():
    sure, unsure = ({"label": "a", "box": [0, 0, 10, side], "score": score} for side, score in ((5, 0.5), (10, 0.49)))
    record = {"truth": TRUTH, "prediction": [unsure, sure]}
    assert keep_sure(record)["prediction"] == [sure]
    assert mean_iou_of(record) == pytest.approx(0.5)


def test_an_image_without_objects_has_no_iou():
    assert mean_iou_of({"truth": [], "prediction": []}) is None


@pytest.mark.slow
@pytest.mark.campaign
def test_both_are_trained_on_the_same_images_and_measured_alike(base, dataset_folder, tmp_path):
    settings = {"--model-id": base, "--dataset-id": dataset_folder, "--output-dir": tmp_path, "--max-steps": 1}
    settings |= {"--batch-size": 2, "--validation-samples": 4, "--evaluations": 1, "--report-to": "none"}
    settings |= {"--max-new-tokens": 24}
    argv = [str(word) for pair in settings.items() for word in pair] + ["--sizes", "3", "--steps", "1"]
    results = main(argv)
    assert [(line["who"], line["images"]) for line in results] == [("r4-joint", 3), ("specialist", 3)]
    for line in results:
        assert line["mAP_interval"][0] <= line["mAP"] <= line["mAP_interval"][1]
        assert {"mAP", "mAP50", "mean_iou", "iou_gt_0.7", "images per second"} <= set(line)
        assert len((tmp_path / "3" / line["who"] / "predictions.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "duel.json").read_text()) == results
    changed = (tmp_path / "3/specialist/duel.json").stat().st_mtime_ns
    assert main(argv) == results
    assert (tmp_path / "3/specialist/duel.json").stat().st_mtime_ns == changed


def test_more_images_than_there_are(base, dataset_folder, capsys):
    argv = ["--model-id", str(base), "--dataset-id", str(dataset_folder), "--validation-samples", "4"]
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--sizes", "25", "999"])
    assert "--sizes 25 999: there are 20 images to train on" in capsys.readouterr().err
