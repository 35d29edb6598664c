"""How fast a model is at several lengths, with random weights: training, prefill, decoding; and what its state weighs.

Medians of repeats after warm-up, one process, nothing else running. A training step is forward, backward and update as
the recipe says (precision, compile). Prefill is one sequence in chunks, eagerly: neither compiled nor recorded, so that
on a GPU short lengths and small models wait for Python. Decoding goes on from such a state, on a GPU as one CUDA graph,
which the state's fixed shapes allow.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from zoo import config as configs
from zoo import recording
from zoo.evaluate.measure import Number, elements
from zoo.evaluate.suite import Cell
from zoo.generation import prefill
from zoo.model import Batch, Context, Model
from zoo.task import Task
from zoo.train import Recipe, optim, pick_device
from zoo.train.optim import Guard
from zoo.train.recipe import make_model, make_task
from zoo.train.run import autocast

WARM, REPEATS, STEPS = 3, 7, 32  # runs before and behind each median; decoding steps in a run
CHUNK = 2048  # prompt tokens of a prefill call


def speed(cell: Cell, device: torch.device | None = None) -> list[Number]:
    """Rates at every length of cell.settings, tokens/s each, and state_bytes of a sequence."""
    numbers = []
    settings, trainer = cell.settings, None
    for length in settings.lengths:
        recipe = configs.build(Recipe, cell.recipe, configs.dotted([f"{settings.length_field}={length}"]))
        place = device or pick_device(recipe.train.device)
        task = make_task(recipe)
        if trainer is None or not trainer.fits(recipe, task):
            trainer = Trainer(recipe, task, place)
        model, rows = trainer.model, max(1, settings.step_tokens // length)
        batch = next(iter(task.stream("train", batch_size=rows))).to(place)
        decoded = settings.decode_rows
        rates = {
            "train_tokens_per_second": elements(batch) / median_seconds(lambda: trainer.step(batch), place),  # noqa: B023
            "prefill_tokens_per_second": length / prefill_seconds(model, batch, length, recipe, place),
            "decode_tokens_per_second": decoded / decode_seconds(model, batch, length, decoded, recipe, place),
        }
        element = torch.finfo(dtype_of(recipe)).bits // 8
        facts = {"parameters": model.parameter_count(), "rows": rows, "decode_rows": decoded}
        numbers += [Number(name, value, {"length": length}, facts) for name, value in rates.items()]
        numbers.append(Number("state_bytes", model.backbone.state_bytes(length, element), {"length": length}, facts))
    return numbers


class Trainer:
    """A model with random weights and one training step. Compiled it is one graph for all lengths."""

    def __init__(self, recipe: Recipe, task: Task, device: torch.device):
        torch.manual_seed(recipe.train.seed)
        model = make_model(recipe, task)
        if not isinstance(model, Model):
            raise ValueError(f"measure: speed takes a model with backbone and head, not a {type(model).__name__}")
        self.recipe, self.device, self.model = recipe, device, model.to(device)
        self.optimizer, self.guard = optim.make_optimizer(model, recipe.train.optimizer), Guard.new(device)
        self.forward: Any = torch.compile(model, dynamic=True) if recipe.train.compile else model

    def fits(self, recipe: Recipe, task: Task) -> bool:
        """Whether that recipe's model is this one."""
        assert recipe.model is not None
        return self.model.config == task.model_config(recipe.model.config)

    def step(self, batch: Batch) -> None:
        self.model.train()
        with autocast(self.recipe.train.precision, self.device):
            output = self.forward(batch)
        output.loss_sum.backward()
        loss, count = output.loss_sum.detach(), output.count
        optim.guarded_step(self.optimizer, self.guard, loss, count, clip=self.recipe.train.optimizer.clip, fp16=False)
        self.optimizer.zero_grad()


def dtype_of(recipe: Recipe) -> torch.dtype:
    """What keys and values are kept in while decoding."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[recipe.train.precision]


@torch.inference_mode()
def prefill_seconds(model: Model, batch: Batch, length: int, recipe: Recipe, device: torch.device) -> float:
    return median_seconds(lambda: filled(model, batch, length, 1, recipe, device), device)


def filled(model: Model, batch: Batch, length: int, rows: int, recipe: Recipe, device: torch.device) -> Any:
    """A state that has seen `length` tokens of the batch's first row, with room for a few more."""
    model.eval()
    prompt = Batch(batch.inputs[:1, :length].repeat_interleave(rows, dim=0))
    room = length + STEPS * (WARM + REPEATS + 1)
    cache = model.backbone.init_cache(rows, room, dtype=dtype_of(recipe))
    with autocast(recipe.train.precision, device):
        _, cache, _ = prefill(model, prompt, cache, model.head.init_state(prompt.inputs), CHUNK)
    return cache


@torch.inference_mode()
def decode_seconds(model: Model, batch: Batch, length: int, rows: int, recipe: Recipe, device: torch.device) -> float:
    """Of one step for all rows together: embed, backbone, logits. No sampling: it is the same for all models."""
    cache = filled(model, batch, length, rows, recipe, device)
    token = batch.inputs[:1, :1].repeat_interleave(rows, dim=0)
    step = decoding(model, cache, token, recipe, device)
    run = captured(step) if device.type == "cuda" else step

    def many() -> None:
        for _ in range(STEPS):
            run()

    return median_seconds(many, device) / STEPS


def decoding(
    model: Model, cache: Any, token: torch.Tensor, recipe: Recipe, device: torch.device
) -> Callable[[], torch.Tensor]:
    """A call that moves every row of the cache one token (B, 1) on, in place, as a graph wants it; gives its logits."""
    position = cache["position"]  # the one place that a graph reads it from

    def step() -> torch.Tensor:
        with autocast(recipe.train.precision, device):
            h, _ = model.head.embed(token, Context())
            h, after = model.backbone(h, Context(), {**cache, "position": position})
            logits = model.head.logits(h[:, -1], None)
        position.copy_(after["position"])
        return logits

    return step


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    for _ in range(WARM):
        recording.on_stream(step, side)
    return recording.record(step, side)[1]


def median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for number in range(WARM + REPEATS):
        wait()
        began = time.perf_counter()
        call()
        wait()
        if number >= WARM:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
