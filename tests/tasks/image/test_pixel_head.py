"""Whole pixels as tokens: as exactly normalised as sub-pixels, causal, and drawn as the full forward says."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import zoo
from tasks.image.head import ImageHead
from tasks.image.pixel_head import PixelHead
from tasks.image.task import ImagePrompt, ImageTask
from zoo.config import ConfigError
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context
from zoo.pipelines import Pipeline


def small_model(shape, mixer="gatedfwa", **head):
    torch.manual_seed(0)
    height, width, channels = shape
    node = {"name": mixer} | ({"window": 3} if mixer != "softmax" else {})
    backbone = {"width": 16, "depth": 2, "heads": 2, "mixer": node}
    head = {"name": "image_pixels", "height": height, "width": width, "channels": channels, **head}
    model = zoo.create_model(f"image_{mixer}_1m", backbone=backbone, head=head)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model.double().eval()


def batch_of(model, images):
    """Images (B, T, C) in the model's order."""
    start = torch.full_like(images[:, :1], model.head.start)
    return Batch(torch.cat((start, images[:, :-1]), dim=1), images)


@torch.no_grad()
def log_likelihood(model, images):
    return -torch.stack([model(batch_of(model, row[None])).loss_sum.double() for row in images])


@pytest.mark.parametrize(("order", "mixer"), [("raster", "gatedfwa"), ("spiral", "swa"), ("hilbert", "softmax")])
def test_the_likelihood_sums_to_one_over_all_images(order, mixer):
    """2 x 2 pixels, 2 channels, 2 levels: all 256 images there are."""
    model = small_model((2, 2, 2), mixer, levels=2, order=order)
    images = torch.tensor(list(itertools.product(range(2), repeat=8))).view(-1, 4, 2)
    assert log_likelihood(model, images).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("order", ["raster", "snake", "shuffled"])
def test_no_sub_pixel_sees_itself_or_a_later_one(order):
    model = small_model((3, 4, 3), levels=7, order=order)
    images = torch.randint(7, (1, 12, 3))

    def told(images):
        """Log-probabilities of all levels, for each sub-pixel of the row: those that the model's loss adds up."""
        batch, head = batch_of(model, images), model.head
        with torch.no_grad():
            h, _ = model.hidden(head.embed(batch.inputs, batch.ctx)[0], batch.ctx)
            inner, fine = head.up(h).chunk(3, -1), torch.nn.functional.embedding(images, head.fine)
            logits = [head._channel(h, inner[c], fine, c) @ weight.T for c, weight in enumerate(head._weights())]
            found = torch.stack(logits, dim=2).log_softmax(-1)
            nats = -found.gather(-1, images.unsqueeze(-1)).sum().item()
            assert model(batch).loss_sum.item() == pytest.approx(nats, rel=1e-9)
        return found[0].flatten(0, 1)

    before = told(images)
    for place, channel in ((0, 0), (4, 1), (7, 2), (11, 0)):
        changed = images.clone()
        changed[:, place, channel] = (changed[:, place, channel] + 3) % 7
        apart = (told(changed) - before).abs().amax(-1)
        at = 3 * place + channel
        assert apart[: at + 1].max() < 1e-12
        assert at == 35 or apart[at + 1 :].max() > 1e-6


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_drawing_is_the_full_forward_repeated(order):
    """Greedy steps on the state are the most likely sub-pixels of whole forward passes."""
    model = small_model((3, 4, 3), levels=5, order=order)
    start = torch.full((2, 1, 3), model.head.start)
    drawn = generate(model, Batch(start), max_new=12, sampling=Sampling(temperature=0))
    assert drawn.shape == (2, 12, 3)
    batch = batch_of(model, drawn)
    with torch.no_grad():
        h, _ = model.hidden(model.head.embed(batch.inputs, batch.ctx)[0], batch.ctx)
        told, inner = torch.nn.functional.embedding(drawn, model.head.fine), model.head.up(h).chunk(3, -1)
        for channel, weight in enumerate(model.head._weights()):
            likely = (model.head._channel(h, inner[channel], told, channel) @ weight.T).argmax(-1)
            assert torch.equal(likely, drawn[..., channel])


@torch.no_grad()
def test_rows_padded_on_the_right_are_remembered_as_each_alone():
    """The state of ragged rows, whatever their padding holds: each next pixel is embedded as in the whole row."""
    model = small_model((3, 4, 3), levels=5)
    inputs, lengths, rows = batch_of(model, torch.randint(5, (2, 12, 3))).inputs, torch.tensor([6, 2]), torch.arange(2)
    whole, _ = model.head.embed(inputs, Context())
    prompt = inputs[:, :6].clone()
    prompt[1, 2:] = 4
    h, state = model.head.embed(prompt, Context(lengths=lengths), model.head.init_state(prompt, lengths=lengths))
    assert torch.equal(h[0], whole[0, :6])
    assert torch.equal(h[1, :2], whole[1, :2])
    for place in (lengths + step for step in range(6)):
        h, state = model.head.embed(inputs[rows, place].unsqueeze(1), Context(), state)
        torch.testing.assert_close(h[:, 0], whole[rows, place], rtol=0, atol=1e-12)


@pytest.fixture
def task(tmp_path):
    rng = np.random.default_rng(0)
    from PIL import Image

    for split, name in itertools.product(("train", "test"), ("a", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    dataset = {"name": "image/folder", "path": str(tmp_path), "size": 6}
    return make_task(dataset=dataset, token="pixel")


def make_task(**fields):
    from zoo import config as configs

    return ImageTask(configs.build(ImageTask.Config, fields))


def model_for(task, **head):
    base = zoo.registry.models.get("image_gatedfwa_1m")()
    from zoo import config as configs
    from zoo.model import ModelConfig

    small = {"backbone": {"width": 16, "depth": 1, "heads": 2}, "head": {"name": "image_pixels", **head}}
    return task.model_config(configs.build(ModelConfig, base, small)).build().eval()


def test_rows_are_the_pictures_and_an_upper_half_is_completed(task):
    batch = next(iter(task.stream("test", batch_size=2)))
    assert batch.inputs.shape == batch.targets.shape == (2, 36, 3)
    assert (batch.inputs[:, 0] == 256).all()
    picture = task.artefact(batch.targets[0])
    assert np.array_equal(picture, task.data.load("test").pixels[0])
    model = model_for(task)
    output = model(batch)
    assert output.count.item() == 2 * 36 * 3
    made = Pipeline(model, task).sample(ImagePrompt(given=picture[:3]), seed=0)
    assert np.array_equal(made[:3], picture[:3])
    assert made.shape == (6, 6, 3)
    media = task.media(model, batch)
    assert set(media.images) == {"samples", "completions"}


@pytest.mark.parametrize("token", ["element", "pixel"])
def test_a_head_of_ones_own_is_taken(token, task, monkeypatch):
    class Own(PixelHead):
        @dataclass
        class Config(PixelHead.Config):
            classes: int = 0

    monkeypatch.setattr(zoo.registry.heads, "_entries", {**zoo.registry.heads._entries, "own": Own})
    task.config.token = token
    assert model_for(task, name="own").head.config.height == 6


def test_what_does_not_go_together_is_named(task):
    from zoo.model import ModelConfig

    with pytest.raises(ConfigError, match="image_pixels"):
        task.model_config(zoo.registry.models.get("image_gatedfwa_1m")())
    assert isinstance(zoo.registry.models.get("image_gatedfwa_1m")(), ModelConfig)
    with pytest.raises(ValueError, match="unconditional|conditional"):
        make_task(token="pixel", conditional=True)
    with pytest.raises(ValueError, match="whole pixels"):
        make_task(token="pixel", order="planar")
    assert PixelHead.Config(levels=32766).levels == 32766
    for kind, more in ((PixelHead, {}), (ImageHead, {"neighbours": True})):
        with pytest.raises(ValueError, match="levels = 32767"):
            kind.Config(levels=32767, **more)
    model = model_for(task)
    with pytest.raises(ValueError, match="out of range"):
        model.head.check(torch.full((1, 2, 3), 300))
    with pytest.raises(ValueError, match="takes pixels"):
        model.head.check(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="unconditional"):
        model.head.init_state(torch.zeros(1, 1, 3), torch.zeros(1))
