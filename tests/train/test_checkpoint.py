"""Checkpoints are whole or not there, whatever happens while they are written."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toytask import Faults, FaultyModel, recipe, train_until_it_writes, train_until_killed

from zoo import config, weights
from zoo.train import checkpoint, load_run, train
from zoo.train.checkpoint import CheckpointError, Content, DiskFull, NonFinite


def content(value: float) -> Content:
    tensors = {
        "model": {"a.weight": torch.full((5, 3), value), "seen": torch.tensor(3)},
        "ema": {"a.weight": torch.full((5, 3), value / 2)},
        "optimizer": {"exp_avg/a.weight": torch.ones(5, 3)},
    }
    return Content(tensors, {"data": {"position": 1}}, {"recipe": {}, "world": 1})


def value_of(path):
    return checkpoint.read_tensors(path, "model")["a.weight"][0, 0].item()


# ---------------------------------------------------------------------------------------------------------------------
# Writing that fails


class Failing:
    """Lets `before` calls of the file operations through, then raises; writes may leave half of their bytes."""

    def __init__(self, patch, before, error):
        self.calls, self.before, self.error = 0, before, error
        for module, name in (
            (weights, "write_file"),
            (weights, "sync_folder"),
            (checkpoint.os, "rename"),
            (checkpoint.os, "replace"),
            (checkpoint.os, "fsync"),
        ):
            patch.setattr(module, name, self.wrap(getattr(module, name), name))

    def wrap(self, real, name):
        def call(*arguments):
            self.calls += 1
            if self.calls > self.before:
                if name == "write_file":
                    arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
                raise self.error
            return real(*arguments)

        return call


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "input/output error"), MemoryError(), KeyboardInterrupt()], ids=repr
)
def test_failure_at_every_call_leaves_the_newest_complete_one(tmp_path, error):
    root = tmp_path / "checkpoints"
    checkpoint.save(root, 1, content(1.0), keep=1)
    for before in range(100):
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, before, error)
            try:
                checkpoint.save(root, 2, content(2.0), keep=1)
            except type(error):
                pass
            else:
                break
        found, notes = checkpoint.latest(root)
        assert notes == []
        assert value_of(found) == (2.0 if found.name == "step-00000002" else 1.0)
        checkpoint.remove(root / "step-00000002")
        if not checkpoint.steps_in(root):
            checkpoint.save(root, 1, content(1.0))
        checkpoint.sweep(root)
        assert not list(root.glob(".tmp*"))
    assert failing.calls == before > 10
    assert [path.name for path in checkpoint.steps_in(root)] == ["step-00000002"]


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, content(1.0))
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, 4, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DiskFull, match="ran full while saving.*newest checkpoint is .*step-00000001"):
            checkpoint.save(tmp_path, 2, content(2.0))
    assert not list(tmp_path.glob(".tmp*"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="0.0 MB free, a checkpoint takes 1.0 MB"):
        checkpoint.save(tmp_path, 2, content(2.0))
    assert value_of(checkpoint.latest(tmp_path)[0]) == 1.0


def test_full_disk_ends_a_run_that_can_go_on(tmp_path, monkeypatch):
    write = weights.write_file

    def full(path, data):
        if path.parent.name.startswith(".tmp-8-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "write_file", full)
        with pytest.raises(DiskFull, match="step-00000004"):
            train(recipe(), tmp_path)
    assert train(recipe(), tmp_path, resume=True).step == 12


def test_retention(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, content(float(step)), keep=2)
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000005", "step-00000004"]
    # A run resumed below a damaged later checkpoint does not delete what it has just written
    (tmp_path / "step-00000005" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000003")
    checkpoint.save(tmp_path, 4, content(4.0), keep=1)
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000005", "step-00000004"]
    checkpoint.save(tmp_path, 5, content(5.0), keep=1)  # and replaces it when it gets there
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000005"]
    assert value_of(tmp_path / "step-00000005") == 5.0


def test_nothing_is_deleted_unless_the_new_one_verifies(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, content(1.0), keep=1)
    rename = os.rename

    def damage(old, new):
        (old / "model.safetensors").write_bytes(b"gone")
        rename(old, new)

    monkeypatch.setattr(os, "rename", damage)
    with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
        checkpoint.save(tmp_path, 2, content(2.0), keep=1)
    found, notes = checkpoint.latest(tmp_path)
    assert found.name == "step-00000001"
    assert "step-00000002" in notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reading what is damaged


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def foreign(path):
    save_file({"other": torch.zeros(2)}, path)


class Explosive:
    def __reduce__(self):
        return (os.system, ("touch /tmp/zoo-test-exploded",))


def pickled(path):
    path.write_bytes(pickle.dumps(Explosive()))


@pytest.mark.parametrize("damage", [truncate, flip, foreign, pickled, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint_is_named_and_skipped(tmp_path, damage, name, capfd):
    train(recipe(steps=8), tmp_path)
    good, bad = tmp_path / "checkpoints" / "step-00000004", tmp_path / "checkpoints" / "step-00000008"
    damage(bad / name)
    found, notes = checkpoint.latest(tmp_path / "checkpoints")
    assert found == good
    assert len(notes) == 1
    assert str(bad) in notes[0]
    assert not os.path.exists("/tmp/zoo-test-exploded")
    assert train(recipe(steps=8), tmp_path, resume=True).step == 8
    assert "skipped a damaged checkpoint" in capfd.readouterr().err
    assert checkpoint.latest(tmp_path / "checkpoints") == (bad, [])


def test_no_usable_checkpoint_is_no_silent_restart(tmp_path):
    train(recipe(steps=4), tmp_path)
    truncate(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors")
    with pytest.raises(ValueError, match="no checkpoint in .* can be used(.|\n)*truncated"):
        train(recipe(steps=4), tmp_path, resume=True)


def test_manifest_says_what_it_is(tmp_path):
    path = train(recipe(steps=4), tmp_path).checkpoint
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert manifest["world"] == 1
    assert len(manifest["fingerprint"]) == 12
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {f"{n}.safetensors" for n in ("model", "ema", "optimizer", "rng")} | {"state.json"}


# ---------------------------------------------------------------------------------------------------------------------
# Poison


@pytest.mark.parametrize("stem", ["model", "ema"])
def test_non_finite_weights_are_saved_aside(tmp_path, stem):
    checkpoint.save(tmp_path, 1, content(1.0), keep=1)
    poisoned = content(2.0)
    poisoned.tensors[stem]["a.weight"][2, 1] = float("inf")
    with pytest.raises(NonFinite, match=rf"{stem}: a.weight is not finite after step 2.*bad-00000002"):
        checkpoint.save(tmp_path, 2, poisoned, keep=1)
    assert checkpoint.latest(tmp_path)[0].name == "step-00000001"
    assert checkpoint.verify(tmp_path / "bad-00000002")["step"] == 2


def test_run_with_non_finite_weights_stops_and_names_the_parameter(tmp_path):
    forward = FaultyModel.forward

    def poison(self, batch):
        output = forward(self, batch)
        if 60 in (batch.condition or []):
            with torch.no_grad():
                self.mix.bias[1] = float("nan")
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyModel, "forward", poison)
        with pytest.raises(NonFinite, match="mix.bias is not finite after step 8"):
            train(recipe(max_skipped=10), tmp_path)
    assert load_run(tmp_path)[0].train.steps == 12
    assert checkpoint.latest(tmp_path / "checkpoints")[0].name == "step-00000004"
    FaultyModel.faults = Faults()
    assert train(recipe(max_skipped=10), tmp_path, resume=True).step == 12


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@pytest.fixture
def started(monkeypatch):
    """Processes that begin with torch and the toys loaded, from a server that forks."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # the server's
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "toytask"])
    return context


WRITTEN = (
    "recipe.yaml",
    "assets",
    "toy.txt",
    "provenance.json",
    "metrics.jsonl",
    "log.txt",
    "tensorboard",
    "checkpoints",
)


@pytest.mark.parametrize("begun", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("name", WRITTEN)
def test_killed_at_each_write_of_the_start(tmp_path, started, name, begun):
    """What was whole stays whole, and the next start goes on, or begins."""
    if begun:
        train(recipe(steps=4), tmp_path)
    process = started.Process(target=train_until_it_writes, args=(tmp_path, name))
    process.start()
    process.join()
    # Assets that weights were trained with are not written again
    assert process.exitcode == (0 if begun and name in ("assets", "toy.txt") else -signal.SIGKILL)
    found, notes = checkpoint.latest(tmp_path / "checkpoints")
    assert notes == []
    assert (found is not None) == begun
    if begun:
        load_run(tmp_path)
        assert (tmp_path / "assets" / "toy.txt").read_text() == "toy"
        config.read_yaml(tmp_path / "recipe.yaml")
    assert train(recipe(steps=12), tmp_path, resume=True).step == 12
    assert (tmp_path / "assets" / "toy.txt").read_text() == "toy"
    assert json.loads((tmp_path / "provenance.json").read_text())["sessions"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_in_the_first_seconds(tmp_path, started, kills):
    rng = random.Random(5)
    for _ in range(kills):
        process = started.Process(target=train_until_killed, args=(tmp_path, True, 0.01))
        process.start()
        process.join(rng.random() * 2)
        process.kill()
        process.join()
        found, notes = checkpoint.latest(tmp_path / "checkpoints")
        assert notes == []
        if found is not None:
            load_run(tmp_path)
    done = 0 if found is None else checkpoint.read_manifest(found)["step"]
    settings = {"save_every": 1, "eval_every": 5}
    assert train(recipe(steps=done + 2, **settings), tmp_path, resume=True).step == done + 2


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills, started):
    """SIGKILL while it saves every step: the newest complete checkpoint loads every time, and steps only go up."""
    rng = random.Random(4)
    step = 0
    for number in range(kills):
        process = started.Process(target=train_until_killed, args=(tmp_path, number > 0, 0.0))
        process.start()
        deadline = time.monotonic() + 120
        while not any(int(path.name[5:]) > step for path in checkpoint.steps_in(tmp_path / "checkpoints")):
            assert process.is_alive() or process.exitcode == 0
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.join()
        found, notes = checkpoint.latest(tmp_path / "checkpoints")
        assert notes == []
        load_run(tmp_path)
        new = checkpoint.read_manifest(found)["step"]
        assert new > step
        step = new


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("ZOO_COMMIT", "0123abc")
    assert checkpoint.git_commit() == "0123abc"
    monkeypatch.delenv("ZOO_COMMIT")
    assert checkpoint.git_commit() != "0123abc"
