"""What a suite is: experiments, and the cells that they unfold into.

    configs/suites/<suite>.yaml:   description: …
                                   experiments:
                                     <name>: {recipe: …, models: […], arms: {…}, seeds: […], measure: […]}

An experiment trains (or times) one recipe with several models and settings; a cell is one of these, with its seeds and
learning rates. Another domain joins by another entry: no code knows which there are.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from zoo import config as configs
from zoo import registry
from zoo.config import ConfigError
from zoo.train import Recipe, Replica
from zoo.train.recipe import make_model, make_task

MEASUREMENTS = ("scores", "curve", "positions", "lengths", "speed")
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Experiment:
    """recipe     the recipe that every cell starts from
    section    of the page; experiments of one section share its tables and plots, a model and arm stands in one only.
               Default: one of its own
    title      of the section, given by the first of its experiments
    set        fields of the recipe that all cells change: "train.steps=100"
    models     patterns of registered models, one cell each; none: the recipe's own
    arms       label -> fields that its cells change; crossed with the models
    seeds      one training each; what varies with them is shown as a spread
    rates      learning rates; the best one is shown, by the seeds' mean. None: the recipe's
    stacked    all seeds and rates of a cell as one batched model (zoo/train/sweeps.py)
    same_size  a model whose number of parameters all get, by the width of their MLPs
    measure    scores: the task's metrics on `split`. curve: the validation numbers during training.
               positions: the loss by place in the row. lengths: the scores at other lengths.
               speed: training, prefill and decoding rates, and bytes of state; needs no training
    batches    that a measurement of the split takes at most; 0: all
    lengths    for lengths and speed: values of the field `length_field`
    step_tokens    for speed: tokens of a training step, split into rows of the length at hand
    decode_rows    for speed: sequences that are decoded together
    published  "model/arm" (or "model") -> a published value of the first metric, shown beside ours
    """

    recipe: str = ""
    section: str = ""
    title: str = ""
    set: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    rates: list[float] = field(default_factory=list)
    stacked: bool = False
    same_size: str = ""
    measure: list[str] = field(default_factory=lambda: ["scores"])
    split: Literal["test", "valid"] = "test"
    batches: int = 0
    lengths: list[int] = field(default_factory=list)
    length_field: str = "task.context"
    step_tokens: int = 65536
    decode_rows: int = 8
    published: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.recipe:
            raise ValueError(f"recipe is missing; it takes one of {', '.join(configs.list_recipes())}")
        for name in self.measure:
            if name not in MEASUREMENTS:
                raise ValueError(f"measure names {name!r}{registry.nearest(name, MEASUREMENTS)}")
        if {"lengths", "speed"} & {*self.measure} and not self.lengths:
            raise ValueError("measure names lengths or speed, and `lengths` is empty; it takes numbers of tokens")
        for label in self.arms:
            if not NAME.fullmatch(label):
                raise ValueError(f"arm {label!r}; a label takes letters, digits, _ and -")
        if not self.seeds:
            raise ValueError("seeds is empty; it takes one or more")

    @property
    def trains(self) -> bool:
        return self.measure != ["speed"]


@dataclass(frozen=True)
class Cell:
    """One experiment with one model and arm. Everything that it needs to be run in a process of its own."""

    suite: str
    experiment: str
    model: str
    arm: str
    settings: Experiment
    words: tuple[str, ...]  # dotted fields over the recipe, seed and rate apart

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.experiment, self.model, self.arm)))

    @cached_property
    def recipe(self) -> Recipe:
        """Of all its replicas."""
        recipe = configs.build(Recipe, *configs.recipe_layers(self.settings.recipe, list(self.words)))
        if not self.settings.same_size:
            return recipe
        width = fitting_mlp(recipe, self.reference())
        return configs.build(Recipe, recipe, {"model": {"backbone": {"mlp_width": width}}})

    def reference(self) -> Recipe:
        words = [*self.settings.set, f"model.name={self.settings.same_size}"]
        return configs.build(Recipe, *configs.recipe_layers(self.settings.recipe, words))

    def replicas(self) -> list[Replica]:
        """All that are planned; speed alone wants no more than one."""
        rates = self.settings.rates or [self.recipe.train.optimizer.lr]
        found = [Replica(float(rate), seed) for rate in rates for seed in self.settings.seeds]
        return found if self.settings.trains else found[:1]


@dataclass
class Suite:
    name: str
    description: str
    experiments: dict[str, Experiment]

    def cells(self, only: Sequence[str] = (), words: Sequence[str] = ()) -> list[Cell]:
        """Those whose name fits a pattern of `only` (or all), each changed by `words`. Raises ConfigError where there
        is none."""
        cells = [cell for name, settings in self.experiments.items() for cell in self._unfold(name, settings, words)]
        chosen = [cell for cell in cells if not only or any(fnmatch.fnmatch(cell.name, f"*{p}*") for p in only)]
        if not chosen:
            raise ConfigError(f"no cell of suite {self.name!r} fits {', '.join(only)}; there are: {names_of(cells)}")
        return chosen

    def _unfold(self, name: str, settings: Experiment, words: Sequence[str]) -> Iterator[Cell]:
        found = [model for pattern in settings.models for model in registry.models.names(pattern)]
        for pattern in settings.models:
            if not registry.models.names(pattern):
                near = registry.nearest(pattern, registry.models.names())
                raise ConfigError(f"experiments.{name}.models: no model fits {pattern!r}{near}")
        for model in dict.fromkeys(found) or [""]:
            for arm, changed in (settings.arms or {"": []}).items():
                chosen = [f"model.name={model}"] if model else []
                shown = model or str(configs.build(Recipe, *configs.recipe_layers(settings.recipe)).model.name)  # type: ignore[union-attr]
                yield Cell(self.name, name, shown, arm, settings, (*settings.set, *chosen, *changed, *words))


def names_of(cells: Sequence[Cell]) -> str:
    return ", ".join(cell.name for cell in cells)


# ---------------------------------------------------------------------------------------------------------------------


def find_suite(name: str) -> Suite:
    """`recall` -> configs/suites/recall.yaml; a path to a YAML file is taken as it is. Raises ConfigError."""
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else configs.configs_root() / "suites" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"unknown suite {name!r}{registry.nearest(name, configs.list_suites())}")
    return read_suite(path)


def read_suite(path: Path) -> Suite:
    content = configs.read_yaml(path)
    if unknown := [key for key in content if key not in ("description", "experiments")]:
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; accepted: description, experiments")
    nodes: dict[str, Any] = content.get("experiments") or {}
    if not nodes:
        raise ConfigError(f"{path} holds no experiment")
    experiments = {}
    for name, node in nodes.items():
        if not NAME.fullmatch(str(name)):
            raise ConfigError(f"{path}: experiment {name!r}; a name takes letters, digits, _ and -")
        experiments[str(name)] = configs.build(Experiment, node, path=f"experiments.{name}")
    return Suite(path.stem, " ".join(str(content.get("description", "")).split()), experiments)


# ---------------------------------------------------------------------------------------------------------------------
# Equal sizes

STEP = 8  # MLP widths are multiples of it: whole tensor-core tiles
TOLERANCE = 0.01


def parameter_count(recipe: Recipe) -> int:
    """Of the model, without making its weights."""
    with torch.device("meta"):
        model = make_model(recipe, make_task(recipe))
    return sum(p.numel() for p in model.parameters())


def fitting_mlp(recipe: Recipe, reference: Recipe) -> int:
    """The mlp_width with which recipe's model has as many parameters as reference's. Raises ConfigError where the
    nearest is more than 1% off."""
    wanted = parameter_count(reference)

    def size(width: int) -> int:
        return parameter_count(configs.build(Recipe, recipe, {"model": {"backbone": {"mlp_width": width}}}))

    slope = (size(2 * STEP) - size(STEP)) / STEP
    width = round((wanted - size(STEP)) / slope / STEP + 1) * STEP if slope else 0
    if width < STEP or abs(size(width) - wanted) > TOLERANCE * wanted:
        raise ConfigError(
            f"{recipe.model.name if recipe.model else '?'} cannot have the {wanted:,} parameters of same_size = "
            f"{reference.model.name if reference.model else '?'} by its mlp_width"
        )
    return width
