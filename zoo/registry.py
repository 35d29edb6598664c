"""Names for the things that people add: models, mixers, tasks with their heads, datasets.

One `Registry` class, five instances. An entry is an object registered by decorator, or a string
"package.module:attribute" that is imported on first use: listing names imports nothing.
"""

import contextlib
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Shadowed(ImportError):
    """Another package named `tasks` is found before ours."""


class MissingExtra(ModuleNotFoundError):
    """An optional extra is not installed; the message says which."""


class UnknownName(LookupError):
    """A name that a registry does not hold; the message names the nearest ones."""


class Registry:
    """A table from names to objects.

    `kind` is the word used in messages; `load` is called once, before the first look-up, and registers what
    lives in other modules or packages (entry points), so that importing zoo stays cheap.
    """

    def __init__(self, kind: str, load: Callable[["Registry"], Any] | None = None):
        self.kind = kind
        self._entries: dict[str, Any] = {}
        self._load = load

    def register(self, name: str, *, replace: bool = False) -> Callable[[T], T]:
        """Decorator: `@mixers.register("foo")`. A name is given once; `replace=True` says that you mean it."""

        def add(entry: T) -> T:
            self.add(name, entry, replace=replace)
            return entry

        return add

    def add(self, name: str, entry: Any, *, replace: bool = False) -> None:
        old = self._entries.get(name)
        if old is not None and not replace:
            if self._stands_for(entry, old):  # its module was imported before the package that declares it
                return
            if old is not entry and not self._stands_for(old, entry):
                known = f"{self.kind} {name!r} is registered already ({old!r})"
                raise ValueError(f"{known}; pass replace=True to replace it")
        self._entries[name] = entry

    def names(self, pattern: str = "*") -> list[str]:
        """Names matching a shell pattern, in natural order (8m before 125m)."""
        self._fill()
        return sorted((n for n in self._entries if fnmatch.fnmatch(n, pattern)), key=natural_key)

    def get(self, name: str) -> Any:
        """The entry called `name`, imported if it was a string. Raises UnknownName."""
        self._fill()
        if name not in self._entries:
            raise UnknownName(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = import_entry(entry, f"{self.kind} {name!r}")
        return entry

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _fill(self) -> None:
        if self._load is not None:
            load, self._load = self._load, None  # first, for what it loads may look names up here
            try:
                load(self)
            except BaseException:
                self._load = load  # or the next look-up would say that nothing of that name exists
                raise

    @staticmethod
    def _stands_for(text: Any, entry: Any) -> bool:
        """The string entry "module:attr" and the object that the module registers under the same name are one."""
        return isinstance(text, str) and text == f"{getattr(entry, '__module__', '')}:{getattr(entry, '__name__', '')}"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def nearest(name: str, accepted: Any) -> str:
    """'; did you mean …? accepted: …' for an error message."""
    accepted = sorted(map(str, accepted), key=natural_key)
    close = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.5)
    listed = ", ".join(accepted[:24]) + (", …" if len(accepted) > 24 else "")
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} accepted: {listed}" if listed else ""


def import_entry(target: str, what: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        entry: Any = import_module(module)
        for part in filter(None, attribute.split(".")):
            entry = getattr(entry, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{what} is declared as {target!r}, which cannot be loaded: {error}") from error
    return entry


# ---------------------------------------------------------------------------------------------------------------------
# Domains are found through entry points of the group "zoo.tasks"; each names the module that registers the domain's
# task, models and datasets. zoo itself never imports a domain by name.

TASK_GROUP = "zoo.tasks"


def domain_modules() -> dict[str, str]:
    """Domain name -> module: the folders of `tasks` beside zoo, and every installed entry point."""
    own = Path(__file__).resolve().parents[1] / "tasks"
    beside = {path.parent.name: f"tasks.{path.parent.name}" for path in sorted(own.glob("*/__init__.py"))}
    return beside | {point.name: point.value for point in metadata.entry_points(group=TASK_GROUP)}


def domain_folders() -> dict[str, Path]:
    """Domain name -> the folder of its package, found without importing it; a domain that is one file has none."""
    folders = {}
    for name, module in domain_modules().items():
        with contextlib.suppress(ImportError, ValueError, AttributeError):  # a broken one is told when it is loaded
            spec = util.find_spec(module)
            if spec is not None and spec.submodule_search_locations:
                folders[name] = Path(next(iter(spec.submodule_search_locations)))
    return folders


def _load_domains(_: Registry) -> None:
    for name, module in domain_modules().items():
        loaded = import_module_unshadowed(name, module)
        declare = getattr(loaded, "register", None)
        if declare is None:
            raise ImportError(f"the entry point {TASK_GROUP}:{name} names {module!r}, which has no register() function")
        declare()


def import_module_unshadowed(name: str, module: str) -> Any:
    """Import a domain's module; if another package hides ours (a folder `tasks/` of the user's), say so."""
    try:
        return import_module(module)
    except (ImportError, AttributeError) as error:
        if module.split(".")[0] == "tasks":
            hiding = import_module("tasks") if _importable("tasks") else None
            if hiding is not None and getattr(hiding, "DISTRIBUTION", None) != "gatedfwa-zoo":
                origin = getattr(hiding, "__file__", None) or list(getattr(hiding, "__path__", ["?"]))[0]
                raise Shadowed(
                    f"another package named 'tasks' at {Path(origin)} hides gatedfwa-zoo's. "
                    "Start with the `zoo` script (or `python -P -m zoo.cli`), or from another folder."
                ) from error
        raise ImportError(f"the domain {name!r} ({module}) cannot be loaded: {error}") from error


def _importable(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def _load_mixers(_: Registry) -> None:
    import_module("zoo.mixers")
    tasks.names()  # the register() of a package of one's own may add some


mixers = Registry("mixer", _load_mixers)
tasks = Registry("task", _load_domains)
heads = Registry("head", lambda _: tasks.names())
models = Registry("model", lambda _: tasks.names())
datasets = Registry("dataset", lambda _: tasks.names())
