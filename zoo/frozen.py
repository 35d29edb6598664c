"""Modules that were trained before and stay as they are, a tokenizer, a codec, a classifier: by name and checksum.

A task refers to one by a run folder, by a folder that `save` wrote, or by the name of published weights. It goes with
the run's assets, and its digest with the run's checkpoints: weights trained on one tokenizer are refused with another.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import config as configs
from zoo import registry, weights

CARD = "frozen.json"


@dataclass(frozen=True)
class Frozen:
    """module in eval mode, without gradients; name of its model and its config; sha256 of its tensors."""

    module: nn.Module
    name: str
    config: dict[str, Any]
    sha256: str
    origin: str

    def card(self) -> dict[str, str]:
        """What stands with a number that it took part in."""
        return {"name": self.name, "sha256": self.sha256, "origin": self.origin}


def digest(module: nn.Module) -> str:
    """The sha256 of the module's tensors in safetensors form, whatever file they came from."""
    return hashlib.sha256(weights.to_bytes(weights.named_tensors(module))).hexdigest()


def load(reference: str, *, sha256: str = "", what: str = "weights") -> Frozen:
    """The module behind `reference`: a run folder (its newest checkpoint, averaged weights where the run kept them), a
    folder that `save` wrote, or `<model>.<tag>` of published weights.

    sha256  refuse any other; "" takes what is there
    what    the word for messages: a tokenizer, a codec
    Raises FileNotFoundError where there is none; weights.WeightsError for a wrong checksum or damaged files.
    """
    folder = Path(reference).expanduser()
    if (folder / CARD).is_file():
        frozen = _from_bundle(folder)
    elif (folder / "checkpoints").is_dir():
        frozen = _from_run(folder)
    elif reference in weights.weights:
        name, _, tag = reference.partition(".")
        frozen = _freeze(weights.load_pretrained(name, tag), name, reference)
    else:
        published = ", ".join(weights.weights.names()) or "none yet"
        raise FileNotFoundError(
            f"the {what} {reference!r} is neither a run folder with checkpoints, nor a folder with {CARD}, nor one of "
            f"the published weights ({published}). Train one first: `zoo list --kind recipes` names the recipes"
        )
    if sha256 and frozen.sha256 != sha256.lower():
        raise weights.WeightsError(f"the {what} {reference!r} has sha256 {frozen.sha256}, not {sha256.lower()}")
    return frozen


def save(frozen: Frozen, folder: Path) -> None:
    """Write model.safetensors and its card into `folder`, for `load`."""
    weights.save(weights.named_tensors(frozen.module), folder / "model.safetensors")
    weights.replace_file(folder / CARD, json.dumps({**frozen.card(), "config": frozen.config}, indent=1).encode())


def _freeze(module: nn.Module, name: str, origin: str) -> Frozen:
    module.eval().requires_grad_(False)
    config = configs.to_dict(getattr(module, "config", {}))
    return Frozen(module, name, config, digest(module), origin)


def _build(name: str, node: dict[str, Any], tensors: dict[str, Tensor], origin: str) -> nn.Module:
    base = registry.models.get(name)()
    module = configs.build(type(base), base, node).build()
    weights.load_into(module, tensors, origin=origin)
    return module


def _from_bundle(folder: Path) -> Frozen:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        name, node, sha256, origin = (card[key] for key in ("name", "config", "sha256", "origin"))
    except (ValueError, KeyError, TypeError) as error:
        raise weights.WeightsError(f"{folder / CARD} is damaged: {error}") from error
    path = folder / "model.safetensors"
    frozen = _freeze(_build(name, node, weights.read(path), str(path)), name, origin)
    if frozen.sha256 != sha256:
        raise weights.WeightsError(
            f"{path} is damaged or another: its tensors have sha256 {frozen.sha256}, not {sha256}"
        )
    return frozen


def _from_run(run: Path) -> Frozen:
    """Reads the newest checkpoint as zoo/train/checkpoint.py writes them; each file is checked against the manifest."""
    steps = sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))
    if not steps:
        raise FileNotFoundError(f"the run {run} has no checkpoint yet")
    try:
        manifest = json.loads((steps[-1] / "manifest.json").read_bytes())
        files, node = manifest["files"], dict(manifest["recipe"]["model"])
        name = node.pop("name")
    except (ValueError, KeyError, TypeError) as error:
        raise weights.WeightsError(f"{steps[-1] / 'manifest.json'} is damaged: {error}") from error
    tensors: dict[str, Tensor] = {}
    for stem in ("ema", "model"):
        pattern = re.compile(stem + r"(\.\d+-of-\d+)?\.safetensors")
        parts = [weights.read(steps[-1] / f, sha256=files[f]["sha256"]) for f in sorted(files) if pattern.fullmatch(f)]
        if parts:
            slices = {key: [part[key] for part in parts if key in part] for part in parts for key in part}
            tensors = {key: torch.cat(own) if len(own) > 1 else own[0] for key, own in slices.items()}
            break
    return _freeze(_build(name, node, tensors, str(steps[-1])), name, str(run))
