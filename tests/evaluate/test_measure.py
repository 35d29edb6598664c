"""Measurements against brute force; what speed measures; tables and their spread."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zoo import config, registry
from zoo.data import SourceStream, StridedWindows, Windows
from zoo.evaluate import speed
from zoo.evaluate.measure import ByPosition, Longest, elements, octaves, tokens_seen
from zoo.evaluate.plots import AXES, finish, in_powers_of_two
from zoo.evaluate.report import figure, section_tables, table
from zoo.evaluate.summary import best_rates, lines, series
from zoo.model import Batch, Context
from zoo.task import run_metrics
from zoo.train import Recipe
from zoo.train.recipe import make_model, make_task


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = registry.models.get("text_gatedfwa_1m")()
    small = {"backbone": {"width": 32, "depth": 1, "heads": 2, "mixer": {"window": 8}}, "head": {"vocabulary": 11}}
    return config.build(type(size), size, small).build().eval()


def test_octaves():
    assert octaves(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert octaves(16) == [(0, 16)]
    assert octaves(5) == [(0, 5)]


@torch.no_grad()
def test_loss_by_position_is_that_of_its_tokens(model):
    tokens = np.random.default_rng(0).integers(0, 11, 201)
    by_place, longest = ByPosition(), Longest()
    stream = SourceStream(StridedWindows(tokens, 40), batch_size=2, endless=False)
    with longest.watching(model):
        run_metrics(model, {"p": by_place, "l": longest}, stream)
    found = by_place.losses()
    assert list(found) == [0, 16, 32]
    rows = torch.from_numpy(tokens[:200]).view(5, 40)
    h, _ = model.backbone(model.head.embed(rows, Batch(None).ctx)[0], Batch(None).ctx)
    wanted = torch.from_numpy(tokens[1:]).view(5, 40)
    losses = F.cross_entropy((h @ model.head.out_weight.T).flatten(0, 1), wanted.flatten(), reduction="none").view(
        5, 40
    )
    for begin, end in ((0, 16), (16, 32), (32, 40)):
        assert found[begin] == pytest.approx(losses[:, begin:end].mean().item(), rel=1e-5)
    assert longest.tokens == 40
    assert not model.backbone._forward_pre_hooks


def test_loss_by_position_refuses_a_head_that_it_does_not_understand(model):
    with pytest.raises(ValueError, match="leave it out here"):
        ByPosition().update(torch.nn.Linear(1, 1), Batch(None))


def test_tokens_seen():
    windows = SourceStream(Windows(np.arange(300) % 7, 20, seed=0), batch_size=3)
    assert tokens_seen(windows, [2, 5]) == {2: 120, 5: 300}
    uneven = [Batch(torch.zeros(2, n, dtype=torch.int64), torch.zeros(2, n)) for n in (4, 6, 8)]
    assert tokens_seen(uneven, [1, 3]) == {1: 8, 3: 36}
    assert elements(Batch({"codes": torch.zeros(3, 5, 2)}, {"a": torch.zeros(3, 5)})) == 15


@pytest.mark.parametrize("mixer", registry.mixers.names())
@torch.inference_mode()
def test_a_decoding_step_for_speed_goes_on_from_the_state(mixer):
    """What is timed is the real thing: each call moves every row one token on, in what it remembers, too."""
    recipe = config.build(Recipe, *config.recipe_layers("text/smoke", [f"model.name=text_{mixer}_1m"]))
    torch.manual_seed(0)
    model, cpu = make_model(recipe, make_task(recipe)).eval(), torch.device("cpu")
    tokens = torch.randint(256, (1, 20))
    cache = speed.filled(model, Batch(tokens), 20, 3, recipe, cpu)
    assert cache["position"].tolist() == [20, 20, 20]
    token = tokens[:, :1].repeat(3, 1)
    step = speed.decoding(model, cache, token, recipe, cpu)
    for longer in range(1, 5):
        row = torch.cat((tokens, tokens[:, :1].expand(1, longer)), dim=1)
        h, _ = model.backbone(model.head.embed(row, Context())[0], Context())
        torch.testing.assert_close(step(), model.head.logits(h[:, -1], None).expand(3, -1), rtol=1e-4, atol=1e-4)
        assert cache["position"].tolist() == [20 + longer] * 3


def test_decoding_is_timed_a_step(model):
    recipe = config.build(Recipe, *config.recipe_layers("text/smoke"))
    seconds = speed.decode_seconds(model, Batch(torch.randint(11, (1, 20))), 20, 3, recipe, torch.device("cpu"))
    assert 0 < seconds < 1


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["softmax", "gatedfwa", "gatedfwa_nsa", "baseconv"])
def test_a_decoding_step_on_a_gpu_is_one_graph(mixer):
    words = ["train.precision=bf16", f"model.name=text_{mixer}_1m"]
    recipe, cuda = config.build(Recipe, *config.recipe_layers("text/smoke", words)), torch.device("cuda")
    model = make_model(recipe, make_task(recipe)).to(cuda).eval()
    batch = Batch(torch.randint(256, (1, 200), device=cuda))
    assert 0 < speed.decode_seconds(model, batch, 200, 4, recipe, cuda) < 0.1
    assert speed.prefill_seconds(model, batch, 200, recipe, cuda) > 0


# ---------------------------------------------------------------------------------------------------------------------


def row(model, lr, seed, value, name="accuracy", measurement="scores", **more):
    identity = {"suite": "s", "experiment": "e", "section": "e", "title": "", "model": model, "arm": "", "lr": lr}
    return {**identity, "seed": seed, "measurement": measurement, "name": name, "at": {}, "value": value, **more}


def test_the_best_rate_by_the_mean_of_its_seeds():
    rows = [row("a", 0.1, 0, 0.9), row("a", 0.1, 1, 0.1), row("a", 0.2, 0, 0.6), row("a", 0.2, 1, 0.6)]
    rows += [row("b", 0.1, 0, 2.0, name="loss"), row("b", 0.2, 0, 1.0, name="loss")]
    assert best_rates(rows) == {("a", ""): 0.2, ("b", ""): 0.2}
    a, b = lines(rows)
    assert (a.rate, a.values["accuracy"].mean, a.values["accuracy"].seeds) == (0.2, 0.6, 2)
    assert b.values["loss"].mean == 1.0
    curve = [row("a", lr, 0, lr, name="valid/loss", measurement="curve", at={"tokens": 5}) for lr in (0.1, 0.2)]
    (points,) = series([*rows, *curve], "curve", "valid/loss", "tokens").values()
    assert [(place, spread.mean) for place, spread in points] == [(5, 0.2)]


def test_a_rate_that_lacks_seeds_does_not_compete_and_the_page_says_so():
    plan = {"planned": {"rates": [0.1, 0.2, 0.3], "seeds": [0, 1], "measure": ["scores"]}, "of": 1}
    rows = [row(model, 0.1, seed, 0.5, **plan) for model in "ab" for seed in (0, 1)]
    rows += [row("a", 0.2, 0, 0.9, **plan), row("a", 0.3, 0, 0.95, **plan), row("a", 0.3, 1, None, **plan)]
    rows += [row("b", rate, seed, 0.4, **plan) for rate in (0.2, 0.3) for seed in (0, 1)]
    for order in (rows, rows[::-1]):
        assert best_rates(order) == {("a", ""): 0.1, ("b", ""): 0.1}
        text = section_tables(order)
        assert "| a † | 0.1 | 2 | 0.5000 ± 0.0000 |" in text
        assert "| b | 0.1 | 2 |" in text
        said = "measured in full: lr 0.1 seeds 0, 1; lr 0.2 seeds 0; lr 0.3 seeds 0, 1; "
        assert f"† a is not complete; {said}planned: lr 0.1, 0.2, 0.3 with seeds 0, 1 each." in text
        assert "b is not complete" not in text
    without = [r for r in rows if r["model"] == "b" and (r["lr"], r["seed"]) != (0.1, 0)]
    assert best_rates(without) == {("b", ""): 0.2}
    half = [{**r, "of": 2} for r in rows if r["model"] == "b"]  # a number of each measurement is missing
    assert "measured in full: none;" in section_tables(half)


def test_mean_and_sample_deviation_in_the_table():
    rows = [row("a", 0.1, seed, value, parameters=1234567) for seed, value in enumerate((0.5, 0.6, 0.7))]
    rows += [row("a", 0.1, seed, 5153.0, name="passages") for seed in range(3)]
    text = section_tables(rows)
    assert "| a | 1,234,567 | 3 | 0.6000 ± 0.1000 |" in text
    assert "passages" not in text  # a count that is the same for all
    assert table(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | ---: |\n| 1 | 2 |"
    assert [figure(x) for x in (None, 7, 0.12345, 1234.5, 3.2e10)] == ["", "7", "0.1235", "1,234", "3.2e+10"]


def test_a_published_value_is_shown_whichever_row_comes_first():
    """The row that holds it comes last once it was measured again."""
    rows = [row("a", 0.1, 1, 0.6), row("a", 0.1, 0, 0.5, published=0.925)]
    for order in (rows, rows[::-1]):
        assert lines(order)[0].facts["published"] == 0.925
        assert "0.925" in section_tables(order)


def test_ticks_at_powers_of_two():
    from matplotlib.figure import Figure

    shown = {0: "0", 16: "16", 512: "512", 1024: "1Ki", 1536: "1.5Ki", 65536: "64Ki", 1 << 20: "1Mi", 1 << 40: "1024Gi"}
    assert {at: in_powers_of_two(at, 0) for at in shown} == shown
    for what in ("length, tokens", AXES["positions"][1]):
        axes = Figure().subplots()
        axes.plot([16, 1024, 65536], [1.0, 2.0, 3.0])
        finish(axes, what, "accuracy", logarithmic=True)
        assert axes.xaxis.get_major_formatter()(65536) == "64Ki"
    finish(axes := Figure().subplots(), "tokens trained on", "loss", logarithmic=False)
    assert axes.xaxis.get_major_formatter()(65000) == "65k"
