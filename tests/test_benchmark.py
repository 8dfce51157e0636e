"""The benchmark runs at its tiny size: stock and ours, then generation."""

import pytest

from helpers.benchmark import main


@pytest.mark.slow
def test_the_benchmark_at_its_tiny_size(base, tmp_path, capsys):
    shape = ["--processor", str(base), "--output", str(tmp_path), "--size", "tiny", "--images", "8", "4"]
    steps = ["--steps", "3", "--warm-up", "1", "--batch-size", "4", "--batch-sizes"]
    table = main([*shape, *steps, "--only", "r4-joint", "generation"])
    assert table["whose"].tolist() == ["stock", "ours, nf4"]
    assert (table["images/s"] > 0).all()
    losses = table["mean loss"]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    printed = capsys.readouterr().out
    assert "ceiling" in printed
    assert "one by one" in printed
