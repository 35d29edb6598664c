"""The recall domain: the generators against their definitions, the stream, the head at labelled places, the recipes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.recall.data import MQAR, Needle, SegmentStream, SelectiveCopy, distinct, weighted_distinct
from zoo import config, list_models, registry
from zoo.config import ConfigError, list_recipes, recipe_layers
from zoo.model import Batch
from zoo.task import run_metrics
from zoo.train import Recipe
from zoo.train.recipe import make_model, make_task


def made(kind, **fields):
    return kind(config.build(kind.Config, fields))


def mqar(length=24, pairs=3, examples=500, **fields):
    return made(MQAR, vocabulary=64, train=[[length, pairs, examples]], test=[[length, pairs, 50]], **fields)


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(("length", "pairs"), [(24, 3), (12, 3), (40, 1)])
def test_mqar_is_what_zoology_describes(length, pairs, random_non_queries):
    (part,) = mqar(length, pairs, random_non_queries=random_non_queries).segments("train")
    assert part.tokens.shape == (500, length)
    assert part.places.shape == part.values.shape == (500, pairs)
    for tokens, places, values in zip(part.tokens.tolist(), part.places.tolist(), part.values.tolist(), strict=True):
        keys, shown = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len({*keys}) == len({*shown}) == pairs
        assert all(1 <= key < 32 for key in keys)
        assert all(32 <= value < 64 for value in shown)
        assert [tokens[place] for place in places] == keys  # asked for in order j, wherever that is
        assert values == shown
        assert len({*places}) == pairs
        assert all(place >= 2 * pairs and (place - 2 * pairs) % 2 == 0 for place in places)
        rest = [tokens[i] for i in range(2 * pairs, length) if i not in places]
        assert random_non_queries or set(rest) <= {0}
    if random_non_queries and length > 4 * pairs:
        assert (part.tokens == 0).float().mean() < 0.1


def test_mqar_draws_from_the_right_distribution():
    """Against numpy's own draws row by row, as Zoology makes them: slots of the first and last key, and the keys."""
    length, pairs, rows = 40, 4, 4000
    (part,) = mqar(length, pairs, rows).segments("train")
    slots = (length - 2 * pairs) // 2
    weights = np.arange(1, slots + 1) ** (0.01 - 1.0)
    rng = np.random.default_rng(0)
    theirs = np.stack([rng.choice(slots, pairs, replace=False, p=weights / weights.sum()) for _ in range(rows)])
    ours = (part.places.numpy() - 2 * pairs) // 2
    for column in (0, pairs - 1):
        counts = [np.bincount(x[:, column], minlength=slots) for x in (ours, theirs)]
        assert chi_square(*counts) < 45  # 16 cells: 15 degrees of freedom, p = 1e-4 at 44.3
    keys = np.bincount(part.tokens[:, : 2 * pairs : 2].flatten().numpy(), minlength=32)[1:32]
    assert chi_square(keys, np.full(31, keys.sum() / 31), expected=True) < 66  # 30 degrees of freedom


def chi_square(counts, other, *, expected=False):
    if expected:
        return float(((counts - other) ** 2 / other).sum())
    return float(((counts - other) ** 2 / np.maximum(counts + other, 1)).sum())


def test_draws_without_replacement():
    rng = np.random.default_rng(0)
    whole = distinct(rng, 300, 7, 7)
    assert (np.sort(whole, axis=1) == np.arange(7)).all()
    places = np.stack([np.bincount(distinct(rng, 6000, 2, 5)[:, column], minlength=5) for column in (0, 1)])
    assert abs(places / 6000 - 0.2).max() < 0.025  # every number equally likely at every place
    heavy = weighted_distinct(rng, 2000, 3, np.array([1e6, 1.0, 1.0, 1e3]))
    assert (heavy[:, 0] == 0).mean() > 0.99
    assert (heavy[:, 1] == 3).mean() > 0.98
    assert all(len({*row}) == 3 for row in heavy.tolist())


def test_selective_copy():
    (part,) = made(SelectiveCopy, symbols=5, train=[[20, 4, 300]], test=[[20, 4, 5]]).segments("train")
    assert part.tokens.shape == (300, 24)
    for tokens, places, values in zip(part.tokens.tolist(), part.places.tolist(), part.values.tolist(), strict=True):
        assert places == [20, 21, 22, 23]
        assert tokens[20:] == [SelectiveCopy.MARK] * 4
        assert [token for token in tokens[:20] if token != SelectiveCopy.BLANK] == values
        assert all(2 <= value < 7 for value in values)


def test_needle_stands_at_its_distance():
    task = made(Needle, noise=4, symbols=3, spread=2, train=[[30, 20, 400]], test=[[30, 20, 5]])
    (part,) = task.segments("train")
    mark = task.vocabulary - 1
    found = set()
    for tokens, places, values in zip(part.tokens.tolist(), part.places.tolist(), part.values.tolist(), strict=True):
        at = [i for i, token in enumerate(tokens) if token == mark]
        assert len(at) == 2
        assert at[1] == 29 == places[0]
        assert tokens[at[0] + 1] == values[0]
        assert 4 <= values[0] < 7
        found.add(29 - at[0])
    assert found == {18, 19, 20}


def test_the_seed_decides_and_the_digest_tells():
    one, same, other = mqar(), mqar(), mqar(seed=7)
    assert one.provenance() == same.provenance() != other.provenance()
    assert torch.equal(one.segments("valid")[0].tokens, one.segments("test")[0].tokens)
    assert not torch.equal(one.segments("train")[0].tokens[:50], one.segments("test")[0].tokens)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (MQAR, {"train": [[10, 3, 5]]}, "at least 4 pairs"),
        (MQAR, {"train": [[64, 4]]}, "it takes .'length', 'pairs', 'examples'"),
        (MQAR, {"vocabulary": 32, "train": [[64, 4, 5]]}, "vocabulary = 32"),
        (SelectiveCopy, {"train": [[4, 5, 5]]}, "copied = 5"),
        (Needle, {"train": [[20, 20, 5]]}, "distance = 20"),
    ],
)
def test_segments_that_cannot_be_are_named(kind, fields, words):
    with pytest.raises((ValueError, ConfigError), match=words):
        made(kind, **fields)


# ---------------------------------------------------------------------------------------------------------------------


def parts():
    return [mqar(24, 3, 50).segments("train")[0], mqar(12, 2, 17).segments("train")[0]]


def test_batches_never_mix_segments_and_nothing_is_lost():
    batches = list(SegmentStream(parts(), batch_size=16))
    assert SegmentStream(parts(), batch_size=16).batches == len(batches)
    assert [tuple(batch.inputs.shape) for batch in batches] == [(16, 24)] * 3 + [(2, 24), (16, 12), (1, 12)]
    assert torch.equal(torch.cat([b.inputs for b in batches[:4]]), parts()[0].tokens.long())
    assert [int(b.targets["segment"][0]) for b in batches] == [0] * 4 + [1] * 2


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_every_example(world):
    streams = [SegmentStream(parts(), batch_size=4, rank=rank, world=world) for rank in range(world)]
    seen = [row for stream in streams for batch in stream for row in batch.inputs.tolist()]
    whole = [row for part in parts() for row in part.tokens.tolist()]
    assert sorted(map(tuple, seen)) == sorted(map(tuple, whole))


def test_training_goes_on_where_it_was():
    stream = SegmentStream(parts(), batch_size=16, endless=True)
    first = [batch for _, batch in zip(range(9), stream, strict=False)]
    assert torch.equal(first[6].inputs, first[0].inputs)  # the second pass, in the same order
    again = SegmentStream(parts(), batch_size=16, endless=True)
    for _ in zip(range(4), again, strict=False):
        state = again.state_dict()
    resumed = SegmentStream(parts(), batch_size=16, endless=True)
    resumed.load_state_dict(state)
    assert torch.equal(next(iter(resumed)).inputs, first[4].inputs)


# ---------------------------------------------------------------------------------------------------------------------


def small(*words):
    return config.build(
        Recipe, *recipe_layers("recall/smoke", ["task.dataset.train=[[16,2,64]]", "model.head.dropout=0.0", *words])
    )


@pytest.fixture
def task_and_model():
    recipe = small()
    task = make_task(recipe)
    torch.manual_seed(0)
    return task, make_model(recipe, task).double()


def test_the_head_scores_answers_alone(task_and_model):
    task, model = task_and_model
    batch = next(iter(task.stream("valid", batch_size=8)))
    h, _ = model.backbone(model.head.embed(batch.inputs, batch.ctx)[0], batch.ctx)
    dense = torch.full(batch.inputs.shape, -100)
    dense.scatter_(1, batch.targets["places"], batch.targets["values"])
    logits = h @ model.head.weight.T
    want = F.cross_entropy(logits.flatten(0, 1), dense.flatten(), reduction="sum")
    output = model.eval()(batch)
    torch.testing.assert_close(output.loss_sum, want)
    assert int(output.count) == (dense >= 0).sum() == 16
    right = (logits.argmax(-1) == dense).double().sum(1) / 2
    torch.testing.assert_close(output.metrics["accuracy"][0].double(), right.sum())
    assert int(output.metrics["accuracy"][1]) == 8
    assert not model.train()(batch).metrics  # it would cost as much as the loss
    ours = torch.autograd.grad(model(batch).loss_sum, model.head.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(want, model.head.weight)[0]
    torch.testing.assert_close(ours, theirs)


def test_accuracy_is_pooled_over_examples_and_told_by_segment(task_and_model, monkeypatch):
    task, model = task_and_model

    def right(answers, batch):
        """All answers of the first segment, the first one of every second example of the other."""
        found = torch.zeros(batch.targets["values"].shape, dtype=torch.bool)
        found[batch.targets["segment"] == 0] = True
        found[:, 0] |= batch.inputs[:, 0] % 2 == 0
        return found

    monkeypatch.setattr(model.head, "right", right)
    values = run_metrics(model, task.metrics("test"), task.stream("test", batch_size=64))
    even = (task.data.segments("test")[1].tokens[:, 0] % 2 == 0).double().mean().item() / 2
    assert values["accuracy_16x2"] == 1.0
    assert values["accuracy_24x2"] == pytest.approx(even)
    assert values["accuracy"] == pytest.approx((1 + even) / 2)


def test_answers_are_compared_in_parts(task_and_model, monkeypatch):
    task, model = task_and_model
    batch = next(iter(task.stream("valid", batch_size=8)))
    answers = torch.randn(8, 2, 32, dtype=torch.float64)
    whole = model.head.right(answers, batch)
    monkeypatch.setattr("tasks.recall.head.ROWS_AT_ONCE", 8)
    assert torch.equal(model.head.right(answers, batch), whole)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("recall/")])
def test_every_recipe_takes_a_step(name):
    words = ["train.compile=false", "train.precision=fp32"]
    recipe = config.build(Recipe, *recipe_layers(name, words))
    entry = registry.datasets.get(recipe.task.config.dataset.name)
    cut = [[*numbers[:-1], 4] for numbers in recipe.task.config.dataset.config.train]
    data = {"dataset": {"train": cut, "test": cut[:1]}}
    recipe = config.build(Recipe, recipe, {"task": data})
    assert entry.name == recipe.task.config.dataset.name
    task = make_task(recipe)
    model = make_model(recipe, task)
    for batch in task.stream("test", batch_size=2):
        output = model(batch)
        output.loss_sum.backward()
        assert output.loss.item() == pytest.approx(np.log(task.data.vocabulary), rel=0.25)


@pytest.mark.parametrize("name", list_models("recall_*_d32"))
def test_every_model_takes_a_batch(name):
    recipe = small(f"model.name={name}")
    task = make_task(recipe)
    model = make_model(recipe, task)
    assert model.config.backbone.layers()[0].name == "baseconv"
    output = model(next(iter(task.stream("train", batch_size=4))))
    assert output.loss_sum.isfinite()
    assert "norm" not in " ".join(name for name, _ in model.backbone.blocks[1].mixer.named_parameters())


def test_a_model_samples_from_a_prompt(task_and_model):
    from zoo.generation import Sampling, generate

    task, model = task_and_model
    prompt = task.prompt([3, 20, 5, 21, 3])
    drawn = generate(model, prompt, max_new=1, sampling=Sampling(temperature=0))
    assert drawn.shape == (1, 1)
    assert isinstance(task.artefact(drawn[0]), list)
    assert isinstance(prompt, Batch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_attention_recalls_and_a_short_window_does_not(tmp_path):
    """RELATED.md 11.4 in miniature: the needed pair is within reach of full attention alone."""
    from zoo.train import Replica, load_run, sweep

    words = ["task.dataset.vocabulary=256", "task.dataset.train=[[64,4,8000]]", "task.dataset.test=[[64,4,400]]"]
    words += ["train.steps=1500", "train.eval_every=125", "train.optimizer.lr=3e-3", "train.save_every=0"]
    found = {}
    for mixer, window in (("softmax", None), ("swa", 4)):
        extra = [f"model.name=recall_{mixer}_d32"] + ([f"model.backbone.mixer.window={window}"] if window else [])
        recipe = config.build(Recipe, *recipe_layers("recall/smoke", [*words, *extra]))
        (run,) = sweep(recipe, tmp_path / mixer, [Replica(3e-3, 0)])
        _, task, model = load_run(run)
        found[mixer] = run_metrics(model, task.metrics("test"), task.stream("test", batch_size=100))["accuracy"]
    print(found)
    assert found["softmax"] > 0.95, found
    assert found["swa"] < 0.5, found
