"""Heads of patches and of value tokens: what they may see, what they remember, and what they predict."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.series.normalise import LEAST, seasonal_unit, statistics
from tasks.series.outputs import outputs, pinball, quantiles_of
from tasks.series.rolling import pooled, roll
from zoo.config import build
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context, Model, ModelConfig
from zoo.state import index

LEVELS = [0.1, 0.3, 0.5, 0.7, 0.9]


def make(head=None, mixer="gatedfwa", **backbone) -> Model:
    node = {"name": mixer} | ({} if mixer == "softmax" else {"window": 4})
    head = {"name": "series", "patch": 4, "predict": 8, "prefix": 3, **(head or {})}
    model = build(
        ModelConfig, {"backbone": {"width": 32, "depth": 2, "heads": 2, "mixer": node, **backbone}, "head": head}
    ).build()
    if getattr(model.head, "highway", None) is not None:
        torch.nn.init.normal_(model.head.highway.weight, std=0.1)
    if getattr(model.head, "choice", None) is not None:
        torch.nn.init.normal_(model.head.choice.weight, std=1.0)
    return model.eval()


def predicted(model, values, at, *, prefix=3):
    """Parameters of the prediction from the patches `at` (a slice), as in training."""
    h, _ = model.head.embed(values, Context())
    h, _ = model.backbone(h, Context())
    scaling = model.head._scaling(values, prefix)
    if model.head.config.statistics == "running":
        scaling = type(scaling)(*(x[:, at] for x in scaling))
    return model.head._params(h[:, at], model.head._past(values)[:, at], scaling)


def rows(tokens=6, channels=1, patch=4, batch=3):
    x = torch.randn(batch, tokens * patch, channels).cumsum(1) * 3 + 50
    return x.unflatten(1, (tokens, patch)).transpose(2, 3).contiguous()


def batch_of(values, predict=8):
    """A training batch of rows (B, T + m, C, P), the last m patches being targets alone."""
    patch, blocks = values.shape[-1], predict // values.shape[-1]
    steps = values.transpose(1, 2).flatten(2)
    tokens = values.shape[1] - blocks
    targets = steps[..., patch:].unfold(-1, predict, patch)[:, :, :tokens].transpose(1, 2)
    return Batch(values[:, :tokens], targets)


HEADS = {
    "prefix": {"highway": 8, "hidden": 16},
    "last": {"highway": 8, "level": "last"},
    "running": {"statistics": "running", "highway": 8},
    "student_t": {"output": {"name": "student_t", "components": 2}, "highway": 4},
    "point": {"output": {"name": "point", "error": "huber"}, "units": "data"},
    "mixed": {"channels": 3, "highway": 8},
    "lags": {"lags": [6, 9], "statistics": "running"},
    "lags of the prefix": {"lags": [3, 14], "highway": 5, "level": "last", "channels": 2, "units": "data"},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_changed_future_changes_no_prediction(head):
    """Alter what comes after a position: hidden states and parameters up to it, from the prefix on, stay."""
    model = make(HEADS[head])
    values = rows(tokens=7, channels=HEADS[head].get("channels", 1))
    for last in range(3 - 1, 6):
        other = values.clone()
        other[:, last + 1 :] = other[:, last + 1 :] * -7 + 1000
        found = [predicted(model, x, slice(last, last + 1)) for x in (values, other)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)  # rounding; a leak would be of order 1


@pytest.mark.parametrize("head", HEADS)
def test_training_and_forecasting_see_the_same(head):
    """The prediction at the end of a history is the one that the loss is taken of, prefilled in chunks or not."""
    model = make(HEADS[head])
    values = rows(tokens=3, channels=HEADS[head].get("channels", 1))
    batch = Batch(values)
    trained = predicted(model, values, slice(2, 3))[:, 0]
    mean, quantiles = model.head.summary(trained, model.head.init_state(values), LEVELS)
    rolled = roll(model, batch, 8, levels=LEVELS)
    torch.testing.assert_close(rolled.mean, mean, rtol=1e-4, atol=1e-3)
    if quantiles is not None:
        torch.testing.assert_close(rolled.quantiles, quantiles, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mixer", ["gatedfwa", "swa", "softmax"])
def test_a_roll_on_the_state_is_a_roll_over_the_whole(mixer):
    """Feeding back on the state = running the grown history, with the first history's statistics, from its start."""
    model = make({"highway": 8, "lags": [5, 11], "output": {"name": "point"}}, mixer)
    values = rows(tokens=3)
    found = roll(model, Batch(values), 24, levels=LEVELS, mode="point").mean
    grown, expected = values, []
    for _ in range(3):
        params = predicted(model, grown, slice(grown.shape[1] - 1, None))  # statistics of the prefix: the history
        location, _, unit = (x[:, 0, :, None] for x in model.head._scaling(grown, 3))
        step = params[:, 0, ..., 0] * unit + location
        expected.append(step)
        grown = torch.cat((grown, step.unflatten(-1, (2, 4)).transpose(1, 2)), dim=1)
    torch.testing.assert_close(found, torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-3)


def test_a_longer_roll_begins_with_the_shorter():
    model = make({"highway": 8})
    batch = Batch(rows(tokens=3))
    long, short = (roll(model, batch, horizon, levels=LEVELS) for horizon in (30, 13))
    assert long.quantiles.shape == (3, 1, 30, 5)
    torch.testing.assert_close(long.quantiles[:, :, :13], short.quantiles)
    assert (long.quantiles.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("mode", ["quantiles", "samples", "point"])
def test_forecasts_move_and_stretch_with_the_data(mode):
    """f(a x + b) = a f(x) + b for instance normalisation, whatever the mode."""
    model = make({"highway": 8})
    x = rows(tokens=3).double().float()
    plain, moved = (roll(model, Batch(v), 16, levels=LEVELS, mode=mode, samples=8) for v in (x, 40 * x - 300))
    torch.testing.assert_close(moved.quantiles, 40 * plain.quantiles - 300, rtol=2e-3, atol=0.5)


def test_missing_values_are_neither_seen_nor_scored():
    model = make({"highway": 8})
    values = rows(tokens=5)
    values[:, 1, :, 2:] = torch.nan
    values[0] = torch.nan  # a row with nothing in it
    batch = batch_of(values)
    batch.targets[1, -1, :, :3] = torch.nan
    output = model(batch)
    assert torch.isfinite(output.loss_sum)
    assert output.count == (~batch.targets[:, 2:].isnan()).sum()
    assert torch.isfinite(roll(model, Batch(values[:, :3]), 20, levels=LEVELS).quantiles).all()


def test_a_missing_value_is_not_a_zero():
    model = make()
    values = rows(tokens=3)
    gap, mean = values.clone(), values.clone()
    gap[:, 1, :, 1] = torch.nan
    location, _ = statistics(gap, "prefix", 3)
    mean[:, 1, :, 1] = location[:, 0]
    a, b = (roll(model, Batch(x), 8, levels=LEVELS).mean for x in (gap, mean))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("over", ["prefix", "running"])
def test_statistics_are_those_of_numpy(over):
    values = rows(tokens=5, channels=2) + 1e5
    values[1, 0, 0, 2:] = torch.nan
    location, scale = statistics(values, over, 4)
    for tokens in [4] if over == "prefix" else range(1, 6):
        seen = values[:, :tokens].movedim(2, 1).flatten(2).double().numpy()
        at = 0 if over == "prefix" else tokens - 1
        np.testing.assert_allclose(location[:, at], np.nanmean(seen, axis=-1), rtol=1e-6)
        np.testing.assert_allclose(scale[:, at], np.nanstd(seen, axis=-1), rtol=1e-4)


def test_a_constant_or_missing_past_has_the_scale_one():
    flat = torch.full((1, 3, 2, 4), 7.25)
    flat[:, :, 1] = torch.nan
    location, scale = statistics(flat, "prefix", 3)
    assert location.tolist() == [[[7.25, 0.0]]]
    assert scale.tolist() == [[[1.0, 1.0]]]


def test_generate_and_state_rows():
    """The library's own step loop samples from the head, and its state can be reordered."""
    model = make({"highway": 8})
    values = rows(tokens=3)
    drawn = generate(model, values, max_new=2, sampling=Sampling(temperature=0), seed=0)
    assert drawn.shape == (3, 4, 1, 4)  # two predictions of two patches
    expected = roll(model, Batch(values), 16, levels=LEVELS, mode="point").mean
    torch.testing.assert_close(drawn.transpose(1, 2).flatten(2), expected, rtol=1e-4, atol=1e-3)
    state = index(model.head.init_state(values), torch.tensor([2, 0]))
    assert state["location"].shape[0] == 2


def test_known_covariates_reach_the_prediction():
    model = make({"known": 1})
    inputs = torch.cat((rows(tokens=3), torch.zeros(3, 3, 2, 4)), dim=2)
    later = torch.zeros(3, 4, 1, 4)
    forecasts = []
    for touched in (None, "now", "later"):
        x, known = inputs.clone(), later.clone()
        if touched == "now":
            x[:, -1, 1:] = 5
        if touched == "later":
            known[:, 2:] = 5
        forecasts.append(roll(model, Batch(x, condition={"known": known}), 16, levels=LEVELS, mode="point").mean)
    plain, now, soon = forecasts
    assert (plain - now).abs()[..., :8].max() > 1e-3
    assert torch.equal(plain[..., :8], soon[..., :8])
    assert (plain - soon).abs()[..., 8:].max() > 1e-3
    with pytest.raises(ValueError, match="trained with 1 known covariates"):
        roll(model, Batch(inputs), 16, levels=LEVELS)


def test_a_highway_from_the_last_value_begins_with_it():
    """Untrained it repeats the last value that is there; what it adds moves with the level of the row."""
    model = make({"highway": 8, "level": "last", "output": {"name": "point"}})
    torch.nn.init.zeros_(model.head.out.weight)
    torch.nn.init.zeros_(model.head.out.bias)
    values = rows(tokens=4)
    values[0, -1, 0, -2:] = torch.nan
    past = values[:, :, 0].flatten(1)
    moved = roll(model, Batch(values + 100), 8, levels=LEVELS).mean - roll(model, Batch(values), 8, levels=LEVELS).mean
    torch.testing.assert_close(moved, torch.full_like(moved, 100.0), rtol=1e-4, atol=1e-3)
    torch.nn.init.zeros_(model.head.highway.weight)
    mean = roll(model, Batch(values), 16, levels=LEVELS).mean[:, 0]
    last = torch.stack((past[0, -3], past[1, -1], past[2, -1]))
    torch.testing.assert_close(mean, last.unsqueeze(1).expand_as(mean), rtol=1e-4, atol=1e-3)


def test_copies_begin_as_seasonal_naive_forecasts():
    """Untrained, a model of one lag repeats the last season, and rolls on with it; where some of two copies are missing
    the others stand, and where all are, the mean. The unit is the error of that forecast."""
    model = make({"lags": [6], "output": {"name": "point"}})
    torch.nn.init.zeros_(model.head.out.weight)
    torch.nn.init.zeros_(model.head.out.bias)
    values = rows(tokens=4)
    past = values[:, :, 0].flatten(1)
    found = roll(model, Batch(values), 16, levels=LEVELS).mean[:, 0]
    torch.testing.assert_close(found, past[:, -6:][:, torch.arange(16) % 6], rtol=1e-4, atol=1e-3)
    unit = model.head._scaling(values, 4).unit[:, 0, 0]
    torch.testing.assert_close(unit, (past[:, 6:] - past[:, :-6]).abs().mean(1))

    model = make({"lags": [6, 9], "output": {"name": "point"}})
    torch.nn.init.zeros_(model.head.out.weight)
    torch.nn.init.zeros_(model.head.out.bias)
    gap = values.clone()
    gap.view(3, -1)[:, -6:] = torch.nan
    found = roll(model, Batch(gap), 8, levels=LEVELS).mean[:, 0]
    torch.testing.assert_close(found[:, :3], past[:, -9:-6], rtol=1e-4, atol=1e-3)
    mean = gap.view(3, -1)[:, :-6].mean(1, keepdim=True)
    torch.testing.assert_close(found[:, 3:], mean.expand(3, 5), rtol=1e-4, atol=1e-3)


def test_the_hidden_state_chooses_between_copies():
    """Trained on series of either period, the copy of the right one is taken for each, and bounds are narrow."""
    generator = torch.Generator().manual_seed(0)

    def batch(count):
        period = torch.randint(0, 2, (count, 1), generator=generator)
        shapes = [torch.randn(count, p, generator=generator).repeat(1, 12)[:, :40] for p in (6, 9)]
        return batch_of(torch.where(period == 0, *shapes).view(count, 10, 1, 4))

    model = make({"lags": [6, 9]}, width=48).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        output = model(batch(64))
        (output.loss_sum / output.count).backward()
        optimizer.step()
    test = batch(256)
    found = roll(model.eval(), Batch(test.inputs), 8, levels=LEVELS, mode="point").quantiles[:, 0]
    truth = test.targets[:, -1, 0]
    naive = test.inputs.flatten(1)[:, -6:][:, torch.arange(8) % 6]
    assert (found[..., 2] - truth).abs().mean() < 0.3 * (naive - truth).abs().mean()


def test_seasonal_units_are_those_of_numpy():
    values = rows(tokens=5, channels=2)
    values[1, 2, 0, 2:] = torch.nan
    scale = torch.ones(3, 5, 2)
    for tokens in range(2, 6):
        seen = values[:, :tokens].movedim(2, 1).flatten(2).numpy()
        expected = np.nanmean(np.abs(seen[..., 6:] - seen[..., :-6]), axis=-1)
        running = seasonal_unit(values, 6, "running", 1, scale)[:, tokens - 1]
        np.testing.assert_allclose(running, expected, rtol=1e-5)
        np.testing.assert_allclose(seasonal_unit(values, 6, "prefix", tokens, scale[:, :1])[:, 0], expected, rtol=1e-5)
    assert (seasonal_unit(values, 6, "running", 1, 7 * scale)[:, 0] == 7).all()  # nothing six steps before yet
    again = torch.arange(6.0).repeat(4)[:20].view(1, 5, 1, 4)
    least = seasonal_unit(again, 6, "running", 1, 10 * scale[:1, :, :1])[:, 1:]
    torch.testing.assert_close(least, torch.full_like(least, 10 * LEAST))


class FromTheHost(TorchDispatchMode):
    """Counts tensors that are made of Python numbers, which on a GPU is a copy that a recording refuses."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", [*HEADS, "quantiles and mean", "tokens"])
def test_a_step_can_be_recorded(head):
    """train.graph: no training step makes a tensor of numbers on the host, or reads one there."""
    both = {"output": {"name": "quantiles", "mean": 1.0}, "units": "data", "highway": 8, "dropout": 0.1}
    tokens = {"name": "series_tokens", "patch": 1, "predict": 1, "bins": 8}
    config = {**HEADS, "quantiles and mean": both, "tokens": tokens}[head]
    model = make(config).train()
    patch, predict = (1, 1) if head == "tokens" else (4, 8)
    batch = batch_of(rows(tokens=7, channels=config.get("channels", 1), patch=patch), predict)
    model(batch).loss_sum.backward()  # what is made once is made in the first steps, which are not recorded
    with FromTheHost() as mode:
        model(batch).loss_sum.backward()
    assert mode.found == []


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantiles", "student_t"])
def test_an_output_learns_its_distribution(name):
    """Fitted to draws of a skewed mixture, the quantiles are those of the draws."""
    output = outputs.get(name)(outputs.get(name).Config())
    data = torch.cat((torch.randn(3000) * 0.5 - 1, torch.randn(1000) * 1.5 + 3))
    params = (0.1 * torch.randn(output.size)).requires_grad_()
    optimizer = torch.optim.Adam([params], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        output.loss(params.expand(len(data), -1), data, torch.ones(1)).mean().backward()
        optimizer.step()
    levels = [0.1, 0.5, 0.9]
    fitted = output.quantiles(params.detach(), levels)
    expected = data.quantile(torch.tensor(levels))
    torch.testing.assert_close(fitted, expected, rtol=0.1, atol=0.3)
    draws = output.draw(params.detach().expand(4000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.median(), expected[1], rtol=0.1, atol=0.3)


def test_student_t_is_torchs():
    output = outputs.get("student_t")(outputs.get("student_t").Config(components=1))
    params, target = torch.randn(7, 4), torch.randn(7)
    _, location, spread, freedom = output._parts(params)
    reference = torch.distributions.StudentT(freedom[:, 0], location[:, 0], spread[:, 0])
    torch.testing.assert_close(output.loss(params, target, torch.ones(7)), -reference.log_prob(target))


def test_pinball_and_quantiles():
    loss = pinball(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]), torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(loss, torch.tensor([[0.4, 1.0]]))
    x = torch.randn(3, 11)
    weibull = np.quantile(x.numpy(), LEVELS, axis=-1, method="weibull").T
    np.testing.assert_allclose(quantiles_of(x, LEVELS), weibull, rtol=1e-5)


def test_pooling_paths_that_agree_changes_nothing():
    levels = [i / 10 for i in range(1, 10)]
    spread = torch.randn(2, 1, 5, 9).sort(-1).values
    again = pooled(spread.unsqueeze(1).expand(2, 9, 1, 5, 9), levels)
    torch.testing.assert_close(again, spread)


# -- value tokens -----------------------------------------------------------------------------------------------------


def token_model(**head) -> Model:
    return make({"name": "series_tokens", "patch": 1, "predict": 1, "prefix": 8, "bins": 64, **head})


def test_bins_come_back_within_half_a_width():
    head = token_model().head
    x = torch.linspace(-14.9, 14.9, 101)
    middles = head.middles("cpu")[head.bins(x)]
    assert (middles - x).abs().max() <= 15 / 64 + 1e-6
    assert head.bins(torch.tensor([torch.nan, -99.0, 99.0])).tolist() == [64, 0, 63]


def test_value_tokens_do_not_look_ahead_and_roll():
    model = token_model()
    values = rows(tokens=12, patch=1)
    other = values.clone()
    other[:, 9:] *= 3
    h, g = (model.backbone(model.head.embed(x, Context())[0], Context())[0] for x in (values, other))
    torch.testing.assert_close(h[:, :9], g[:, :9])
    assert torch.isfinite(model(batch_of(values, predict=1)).loss_sum)
    found = roll(model, Batch(values), 5, levels=LEVELS, mode="samples", samples=6)
    assert found.quantiles.shape == (3, 1, 5, 5)
    assert torch.isfinite(found.mean).all()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"predict": 6}, r"head.predict = 6 is not a multiple of head.patch = 4"),
        ({"prefix": 0}, r"head.prefix = 0"),
        ({"lags": [12]}, r"head.lags = \[12\]; .* head.prefix \* head.patch = 12"),
        ({"lags": [6, 0]}, r"head.lags = \[6, 0\]"),
        ({"dropout": 1.0}, r"head.dropout = 1.0"),
        ({"name": "series_tokens"}, r"patch = 4, but head series_tokens makes a token of every value"),
        ({"output": {"name": "quantiles", "levels": [0.5, 0.1]}}, r"levels = \[0.5, 0.1\]"),
    ],
)
def test_wrong_heads_are_named(head, message):
    with pytest.raises(ValueError, match=message):
        make(head)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"inputs have shape \(3, 3, 2, 4\); this model takes \(rows, patches, 1, 4\)"):
        make()(Batch(rows(tokens=3, channels=2)))
