"""A step of each kind as a GPU takes it: nothing waits for the device, batches have few shapes, so steps can be
recorded; trained in bfloat16, streamed from a graph."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tasks.audio.data import Recordings
from tasks.audio.music import collate_keys, collate_notes, few_lengths, to_frames, to_tokens
from tasks.audio.task import AudioPrompt
from tests.recordable import Waits, frozen_after_three_batches, look_at_nothing
from zoo import generation, recording, registry
from zoo.config import build
from zoo.generation import Sampling, generate
from zoo.model import Context
from zoo.pipelines import Pipeline, pipeline
from zoo.train import Recipe, graph, train
from zoo.train.graph import signature
from zoo.train.recipe import make_model, make_task

RATE = 2000


class Tones:
    """Stands for recordings where no data are: two classes, a quarter of a second and more."""

    @dataclass
    class Config:
        pass

    rate = RATE
    attributes = {"pitch": ("low", "high")}  # noqa: RUF012

    def __init__(self, config):
        rng = np.random.default_rng(0)
        made, labels = [], []
        for number in range(40):
            time = np.arange(int(rng.integers(500, 900))) / RATE
            made.append(6000 * np.sin(2 * np.pi * (150, 400)[number % 2] * time) + 300 * rng.standard_normal(len(time)))
            labels.append([number % 2])
        sounds = [sound.astype(np.int16) for sound in made]
        self.recordings = Recordings(sounds, np.array(labels), [str(n) for n in range(40)])

    def load(self, split):
        return self.recordings

    def provenance(self):
        return {}


class Tunes:
    """Stands for piano rolls: two voices that walk up and down."""

    @dataclass
    class Config:
        pass

    def __init__(self, config):
        rng = np.random.default_rng(0)
        self.rolls = []
        for length in rng.integers(8, 60, 40):
            roll = np.zeros((length, 88), bool)
            for voice in (30, 50):
                roll[np.arange(length), voice + rng.integers(-1, 2, length).cumsum().clip(-8, 8)] = True
            self.rolls.append(roll)

    def load(self, split):
        return self.rolls

    def provenance(self):
        return {}


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    registry.datasets.names()
    entries = {**registry.datasets._entries, "audio/tones": Tones, "music/tunes": Tunes}
    monkeypatch.setattr(registry.datasets, "_entries", entries)


SMALL = {"width": 64, "depth": 2, "heads": 2, "mixer": {"window": 16}, "dropout": 0.1}
TRAIN = {"steps": 24, "batch_size": 8, "optimizer": {"lr": 3e-3}, "schedule": {"warmup": 2}, "ema": 0.9, "log_every": 4}
KINDS = {
    "samples": ({"name": "audio", "context": 512}, {"name": "audio_gatedfwa_100k", "head": {"history": 8}}),
    "labelled": (
        {"name": "audio", "seconds": 0.3, "condition": ["pitch"]},
        {"name": "audio_gatedfwa_100k", "head": {"history": 8}},
    ),
    "codec": (
        {"name": "audio_codec", "seconds": 0.256},
        {
            "name": "audio_codec_8khz",
            **{"rate": RATE, "width": 8, "widest": 16, "strides": [4, 4], "stages": 3},
            "quantizer": {"codes": 16, "dim": 4},
        },
    ),
    "codes": (
        {"name": "audio", "sequence": "codes", "seconds": 0.256, "condition": ["pitch"]},
        {"name": "audio_gatedfwa_100k", "head": {"name": "audio_codes"}},
    ),
    "classifier": (
        {"name": "audio_classifier", "seconds": 0.256},
        {"name": "audio_classifier_r10", "rate": RATE, "seconds": 0.256, "classes": [2], "widths": [8, 8, 8, 8]},
    ),
    "notes": ({"name": "music", "transpose": 4}, {"name": "music_gatedfwa_100k"}),
    "keys": (
        {"name": "music", "protocol": "keys", "transpose": 4},
        {"name": "music_gatedfwa_100k", "head": {"name": "music_keys"}},
    ),
}


def recipe(kind, folder, **settings):
    task, model = copy.deepcopy(KINDS[kind])
    task["dataset"] = {"name": "music/tunes" if task["name"] == "music" else "audio/tones"}
    if kind not in ("codec", "classifier"):
        model["backbone"] = SMALL
    if kind == "codes":
        task["codec"] = str(frozen_after_three_batches(recipe("codec", folder), "audio_codec_8khz", folder / "codec"))
    return build(Recipe, {"task": task, "model": model, "train": {**TRAIN, **settings}})


@pytest.fixture
def unseen(monkeypatch):
    """No check looks at values, as on a GPU."""
    look_at_nothing(monkeypatch)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_waits_for_nothing(kind, tmp_path):
    made = recipe(kind, tmp_path)
    task = make_task(made)
    batch, model = next(iter(task.stream("train", batch_size=4))), make_model(made, task)
    model(batch)  # transforms are made once
    with Waits():
        model(batch).loss_sum.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("kind", ["samples", "labelled", "codes", "notes", "keys"])
def test_a_step_of_drawing_waits_for_nothing(kind, tmp_path):
    made = recipe(kind, tmp_path)
    task = make_task(made)
    model, guided = make_model(made, task).eval(), kind in ("labelled", "codes")
    given = task.prompt([AudioPrompt({"pitch": "low"})] * 2 if guided else [None] * 2)
    with torch.no_grad():
        cache = model.backbone.init_cache(2 * (1 + guided), 40)
        state = model.head.init_state(given.inputs, given.condition)
        with Waits():
            h, cache, state = generation._advance(model, given.inputs, Context(), cache, state, guided)
            drawn, state = generation._draw(model, h[:, -1], state, Sampling(guidance=1.0 + guided), None)
            h, cache, state = generation._advance(model, drawn, Context(), cache, state, guided)
    assert h.shape == (2 * (1 + guided), 1, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_training_batches_have_few_shapes(kind, tmp_path):
    """Fewer than a recorder keeps, so that nearly every step of a run is a replay."""
    task = make_task(recipe(kind, tmp_path))
    stream = iter(task.stream("train", batch_size=8))
    assert len({signature(next(stream)) for _ in range(60)}) <= (graph.SHAPES if kind in ("notes", "keys") else 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["notes", "keys"])
def test_what_rows_are_filled_up_with_counts_for_nothing(kind, tmp_path):
    task = make_task(recipe(kind, tmp_path))
    model = make_model(recipe(kind, tmp_path), task).double().eval()
    layout, collate = (to_tokens, collate_notes) if kind == "notes" else (to_frames, collate_keys)
    for roll in Tunes(None).rolls[:12]:
        rows = [layout(roll), layout(roll[:5])]
        batch = collate(rows)
        real = sum(len(row) - 1 for row in rows)
        assert batch.inputs.shape[1] == few_lengths(real) == batch.targets.shape[1] == batch.ctx.cu_seqlens[-1]
        together = model(batch)
        assert together.count == len(roll) + 5
        assert together.metrics["first"][1] == 2
        alone = copy.deepcopy(batch)
        alone.inputs, alone.targets = batch.inputs[:, :real], batch.targets[:, :real]
        alone.ctx.cu_seqlens = batch.ctx.cu_seqlens[:-1]
        alone = model(alone)
        assert together.loss_sum.item() == pytest.approx(alone.loss_sum.item(), rel=1e-6)
        assert together.metrics["first"][0].item() == pytest.approx(alone.metrics["first"][0].item(), rel=1e-6)


def test_few_lengths():
    assert [few_lengths(n) for n in (1, 15, 16, 17, 100, 1024, 1025, 2047)] == [1, 15, 16, 18, 104, 1024, 1152, 2048]
    for low in (64, 1000, 30000):
        assert len({few_lengths(n) for n in range(low, 2 * low)}) <= 9
        assert all(0 <= few_lengths(n) - n <= n / 8 for n in range(low, 2 * low))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """A list that grows by one for each recording."""
    seen, record = [], recording.record

    def counted(*args, **options):
        seen.append(1)
        return record(*args, **options)

    monkeypatch.setattr(recording, "record", counted)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "compiled"), [*((kind, False) for kind in KINDS), ("samples", True)])
def test_on_a_gpu_steps_in_bfloat16_are_recorded(kind, compiled, tmp_path, recorded):
    """With the numbers of steps that are not. Samples also compiled, as audio/fsdd has them."""
    results = {}
    for name in ("plain", "graph"):
        graphed = name == "graph"
        made = recipe(kind, tmp_path, precision="bf16", device="cuda", graph=graphed, compile=compiled and graphed)
        results[name] = train(made, tmp_path / name).metrics
    assert recorded
    plain, ours = (results[name]["train/loss"] for name in ("plain", "graph"))
    assert np.isfinite(plain)
    assert ours == pytest.approx(plain, rel=0.1 if kind == "codec" else 0.03)  # a code taken for another goes its way
    first = float((tmp_path / "graph/metrics.jsonl").read_text().partition('"train/loss": ')[2].partition(",")[0])
    assert ours < first


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["samples", "labelled", "codes"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_on_a_gpu_a_stream_of_replays_is_the_sound_at_once(kind, guidance, tmp_path):
    """Sample for sample, over the end of the ring many times."""
    if kind == "samples" and guidance != 1:
        pytest.skip("without labels there is nothing to guide by")
    run = tmp_path / "run"
    train(recipe(kind, tmp_path, device="cuda"), run)
    pipe = pipeline(run, device="cuda")
    given, sampling = prompt_of(pipe, kind), Sampling(guidance=guidance)
    count = pipe.task.elements(1.0)
    for codec in [pipe.task.codec] if pipe.task.codec is not None else []:
        codec.to("cuda")
    whole = pipe.task.artefacts(given, generate(pipe.model, given, max_new=count, sampling=sampling, seed=2).cpu())
    steps = generate(pipe.model, given, max_new=count, sampling=sampling, seed=2, stream=True, graph=True)
    pieces = list(pipe.task.pieces(given, steps))
    assert len(pieces) > 3
    for row, sound in enumerate(whole):
        assert np.array_equal(np.concatenate([piece[row] for piece in pieces]), sound)
        assert sound.std() > 1


def prompt_of(pipe: Pipeline, kind: str):
    return pipe.task.prompt([None] * 2 if kind == "samples" else [AudioPrompt({"pitch": p}) for p in ("low", "high")])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["notes", "keys"])
def test_on_a_gpu_music_is_drawn_from_a_graph(kind, tmp_path):
    run = tmp_path / "run"
    train(recipe(kind, tmp_path, device="cuda"), run)
    pipe = pipeline(run, device="cuda")
    given = pipe.task.prompt([None] * 3)
    plain, ours = (generate(pipe.model, given, max_new=80, seed=4, graph=graph) for graph in (False, True))
    assert torch.equal(plain, ours)
