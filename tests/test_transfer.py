"""backbone_from: a task begins with the backbone that another domain's run has trained."""

import json
import shutil

import pytest
import torch

import zoo
from zoo import config, frozen
from zoo.train import Recipe, load_run, train
from zoo.weights import WeightsError

SMALL = ["train.steps=4", "train.batch_size=4", "train.eval_every=0", "train.sample_every=0", "train.save_every=4"]
BACKBONE = {"width": 32, "depth": 2, "heads": 2, "pattern": "", "mlp": "swiglu", "positions": "rotary"}
BACKBONE["mixer"] = {"name": "gatedfwa", "window": 8, "token_shift": False, "qk_norm": "full"}


def recipe(name: str, *words: str, **fields) -> Recipe:
    layers = [*config.recipe_layers(name, [*SMALL, *words]), {"train": {"stop_when": ""}}]
    return config.build(Recipe, *layers, {"model": {"backbone": BACKBONE}}, fields)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "text"
    train(recipe("text/smoke", "task.context=32"), run)
    return run


def recall(*words: str, **fields) -> Recipe:
    return recipe("recall/smoke", "train.optimizer.lr=1.0e-9", *words, **fields)


def test_the_backbone_moves_and_the_head_does_not(text, tmp_path):
    train(recall(), tmp_path / "fresh")
    train(recall(backbone_from=str(text)), tmp_path / "moved")
    theirs, fresh, moved = (load_run(run)[2].state_dict() for run in (text, tmp_path / "fresh", tmp_path / "moved"))
    for name, tensor in moved.items():
        other = theirs if name.startswith("backbone.") else fresh
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6, msg=name)
    name = "backbone.blocks.0.mixer.qkv.weight"
    assert (moved[name] - fresh[name]).abs().max() > 1e-3


def test_the_run_says_where_it_began(text, tmp_path):
    run = tmp_path / "moved"
    train(recall(backbone_from=str(text)), run)
    assert f"beginning with the backbone of {text} (text_gatedfwa_1m)" in (run / "log.txt").read_text()
    manifest = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["backbone_from"]["name"] == "text_gatedfwa_1m"
    assert manifest["backbone_from"]["origin"] == str(text)
    assert frozen.start_backbone(load_run(run)[2], str(text))["sha256"] == manifest["backbone_from"]["sha256"]


def test_resuming_goes_on_from_the_checkpoint(text, tmp_path):
    run, gone = tmp_path / "moved", tmp_path / "gone"
    text_copy = tmp_path / "text"
    shutil.copytree(text, text_copy)
    train(recall(backbone_from=str(text_copy)), run)
    before = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())["backbone_from"]
    text_copy.rename(gone)  # no longer needed
    train(recall("train.steps=6", backbone_from=str(text_copy)), run, resume=True)
    after = json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert after["backbone_from"] == before
    with pytest.raises(ValueError, match="backbone_from: "):
        train(recall("train.steps=8"), run, resume=True)


def test_fingerprints_of_recipes_without_it_are_as_they_were(text):
    plain = recall()
    assert "backbone_from" not in config.to_dict(plain)
    assert config.fingerprint(recall(backbone_from=str(text))) != config.fingerprint(plain)
    assert config.build(Recipe, config.to_dict(plain)) == plain


def test_create_model_takes_it_too(text):
    model = zoo.create_model("recall_gatedfwa_d32", backbone_from=str(text), backbone=BACKBONE, head={"vocabulary": 9})
    theirs = load_run(text)[2].state_dict()
    assert torch.equal(model.state_dict()["backbone.norm.weight"], theirs["backbone.norm.weight"])


def test_what_does_not_fit_is_named(text, tmp_path):
    node = {"backbone": {**BACKBONE, "width": 64}, "head": {"vocabulary": 9}}
    with pytest.raises(
        WeightsError, match=r"the backbone of .*text \(text_gatedfwa_1m\) does not fit: .*backbone.width: 32 -> 64"
    ):
        zoo.create_model("recall_gatedfwa_d32", backbone_from=str(text), **node)
    with pytest.raises(FileNotFoundError, match="the backbone 'nothing' is neither a run folder"):
        zoo.create_model("recall_gatedfwa_d32", backbone_from="nothing", head={"vocabulary": 9})
    with pytest.raises(WeightsError, match="Linear has no backbone to move"):
        frozen.start_backbone(torch.nn.Linear(2, 2), str(text))
    with pytest.raises(ValueError, match="has weights of its own"):
        zoo.create_model("recall_gatedfwa_d32", pretrained=True, backbone_from=str(text))
