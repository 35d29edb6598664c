"""Runs tests/kernels/interpreted.py under Triton's interpreter: it must be asked for before triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = [
    "equals_the_loops",
    "not equals_the_loops",
]  # two processes: two names in the report, half the wait under xdist


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels(group):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ZOO_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", group, "tests/kernels/interpreted.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
