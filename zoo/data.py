"""Resumable streams: source, shuffle, window or pack, batch.

A source gives the example at a position of an endless order; a stream hands positions out to ranks and micro-batches.
Order is a function of (seed, position) alone, and a stream's whole state is how many examples all ranks together have
consumed: a run resumes exactly, on any number of ranks and with any split into micro-batches.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zoo.model import Batch, Context

IGNORED = -100  # a target that is not scored


class Stream(Protocol):
    """Yields batches; `state_dict` names the position after the last batch handed out, as plain JSON values."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Source(Protocol):
    """Examples in an order that is decided by position alone."""

    def __len__(self) -> int:
        """Examples in one pass."""
        ...

    def item(self, position: int) -> Any:
        """The example at `position` >= 0; a training source goes on past its length into the next epoch."""
        ...

    def collate(self, items: list[Any]) -> Batch: ...


class BadSample(ValueError):
    """A sample that cannot be read. A stream skips and counts these, up to a cap."""


class SourceStream:
    """Batches of a source, `batch_size` examples on each of `world` ranks.

    endless   training: batches of one size for ever, each batch of all ranks together the next batch_size * world
              positions. Otherwise one pass: nothing dropped, the last batch smaller, ranks disjoint and complete.
    max_bad   samples that raise BadSample or OSError are skipped and listed in `bad`; one more than this
              raises. Training takes the next readable sample instead, so that shapes stay; evaluation goes without.
    """

    def __init__(
        self, source: Source, *, batch_size: int, rank: int = 0, world: int = 1, endless: bool = True, max_bad: int = 10
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it takes 1 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} ranks (0 to {world - 1})")
        if len(source) < 1:
            raise ValueError(f"{type(source).__name__} holds no example")
        self.source, self.batch_size, self.rank, self.world = source, batch_size, rank, world
        self.endless, self.max_bad = endless, max_bad
        self.position = 0
        self.bad: dict[int, str] = {}  # position -> what was wrong with it

    def __iter__(self) -> Iterator[Batch]:
        while self.endless or self.position < len(self.source):
            first = self.position + self.rank * self.batch_size
            end = self.position + self.world * self.batch_size
            self.position = end if self.endless else min(end, len(self.source))
            last = min(first + self.batch_size, self.position)
            items = [item for place in range(first, last) if (item := self._read(place)) is not None]
            if items:
                yield self.source.collate(items)

    @property
    def batches(self) -> int | None:
        """How many are left of one pass; None where it is endless. A rank may have one less than the others."""
        return None if self.endless else -(-(len(self.source) - self.position) // (self.batch_size * self.world))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])

    def _read(self, position: int) -> Any:
        """The example, its nearest readable successor (training), or None (evaluation)."""
        while True:
            try:
                return self.source.item(position)
            except (OSError, BadSample) as error:
                self.bad[position] = f"{type(error).__name__}: {error}"
                if len(self.bad) > self.max_bad:
                    first = "; ".join(f"{place}: {why}" for place, why in list(self.bad.items())[:3])
                    raise BadSample(
                        f"{len(self.bad)} samples cannot be read, more than max_bad = {self.max_bad}. First: {first}"
                    ) from error
            if not self.endless:
                return None
            position += 1


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """A generator for what is drawn once an epoch; the same on every rank and machine."""
    return np.random.default_rng([seed, epoch])


class Recent:
    """The last two epochs' tables: a batch may straddle an epoch's end."""

    def __init__(self) -> None:
        self._tables: OrderedDict[int, Any] = OrderedDict()

    def get(self, epoch: int, make: Any) -> Any:
        if epoch not in self._tables:
            self._tables[epoch] = make(epoch)
            while len(self._tables) > 2:
                self._tables.popitem(last=False)
        return self._tables[epoch]


class Shuffled:
    """Any map-style data set (`len`, `[index]`), each epoch in an order of its own; seed None keeps its own order.
    `collate` takes a list of its items and gives a Batch."""

    def __init__(self, items: Any, collate: Any, *, seed: int | None):
        self.items, self.collate, self.seed = items, collate, seed
        self._orders = Recent()

    def __len__(self) -> int:
        return len(self.items)

    def item(self, position: int) -> Any:
        epoch, index = divmod(position, len(self.items))
        if self.seed is None:
            return self.items[index]
        seed = self.seed
        order = self._orders.get(epoch, lambda epoch: epoch_rng(seed, epoch).permutation(len(self.items)))
        return self.items[int(order[index])]


# ---------------------------------------------------------------------------------------------------------------------
# Sources over one array of tokens (N,), any integer dtype, a memory map included. An example is (inputs, targets).


def collate_tokens(items: list[tuple[Tensor, Tensor]]) -> Batch:
    inputs, targets = zip(*items, strict=True)
    return Batch(torch.stack(inputs), torch.stack(targets))


def _pair(tokens: Any, start: int, length: int) -> tuple[Tensor, Tensor]:
    row = torch.from_numpy(np.asarray(tokens[start : start + length + 1]).astype(np.int64))
    return row[:-1], row[1:]


def _check_tokens(tokens: Any, length: int, what: str) -> None:
    if len(tokens) < length + 1:
        raise ValueError(f"{what} needs at least {length + 1} tokens for rows of {length}; there are {len(tokens)}")


class Windows:
    """Training: contiguous rows of `length` tokens that tile the array, in shuffled order.

    Each epoch tiles from a phase of its own in [0, length), so that rows do not begin at the same tokens each time;
    the less than two rows at the ends that a phase leaves out come in with another.
    """

    collate = staticmethod(collate_tokens)

    def __init__(self, tokens: Any, length: int, *, seed: int):
        _check_tokens(tokens, length, "Windows")
        self.tokens, self.length, self.seed = tokens, length, seed
        self._rows = max(1, (len(tokens) - length) // length)
        self._epochs = Recent()

    def __len__(self) -> int:
        return self._rows

    def item(self, position: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(position, self._rows)
        phase, order = self._epochs.get(epoch, self._draw)
        return _pair(self.tokens, phase + int(order[index]) * self.length, self.length)

    def _draw(self, epoch: int) -> tuple[int, np.ndarray]:
        rng = epoch_rng(self.seed, epoch)
        spare = len(self.tokens) - 1 - self._rows * self.length
        return int(rng.integers(min(spare + 1, self.length))), rng.permutation(self._rows)


class Crops:
    """Training: row n begins anywhere, drawn with replacement from (seed, n). One pass is N / length rows."""

    collate = staticmethod(collate_tokens)

    def __init__(self, tokens: Any, length: int, *, seed: int):
        _check_tokens(tokens, length, "Crops")
        self.tokens, self.length, self.seed = tokens, length, seed

    def __len__(self) -> int:
        return max(1, len(self.tokens) // self.length)

    def item(self, position: int) -> tuple[Tensor, Tensor]:
        start = int(epoch_rng(self.seed, position).integers(len(self.tokens) - self.length))
        return _pair(self.tokens, start, self.length)


class StridedWindows:
    """Evaluation: every token but the first scored exactly once, with as much context as window and stride allow.

    A row is `context` tokens; each row after the first scores its last `stride` targets, with at least
    context - stride tokens before them, and the overlap's targets are -100. The last row ends with the array. An array
    shorter than a row is one short row.
    """

    collate = staticmethod(collate_tokens)

    def __init__(self, tokens: Any, context: int, *, stride: int | None = None):
        stride = context if stride is None else stride
        if not 1 <= stride <= context:
            raise ValueError(f"stride is {stride}; it takes 1 to the context length, {context}")
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens leave nothing to score: the first token has no context")
        self.tokens, self.context, self.stride = tokens, context, stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.context) // self.stride))

    def item(self, position: int) -> tuple[Tensor, Tensor]:
        scored = len(self.tokens) - 1
        end = min(self.context + position * self.stride, scored)  # targets up to tokens[end] are scored by now
        start = max(0, end - self.context)
        inputs, targets = _pair(self.tokens, start, end - start)
        done = 0 if position == 0 else self.context + (position - 1) * self.stride
        targets = targets.clone()
        targets[: max(0, done - start)] = IGNORED
        return inputs, targets


class PackedDocuments:
    """Documents one after another, cut into rows of `length` tokens: no padding, nothing lost, nothing leaks.

    A document's last token has no target, and a row knows where its documents begin (cu_seqlens). A document longer
    than what is left of a row goes on in the next one, without its earlier context. seed: documents are shuffled each
    epoch and rows run on across epochs; None: one pass in order, the last row padded with tokens 0 that are not scored.
    A batch is one packed row (1, B * length); cu_seqlens always has the same number of entries, the spare ones empty
    documents at the end.
    """

    def __init__(self, documents: Sequence[Any], length: int, *, seed: int | None):
        self.documents = [document for document in documents if len(document)]
        if not self.documents:
            raise ValueError("PackedDocuments got no document with a token in it")
        self.length, self.seed = length, seed
        self._lengths = np.array([len(document) for document in self.documents], dtype=np.int64)
        self._total = int(self._lengths.sum())
        self._epochs = Recent()
        self._most = self._most_documents_in_a_row()

    def __len__(self) -> int:
        return -(-self._total // self.length)

    def item(self, position: int) -> tuple[Tensor, Tensor, list[int]]:
        """inputs (length,), targets (length,), the lengths of the row's documents."""
        inputs = np.zeros(self.length, dtype=np.int64)
        targets = np.full(self.length, IGNORED, dtype=np.int64)
        parts: list[int] = []
        at = position * self.length
        filled = 0
        while filled < self.length:
            epoch, within = divmod(at, self._total)
            if self.seed is None and epoch > 0:
                parts.append(self.length - filled)
                break
            order, ends = self._epochs.get(epoch, self._draw)
            place = int(np.searchsorted(ends, within, side="right"))
            document = self.documents[int(order[place])]
            start = within - int(ends[place] - len(document))
            taken = min(self.length - filled, len(document) - start)
            inputs[filled : filled + taken] = document[start : start + taken]
            scored = min(taken, len(document) - start - 1)
            targets[filled : filled + scored] = document[start + 1 : start + 1 + scored]
            parts.append(taken)
            filled += taken
            at += taken
        return torch.from_numpy(inputs), torch.from_numpy(targets), parts

    def collate(self, items: list[tuple[Tensor, Tensor, list[int]]]) -> Batch:
        inputs, targets, parts = zip(*items, strict=True)
        ends = np.cumsum([0, *(part for row in parts for part in row)])
        bounds = np.full(len(items) * self._most + 1, ends[-1], dtype=np.int32)
        bounds[: len(ends)] = ends
        ctx = Context(cu_seqlens=torch.from_numpy(bounds))
        return Batch(torch.cat(inputs)[None], torch.cat(targets)[None], ctx=ctx)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.documents)
        order = np.arange(count) if self.seed is None else epoch_rng(self.seed, epoch).permutation(count)
        return order, np.cumsum(self._lengths[order])

    def _most_documents_in_a_row(self) -> int:
        """A bound: the shortest documents whole (each as often as a row may meet it), and one cut at either end."""
        times = self.length // self._total + 2
        shortest = np.repeat(np.sort(self._lengths)[: self.length], times)
        return min(self.length, int(np.searchsorted(np.cumsum(shortest), self.length, side="right")) + 2)


# ---------------------------------------------------------------------------------------------------------------------
# Reading ahead


class Prefetch:
    """A stream read `depth` batches ahead by a thread, in pinned memory if `pin`.

    `state_dict` is that of the last batch handed out, whatever was read since. An error in the stream is raised where
    the batch would have come. `close` (or leaving a with block) stops the thread; iterating again goes on from there.
    """

    def __init__(self, stream: Stream, *, depth: int = 2, pin: bool = False):
        self.stream, self.depth, self.pin = stream, depth, pin
        self._state = stream.state_dict()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stop = stop = threading.Event()
        ready: queue.Queue = queue.Queue(self.depth)
        self._thread = threading.Thread(target=self._read, args=(ready, stop), name="zoo-prefetch", daemon=True)
        self._thread.start()
        while True:
            try:
                kind, value, state = ready.get(timeout=0.2)
            except queue.Empty:
                if stop.is_set():  # closed while someone still iterates
                    return
                continue
            if kind == "error":
                self.close()
                raise value
            self._state = state
            if kind == "end":
                self.close()
                return
            yield value

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.stream.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """Stop reading ahead and put the stream back to the last batch handed out."""
        if self._thread is None:
            return
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        self.stream.load_state_dict(self._state)

    def _read(self, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            for batch in self.stream:
                batch = pinned(batch) if self.pin else batch
                if not _put(ready, ("batch", batch, self.stream.state_dict()), stop):
                    return
            _put(ready, ("end", None, self.stream.state_dict()), stop)
        except BaseException as error:  # whatever it is, it belongs to the thread that asks for the batch
            _put(ready, ("error", error, None), stop)


def _put(ready: queue.Queue, item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        with suppress(queue.Full):
            ready.put(item, timeout=0.05)
            return True
    return False


def pinned(value: Any) -> Any:
    """The same batch in page-locked memory, from where copies to a GPU do not wait."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: pinned(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, dict):
        return {name: pinned(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(pinned(part) for part in value)
    return value
