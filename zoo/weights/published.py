"""Published weights: a folder each, whose card holds the digest of every other file, and a row that holds the card's.

    weights/<model>.<tag>/
        card.json            name, config, recipe, provenance, numbers; sha256 and size of every file beside it
        model.safetensors    matrices in bfloat16, the rest as it was trained; where it would grow past MAX_FILE,
                             model-00001-of-00002.safetensors and so on
        assets/              what its task needs to prompt and to decode: a tokenizer, class names
        fitted/              what its task fitted to these weights (Task.attach), where it does
        README.md  curve.png  samples/

The row stands in the `weights.yaml` of a domain's package, so the code names every byte that it loads by one digest.
The folder is looked for beside that table, in the checkout, in the cache; else it is fetched from the hub, by commit.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from zoo import config as configs
from zoo import registry
from zoo.files import cache_folder, file_sha256
from zoo.weights.files import LABEL, WeightsError, load_into, read, replace_file, to_bytes

CARD = "card.json"
MAX_FILE = 16 << 20  # bytes of one file
MAX_TOTAL = 32 << 20  # bytes of all weights that a repository holds


@dataclass(frozen=True)
class Row:
    """model, tag  the weights' name is <model>.<tag>
    sha256      of the folder's card.json
    licence     of the weights
    data        what they were trained on, and under which licence
    recipe      fingerprint of the run
    hub         "owner/repository@commit", where the folder <model>.<tag> lies; "": nowhere yet
    """

    model: str
    tag: str
    sha256: str
    licence: str
    data: str
    recipe: str = ""
    hub: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 = {self.sha256!r}; it takes 64 hexadecimal digits, those of {CARD}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.tag):
            raise ValueError(f"tag = {self.tag!r}; it takes small letters, digits, _ and -")
        if not self.licence.strip() or not self.data.strip():
            raise ValueError("licence and data take a few words each: no weights without them")
        if self.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", self.hub):
            raise ValueError(f"hub = {self.hub!r}; it takes owner/repository@commit, with all 40 digits of the commit")


@dataclass(frozen=True)
class Published:
    """A row and the table that it stands in."""

    row: Row
    table: Path

    @property
    def name(self) -> str:
        return f"{self.row.model}.{self.row.tag}"

    def places(self) -> list[Path]:
        """Where the folder may lie on this machine."""
        root = configs.checkout()  # a wheel holds no weights
        roots = [self.table.parent, *([root] if root else []), cache_folder()]
        return [place / "weights" / self.name for place in roots]

    def here(self) -> Path | None:
        """The folder, where it is on this machine."""
        return next((place for place in self.places() if place.is_dir()), None)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _load_tables(_: registry.Registry) -> None:
    for folder in registry.domain_folders().values():
        if (folder / "weights.yaml").is_file():
            add_table(folder / "weights.yaml")


weights: registry.Registry = registry.Registry("weights", _load_tables)


def add_table(path: Path) -> None:
    """Register the rows of a weights.yaml: {rows: [{model: …, tag: …, …}]}."""
    for row in read_table(path):
        weights.add(f"{row.model}.{row.tag}", Published(row, path))


def read_table(path: Path) -> list[Row]:
    """Raises ConfigError that names the file and the field."""
    given = configs.read_yaml(path).get("rows", []) if path.is_file() else []
    return [configs.build(Row, row, path=f"{path}: rows[{number}]") for number, row in enumerate(given)]


def write_row(path: Path, row: Row) -> None:
    """Put the row in the table, in the place of one of the same name."""
    others = [one for one in read_table(path) if (one.model, one.tag) != (row.model, row.tag)]
    rows = [
        {name: value for name, value in asdict(one).items() if value}
        for one in sorted([*others, row], key=lambda one: registry.natural_key(f"{one.model}.{one.tag}"))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "# Published weights, written by `zoo publish` and `zoo push`: docs/weights.md\n"
    replace_file(path, (head + yaml.safe_dump({"rows": rows}, sort_keys=False, width=1000)).encode())
    weights.add(f"{row.model}.{row.tag}", Published(row, path), replace=True)


def tags_of(model_name: str) -> list[str]:
    """The tags of a model size for which there are weights."""
    return [name.partition(".")[2] for name in weights.names(f"{model_name}.*")]


def find(name: str) -> Published:
    """By <model>.<tag>, or by <model> alone where it has one tag. Raises FileNotFoundError."""
    model, _, tag = name.partition(".")
    tags = tags_of(model)
    if not tag and len(tags) == 1:
        tag = tags[0]
    if not tag or tag not in tags:
        have = ", ".join(f"{model}.{one}" for one in tags) or ", ".join(weights.names()) or "none yet"
        choose = "several tags; name one" if tags and not tag else "no published weights"
        raise FileNotFoundError(f"{name!r} has {choose}. Published weights: {have}")
    return weights.get(f"{model}.{tag}")


# ---------------------------------------------------------------------------------------------------------------------
# Cards


@dataclass(frozen=True)
class Card:
    """What a folder's card.json says, once its digest is the one that was promised."""

    folder: Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return self.facts["name"]

    def read_model(self) -> dict[str, Tensor]:
        """The model's tensors as stored, each file checked. Raises WeightsError, FileNotFoundError."""
        names = sorted(name for name in self.facts["files"] if name.startswith("model"))
        parts = []
        for name in names:
            self._check_size(name)
            parts.append(read(self.folder / name, sha256=self.facts["files"][name]["sha256"]))
        return join(parts)

    def check(self, below: str = "") -> None:
        """Every file of the card whose path begins with `below` is there and has its bytes, and no other is. Raises
        WeightsError, FileNotFoundError."""
        if strangers := [name for name in self._strangers() if name.startswith(below)]:
            raise WeightsError(f"{self.folder} holds what its card does not name: {', '.join(strangers)}")
        for name in filter(lambda name: name.startswith(below), self.facts["files"]):
            self._check_size(name)
            promised, found = self.facts["files"][name]["sha256"], file_sha256(self.folder / name)
            if found != promised:
                path = self.folder / name
                raise WeightsError(f"{path} is damaged or another file: its sha256 is {found}, not {promised}")

    def assets(self) -> Path:
        """The folder for the task, each file in it checked."""
        self.check("assets/")
        return self.folder / "assets"

    def fitted(self) -> Path:
        """The folder of what the task fitted to these weights, each file in it checked; there may be none."""
        self.check("fitted/")
        return self.folder / "fitted"

    def _strangers(self) -> list[str]:
        held = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(name for name in held if name != CARD and name not in self.facts["files"])

    def _check_size(self, name: str) -> None:
        path, size = self.folder / name, self.facts["files"][name]["size"]
        if not path.is_file():
            strangers = ", ".join(self._strangers())
            beside = f"; what its card does not name lies there: {strangers}" if strangers else ""
            raise FileNotFoundError(f"{path} is missing from the weights {self.name}{beside}")
        if (found := path.stat().st_size) != size:
            state = "truncated" if found < size else "damaged"
            raise WeightsError(f"{path} is {state}: {found} bytes, not {size}")


def read_card(folder: Path, sha256: str | None = None, name: str = "") -> Card:
    """Raises FileNotFoundError, or WeightsError for a card with another digest or of other weights than `name`."""
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing" + (f" from the weights {name}" if name else ""))
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    try:
        facts = json.loads(data)
        own, files = facts["name"], facts["files"]
        told = json.dumps([facts.get("config"), facts.get("recipe")])
        escaping = [one for one in files if Path(one).is_absolute() or ".." in Path(one).parts]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: its sha256 is {found}, and it cannot be read as a card") from error
    if name and own != name:
        raise WeightsError(f"{path} is the card of {own}, not of {name}: the folder was swapped or renamed")
    if sha256 is not None and found != sha256:
        raise WeightsError(f"{path} is damaged or another version: its sha256 is {found}, not {sha256}")
    if escaping:
        raise WeightsError(f"{path} names files outside of its folder: {', '.join(escaping)}")
    if interpolation := re.search(r"\$\{[^}\"]*\}?", told):  # what is built from it would resolve it
        raise WeightsError(f"{path}: {interpolation.group()!r} is refused in a card; it takes values themselves")
    return Card(folder, facts)


def open_card(name: str) -> Card:
    """The card of published weights; fetched from the hub where they are not on this machine.

    Raises FileNotFoundError when there are none of that name or they are nowhere, WeightsError when damaged. What lies
    here is taken or refused: a damaged folder is not passed over for the next place, and no network is asked.
    """
    published = find(name)
    folder = published.here()
    if folder is None and published.row.hub:
        from zoo.weights import hub

        folder = hub.pull(published)
    if folder is None:
        looked = ", ".join(map(str, published.places()))
        raise FileNotFoundError(
            f"the weights {published.name} are not on this machine, and their row names no hub. Looked for: {looked}"
        )
    return read_card(folder, published.row.sha256, published.name)


def load_pretrained(name: str, tag: str | None = None, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The model `name` with its published weights; the only tag if `tag` is None.

    Raises FileNotFoundError when there are none, or nowhere; WeightsError when a file is damaged or does not fit.
    """
    card = open_card(f"{name}.{tag}" if tag else name)
    base = registry.models.get(name)()
    model = configs.build(type(base), base, card.facts["config"], dict(overrides or {})).build()
    load_into(model, card.read_model(), origin=str(card.folder))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Files of at most MAX_FILE


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as bfloat16; vectors (norms, biases, gates) and whatever is no float32 as they are."""
    return {
        name: tensor.to(torch.bfloat16) if tensor.dim() > 1 and tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors.items()
    }


def split(tensors: Mapping[str, Tensor], name: str, limit: int = MAX_FILE) -> dict[str, bytes]:
    """File name -> safetensors bytes, none longer than `limit`: a tensor that is too long for what is left of a file
    goes on in the next one, along its first dimension. `join` puts it together."""
    room = limit - 4096 - 256 * len(tensors)  # for a header that names them all
    parts: list[dict[str, Tensor]] = [{}]
    left = room
    for key, tensor in tensors.items():
        rows, each = (len(tensor), tensor[:1].nbytes) if tensor.dim() else (1, tensor.nbytes)
        done = 0
        while done < rows or not rows:
            fit = min(rows - done, left // max(each, 1))
            if fit < 1 and rows:
                if left == room:
                    raise ValueError(f"{key}: one row takes {each} bytes, more than a file of {limit} bytes holds")
                parts.append({})
                left = room
                continue
            parts[-1][key] = tensor[done : done + fit] if tensor.dim() else tensor
            left -= fit * each
            done += fit
            if not rows:
                break
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}" for i in range(len(parts))] if len(parts) > 1 else ["model"]
    return {
        f"{stem}.safetensors": to_bytes(part, {LABEL: name, "file": stem})
        for stem, part in zip(names, parts, strict=True)
    }


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of `split`'s files, in their order."""
    slices: dict[str, list[Tensor]] = {}
    for part in parts:
        for key, tensor in part.items():
            slices.setdefault(key, []).append(tensor)
    return {key: own[0] if len(own) == 1 else torch.cat(own) for key, own in slices.items()}
