"""Heads of samples and codes: exactly normalised likelihoods, packing that leaks nothing, drawing that is the full
forward repeated."""

import itertools

import numpy as np
import pytest
import torch

import zoo
from tasks.audio.patterns import PATTERNS, Pattern
from tasks.audio.sample_head import START
from tasks.audio.stream import collate_packed, shifted
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context
from zoo.state import state_bytes


def small_model(name, mixer="gatedfwa", window=4, **head):
    """Weights far from their start, so that nothing is symmetric by chance."""
    torch.manual_seed(0)
    node = {"name": mixer} | ({"window": window} if mixer in ("gatedfwa", "swa") else {})
    backbone = {"width": 16, "depth": 2, "heads": 2, "mixer": node}
    model = zoo.create_model(f"audio_{mixer}_100k", backbone=backbone, head={"name": name, **head})
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("history", [0, 3])
def test_the_likelihood_of_samples_sums_to_one(history):
    """All 65,536 pairs of levels."""
    model = small_model("audio_samples", history=history)
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    h, _ = model.head.embed(shifted(pairs, START), Context())
    h, _ = model.hidden(h, Context())
    nats = model.head.out(h).log_softmax(-1).gather(-1, pairs.unsqueeze(-1)).sum((1, 2))
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    batch = Batch(shifted(pairs[:99], START), pairs[:99])
    assert model(batch).loss_sum.item() == pytest.approx(-nats[:99].sum().item())


@torch.no_grad()
def test_packed_recordings_score_as_each_alone():
    model = small_model("audio_samples", history=8)
    rng = np.random.default_rng(0)
    rows = [np.concatenate(([START], rng.integers(0, 256, size))) for size in (5, 1, 30, 9)]
    together = model(collate_packed(rows))
    alone = [model(collate_packed([row])) for row in rows]
    assert together.count.item() == 45 == sum(x.count.item() for x in alone)
    assert together.loss_sum.item() == pytest.approx(sum(x.loss_sum.item() for x in alone))


def test_history_is_what_it_says():
    model = small_model("audio_samples", history=3)
    seen = torch.tensor([[START, 10, 200, 128]])
    state = model.head.init_state(seen)
    windows = torch.cat((state["recent"], seen), dim=1).unfold(1, 3, 1)
    assert windows[0].tolist() == [[START] * 3, [START, START, 10], [START, 10, 200], [10, 200, 128]]
    features = model.head._amplitudes(torch.cat((state["recent"], seen), dim=1), 4, Context())[0]
    assert (features[0, :6] == 0).all()
    companded = torch.tensor([10, 200, 128]).double() / 127.5 - 1
    torch.testing.assert_close(features[3, :3].double(), companded, rtol=0, atol=1e-6)
    magnitude = (256 ** companded.abs() - 1) / 255
    linear = companded.sign() * magnitude
    expected = linear / (linear.square().mean().sqrt() + 1e-3)
    torch.testing.assert_close(features[3, 3:6].double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["gatedfwa", "softmax"])
def test_samples_are_drawn_by_the_full_forward(mixer):
    """Guided, from ragged prompts, in chunks."""
    model = small_model("audio_samples", mixer, classes=(3, 2), history=5)
    labels = torch.tensor([[2, 0], [0, 2]])  # the second speaker: any
    rows = [[START, 7, 99], [START, 250, 3, 4, 128, 60, 61]]
    padded = torch.zeros(2, 7, dtype=torch.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    given = Batch(padded, condition=labels, ctx=Context(lengths=torch.tensor([3, 7])))
    drawn = generate(model, given, max_new=9, sampling=Sampling(temperature=0, guidance=2.0), chunk=2)
    for row in range(2):
        tokens = torch.tensor(rows[row])[None]
        for step in range(9):
            logits = []
            for told in (labels[row : row + 1], torch.tensor([[3, 2]])):
                h, _ = model.head.embed(tokens, Context(), model.head.init_state(tokens, told))
                logits.append(model.head.logits(model.hidden(h, Context())[0][:, -1], None))
            expected = (logits[1] + 2.0 * (logits[0] - logits[1])).argmax(-1)
            assert drawn[row, step] == expected
            tokens = torch.cat((tokens, expected[None]), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_likelihood_of_codes_sums_to_one(pattern):
    """Two frames of two streams of three levels: all 81."""
    model = small_model("audio_codes", streams=2, levels=3, pattern=pattern)
    layout = PATTERNS[pattern](2)
    codes = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    laid = layout.scatter(codes, 3)
    targets = torch.where(laid == 3, -100, laid)
    nats = torch.stack(
        [model(Batch(shifted(x[None], 3), y[None])).loss_sum for x, y in zip(laid, targets, strict=True)]
    )
    assert (-nats.double()).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    output = model(Batch(shifted(laid, 3), targets))
    assert output.count.item() == 81 * 4
    parts = [total for total, _ in output.metrics.values()]
    assert sum(parts).item() == pytest.approx(output.loss_sum.item())


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_codes_are_drawn_by_the_full_forward(pattern):
    model = small_model("audio_codes", streams=3, levels=5, pattern=pattern, classes=(4,))
    layout = PATTERNS[pattern](3)
    label = torch.tensor([[1]])
    start = torch.full((1, 1, 3), 5)
    steps = layout.steps(4)
    drawn = generate(
        model, Batch(start, condition=label), max_new=steps, sampling=Sampling(temperature=0, guidance=1.5)
    )
    tokens = start
    for step in range(steps):
        logits = []
        for told in (label, torch.tensor([[4]])):
            h, _ = model.head.embed(tokens, Context(), model.head.init_state(tokens, told))
            logits.append(model.head.logits(model.hidden(h, Context())[0][:, -1], None))
        best = (logits[1] + 1.5 * (logits[0] - logits[1])).argmax(-1)  # (1, 3)
        here = layout.active(torch.tensor([step]))
        expected = torch.where(here, best, 5)
        assert drawn[:, step].tolist() == expected.tolist()
        tokens = torch.cat((tokens, expected[:, None]), dim=1)
    codes = layout.gather(drawn)
    assert codes.shape == (1, 4, 3)
    assert (codes < 5).all()


def test_what_a_head_cannot_take():
    plain = small_model("audio_samples")
    with pytest.raises(ValueError, match="sample 257 is out of range"):
        plain(Batch(torch.tensor([[START, 257]]), torch.zeros(1, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="unconditional"):
        generate(plain, Batch(torch.tensor([[START]]), condition=torch.tensor([[0]])), max_new=1)
    codes = small_model("audio_codes", streams=2, levels=4, classes=(3,), class_dropout=0.0)
    with pytest.raises(ValueError, match=r"takes \(B, T, 2\) codes"):
        codes(Batch(torch.zeros(1, 4, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="code 5 is out of range"):
        codes(Batch(torch.full((1, 4, 2), 5), torch.zeros(1, 4, 2, dtype=torch.int64)))
    given = Batch(torch.full((1, 1, 2), 4), condition=torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"head\.class_dropout above 0; this one has \(3,\) and 0\.0"):
        generate(codes, given, max_new=1, sampling=Sampling(guidance=2))
    for field, message in (
        ({"history": -1}, "history = -1"),
        ({"classes": (0,)}, "classes = "),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            small_model("audio_samples", **field)
    with pytest.raises(ValueError, match="did you mean 'delay'"):
        small_model("audio_codes", streams=2, pattern="dealy")
    with pytest.raises(ValueError, match=r"head\.streams = 0"):
        small_model("audio_codes")


@torch.no_grad()
def test_labels_are_hidden_in_training_alone():
    head = small_model("audio_samples", classes=(3, 2), class_dropout=0.3).head
    labels = torch.randint(0, 2, (600, 2))
    shown, none = head.labels(labels), head.labels(head.labels.none(600, "cpu"))
    head.train()
    seen = head.labels(labels)
    same = [(seen == other).flatten(1).all(dim=1).double().mean().item() for other in (shown, none)]
    assert same[0] == pytest.approx(0.7**3, abs=0.07)
    assert same[1] == pytest.approx(0.3 + 0.7 * 0.3**2, abs=0.07)


def test_the_state_of_an_endless_stream_does_not_grow():
    model = small_model("audio_samples", history=16)
    assert state_bytes(model.backbone.init_cache(1, 100)) == state_bytes(model.backbone.init_cache(1, 100_000))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*(make(4) for make in PATTERNS.values()), Pattern(2, (0, 1, 1, 5))])
def test_a_pattern_is_invertible_on_ragged_rows(pattern):
    codes = torch.randint(0, 9, (5, 7, 4))
    lengths = torch.tensor([7, 0, 1, 3, 6])
    laid = pattern.scatter(codes, 9, lengths)
    assert laid.shape == (5, pattern.steps(7), 4)
    assert pattern.complete(laid.shape[1]) == 7
    back = pattern.gather(laid)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(back[row, :length], codes[row, :length])
        assert (back[row, length:] == 9).all()
        assert (laid[row] != 9).sum() == 4 * length
        assert torch.equal(pattern.gather(laid[row : row + 1, : pattern.steps(length)])[0], codes[row, :length])
    assert torch.equal(pattern.gather(pattern.scatter(codes, 9)), codes)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_knows_its_places(name):
    pattern = PATTERNS[name](3)
    laid = pattern.scatter(torch.zeros(1, 50, 3, dtype=torch.int64), 1)[0] == 0
    inner = pattern.steps(50) - pattern.delay  # beyond it an endless sequence would go on
    assert torch.equal(pattern.active(torch.arange(inner)), laid[:inner])
    for steps in range(40):
        frames = pattern.complete(steps)
        assert pattern.steps(frames) <= steps or frames == 0
        assert pattern.steps(frames + 1) > steps
    assert (pattern.stride, pattern.offsets) == {
        "parallel": (1, (0, 0, 0)), "delay": (1, (0, 1, 2)), "flat": (3, (0, 1, 2))
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("stride", "offsets", "message"),
    [
        (0, (0,), "stride = 0"),
        (1, (), "begin with 0"),
        (1, (1, 2), "begin with 0"),
        (1, (0, 2, 1), "may not come before"),
    ],
)
def test_patterns_are_checked(stride, offsets, message):
    with pytest.raises(ValueError, match=message):
        Pattern(stride, offsets)
    with pytest.raises(ValueError, match=r"this pattern takes \(B, T, 2\)"):
        PATTERNS["delay"](2).scatter(torch.zeros(1, 3, 3), 0)
