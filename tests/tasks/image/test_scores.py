"""Distances between sets of images, against closed forms and brute force; what the sample metric says of copies."""

import math

import numpy as np
import pytest
import torch

from tasks.image.classifier import ClassifierConfig, all_features
from tasks.image.data import Images
from tasks.image.metrics import Likelihood, SampleConfig, Samples, order0_bits
from zoo.distances import FeatureStats, covered, frechet, nearest, precision_recall
from zoo.model import Batch, Output
from zoo.task import OneRank


def stats(features):
    return FeatureStats(features.shape[1]).add(features)


def test_statistics_add_up():
    features = torch.randn(50, 3, dtype=torch.float64)
    parts = FeatureStats(3)
    for part in features.split(7):
        parts.add(part)
    mean, covariance = parts.mean_covariance()
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(covariance, torch.cov(features.T))
    with pytest.raises(ValueError, match="2 or more"):
        stats(features[:1]).mean_covariance()


def test_frechet_distance_of_gaussians_with_known_moments():
    """Diagonal covariances a and b: |m|^2 + sum (sqrt a - sqrt b)^2."""
    base = torch.randn(400, 3, dtype=torch.float64)
    base = base - base.mean(0)
    whitened = base @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 9.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    distance = frechet(stats(whitened * a.sqrt()), stats(whitened * b.sqrt() + shift))
    assert distance == pytest.approx(float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)
    assert frechet(stats(base), stats(base)) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall():
    real = torch.randn(300, 2)
    assert precision_recall(real, torch.randn(300, 2)) == pytest.approx((0.95, 0.95), abs=0.05)
    precision, recall = precision_recall(real, 0.05 * torch.randn(300, 2))  # all alike: good, but few kinds
    assert precision > 0.95
    assert recall < 0.2
    assert precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match="no 3 neighbours"):
        precision_recall(real[:3], real)


def test_covered_against_brute_force():
    members, vectors = torch.randn(40, 3), 1.5 * torch.randn(25, 3)
    radius = [sorted((m - o).norm().item() for o in members)[3] for m in members]
    expected = [any((v - m).norm().item() <= r for m, r in zip(members, radius, strict=True)) for v in vectors]
    assert covered(members, vectors, 3, chunk=7) == pytest.approx(sum(expected) / 25)


def test_nearest_in_chunks():
    queries, members = torch.randn(9, 4), torch.randn(30, 4)
    distance, which = nearest(queries, members, chunk=2)
    torch.testing.assert_close(distance, torch.cdist(queries, members).amin(1))
    assert which.tolist() == torch.cdist(queries, members).argmin(1).tolist()


# ---------------------------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A model with the same loss for every element."""

    def __init__(self, nats):
        super().__init__()
        self.nats = torch.nn.Parameter(torch.tensor(nats))

    def forward(self, batch):
        count = torch.tensor(batch.targets.numel())
        return Output(self.nats * count, count)


def test_bits_per_dim_are_the_mean_over_sub_pixels():
    metric = Likelihood(pixels=True)
    for nats, rows in ((1.0, 3), (2.0, 1)):
        metric.update(Fixed(nats), Batch(None, torch.zeros(rows, 12)))
    metric.reduce(OneRank())
    scores = metric.compute()
    assert scores["elements"] == 48
    assert scores["bits_per_dim"] == pytest.approx(1.25 / math.log(2))
    codes = Likelihood(pixels=False)
    codes.update(Fixed(1.0), Batch(None, torch.zeros(2, 5)))
    assert "bits_per_dim" not in codes.compute()
    assert codes.compute()["code_perplexity"] == pytest.approx(math.e)


def test_order_0_bits():
    train = Images(np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2))
    test = Images(np.array([0, 0, 0, 1], np.uint8).reshape(1, 2, 2, 1), np.zeros(1))
    zero, one = (8 + 1) / (8 + 256), 1 / (8 + 256)
    assert order0_bits(train, test) == pytest.approx(-(3 * math.log2(zero) + math.log2(one)) / 4)


def images(count, seed):
    rng = np.random.default_rng(seed)
    return Images(rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8), np.arange(count) % 2)


class Ranks:
    """One of two ranks whose sums meet afterwards."""

    world = 2

    def __init__(self, rank):
        self.rank, self.given = rank, None

    def sum(self, tensor):
        self.given = tensor
        return tensor


def judged(draw, count=30, classifier=None):
    metric = Samples(SampleConfig(count=count, batch=8, nearest=4), draw, 2, classifier, images(40, 0), images(30, 1))
    metric.update(Fixed(1.0), Batch(None))
    return metric


def test_copies_of_training_images_are_seen():
    torch.manual_seed(0)
    classifier = ClassifierConfig(channels=1, classes=2, layers=(1, 1, 1, 1), widths=(8, 8, 8, 8)).build().eval()
    train = images(40, 0)
    copying = judged(lambda model, labels, count, seed: train.pixels[seed : seed + count], classifier=classifier)
    fresh = judged(lambda model, labels, count, seed: images(count, 5 + seed).pixels, classifier=classifier)
    for metric in (copying, fresh):
        metric.reduce(OneRank())
    copies, others = copying.compute(), fresh.compute()
    assert copies["nearest_train_pixels"] == copies["nearest_train_features"] == 0
    assert 0.9 < others["nearest_train_pixels"] < 1.1
    sheet = copying.media().images["nearest"]
    assert torch.equal(sheet[:, 1:9], sheet[:, 10:18])  # a copy above, its original below
    features = all_features(classifier, fresh.made)
    right = classifier.answers(features) == torch.arange(30) % 2
    assert others["class_accuracy"] == pytest.approx(right.float().mean().item())
    assert others["fid_own_features"] > 0
    assert others["samples"] == 30


def test_each_rank_draws_its_share():
    asked = []

    def draw(model, labels, count, seed):
        asked.append((seed, labels.tolist()))
        return np.full((count, 8, 8, 1), 1 + seed, np.uint8)

    made = []
    for rank in range(2):
        metric = judged(draw)
        metric.reduce(Ranks(rank))
        made.append(metric.made.astype(int))
    assert sorted(seed for seed, _ in asked) == [0, 8, 16, 24]
    assert sum(len(labels) for _, labels in asked) == 30
    assert ((made[0] > 0) ^ (made[1] > 0)).all()
    assert all(label == (seed + place) % 2 for seed, labels in asked for place, label in enumerate(labels))
