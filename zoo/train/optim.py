"""What happens between gradients and parameters: groups, schedule, the guarded step, the moving average.

The guard is one flag on the device, "the loss and the gradient norm are finite", that masks the optimizer's step: on a
skipped step parameters, moments and step counts stay exactly as they were, and nobody waits for the device.
"""
# pyright: reportPrivateImportUsage=false
# (timm re-exports its factory, and torch its foreach functions, without saying so to type checkers)

import math
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.registry import nearest
from zoo.train.parallel import Ranks, local


@dataclass
class OptimizerConfig:
    """name   any optimizer of timm's factory. adam and adamw are fused and take the guard's flag on the device; the
           others cost one wait for the device a step.
    decay  what weight decay acts on: matrices (see `decays`), or all parameters, as torch.optim.AdamW does by itself
    clip   largest norm of all gradients together; 0 does not clip
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name.lower() not in FUSED and self.name.lower() not in (known := timm_optim().list_optimizers()):
            raise ValueError(f"name = {self.name!r} is no optimizer of timm's{nearest(self.name, known)}")
        accepted = {
            "lr": (0 < self.lr < math.inf, "a number above 0"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "numbers from 0 up to, not including, 1"),
            "eps": (0 < self.eps < math.inf, "a number above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "clip": (0 <= self.clip < math.inf, "0 (no clipping) or more"),
        }
        for name, (fine, takes) in accepted.items():
            if not fine:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes {takes}")


@dataclass
class ScheduleConfig:
    """The learning rate over steps, as a share of optimizer.lr.

    warmup   steps of linear rise
    decay    wsd: the share of all steps, at the end, over which the rate falls linearly
    min_lr   what it falls to, as a share
    hold     cosine: the rate changes only every so many steps (an epoch's); 0: at every step
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 100
    decay: float = 0.2
    min_lr: float = 0.1
    hold: int = 0

    def __post_init__(self) -> None:
        if self.hold < 0:
            raise ValueError(f"hold = {self.hold}; it takes a number of steps, or 0")
        if self.warmup < 0 or not 0 <= self.decay <= 1 or not 0 <= self.min_lr <= 1:
            raise ValueError("schedule takes warmup >= 0 steps, decay and min_lr between 0 and 1")


def lr_share(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (0 is the first) out of `steps`, as a share of the peak."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        length = max(1, round(steps * schedule.decay))
        done = min(1.0, max(0.0, (step + 1 - (steps - length)) / length))
        return 1.0 - (1.0 - schedule.min_lr) * done
    at = step // schedule.hold * schedule.hold if schedule.hold else step + 1
    done = min(1.0, max(0, at - schedule.warmup) / max(1, steps - schedule.warmup))
    return schedule.min_lr + (1.0 - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def timm_optim() -> Any:
    """Imported where it is used: timm brings torchvision, and a recipe is read without."""
    return import_module("timm.optim")


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups

NO_DECAY_NAME = re.compile(r"(^|[._])(gates?|shift|norms?\d*|embed(ding)?s?|positions?)([._]|$)")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies. Decay pulls towards zero, which is no neutral value for a gain, a gate or an
    embedding: so not for vectors (norms, biases, gate biases and amplitudes), nor for what a part of its name calls a
    gate, shift, norm, embedding or positions. `parameter_groups` adds the weights of nn.Embedding (tied ones included)
    and the names in the module's `no_weight_decay()`, timm's convention."""
    return parameter.ndim > 1 and not NO_DECAY_NAME.search(name)


def parameter_groups(model: nn.Module, weight_decay: float, everything: bool = False) -> list[dict[str, Any]]:
    """`everything`: decay all parameters alike."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = set(getattr(model, "no_weight_decay", set)())
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = decays(name, parameter) and id(parameter) not in embeddings and name not in named
            groups[decay].append(parameter)
    rates = {True: weight_decay, False: weight_decay if everything else 0.0}
    # timm's Muon hands a group with `use_fallback` to AdamW: gates and embeddings are no matrices to orthogonalise
    # (SPEC.md section 6, 7). Other optimizers ignore the word.
    return [
        {"params": params, "weight_decay": rates[decay], "use_fallback": not decay}
        for decay, params in groups.items()
        if params
    ]


FUSED = (
    "adam",
    "adamw",
)  # torch's own, which take `found_inf`. Its fused SGD leaves momentum unset on a masked first step


# Elementwise: a slice of a parameter is updated as it would be in the whole. Others look at whole matrices or norms.
SLICEABLE = frozenset(
    ("adadelta", "adagrad", "adam", "adamax", "adamw", "adopt", "adoptw", "lion", "momentum", "nadam", "nadamw")
    + ("rmsprop", "sgd", "sgdw")
)


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, owned: Mapping[str, Tensor] | None = None
) -> torch.optim.Optimizer:
    """`owned`: what to update for each parameter, where a rank holds slices of them (parallel.held)."""
    whole = dict(model.named_parameters())
    swap = {id(whole[name]): tensor for name, tensor in (owned or {}).items() if tensor is not whole[name]}
    if swap and config.name.lower() not in SLICEABLE:
        raise ValueError(
            f"optimizer.name {config.name!r} looks at whole parameters, of which parallel.name = fsdp leaves a rank "
            f"slices; it takes {', '.join(sorted(SLICEABLE))}, or parallel.name = ddp"
        )
    optimizer = _make(model, config)
    for group in optimizer.param_groups:
        group["params"] = [swap.get(id(parameter), parameter) for parameter in group["params"]]
    return optimizer


def _make(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    fused: dict[str, Any] = {"fused": True} if config.name.lower() in FUSED else {}
    return timm_optim().create_optimizer_v2(
        model,
        opt=config.name,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=config.betas,
        eps=config.eps,
        param_group_fn=lambda model: parameter_groups(model, config.weight_decay, config.decay == "all"),
        **fused,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """A tensor (), where the step is recorded (graph.py)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The guarded step

FIRST_SCALE, LEAST_SCALE, GROW_EVERY = 2.0**16, 2.0**-16, 2000  # of a loss per element; of a sum; steps


@dataclass
class Guard:
    """Counters on the device, each a () float32 tensor; saved with the optimizer.

    skipped   steps left out so far
    in_a_row  of these, how many non-finite ones just now, one after the other
    scale     what the loss is multiplied by before the backward pass: 1 but for fp16
    growth    fp16: good steps since the scale last changed
    """

    skipped: Tensor
    in_a_row: Tensor
    scale: Tensor
    growth: Tensor

    @staticmethod
    def new(device: torch.device) -> "Guard":
        return Guard(*(torch.full((), value, device=device) for value in (0.0, 0.0, 1.0, 0.0)))


def guarded_step(
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    loss_sum: Tensor,
    count: Tensor,
    *,
    clip: float,
    fp16: bool,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """Divide the summed gradients by `count`, clip, and step unless something is not finite.

    loss_sum, count: () over everything that the gradients were summed over. A batch that scores nothing (count 0) is
    left out, too, without counting as a fault. All ranks take the step, or none. Returns (gradient norm before
    clipping, whether the step was taken), on the device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).to(guard.scale.device)
    divisor = count.clamp(min=1).to(norm.dtype) * guard.scale
    if ranks is not None and ranks.sharded:  # each holds slices of the gradients
        norm = ranks.sum(norm.double() ** 2).sqrt().to(norm.dtype)
    norm = norm / divisor
    loss_finite, norm_finite = torch.isfinite(loss_sum), torch.isfinite(norm)
    taken = loss_finite & norm_finite & (count > 0)
    if ranks is not None and ranks.world > 1:  # no rounding of one rank may part it from the others
        taken = ranks.min(taken.to(torch.uint8)).bool()

    factor = 1.0 / divisor
    if clip > 0:
        factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    _masked_step(optimizer, taken)

    # In fp16 gradients overflow now and then by design: the scale is halved. It is a fault once that no longer helps.
    fault = ~loss_finite | (~norm_finite & (guard.scale <= LEAST_SCALE) if fp16 else ~norm_finite)
    guard.skipped += (~taken).float()
    guard.in_a_row.copy_(torch.where(fault, guard.in_a_row + 1, torch.zeros_like(guard.in_a_row)))
    if fp16:
        guard.growth.copy_(torch.where(norm_finite, guard.growth + 1, torch.zeros_like(guard.growth)))
        grow = guard.growth >= GROW_EVERY
        guard.scale *= torch.where(norm_finite, torch.where(grow, 2.0, 1.0), 0.5)
        guard.scale.clamp_(min=LEAST_SCALE)
        guard.growth *= (~grow).float()
    return norm, taken


def _masked_step(optimizer: Any, taken: Tensor) -> None:
    if optimizer.defaults.get("fused"):
        recording = taken.is_cuda and torch.cuda.is_current_stream_capturing()
        for group in optimizer.param_groups:
            group["capturable"] = recording  # torch asks for it then; the fused step is the same
        optimizer.grad_scale, optimizer.found_inf = None, (~taken).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif taken.item():
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The moving average of the weights


class Ema:
    """An exponential moving average of a module's parameters, with a copy of its buffers.

    The decay rises as (1 + n) / (10 + n) until it reaches `decay`, so that a short run is not mostly its start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = deepcopy(model).eval().requires_grad_(False)

    def share_of(self, step: int) -> float:
        """What the weights after update number `step` (0 is the first) count in the average."""
        return 1.0 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, share: float | Tensor, taken: Tensor) -> None:
        """share: `share_of` the step. `taken` (): on the device, whether the step was; if not, the average stays
        exactly as it is."""
        share = (taken * share).float()
        averages: list[Tensor] = [local(parameter) for parameter in self.model.parameters()]
        change = list(torch._foreach_sub([local(parameter) for parameter in model.parameters()], averages))
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages, change)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(torch.where(taken, buffer, average))


# ---------------------------------------------------------------------------------------------------------------------
# State by parameter name, in tensors and plain numbers


def optimizer_state(
    parameters: nn.Module | Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors `moment/parameter`, numbers): all that the optimizer remembers. Rates and decays are not in it: they
    follow from the recipe and the step."""
    names = {id(parameter): name for name, parameter in _named(parameters).items()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            at = f"{key}/{names[id(parameter)]}"
            if isinstance(value, Tensor):
                tensors[at] = value
            elif value is None or isinstance(value, (bool, int, float)):
                numbers[at] = value
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {at} as {type(value).__name__}, which cannot be saved"
                )
    groups = [
        {key: value for key, value in group.items() if key != "params" and key not in optimizer.defaults}
        for group in optimizer.param_groups
    ]
    return tensors, {"state": numbers, "groups": groups}


def _named(parameters: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else parameters


def load_optimizer_state(
    parameters: nn.Module | Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    """Put back what `optimizer_state` gave. Raises ValueError when it belongs to other parameters."""
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    index = {name: order[id(p)] for name, p in _named(parameters).items() if id(p) in order}
    state: dict[int, dict[str, Any]] = {}
    for at, value in (*tensors.items(), *numbers["state"].items()):
        key, _, name = at.partition("/")
        if name not in index:
            raise ValueError(f"the optimizer's state speaks of a parameter {name!r} that this model does not train")
        state.setdefault(index[name], {})[key] = value
    current = optimizer.state_dict()["param_groups"]
    if len(current) != len(numbers["groups"]):
        raise ValueError(f"the optimizer's state has {len(numbers['groups'])} groups, this model has {len(current)}")
    groups = [{**group, **extra} for group, extra in zip(current, numbers["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
