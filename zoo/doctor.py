"""What this machine will run, and why: the text that `zoo doctor` prints."""

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import zoo
from zoo import registry
from zoo.config import configs_root, list_recipes
from zoo.files import cache_folder
from zoo.ops import backend

PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "torchaudio",
    "timm",
    "omegaconf",
    "safetensors",
    "tokenizers",
    "tensorboard",
)


def report(*, verbose: bool = False) -> str:
    """verbose: the whole table of back ends, also where every operator takes the same."""
    sections = (_machine(), _back_ends(verbose), _places())
    return "\n".join(line for section in sections for line in (*section, "")).rstrip()


def _machine() -> list[str]:
    lines = [f"gatedfwa-zoo {zoo.__version__}, Python {platform.python_version()} on {platform.platform()}"]
    versions = (f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    missing = [name for name in PACKAGES if not _version(name)]
    lines.append("packages: " + ", ".join(versions) + (f"; not installed: {', '.join(missing)}" if missing else ""))
    threads = torch.get_num_threads()
    lines.append(f"CPU: {threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()} cores")
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("GPU: none that torch can use" + ("" if torch.version.cuda else " (this torch is a CPU build)"))
    return lines


def _back_ends(verbose: bool) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"back ends on {device.type} (ZOO_BACKEND overrides):"]
    what = {
        "window": "window_attention, gated_window_attention",
        "prune": "prune=: which tiles are kept",
        "ring": "ring_attention (decoding)",
        "loss": "linear_cross_entropy",
        "nsa": "compressed_attention, selected_attention, nsa_attention",
    }
    table = {op: _choices(op, device) for op in backend.OPS}
    names = {name for rows in table.values() for name, _ in rows}
    if device.type == "cpu" and names == {"reference"} and not verbose and not os.environ.get("ZOO_BACKEND"):
        return ["back ends: every operator: reference, for there is no CUDA device (--verbose shows each)"]
    for op, rows in table.items():
        lines.append(f"  {what.get(op, op)}")
        lines += [f"    {line}" for _, line in rows]
    return [*lines, "  log_decay: plain PyTorch everywhere"]


def _choices(op: str, device: torch.device) -> list[tuple[str, str]]:
    """(back end, line) for each choice of an op; dtypes of the same choices are together."""
    merged: dict[tuple[str, str, str], list[str]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        chosen: dict[tuple[str, str], list[str]] = {}
        for head_dim in (32, 64, 128, 256) if op != "loss" else (backend.NO_HEADS,):
            name, reason = backend.explain(op, device, dtype, head_dim)
            reason = reason.replace(f", head_dim {head_dim}", "").replace(f", {kind}", "")
            chosen.setdefault((name, reason), []).append(str(head_dim))
        for (name, reason), dims in chosen.items():
            heads = f"head_dim {', '.join(dims)}" if op != "loss" else "any width"
            merged.setdefault((heads, name, reason), []).append(kind)
    return [(name, f"{', '.join(kinds)}; {heads}: {name} ({why})") for (heads, name, why), kinds in merged.items()]


def _places() -> list[str]:
    data = os.environ.get("ZOO_DATA")
    found = "" if data is None else " (exists)" if Path(data).is_dir() else " (does not exist)"
    domains = ", ".join(f"{name} ({module})" for name, module in registry.domain_modules().items())
    return [
        f"recipes: {len(list_recipes())} in {configs_root()}",
        f"domains: {domains}",
        f"data: ZOO_DATA = {data or 'not set'}{found}; cache {cache_folder()}",
    ]


def _version(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) else None
