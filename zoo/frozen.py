"""What was trained before, by name and checksum: a run folder, a folder that `save` wrote, or published weights.

A module that stays as it is (a tokenizer, a codec, a classifier) goes with the assets of the run that uses it, and its
digest with the run's checkpoints: weights trained on one tokenizer are refused with another. A backbone may be another
run's beginning.
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


def load(reference: str, *, kind: type, what: str, sha256: str = "") -> Frozen:
    """The module behind `reference`: a run folder (its newest checkpoint, averaged weights where the run kept them), a
    folder that `save` wrote, or `<model>.<tag>` of published weights.

    kind    the class of its model's config: another kind of model is refused
    what    the word for it in messages: tokenizer, codec
    sha256  refuse any other; "" takes what is there
    Raises FileNotFoundError where there is none; WeightsError for another kind, a wrong checksum, damaged files.
    """
    name, node, tensors, origin, expected = _read(reference, what)
    base: Any = registry.models.get(name)()
    if not isinstance(base, kind):
        raise weights.WeightsError(f"{what} = {reference!r} holds {name}, which is no {what}")
    built: Any = configs.build(type(base), base, node)
    module = built.build().eval().requires_grad_(False)
    weights.load_into(module, tensors, origin=origin)
    found = digest(module)
    if expected and found != expected:
        raise weights.WeightsError(
            f"{reference} is damaged or another {what}: its tensors have sha256 {found}, not {expected}"
        )
    if sha256 and found != sha256.lower():
        raise weights.WeightsError(f"the {what} {reference!r} has sha256 {found}, not {sha256.lower()}")
    return Frozen(module, name, configs.to_dict(module.config), found, origin)


def save(frozen: Frozen, folder: Path) -> None:
    """Write model.safetensors and its card into `folder`, for `load`."""
    weights.save(weights.named_tensors(frozen.module), folder / "model.safetensors")
    weights.replace_file(folder / CARD, json.dumps({**frozen.card(), "config": frozen.config}, indent=1).encode())


def start_backbone(model: nn.Module, reference: str) -> dict[str, str]:
    """Copy the backbone of trained weights, of whatever domain, into `model`; its head stays as it is. Returns what
    stands with the numbers of the new model: name, sha256 of the copied tensors, origin.

    Raises FileNotFoundError; WeightsError that lists every tensor that does not fit, and then nothing is changed.
    """
    name, node, tensors, origin, _ = _read(reference, "backbone")
    prefix = "backbone."
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not own or not isinstance(backbone := getattr(model, "backbone", None), nn.Module):
        raise weights.WeightsError(f"{name if not own else type(model).__name__} has no backbone to move")
    try:
        weights.load_into(backbone, own, origin=origin)
    except weights.WeightsError as error:
        base: Any = registry.models.get(name)()
        theirs = configs.build(type(base), base, node)
        lines = configs.difference(theirs.backbone, getattr(model.config, "backbone", {}), "model.backbone")
        raise weights.WeightsError(
            f"the backbone of {origin} ({name}) does not fit: {'; '.join(lines) or error}"
        ) from error
    return {"name": name, "sha256": hashlib.sha256(weights.to_bytes(own)).hexdigest(), "origin": origin}


# ---------------------------------------------------------------------------------------------------------------------
# Readers: the model's name and config, its tensors, where they come from, and the digest that is promised, if any

Parts = tuple[str, dict[str, Any], dict[str, Tensor], str, str]


def _read(reference: str, what: str) -> Parts:
    folder = Path(reference).expanduser()
    if (folder / CARD).is_file():
        return _read_bundle(folder)
    if (folder / "checkpoints").is_dir():
        return _read_run(folder)
    if reference in weights.weights:
        name, _, tag = reference.partition(".")
        module = weights.load_pretrained(name, tag)
        return name, configs.to_dict(module.config), weights.named_tensors(module), reference, ""
    published = ", ".join(weights.weights.names()) or "none yet"
    raise FileNotFoundError(
        f"the {what} {reference!r} is neither a run folder with checkpoints, nor a folder with {CARD}, nor one of "
        f"the published weights ({published}). Train one first: `zoo list --kind recipes` names the recipes"
    )


def _read_bundle(folder: Path) -> Parts:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        name, node, sha256, origin = (card[key] for key in ("name", "config", "sha256", "origin"))
    except (ValueError, KeyError, TypeError) as error:
        raise weights.WeightsError(f"{folder / CARD} is damaged: {error}") from error
    return name, node, weights.read(folder / "model.safetensors"), origin, sha256


def _read_run(run: Path) -> Parts:
    """The newest checkpoint, as zoo/train/checkpoint.py writes it; each file is checked against the manifest."""
    steps = sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))
    if not steps:
        raise FileNotFoundError(f"the run {run} has no checkpoint yet")
    try:
        manifest = json.loads((steps[-1] / "manifest.json").read_bytes())
        files, node = manifest["files"], dict(manifest["recipe"]["model"])
        name = node.pop("name")
    except (ValueError, KeyError, TypeError) as error:
        raise weights.WeightsError(f"{steps[-1] / 'manifest.json'} is damaged: {error}") from error
    for stem in ("ema", "model"):
        pattern = re.compile(stem + r"(\.\d+-of-\d+)?\.safetensors")
        parts = [weights.read(steps[-1] / f, sha256=files[f]["sha256"]) for f in sorted(files) if pattern.fullmatch(f)]
        if parts:
            break
    slices = {key: [part[key] for part in parts if key in part] for part in parts for key in part}
    tensors = {key: torch.cat(own) if len(own) > 1 else own[0] for key, own in slices.items()}
    return name, node, tensors, str(run), ""
