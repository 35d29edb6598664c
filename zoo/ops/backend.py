"""Which back end runs a call, and why.

A back end is a module with two functions of `zoo.ops.reference`, window_forward and window_backward, same arguments,
and one with the four of `zoo.ops.reference_nsa`.
They are tried in the order of `BACKENDS`; the first that does not refuse runs. Another one (a kernel for one
architecture, say) is one more row, in front.

Environment, read at every call:
    ZOO_BACKEND       a name of `BACKENDS`: that one or an error, never a fallback
    ZOO_DEBUG=1       check values on the GPU too (log_decay <= 0, cu_seqlens): stalls the device
    TRITON_INTERPRET=1 lets `triton` run on CPU tensors, slowly (Triton reads it when it is first imported)
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch


@dataclass(frozen=True)
class Backend:
    """`refuses(device, dtype, head_dim)` is the reason why it can't run such a call, or None."""

    name: str
    module: str
    refuses: Callable[[torch.device, torch.dtype, int], str | None]
    nsa: str = "zoo.ops.reference_nsa"  # its module of compressed and selected attention

    def load(self, family: Literal["window", "nsa"] = "window") -> ModuleType:
        return importlib.import_module(self.nsa if family == "nsa" else self.module)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The back end for such tensors. Warns once per reason when a CUDA device has to do without a kernel.

    Raises ValueError for an unknown ZOO_BACKEND, RuntimeError when the one it names can't run the call.
    """
    forced = os.environ.get("ZOO_BACKEND")
    if forced:
        backend = _by_name(forced)
        reason = backend.refuses(device, dtype, head_dim)
        if reason is not None:
            raise RuntimeError(f"ZOO_BACKEND={forced} can't run this call: {reason}. Unset it to fall back")
        return backend
    backend, reasons = _first_willing(device, dtype, head_dim)
    if device.type == "cuda" and reasons:
        _warn_once(f"zoo.ops falls back to its {backend.name} path on a CUDA device: {'; '.join(reasons)}")
    return backend


def explain(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(name, reason) of what `choose` would answer, for people: never raises, never warns."""
    device = torch.device(device)
    forced = os.environ.get("ZOO_BACKEND")
    if forced:
        try:
            reason = _by_name(forced).refuses(device, dtype, head_dim)
        except ValueError as error:
            return "none", str(error)
        return (
            (forced, "ZOO_BACKEND asks for it") if reason is None else ("none", f"ZOO_BACKEND={forced}, but {reason}")
        )
    backend, reasons = _first_willing(device, dtype, head_dim)
    return backend.name, "; ".join(reasons) or f"first choice for {device.type}, {_short(dtype)}, head_dim {head_dim}"


def debug() -> bool:
    """Whether values are checked on devices where looking at them costs a stall."""
    return os.environ.get("ZOO_DEBUG") == "1"


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


BACKENDS = (
    Backend("triton", "zoo.kernels.window", _refuses_triton, "zoo.kernels.nsa"),
    Backend("reference", "zoo.ops.reference", lambda device, dtype, head_dim: None),
)


def _first_willing(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Backend, list[str]]:
    """The first back end that does not refuse, and why those before it did. The last one never refuses."""
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.refuses(device, dtype, head_dim)
        if reason is None:
            return backend, reasons
        reasons.append(reason)
    raise AssertionError("the reference back end refused")


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"ZOO_BACKEND={name!r} is not one of {', '.join(backend.name for backend in BACKENDS)}")


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
