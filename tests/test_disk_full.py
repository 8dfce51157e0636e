"""One of the full disks of disk_full.py; all of them: see there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]  # a file system that only this process sees
ALLOWED = shutil.which("unshare") and subprocess.run([*OWN_MOUNTS, "true"], check=False, stderr=-3).returncode == 0


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.skipif(not ALLOWED, reason="this system lets nobody mount a small disk for the test")
def test_a_full_disk_is_told_in_a_line_and_the_same_command_goes_on(tmp_path):
    """In a process of its own, since one that has started threads cannot be forked."""
    command = [*OWN_MOUNTS, sys.executable, "tests/disk_full.py", str(tmp_path), "--moments"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    moments = ["optimiser of a checkpoint"]
    done = subprocess.run([*command, *moments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "NOT REACHED" not in done.stdout
