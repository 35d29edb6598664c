"""The next-token head and the sizes of text models."""

import pytest
import torch
import torch.nn.functional as F

from tasks.text.head import TextHead
from zoo import config as configs
from zoo import create_model, list_models
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context


def make(**fields):
    torch.manual_seed(0)
    return TextHead(configs.build(TextHead.Config, {"vocabulary": 11, **fields}), 8)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names(tied):
    names = {name: tuple(parameter.shape) for name, parameter in make(tied=tied).named_parameters()}
    assert names == {"embed.weight": (11, 8)} | ({} if tied else {"out.weight": (11, 8)})


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_a_sum_and_a_count(tied):
    head = make(tied=tied)
    tokens = torch.randint(11, (2, 6))
    targets = torch.randint(11, (2, 6)).masked_fill(torch.rand(2, 6) < 0.3, -100)
    h, _ = head.embed(tokens, Context())
    output = head.loss(h, Batch(tokens, targets))
    want = F.cross_entropy((h @ head.out_weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss_sum, want)
    assert output.count == (targets >= 0).sum()
    output.loss_sum.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    torch.testing.assert_close(head.logits(h[:, -1], None), (h @ head.out_weight.T)[:, -1])


def test_initial_spread():
    head = TextHead(TextHead.Config(vocabulary=1000, tied=False), 64)
    assert head.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.out_weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("token", [11, 300, -1])
def test_a_token_outside_the_vocabulary_is_named(token):
    model = create_model("text_gatedfwa_1m", head={"vocabulary": 11}, backbone={"depth": 1})
    tokens = torch.tensor([[1, 2, token, 4]])
    with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary.* 11 tokens, 0 to 10"):
        generate(model, tokens, max_new=1, stream=True)  # before the first step is asked for
    with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary"):
        model(Batch(tokens, torch.zeros_like(tokens)))
    with pytest.raises(ValueError, match=f"target {token} is none of the 11 classes, 0 to 10"):
        model(Batch(torch.zeros_like(tokens), tokens))


def test_values_off_the_cpu_are_looked_at_under_debug_only(monkeypatch):
    tokens = torch.empty(2, 3, dtype=torch.int64, device="meta")  # a look at its values raises
    make().check(tokens)
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(RuntimeError):
        make().check(tokens)


def test_dropout_is_for_training():
    head = make(dropout=0.5)
    tokens = torch.randint(11, (2, 6))
    assert (head.embed(tokens, Context())[0] == 0).any()
    assert not (head.eval().embed(tokens, Context())[0] == 0).any()


def test_repetition_is_counted_without_padding():
    head = make()
    prompt = torch.tensor([[1, 1, 2, 0, 0], [3, 4, 5, 6, 7]])
    state = head.init_state(prompt, lengths=torch.tensor([3, 5]))
    assert state["occurred"][0].tolist() == [0, 2, 1, *[0] * 8]
    logits = torch.zeros(2, 11)
    logits[:, 1] = logits[:, 9] = 5.0
    drawn, state = head.sample(logits, state, Sampling(temperature=0, repetition_penalty=2.0), None)
    assert drawn.tolist() == [[9], [1]]
    assert state["occurred"][0, 9] == state["occurred"][1, 1] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"vocabulary": 0}, "needs the number of its token ids"), ({"dropout": 1.0}, "up to, not including, 1")],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_sizes():
    names = list_models("text_*")
    for mixer in ("softmax", "swa", "fox", "gatedfwa", "nsa", "gatedfwa_nsa"):
        assert [f"text_{mixer}_{size}" for size in ("1m", "8m", "10m", "125m")] == [
            name for name in names if name.rpartition("_")[0] == f"text_{mixer}"
        ]


def test_the_125m_shape():
    with torch.device("meta"):
        model = create_model("text_gatedfwa_125m")
    config = model.config.backbone
    assert (config.depth, config.width, config.heads, config.dims.head_dim) == (12, 768, 12, 64)
    assert config.mixer.config.window == 512
    assert tuple(model.head.out_weight.shape) == (50304, 768)
    assert 120e6 < model.parameter_count() < 130e6
    assert model.head.flops(10) == 2 * 10 * 50304 * 768


@pytest.mark.parametrize("mixer", ["softmax", "swa", "fox", "gatedfwa", "nsa", "gatedfwa_nsa"])
def test_one_step(mixer):
    model = create_model(f"text_{mixer}_1m", backbone={"depth": 1, "width": 32})
    tokens = torch.randint(256, (2, 33))
    output = model(Batch(tokens[:, :-1], tokens[:, 1:]))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(5.55, abs=0.3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
