"""Published weights: made out of a run, found offline, checked to the last byte, measured again, pushed and pulled."""

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from zoo import cli, config, registry, weights
from zoo.evaluate import repeat
from zoo.publish import About, Peer, publish, read_about
from zoo.train import Recipe, load_published, load_run, train
from zoo.weights import Row, WeightsError
from zoo.weights.published import MAX_FILE, MAX_TOTAL, compact, join, read_card, split, write_row

WORDS = ["train.steps=30", "train.batch_size=4", "train.eval_every=15", "train.sample_every=0", "task.context=64"]
WORDS += ["task.sample_tokens=20", "train.ema=0.9"]
ABOUT = {
    "summary": "A toy.",
    "licence": "Apache-2.0",
    "data": "lines of numbers, CC0-1.0",
    "limits": "It knows nothing.",
    "peers": [{"name": "gzip -9", "metric": "bits_per_byte", "value": 2.5, "source": "here"}],
    "tolerance": {"bits_per_byte": 0.01},
}
NAME = "text_gatedfwa_1m.lines"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "lines.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(800)))
    words = [*WORDS, "task.dataset.name=text/folder", f"task.dataset.path={folder / 'lines.txt'}"]
    train(config.build(Recipe, *config.recipe_layers("text/smoke", words)), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def made(run, tmp_path_factory) -> Path:
    """A folder with a table and the weights beside it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.weights, "_entries", {})
        patch.setattr(weights.weights, "_load", None)
        patch.setattr(socket, "socket", no_network)
        about = config.build(About, ABOUT)
        assert (
            publish(run, "lines", about, out=home / "weights", table=home / "weights.yaml") == home / "weights" / NAME
        )
    return home


def no_network(*_, **__):
    raise AssertionError("a socket was opened")


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, the only table that zoo knows, and no network."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setattr(weights.weights, "_entries", {})
    monkeypatch.setattr(weights.weights, "_load", None)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "socket", no_network)
    weights.add_table(tmp_path / "home" / "weights.yaml")
    return tmp_path / "home"


def test_one_line_gives_the_model_and_its_tokenizer(home, run):
    model = zoo.create_model(NAME, pretrained=True)
    assert zoo.create_model("text_gatedfwa_1m", pretrained=True).parameter_count() == model.parameter_count()
    trained = load_run(run)[2].state_dict()
    for name, tensor in model.state_dict().items():  # matrices were rounded, vectors were not
        assert torch.equal(tensor, trained[name].bfloat16().float() if tensor.dim() > 1 else trained[name]), name
    pipe = zoo.pipeline(NAME, device="cpu")
    assert pipe.sample("7 times ", max_new=5, seed=0) == zoo.pipeline(NAME, device="cpu").sample(
        "7 times ", max_new=5, seed=0
    )
    assert zoo.list_models("text_*", pretrained=True) == [NAME]
    assert "text_gatedfwa_1m" not in zoo.list_models("text_*", pretrained=False)


def test_overrides_and_shapes_that_do_not_fit(home):
    wider = zoo.create_model(NAME, pretrained=True, backbone={"mixer": {"window": 7}})
    assert wider.backbone.config.mixer.config.window == 7
    with pytest.raises(
        WeightsError, match=r"home/weights/text_gatedfwa_1m.lines does not fit Model: .*of another shape"
    ):
        zoo.create_model(NAME, pretrained=True, backbone={"width": 32})


def test_weights_that_are_not_there(home):
    with pytest.raises(FileNotFoundError, match=f"no published weights. Published weights: {NAME}"):
        weights.load_pretrained("text_swa_1m")
    with pytest.raises(FileNotFoundError, match=NAME):
        weights.load_pretrained("text_gatedfwa_1m", "nothing")
    shutil.rmtree(home / "weights")
    with pytest.raises(FileNotFoundError, match="not on this machine, and their row names no hub. Looked for: .*cache"):
        zoo.create_model(NAME, pretrained=True)


def test_two_tags_want_a_choice(home):
    row = weights.find(NAME).row
    write_row(home / "weights.yaml", dataclasses.replace(row, tag="other"))
    assert weights.tags_of("text_gatedfwa_1m") == ["lines", "other"]
    with pytest.raises(FileNotFoundError, match="several tags; name one"):
        weights.load_pretrained("text_gatedfwa_1m")


def test_the_cache_is_a_place_too(home, tmp_path):
    shutil.move(home / "weights", tmp_path / "cache" / "weights")
    assert zoo.create_model(NAME, pretrained=True).parameter_count() > 0
    assert cli.main(["list", "--pretrained"]) == 0


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 16
    path.write_bytes(data)


FILES = ("model.safetensors", "card.json", "assets/tokenizer.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["corrupted", "truncated", "renamed"])
def test_a_damaged_file_is_refused_by_name(home, file, damage):
    path = home / "weights" / NAME / file
    if damage == "corrupted":
        flip(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.rename(path.with_name("other.bin"))
    with pytest.raises((WeightsError, FileNotFoundError)) as refused:
        load_published(NAME)
    said = str(refused.value)
    assert str(path) in said or "other.bin" in said
    assert {"corrupted": "damaged", "truncated": "truncated", "renamed": ""}[damage] in said or file == "card.json"
    with pytest.raises((WeightsError, FileNotFoundError)):
        zoo.pipeline(NAME)


@pytest.fixture
def second(home, run) -> str:
    """Other weights of the same shape: nothing but digests tells them apart."""
    other = home / "weights" / "text_gatedfwa_1m.raw"
    path = publish(run, "raw", config.build(About, ABOUT), out=home / "weights", table=home / "weights.yaml")
    assert path == other
    return other.name


def test_swapped_files_are_refused_by_name(home, second):
    mine, other = home / "weights" / NAME, home / "weights" / second
    shutil.copy(other / "model.safetensors", mine / "model.safetensors")
    with pytest.raises(
        WeightsError, match=f"{NAME}/model.safetensors is damaged, or another version: it calls itself {second}"
    ):
        zoo.create_model(NAME, pretrained=True)
    shutil.copy(other / "card.json", mine / "card.json")
    with pytest.raises(WeightsError, match=f"is the card of {second}, not of {NAME}"):
        zoo.create_model(NAME, pretrained=True)


def test_a_renamed_folder_is_refused(home, second):
    shutil.rmtree(home / "weights" / NAME)
    (home / "weights" / second).rename(home / "weights" / NAME)
    with pytest.raises(WeightsError, match="swapped or renamed"):
        zoo.create_model(NAME, pretrained=True)


def test_a_damaged_folder_is_not_passed_over_for_the_next_place(home, tmp_path):
    shutil.copytree(home / "weights", tmp_path / "cache" / "weights")
    flip(home / "weights" / NAME / "model.safetensors")
    with pytest.raises(WeightsError, match="home/weights"):
        zoo.create_model(NAME, pretrained=True)


def test_a_card_stays_inside_its_folder(tmp_path):
    facts = {"name": "a.b", "files": {"../escape": {"sha256": "0", "size": 1}}}
    (tmp_path / "card.json").write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match="outside of its folder: ../escape"):
        read_card(tmp_path)


def test_a_card_cannot_reach_into_the_environment(tmp_path):
    facts = {"name": "a.b", "files": {}, "recipe": {"task": {"prompts": ["${oc.env:HOME}"]}}}
    (tmp_path / "card.json").write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match=r"'\$\{oc.env:HOME\}' is refused in a card"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sha256", "abc", "64 hexadecimal digits"),
        ("licence", " ", "no weights without them"),
        ("hub", "me/zoo@main", "all 40 digits of the commit"),
        ("tag", "a/../b", "small letters"),
    ],
)
def test_a_row_says_what_it_has_to(tmp_path, field, value, says):
    row = {"model": "a", "tag": "b", "sha256": "0" * 64, "licence": "CC0-1.0", "data": "none", field: value}
    (tmp_path / "weights.yaml").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(config.ConfigError, match=says) as error:
        weights.add_table(tmp_path / "weights.yaml")
    assert "weights.yaml: rows[0]" in str(error.value)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_says_all_there_is(home, run):
    folder = home / "weights" / NAME
    facts = weights.open_card(NAME).facts
    manifest = json.loads(next(run.glob("checkpoints/*30/manifest.json")).read_text())
    assert facts["origin"]["fingerprint"] == manifest["fingerprint"] == weights.find(NAME).row.recipe
    assert facts["recipe"] == manifest["recipe"]
    assert {"commit", "data", "seed", "sessions", "sha256"} <= set(facts["origin"])
    assert set(facts["files"]) == {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} - {"card.json"}
    page = (folder / "README.md").read_text()
    for words in (
        "CC0-1.0",
        "It knows nothing.",
        manifest["fingerprint"],
        "gzip -9 2.5 (here)",
        "curve.png",
        "```yaml",
    ):
        assert words in page
    (number,) = [number for number in facts["numbers"] if number["name"] == "bits_per_byte"]
    assert number["tolerance"] == pytest.approx(0.01 * number["value"])
    assert (folder / "curve.png").stat().st_size > 1000
    assert any("times" in (folder / name).read_text() or name for name in facts["samples"])


def test_every_published_number_comes_back(home, capsys):
    assert all(number.holds for number in repeat(NAME, device="cpu"))
    assert cli.main(["evaluate", "text_*", "--pretrained", "--device", "cpu"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate", NAME, "--pretrained", "--split", "valid"], "measured as their card says"),
        (["evaluate", NAME, "--pretrained", "task.stride=1"], "measured as their card says"),
        (["evaluate", NAME], "add --pretrained"),
        (["evaluate", "text_nothing*", "--pretrained"], f"Published weights: {NAME}"),
        (["list", "--pretrained", "--kind", "recipes"], "does not go with --kind recipes"),
        (["sample", "text_gatedfwa_1m.other", "--prompt", "x"], f"Published weights: {NAME}"),
    ],
)
def test_words_that_do_not_go_together(home, words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err


def test_a_number_that_does_not_hold_fails(home, capsys):
    folder = home / "weights" / NAME
    facts = json.loads((folder / "card.json").read_text())
    facts["numbers"][0]["value"] *= 1.2
    data = json.dumps(facts).encode()
    (folder / "card.json").write_bytes(data)
    import hashlib

    row = dataclasses.replace(weights.find(NAME).row, sha256=hashlib.sha256(data).hexdigest())
    write_row(home / "weights.yaml", row)
    assert cli.main(["evaluate", NAME, "--pretrained", "--device", "cpu"]) == 1
    assert f"1 numbers do not hold: {NAME}: {facts['numbers'][0]['name']}" in capsys.readouterr().err


def test_other_data_are_not_measured(home, run):
    text = run.parent / "lines.txt"
    whole = text.read_text()
    try:
        text.write_text(whole + "one more\n")
        with pytest.raises(WeightsError, match="was evaluated on other data than these:\n  data."):
            repeat(NAME, device="cpu")
    finally:
        text.write_text(whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limits": ""}, "limits takes a few words"),
        ({"peers": [{"name": "x", "metric": "nothing", "value": 1.0, "source": "y"}]}, "nothing: no number of this"),
        ({"tolerance": {"los": 0.1}}, "los: no number of this evaluation"),
    ],
)
def test_a_card_is_complete(home, run, change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        publish(run, "x", config.build(About, ABOUT, change), out=tmp_path / "w", table=tmp_path / "weights.yaml")
    assert not list(tmp_path.glob("w/*"))
    assert not (tmp_path / "weights.yaml").exists()


def test_sizes_are_limited(home, run, tmp_path):
    place = {"out": tmp_path / "weights", "table": tmp_path / "weights.yaml"}
    about = config.build(About, ABOUT)
    with pytest.raises(ValueError, match="all together take 90000 at most"):
        publish(run, "x", about, **place, max_total=90_000)
    folder = publish(run, "x", about, **place, max_file=60_000)
    files = sorted(path.name for path in folder.glob("model*"))
    assert len(files) > 2
    assert all((folder / file).stat().st_size <= 60_000 for file in files)
    same = zoo.create_model(NAME, pretrained=True).state_dict()
    assert all(torch.equal(t, same[n]) for n, t in zoo.create_model("text_gatedfwa_1m.x").state_dict().items())
    with pytest.raises(ValueError, match=r"weights in .* take \d+ bytes; all together"):
        publish(run, "y", about, **place, max_total=sum(p.stat().st_size for p in folder.rglob("*.*")) + 1000)


def test_split_cuts_long_tensors_and_join_mends_them():
    tensors = {"a": torch.randn(300, 100), "scale": torch.tensor(2.0), "none": torch.zeros(0, 3), "b": torch.arange(9)}
    held = compact(tensors)
    assert [str(tensor.dtype) for tensor in held.values()] == [
        "torch.bfloat16",
        "torch.float32",
        "torch.bfloat16",
        "torch.int64",
    ]
    files = split(held, "x.y", 20_000)
    assert len(files) == 5
    assert all(len(data) <= 20_000 for data in files.values())
    from safetensors.torch import load

    back = join([load(files[name]) for name in sorted(files)])
    assert back.keys() == held.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in held.items())
    with pytest.raises(ValueError, match="wide: one row takes 40000 bytes"):
        split({"wide": torch.zeros(2, 10_000)}, "x.y", 20_000)


def test_about_is_read_from_yaml(tmp_path):
    (tmp_path / "about.yaml").write_text(json.dumps(ABOUT))
    assert read_about(tmp_path / "about.yaml").licence == "Apache-2.0"
    (tmp_path / "short.yaml").write_text("summary: Some lines.\n")
    with pytest.raises(ValueError, match=r"short\.yaml lacks licence, data, limits; an example: (\S+)") as told:
        read_about(tmp_path / "short.yaml")
    assert (Path(cli.__file__).parents[1] / re.search(r"docs/cards/\S+", str(told.value))[0]).is_file()
    (tmp_path / "about.yaml").write_text(json.dumps({"license": "x"}))
    with pytest.raises(config.ConfigError, match="did you mean 'licence'"):
        read_about(tmp_path / "about.yaml")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("docs/cards/*.yaml")), ids=lambda p: p.stem)
def test_the_repositorys_own_cards_are_complete(path):
    about = read_about(path)
    peers = [config.build(Peer, peer) for peer in about.peers]
    assert len({(peer.name, peer.metric) for peer in peers}) == len(peers)
    config.dotted(about.overrides)


# -- what the repository holds ----------------------------------------------------------------------------------------


def test_the_repositorys_own_weights_are_whole_and_small():
    """Every row has its folder in this checkout or on the hub, and every folder its row."""
    root = config.checkout()
    assert root is not None
    own = {name for name in weights.weights.names() if weights.find(name).table.is_relative_to(root / "tasks")}
    for name in own:
        if weights.find(name).here():
            weights.open_card(name).check()
        else:
            assert weights.find(name).row.hub, f"{name} is neither in weights/ nor on the hub"
    files = [path for path in (root / "weights").rglob("*") if path.is_file()]
    assert {path.relative_to(root / "weights").parts[0] for path in files} <= own
    assert all(path.stat().st_size <= MAX_FILE for path in files)
    assert sum(path.stat().st_size for path in files) <= MAX_TOTAL


def test_importing_and_loading_ask_no_network(home):
    """In a process of its own, where any socket is an error, and huggingface_hub cannot be imported."""
    program = f"""
import sys
sys.modules["huggingface_hub"] = None
def no(event, _):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(event)
sys.addaudithook(no)
from pathlib import Path
import zoo
from zoo import weights
weights.weights._load = None
weights.add_table(Path({str(home / "weights.yaml")!r}))
print(zoo.create_model({NAME!r}, pretrained=True).parameter_count())
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_modules_without_a_head_can_be_published_models(monkeypatch, tmp_path):
    """The registry's own word for a model is anything whose config builds a module."""

    @dataclasses.dataclass
    class Config:
        width: int = 4

        def build(self):
            return nn.Linear(self.width, 2)

    monkeypatch.setattr(registry.models, "_entries", {"toy_mlp_1m": Config})
    monkeypatch.setattr(registry.models, "_load", None)
    monkeypatch.setattr(weights.weights, "_entries", {})
    monkeypatch.setattr(weights.weights, "_load", None)
    import hashlib

    folder, model = tmp_path / "weights" / "toy_mlp_1m.shapes", nn.Linear(6, 2)
    sha256 = weights.save(weights.named_tensors(model), folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    files = {"model.safetensors": {"sha256": sha256, "size": size}}
    data = json.dumps({"name": "toy_mlp_1m.shapes", "config": {"width": 6}, "files": files}).encode()
    (folder / "card.json").write_bytes(data)
    write_row(tmp_path / "weights.yaml", Row("toy_mlp_1m", "shapes", hashlib.sha256(data).hexdigest(), "CC0", "shapes"))
    assert torch.equal(weights.load_pretrained("toy_mlp_1m").weight, model.weight)
