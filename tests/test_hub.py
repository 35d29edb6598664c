"""zoo push and zoo pull with huggingface_hub's own client, against a hub of this machine (local_hub.py)."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo import cli, weights
from zoo.weights import Row
from zoo.weights.published import read_table, write_row

NAME = "toy_mlp_1m.shapes"
PROGRAM = """
import sys
from dataclasses import dataclass
from pathlib import Path
from torch import nn
from zoo import cli, registry, weights

@dataclass
class Config:
    width: int = 4
    def build(self):
        return nn.Linear(self.width, 2)

for one, entries in ((weights.weights, {}), (registry.models, {"toy_mlp_1m": Config})):
    one._entries, one._load = entries, None
weights.add_table(Path(sys.argv[1]))
if sys.argv[2] == "load":
    print(weights.load_pretrained("toy_mlp_1m", "shapes").weight.sum().item())
else:
    sys.exit(cli.main(sys.argv[2:]))
"""


def load_local_hub():
    spec = importlib.util.spec_from_file_location("local_hub", Path(__file__).with_name("local_hub.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub():
    with load_local_hub().local_hub() as hub:
        yield hub


@pytest.fixture
def table(tmp_path) -> Path:
    """A table with one row, and its folder beside it."""
    torch.manual_seed(0)
    folder = tmp_path / "weights" / NAME
    sha256 = weights.save(weights.named_tensors(nn.Linear(6, 2)), folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    files = {"model.safetensors": {"sha256": sha256, "size": size}}
    data = json.dumps({"name": NAME, "config": {"width": 6}, "files": files}).encode()
    (folder / "card.json").write_bytes(data)
    row = Row("toy_mlp_1m", "shapes", hashlib.sha256(data).hexdigest(), "CC0-1.0", "shapes")
    path = tmp_path / "weights.yaml"
    path.write_text(json.dumps({"rows": [dataclasses.asdict(row)]}))
    return path


def zoo(table: Path, *words: str, hub=None, ok: bool = True) -> str:
    """`zoo WORDS` in a process of its own, whose hub is `hub`; None: none may be asked."""
    address = hub.address if hub else "http://127.0.0.1:9"
    settings = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0" if hub else "1",
        "HF_TOKEN": "hf_nobody",
        "HF_HUB_DISABLE_XET": "1",
    }
    settings |= {"ZOO_CACHE": str(table.parent / "cache"), "HF_HOME": str(table.parent / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(table), *words],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or not ok and words[0] == "load", done.stderr
    return done.stdout if ok else done.stderr


def test_push_pins_the_commit_and_pull_brings_it_back(table, hub):
    weight = zoo(table, "load")  # from the folder, offline
    pinned = zoo(table, "push", NAME, "someone/zoo", hub=hub).strip()
    commit = hub.heads["someone/zoo"]
    assert pinned == f"someone/zoo@{commit}" == read_table(table)[0].hub
    assert set(hub.commits[commit]) == {f"{NAME}/card.json", f"{NAME}/model.safetensors"}

    shutil.rmtree(table.parent / "weights")
    assert zoo(table, "load", hub=hub) == weight  # fetched
    shutil.rmtree(table.parent / "cache")
    hub.asked.clear()
    cached = table.parent / "cache" / "weights" / NAME
    assert zoo(table, "pull", NAME, hub=hub).strip() == str(cached)
    assert sorted(path.name for path in cached.iterdir()) == ["card.json", "model.safetensors"]
    about = [line for line in hub.asked if "someone/zoo" in line]
    assert about
    assert all(commit in line for line in about), about  # the pinned one, never a branch
    assert [path.name for path in cached.parent.iterdir()] == [NAME]
    assert zoo(table, "load") == weight  # again offline


def test_what_the_hub_has_changed_is_refused(table, hub):
    zoo(table, "push", NAME, "someone/zoo", hub=hub)
    shutil.rmtree(table.parent / "weights")
    commit = hub.heads["someone/zoo"]
    file = f"{NAME}/model.safetensors"
    whole = hub.commits[commit][file]
    for data, says in ((whole[:-3] + b"abc", "is damaged"), (whole[:-3], "is truncated")):
        hub.commits[commit][file] = data
        said = zoo(table, "pull", NAME, hub=hub, ok=False)
        assert f"{file} {says}" in said
    hub.commits[commit] = {file: whole}
    assert "card.json is missing" in zoo(table, "pull", NAME, hub=hub, ok=False)
    assert not list((table.parent / "cache" / "weights").iterdir())


def test_errors_are_one_line(table, hub):
    row = dataclasses.replace(read_table(table)[0], hub=f"someone/zoo@{'0' * 40}")
    write_row(table, row)
    shutil.rmtree(table.parent / "weights")
    assert f"cannot be fetched from {row.hub}" in zoo(table, "pull", NAME, ok=False)  # offline
    assert f"cannot be fetched from {row.hub}" in zoo(table, "pull", NAME, hub=hub, ok=False)  # no such commit


def test_what_needs_no_hub_asks_none(table, monkeypatch, capsys):
    monkeypatch.setattr(weights.weights, "_entries", {})
    monkeypatch.setattr(weights.weights, "_load", None)
    monkeypatch.setattr("zoo.weights.hub.client", lambda: pytest.fail("the hub was asked"))
    weights.add_table(table)
    path = table.parent / "weights" / NAME / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    for words, says in (
        (["pull", NAME], "names no hub: `zoo push` fills it in"),
        (["pull", "toy_mlp_2m"], "no published weights"),
        (["push", NAME, "someone/zoo"], "model.safetensors is damaged"),
    ):
        assert cli.main(words) == 2
        assert says in capsys.readouterr().err
    shutil.rmtree(path.parent)
    assert cli.main(["push", NAME, "someone/zoo"]) == 2
    assert "there is nothing to push" in capsys.readouterr().err
