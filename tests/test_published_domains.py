"""Weights of every domain: a few steps of its smoke recipe, published, sampled offline, measured again."""

import shutil
from pathlib import Path

import pytest

import zoo
from zoo import config, frozen, weights
from zoo.config import list_recipes
from zoo.evaluate import repeat
from zoo.model import Model
from zoo.publish import About, publish
from zoo.train import Recipe, load_published, train

ABOUT = {"summary": "A toy.", "licence": "Apache-2.0", "data": "see the recipe", "limits": "It is a toy."}
FEW = {"train": {"steps": 3, "eval_every": 0, "sample_every": 0, "save_every": 3, "stop_when": "", "device": "cpu"}}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(weights.weights, "_entries", {})
    monkeypatch.setattr(weights.weights, "_load", None)
    return tmp_path


def published(home: Path, recipe: str, *words: str, **about) -> str:
    run = home / recipe.replace("/", "-")
    train(config.build(Recipe, *config.recipe_layers(recipe, words), FEW), run)
    place = {"out": home / "weights", "table": home / "weights.yaml"}
    folder = publish(run, "toy", config.build(About, ABOUT, about), **place, device="cpu")
    shutil.rmtree(run)  # the weights stand alone
    return folder.name


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if name.endswith("/smoke")])
def test_every_domain(home, recipe, data_root):
    name = published(home, recipe)
    _, task, model = load_published(name)
    assert isinstance(model, Model)
    assert zoo.create_model(name, pretrained=True).parameter_count() == model.parameter_count()
    assert zoo.pipeline(name, device="cpu").task.domain == task.domain
    numbers = repeat(name, device="cpu")
    assert numbers
    assert all(number.holds for number in numbers), numbers
    card = weights.open_card(name)
    card.check()
    assert card.facts["samples"] or not task.show(model).images


def test_a_tokenizer_and_a_classifier_that_others_name(home, data_root):
    tokenizer = published(home, "image/smoke_tokenizer")
    classifier = published(home, "image/smoke_classifier")
    loaded = frozen.load(tokenizer, kind=type(zoo.create_model(tokenizer).config), what="tokenizer")
    words = [f"task.tokenizer={tokenizer}", f"task.samples.classifier={classifier}", "task.samples.count=8"]
    name = published(home, "image/smoke_codes", *words, tolerance={"fid_own_features": 0.5})
    assert weights.open_card(name).facts["frozen"] == {"tokenizer": loaded.sha256}
    assert all(number.holds for number in repeat(name, device="cpu"))
    (drawn,) = zoo.pipeline(name, device="cpu").sample([3], seed=0)
    assert drawn.shape == (28, 28, 1)


def test_codes_carry_their_tokenizer_and_need_no_run(home, data_root, monkeypatch):
    """As the recipes stand, which name run folders; the card is measured without the classifier."""
    monkeypatch.chdir(home)
    for part in ("tokenizer", "classifier"):
        layers = config.recipe_layers(f"image/smoke_{part}")
        train(config.build(Recipe, *layers, FEW), Path("runs") / f"image-smoke_{part}")
    overrides = ["task.samples.count=0", "task.samples.classifier=''"]
    name = published(home, "image/smoke_codes", overrides=overrides)
    shutil.rmtree("runs")
    assert "assets/tokenizer/model.safetensors" in weights.open_card(name).facts["files"]
    assert all(number.holds for number in repeat(name, device="cpu"))
    (drawn,) = zoo.pipeline(name, device="cpu").sample([3], seed=0)
    assert drawn.shape == (28, 28, 1)
    path = weights.find(name).here() / "assets" / "tokenizer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(weights.WeightsError, match="assets/tokenizer/model.safetensors is damaged"):
        zoo.pipeline(name, device="cpu")
