"""Recipes: dataclass schemas filled from layers of YAML and dotted command-line words, through OmegaConf.

Precedence: dataclass default < parent recipe (`extends:`, one level) < recipe < command line. Every node is typed. A
node with a choice, `mixer: {name: gatedfwa, window: 512}`, takes its schema from the registry entry that it names; a
layer that changes the name keeps what the new schema also has and drops what belonged to the old choice. Anything else
that does not fit is a ConfigError with the field's dotted path, the value, what is accepted and the nearest match.
"""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.registry import UnknownName, domain_folders, nearest

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe or an override that does not fit its schema."""


@dataclass(frozen=True)
class Choice:
    """A filled node with a choice: the registry name and the config that belongs to it."""

    name: str
    config: Any


def choice(registry: Any, default: str | None = None, *, schema: Callable[[Any], type] | None = None) -> Any:
    """A dataclass field holding a Choice out of `registry`.

    `schema` maps a registry entry to its config dataclass (default: its attribute `Config`). An entry that is a
    function returning a config (a model size) is its own lowest layer.
    """
    return field(default=default, metadata={"registry": registry, "schema": schema})


def choices(registry: Any) -> Any:
    """A dataclass field holding a list of Choice out of `registry`; empty by default."""
    return field(default_factory=list, metadata={"registry": registry, "schema": None, "many": True})


def later(default: Any) -> Any:
    """A field that its schema has not always had: while it holds its default it is left out of what is stored, so that
    the fingerprints of recipes from before it stay as they are."""
    return field(default=default, metadata={"later": True})


# ---------------------------------------------------------------------------------------------------------------------
# Reading recipes


def checkout() -> Path | None:
    """The root of the repository that zoo runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "configs").is_dir() else None


def configs_root() -> Path:
    """The recipes of the checkout that zoo runs from, or those shipped in the wheel."""
    root = checkout()
    return root / "configs" if root else Path(__file__).resolve().parent / "_configs"


def list_recipes() -> list[str]:
    """configs/<domain>/<recipe>.yaml, and of a domain in a package of its own <package>/configs/<recipe>.yaml."""
    root = configs_root()
    own = (p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml") if p.parts[-2] != "suites")
    others = (f"{domain}/{p.stem}" for domain, f in domain_folders().items() for p in (f / "configs").glob("*.yaml"))
    return sorted({*own, *others})


def list_suites() -> list[str]:
    """What `zoo evaluate SUITE` takes: configs/suites/<suite>.yaml."""
    return sorted(path.stem for path in (configs_root() / "suites").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """`text/demo` -> configs/text/demo.yaml; a path to a YAML file is taken as it is."""
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"recipe file {name!r} does not exist")
    path = configs_root() / f"{name}.yaml"
    if path.is_file():
        return path
    domain, _, stem = name.partition("/")
    folder = domain_folders().get(domain)
    if folder is not None and (folder / "configs" / f"{stem}.yaml").is_file():
        return folder / "configs" / f"{stem}.yaml"
    raise ConfigError(f"unknown recipe {name!r}{nearest(name, list_recipes())}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Interpolation (`${oc.env:…}`, `${train.steps}`) is refused: a recipe says what it means."""
    text = path.read_text(encoding="utf-8")
    _refuse_interpolation(text, str(path))
    try:
        data = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError) as error:  # a bare scalar trips an assertion
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not a mapping of fields")
    return typing.cast(dict[str, Any], data)


def recipe_layers(name: str, overrides: list[str] | tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The layers of a recipe, lowest first: parent, recipe, dotted words `a.b=value`."""
    path = find_recipe(name)
    recipe = read_yaml(path)
    layers = [recipe]
    if parent := recipe.pop("extends", None):
        base = read_yaml(find_recipe(str(parent)))
        if "extends" in base:
            raise ConfigError(f"{path}: extends {parent!r}, which extends {base['extends']!r}; one level is accepted")
        layers.insert(0, base)
    return [*layers, dotted(overrides)] if overrides else layers


def dotted(words: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """['train.steps=10', 'model=text_swa_1m'] -> nested mapping; values are read as YAML.

    A choice and fields of it may be given together, in any order: `model=text_swa_1m model.backbone.depth=4`.
    """
    for word in words:
        if "=" not in word or word.startswith(("=", "-")):
            raise ConfigError(f"override {word!r} is not of the form field=value, for example train.steps=100")
        _refuse_interpolation(word, "command line")
    fields = [word.partition("=")[0] for word in words]
    words = [
        f"{name}.name={word.partition('=')[2]}" if any(other.startswith(f"{name}.") for other in fields) else word
        for name, word in zip(fields, words, strict=True)
    ]
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(words), resolve=False))


def _refuse_interpolation(text: str, origin: str) -> None:
    if found := re.search(r"\$\{[^}]*\}?", text):
        raise ConfigError(f"{origin}: {found.group()!r} is refused in a recipe; write the value itself")


# ---------------------------------------------------------------------------------------------------------------------
# Filling schemas


def build(schema: type[T], *layers: Any, path: str = "", belongs: str = "") -> T:
    """An instance of the dataclass `schema` from mappings or instances, later layers winning. Raises ConfigError."""
    mappings = [to_dict(layer) if dataclasses.is_dataclass(layer) else layer for layer in layers]
    for mapping in mappings:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{path or schema.__name__} takes a mapping of fields, not {mapping!r}")
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for mapping in mappings:
        for key in mapping:
            if key not in fields and not isinstance(mapping, _Former):
                raise ConfigError(f"unknown field {_join(path, key)!r}{belongs}{nearest(str(key), fields)}")

    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for name, f in fields.items():
        given = [_former_too(mapping, mapping[name]) for mapping in mappings if name in mapping]
        at = _join(path, name)
        if "registry" in f.metadata:
            if f.metadata.get("many"):
                items = given[-1] if given else []
                values[name] = [_build_choice(f, [item], f"{at}[{i}]") for i, item in enumerate(items)]
            else:
                values[name] = _build_choice(f, given, at)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = build(typing.cast(type, hints[name]), *given, path=at)
        elif given:
            values[name] = _typed(hints[name], given[-1], at)
    try:
        return schema(**values)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path or schema.__name__}: {error}") from error


def _build_choice(f: dataclasses.Field, layers: list[Any], path: str) -> Choice | None:
    registry, schema_of = f.metadata["registry"], f.metadata["schema"]
    nodes = [_as_node(layer, path) for layer in layers if layer is not None]
    name = None if f.default is dataclasses.MISSING else f.default
    named = []  # the choice in force at each layer
    for node in nodes:
        name = node.get("name", name)
        named.append(name)
    if name is None:
        if nodes:
            raise ConfigError(f"{path} needs a name{nearest('', registry.names())}")
        return None
    try:
        entry = registry.get(name)
    except UnknownName as error:
        raise ConfigError(f"{path}.name: {error}") from error
    base = entry() if not hasattr(entry, "Config") and schema_of is None else None
    schema = schema_of(entry) if schema_of else type(base) if base is not None else entry.Config
    parts: list[Any] = [] if base is None else [base]
    for node, in_force in zip(nodes, named, strict=True):
        kind = type(node) if in_force == name else _Former
        parts.append(kind({key: value for key, value in node.items() if key != "name"}))
    return Choice(name, build(schema, *parts, path=path, belongs=f" of {registry.kind} {name!r}"))


class _Former(dict):
    """A layer written for another choice than the one in force: what the schema does not know is dropped."""


def _former_too(mapping: Mapping, value: Any) -> Any:
    return _Former(value) if isinstance(mapping, _Former) and isinstance(value, Mapping) else value


def _as_node(layer: Any, path: str) -> dict[str, Any]:
    if isinstance(layer, Choice):
        return {"name": layer.name, **to_dict(layer.config)}
    if isinstance(layer, str):
        return {"name": layer}
    if isinstance(layer, dict):
        return layer
    raise ConfigError(f"{path} takes a name or a mapping with a name, not {layer!r}")


def _typed(hint: Any, value: Any, path: str) -> Any:
    """One leaf through OmegaConf's typed node: '1e3' is no int, a bool is no number, a wrong Literal is refused."""
    try:
        node = OmegaConf.structured(dataclasses.make_dataclass("Leaf", [("value", hint)]))
        OmegaConf.update(node, "value", value)
        checked = OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        accepted = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        hintname = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ConfigError(
            f"{path} = {value!r} does not fit; it takes {hintname}"
            + (nearest(str(value), accepted) if accepted else "")
        ) from error
    checked = typing.cast(dict[str, Any], checked)["value"]
    return tuple(checked) if typing.get_origin(hint) is tuple and checked is not None else checked


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


# ---------------------------------------------------------------------------------------------------------------------
# Storing and comparing


def to_dict(config: Any) -> Any:
    """A config as plain dicts, lists and numbers; a Choice as {name: …, field: …}. `build` reads it back equal."""
    if isinstance(config, Choice):
        return {"name": config.name, **to_dict(config.config)}
    if dataclasses.is_dataclass(config):
        kept = (
            f
            for f in dataclasses.fields(config)
            if not ("later" in f.metadata and getattr(config, f.name) == f.default)
        )
        return {f.name: to_dict(getattr(config, f.name)) for f in kept}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def fingerprint(config: Any) -> str:
    """Twelve hex digits that name a resolved config: equal configs, equal digits, on any machine."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines 'train.steps: 100 -> 200' for every leaf that differs between two configs or their dicts."""
    old, new = to_dict(old), to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in difference(old.get(key), new.get(key), _join(path, key))]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
