"""Models of one shape as one batched model: forward passes under vmap, and AdamW with a rate for each.

Every parameter has a leading dimension R, the replicas; the code is the models' own, with its parameters swapped for
these, and the operators fold R into their rows (zoo/ops/stacking.py). No replica sees another: not in the gradient, not
in clipping, not in the guard against numbers that are not finite.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.model import Batch, Model, Output
from zoo.train.optim import OptimizerConfig, parameter_groups

Tensors = dict[str, Tensor]
Scores = tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]


class Stack:
    """R replicas. `parameters`, `first`, `second` (AdamW's moments): name -> (R, …); `updates` (R,) float64, steps
    taken by each."""

    def __init__(self, models: Sequence[Model], config: OptimizerConfig, device: torch.device):
        """All replicas take the code of the first model, and its train or eval mode (`mode`)."""
        if config.name.lower() != "adamw":
            raise ValueError(f"optimizer.name = {config.name!r}; stacked replicas take adamw")
        if buffers := [name for name, _ in models[0].named_buffers()]:
            raise ValueError(f"stacked models have no buffers; {type(models[0]).__name__} has {', '.join(buffers)}")
        self.model, self.config = models[0].to(device), config
        self._owners = owners(self.model)
        named = [dict(model.named_parameters()) for model in models]
        self.parameters = {
            name: torch.stack([one[name].detach().to(device) for one in named]).requires_grad_() for name in named[0]
        }
        self.first = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.updates = torch.zeros(len(models), dtype=torch.float64, device=device)
        self.decay = weight_decays(self.model, config)
        self._compile()

    def _compile(self) -> None:
        """For this size of the stack; when it is called first. vmap's rules inside torch want to know sizes, so there
        is a graph for each shape of a batch, and code of former sizes must not count against the number kept."""
        torch._dynamo.reset()
        self._compiled = torch.compile(self._hidden, dynamic=False)
        self._compiled_update = torch.compile(adamw_step, dynamic=False)

    def __len__(self) -> int:
        return len(self.updates)

    def mode(self, training: bool) -> None:
        self.model.train(training)

    def forward(self, batch: Batch, *, compiled: bool = False) -> Scores:
        """(loss_sum, count, metrics) of the models' Output, each number (R,).

        compiled: the backbone's part, as one graph for each shape of a batch. What the head makes of it differs between
        batches of one shape, and is one operator mostly."""
        hidden = (self._compiled if compiled else self._hidden)(self.parameters, batch)

        def one(parameters: Tensors, h: Tensor) -> Scores:
            with swapped(self._owners, parameters):
                output: Output = self.model.head.loss(h, batch)
            return output.loss_sum, output.count, output.metrics

        return torch.vmap(one, randomness="same")(self.parameters, hidden)

    def _hidden(self, parameters: Tensors, batch: Batch) -> Tensor:
        """(R, B, T, C). The same batch and the same noise for all: a replica is what it would be in any company."""

        def one(parameters: Tensors) -> Tensor:
            with swapped(self._owners, parameters):
                h, _ = self.model.head.embed(batch.inputs, batch.ctx)
                return self.model.backbone(h, batch.ctx)[0]

        return torch.vmap(one, randomness="same")(parameters)

    def train_step(
        self, batch: Batch, rates: Tensor, active: Tensor, autocast: Any, *, compiled: bool = False
    ) -> "Reading":
        """One update of the `active` (R,) bool replicas at `rates` (R,) float32. A replica whose loss or gradient is
        not finite, or would make weights that are not, or whose batch scores nothing, stays as it was."""
        with autocast:
            loss_sum, count, metrics = self.forward(batch, compiled=compiled)
        mean = (loss_sum / count.clamp(min=1)).sum()
        gradients = torch.autograd.grad(mean, list(self.parameters.values()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            norm, taken = (self._compiled_update if compiled else adamw_step)(
                {name: p.detach() for name, p in self.parameters.items()},
                dict(zip(self.parameters, gradients, strict=True)),
                self.first,
                self.second,
                self.updates,
                rates,
                active & torch.isfinite(loss_sum.detach()) & (count > 0),
                self.decay,
                (*self.config.betas, self.config.eps, self.config.clip),
            )
        sums = {"loss": (loss_sum.detach(), count)} | {
            name: (total.detach(), over) for name, (total, over) in metrics.items()
        }
        return Reading(sums, norm, taken)

    @torch.no_grad()
    def score(self, batch: Batch, autocast: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (sum, count), each (R,): the loss and the metrics of the models' Output."""
        with autocast:
            loss_sum, count, metrics = self.forward(batch)
        return {"loss": (loss_sum, count), **metrics}

    @torch.no_grad()
    def keep(self, rows: list[int]) -> None:
        """Go on with these replicas alone, in this order."""
        place = torch.tensor(rows, dtype=torch.int64, device=self.updates.device)
        for tensors in (self.parameters, self.first, self.second):
            for name in tensors:
                tensors[name] = tensors[name].index_select(0, place)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.updates = self.updates.index_select(0, place)
        self._compile()

    def replica(self, row: int) -> Tensors:
        """The parameters of one."""
        return {name: p[row].detach().clone() for name, p in self.parameters.items()}

    def state(self) -> Tensors:
        """All that a checkpoint needs: flat names, tensors as they are."""
        parts = {"first": self.first, "second": self.second}
        moments = {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        return {**moments, "updates": self.updates}

    @torch.no_grad()
    def load(self, parameters: Tensors, state: Tensors) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(parameters[name])
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def owners(model: nn.Module) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Parameter name -> every (module's table of parameters, name in it) that holds it: tied ones have several."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in names.values()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found[names[id(parameter)]].append((module._parameters, attribute))
    return found


@contextlib.contextmanager
def swapped(places: dict[str, list[tuple[dict[str, Any], str]]], tensors: Tensors) -> Iterator[None]:
    """The modules use these tensors as their parameters. (torch.func.functional_call finds modules by attribute, and a
    head's `embed` is a method, too.)"""
    own = {name: table[attribute] for name, ((table, attribute), *_) in places.items()}
    try:
        _put(places, tensors)
        yield
    finally:
        _put(places, own)


def _put(places: dict[str, list[tuple[dict[str, Any], str]]], tensors: Tensors) -> None:
    for name, held in places.items():
        for table, attribute in held:
            table[attribute] = tensors[name]


@dataclass
class Reading:
    """Of one step: name -> (sum, count); the gradients' norms before clipping, whether a step was taken; (R,) each."""

    sums: dict[str, tuple[Tensor, Tensor]]
    norm: Tensor
    taken: Tensor


def weight_decays(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """name -> weight decay, by the groups of the ordinary trainer."""
    groups = parameter_groups(model, config.weight_decay, config.decay == "all")
    rates = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters()}


def adamw_step(
    parameters: Tensors,
    gradients: Tensors,
    first: Tensors,
    second: Tensors,
    updates: Tensor,
    rates: Tensor,
    able: Tensor,
    decay: dict[str, float],
    numbers: tuple[float, float, float, float],
) -> tuple[Tensor, Tensor]:
    """Clip each replica's gradients together and update in place (AdamW, arXiv 1711.05101, as torch.optim has it).

    updates (R,) steps taken before, rates (R,), able (R,) bool: who may take a step; numbers: beta 1, beta 2, eps and
    the largest norm (0: none). Returns (norm before clipping (R,), whether the step was taken (R,))."""
    beta1, beta2, eps, clip = numbers
    squares = [g.flatten(1).square().sum(dim=1, dtype=_wide(g)) for g in gradients.values()]
    norm = functools.reduce(torch.add, squares).sqrt()
    able = able & torch.isfinite(norm)
    share = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    number = updates + 1
    size, root = rates.to(number.dtype) / (1 - beta1**number), (1 - beta2**number).sqrt()
    moved: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, p in parameters.items():
        # What is not finite may not even be multiplied by 0
        g = torch.where(beside(able, p), gradients[name] * beside(share, p).to(p.dtype), 0)
        m, v = first[name].lerp(g, 1 - beta1), second[name] * beta2 + g * g * (1 - beta2)
        rate, length, scale = (beside(x, p).to(p.dtype) for x in (rates, size, root))
        moved[name] = p * (1 - rate * decay[name]) - length * m / (v.sqrt() / scale + eps), m, v
    finite = [torch.isfinite(p).flatten(1).all(dim=1) for p, _, _ in moved.values()]
    taken = functools.reduce(torch.logical_and, finite, able)
    for name, new in moved.items():
        for old, value in zip((parameters[name], first[name], second[name]), new, strict=True):
            old.copy_(torch.where(beside(taken, old), value, old))
    updates += taken
    return norm, taken


def beside(x: Tensor, like: Tensor) -> Tensor:
    """(R,) -> (R, 1, …), to go with a parameter."""
    return x.view(-1, *(1,) * (like.dim() - 1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
