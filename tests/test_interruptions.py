"""A sample of the kills of interruptions.py; all of them: `PYTHONPATH=. python tests/interruptions.py OUTPUT`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    """In a process of its own, since one that has started threads cannot be forked."""
    command = [sys.executable, "tests/interruptions.py", str(tmp_path), "--kills", "3", "--recipes", "r2-vision-only"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.count("'ended': True, 'identical': True, 'steps again': 0") == 3
    assert "not killed" not in done.stdout
