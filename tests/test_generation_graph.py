"""Steps in place, and on a CUDA device steps replayed from one graph: the same tokens as steps one by one."""

import warnings

import pytest
import torch

import zoo
from zoo import generation
from zoo.generation import Sampling, generate

MIXERS = ["gatedfwa", "softmax", "swa", "fox"]


def model(mixer, device):
    torch.manual_seed(0)
    return zoo.create_model(f"text_{mixer}_1m").to(device)


def prompt(device):
    return torch.arange(3 * 21, device=device).view(3, 21) * 7 % 200


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_in_place_draw_the_same(mixer, monkeypatch):
    """What a graph would replay, run eagerly: the states' own tensors carry everything from step to step."""

    def captured(model, drawn, cache, head_state):
        given = drawn.clone()

        def replay(drawn):
            given.copy_(drawn)
            return generation._step_in_place(model, given, cache, head_state)

        return replay

    small, sampling = model(mixer, "cpu"), Sampling(repetition_penalty=1.2)
    steps = generate(small, prompt("cpu"), max_new=12, sampling=sampling, seed=1)
    monkeypatch.setattr(generation, "_capture", captured)
    monkeypatch.setattr(generation, "CAPTURES", ("cpu",))
    again = generate(small, prompt("cpu"), max_new=12, sampling=sampling, seed=1)
    assert torch.equal(steps, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_draws_the_same(mixer, dtype):
    """Greedy and sampled, over the end of the ring; a warning (the fallback) would fail the test."""
    small = model(mixer, "cuda").to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sampling in (Sampling(temperature=0), Sampling(top_k=20, repetition_penalty=1.2)):
            drawn = [
                generate(small, prompt("cuda"), max_new=40, sampling=sampling, seed=1, graph=graph)
                for graph in (False, True, True)
            ]
            assert torch.equal(drawn[0], drawn[1])
            assert torch.equal(drawn[1], drawn[2])
