"""Weights as safetensors files: written atomically, read with errors that say what is wrong with which file.

Nothing here unpickles: a pickle where safetensors is expected is refused by its content, whatever its name.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

MAX_HEADER = 100_000_000  # bytes; the format's own limit
LABEL = "weights"  # the key in a file's metadata that says whose weights it holds


class WeightsError(ValueError):
    """A weights file that is damaged, not safetensors, or made for another model."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors form of `tensors` (any device)."""
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, dict(metadata) if metadata else None)


def write_file(path: Path, data: bytes) -> None:
    """Write and flush to the disk. Not atomic: for files inside a folder that a rename makes real."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write beside and rename: whoever reads `path` finds the old bytes or the new ones, whenever the writer dies."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_file(beside, data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file in one step (it is whole or not there); returns its sha256."""
    data = to_bytes(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
    sync_folder(path.parent)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, *, sha256: str | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileNotFoundError, or WeightsError that names the file and the fault.

    Without `sha256` a flipped bit in the data cannot be seen, only damage to the header and the length.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    data = path.read_bytes()
    _check_header(path, data)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        label = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}).get(LABEL)
        what = f"is damaged, or another version: it calls itself {label}, and" if label else "is damaged:"
        raise WeightsError(f"{path} {what} its sha256 is {found}, not {sha256.lower()}")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _check_header(path: Path, data: bytes) -> None:
    """Say what is wrong in a person's words, before the parser says it in its own."""
    # A header of 1152 bytes begins as a pickle does; no pickle has the brace of its JSON after eight bytes
    starts = data[:2] == b"PK" or (data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))
    if starts and data[2:9] != bytes(6) + b"{":
        raise WeightsError(
            f"{path} is a pickle (a torch.save file), not safetensors. It could run code when loaded, so it was not "
            "opened. Convert it where you trust it: safetensors.torch.save_file(torch.load(…, weights_only=True), …)"
        )
    if len(data) < 8:
        raise WeightsError(f"{path} is truncated: {len(data)} bytes, less than a safetensors header")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise WeightsError(f"{path} is not a safetensors file: its header claims {length} bytes, over {MAX_HEADER}")
    if 8 + length > len(data):
        raise WeightsError(f"{path} is truncated: {len(data)} bytes, less than its header of {length}")
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: its header cannot be read") from error
    if len(data) != whole:
        state = "truncated" if len(data) < whole else "damaged"
        raise WeightsError(f"{path} is {state}: {len(data)} bytes where its header speaks of {whole}")


# ---------------------------------------------------------------------------------------------------------------------
# Modules


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's state by name; a tensor that has several names (tied weights) appears under the first."""
    seen: set[tuple[Any, ...]] = set()
    named = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            named[name] = tensor
        seen.add(place)
    return named


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], origin: str = "the weights") -> None:
    """Copy `tensors` into the module. Raises WeightsError that lists every name that does not fit; then nothing is
    changed. Dtypes may differ: the module's stay."""
    own = named_tensors(module)
    missing = [name for name in own if name not in tensors]
    # A tied tensor's second name is welcome too: files written elsewhere may carry it.
    unexpected = [name for name in tensors if name not in own and name not in module.state_dict()]
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise WeightsError(f"{origin} does not fit {type(module).__name__}: " + "; ".join(faults))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
