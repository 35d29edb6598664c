"""Steps in place, and on a CUDA device steps replayed from one graph: the same tokens as steps one by one."""

import pytest
import torch

import zoo
from zoo import generation, recording
from zoo.generation import Sampling, generate
from zoo.model import Batch

MIXERS = ["gatedfwa", "softmax", "swa", "fox", "nsa", "gatedfwa_nsa"]
SPARSE = {"backbone": {"mixer": {"block": 4, "top": 4}}}  # so that blocks are left out, and several completed
IMAGE = {"height": 8, "width": 8, "channels": 3, "levels": 256, "classes": 10, "neighbours": True}


def text_model(mixer, device):
    torch.manual_seed(0)
    return zoo.create_model(f"text_{mixer}_1m", **SPARSE if "nsa" in mixer else {}).to(device)


def text_prompt(device):
    return torch.arange(3 * 21, device=device).view(3, 21) * 7 % 200


def image_model(mixer, device):
    torch.manual_seed(0)
    return zoo.create_model(f"image_{mixer}_1m", head=IMAGE).to(device)


def image_prompt(device):
    return Batch(torch.full((4, 1), 256, device=device), condition=torch.arange(4, device=device))


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="graph = True records a CUDA graph; the model is on cpu"):
        generate(text_model("gatedfwa", "cpu"), text_prompt("cpu"), max_new=2, graph=True)


@pytest.fixture
def in_place(monkeypatch):
    """What a graph would replay, run eagerly."""

    def recorded(step, state, generator):
        def replay():
            generation._step_in_place(step, state)
            return state["drawn"].clone()

        return replay

    monkeypatch.setattr(generation, "_recorded", recorded)
    monkeypatch.setattr(recording, "DEVICES", ("cpu",))


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_in_place_draw_the_same(mixer, in_place):
    """The state's own tensors carry everything from step to step."""
    model, sampling = text_model(mixer, "cpu"), Sampling(repetition_penalty=1.2)
    steps, again = (
        generate(model, text_prompt("cpu"), max_new=12, sampling=sampling, seed=1, graph=graph)
        for graph in (False, True)
    )
    assert torch.equal(steps, again)


def test_a_step_in_place_keeps_every_tensor():
    """A graph writes to the memory that it was recorded with, so the state has to hold on to just these tensors."""

    def step(state):
        state["position"] = state["position"] + 1  # as the backbone does
        state["ring"].mul_(2)
        return {"position": state["position"], "ring": state["ring"]}

    state = {"position": torch.zeros(2), "ring": torch.ones(2)}
    before = dict(state)
    for _ in range(3):
        generation._step_in_place(step, state)
    assert all(state[name] is before[name] for name in before)
    assert state["position"].tolist() == [3, 3]
    assert state["ring"].tolist() == [8, 8]


def test_guided_steps_in_place_draw_the_same(in_place):
    model, prompt = image_model("gatedfwa", "cpu"), image_prompt("cpu")
    steps, again = (
        generate(model, prompt, max_new=12, sampling=Sampling(guidance=2.0), seed=1, graph=graph)
        for graph in (False, True)
    )
    assert torch.equal(steps, again)
    assert torch.equal(prompt.condition, torch.arange(4))


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_step_draws_the_same(mixer, dtype):
    """Greedy and sampled: the same kernels on the same values, and the generator goes on as it would step by step."""
    model = text_model(mixer, "cuda").to(dtype)
    for sampling in (Sampling(temperature=0), Sampling(top_k=20, repetition_penalty=1.2)):
        plain, recorded, again = (
            generate(model, text_prompt("cuda"), max_new=40, sampling=sampling, seed=1, graph=graph)
            for graph in (False, True, True)
        )
        assert torch.equal(recorded, again)
        assert torch.equal(plain, recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["gatedfwa", "softmax", "swa"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_recorded_image_is_the_plain_one(mixer, guidance):
    """Over the end of the ring, with a condition and its guidance."""
    model, prompt = image_model(mixer, "cuda"), image_prompt("cuda")
    for sampling in (Sampling(temperature=0, guidance=guidance), Sampling(guidance=guidance)):
        plain, recorded = (
            generate(model, prompt, max_new=192, sampling=sampling, seed=3, graph=graph) for graph in (False, True)
        )
        assert recorded.shape == plain.shape
        if sampling.temperature == 0:
            assert (plain == recorded).float().mean() > 0.99  # ties, by rounding
        assert len(recorded.unique()) > 1
