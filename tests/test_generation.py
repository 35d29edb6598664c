"""Samplers as pure functions, and generation on every mixer's state."""

import pytest
import torch
from torch import nn

from zoo import config
from zoo.backbone import Backbone, BackboneConfig
from zoo.generation import Sampling, generate, keep_min_p, keep_top_k, keep_top_p, penalise_repetition, sample_logits
from zoo.model import Batch, Context, Head, Model, Output, create_model

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
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0},
        {"guidance": -1.0},
    ],
)
def test_sampling_refuses(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} = "):
        Sampling(**field)


# ---------------------------------------------------------------------------------------------------------------------
# Conditions and coordinates, with a head made for it

SIDE, CLASSES = 4, 3  # elements lie on a 4 x 4 grid; class CLASSES stands for none


class GridHead(Head):
    """Tokens on a grid, with a class embedding on every one."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Embedding(5, width)
        self.label = nn.Embedding(CLASSES + 1, width)

    def init_state(self, inputs, condition=None, lengths=None):
        label = torch.full((len(inputs),), CLASSES) if condition is None else condition
        return {"label": label, "seen": torch.zeros(len(inputs), dtype=torch.int64)}

    def embed(self, inputs, ctx, state=None):
        state = state or self.init_state(inputs)
        state["seen"] += inputs.shape[1]  # in place, as states may be written
        return self.token(inputs) + self.label(state["label"]).unsqueeze(1), state

    def logits(self, h_last, state):
        return h_last @ self.token.weight.T

    def sample(self, params, state, sampling, generator):
        return sample_logits(params, sampling, generator).unsqueeze(1), state

    def coordinates(self, places):
        return torch.stack((places // SIDE, places % SIDE), dim=-1)

    def unconditional(self, state):
        return {**state, "label": torch.full_like(state["label"], CLASSES)}


@pytest.fixture
def grid_model():
    torch.manual_seed(0)
    node = {"width": 32, "depth": 2, "heads": 2, "mixer": {"name": "gatedfwa", "window": 6}}
    model = Model.__new__(Model)
    nn.Module.__init__(model)
    model.backbone, model.head = Backbone(config.build(BackboneConfig, node)), GridHead(32)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


@torch.no_grad()
def full_logits(model, tokens, label):
    """After the last token, from one forward pass over everything, positions given by hand."""
    places = torch.arange(tokens.shape[1])
    ctx = Context(positions=torch.stack((places // SIDE, places % SIDE), dim=-1)[None])
    h, _ = model.head.embed(tokens, ctx, model.head.init_state(tokens, label))
    h, _ = model.backbone(h, ctx)
    return model.head.logits(h[:, -1], None)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_mixes_what_the_full_forward_gives(grid_model, guidance):
    tokens, label = torch.randint(0, 5, (3, 4)), torch.tensor([0, 1, 2])
    sampling = Sampling(temperature=0, guidance=guidance)
    drawn = generate(grid_model, Batch(tokens, condition=label), max_new=12, sampling=sampling, chunk=3)
    for step in range(12):
        given = full_logits(grid_model, tokens, label)
        free = full_logits(grid_model, tokens, torch.full((3,), CLASSES))
        expected = (free + guidance * (given - free)).argmax(-1)
        assert drawn[:, step].tolist() == expected.tolist(), step
        tokens = torch.cat((tokens, expected[:, None]), dim=1)


def test_guided_rows_of_different_lengths_are_as_alone(grid_model):
    tokens, label, lengths = torch.randint(0, 5, (2, 7)), torch.tensor([2, 0]), torch.tensor([7, 2])
    sampling = Sampling(temperature=0, guidance=3.0)
    prompt = Batch(tokens, condition=label, ctx=Context(lengths=lengths))
    together = generate(grid_model, prompt, max_new=8, sampling=sampling, chunk=3)
    for row, length in enumerate(lengths.tolist()):
        alone = Batch(tokens[row : row + 1, :length], condition=label[row : row + 1])
        assert together[row].tolist() == generate(grid_model, alone, max_new=8, sampling=sampling)[0].tolist()


def test_guidance_needs_a_condition_and_a_head_that_knows_none(grid_model):
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"guidance = 2.0 needs a condition"):
        generate(grid_model, tokens, max_new=1, sampling=Sampling(guidance=2.0))
    text = create_model("text_gatedfwa_1m", backbone={"depth": 1})
    with pytest.raises(ValueError, match="TextHead was not trained without its condition"):
        generate(text, Batch(tokens, condition=tokens[:, 0]), max_new=1, sampling=Sampling(guidance=2.0))


def test_a_condition_reaches_training_too(grid_model):
    tokens = torch.randint(0, 5, (2, 6))
    seen = []
    grid_model.head.loss = lambda h, batch: seen.append(h) or Output(h.sum(), torch.tensor(1))
    for condition in (None, torch.tensor([0, 1])):
        grid_model(Batch(tokens, tokens, condition=condition))
    assert not torch.allclose(*seen)
    logits = grid_model.head.logits(seen[1][:, -1], None)
    torch.testing.assert_close(logits, full_logits(grid_model, tokens, torch.tensor([0, 1])))
