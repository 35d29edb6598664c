"""train.graph: a run whose steps are recorded and replayed is the run without, bit for bit."""

import json
import os
import signal

import pytest
import torch
import toytask
from test_resume import assert_same_run
from toytask import recipe

from zoo import recording
from zoo.train import checkpoint, graph, train
from zoo.train.graph import GraphError, Recorder
from zoo.train.loop import Interrupted
from zoo.train.optim import OptimizerConfig


@pytest.fixture
def places_as_tensors(monkeypatch):
    """The toys' batches say which examples they hold in a list: another shape for each."""
    collate = toytask.UnevenWindows.collate

    def collated(self, items):
        batch = collate(self, items)
        batch.condition = None
        return batch

    monkeypatch.setattr(toytask.UnevenWindows, "collate", collated)


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


SETTINGS = [
    {"eval_every": 4, "sample_every": 6},
    {"ema": 0.0, "micro_batch_size": None},
    {"precision": "fp16"},
    {"precision": "bf16"},
]


@pytest.mark.usefixtures("places_as_tensors")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_recorded_run_is_the_plain_one(tmp_path, recordings, settings):
    """Schedule, average, dropout, clipping and numbers: with a rate that changes at every step."""
    train(recipe(**settings), tmp_path / "plain")
    train(recipe(**settings, graph=True), tmp_path / "graph")
    assert recordings == [10]  # of 12 steps
    assert_same_run(tmp_path / "plain", tmp_path / "graph")


@pytest.mark.usefixtures("places_as_tensors")
def test_a_recorded_run_resumes_as_if_nothing_was(tmp_path, recordings):
    train(recipe(graph=True), tmp_path / "whole")
    step, seen = Recorder.__call__, []

    def stopped(self, *inputs):
        seen.append(1)
        if len(seen) == 8:
            raise RuntimeError("injected")
        return step(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__call__", stopped)
        with pytest.raises(RuntimeError, match="injected"):
            train(recipe(graph=True), tmp_path / "cut")
        train(recipe(graph=True), tmp_path / "cut", resume=True)
    assert recordings == [10, 5, 6]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.usefixtures("places_as_tensors")
def test_a_signal_between_replays_saves(tmp_path, recordings):
    step = Recorder.__call__

    def signalled(self, *inputs):
        if recordings == [4]:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__call__", signalled)
        with pytest.raises(Interrupted):
            train(recipe(graph=True), tmp_path / "cut")
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints")[0].name == "step-00000007"
    train(recipe(graph=True), tmp_path / "cut", resume=True)
    train(recipe(), tmp_path / "plain")
    assert_same_run(tmp_path / "plain", tmp_path / "cut")


def weigh(recorder, *sizes):
    return [recorder(torch.full((size,), float(place)), 0.5 * place).item() for place, size in enumerate(sizes)]


def test_every_shape_its_own_graph_up_to_a_number(recordings, monkeypatch):
    monkeypatch.setattr(graph, "SHAPES", 2)
    recorder = Recorder(lambda x, share: x.sum() * share, torch.device("cpu"))
    sizes = [3, 3, 3, 3, 2, 2, 2, 4, 4, 4, 4, 3]
    assert weigh(recorder, *sizes) == [size * place * 0.5 * place for place, size in enumerate(sizes)]
    assert recordings == [3, 1]
    recorder.clear()
    assert weigh(recorder, 4, 4, 4) == [0.0, 2.0, 8.0]
    assert recordings == [3, 1, 1]


def test_outputs_belong_to_the_caller(recordings):
    recorder = Recorder(lambda x: {"twice": 2 * x}, torch.device("cpu"))
    kept = [recorder(torch.tensor([float(i)]))["twice"] for i in range(6)]
    assert torch.cat(kept).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_a_step_that_waits_is_named(recordings):
    recorder = Recorder(lambda x: x * x.sum().item(), torch.device("cpu"))
    for _ in range(graph.WARM):
        recorder(torch.ones(2))
    with pytest.raises(GraphError, match="train.graph=false"):
        recorder(torch.ones(2))


def test_what_it_cannot_do_is_named(tmp_path):
    with pytest.raises(ValueError, match="lion"):
        recipe(graph=True, optimizer=OptimizerConfig(name="lion"))
    train(recipe(graph=True, steps=3), tmp_path)
    assert "train.graph records steps on a GPU" in (tmp_path / "log.txt").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True], ids=["the device's generator", "one of its own"])
def test_on_a_gpu_the_first_replay_draws_what_a_step_would(own, monkeypatch):
    """However late the work of the recording's stream is done, as on a device that others use, too: there torch sets
    the graph's random offset to 0, here after the replay has set it and before its step has read it."""
    stream = torch.cuda.Stream()
    a_millisecond = 10**6  # about, in cycles
    generator = torch.Generator("cuda") if own else None
    seeded = generator or torch

    def draw():
        torch.cuda._sleep(400 * a_millisecond)
        return torch.rand(1000, device="cuda", generator=generator)

    seeded.manual_seed(0)
    steps = [draw(), draw()]
    seeded.manual_seed(0)
    assert torch.equal(draw(), steps[0])
    for name in ("synchronize", "empty_cache"):  # which torch.cuda.graph begins with
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200 * a_millisecond)
    drawn, replay = recording.record(draw, stream, generator=generator)
    replay()
    assert torch.equal(drawn, steps[1])


@pytest.mark.gpu
@pytest.mark.usefixtures("places_as_tensors")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_a_recorded_run_is_the_plain_one(tmp_path, precision, compiled):
    """Dropout included: the graph draws the same noise. Its rate is rounded to float32."""
    settings = {"device": "cuda", "precision": precision, "compile": compiled, "steps": 30, "save_every": 10}
    for name in ("plain", "graph"):
        torch._dynamo.reset()
        train(recipe(**settings, eval_every=10, graph=name == "graph"), tmp_path / name)
    stems = ("model", "ema", "optimizer", "rng")
    paths = [checkpoint.latest(tmp_path / name / "checkpoints")[0] for name in ("plain", "graph")]
    for stem in stems:
        plain, ours = (checkpoint.read_tensors(path, stem) for path in paths)
        assert plain.keys() == ours.keys()
        for name in plain:
            exact = {"rtol": 0, "atol": 0} if stem == "rng" else {"rtol": 2e-2, "atol": 1e-3}
            torch.testing.assert_close(ours[name], plain[name], **exact, msg=lambda text, n=name: f"{n}: {text}")
    for one, other in zip(rows_of(tmp_path / "plain"), rows_of(tmp_path / "graph"), strict=True):
        for name in ("train/loss", "train/lr", "valid/loss"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-2), name


@pytest.mark.gpu
@pytest.mark.usefixtures("places_as_tensors")
def test_on_a_gpu_a_recorded_run_resumes(tmp_path):
    """The generator's state is put back between replays: the cut run draws the noise of the whole one."""
    settings = {"device": "cuda", "steps": 24, "save_every": 12, "graph": True}
    train(recipe(**settings), tmp_path / "whole")
    step, seen = Recorder.__call__, []

    def stopped(self, *inputs):
        seen.append(1)
        if len(seen) == 16:
            raise RuntimeError("injected")
        return step(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__call__", stopped)
        with pytest.raises(RuntimeError, match="injected"):
            train(recipe(**settings), tmp_path / "cut")
        train(recipe(**settings), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
