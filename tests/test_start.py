"""What a person waits for before anything happens: a mistyped name, a list and help are told without torch."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "timm", "triton", "numpy", "tokenizers", "pyarrow", "tensorboard")


def after(words: list[str], modules: tuple[str, ...]) -> tuple[str, str]:
    """What `zoo <words>` says, and which of `modules` it has imported by then."""
    program = f"""
import sys
from zoo.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print("imported:", *(name for name in {modules!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    said, _, imported = done.stdout.rpartition("imported:")
    assert done.returncode == 0, done.stderr
    return said + done.stderr, imported.strip()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--help"], "COMMAND"),
        (["list"], "text_gatedfwa_1m"),
        (["list", "--kind", "recipes"], "text/demo"),
        (["list", "--kind", "mixers"], "gatedfwa"),
        (["list", "--kind", "datasets"], "text/folder"),
        (["list", "--kind", "suites"], "recall"),
        (["evaluate", "recal"], "did you mean 'recall'"),
        (["train", "typo/demo"], "did you mean 'text/demo'"),
        (["train", "text/demo", "steps"], "is not of the form field=value"),
    ],
)
def test_names_are_told_without_torch(words, says):
    said, imported = after(words, HEAVY)
    assert says in said
    assert imported == ""


def test_a_mistyped_field_waits_for_no_more_than_torch():
    said, imported = after(["train", "text/demo", "train.stps=3"], ("timm", "torch._dynamo", "torch.distributed.fsdp"))
    assert "did you mean 'steps'" in said
    assert imported == ""
