"""The image task from pictures to tokens and back: tokenizer, checksums, prompts, completion, every size and recipe."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from tasks.image.classifier import scaled, to_images
from tasks.image.task import ImagePrompt
from tasks.image.tokenizer import Reconstruction, decode_all, encode_all, load_tokenizer
from zoo import cli, config, frozen, registry
from zoo.config import ConfigError, build, recipe_layers
from zoo.model import Batch
from zoo.pipelines import Pipeline, pipeline
from zoo.task import OneRank, Request
from zoo.train import Recipe, load_run, train
from zoo.train.recipe import make_model, make_task
from zoo.weights import WeightsError

SIDE = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 8 x 8 pictures: bright above, and bright on the left."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("valid", 6), ("test", 8)):
        for name in ("above", "left"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
                part = pixels[: SIDE // 2] if name == "above" else pixels[:, : SIDE // 2]
                part += 150
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def dataset(pictures):
    return {"name": "image/folder", "path": str(pictures), "size": SIDE}


TRAIN = {
    "steps": 3,
    "batch_size": 8,
    "schedule": {"warmup": 1},
    "optimizer": {"lr": 3e-3},
    "eval_every": 3,
    "sample_every": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def tokenizers(pictures, tmp_path_factory):
    """Two trained tokenizers of one shape, and their runs."""
    runs = []
    for seed in (0, 1):
        model = {"name": "image_tokenizer_f2", "width": 8, "depth": 1, "quantizer": {"codes": 16, "dim": 4}}
        task = {"name": "image_tokenizer", "dataset": dataset(pictures)}
        run = tmp_path_factory.mktemp("runs") / f"tokenizer{seed}"
        train(build(Recipe, {"task": task, "model": model, "train": {**TRAIN, "seed": seed, "ema": 0.9}}), run)
        runs.append(run)
    return runs


SMALL = {"width": 16, "depth": 1, "heads": 2, "mixer": {"window": 16}}


def recipe(pictures, *layers, **task):
    base = {
        "task": {"name": "image", "dataset": dataset(pictures), "grid": 2, **task},
        "model": {"name": "image_gatedfwa_1m", "backbone": SMALL},
        "train": TRAIN,
    }
    return build(Recipe, base, *layers)


@pytest.fixture(scope="module")
def codes_run(pictures, tokenizers, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "codes"
    train(recipe(pictures, sequence="codes", tokenizer=str(tokenizers[0]), conditional=True), run)
    return run


def image_task(pictures, **fields):
    entry = registry.tasks.get("image")
    return entry(build(entry.Config, {"dataset": dataset(pictures), **fields}))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", "planar", "hilbert"])
def test_a_row_is_the_picture_and_comes_back(pictures, order):
    task = image_task(pictures, order=order, conditional=True)
    batch = next(iter(task.stream("test", batch_size=16)))
    assert batch.inputs.shape == batch.targets.shape == (16, SIDE * SIDE * 3)
    assert (batch.inputs[:, 0] == 256).all()
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    images = task.data.load("test")
    assert batch.condition.tolist() == images.labels.tolist()
    for row, pixels in zip(batch.targets, images.pixels, strict=True):
        assert np.array_equal(task.artefact(row), pixels)


def test_training_sees_flips_and_evaluation_does_not(pictures):
    task = image_task(pictures, augment={"flip": True})
    images = {split: {i.tobytes() for i in task.data.load(split).pixels} for split in ("train", "test")}
    for split in ("train", "test"):
        batch = next(iter(task.stream(split, batch_size=16)))
        known = [task.artefact(row).tobytes() in images[split] for row in batch.targets]
        assert all(known) == (split == "test")


def test_codes_are_the_tokenizers(pictures, tokenizers):
    task = image_task(pictures, sequence="codes", tokenizer=str(tokenizers[0]), augment={"flip": True})
    batch = next(iter(task.stream("test", batch_size=4)))
    tokenizer = load_tokenizer(str(tokenizers[0])).module
    pixels = task.data.load("test").pixels[:4]
    codes = encode_all(tokenizer, pixels)
    assert batch.targets.tolist() == codes.reshape(4, -1).tolist()
    assert (batch.inputs[:, 0] == 16).all()
    assert np.array_equal(
        np.stack(task.artefacts(task.prompt([None] * 4), batch.targets)), decode_all(tokenizer, codes)
    )
    mirrored = encode_all(tokenizer, task.data.load("train").pixels[:, :, ::-1])
    assert np.array_equal(task._views("train", task.data.load("train"))[1][..., 0], mirrored)


def test_codes_and_pictures_are_the_same_under_autocast():
    """A validation stream is opened under the training's precision, a training stream is not."""
    torch.manual_seed(0)
    tokenizer = zoo.create_model("image_tokenizer_f2", width=16, depth=1, quantizer={"codes": 256, "dim": 4}).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
    tokenizer.quantizer.train()(tokenizer._encoded(scaled(to_images(pixels))))  # codes among the vectors
    tokenizer.eval()
    codes = encode_all(tokenizer, pixels)
    drawn = decode_all(tokenizer, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(encode_all(tokenizer, pixels), codes)
        assert np.array_equal(decode_all(tokenizer, codes), drawn)


def test_a_tokenizer_is_trained_measured_and_shown(tokenizers):
    _, task, model = load_run(tokenizers[0])
    metric = task.metrics("test")["reconstruction"]
    batches = list(task.stream("test", batch_size=5))
    for batch in batches:
        metric.update(model, batch)
    scores = metric.compute()
    error, used = 0.0, set()
    for batch in batches:
        codes = model.encode(batch.inputs)
        error += ((model.decode(codes).double() - batch.inputs.double()) / 127.5).square().sum().item()
        used |= set(codes.flatten().tolist())
    assert scores["mse"] == pytest.approx(error / (16 * SIDE * SIDE * 3))
    assert scores["psnr"] == pytest.approx(10 * np.log10(4 / scores["mse"]))
    assert scores["codebook_usage"] == len(used) / 16
    assert (tokenizers[0] / "samples" / "step-00000003-reconstruction.png").is_file()


def test_reconstructions_are_judged_by_a_classifier(tokenizers):
    _, task, model = load_run(tokenizers[0])
    judge = zoo.create_model("image_classifier_r10", classes=2, widths=(8, 8, 8, 8)).eval()
    batches = list(task.stream("test", batch_size=5))
    images = torch.cat([batch.inputs for batch in batches])
    rebuilt = model.decode(model.encode(images))
    judged = [judge.answers(judge.features(x)) for x in (images, rebuilt)]
    judge.net.fc.bias.data[0] += 1e3  # one answer for all: half of the images are of that class
    one = Reconstruction(judge)
    for batch in batches:
        one.update(model, batch)
    one.reduce(OneRank())
    assert one.compute()["reconstruction_class_accuracy"] == one.compute()["class_accuracy_real"] == 0.5

    judge.net.fc.bias.data[0] -= 1e3
    metric = Reconstruction(judge)
    for batch in batches:  # labels for which it is always right about images, and as often as they stay alike rebuilt
        seen = int(metric.right[2])
        metric.update(model, replace(batch, targets=judged[0][seen : seen + len(batch.inputs)]))
    scores = metric.compute()
    assert scores["class_accuracy_real"] == 1
    assert scores["reconstruction_class_accuracy"] == (judged[0] == judged[1]).double().mean()


def test_images_that_a_tokenizer_cannot_take(pictures, tokenizers, tmp_path):
    model = zoo.create_model("image_tokenizer_f4", width=8, depth=1)
    with pytest.raises(ValueError, match=r"shape \(3, 6, 8\): this tokenizer takes 3 channels .* multiples of 4"):
        model(Batch(torch.zeros(1, 3, 6, 8, dtype=torch.uint8)))
    grey = {"name": "image/folder", "path": str(pictures), "size": SIDE, "channels": 1, "convert": True}
    task = registry.tasks.get("image")
    made = task(build(task.Config, {"dataset": grey, "sequence": "codes", "tokenizer": str(tokenizers[0])}))
    with pytest.raises(
        ValueError, match="takes 3 channels and sides that are multiples of 2; the images are 8 x 8 with 1"
    ):
        _ = made.tokenizer


# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_tokenizer_and_refuses_another(pictures, tokenizers, codes_run, tmp_path):
    """By checksum, whichever way the other one comes in: on resuming, by an override, or into the assets."""
    other = recipe(pictures, sequence="codes", tokenizer=str(tokenizers[1]), conditional=True)
    with pytest.raises(WeightsError, match="was trained on a tokenizer with sha256"):
        train(other, codes_run, resume=True, allow_changes=True)
    with pytest.raises(WeightsError, match="mean nothing with another tokenizer"):
        load_run(codes_run, overrides={"task": {"tokenizer": str(tokenizers[1])}})
    _, task, _ = load_run(codes_run)
    assert task.frozen()["tokenizer"] == load_tokenizer(str(tokenizers[0])).sha256
    with pytest.raises(WeightsError, match=r"has sha256 \w+, not 00"):
        image_task(pictures, sequence="codes", tokenizer=str(tokenizers[0]), tokenizer_sha256="00").frozen()

    copy = tmp_path / "copy"
    shutil.copytree(codes_run, copy)
    kept = load_tokenizer(str(copy / "assets" / "tokenizer"))
    swapped = load_tokenizer(str(tokenizers[1]))
    frozen.save(
        frozen.Frozen(swapped.module, kept.name, kept.config, swapped.sha256, kept.origin), copy / "assets/tokenizer"
    )
    with pytest.raises(WeightsError, match="was trained on a tokenizer"):
        load_run(copy)


def test_a_damaged_tokenizer_is_refused(tokenizers, tmp_path):
    kept = load_tokenizer(str(tokenizers[0]))
    frozen.save(kept, tmp_path)
    assert load_tokenizer(str(tmp_path)).sha256 == kept.sha256
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"damaged or another tokenizer: its tensors have sha256"):
        load_tokenizer(str(tmp_path))


def test_a_run_samples_without_its_tokenizers_run_and_its_data(codes_run, tokenizers, tmp_path, monkeypatch):
    moved = tokenizers[0].with_name("elsewhere")
    tokenizers[0].rename(moved)
    try:
        images = pipeline(codes_run, device="cpu").sample([0, 1], seed=0)
    finally:
        moved.rename(tokenizers[0])
    assert [image.shape for image in images] == [(SIDE, SIDE, 3)] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence": "codes"}, "needs tokenizer"),
        ({"tokenizer": "runs/x"}, "has no use with sequence = 'pixels'"),
        ({"sequence": "codes", "tokenizer": "x", "augment": {"shift": 1}}, "augment.shift = 1"),
        ({"order": "spirale"}, "did you mean 'spiral'"),
        ({"samples": {"count": -1}}, "samples.count"),
        ({"samples": {"top_p": 0.0}}, "top_p = 0.0"),
        ({"samples": {"inception": "nowhere.pth"}}, "samples.inception = 'nowhere.pth' is no file"),
    ],
)
def test_recipes_are_checked(pictures, fields, message):
    with pytest.raises(ConfigError, match=message):
        image_task(pictures, **fields)


def test_a_tokenizer_that_is_nowhere_or_none(pictures, codes_run):
    with pytest.raises(FileNotFoundError, match="the tokenizer 'runs/none' is neither a run folder"):
        image_task(pictures, sequence="codes", tokenizer="runs/none").frozen()
    with pytest.raises(ValueError, match="holds image_gatedfwa_1m, which is no tokenizer"):
        image_task(pictures, sequence="codes", tokenizer=str(codes_run)).frozen()


# ---------------------------------------------------------------------------------------------------------------------


def small_model(task, **head):
    torch.manual_seed(0)
    size = registry.models.get("image_gatedfwa_1m")()
    return task.model_config(build(type(size), size, {"backbone": SMALL, "head": head})).build()


def test_a_given_upper_half_is_completed(pictures):
    task = image_task(pictures, conditional=True)
    pipe = Pipeline(small_model(task, neighbours=True), task)
    halves = [ImagePrompt(label, task.data.load("test").pixels[label, : SIDE // 2]) for label in (0, 1)]
    made = pipe.sample(halves, seed=1)
    for asked, image in zip(halves, made, strict=True):
        assert image.shape == (SIDE, SIDE, 3)
        assert np.array_equal(image[: SIDE // 2], asked.given)
    assert pipe.sample(halves, seed=1)[0].tolist() == made[0].tolist()
    with pytest.raises(ValueError, match="cannot complete a given upper part"):
        image_task(pictures, order="spiral").prompt(ImagePrompt(given=halves[0].given))
    with pytest.raises(ValueError, match=r"the given rows have shape \(4, 8, 1\)"):
        task.prompt(ImagePrompt(0, halves[0].given[..., :1]))


@pytest.mark.parametrize("label", [2, -1, "x"])
def test_a_class_out_of_range_is_named(pictures, label):
    with pytest.raises(ValueError, match=rf"class '?{label}'? is none of the 2 classes \(0 to 1\): 0 above, 1 left"):
        image_task(pictures, conditional=True).prompt(label)


def test_requests_of_the_command_line(pictures, codes_run, tmp_path, capsys):
    task = image_task(pictures, conditional=True)
    assert [asked.label for asked in task.ask(Request(label="left", count=2))] == [1, 1]
    assert [asked.label for asked in task.ask(Request(label="0", count=1))] == [0]
    assert [asked.label for asked in task.ask(Request(count=3))] == [0, 1, 0]
    for words, message in (
        (["--class", "lfet", "--out", "x.png"], "class 'lfet' is unknown; did you mean 'left'"),
        (["--class", "7", "--out", "x.png"], "class 7 is none of the 2 classes"),
        (["--prompt", "a cat", "--out", "x.png"], "image has no use for --prompt; it takes --class, --count, --given"),
        (["--class", "1"], "--out FILE"),
        (["--class", "1", "--out", "x.gif"], "does not end in .png"),
        (["--given", str(pictures / "nothing.png"), "--out", "x.png"], "nothing.png"),
        (["--count", "-2", "--out", "x.png"], "--count -2"),
    ):
        assert cli.main(["sample", str(codes_run), "--device", "cpu", *words]) == 2
        assert message in capsys.readouterr().err
    out = tmp_path / "grid.png"
    given = next((pictures / "test" / "left").glob("*.png"))
    words = ["--class", "left", "--count", "3", "--guidance", "2", "--given", str(given), "--out", str(out)]
    assert cli.main(["sample", str(codes_run), "--device", "cpu", "--seed", "1", *words]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.size == (12 * (2 * (SIDE + 1) + 1),) * 2


def test_a_text_run_refuses_a_class():
    task = registry.tasks.get("text")
    with pytest.raises(ValueError, match="text has no use for --class; it takes --prompt"):
        task(task.Config()).ask(Request(label="3"))


def test_media_shows_samples_and_completions(codes_run):
    names = {path.name for path in (codes_run / "samples").iterdir()}
    assert names == {"step-00000003-samples.png", "step-00000003-completions.png"}


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in registry.models.names("image_*") if "f8" not in name])
def test_every_size_takes_a_step(name):
    if "tokenizer" in name:
        model = zoo.create_model(name, width=8, depth=1)
    elif "classifier" in name:
        model = zoo.create_model(name, widths=(8, 8, 8, 8))
    else:
        model = zoo.create_model(
            name, backbone={"depth": 1}, head={"height": 4, "width": 4, "channels": 1, "classes": 2}
        )
        images = torch.randint(0, 256, (2, 16))
        model(Batch(images, images, condition=torch.tensor([0, 1]))).loss_sum.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        return
    output = model(Batch(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1])))
    output.loss_sum.backward()
    assert output.count == 2
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", [name for name in config.list_recipes() if name.startswith("image/")])
def test_every_recipe_builds_its_model(name, data_root):
    """As training does, but without what has to be trained first."""
    first = {"task": {"sequence": "pixels", "tokenizer": "", "samples": {"classifier": ""}}}
    made = build(Recipe, *recipe_layers(name))
    if made.task.name == "image_tokenizer":
        made = build(Recipe, *recipe_layers(name), {"task": {"classifier": ""}})
    elif made.task.name == "image":
        made = build(Recipe, *recipe_layers(name), first)
    task = make_task(made)
    with torch.device("meta"):
        model = make_model(made, task)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


SMOKE = ["smoke_classifier", "smoke_tokenizer", "smoke_codes"]


def untrained_scores(run):
    """Of the samples of a generator with the weights that it began with."""
    made, task, model = load_run(run)
    torch.manual_seed(1)
    fresh = make_model(made, task).eval()
    assert fresh.parameter_count() == model.parameter_count()
    metric = task.metrics("test")["samples"]
    metric.update(fresh, None)
    metric.reduce(OneRank())
    return metric.compute()


def test_tokenizer_and_generator_on_real_digits_in_seconds(data_root, tmp_path, monkeypatch, capsys):
    """CI's proof: tokenizer, classifier and generator learn on a few hundred digits, and a grid is drawn."""
    monkeypatch.chdir(tmp_path)
    for name in SMOKE:
        assert cli.main(["train", f"image/{name}", "train.device=cpu"]) == 0
        assert cli.main(["evaluate", f"runs/image-{name}", "--batch-size", "100", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert cli.main(["sample", "runs/image-smoke_codes", "--class", "3", "--count", "9", "--out", "grid.png"]) == 0
    with Image.open("grid.png") as picture:
        grid = np.asarray(picture)
    assert grid.shape == (264, 264, 3)
    assert grid.std() > 20
    tables = [Path(f"runs/image-{name}/results.jsonl").read_text() for name in SMOKE]
    rows = [json.loads(line) for table in tables for line in table.splitlines()]
    values = {row["name"]: row["value"] for row in rows}
    assert values["accuracy"] > 0.5
    assert values["psnr"] > 15
    assert values["codebook_usage"] > 0.3
    assert values["bits_per_code"] < 4  # a uniform choice of 64 codes takes 6
    assert values["samples"] == 40
    untrained = untrained_scores("runs/image-smoke_codes")
    assert values["class_accuracy"] > untrained["class_accuracy"]  # 0.2 and 0.025 of 40
    assert values["fid_own_features"] < 0.6 * untrained["fid_own_features"]  # 4 and 13
    for picture in ("samples/step-00000100-samples.png", "evaluation/test/nearest.png"):
        assert (tmp_path / "runs/image-smoke_codes" / picture).is_file()
