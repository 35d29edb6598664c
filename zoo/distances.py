"""How close two sets are, by feature vectors (N, F): Fréchet distance, precision and recall, nearest neighbours."""

from typing import Any

import torch
from torch import Tensor


class FeatureStats:
    """Count, sum and sum of outer products of feature vectors, in float64: adds up over batches and ranks."""

    def __init__(self, width: int = 0):
        """width F of the vectors; 0: there will be none."""
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> "FeatureStats":
        wide = features.double()
        self.count += len(wide)
        self.sum += wide.sum(dim=0).cpu()
        self.outer += (wide.T @ wide).cpu()
        return self

    def reduce(self, ranks: Any) -> None:
        self.count, self.sum, self.outer = (ranks.sum(x) for x in (self.count, self.sum, self.outer))

    def mean_covariance(self) -> tuple[Tensor, Tensor]:
        if self.count < 2:
            raise ValueError(f"{int(self.count)} vectors have no covariance: a Fréchet distance needs 2 or more")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet(one: FeatureStats, other: FeatureStats) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al., arXiv 1706.08500), on whatever features these are."""
    (m1, s1), (m2, s2) = one.mean_covariance(), other.mean_covariance()
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()  # tr (S1 S2)^(1/2)
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of made vectors within the real ones' manifold, and the other way round (Kynkäänniemi et al., arXiv
    1904.06991): a vector lies in a set's manifold if some member is nearer to it than to its own k-th neighbour."""
    return covered(real, made, neighbours), covered(made, real, neighbours)


def covered(members: Tensor, vectors: Tensor, neighbours: int, chunk: int = 2000) -> float:
    if len(members) <= neighbours:
        raise ValueError(f"{len(members)} vectors have no {neighbours} neighbours each")
    radius = torch.cat(
        [torch.cdist(part, members).kthvalue(neighbours + 1, dim=1).values for part in members.split(chunk)]
    )
    inside = [(torch.cdist(part, members) <= radius).any(dim=1) for part in vectors.split(chunk)]
    return float(torch.cat(inside).float().mean())


def nearest(queries: Tensor, members: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """For each of queries (N, F) the distance to its nearest among members (M, F), and which one it is."""
    found = [torch.cdist(part, members).min(dim=1) for part in queries.split(chunk)]
    return torch.cat([near.values for near in found]), torch.cat([near.indices for near in found])
