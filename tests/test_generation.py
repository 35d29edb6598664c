"""Samplers as pure functions, and generation on every mixer's state."""

import pytest
import torch

from zoo.generation import Sampling, keep_min_p, keep_top_k, keep_top_p, penalise_repetition, sample_logits

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 0.0]])


def kept(logits):
    return [[i for i, x in enumerate(row) if x > -torch.inf] for row in logits.tolist()]


def test_top_k():
    assert kept(keep_top_k(LOGITS, 2)) == [[0, 1], [1, 2]]
    assert keep_top_k(LOGITS, 9) is LOGITS


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    p = LOGITS.softmax(-1)[0]
    assert kept(keep_top_p(LOGITS, float(p[0]) - 1e-3))[0] == [0]
    assert kept(keep_top_p(LOGITS, float(p[0]) + 1e-3))[0] == [0, 1]
    assert kept(keep_top_p(LOGITS, float(p[:3].sum()) + 1e-3))[0] == [0, 1, 2, 3]


def test_min_p():
    assert kept(keep_min_p(LOGITS, 0.3)) == [[0, 1], [1, 2]]


def test_repetition_penalty():
    occurred = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]])
    assert penalise_repetition(LOGITS, occurred, 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0], [0.0, 3.0, 3.0, 0.0]]


def test_greedy_and_seeded():
    assert sample_logits(LOGITS, Sampling(temperature=0)).tolist() == [0, 1]
    draws = [sample_logits(LOGITS.repeat(50, 1), Sampling(), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert draws[0].tolist() == draws[1].tolist()


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = sample_logits(LOGITS[:1].expand(20000, 4), Sampling(temperature=0.7), generator)
    share = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(share, (LOGITS[0] / 0.7).softmax(-1), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    "field",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"repetition_penalty": 0}],
)
def test_sampling_refuses(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} = "):
        Sampling(**field)
