"""The image head: an exactly normalised likelihood in every order, and sampling that is the full forward repeated."""

import itertools

import numpy as np
import pytest
import torch

import zoo
from tasks.image.head import nearby_places
from tasks.image.orders import ORDERS, rows_given
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context


def small_model(shape, mixer="gatedfwa", positions="rotary", **head):
    """Weights far from their start, so that nothing is symmetric by chance."""
    torch.manual_seed(0)
    height, width, channels = shape
    node = {"name": mixer} | ({"window": 3} if mixer in ("gatedfwa", "swa") else {})
    if mixer == "gatedfwa_nsa":
        node |= {"window": 3, "block": 2, "top": 3}
    backbone = {"width": 16, "depth": 2, "heads": 2, "mixer": node, "positions": positions}
    backbone |= {"kv_heads": 1} if mixer == "gatedfwa_nsa" else {}
    backbone |= {"max_len": height * width * channels} if positions == "learned" else {}
    head = {"height": height, "width": width, "channels": channels, **head}
    model = zoo.create_model(f"image_{mixer}_1m", backbone=backbone, head=head)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model.double().eval()


def batch_of(model, images, labels=None):
    """Images (B, T) in the model's order."""
    start = torch.full_like(images[:, :1], model.head.start)
    return Batch(torch.cat((start, images[:, :-1]), dim=1), images, condition=labels)


@torch.no_grad()
def log_likelihood(model, images, labels=None):
    """(B,) nats of each row alone."""
    rows = [batch_of(model, row[None], None if labels is None else labels[i : i + 1]) for i, row in enumerate(images)]
    return -torch.stack([model(row).loss_sum.double() for row in rows])


CASES = [
    *[({"order": order}, "gatedfwa", "rotary") for order in ORDERS],
    ({"order": "raster"}, "softmax", "learned"),
    ({"order": "snake", "places": False}, "gatedfwa_nsa", "none"),
    ({"order": "planar", "neighbours": True}, "swa", "rotary"),
    ({"order": "hilbert", "neighbours": True}, "gatedfwa", "learned"),
]


@pytest.mark.parametrize(("head", "mixer", "positions"), CASES)
def test_the_likelihood_sums_to_one_over_all_images(head, mixer, positions):
    """2 x 2 pixels, 2 channels, 2 levels: all 256 images there are."""
    model = small_model((2, 2, 2), mixer, positions, levels=2, **head)
    images = torch.tensor(list(itertools.product(range(2), repeat=8)))
    total = log_likelihood(model, images).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-6)


def test_it_sums_to_one_given_each_class_and_given_none():
    model = small_model((2, 2, 1), levels=3, classes=2, neighbours=True)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    sums = []
    for label in range(3):
        likelihood = log_likelihood(model, images, torch.full((len(images),), label)).exp()
        sums.append(likelihood)
        assert likelihood.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert not torch.allclose(sums[0], sums[1])
    unconditional = log_likelihood(model, images).exp()
    torch.testing.assert_close(unconditional, sums[2])  # class 2 of 2 stands for none


@pytest.mark.parametrize("order", ORDERS)
def test_no_element_sees_itself_or_a_later_one(order):
    model = small_model((3, 5, 3), levels=7, order=order, neighbours=True)
    images = torch.randint(0, 7, (2, 45))
    changed = images.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 7
    logits = []
    for each in (images, changed):
        batch = batch_of(model, each)
        h, _ = model.head.embed(batch.inputs, batch.ctx)
        h, _ = model.hidden(h, batch.ctx)
        logits.append(model.head.logits(h, None))
    torch.testing.assert_close(logits[0][:, :21], logits[1][:, :21], rtol=0, atol=1e-9)
    assert not torch.allclose(logits[0][:, 21], logits[1][:, 21])


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["gatedfwa", "softmax", "gatedfwa_nsa"])
@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_drawing_is_the_full_forward_repeated(mixer, order):
    model = small_model((4, 3, 2), mixer, levels=5, classes=3, order=order, neighbours=True)
    labels = torch.tensor([0, 2])
    tokens = torch.tensor([[5, 1, 2, 3], [5, 0, 4, 4]])
    drawn = generate(
        model, Batch(tokens, condition=labels), max_new=21, sampling=Sampling(temperature=0, guidance=1.5), chunk=3
    )
    for step in range(21):
        logits = []
        for given in (labels, torch.full((2,), 3)):
            state = model.head.init_state(tokens, given)
            h, _ = model.head.embed(tokens, Context(), state)
            h, _ = model.hidden(h, Context())
            logits.append(model.head.logits(h[:, -1], None))
        expected = (logits[1] + 1.5 * (logits[0] - logits[1])).argmax(-1)
        assert drawn[:, step].tolist() == expected.tolist(), step
        tokens = torch.cat((tokens, expected[:, None]), dim=1)


@torch.no_grad()
def test_classes_are_hidden_in_training_alone():
    model = small_model((2, 2, 1), levels=2, classes=4, class_dropout=0.5)
    images, labels = torch.randint(0, 2, (64, 4)), torch.randint(0, 4, (64,))
    none, _ = model.head.embed(images, Context(), model.head.init_state(images))
    hidden = {}
    for training in (True, False):
        model.train(training)
        h, _ = model.head.embed(images, Context(), model.head.init_state(images, labels))
        hidden[training] = (h == none).flatten(1).all(dim=1).float().mean().item()
    assert 0.2 < hidden[True] < 0.8
    assert hidden[False] == 0


def test_guidance_and_classes_that_a_model_does_not_know():
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    plain = small_model((2, 2, 1), levels=2)
    with pytest.raises(ValueError, match="unconditional"):
        generate(plain, Batch(tokens, condition=torch.tensor([0])), max_new=1)
    never = small_model((2, 2, 1), levels=2, classes=2, class_dropout=0.0)
    with pytest.raises(ValueError, match=r"head\.class_dropout above 0; this one has 2 and 0\.0"):
        generate(never, Batch(tokens, condition=torch.tensor([0])), max_new=1, sampling=Sampling(guidance=2))


def test_the_state_of_a_windowed_mixer_does_not_grow():
    from zoo.state import state_bytes

    def cache(mixer, tokens):
        return state_bytes(small_model((8, 8, 3), mixer, levels=4).backbone.init_cache(2, tokens))

    assert cache("gatedfwa", 50) == cache("gatedfwa", 192)
    assert cache("softmax", 50) < cache("softmax", 192)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 3), (3, 5, 2), (7, 2, 1)])
def test_an_order_has_everything_once(name, shape):
    order = ORDERS[name](*shape)
    assert sorted(order.tolist()) == list(range(int(np.prod(shape))))
    assert np.array_equal(order, ORDERS[name](*shape))


@pytest.mark.parametrize("name", ["snake", "spiral", "hilbert"])
def test_neighbours_in_the_order_are_neighbours_in_the_image(name):
    row, column = np.unravel_index(ORDERS[name](8, 8, 1), (8, 8))
    assert (np.abs(np.diff(row)) + np.abs(np.diff(column)) == 1).all()


def test_a_given_upper_half_comes_first_in_some_orders():
    given = {name: rows_given(order(4, 4, 3), 4, 4, 3, 2) for name, order in ORDERS.items()}
    assert given["raster"] == given["snake"] == 24
    assert given["planar"] is given["columns"] is given["spiral"] is given["shuffled"] is None


@pytest.mark.parametrize("name", ORDERS)
def test_nearby_places_are_the_neighbours_that_are_known(name):
    shape = (4, 5, 3)
    order = ORDERS[name](*shape)
    nearby = nearby_places(order, shape)
    at = {tuple(int(x) for x in np.unravel_index(index, shape)): place for place, index in enumerate(order)}
    for (row, column, channel), place in at.items():
        expected = []
        for turn in range(3):
            for up, left in [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)] + ([(0, 0)] if turn else []):
                found = at.get((row - up, column - left, (channel + turn) % 3), -1)
                expected.append(found if found < place else -1)
        assert nearby[place].tolist() == expected


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"order": "rastr"}, "did you mean 'raster'"),
        ({"levels": 1}, "levels = 1"),
        ({"class_dropout": 1.0}, "class_dropout = 1.0"),
        ({"height": 0}, "head.height = 0"),
    ],
)
def test_settings_are_checked(field, message):
    with pytest.raises(ValueError, match=message):
        small_model((2, 2, 1), **field)


def test_an_element_out_of_range_is_named():
    model = small_model((2, 2, 1), levels=4)
    for wrong, named in ((5, "element 5"), (-1, "element -1")):
        with pytest.raises(ValueError, match=f"{named} is out of range: this model takes 0 to 3, and 4 where"):
            model(Batch(torch.tensor([[4, wrong, 0, 0]]), torch.zeros(1, 4, dtype=torch.int64)))
