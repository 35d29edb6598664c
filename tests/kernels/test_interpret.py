"""Runs tests/kernels/interpreted.py under Triton's interpreter: it must be asked for before triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "window": "tests/kernels/interpreted.py",
    "nsa": "tests/kernels/interpreted_nsa.py",
    "block": "tests/kernels/interpreted_block.py",
}
INDEX = "inverse or runs or walks or means or merged"  # what surrounds the attention itself
GROUPS = [  # (family, -k, -m): several processes, several names in the report, less of a wait under xdist
    ("window", "equals_the_loops", ""),
    ("window", "not equals_the_loops", ""),
    ("nsa", INDEX, "not slow"),
    ("nsa", f"not ({INDEX})", "not slow"),
    ("block", "", ""),
    pytest.param("nsa", "", "slow", marks=pytest.mark.slow),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("family", "keyword", "marker"), GROUPS)
def test_interpreted_kernels(family, keyword, marker):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ZOO_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    chosen = ["-k", keyword, "-m", marker]
    arguments = ["-q", "-x", "-p", "no:cacheprovider", *chosen, FILES[family]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
