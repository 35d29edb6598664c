"""The step: sums and counts, the guard, schedules, parameter groups, the moving average."""

import itertools
import json
import math
import os
import re
import sys

import pytest
import torch
from torch import nn
from toytask import Faults, FaultyModel, FaultyModelConfig, ToyConfig, ToyModel, ToyModelConfig, ToyTask, recipe

from zoo import config as configs
from zoo.config import ConfigError
from zoo.train import Recipe, TrainConfig, checkpoint, optim, train
from zoo.train.log import RunLog, figure
from zoo.train.optim import Ema, Guard, OptimizerConfig, ScheduleConfig
from zoo.train.profile import peak_flops, training_flops
from zoo.train.run import Diverged, batches_of


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(tmp_path):
    made = recipe(steps=150, log_every=50, eval_every=150, save_every=0, model=FaultyModelConfig(dropout=0.0))
    made.train.optimizer.lr = 0.03
    result = train(made, tmp_path)
    assert result.metrics["train/loss"] < rows(tmp_path)[0]["train/loss"]
    assert result.metrics["valid/loss"] < math.log(11) + 0.1
    assert {"train/loss", "train/accuracy", "train/gradient_norm", "valid/loss"} <= set(result.metrics)
    assert result.skipped == 0
    assert result.checkpoint.name == "step-00000150"


def test_micro_batches_of_uneven_counts_equal_one_batch(tmp_path):
    weights = []
    for micro in (8, 4, 2, 1):
        made = recipe(micro_batch_size=micro, model=FaultyModelConfig(dropout=0.0), log_every=1)
        train(made, tmp_path / str(micro))
        path, _ = checkpoint.latest(tmp_path / str(micro) / "checkpoints")
        weights.append(
            (checkpoint.read_tensors(path, "model"), [row["train/loss"] for row in rows(tmp_path / str(micro))])
        )
    for tensors, losses in weights[1:]:
        for name, tensor in weights[0][0].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
        assert losses == pytest.approx(weights[0][1], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The guard


def state_of(model, optimizer, ema):
    tensors, numbers = optim.optimizer_state(model, optimizer)
    named = {**dict(model.named_parameters()), **tensors, **{f"ema/{k}": v for k, v in ema.model.state_dict().items()}}
    return {name: tensor.detach().clone() for name, tensor in named.items()}, numbers


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adopt", "nadamw"])
@pytest.mark.parametrize("fault", ["loss", "gradient", "nothing scored"])
@pytest.mark.parametrize("first", [True, False])
def test_skipped_step_changes_nothing(name, fault, first):
    torch.manual_seed(0)
    model = ToyModel(ToyModelConfig())
    optimizer = optim.make_optimizer(model, OptimizerConfig(name=name, lr=0.01))
    guard, ema = Guard.new(torch.device("cpu")), Ema(model, 0.9)

    def step(loss, count, poison):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if poison:
            model.mix.weight.grad[0, 0] = float("inf")
        _, taken = optim.guarded_step(optimizer, guard, torch.tensor(loss), torch.tensor(count), clip=1.0, fp16=False)
        ema.update(model, ema.share_of(100), taken)

    if not first:
        step(1.0, 4.0, False)
    before = state_of(model, optimizer, ema)
    step(float("nan") if fault == "loss" else 1.0, 0.0 if fault == "nothing scored" else 4.0, fault == "gradient")
    after = state_of(model, optimizer, ema)
    for key, tensor in before[0].items():
        assert torch.equal(tensor, after[0][key]), key
    if first:
        assert all(not tensor.any() for key, tensor in after[0].items() if key not in before[0])
    else:
        assert before[1] == after[1]
    assert guard.skipped == 1
    assert guard.in_a_row == (fault != "nothing scored")
    for _ in range(2):  # adopt's first step only looks
        step(1.0, 4.0, False)
    assert guard.in_a_row == 0
    assert not torch.equal(model.mix.weight, before[0]["mix.weight"])


def test_run_skips_a_nan_and_names_its_batch(tmp_path):
    FaultyModel.faults = Faults(nan_at=[20])  # step 3 takes examples 16 to 23
    result = train(recipe(log_every=1), tmp_path)
    assert result.skipped == 1
    log = (tmp_path / "log.txt").read_text()
    assert 'step 3 was skipped: loss nan, gradient norm nan; the batch at data {"position": 16}' in log
    assert [row["step"] for row in rows(tmp_path) if row["train/skipped"]] == [3]
    assert "train/loss" not in rows(tmp_path)[2]


def test_too_many_in_a_row_end_the_run(tmp_path):
    FaultyModel.faults = Faults(nan_at=[41, 50, 57])  # steps 6, 7, 8
    with pytest.raises(Diverged, match=r"3 steps in a row") as stopped:
        train(recipe(max_skipped=2), tmp_path)
    for words in ("step 6", "step 7", "step 8", '"position": 40', '"position": 56', "step-00000004"):
        assert words in str(stopped.value)
    assert train(recipe(max_skipped=3), tmp_path, resume=True).skipped == 3


def test_fp16_overflow_halves_the_scale_and_is_no_fault():
    model = ToyModel(ToyModelConfig())
    optimizer, guard = optim.make_optimizer(model, OptimizerConfig()), Guard.new(torch.device("cpu"))
    guard.scale.fill_(1024.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optim.guarded_step(optimizer, guard, torch.tensor(1.0), torch.tensor(1.0), clip=1.0, fp16=True)
    assert (guard.scale, guard.skipped, guard.in_a_row) == (512.0, 1.0, 0.0)
    guard.growth.fill_(optim.GROW_EVERY - 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.guarded_step(optimizer, guard, torch.tensor(1.0), torch.tensor(1.0), clip=1.0, fp16=True)
    assert (guard.scale, guard.growth) == (1024.0, 0.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(tmp_path, precision):
    made = {p: recipe(precision=p, model=FaultyModelConfig(dropout=0.0)) for p in ("fp32", precision)}
    loss = {p: train(made[p], tmp_path / p).metrics["train/loss"] for p in made}
    assert loss[precision] == pytest.approx(loss["fp32"], rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, groups, average


def test_schedules():
    def values(steps=100, **fields):
        return [optim.lr_share(ScheduleConfig(**fields), step, steps) for step in range(steps)]

    cosine = values(name="cosine", warmup=10, min_lr=0.1)
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[9] == 1.0
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[9:] == sorted(cosine[9:], reverse=True)
    assert cosine[54] == pytest.approx(0.55)  # half way

    wsd = values(name="wsd", warmup=10, decay=0.2, min_lr=0.0)
    assert wsd[9:80] == [1.0] * 71
    assert wsd[89] == pytest.approx(0.5)
    assert wsd[-1] == pytest.approx(0.0)
    assert values(name="constant", warmup=0) == [1.0] * 100


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.table = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4)
        self.out.weight = self.table.weight  # tied
        self.gate = nn.Linear(3, 2)
        self.norm1 = nn.LayerNorm([3, 2])
        self.gated_mlp = nn.Linear(3, 3)
        self.special = nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self):
        return {"special"}


def test_a_rate_that_is_held_is_the_cosine_of_its_epoch():
    """As torch's CosineAnnealingLR with one step an epoch: epoch e of E runs at (1 + cos(pi e / E)) / 2."""
    schedule = ScheduleConfig(name="cosine", warmup=0, min_lr=0.0, hold=3)
    shares = [optim.lr_share(schedule, step, 12) for step in range(12)]
    assert shares == pytest.approx([0.5 * (1 + math.cos(math.pi * (step // 3) / 4)) for step in range(12)])


def test_decay_of_everything():
    model = ToyModel(ToyModelConfig())
    groups = optim.parameter_groups(model, 0.3, everything=True)
    assert {group["weight_decay"] for group in groups} == {0.3}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_what_decays():
    model = Parts()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optim.make_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    rest = {names[id(p)] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed == {"gated_mlp.weight"}
    assert decayed | rest == set(names.values())


def test_ema_follows_its_definition():
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.99)
    expected = model.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(model, ema.share_of(step), torch.tensor(True))
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "does not divide"),
        ({"steps": 0}, "take 1 or more"),
        ({"ema": 1.0}, "not a decay"),
        ({"keep": -1}, "keep takes 0 or more"),
        ({"optimizer": {"name": "adamx"}}, "adamx"),
        ({"schedule": {"name": "cosin"}}, "cosine"),
        ({"presicion": "bf16"}, "precision"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        configs.build(TrainConfig, fields)


def test_recipe_survives_yaml():
    made = recipe()
    assert configs.build(Recipe, configs.to_dict(made)) == made


def test_no_cuda_is_said():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="has 0 CUDA devices"):
            train(recipe(device="cuda"), "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def test_progress_bar_on_a_terminal_and_lines_without(tmp_path, monkeypatch, capfd):
    train(recipe(eval_every=6), tmp_path / "lines")
    lines = capfd.readouterr().err
    assert re.search(r"^step 3/12  loss \d\.\d{4}  [\d.]+k? tokens/s  0m\d\ds left$", lines, re.MULTILINE)
    assert "valid/loss" in lines
    assert "\r" not in lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(recipe(eval_every=6), tmp_path / "bar")
    shown = capfd.readouterr().err
    assert re.search(r"12/12 .*loss \d\.\d{4}, [\d.]+k? tokens/s", shown)
    assert re.search(r"validating: +0%.* 0/8 ", shown)
    for kind in ("lines", "bar"):
        log = (tmp_path / kind / "log.txt").read_text()
        assert "step 12/12" in log
        assert "done: 12 steps" in log


def test_a_terminal_without_columns_gets_lines(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    train(recipe(), tmp_path)
    said = capfd.readouterr().err
    assert "step 12/12  loss" in said
    assert "\r" not in said


def test_the_line_of_an_evaluation_is_short(tmp_path, capfd):
    values = {f"valid/mse/{horizon}": 0.5 for horizon in range(40)}
    values |= {"valid/loss": 1.25, "valid/mse": 0.75, "valid/steps": 96.0, "valid/bytes": 1234567.5}
    with RunLog(tmp_path, step=0, steps=9) as log:
        log.evaluation_row(3, values, ["valid/loss", "valid/mse", "valid/nothing"])
        log.evaluation_row(6, dict(list(values.items())[-2:]))
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("step 3/9  valid/loss 1.2500  valid/mse 0.7500  valid/mse/0 0.5000  ")
    assert first.endswith("valid/mse/3 0.5000  (+38 more in metrics.jsonl)")
    assert second == "step 6/9  valid/steps 96  valid/bytes 1.235e+06"
    assert values.items() <= rows(tmp_path)[0].items()


def test_figures_are_for_people():
    shown = {0.0: "0.0000", 1.0: "1.0000", 0.12345: "0.1235", 12.5: "12.5000", 426624.0: "426624", -2.0: "-2"}
    shown |= {1e5 + 0.5: "1e+05", 123456.7: "1.235e+05", 1e30: "1e+30", math.inf: "inf", math.nan: "nan"}
    assert [figure(value) for value in shown] == list(shown.values())


@pytest.mark.parametrize(("size", "world", "most"), [(4, 1, None), (5, 1, 3), (3, 2, None), (40, 1, 2)])
def test_the_validation_knows_its_batches(size, world, most):
    stream = ToyTask(ToyConfig()).stream("valid", batch_size=size, world=world)
    assert batches_of(stream, most) == len(list(itertools.islice(stream, most)))
    assert batches_of(iter(()), most) == most  # a stream of one's own may not say


def test_stream_that_ends_is_an_error(tmp_path, monkeypatch):
    stream = ToyTask.stream
    monkeypatch.setattr(ToyTask, "stream", lambda self, split, **sizes: stream(self, "valid", **sizes))
    with pytest.raises(ValueError, match="training stream of ToyTask ended"):
        train(recipe(steps=100), tmp_path)


@pytest.mark.slow
def test_compiled_training(tmp_path):
    made = recipe(model=FaultyModelConfig(dropout=0.0))
    plain = train(made, tmp_path / "plain").metrics["train/loss"]
    made.train.compile = True
    assert train(made, tmp_path / "compiled").metrics["train/loss"] == pytest.approx(plain, rel=1e-4)


def test_profile_leaves_a_trace_and_a_table(tmp_path):
    train(recipe(steps=10), tmp_path, profile=True)
    trace = json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert "aten::addmm" in (tmp_path / "profile" / "table-rank0.txt").read_text()
    assert "aten::addmm" in (tmp_path / "log.txt").read_text()


def test_training_flops_and_the_peak():
    class Counting(nn.Module):
        def flops(self, tokens):
            return 10 * tokens

    batch = next(iter(ToyTask(ToyConfig()).stream("train", batch_size=4)))
    assert training_flops(Counting(), batch) == 3 * 4 * 60
    assert training_flops(nn.Linear(2, 2), batch) == 0
    assert peak_flops(torch.device("cpu"), "bf16") is None
