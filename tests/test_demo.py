"""scripts/demo.sh around a `zoo` that only pretends: signals reach the training, and a busy machine is told."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRETENDER = """#!/usr/bin/env bash
echo "$*" >> calls.txt
[ "$1" = train ] || exit 0
trap 'echo saved >> calls.txt; exit 143' TERM
for _ in $(seq "$PRETEND"); do sleep 0.1; done
"""


@pytest.fixture
def house(tmp_path):
    """A folder with the script, and nothing to set up."""
    programs = {"scripts/setup.sh": "", ".venv/bin/zoo": PRETENDER, ".venv/bin/python": "#!/bin/sh\n", "bin/nproc": ""}
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scripts/demo.sh").write_text((ROOT / "scripts/demo.sh").read_text())
    return tmp_path


def demo(house, *, cores=10**6, pretend=300, **more):
    """pretend: tenths of a second that training takes."""
    (house / "bin/nproc").write_text(f"#!/bin/sh\necho {cores}\n")
    own = {"PATH": f"{house / 'bin'}{os.pathsep}{os.environ['PATH']}", "DEMO_RUN": "run", "DEMO_STOP_AFTER": "1"}
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment = {**plain, **own, "PRETEND": str(pretend), **more}
    return subprocess.Popen(["bash", "scripts/demo.sh"], cwd=house, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_signal_while_training_is_resumed_reaches_it(house):
    calls = house / "calls.txt"
    with demo(house) as process:
        deadline = time.monotonic() + 60
        while not (calls.is_file() and "--resume" in calls.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)  # the pretender is at its trap by now
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert calls.read_text().splitlines() == [
        *("train text/demo --run run", "saved"),  # stopped on purpose
        *("train text/demo --run run --resume", "saved"),
    ]


@pytest.mark.parametrize(
    ("cores", "more", "told"), [(-1, {}, True), (10**6, {}, False), (-1, {"OMP_NUM_THREADS": "1"}, False)]
)
def test_a_busy_machine_is_told(house, cores, more, told):
    said, _ = demo(house, cores=cores, pretend=1, **more).communicate(timeout=60)
    assert "== done" in said
    assert ("this machine is busy" in said) == told
