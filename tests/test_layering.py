"""Who may import whom: the parts of zoo in their order, what each domain may see, and what is declared as a dependency.

Every import counts: at the top, inside a function, under TYPE_CHECKING, and import_module("a literal").
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A part may import the parts of the rows above its own, and not those beside it.
ORDER = (
    ("registry", "config", "state", "files", "distances", "recording"),  # know nothing else of zoo
    ("kernels",),
    ("ops",),
    ("layers", "loss", "quantize", "resnet"),
    ("mixers",),
    ("backbone",),
    ("model",),
    ("data",),
    ("weights",),
    ("frozen",),
    ("generation",),  # zoo.generate is its function
    ("task",),
    ("train",),
    ("pipelines",),  # opens a run that train has left
    ("evaluate",),
    ("doctor", "peers", "publish"),
    ("bench_report",),
    ("bench",),
    ("tuning",),
    ("cli",),
)
ROW = {part: row for row, parts in enumerate(ORDER) for part in parts}
# Arrows inside the first row: a recipe node takes its schema from the registry entry that it names.
BESIDE = {("config", "registry")}
# Arrows upwards, inside a function alone: create_model opens weights (pretrained=True, backbone_from=), which build
# models.
DEFERRED = {("model", "weights"), ("model", "frozen")}
# ops choose the back end and nobody passes them by; benches measure the parts one by one
IMPORTERS = {"kernels": ("ops", "bench", "tuning")}
PEERS = {"fla", "flash-attn"}  # what a bench measures beside us, where it is installed
KNOWS_MIXERS_BY_NAME = {"train", "evaluate", "generation"}  # they see zoo.mixers.base, no concrete mixer
TASKS_STOP_AT = ROW["task"]


@dataclass(frozen=True)
class Import:
    line: int
    target: str  # absolute, dotted; "zoo:create_model" for a name taken from the package itself
    deferred: bool  # inside a function
    literal: bool  # import_module("…")


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    package = ".".join(file.relative_to(root).with_suffix("").parts[:-1])

    def is_module(dotted: str) -> bool:
        path = root.joinpath(*dotted.split("."))
        return path.is_dir() or path.with_suffix(".py").is_file()

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            line = getattr(child, "lineno", 0)
            if isinstance(child, ast.Import):
                yield from (Import(line, alias.name, deferred, False) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parent = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*parent, *filter(None, [child.module])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    is_inner = is_module(inner) or inner == "torch.nn"
                    target = inner if is_inner else f"zoo:{alias.name}" if base == "zoo" else base
                    yield Import(line, target, deferred, False)
            elif isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.nn":
                yield Import(line, "torch.nn", deferred, False)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                named = [word.value for word in child.args[:1] if isinstance(word, ast.Constant)]
                yield from (Import(line, str(name), deferred, True) for name in named)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, deferred or inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), False)


def part_of(dotted: str) -> str:
    """zoo.ops.window -> ops; the package itself -> ''."""
    return dotted.split(".")[1] if "." in dotted else ""


def objection_in_zoo(part: str, found: Import) -> str | None:
    top, other = found.target.split(".")[0], part_of(found.target)
    if part == "registry" and found.literal:  # it imports what a name stands for, when it is asked for
        return None
    if top == "tasks":
        return "zoo never imports tasks: it finds them through entry points"
    if part == "kernels" and (found.target + ".").startswith("torch.nn."):
        return "kernels never import torch.nn"
    if part == "":  # the package names its public surface, and loads it lazily: test_importing_zoo_is_cheap
        return None
    if top.startswith("zoo:") and top != "zoo:__version__":
        return "take it from the module that holds it"
    if top != "zoo" or other in (part, ""):
        return None
    if other not in ROW:
        return f"{other!r} has no place in the order (ORDER in this test)"
    if other in IMPORTERS and part not in IMPORTERS[other]:
        return f"only {' and '.join(IMPORTERS[other])} may import {other}"
    if part in KNOWS_MIXERS_BY_NAME and other == "mixers" and found.target != "zoo.mixers.base":
        return f"{part} knows no concrete mixer, only zoo.mixers.base"
    if ROW[other] < ROW[part] or (part, other) in BESIDE or (found.deferred and (part, other) in DEFERRED):
        return None
    return f"{part} may not import {other}"


def objection_in_tasks(domain: str, found: Import) -> str | None:
    top, other = found.target.split(".")[0], part_of(found.target)
    if top == "tasks" and other not in (domain, ""):
        return f"tasks never import each other: {domain or 'tasks'} may not import {other}"
    if top != "zoo" or other == "":
        return None
    if other not in ROW:
        return f"{other!r} has no place in the order (ORDER in this test)"
    if other in IMPORTERS or ROW[other] > TASKS_STOP_AT:
        return f"a domain may not import {other}"
    return None


def violations(root: Path) -> list[str]:
    found = []
    for package, objection in (("zoo", objection_in_zoo), ("tasks", objection_in_tasks)):
        for file in sorted((root / package).rglob("*.py")):
            inner = file.relative_to(root / package).with_suffix("").parts
            part = "" if inner == ("__init__",) else inner[0]
            if package == "zoo" and part and part not in ROW:
                found.append(f"{file.relative_to(root)}: {part!r} has no place in the order (ORDER in this test)")
                continue
            for imported in imports_of(file, root):
                if why := objection(part, imported):
                    where = file.relative_to(root).as_posix()
                    found.append(f"{where}:{imported.line}: imports {imported.target}: {why}")
    return found


def test_every_import_follows_the_order():
    assert not (found := violations(ROOT)), "\n".join(found)


GOOD = {
    "zoo/__init__.py": "if TYPE_CHECKING:\n    from zoo.model import create_model\n__version__ = '1'",
    "zoo/registry.py": "from importlib import import_module\ndef load():\n    import_module('zoo.mixers')",
    "zoo/config.py": "from zoo.registry import load",
    "zoo/kernels/window.py": "import torch\nimport triton",
    "zoo/ops/__init__.py": "",
    "zoo/ops/window.py": "from ..kernels import window\nfrom zoo import config as configs",
    "zoo/mixers/__init__.py": "from . import base, swa",
    "zoo/mixers/base.py": "from torch import nn",
    "zoo/mixers/swa.py": "from zoo.mixers.base import nn\nfrom zoo import ops",
    "zoo/model.py": "from zoo import registry\ndef create_model():\n    from zoo.weights import load",
    "zoo/weights.py": "from zoo.model import create_model\ndef load(): ...",
    "zoo/generation.py": "from zoo.mixers.base import nn",
    "zoo/evaluate.py": "from zoo.train.loop import run",
    "zoo/train/loop.py": "from zoo.mixers.base import nn\nfrom zoo.train import optim\nfrom zoo import __version__",
    "zoo/train/optim.py": "",
    "zoo/cli.py": "from zoo.train.loop import optim",
    "tasks/__init__.py": "",
    "tasks/text/__init__.py": "",
    "tasks/text/task.py": "from zoo import create_model\nfrom zoo.model import Batch\nfrom tasks.text import head",
    "tasks/text/head.py": "from zoo.ops.window import configs",
}
PLANTED = {
    "zoo imports a domain": ("zoo/train/loop.py", "import tasks.text.task", "zoo never imports tasks"),
    "a domain by literal": (
        "zoo/cli.py",
        "from importlib import import_module as i\ni.import_module('tasks.text')",
        "never imports tasks",
    ),
    "upwards": ("zoo/ops/window.py", "from zoo.mixers.base import nn", "ops may not import mixers"),
    "upwards, relative": ("zoo/ops/window.py", "from ..model import create_model", "ops may not import model"),
    "upwards, as a module": ("zoo/mixers/swa.py", "from zoo import backbone", "mixers may not import backbone"),
    "upwards, in a function": (
        "zoo/backbone.py",
        "def f():\n    import zoo.train.loop",
        "backbone may not import train",
    ),
    "upwards, for types": ("zoo/state.py", "if TYPE_CHECKING:\n    import zoo.model", "state may not import model"),
    "upwards, by literal": ("zoo/model.py", "import_module('zoo.generation')", "model may not import generation"),
    "weights at the top of model": ("zoo/model.py", "import zoo.weights", "model may not import weights"),
    "through the package": ("zoo/generation.py", "from zoo import create_model", "take it from the module"),
    "beside": ("zoo/layers.py", "import zoo.quantize", "layers may not import quantize"),
    "evaluate in train": ("zoo/train/loop.py", "import zoo.evaluate", "train may not import evaluate"),
    "base": ("zoo/registry.py", "import zoo.config", "registry may not import config"),
    "nn in a kernel": ("zoo/kernels/gate.py", "from torch import nn", "kernels never import torch.nn"),
    "functional in a kernel": (
        "zoo/kernels/gate.py",
        "import torch.nn.functional as F",
        "kernels never import torch.nn",
    ),
    "nn by attribute": (
        "zoo/kernels/gate.py",
        "import torch\ny = torch.nn.functional.silu",
        "kernels never import torch.nn",
    ),
    "a kernel from a mixer": (
        "zoo/mixers/swa.py",
        "from zoo.kernels import window",
        "only ops and bench and tuning may import kernels",
    ),
    "a concrete mixer": ("zoo/train/loop.py", "from zoo.mixers.swa import ops", "no concrete mixer"),
    "all concrete mixers": ("zoo/generation.py", "from zoo import mixers", "no concrete mixer"),
    "an unplaced module": ("zoo/helpers.py", "", "no place in the order"),
    "another domain": ("tasks/text/task.py", "from tasks.image import head", "tasks never import each other"),
    "another domain, relative": ("tasks/text/task.py", "from ..image import head", "tasks never import each other"),
    "a domain in the package": ("tasks/__init__.py", "from tasks import text", "tasks never import each other"),
    "train in a domain": ("tasks/text/task.py", "from zoo.train import loop", "a domain may not import train"),
    "a kernel in a domain": ("tasks/text/task.py", "import zoo.kernels.window", "a domain may not import kernels"),
}


@pytest.fixture
def small_house(tmp_path):
    for name, source in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "tasks" / "image").mkdir()
    (tmp_path / "tasks" / "image" / "head.py").touch()
    (tmp_path / "zoo" / "backbone.py").touch()
    return tmp_path


def test_a_house_in_order_passes(small_house):
    assert violations(small_house) == []


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_caught(small_house, planted):
    name, source, expected = planted
    (small_house / name).parent.mkdir(parents=True, exist_ok=True)
    (small_house / name).write_text(source)
    found = violations(small_house)
    assert len(found) == 1, found
    assert name in found[0]
    assert expected in found[0]


# ---------------------------------------------------------------------------------------------------------------------


def import_paths_in(yaml: str) -> list[str]:
    """Values that look like Python import paths, or the key that other frameworks use for one."""
    return re.findall(
        r"_target_|(?<=[\s'\":])(?:zoo|tasks|torch)(?:\.\w+)+|\b[\w.]+:[A-Za-z_]\w*\b", re.sub(r"#.*", "", yaml)
    )


def test_recipes_name_registry_entries_never_import_paths():
    found = {
        file.name: paths for file in (ROOT / "configs").rglob("*.yaml") if (paths := import_paths_in(file.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    "yaml", ["a: zoo.mixers.swa", "_target_: x", "a: 'tasks.text.task:TextTask'", "a: pkg.mod:Name"]
)
def test_an_import_path_in_a_recipe_is_caught(yaml):
    assert import_paths_in(yaml)


def test_an_ordinary_recipe_is_not_taken_for_import_paths():
    recipe = "extends: text/base\n# see zoo.config\nmixer: {name: swa, window: 64}\npath: ./a.txt\nlr: 1.0e-3\n"
    assert import_paths_in(recipe) == []


# ---------------------------------------------------------------------------------------------------------------------


def test_importing_zoo_is_cheap():
    code = "import sys, zoo, zoo.registry; print([m for m in ('torch', 'triton', 'timm', 'tasks') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_dependencies_are_what_is_imported():
    """Nothing is imported that pyproject does not declare, and nothing declared that is not imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonical(re.split(r"[^\w.-]", row)[0]) for row in project["dependencies"]}
    distributions = metadata.packages_distributions()
    imported = {"tensorboard"} if uses("torch.utils.tensorboard") else set()
    for target in all_imports():
        top = target.split(".")[0].split(":")[0]
        if top not in sys.stdlib_module_names and top not in ("zoo", "tasks"):
            imported |= {canonical(name) for name in distributions.get(top, [top])}
    optional = PEERS | {
        canonical(re.split(r"[^\w.-]", row)[0])
        for extra in ("eval", "hub")
        for row in project["optional-dependencies"][extra]
    }
    assert imported - declared - optional == set(), "imported, but not declared in pyproject.toml"
    assert declared - imported == set(), "declared in pyproject.toml, but imported nowhere"


def all_imports() -> set[str]:
    files = [file for package in ("zoo", "tasks") for file in (ROOT / package).rglob("*.py")]
    return {found.target for file in files for found in imports_of(file, ROOT)}


def uses(module: str) -> bool:
    return any((target + ".").startswith(module + ".") for target in all_imports())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
