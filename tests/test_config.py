"""Recipes: what fits is filled, what does not is refused with the field, the value and the nearest match."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from zoo import config
from zoo.config import Choice, ConfigError
from zoo.registry import Registry

parts = Registry("part")


@parts.register("wheel")
class Wheel:
    @dataclass
    class Config:
        spokes: int = 32
        size: float | None = None


@parts.register("wing")
class Wing:
    @dataclass
    class Config:
        size: float | None = 2.0
        shape: Literal["swept", "delta"] = "swept"

        def __post_init__(self):
            if self.size is not None and self.size < 0:
                raise ValueError(f"size = {self.size}; it takes 0 or more")


@dataclass
class Body:
    length: int = 3
    part: Choice | None = config.choice(parts, "wheel")
    spares: list[Choice] = config.choices(parts)


@dataclass
class Machine:
    body: Body = field(default_factory=Body)
    speed: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    tags: list[str] = field(default_factory=list)


def test_later_layers_win_and_types_hold():
    machine = config.build(Machine, {"speed": 2, "body": {"length": 5}}, {"body": {"length": 7}, "betas": [0.8, 0.9]})
    assert machine == Machine(Body(7, Choice("wheel", Wheel.Config())), 2.0, (0.8, 0.9), [])
    assert isinstance(machine.speed, float)
    assert isinstance(machine.betas, tuple)


def test_a_choice_takes_the_schema_it_names():
    machine = config.build(Machine, {"body": {"part": {"name": "wing", "shape": "delta"}, "spares": ["wheel"]}})
    assert machine.body.part == Choice("wing", Wing.Config(shape="delta"))
    assert machine.body.spares == [Choice("wheel", Wheel.Config())]


def test_another_choice_keeps_what_both_schemas_have():
    recipe = {"body": {"part": {"name": "wheel", "spokes": 8, "size": 4.0}}}
    machine = config.build(Machine, recipe, {"body": {"part": "wing"}})
    assert machine.body.part == Choice("wing", Wing.Config(size=4.0))


@parts.register("wheeled")
def wheeled() -> Body:
    return Body(part=Choice("wheel", Wheel.Config(spokes=8)))


@parts.register("winged")
def winged() -> Body:
    return Body(length=9, part=Choice("wing", Wing.Config()))


def test_another_size_drops_what_belonged_to_the_former_one_at_any_depth():
    @dataclass
    class Fleet:
        body: Choice | None = config.choice(parts)

    recipe = {"body": {"name": "wheeled", "length": 4, "part": {"spokes": 6, "size": 1.5}}}
    assert config.build(Fleet, recipe).body.config == Body(4, Choice("wheel", Wheel.Config(6, 1.5)))
    assert config.build(Fleet, recipe, {"body": "winged"}).body.config == Body(4, Choice("wing", Wing.Config(1.5)))
    with pytest.raises(ConfigError, match="spokes"):
        config.build(Fleet, {"body": {"name": "winged", "part": {"spokes": 6}}})


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"sped": 1}, ["'sped'", "did you mean 'speed'"]),
        ({"body": {"lenght": 1}}, ["'body.lenght'", "'length'"]),
        ({"body": {"part": {"name": "wheell"}}}, ["body.part.name", "'wheell'", "'wheel'"]),
        ({"body": {"part": {"name": "wing", "spokes": 3}}}, ["'body.part.spokes'", "shape, size"]),
        ({"body": {"part": {"name": "wing", "shape": "round"}}}, ["body.part.shape", "'round'", "delta", "swept"]),
        ({"body": {"part": {"name": "wing", "size": -1}}}, ["body.part", "size = -1.0"]),
        ({"body": {"length": "1e3"}}, ["body.length", "'1e3'", "int"]),
        ({"body": {"length": True}}, ["body.length", "True", "int"]),
        ({"speed": None}, ["speed", "None", "float"]),
        ({"betas": [0.9]}, ["betas", "[0.9]"]),
        ({"body": 3}, ["body", "3"]),
        ({"body": {"part": 3}}, ["body.part", "3"]),
    ],
)
def test_what_does_not_fit_is_named(layer, words):
    with pytest.raises(ConfigError) as error:
        config.build(Machine, layer)
    for word in words:
        assert word in str(error.value)


def test_stored_and_read_back_equal():
    machine = config.build(Machine, {"body": {"part": "wing", "spares": ["wheel"]}, "tags": ["a"]})
    again = config.build(Machine, config.to_dict(machine))
    assert again == machine
    assert config.fingerprint(again) == config.fingerprint(machine)
    other = config.build(Machine, machine, {"speed": 3.0})
    assert config.fingerprint(other) != config.fingerprint(machine)
    assert config.difference(machine, other) == ["speed: 1.0 -> 3.0"]


def test_parent_then_recipe_then_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "configs_root", lambda: tmp_path)
    (tmp_path / "base.yaml").write_text("speed: 2.0\nbody: {length: 4}\n")
    (tmp_path / "child.yaml").write_text("extends: base\nbody: {length: 5}\n")
    (tmp_path / "grandchild.yaml").write_text("extends: child\n")
    machine = config.build(Machine, *config.recipe_layers("child", ["body.part=wing", "tags=[x, y]"]))
    assert (machine.speed, machine.body.length, machine.tags) == (2.0, 5, ["x", "y"])
    assert machine.body.part == Choice("wing", Wing.Config())
    with pytest.raises(ConfigError, match="one level"):
        config.recipe_layers("grandchild")
    with pytest.raises(ConfigError, match="did you mean 'child'"):
        config.recipe_layers("chil")


def test_a_recipe_cannot_read_the_environment(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("tags: ['${oc.env:HOME}']\n")
    with pytest.raises(ConfigError, match=r"oc\.env:HOME"):
        config.recipe_layers(str(path))
    with pytest.raises(ConfigError, match="refused"):
        config.dotted(["tags=${oc.env:HOME}"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "speed: [1\n", "3\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        config.recipe_layers(str(path))


@pytest.mark.parametrize("word", ["speed", "=3", "--speed=3"])
def test_a_word_that_is_no_override(word):
    with pytest.raises(ConfigError, match="field=value"):
        config.dotted([word])


@pytest.mark.parametrize("order", [1, -1])
def test_a_choice_and_its_fields_go_together_in_any_order(order):
    words = ["model=text_swa_1m", "model.backbone.depth=4", "train.steps=3"][::order]
    assert config.dotted(words) == {"model": {"name": "text_swa_1m", "backbone": {"depth": 4}}, "train": {"steps": 3}}
