"""Synthetic recall data, generated whole rows at a time; and the stream that hands it out, segment after segment.

A data set is a class with a Config and three things: `vocabulary`, `segments(split)` and `provenance()`. A segment is
many examples of one shape. Splits are train and test; valid is test, for these protocols stop and choose on it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.model import Batch

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Segment:
    """N examples of T tokens, each asked for L values.

    tokens  (N, T) int32
    places  (N, L) int32, ascending or not: where the answers are due; the loss is taken there and nowhere else
    values  (N, L) int32: the token to predict at each place, aligned with it (no further shift)
    """

    name: str
    tokens: Tensor
    places: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def segment(name: str, tokens: np.ndarray, places: np.ndarray, values: np.ndarray) -> Segment:
    return Segment(name, *(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)) for x in (tokens, places, values)))


class Synthetic:
    """What the data sets share: a Config with `seed`, `train` and `test`, lists of the numbers that `make` takes."""

    Config: ClassVar[type]
    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]]  # what the numbers of a segment are; the last one counts its examples

    def __init__(self, config: Any):
        self.config = config
        self._made: dict[str, list[Segment]] = {}
        for split in ("train", "test"):
            for numbers in getattr(config, split):
                if len(numbers) != len(self.takes) or min(numbers) < 1:
                    raise ValueError(
                        f"task.dataset.{split} = {numbers} is no segment of {self.name}; it takes {list(self.takes)}"
                    )
                self.check(*numbers)

    @property
    def vocabulary(self) -> int:
        raise NotImplementedError

    def check(self, *numbers: int) -> None:
        """Raises ValueError for a segment that cannot be."""

    def make(self, rng: np.random.Generator, *numbers: int) -> Segment:
        raise NotImplementedError

    def _of(self, split: str) -> list[Segment]:
        """Made when it is first asked for: evaluation does without the training segments, which are most of the work.
        Each segment from a seed of its own, so that one does not depend on the others."""
        if split not in self._made:
            number = ("train", "test").index(split)
            self._made[split] = [
                self.make(np.random.default_rng([self.config.seed, number, index]), *numbers)
                for index, numbers in enumerate(getattr(self.config, split))
            ]
        return self._made[split]

    def segments(self, split: str) -> list[Segment]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} of {self.name} does not exist; accepted: {', '.join(SPLITS)}")
        return self._of("train" if split == "train" else "test")

    def provenance(self) -> dict[str, Any]:
        """The generated numbers themselves, by their digest."""
        digests = {}
        for split in ("train", "test"):
            digest = hashlib.sha256()
            for part in self._of(split):
                for tensor in (part.tokens, part.places, part.values):
                    digest.update(tensor.numpy().tobytes())
            digests[split] = digest.hexdigest()
        return {"corpus": self.name, "sha256": digests}


# ---------------------------------------------------------------------------------------------------------------------


class MQAR(Synthetic):
    """Multi-query associative recall, as Zoology generates it (Arora et al., arXiv 2312.04927).

    Key-value pairs k_1 v_1 … k_n v_n, then every key once more, at places that a power law puts close behind; the value
    is due at the repeated key and is not written. The same distribution as theirs, not the same random numbers: theirs
    draws row by row.
    """

    @dataclass
    class Config:
        """vocabulary          half of it keys (without 0), half values
        train, test         segments [length, pairs, examples]; length even, 4 pairs <= length < vocabulary
        power               slot s after the pairs has weight (s + 1) ** (power - 1)
        random_non_queries  every 0 that is left is replaced by any token; else it stays 0
        """

        vocabulary: int = 8192
        train: list[list[int]] = field(default_factory=lambda: [[64, 4, 100_000]])
        test: list[list[int]] = field(default_factory=lambda: [[64, 4, 3_000]])
        power: float = 0.01
        random_non_queries: bool = False
        seed: int = 123

    name = "recall/mqar"
    takes = ("length", "pairs", "examples")

    @property
    def vocabulary(self) -> int:
        return self.config.vocabulary

    def check(self, *numbers: int) -> None:
        length, pairs, _ = numbers
        if length % 2 or 4 * pairs > length or length >= self.vocabulary or pairs >= self.vocabulary // 2:
            raise ValueError(
                f"task.dataset: length = {length} with pairs = {pairs}; it takes an even length of at least 4 pairs, "
                f"and vocabulary = {self.vocabulary} larger than it"
            )

    def make(self, rng: np.random.Generator, *numbers: int) -> Segment:
        length, pairs, examples = numbers
        half, context = self.vocabulary // 2, 2 * pairs
        keys = 1 + distinct(rng, examples, pairs, half - 1)
        values = half + distinct(rng, examples, pairs, self.vocabulary - half)
        tokens = np.zeros((examples, length), dtype=np.int32)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        slots = (length - context) // 2
        weights = np.arange(1, slots + 1, dtype=np.float64) ** (self.config.power - 1)
        places = context + 2 * weighted_distinct(rng, examples, pairs, weights)
        np.put_along_axis(tokens, places, keys, axis=1)
        if self.config.random_non_queries:
            noise = rng.integers(self.vocabulary, size=tokens.shape, dtype=np.int32)
            tokens = np.where(tokens == 0, noise, tokens)
        return segment(f"{length}x{pairs}", tokens, places, values)


class SelectiveCopy(Synthetic):
    """Selective copying (Arjovsky et al., arXiv 1511.06464; with random spacing as in Mamba, arXiv 2312.00752).

    `copied` data tokens stand in order at random places among blanks; after `length` tokens come as many marks, and at
    the i-th mark the i-th data token is due.
    """

    @dataclass
    class Config:
        """symbols      different data tokens
        train, test  segments [length, copied, examples]; an example has length + copied tokens
        """

        symbols: int = 16
        train: list[list[int]] = field(default_factory=lambda: [[256, 16, 100_000]])
        test: list[list[int]] = field(default_factory=lambda: [[256, 16, 3_000]])
        seed: int = 123

    BLANK, MARK, FIRST = 0, 1, 2
    name = "recall/selective_copy"
    takes = ("length", "copied", "examples")

    @property
    def vocabulary(self) -> int:
        return self.FIRST + self.config.symbols

    def check(self, *numbers: int) -> None:
        length, copied, _ = numbers
        if copied > length:
            raise ValueError(f"task.dataset: copied = {copied} of length = {length}; it takes at most the length")

    def make(self, rng: np.random.Generator, *numbers: int) -> Segment:
        length, copied, examples = numbers
        values = self.FIRST + rng.integers(self.config.symbols, size=(examples, copied))
        tokens = np.full((examples, length + copied), self.BLANK, dtype=np.int32)
        tokens[:, length:] = self.MARK
        np.put_along_axis(tokens, np.sort(distinct(rng, examples, copied, length), axis=1), values, axis=1)
        places = np.broadcast_to(np.arange(length, length + copied), (examples, copied))
        return segment(f"{length}x{copied}", tokens, places, values)


class Needle(Synthetic):
    """A needle in a haystack at a chosen distance: noise, in it once a mark and a value; the last token is the mark
    again, and there the value is due."""

    @dataclass
    class Config:
        """noise, symbols  different noise tokens and values
        train, test     segments [length, distance, examples]: the needle's mark stands `distance` tokens before the end
        spread          the distance is drawn from [distance - spread, distance], anew for each example
        """

        noise: int = 16
        symbols: int = 16
        spread: int = 0
        train: list[list[int]] = field(default_factory=lambda: [[256, 192, 100_000]])
        test: list[list[int]] = field(default_factory=lambda: [[256, 192, 1_000]])
        seed: int = 123

    name = "recall/needle"
    takes = ("length", "distance", "examples")

    @property
    def vocabulary(self) -> int:
        return self.config.noise + self.config.symbols + 1

    def check(self, *numbers: int) -> None:
        length, distance, _ = numbers
        if distance - self.config.spread < 2 or distance >= length:
            raise ValueError(
                f"task.dataset: distance = {distance}, spread = {self.config.spread} in length = {length}; it takes "
                "2 (a value in between) to length - 1"
            )

    def make(self, rng: np.random.Generator, *numbers: int) -> Segment:
        length, distance, examples = numbers
        mark = self.vocabulary - 1
        tokens = rng.integers(self.config.noise, size=(examples, length), dtype=np.int32)
        values = self.config.noise + rng.integers(self.config.symbols, size=(examples, 1))
        at = length - 1 - rng.integers(distance - self.config.spread, distance + 1, size=(examples, 1))
        np.put_along_axis(tokens, at, mark, axis=1)
        np.put_along_axis(tokens, at + 1, values.astype(np.int32), axis=1)
        tokens[:, -1] = mark
        return segment(f"{length}x{distance}", tokens, np.full((examples, 1), length - 1), values)


# ---------------------------------------------------------------------------------------------------------------------
# Draws without replacement, for many rows at once


def distinct(rng: np.random.Generator, rows: int, count: int, total: int) -> np.ndarray:
    """(rows, count): in each row `count` different numbers below `total`, uniform, in random order (Floyd's
    algorithm: Bentley, CACM 30(9), 1987, then a shuffle)."""
    drawn = np.empty((rows, count), dtype=np.int32)
    for i, top in enumerate(range(total - count, total)):
        candidate = rng.integers(top + 1, size=rows, dtype=np.int32)
        taken = (drawn[:, :i] == candidate[:, None]).any(axis=1)
        drawn[:, i] = np.where(taken, top, candidate)
    return rng.permuted(drawn, axis=1)


def weighted_distinct(rng: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """(rows, count): places drawn one after another without replacement, each with probability in proportion to its
    weight among those left: the order in which exponential clocks of these rates ring."""
    chosen = np.empty((rows, count), dtype=np.int64)
    for begin in range(0, rows, CHUNK):
        part = chosen[begin : begin + CHUNK]
        rings = rng.standard_exponential((len(part), len(weights))) / weights
        part[:] = np.argsort(rings, axis=1)[:, :count]
    return chosen


CHUNK = 8192  # rows whose clocks stand at once


# ---------------------------------------------------------------------------------------------------------------------


class SegmentStream:
    """Batches of a list of segments, one segment after another in fixed order, each batch out of one segment.

    The last batch of a segment is smaller. endless: pass after pass, for training. The state is how many examples all
    ranks together have consumed.
    """

    def __init__(
        self, segments: list[Segment], *, batch_size: int, rank: int = 0, world: int = 1, endless: bool = False
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it takes 1 or more")
        if not sum(map(len, segments)):
            raise ValueError("there is no example: task.dataset.train and task.dataset.test take segments")
        self.segments, self.endless = segments, endless
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.ends = np.cumsum([len(part) for part in segments])
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        total = int(self.ends[-1])
        while self.endless or self.position < total:
            within = self.position % total
            number = int(np.searchsorted(self.ends, within, side="right"))
            part = self.segments[number]
            first = within - (int(self.ends[number]) - len(part))
            rows = np.arange(first, min(first + self.batch_size * self.world, len(part)))
            self.position += len(rows)
            if self.endless and len(rows) < self.world:  # too few for every rank to have one
                continue
            mine = np.array_split(rows, self.world)[self.rank]
            if len(mine):
                yield self.batch(number, int(mine[0]), int(mine[-1]) + 1)

    @property
    def batches(self) -> int | None:
        """How many a whole pass has; None where there is no end. A rank may have less."""
        return None if self.endless else sum(-(-len(part) // (self.batch_size * self.world)) for part in self.segments)

    def batch(self, number: int, begin: int, end: int) -> Batch:
        part = self.segments[number]
        tokens, places, values = (x[begin:end].long() for x in (part.tokens, part.places, part.values))
        return Batch(tokens, {"places": places, "values": values, "segment": torch.full((end - begin,), number)})

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])
