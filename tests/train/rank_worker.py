"""What the tests of several ranks run in each process: `python rank_worker.py jobs.json`, started by `launch`.

A job is {"do": name of a function here, **its arguments}. Runs are in float64, so that only rounding may differ.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import toytask
from torch import nn

from zoo import model as models
from zoo import registry
from zoo.backbone import BackboneConfig
from zoo.config import Choice
from zoo.evaluate import evaluate_run
from zoo.mixers.gatedfwa import GatedFWA
from zoo.mixers.swa import SWA
from zoo.model import Head, ModelConfig, Output
from zoo.ops import linear_cross_entropy
from zoo.train import ParallelConfig, parallel, train
from zoo.train.recipe import find_start, make_model, make_task, pick_device, what_a_number_carries
from zoo.train.run import Run

LENGTH = 12
compile_module = nn.Module.compile


class RowHead(Head):
    """Next token through one matrix."""

    tokenwise = True

    @dataclass
    class Config:
        pass

    def __init__(self, config, width):
        super().__init__()
        nn.Module.__setattr__(self, "embed", nn.Embedding(toytask.VOCABULARY, width))

    def forward(self):
        raise AssertionError

    def loss(self, h, batch):
        weight = self._modules["embed"].weight
        return Output(
            *linear_cross_entropy(h, weight, batch.targets),
            {"norm": (h.pow(2).sum(), h.new_tensor(float(batch.targets.numel())))},
        )


class RowModel(models.Model):
    """What happens when the training example at a position reaches a rank: NaN, death, or a long sleep."""

    faults: dict = {}
    seen = 0

    def forward(self, batch):
        h = self.head._modules["embed"](batch.inputs)
        h, _ = self.backbone(h, batch.ctx)
        output = self.head.loss(h, batch)
        for place in batch.condition if self.training and batch.condition else []:
            if place in self.faults.get("nan", []):
                output.loss_sum = output.loss_sum * float("nan")
            if place == self.faults.get("kill"):
                Path(self.faults["note"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if place == self.faults.get("raise"):
                raise RuntimeError("injected")
            if place == self.faults.get("hang"):
                time.sleep(600)
            if place == self.faults.get("sigterm"):
                os.kill(os.getpid(), signal.SIGTERM)
        return output


@dataclass
class RowModelConfig:
    mixers: list[str] = field(default_factory=lambda: ["gatedfwa", "swa"])
    window: int = 3
    double: bool = True
    checkpoint: bool = False

    def build(self):
        if "rows" not in models.heads._entries:
            models.heads.add("rows", RowHead)
        configs = {"gatedfwa": GatedFWA.Config(window=self.window), "swa": SWA.Config(window=self.window)}
        named = [Choice(name, configs[name]) for name in self.mixers if name in configs]
        backbone = BackboneConfig(
            width=16, depth=2, heads=2, mixer=named[0], other_mixers=named[1:], pattern=", ".join(self.mixers)
        )
        backbone.checkpoint, backbone.mlp_width = self.checkpoint, 24
        made = RowModel(ModelConfig(backbone, Choice("rows", RowHead.Config())))
        return made.double() if self.double else made


def install():
    toytask.install()
    registry.models._entries = {"toy_mlp": lambda: toytask.FaultyModelConfig(), "toy_rows": lambda: RowModelConfig()}


def rows_recipe(model=None, parallel_to=None, **settings):
    settings = {"steps": 4, "batch_size": 12, "micro_batch_size": 3, "log_every": 1, "eval_every": 4, **settings}
    made = toytask.recipe(task=toytask.ToyConfig(length=LENGTH), **{"save_every": 2, "keep": 0, **settings})
    made.model = Choice("toy_rows", RowModelConfig(**(model or {})))
    made.train.optimizer.lr = 0.01
    made.train.parallel = ParallelConfig(**(parallel_to or {}))
    return made


def run(folder, resume=False, faults=None, expect="", **settings):
    RowModel.faults = faults or {}
    try:
        train(rows_recipe(**settings), Path(folder), resume=resume)
    except (Exception, SystemExit) as error:
        if not expect:
            raise
        Path(f"{folder}-error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        assert not expect, "nothing was raised"


def compiled(folder, into, **settings):
    """A run, and how many graphs its blocks came to; traced and differentiated, without the C++ compiler's minutes."""
    nn.Module.compile = lambda module: compile_module(module, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(folder, compile=True, **settings)
    if os.environ["RANK"] == "0":
        counters = torch._dynamo.utils.counters
        found = {"graphs": counters["stats"]["unique_graphs"], "breaks": list(counters["graph_break"])}
        Path(into).write_text(json.dumps(found))


def resave(folder, into, **settings):
    """Take up the newest checkpoint and write it again elsewhere: it has to come out as it was."""
    recipe = rows_recipe(**settings)
    ranks = parallel.start_ranks(recipe.train.parallel, pick_device("cpu"))
    task = make_task(recipe)
    found, _ = ranks.first(lambda: find_start(recipe, Path(folder), True))
    model = make_model(recipe, task)
    state = Run(recipe, Path(into), task, model, torch.device("cpu"), ranks, what_a_number_carries(recipe, task), found)
    state.save()
    state.stream.close()
    ranks.close()


def score(folder, into):
    scores = evaluate_run(Path(folder), split="valid", batch_size=4, device="cpu")
    assert (scores is None) == (os.environ["RANK"] != "0")
    if scores is not None:
        Path(into).write_text(json.dumps(scores.values))


def agreement(into):
    """What the small words of Ranks do."""
    ranks = parallel.start_ranks(ParallelConfig(), torch.device("cpu"))
    here = ranks.rank

    def odd():
        if here == 1:
            raise ValueError("odd")
        return here

    found = {
        "sum": ranks.sum(torch.tensor([here + 1.0])).tolist(),
        "min": ranks.min(torch.tensor(here)).item(),
        "first": ranks.first(lambda: here),
        "each": ranks.each(lambda: here),
        "in_turn": ranks.in_turn(lambda: here),
    }
    for name, work in {
        "each_error": lambda: ranks.each(odd),
        "first_error": lambda: ranks.first(lambda: 1 // 0),
    }.items():
        try:
            work()
        except (ValueError, ZeroDivisionError) as error:
            found[name] = str(error)
    ranks.barrier()
    ranks.close()
    Path(f"{into}-{here}").write_text(json.dumps(found))


def main(path):
    torch.set_num_threads(1)
    install()
    for job in json.loads(Path(path).read_text()):
        began = time.monotonic()
        globals()[job.pop("do")](**job)
        if os.environ["RANK"] == "0":
            print(f"{time.monotonic() - began:.1f} s", job, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
