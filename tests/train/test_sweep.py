"""A sweep's replicas are what each would be alone: against torch's own AdamW, against `train`, in any company."""

import json
import os
import signal

import pytest
import torch

from zoo import config, registry
from zoo.config import ConfigError
from zoo.train import Recipe, Replica, checkpoint, chosen_checkpoint, load_run, sweep, train
from zoo.train.optim import OptimizerConfig
from zoo.train.run import autocast
from zoo.train.stack import Stack, adamw_step
from zoo.train.sweeps import first_weights

SMALL = ["task.dataset.train=[[16,2,100],[24,3,40]]", "task.dataset.test=[[16,2,40]]", "train.batch_size=32"]
SMALL += ["train.steps=12", "train.eval_every=4", "train.save_every=4", "train.log_every=2", "train.stop_when=''"]
REPLICAS = [Replica(lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Instead of this folder's toys: the recall domain and its models."""


def small(*words: str) -> Recipe:
    return config.build(Recipe, *config.recipe_layers("recall/smoke", [*SMALL, *words]))


def weights_of(run):
    return {name: p.detach() for name, p in load_run(run)[2].named_parameters()}


def assert_equal_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("mixer", "clip", "decay"),
    [("softmax", 0.05, "all"), ("gatedfwa", 0.05, "matrices"), ("gatedfwa_nsa", 0.0, "all")],
)
def test_a_stack_steps_as_torchs_adamw(mixer, clip, decay):
    recipe = small("model.head.dropout=0.0", f"model.name=recall_{mixer}_d32")
    task = registry.tasks.get("recall")(recipe.task.config)
    options = OptimizerConfig(clip=clip, decay=decay, weight_decay=0.1)
    rates = [1e-3, 3e-2, 1e-2]
    models = [first_weights(Replica(lr, seed).recipe(recipe), task).double() for seed, lr in enumerate(rates)]
    alone = [first_weights(Replica(lr, seed).recipe(recipe), task).double() for seed, lr in enumerate(rates)]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95)) for m, lr in zip(alone, rates, strict=True)
    ]
    stack = Stack(models, options, torch.device("cpu"))
    for optimizer, model in zip(optimizers, alone, strict=True):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = {}
        for p in optimizer.param_groups[0]["params"]:
            groups.setdefault(stack.decay[names[id(p)]], []).append(p)
        first = optimizer.param_groups[0]
        optimizer.param_groups[:] = [{**first, "params": ps, "weight_decay": wd} for wd, ps in groups.items()]
    for _, batch in zip(range(4), task.stream("train", batch_size=32), strict=False):
        reading = stack.train_step(
            batch,
            torch.tensor(rates, dtype=torch.float64),
            torch.ones(3, dtype=torch.bool),
            autocast("fp32", torch.device("cpu")),
        )
        for i, (model, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            output = model(batch)
            optimizer.zero_grad()
            (output.loss_sum / output.count).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
            optimizer.step()
            torch.testing.assert_close(reading.norm[i], norm, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(reading.sums["loss"][0][i], output.loss_sum.detach(), rtol=1e-9, atol=1e-12)
            assert_equal_weights(stack.replica(i), dict(model.named_parameters()), rtol=1e-7, atol=1e-9)
    assert stack.updates.tolist() == [4.0] * 3


def test_a_replica_is_the_run_that_train_makes(tmp_path):
    recipe = small("model.head.dropout=0.0")
    runs = sweep(recipe, tmp_path / "sweep", REPLICAS)
    for run, replica in zip(runs, REPLICAS, strict=True):
        alone = train(replica.recipe(recipe), tmp_path / "alone" / replica.name).run
        assert_equal_weights(weights_of(run), weights_of(alone), rtol=1e-3, atol=2e-5)
        ours, theirs = (json.loads((chosen_checkpoint(r) / "manifest.json").read_text()) for r in (run, alone))
        for fact in ("recipe", "fingerprint", "seed", "data", "step"):
            assert ours[fact] == theirs[fact], fact
        rows = {}
        for folder in (run, alone):
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            rows[folder] = [(row["step"], row["valid/loss"]) for row in lines if "valid/loss" in row]
        assert [step for step, _ in rows[run]] == [4, 8, 12]
        for one, other in zip(rows[run], rows[alone], strict=True):
            assert one == pytest.approx(other, rel=1e-3)


def test_company_changes_nothing_dropout_included(tmp_path):
    recipe = small("model.head.dropout=0.3")
    together = sweep(recipe, tmp_path / "all", REPLICAS)
    for run, replica in zip(together[1:3], REPLICAS[1:3], strict=True):
        (alone,) = sweep(recipe, tmp_path / replica.name, [replica])
        assert_equal_weights(weights_of(run), weights_of(alone), rtol=1e-3, atol=2e-5)
    assert weights_of(together[0]).keys() == weights_of(together[1]).keys()
    assert not torch.equal(weights_of(together[0])["head.embed.weight"], weights_of(together[1])["head.embed.weight"])


def test_a_replica_that_breaks_down_takes_none_along(tmp_path):
    recipe = small("train.optimizer.clip=0.0", "train.max_skipped=1")
    good, wild = Replica(1e-2, 0), Replica(1e38, 1)
    runs = sweep(recipe, tmp_path / "both", [good, wild])
    (alone,) = sweep(recipe, tmp_path / "alone", [good])
    assert_equal_weights(weights_of(runs[0]), weights_of(alone), rtol=1e-3, atol=2e-5)
    assert checkpoint.read_manifest(chosen_checkpoint(runs[1]))["step"] < 12
    assert all(p.isfinite().all() for p in weights_of(runs[1]).values())


def test_evaluation_takes_batches_of_its_own_size(tmp_path):
    rows = []
    for words in ([], ["train.eval_batch_size=9"]):
        (run,) = sweep(small(*words), tmp_path / str(len(words)), REPLICAS[:1])
        rows.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_early_end_is_each_ones_own(tmp_path):
    recipe = small("train.steps=16", "train.stop_when=loss < 3.45")
    runs = sweep(recipe, tmp_path / "stopped", [Replica(1e-5, 0), Replica(3e-2, 0), Replica(2e-5, 1)])
    steps = [checkpoint.read_manifest(chosen_checkpoint(run))["step"] for run in runs]
    assert steps[0] == steps[2] == 16
    assert steps[1] < 16
    assert checkpoint.read_state(chosen_checkpoint(runs[1]))["finished"] == "loss < 3.45"
    free = sweep(small("train.steps=16"), tmp_path / "free", [Replica(1e-5, 0), Replica(2e-5, 1)])
    for run, other in zip((runs[0], runs[2]), free, strict=True):
        assert_equal_weights(weights_of(run), weights_of(other), rtol=1e-3, atol=2e-5)
    assert not (tmp_path / "stopped" / "checkpoints").exists()


@pytest.mark.parametrize("mixer", registry.mixers.names())
def test_every_mixer_of_the_recall_comparison_can_be_stacked(mixer, tmp_path):
    words = [f"model.name=recall_{mixer}_d32", "model.backbone.mlp=swiglu", "train.steps=2", "train.eval_every=0"]
    words += ["model.head.dropout=0.0"]
    replica = REPLICAS[1]
    together = sweep(small(*words), tmp_path / "all", REPLICAS[:2])
    alone = train(replica.recipe(small(*words)), tmp_path / "alone").run
    assert_equal_weights(weights_of(together[1]), weights_of(alone), rtol=1e-3, atol=2e-5)


def test_all_may_end_early(tmp_path):
    runs = sweep(small("train.stop_when=loss < 9"), tmp_path, REPLICAS)
    assert [checkpoint.read_manifest(chosen_checkpoint(run))["step"] for run in runs] == [4] * 4


@pytest.mark.parametrize(("compiled", "sizes"), [("false", {2, 1}), ("true", {2})])
def test_a_compiled_stack_is_not_compiled_anew_near_the_end(compiled, sizes, tmp_path, monkeypatch):
    def plain(self):
        self._compiled, self._compiled_update = self._hidden, adamw_step

    real, seen = Stack.train_step, set()

    def step(self, *args, **options):
        seen.add(len(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Stack, "_compile", plain)
    monkeypatch.setattr(Stack, "train_step", step)
    words = ["train.steps=16", "train.stop_when=loss < 3.45", f"train.compile={compiled}"]
    runs = sweep(small(*words), tmp_path, [Replica(1e-5, 0), Replica(3e-2, 0)])
    steps = [checkpoint.read_manifest(chosen_checkpoint(run))["step"] for run in runs]
    assert seen == sizes
    assert steps[1] < steps[0] == 16


def test_an_interrupted_sweep_goes_on_as_if_nothing_was(tmp_path, monkeypatch):
    recipe = small("model.head.dropout=0.3")
    whole = sweep(recipe, tmp_path / "whole", REPLICAS)
    real, calls = Stack.train_step, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(Stack, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        sweep(recipe, tmp_path / "cut", REPLICAS)
    assert stopped.value.code == 128 + signal.SIGTERM
    with pytest.raises(ConfigError, match="another sweep"):
        sweep(small("train.optimizer.weight_decay=0.3"), tmp_path / "cut", REPLICAS)
    runs = sweep(recipe, tmp_path / "cut", REPLICAS)
    assert len(calls) == 12
    for run, other in zip(runs, whole, strict=True):
        assert_equal_weights(weights_of(run), weights_of(other), rtol=0, atol=0)
        assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert sweep(recipe, tmp_path / "cut", REPLICAS) == runs
    assert len(calls) == 12  # done: nothing was trained


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train.ema=0.9", "train.ema"),
        ("train.micro_batch_size=8", "micro_batch_size"),
        ("train.precision=fp16", "fp32 or bf16"),
        ("train.optimizer.name=lion", "take adamw"),
    ],
)
def test_what_a_stack_cannot_do_is_named(words, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        sweep(small(words), tmp_path, REPLICAS)


def test_compiled_as_one_graph_it_is_the_same():
    recipe = small("model.head.dropout=0.1")
    task = registry.tasks.get("recall")(recipe.task.config)
    batch = next(iter(task.stream("train", batch_size=16)))
    results = []
    for compiled in (False, True):
        models = [first_weights(Replica(1e-3, seed).recipe(recipe), task) for seed in range(3)]
        stack = Stack(models, OptimizerConfig(), torch.device("cpu"))
        torch._dynamo.reset()
        stack._compiled = torch.compile(stack._hidden, backend="aot_eager", fullgraph=True, dynamic=False)
        stack._compiled_update = torch.compile(adamw_step, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.manual_seed(0)
        place, on = autocast("fp32", torch.device("cpu")), torch.ones(3, dtype=torch.bool)
        reading = stack.train_step(batch, torch.full((3,), 1e-3), on, place, compiled=compiled)
        results.append((reading.norm, stack.replica(2)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    assert_equal_weights(results[1][1], results[0][1], rtol=1e-3, atol=1e-5)


def test_a_recorded_sweep_is_the_plain_one(tmp_path, recordings):
    """Two lengths, smaller batches at the end of a segment, and a stack that shrinks when replicas have ended."""
    words = ["model.head.dropout=0.3", "train.steps=30", "train.eval_every=6", "train.stop_when=loss < 3.45"]
    replicas = [Replica(1e-5, 0), Replica(3e-2, 0), Replica(3e-2, 1), Replica(2e-5, 1)]
    plain, ours = (sweep(small(*words, f"train.graph={on}"), tmp_path / on, replicas) for on in ("false", "true"))
    assert sum(recordings) >= 8
    steps = [checkpoint.read_manifest(chosen_checkpoint(run))["step"] for run in ours]
    assert min(steps) < max(steps) == 30
    for run, other in zip(ours, plain, strict=True):
        assert_equal_weights(weights_of(run), weights_of(other), rtol=0, atol=0)
        assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["swa", "gatedfwa", "gatedfwa_nsa"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_on_a_gpu_a_recorded_sweep_is_the_plain_one(mixer, compiled, tmp_path):
    words = ["model.head.dropout=0.1", f"model.name=recall_{mixer}_d64", "train.device=cuda", "train.precision=bf16"]
    words += [f"train.compile={compiled}", "train.steps=40", "train.eval_every=20", "task.dataset.vocabulary=256"]
    words += ["task.dataset.train=[[64,4,320]]", "task.dataset.test=[[64,4,64]]"]
    plain, ours = (sweep(small(*words, f"train.graph={on}"), tmp_path / on, REPLICAS) for on in ("false", "true"))
    for run, other in zip(ours, plain, strict=True):
        rows = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other)]
        for one, two in zip(*rows, strict=True):
            assert one == pytest.approx(two, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["softmax", "swa", "gatedfwa", "gatedfwa_nsa"])
def test_on_a_gpu_in_bf16_and_compiled(mixer, tmp_path):
    """Heads of 64, as the kernels take them: in company as alone, and it learns."""
    words = ["model.head.dropout=0.0", f"model.name=recall_{mixer}_d64", "train.device=cuda", "train.precision=bf16"]
    words += ["train.compile=true", "train.steps=40", "train.eval_every=20", "task.dataset.train=[[64,4,320]]"]
    recipe = small(*words, "task.dataset.vocabulary=256", "task.dataset.test=[[64,4,64],[128,4,64]]")
    replicas = [Replica(1e-3, 0), Replica(3e-3, 1), Replica(1e-3, 2)]
    together = sweep(recipe, tmp_path / "all", replicas)
    (alone,) = sweep(recipe, tmp_path / "one", [replicas[1]])
    losses = {}
    for run in (together[1], alone):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[run] = [row["valid/loss"] for row in lines if "valid/loss" in row]
    assert losses[together[1]] == pytest.approx(losses[alone], rel=0.02)
    assert losses[alone][-1] < 5.6  # ln 256 is 5.55 and what it begins with is above it
