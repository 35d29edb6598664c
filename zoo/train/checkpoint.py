"""Checkpoints that are whole or not there.

    run/checkpoints/step-00000100/   model, ema, optimizer, rng .safetensors; state.json; manifest.json
                                     model.00001-of-00002.safetensors, …: slices, where ranks hold slices (fsdp)
    run/checkpoints/best.json        which of them the best evaluation chose, where train.best asks for it
    run/checkpoints/bad-00000100/    weights that are not finite, for study: never taken up again
    run/checkpoints/.tmp-100-4711/   being written, or left by a process that was killed: removed at the next start

A folder is filled under a temporary name, each file flushed to the disk, the manifest with every file's sha256 last;
one rename makes it real. Older ones are deleted only after the new one has been read back. No file is a pickle: that
is why ranks write safetensors slices here and not the format of torch.distributed.checkpoint, whose metadata is one. A
slice is a part of dim 0, so joining them in order gives the same whole on any number of ranks.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from zoo import weights
from zoo.train.parallel import Ranks

MANIFEST = "manifest.json"
BEST = "best.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or damaged."""


class DiskFull(OSError):
    """No room for a checkpoint; the one before it is intact."""


class NonFinite(RuntimeError):
    """Weights that are not numbers: saved aside, and the run ends."""


@dataclass
class Content:
    """What a checkpoint holds.

    tensors  file stem -> name -> tensor: "model", "ema" (if kept), "optimizer", "rng"; of all ranks but the first,
             the files that they write: "model.00002-of-00002", "rng.rank1"
    state    plain JSON values: data position, meters, numbers of the optimizer, RNG states that are no tensors
    facts    plain JSON values for the manifest: recipe, fingerprint, world size, …
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    facts: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save(root: Path, step: int, content: Content, *, keep: int = 0, ranks: Ranks | None = None) -> Path:
    """Write `root`/step-…, read it back, then delete all but the newest `keep` (0 keeps all) and the best. Returns its
    path.

    All ranks call it together, on one file system. Raises NonFinite (the weights are in bad-… then) or DiskFull, on
    all of them.
    """
    ranks = ranks or Ranks()
    faults = ranks.each(lambda: first_non_finite(content.tensors))
    if fault := next(filter(None, faults), None):
        aside = _write(root, f"bad-{step:08d}", step, content, ranks)
        raise NonFinite(
            f"{fault} is not finite after step {step}. The weights are aside in {aside}; the newest good checkpoint is "
            f"{newest_name(root)}. Resume from it with a lower optimizer.lr, or find the cause in {aside}."
        )
    path = _write(root, f"step-{step:08d}", step, content, ranks)
    ranks.first(lambda: verify(path) and None)
    if keep and ranks.rank == 0:
        # Folders of later steps are damaged ones that this run was resumed below: they are not what `keep` counts.
        best = read_best(root)
        for old in [other for other in steps_in(root) if other.name < path.name][keep - 1 :]:
            if best is not None and old == best.path:
                continue
            with contextlib.suppress(OSError):  # an old checkpoint that stays is no reason to end a run
                remove(old)
    return path


def first_non_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """'model: head.out.weight' for the first tensor of the weights or their average that holds a NaN or infinity."""
    for file, held in tensors.items():
        stem = file.split(".")[0]
        named = {name: t for name, t in held.items() if t.is_floating_point() and stem in ("model", "ema")}
        if named and not torch.stack([torch.isfinite(t).all() for t in named.values()]).all():
            return next(f"{stem}: {name}" for name, t in named.items() if not torch.isfinite(t).all())
    return None


def _write(root: Path, name: str, step: int, content: Content, ranks: Ranks) -> Path:
    final = root / name
    need = sum(ranks.each(lambda: _size(content)))
    temporary = ranks.first(lambda: _begin(root, final, step, need))
    if temporary is None:
        return final
    try:
        written = ranks.each(lambda: _put_all(temporary, content))
        files = {name: entry for part in written for name, entry in part.items()}
        ranks.first(lambda: _finish(temporary, final, step, content, files))
    except OSError as error:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # gives back the room that the half-written one took
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(error.errno, _full(root, "ran full while saving")) from error
        raise
    return final


def _begin(root: Path, final: Path, step: int, need: int) -> Path | None:
    """The folder to write in; None if the same step was saved before an interruption, and is whole."""
    root.mkdir(parents=True, exist_ok=True)
    if final.exists():
        try:
            verify(final)
            return None
        except CheckpointError:
            remove(final)
    free = shutil.disk_usage(root).free
    if free < need:
        raise DiskFull(
            errno.ENOSPC, _full(root, f"has {free / 1e6:.1f} MB free, a checkpoint takes {need / 1e6:.1f} MB")
        )
    temporary = root / f".tmp-{step}-{os.getpid()}"
    remove(temporary)
    temporary.mkdir()
    return temporary


def _put_all(temporary: Path, content: Content) -> dict[str, dict[str, Any]]:
    named = {f"{stem}.safetensors": tensors for stem, tensors in content.tensors.items()}
    return {name: _put(temporary / name, weights.to_bytes(tensors)) for name, tensors in named.items()}


def _finish(temporary: Path, final: Path, step: int, content: Content, files: dict[str, dict[str, Any]]) -> None:
    files = {**files, "state.json": _put(temporary / "state.json", _json(content.state))}
    manifest = {"format": FORMAT, "step": step, **content.facts, "files": files}
    _put(temporary / MANIFEST, _json({**manifest, "digest": _digest(manifest)}))
    weights.sync_folder(temporary)
    os.rename(temporary, final)
    weights.sync_folder(final.parent)


def _put(path: Path, data: bytes) -> dict[str, Any]:
    weights.write_file(path, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    """The manifest's own checksum, over all of it but itself."""
    return hashlib.sha256(_json({name: value for name, value in manifest.items() if name != "digest"})).hexdigest()


def _size(content: Content) -> int:
    need = sum(t.numel() * t.element_size() for named in content.tensors.values() for t in named.values())
    return need + len(json.dumps(content.state)) + (1 << 20)


def _full(root: Path, what: str) -> str:
    return (
        f"the disk of {root} {what}. Nothing is lost: the newest checkpoint is {newest_name(root)}. "
        "Make room (or lower train.keep) and resume."
    )


def remove(path: Path) -> None:
    """Delete a checkpoint folder; the manifest goes first, so that half a deletion is not taken for a checkpoint."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def sweep(root: Path) -> list[Path]:
    """Remove what killed processes left half-written. Only one process writes to a run at a time."""
    orphans = sorted(root.glob(".tmp-*")) if root.is_dir() else []
    for orphan in orphans:
        shutil.rmtree(orphan, ignore_errors=True)
    return orphans


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def steps_in(root: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first, good or not."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_name(root: Path) -> str:
    found = steps_in(root)
    return str(found[0]) if found else "none yet"


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    passed_over = []
    for path in steps_in(root):
        try:
            verify(path)
        except CheckpointError as error:
            passed_over.append(f"skipped a damaged checkpoint: {error}")
        else:
            return path, passed_over
    return None, passed_over


@dataclass(frozen=True)
class Best:
    """The evaluation after which step was the best by a rule of train.best, its number, and the checkpoint."""

    rule: str
    step: int
    value: float
    path: Path


def read_best(root: Path) -> Best | None:
    """None where no evaluation has chosen a checkpoint."""
    try:
        found = json.loads((root / BEST).read_bytes())
    except FileNotFoundError:
        return None
    return Best(found["rule"], found["step"], found["value"], root / f"step-{found['step']:08d}")


def write_best(root: Path, rule: str, step: int, value: float) -> Best:
    """The checkpoint of the step has to be there already."""
    weights.replace_file(root / BEST, _json({"rule": rule, "step": step, "value": value}))
    return Best(rule, step, value, root / f"step-{step:08d}")


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has the size and sha256 written there. Raises CheckpointError."""
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        _read_file(path, name, expected)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}; this version reads {FORMAT}")
        if _digest(manifest) != manifest["digest"]:
            raise CheckpointError(f"{path / MANIFEST} is damaged: it does not have its own checksum")
        return manifest
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {MANIFEST}: it was never finished, or is not a checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        fault = f"there is no {error} in it" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {fault}") from error


def _read_file(path: Path, name: str, expected: Mapping[str, Any]) -> bytes:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    data = file.read_bytes()
    if len(data) != expected["size"]:
        state = "truncated" if len(data) < expected["size"] else "damaged"
        raise CheckpointError(f"{file} is {state}: {len(data)} bytes, not {expected['size']}")
    if (found := hashlib.sha256(data).hexdigest()) != expected["sha256"]:
        raise CheckpointError(f"{file} is damaged: its sha256 is {found}, not {expected['sha256']}")
    return data


def read_tensors(path: Path, stem: str) -> dict[str, Tensor] | None:
    """The tensors `stem` of a checkpoint on the CPU, whole, checked against the manifest; None if the run kept none."""
    manifest = read_manifest(path)
    slices: dict[str, list[Tensor]] = {}
    found = _files_of(manifest, stem)
    for name in found:
        try:
            tensors = weights.read(path / name, sha256=manifest["files"][name]["sha256"])
        except (weights.WeightsError, FileNotFoundError) as error:
            raise CheckpointError(str(error)) from error
        for key, tensor in tensors.items():
            slices.setdefault(key, []).append(tensor)
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in slices.items()} if found else None


def weights_digest(manifest: Mapping[str, Any], stem: str = "model") -> str:
    """What names a checkpoint's weights: the sha256 of their file, or of its slices' own ones, one after the other."""
    found = [manifest["files"][name]["sha256"] for name in _files_of(manifest, stem)]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _files_of(manifest: Mapping[str, Any], stem: str) -> list[str]:
    pattern = re.compile(re.escape(stem) + r"(\.\d+-of-\d+)?\.safetensors")
    return sorted(filter(pattern.fullmatch, manifest["files"]))


def read_state(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    return json.loads(_read_file(path, "state.json", manifest["files"]["state.json"]))


# ---------------------------------------------------------------------------------------------------------------------
# Random number generators, and what a number must carry


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every global generator: python, numpy, torch on CPU and on each GPU; as tensors and plain values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.array(keys, dtype=np.int64))
    plain = {"python": [version, list(words), gauss], "numpy": [str(name), int(place), int(has_gauss), float(cached)]}
    return tensors, plain


def set_rng_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """A GPU's generator is put back where there is such a GPU."""
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, place, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, cached))


def seed_everything(seed: int) -> None:
    seed_python(seed)
    torch.manual_seed(seed)


def seed_python(seed: int) -> None:
    """Python's and numpy's generators, from which a package may draw when it is first imported."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def undisturbed_rng(seed: int) -> Iterator[None]:
    """Evaluation and samples draw from a seed of their own and leave training's generators as they were."""
    tensors, plain = rng_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_rng_state(tensors, plain)


def versions() -> dict[str, str]:
    return {
        "zoo": zoo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def git_commit() -> str | None:
    """$ZOO_COMMIT, for a copy of a checkout that went to another machine without its history; else the commit of the
    checkout that zoo runs from, with '+changes' if files differ; None outside of one."""
    if named := os.environ.get("ZOO_COMMIT"):
        return named
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        # zoo may be installed inside someone else's repository: theirs is not our commit
        if "zoo/train/checkpoint.py" not in ask("ls-files", "--full-name", "checkpoint.py"):
            return None
        return ask("rev-parse", "HEAD").strip() + ("+changes" if ask("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
