"""The house style, as far as a program can tell: the same checks that pre-commit runs, and a few bans."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("zoo", "tasks")
LONGEST_FILE = 600  # lines
UNPICKLERS = {"zoo/train/checkpoint.py"}  # the modules that may call torch.load, weights_only=True


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def run(*command: str) -> None:
    shown = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_format():
    run("ruff", "format", "--check", "--no-cache", ".")


def test_lint():
    run("ruff", "check", "--no-cache", "--output-format=concise", ".")


def test_types():
    run("mypy", "--no-error-summary")


def banned(source: str, *, may_unpickle: bool = False, may_print: bool = False) -> list[str]:
    """What the source does that no library code here does, as 'line: why'."""
    found = []
    for node in ast.walk(ast.parse(source)):
        why = None
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = getattr(node, "module", None)
            names = {alias.name for alias in node.names} | {f"{base}.{alias.name}" for alias in node.names}
            if {name.split(".")[0] for name in names if name} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}:
                why = "pickle runs code while it loads; use safetensors and JSON"
            elif "torch.load" in names:
                why = "torch.load belongs to the checkpoint and weights modules"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and not may_unpickle:
                why = "torch.load belongs to the checkpoint and weights modules"
            elif called == "torch.load" and keywords.get("weights_only") != "True":
                why = "torch.load without weights_only=True runs code while it loads"
            elif keywords.get("allow_pickle", "False") != "False":
                why = "allow_pickle runs code while it loads"
            elif called == "print" and not may_print:
                why = "library code does not print; zoo/cli.py and the log do"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("tl.make_block_ptr", "tl.advance"):
            why = "Triton removes block pointers; use pointers or descriptors"
        if why:
            found.append(f"{getattr(node, 'lineno', 0)}: {why}")
    return found


def test_library_code_does_nothing_banned():
    found = []
    for file in python_files(*LIBRARY):
        name = file.relative_to(ROOT).as_posix()
        lines = banned(file.read_text("utf-8"), may_unpickle=name in UNPICKLERS, may_print=name == "zoo/cli.py")
        found += [f"{name}:{line}" for line in lines]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load('x', weights_only=True)",
        "numpy.load('x', allow_pickle=True)",
        "def k(tl):\n    tl.make_block_ptr(1)",
    ],
)
def test_a_planted_ban_is_caught(source):
    assert len(banned(source)) == 1


def test_the_checkpoint_module_loads_weights_only():
    assert banned("torch.load('x')", may_unpickle=True)
    assert not banned("torch.load('x', weights_only=True)", may_unpickle=True)


def test_files_stay_short():
    counts = {file: len(file.read_text("utf-8").splitlines()) for file in python_files(*LIBRARY, "tests", "scripts")}
    long = {file.relative_to(ROOT).as_posix(): count for file, count in counts.items() if count > LONGEST_FILE}
    assert not long, f"more than {LONGEST_FILE} lines: split by what a reader looks for: {long}"
