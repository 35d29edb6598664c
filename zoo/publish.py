"""`zoo publish`: published weights out of a run. The card's numbers are measured from the rounded weights themselves.

What no program knows (licences, limits, figures of peers) comes from a YAML file in the person's words, `About`.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo import __version__, weights
from zoo import config as configs
from zoo.evaluate.score import circumstances, measure_split, origin
from zoo.task import Media, Task
from zoo.train import Recipe, chosen_checkpoint, load_run, pick_device, read_manifest
from zoo.train.log import write_media
from zoo.train.parallel import Ranks
from zoo.weights import Row
from zoo.weights.published import CARD, MAX_FILE, MAX_TOTAL, compact, join, split, write_row

ROUNDING = 0.005  # of a number's size: what another device or batch size may change


@dataclass
class Peer:
    """A figure to read beside the card's: whose it is, of which of the card's numbers, and where it was published."""

    name: str
    metric: str
    value: float
    source: str


@dataclass
class About:
    """The part of a card that a person writes.

    summary    what it is, in a sentence or two
    licence    of the weights, an SPDX name
    data       what it was trained on, with the licence of that
    limits     what it cannot do and must not be used for
    peers      published figures, a Peer each
    overrides  fields of the recipe to change for the evaluation, such as task.samples.count=0
    tolerance  name of a number -> share of it that may change when it is measured again (default 0.005)
    """

    summary: str
    licence: str
    data: str
    limits: str
    peers: list[dict[str, Any]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    tolerance: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("summary", "licence", "data", "limits"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} takes a few words: no weights without them")


def read_about(path: Path) -> About:
    """Raises ConfigError that names the file and the field."""
    given = configs.read_yaml(path)
    known = {each.name: each.default_factory is MISSING for each in fields(About)}  # whether a person has to give it
    lacking = [name for name, needed in known.items() if needed and name not in given]
    if lacking and known.keys() >= given.keys():  # else a name is mistyped, and `build` names the nearest
        example = "; an example: docs/cards/text.tinyshakespeare.yaml (docs/weights.md)"
        raise configs.ConfigError(f"{path} lacks {', '.join(lacking)}{example}")
    return configs.build(About, given, path=str(path))


def publish(
    run: Path,
    tag: str,
    about: About,
    *,
    out: Path | None = None,
    table: Path | None = None,
    split_name: str = "test",
    batch_size: int = 16,
    device: str | None = None,
    max_file: int = MAX_FILE,
    max_total: int = MAX_TOTAL,
) -> Path:
    """Write `out`/<model>.<tag> from a run's newest checkpoint and put its row into `table`; returns the folder. One of
    the same name is replaced, once the new one is whole.

    out    default: `weights` of the checkout, or beside the table of a package of one's own
    table  default: the weights.yaml beside the module of the task
    max_file, max_total  bytes of a file, and of all weights in `out`; more is refused
    Raises FileNotFoundError where there is no run, ValueError for a size, a name or a number that does not fit.
    """
    place = pick_device(device)
    recipe, task, model = load_run(run, device=place, overrides=configs.dotted(about.overrides))
    manifest = read_manifest(chosen_checkpoint(run))
    size = manifest["recipe"]["model"]["name"]
    name = f"{size}.{tag}"
    row = configs.build(
        Row,
        {"model": size, "tag": tag, "sha256": "0" * 64, "licence": about.licence},
        {"data": about.data, "recipe": manifest["fingerprint"]},
    )
    table = table or Path(inspect.getfile(type(task))).with_name("weights.yaml")
    out = out or default_out(table)
    part = out / f".{name}.{os.getpid()}.part"
    part.mkdir(parents=True)
    try:
        files = split(compact(weights.named_tensors(model)), name, max_file)
        for file, data in files.items():
            weights.write_file(part / file, data)
        weights.load_into(model, join([weights.read(part / file) for file in sorted(files)]), origin=name)
        task.attach(model, part / "fitted")  # the rounded weights are others than the run's
        if (run / "assets").is_dir() and any((run / "assets").iterdir()):
            shutil.copytree(run / "assets", part / "assets")
        measured = measure_split(recipe, task, model, split_name, batch_size=batch_size, device=place, ranks=Ranks())
        facts = {
            "format": 1,
            "name": name,
            "config": configs.to_dict(model.config),
            "recipe": manifest["recipe"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "about": asdict(about),
            "origin": {**origin(run), "frozen": task.frozen(), "sessions": _sessions(run)},
            "frozen": task.frozen(),
            "evaluation": {**measured.facts, "overrides": about.overrides, **circumstances(place)},
            "numbers": _numbers(measured.values, about),
            "baselines": task.baselines(split_name),
            "zoo": __version__,
        }
        draw_curve(run / "metrics.jsonl", part / "curve.png", name)
        samples = write_media(_samples(task, model, recipe, place), part / "samples")
        facts["samples"] = [path.relative_to(part).as_posix() for path in samples]
        (part / "README.md").write_text(render(json.loads(json.dumps(facts))), encoding="utf-8")
        facts["files"] = _index(part)
        data = json.dumps(facts, indent=1).encode()
        weights.write_file(part / CARD, data)
        check_sizes(part, out, name, max_file, max_total)
        final = out / name
        shutil.rmtree(final, ignore_errors=True)
        os.rename(part, final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    write_row(table, Row(**{**asdict(row), "sha256": hashlib.sha256(data).hexdigest()}))
    return final


def default_out(table: Path) -> Path:
    """Where the weights of a table lie: at the root of the checkout for its own domains, else beside the table."""
    root = configs.checkout()
    return (root if root and table.is_relative_to(root / "tasks") else table.parent) / "weights"


def check_sizes(folder: Path, out: Path, name: str, max_file: int, max_total: int) -> None:
    """Raises ValueError for a file, or together with the other weights in `out` a total, that is too large."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > max_file:
            raise ValueError(
                f"{path.relative_to(folder)} takes {size} bytes; a file of weights takes {max_file} at most"
            )
    others = [path for path in out.glob("*.*/**/*") if path.is_file() and not path.is_relative_to(folder)]
    total = sum(sizes.values()) + sum(path.stat().st_size for path in others if path.relative_to(out).parts[0] != name)
    if total > max_total:
        raise ValueError(f"with {name} the weights in {out} take {total} bytes; all together take {max_total} at most")


def _numbers(values: Mapping[str, float], about: About) -> list[dict[str, Any]]:
    peers = [configs.build(Peer, peer, path=f"peers[{number}]") for number, peer in enumerate(about.peers)]
    if unknown := [key for key in (*about.tolerance, *(peer.metric for peer in peers)) if key not in values]:
        raise ValueError(f"{', '.join(unknown)}: no number of this evaluation; it has {', '.join(values)}")
    return [
        {"name": key, "value": value, "tolerance": abs(value) * about.tolerance.get(key, ROUNDING)}
        for key, value in values.items()
    ]


def _sessions(run: Path) -> list[Any]:
    path = run / "provenance.json"
    return json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.is_file() else []


def _samples(task: Task, model: nn.Module, recipe: Recipe, place: torch.device) -> Media:
    """What the task shows of a validation batch, or of nothing."""
    stream = task.stream("valid", batch_size=recipe.train.micro_batch_size or recipe.train.batch_size)
    with torch.no_grad():
        return task.media(model, next(iter(stream)).to(place))


def _index(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in paths
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a person looks at


def draw_curve(metrics: Path, path: Path, title: str) -> None:
    """The losses of metrics.jsonl over the steps."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name in ("train/loss", "valid/loss"):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": ""})


def render(facts: Mapping[str, Any]) -> str:
    """The card as a page, for a repository or a hub."""
    about, origin_, said = facts["about"], facts["origin"], facts["evaluation"]
    device = ", ".join(dict.fromkeys(str(session["device"]) for session in origin_["sessions"])) or "not recorded"
    rows = {
        "model": f"`{origin_['model']}`, {facts['parameters']:,} parameters",
        "data": about["data"],
        "licence of the weights": about["licence"],
        "recipe": f"fingerprint `{origin_['fingerprint']}`, seed {origin_['seed']}, {origin_['step']} steps",
        "commit": f"`{origin_['commit']}`",
        "trained on": device,
    }
    numbers = [
        f"| {entry['name']} | {entry['value']:.5g} | ± {entry['tolerance']:.2g} | {_beside(entry['name'], about)} |"
        for entry in facts["numbers"]
    ]
    numbers += [f"| {key} (no model) | {value:.5g} | | |" for key, value in facts["baselines"].items()]
    changed = f", with {', '.join(said['overrides'])}" if said["overrides"] else ""
    lines = [
        *("---", f"license: {about['licence'].lower()}", "library_name: gatedfwa-zoo", "---", f"# {facts['name']}", ""),
        *(about["summary"].strip(), "", "| | |", "|---|---|"),
        *(f"| {key} | {value} |" for key, value in rows.items()),
        *("", "```python", "import zoo", "", f'pipe = zoo.pipeline("{facts["name"]}")', "```", ""),
        *(
            "## Numbers",
            "",
            f"{said['split']} split, {said['protocol']}, {said['precision']}, {said['hardware']}{changed}.",
        ),
        *(f"Again: `zoo evaluate {facts['name']} --pretrained`.", ""),
        *("| number | value | within | peers |", "|---|---|---|---|", *numbers, ""),
        *("## Training", "", "![Losses over the steps](curve.png)"),
        *(("", "## Samples", "", *map(_shown, facts["samples"])) if facts["samples"] else ()),
        *("", "## Limits", "", about["limits"].strip(), "", "## Recipe", "", "```yaml"),
        *(configs.to_yaml(facts["recipe"]).rstrip(), "```", ""),
    ]
    return "\n".join(lines)


def _beside(metric: str, about: Mapping[str, Any]) -> str:
    named: Sequence[Any] = [peer for peer in about["peers"] if peer["metric"] == metric]
    return "; ".join(f"{peer['name']} {peer['value']:.5g} ({peer['source']})" for peer in named)


def _shown(path: str) -> str:
    return f"![{Path(path).stem}]({path})" if path.endswith(".png") else f"- [{Path(path).name}]({path})"
