"""Which back end runs a call, and why.

A back end offers one module per op family, with the functions of the same names and arguments of `zoo.ops.reference`:
`window` (window_forward, window_backward), `ring` (ring_attention) and `loss` (cross_entropy_rows); of
`zoo.ops.reference_nsa`: `nsa` (locate, compressed_forward, compressed_backward, selected_forward, selected_mix_forward,
selected_backward, mix_forward, mix_backward, pool_forward, pool_backward); of
`zoo.ops.reference_prune`: `prune` (kept_tiles); and of `zoo.ops.reference_block`: `linear` (piecewise_product),
`swiglu` (swiglu_forward, swiglu_backward), `norm` (add_norm_forward, add_norm_backward), `qkv` (prepare_forward,
prepare_backward). Back ends are tried in the order of `BACKENDS`; the first that has the op and does not refuse runs.
Another one (a kernel for one architecture, say) is one more row.

Environment, read at every call:
    ZOO_BACKEND       a name of `BACKENDS`: that one or an error for every op that it has, never a fallback
    ZOO_DEBUG=1       check values on the GPU too (log_decay <= 0, cu_seqlens, token ids): stalls the device
    TRITON_INTERPRET=1 lets `triton` run on CPU tensors, slowly (Triton reads it when it is first imported)
"""

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class Backend:
    """`refuses(device, dtype, head_dim)` is the reason why it can't run such a call, or None."""

    name: str
    modules: dict[str, str]  # op family -> module
    refuses: Callable[[torch.device, torch.dtype, int], str | None]


class BackendError(ValueError):
    """ZOO_BACKEND names none, or one that can't run the call."""


OPS = ("window", "prune", "ring", "loss", "nsa", "linear", "swiglu", "norm", "qkv")
NO_HEADS = 0  # the head_dim of an op without heads


def choose(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType:
    """The module that runs `op` on such tensors. Warns once per reason when a CUDA device has to do without a kernel.

    Raises BackendError for an unknown ZOO_BACKEND, or when the one it names can't run the call.
    """
    return importlib.import_module(choose_backend(op, device, dtype, head_dim).modules[op])


def choose_backend(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    forced = _forced(op)
    if forced is not None:
        reason = forced.refuses(device, dtype, head_dim)
        if reason is not None:
            raise BackendError(f"ZOO_BACKEND={forced.name} can't run this call: {reason}. Unset it to fall back")
        return forced
    backend, reasons = _first_willing(op, device, dtype, head_dim)
    if device.type == "cuda" and backend is BACKENDS[-1]:
        _warn_once(f"zoo.ops falls back to its {backend.name} path on a CUDA device: {'; '.join(reasons)}")
    return backend


def explain(op: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(name, reason) of the back end that `choose` would take, for people: never raises, never warns."""
    device = torch.device(device)
    try:
        forced = _forced(op)
    except BackendError as error:
        return "none", str(error)
    if forced is not None:
        reason = forced.refuses(device, dtype, head_dim)
        if reason is None:
            return forced.name, "ZOO_BACKEND asks for it"
        return "none", f"ZOO_BACKEND={forced.name}, but {reason}"
    backend, reasons = _first_willing(op, device, dtype, head_dim)
    return backend.name, "; ".join(reasons) or f"first choice for {device.type}, {_short(dtype)}, head_dim {head_dim}"


def debug() -> bool:
    """Whether values are checked on devices where looking at them costs a stall."""
    return os.environ.get("ZOO_DEBUG") == "1"


def may_look(tensor: torch.Tensor) -> bool:
    """Whether a check may read the values of `tensor`: on a CPU always, elsewhere under ZOO_DEBUG=1 only, and never
    while compiling, when there are none."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or debug())


def tell_inductor() -> None:
    """Tells torch.compile's inductor, once it is there, that zoo's operators stay calls of themselves.

    It finds out by itself, but at an operator's first appearance it first writes down, for a log that nobody reads, the
    arguments with all that they were computed from. Where one operator makes a sum and its norm, and the next layer
    takes both, that text doubles with every layer: twelve of them never end compiling (torch 2.11).
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None:
        return
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("zoo::"):
            operator = getattr(torch.ops.zoo, name.removeprefix("zoo::")).default
            if operator not in lowering.lowerings:
                tag = torch._library.utils.get_layout_constraint_tag(operator, with_default=True)
                lowering.make_fallback(operator, layout_constraint=lowering.tag_to_layout_constraint(tag))


def _refuses_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _installed("triton"):
        return "triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {_short(dtype)}"
    if head_dim > 256:
        return f"the kernels take a head_dim of at most 256, not {head_dim}"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "the kernels are tested on NVIDIA devices only"
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"the kernels need compute capability 8.0, this device has {major}.{minor}"
    if device.type != "cpu" or not interpreted:
        return f"the tensors are on {device.type}, the kernels need a CUDA device"
    return "Triton's interpreter multiplies bfloat16 wrongly" if dtype == torch.bfloat16 else None


def _refuses_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not _installed("triton"):
        return "triton is not installed"
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return "the Hopper kernels need a device of compute capability 9.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper kernels take float16 and bfloat16, not {_short(dtype)}"
    return (
        None if head_dim in (NO_HEADS, 64, 128) else f"the Hopper kernels take a head_dim of 64 or 128, not {head_dim}"
    )


BACKENDS = (
    Backend(
        "hopper",
        {"window": "zoo.kernels.hopper", "nsa": "zoo.kernels.hopper_nsa", "loss": "zoo.kernels.hopper_loss"},
        _refuses_hopper,
    ),
    Backend(
        "triton",
        {
            "window": "zoo.kernels.window",
            "prune": "zoo.kernels.prune",
            "ring": "zoo.kernels.decode",
            "loss": "zoo.kernels.loss",
            "nsa": "zoo.kernels.nsa",
            "linear": "zoo.kernels.narrow",
            "swiglu": "zoo.kernels.swiglu",
            "norm": "zoo.kernels.norm",
            "qkv": "zoo.kernels.qkv",
        },
        _refuses_triton,
    ),
    Backend(
        "reference",
        {
            **dict.fromkeys(OPS, "zoo.ops.reference"),
            "prune": "zoo.ops.reference_prune",
            "nsa": "zoo.ops.reference_nsa",
            **dict.fromkeys(("linear", "swiglu", "norm", "qkv"), "zoo.ops.reference_block"),
        },
        lambda device, dtype, head_dim: None,
    ),
)


def _objection(backend: Backend, op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if op not in backend.modules:
        return f"{backend.name} has no kernel for op {op!r}"
    return backend.refuses(device, dtype, head_dim)


def _first_willing(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Backend, list[str]]:
    """The first back end that does not refuse, and why those before it did. The last one never refuses."""
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = _objection(backend, op, device, dtype, head_dim)
        if reason is None:
            return backend, reasons
        reasons.append(reason)
    raise AssertionError("the reference back end refused")


def _forced(op: str) -> Backend | None:
    """What ZOO_BACKEND names; None where it names nothing, or one without a kernel for `op`: the others are asked then.
    Raises BackendError for a name that is none."""
    name = os.environ.get("ZOO_BACKEND")
    if not name:
        return None
    for backend in BACKENDS:
        if backend.name == name:
            return backend if op in backend.modules else None
    raise BackendError(f"ZOO_BACKEND={name!r} is not one of {', '.join(backend.name for backend in BACKENDS)}")


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
