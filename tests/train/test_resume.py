"""N steps = k + resume + (N - k), bitwise, whatever stopped the run."""

import json
import random
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from toytask import Faults, FaultyModel, FaultyModelConfig, ToyConfig, recipe

from zoo.train import checkpoint, chosen_checkpoint, load_run, loop, train
from zoo.train.loop import Interrupted
from zoo.train.recipe import ResumeError

LOGS = {"eval_every": 4, "sample_every": 6}


def everything(run):
    """The newest checkpoint's tensors and state, and the metrics rows without their timing."""
    path, _ = checkpoint.latest(run / "checkpoints")
    tensors = {stem: checkpoint.read_tensors(path, stem) for stem in ("model", "ema", "optimizer", "rng")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return path.name, tensors, checkpoint.read_state(path), rows


def assert_same_run(one, other):
    (name, tensors, state, rows), (name2, tensors2, state2, rows2) = everything(one), everything(other)
    assert name == name2
    for stem, named in tensors.items():
        assert (named is None) == (tensors2[stem] is None)
        assert sorted(named or {}) == sorted(tensors2[stem] or {})
        for key, tensor in (named or {}).items():
            assert torch.equal(tensor, tensors2[stem][key]), f"{stem}: {key}"
    assert state == state2
    assert rows == rows2


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs without interruption, one for each recipe asked for."""
    made = {}

    def get(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("straight")
            FaultyModel.faults = None
            train(recipe(**settings), made[key])
        return made[key]

    return get


@pytest.mark.parametrize("settings", [LOGS, {"ema": 0.0, "micro_batch_size": None}, {"precision": "fp16"}], ids=str)
@pytest.mark.parametrize("stops", [[19], [43], [12, 67]], ids=str)
def test_resumed_equals_uninterrupted(tmp_path, straight, settings, stops):
    """Stopped by an error between two micro-batches (8 examples a step), once or twice, then resumed."""
    expected = straight(**settings)
    for place in stops:
        FaultyModel.faults = Faults(raise_at=place)
        with pytest.raises(RuntimeError, match="injected"):
            train(recipe(**settings), tmp_path, resume=True)
    train(recipe(**settings), tmp_path, resume=True)
    assert_same_run(expected, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tmp_path, straight, number, capfd):
    """A signal in the middle of accumulation: the step is finished and saved, and the run goes on as if nothing was."""
    for place in (26, 53):
        name = {signal.SIGINT: "sigint_at", signal.SIGTERM: "sigterm_at"}[number]
        FaultyModel.faults = Faults(**{name: place})
        before = signal.getsignal(number)
        with pytest.raises(Interrupted) as stopped:
            train(recipe(**LOGS), tmp_path, resume=True, command="zoo train toy --resume")
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) is before
        assert checkpoint.latest(tmp_path / "checkpoints")[0].name == f"step-{place // 8 + 1:08d}"
        assert "zoo train toy --resume" in capfd.readouterr().err
    train(recipe(**LOGS), tmp_path, resume=True)
    assert_same_run(straight(**LOGS), tmp_path)


def test_second_ctrl_c_leaves_at_once(tmp_path):
    FaultyModel.faults = Faults(sigint_at=9)
    forward = FaultyModel.forward

    def twice(self, batch):
        output = forward(self, batch)
        if 12 in (batch.condition or []):
            signal.raise_signal(signal.SIGINT)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyModel, "forward", twice)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), tmp_path)


def test_interrupted_evaluation_is_done_on_resuming(tmp_path, straight, capfd):
    """A signal that comes while evaluating: saved without the evaluation's row, which the resumed run writes."""
    from toytask import Loss

    update = Loss.update

    def struck(self, model, batch):
        signal.raise_signal(signal.SIGTERM)
        update(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loss, "update", struck)
        with pytest.raises(Interrupted):
            train(recipe(**LOGS), tmp_path)
    assert "SIGTERM: finishing this batch of the validation, which resuming begins anew" in capfd.readouterr().err
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "checkpoints")[0])["evaluated"] == 0
    train(recipe(**LOGS), tmp_path, resume=True)
    assert_same_run(straight(**LOGS), tmp_path)


def test_tensorboard_has_each_step_once(tmp_path):
    FaultyModel.faults = Faults(raise_at=60)
    with pytest.raises(RuntimeError, match="injected"):
        train(recipe(log_every=1, **LOGS), tmp_path)
    train(recipe(log_every=1, **LOGS), tmp_path, resume=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    steps = {tag: [event.step for event in board.Tensors(tag)] for tag in board.Tags()["tensors"]}
    assert steps["train/loss"] == list(range(1, 13))
    assert steps["valid/loss"] == [4, 8, 12]
    assert steps["sample/text_summary"] == steps["picture"] == steps["sound"] == [6, 12]
    assert {path.name for path in (tmp_path / "samples").iterdir()} >= {
        "step-00000006-sample.txt",
        "step-00000012-sound.wav",
    }


def test_next_batches_are_those_of_the_uninterrupted_run(tmp_path, monkeypatch):
    seen = []
    forward = FaultyModel.forward

    def watch(self, batch):
        if self.training:
            seen.append(batch.condition)
        return forward(self, batch)

    monkeypatch.setattr(FaultyModel, "forward", watch)
    FaultyModel.faults = Faults(sigterm_at=33)
    with pytest.raises(Interrupted):
        train(recipe(), tmp_path)
    train(recipe(), tmp_path, resume=True)
    assert [place for batch in seen for place in batch] == list(range(12 * 8))


def test_changed_recipe_is_shown_and_refused(tmp_path):
    train(recipe(steps=4), tmp_path)
    changed = recipe(steps=6)
    changed.train.optimizer.lr = 5e-4
    with pytest.raises(ResumeError, match=r"train\.optimizer\.lr: 0\.001 -> 0\.0005") as refused:
        train(changed, tmp_path, resume=True)
    assert "train.steps" not in str(refused.value)
    with pytest.raises(ResumeError, match=r"data\.tokens: 700 -> 800"):
        train(recipe(task=ToyConfig(tokens=800), steps=6), tmp_path, resume=True)
    assert train(changed, tmp_path, resume=True, allow_changes=True).step == 6
    log = (tmp_path / "log.txt").read_text()
    assert "train.steps: 4 -> 6" in log
    assert "lr: 0.001 -> 0.0005" in log


def test_run_folder_in_use_and_empty(tmp_path):
    train(recipe(steps=4), tmp_path)
    with pytest.raises(ResumeError, match="holds a run already"):
        train(recipe(steps=4), tmp_path)
    assert train(recipe(steps=4), tmp_path, resume=True).step == 4  # finished already: nothing to do
    assert train(recipe(steps=4), tmp_path / "new", resume=True).step == 4
    assert "nothing to resume" in (tmp_path / "new" / "log.txt").read_text()


def test_load_run(tmp_path):
    train(recipe(steps=5), tmp_path)
    made, task, model = load_run(tmp_path)
    assert made == recipe(steps=5)
    assert task.assets == tmp_path / "assets"
    path, _ = checkpoint.latest(tmp_path / "checkpoints")
    raw = load_run(tmp_path, ema=False)[2]
    assert not model.training
    assert torch.equal(model.mix.weight, checkpoint.read_tensors(path, "ema")["mix.weight"])
    assert torch.equal(raw.mix.weight, checkpoint.read_tensors(path, "model")["mix.weight"])
    assert not torch.equal(raw.mix.weight, model.mix.weight)
    with pytest.raises(FileNotFoundError, match="no run with a usable checkpoint"):
        load_run(tmp_path / "nowhere")


def test_provenance_and_recipe_are_beside_the_run(tmp_path):
    train(recipe(steps=2), tmp_path)
    train(recipe(steps=3), tmp_path, resume=True)
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert len(facts["sessions"]) == 2
    assert facts["data"]["tokens"] == 700
    assert (tmp_path / "recipe.yaml").read_text().startswith("task:")
    assert (tmp_path / "assets" / "toy.txt").is_file()
    assert FaultyModelConfig().width == 8


def test_an_evaluation_ends_the_run_and_it_stays_ended(tmp_path):
    rule = "loss < 100"  # the first evaluation fulfils it
    result = train(recipe(steps=12, eval_every=5, stop_when=rule), tmp_path)
    assert result.step == 5
    assert checkpoint.read_state(result.checkpoint)["finished"] == rule
    assert train(recipe(steps=12, eval_every=5, stop_when=rule), tmp_path, resume=True).step == 5
    on = train(recipe(steps=12, eval_every=5), tmp_path, resume=True, allow_changes=True)
    assert on.step == 12


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("accuracy >= 0.9", "it takes a metric, < or >, and a number"),
        ("loss < much", "it takes"),
        ("loss < 1", "eval_every is 0"),
    ],
)
def test_a_rule_that_cannot_be_read_is_named(rule, words):
    with pytest.raises(ValueError, match=words):
        recipe(stop_when=rule)


def test_a_rule_about_no_metric_is_named(tmp_path):
    with pytest.raises(ValueError, match="names no metric of this evaluation; did you mean 'loss'"):
        train(recipe(steps=4, eval_every=2, stop_when="los < 1"), tmp_path)


# -- the best evaluation ----------------------------------------------------------------------------------------------

HIGHEST = {"best": "loss >", "eval_every": 2, "save_every": 0, "keep": 1}  # the loss falls: the first one is the best


def steps_of(run):
    return [checkpoint.read_manifest(path)["step"] for path in checkpoint.steps_in(run / "checkpoints")]


def test_the_weights_of_the_best_evaluation_count(tmp_path, caplog):
    result = train(recipe(steps=9, **HIGHEST), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}
    assert list(losses) == [2, 4, 6, 8, 9]
    best = max(losses, key=losses.__getitem__)
    assert best < 9
    assert steps_of(tmp_path) == [9, best]  # keep = 1, and the best
    assert result.checkpoint.name == "step-00000009"
    assert chosen_checkpoint(tmp_path).name == f"step-{best:08d}"
    assert checkpoint.read_best(tmp_path / "checkpoints").value == losses[best]
    theirs = load_run(tmp_path)[2].state_dict()
    ours = checkpoint.read_tensors(checkpoint.steps_in(tmp_path / "checkpoints")[1], "ema")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert f"best: loss {losses[best]:.4g} at step {best}" in (tmp_path / "log.txt").read_text()

    with (chosen_checkpoint(tmp_path) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert chosen_checkpoint(tmp_path) == result.checkpoint
    assert "best checkpoint is damaged" in caplog.text


def test_a_run_that_goes_on_remembers_its_best(tmp_path):
    train(recipe(steps=9, **HIGHEST), tmp_path / "whole")
    train(recipe(steps=4, **HIGHEST), tmp_path / "parts")
    train(recipe(steps=9, **HIGHEST), tmp_path / "parts", resume=True)
    whole, parts = (checkpoint.read_best(tmp_path / name / "checkpoints") for name in ("whole", "parts"))
    assert whole.step == parts.step
    train(recipe(steps=11, **{**HIGHEST, "best": "loss <"}), tmp_path / "parts", resume=True, allow_changes=True)
    assert checkpoint.read_best(tmp_path / "parts/checkpoints").step > 9  # by another rule it begins anew


def test_patience_ends_a_run_and_it_stays_ended(tmp_path):
    waiting = {**HIGHEST, "patience": 2}
    train(recipe(steps=20, **waiting), tmp_path)
    best = checkpoint.read_best(tmp_path / "checkpoints").step
    assert steps_of(tmp_path) == [best + 4, best]
    assert "2 evaluations without a better one (loss >), so the run ends here" in (tmp_path / "log.txt").read_text()
    assert train(recipe(steps=20, **waiting), tmp_path, resume=True).step == best + 4
    on = train(recipe(steps=20, **{**waiting, "patience": 4}), tmp_path, resume=True, allow_changes=True)
    assert on.step == best + 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"best": "loss", "eval_every": 2}, "it takes a metric and <"),
        ({"best": "loss <"}, "eval_every is 0"),
        ({"patience": 3}, "best has to say which is better"),
    ],
)
def test_a_best_that_cannot_be_told_is_refused(words, told):
    with pytest.raises(ValueError, match=told):
        recipe(**words)


def test_a_best_by_no_metric_is_named(tmp_path):
    with pytest.raises(ValueError, match="best = 'los <' names no metric of this evaluation; did you mean 'loss'"):
        train(recipe(steps=4, eval_every=2, best="los <"), tmp_path)


def test_what_building_draws_for_the_first_time_reaches_no_checkpoint(tmp_path, monkeypatch):
    """A package may draw from Python's and numpy's generators when a process imports it."""
    train(recipe(), tmp_path / "known")
    make = loop.make_model

    def importing(*arguments):
        random.random(), np.random.rand()
        return make(*arguments)

    monkeypatch.setattr(loop, "make_model", importing)
    train(recipe(), tmp_path / "new")
    assert_same_run(tmp_path / "known", tmp_path / "new")
