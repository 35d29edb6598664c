"""Streams: everything once, on any number of ranks; exact resume."""

import threading
import time

import numpy as np
import pytest
import torch

from zoo.data import (
    IGNORED,
    BadSample,
    Crops,
    PackedDocuments,
    Prefetch,
    Shuffled,
    SourceStream,
    StridedWindows,
    Windows,
)
from zoo.model import Batch


def tokens(count):
    return np.arange(count, dtype=np.uint16)


def numbers(items):
    return Batch(torch.tensor(items))


def rows(batch):
    return batch.inputs.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 24])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_takes_everything_once(world, count, batch_size):
    seen = []
    for rank in range(world):
        source = Shuffled(range(count), numbers, seed=None)
        stream = SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=False)
        batches = [rows(batch) for batch in stream]
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        seen += [item for batch in batches for item in batch]
    assert sorted(seen) == list(range(count))


def taken(world, batch_size, steps, start=None, seed=3, make=None):
    """Per global step of all ranks together, what was taken; and the state afterwards."""
    make = make or (lambda: Shuffled(range(10), numbers, seed=seed))
    streams = [SourceStream(make(), batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    for stream in streams:
        if start:
            stream.load_state_dict(start)
    iterators = [iter(stream) for stream in streams]
    out = [[item for iterator in iterators for item in rows(next(iterator))] for _ in range(steps)]
    states = [stream.state_dict() for stream in streams]
    assert all(state == states[0] for state in states)
    return out, states[0]


def test_training_order_is_that_of_the_position():
    one, state = taken(world=1, batch_size=6, steps=10)
    assert state == {"position": 60}
    everything = [item for step in one for item in step]
    for epoch in range(6):
        assert sorted(everything[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert everything[:10] != everything[10:20]
    for world, batch_size in ((2, 3), (3, 2), (6, 1)):
        assert taken(world, batch_size, 10)[0] == one
    assert [item for step in taken(1, 1, 60)[0] for item in step] == everything  # micro-batches
    assert taken(1, 6, 10, seed=4)[0] != one


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2), (2, 3), (1, 1)])
def test_resume_in_mid_epoch_on_another_world(before, after):
    whole = [item for step in taken(1, 6, 9)[0] for item in step]
    first, state = taken(before, 6 // before, 4)
    second, _ = taken(after, 6 // after, 5, start=state)
    assert [item for step in first + second for item in step] == whole


def test_wrong_ranks_and_empty_sources_are_refused():
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        SourceStream(Shuffled(range(3), numbers, seed=0), batch_size=1, rank=2, world=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        SourceStream(Shuffled(range(3), numbers, seed=0), batch_size=0)
    with pytest.raises(ValueError, match="holds no example"):
        SourceStream(Shuffled([], numbers, seed=0), batch_size=1)


def test_a_pass_knows_its_number_of_batches():
    for size, world in ((1, 1), (3, 1), (4, 1), (10, 1), (3, 2)):
        stream = SourceStream(Shuffled(range(10), numbers, seed=None), batch_size=size, world=world, endless=False)
        assert stream.batches == len(list(stream))
        assert stream.batches == 0  # it is over
    assert SourceStream(Shuffled(range(10), numbers, seed=0), batch_size=3).batches is None


class Broken:
    """Ten items, of which some cannot be read."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"item {index} is torn")
        return index


def test_bad_samples_are_skipped_counted_and_capped():
    stream = SourceStream(Shuffled(Broken({0, 1, 2, 7}), numbers, seed=None), batch_size=3, endless=False)
    assert [rows(batch) for batch in stream] == [[3, 4, 5], [6, 8], [9]]
    assert list(stream.bad) == [0, 1, 2, 7]

    stream = SourceStream(Shuffled(Broken({1}), numbers, seed=None), batch_size=5)
    batches = iter(stream)
    assert rows(next(batches)) == [0, 2, 2, 3, 4]  # shapes stay in training
    assert stream.state_dict() == {"position": 5}

    stream = SourceStream(Shuffled(Broken(set(range(10))), numbers, seed=None), batch_size=5, max_bad=3)
    with pytest.raises(BadSample, match="4 samples cannot be read, more than max_bad = 3. First: 0: OSError: item 0"):
        next(iter(stream))


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("count", [9, 10, 17, 50, 51, 100])
def test_windows_tile_from_a_phase(count):
    source = Windows(tokens(count), 8, seed=1)
    starts = []
    for epoch in range(6):
        items = [source.item(epoch * len(source) + place) for place in range(len(source))]
        for inputs, targets in items:
            assert torch.equal(inputs + 1, targets)
            assert len(inputs) == 8
        first = sorted(int(inputs[0]) for inputs, _ in items)
        assert np.diff(first).tolist() == [8] * (len(first) - 1)
        assert first[0] < 8
        starts.append(first[0])
    assert count < 17 or len(set(starts)) > 1
    with pytest.raises(ValueError, match="at least 101 tokens"):
        Windows(tokens(100), 100, seed=0)


def test_crops_depend_on_seed_and_position_alone():
    one, two = Crops(tokens(100), 8, seed=1), Crops(tokens(100), 8, seed=1)
    later = two.item(37)
    assert torch.equal(one.item(37)[0], later[0])
    starts = {int(one.item(n)[0][0]) for n in range(3000)}
    assert starts == set(range(92))


@pytest.mark.parametrize("count", [2, 5, 8, 9, 10, 17, 40, 41])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_strided_windows_score_every_token_once(count, stride):
    source = StridedWindows(tokens(count), 8, stride=stride)
    scored = []
    for place in range(len(source)):
        inputs, targets = source.item(place)
        assert len(inputs) == min(8, count - 1)
        kept = targets != IGNORED
        assert torch.equal(targets[kept], inputs[kept] + 1)
        scored += targets[kept].tolist()
        if place:  # no less context than promised
            assert int(kept.nonzero()[0]) >= 8 - stride
    assert scored == list(range(1, count))


def test_strided_windows_refuse_nonsense():
    with pytest.raises(ValueError, match="stride is 9"):
        StridedWindows(tokens(20), 8, stride=9)
    with pytest.raises(ValueError, match="nothing to score"):
        StridedWindows(tokens(1), 8)


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def documents(lengths):
    """Document d holds d * 100, d * 100 + 1, …"""
    return [np.arange(length) + 100 * d for d, length in enumerate(lengths)]


LENGTHS = [3, 1, 0, 20, 8, 2, 2, 1, 13]


@pytest.mark.parametrize("length", [1, 4, 7, 50, 120])
@pytest.mark.parametrize("seed", [None, 5])
def test_packed_documents_lose_nothing_and_leak_nothing(length, seed):
    docs = documents(LENGTHS)
    source = PackedDocuments(docs, length, seed=seed)
    stream = SourceStream(source, batch_size=2, endless=seed is not None)
    tokens_seen, pairs, shapes = [], [], set()
    passes = 1 if seed is None else 3
    for number, batch in enumerate(stream):
        bounds = batch.ctx.cu_seqlens
        assert bounds[0] == 0
        assert bounds[-1] == batch.inputs.shape[1]
        assert (bounds.diff() >= 0).all()
        if batch.inputs.shape[1] == 2 * length:
            shapes.add(len(bounds))
        inputs, targets = batch.inputs[0], batch.targets[0]
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            inside, aims = inputs[start:end], targets[start:end]
            if end > start:
                assert (inside // 100 == inside[0] // 100).all() or seed is None  # the padding is zeros
                assert torch.equal(aims[:-1], inside[1:]) or (aims == IGNORED).all()
        kept = targets != IGNORED
        pairs += list(zip(inputs[kept].tolist(), targets[kept].tolist(), strict=True))
        tokens_seen += inputs.tolist()
        if seed is not None and len(tokens_seen) >= passes * 50:
            break
        assert number < 1000
    assert len(shapes) <= 1
    assert all(target == token + 1 for token, target in pairs)
    everything = sorted(token for doc in docs for token in doc.tolist())
    expected = sorted((token, token + 1) for doc in docs for token in doc.tolist()[:-1])
    if seed is None:
        assert tokens_seen[:50] == [token for doc in docs for token in doc.tolist()]
        assert sorted(pairs) == expected
    else:
        for epoch in range(passes):
            assert sorted(tokens_seen[epoch * 50 : epoch * 50 + 50]) == everything
        assert tokens_seen[:50] != tokens_seen[50:100]


def test_packed_documents_resume_on_another_world():
    def make():
        return PackedDocuments(documents(LENGTHS), 7, seed=2)

    whole = torch.cat([torch.tensor(row).flatten() for row in taken(1, 2, 8, make=make)[0]])
    first, state = taken(1, 2, 3, make=make)
    second, _ = taken(2, 1, 5, start=state, make=make)
    again = torch.cat([torch.tensor(row).flatten() for row in first + second])
    assert torch.equal(whole, again)
    with pytest.raises(ValueError, match="no document"):
        PackedDocuments([np.array([])], 4, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Prefetch


def test_prefetch_state_is_that_of_the_last_batch_handed_out():
    plain = SourceStream(Shuffled(range(10), numbers, seed=3), batch_size=2)
    expected = [rows(batch) for batch, _ in zip(plain, range(8), strict=False)]
    inner = SourceStream(Shuffled(range(10), numbers, seed=3), batch_size=2)
    with Prefetch(inner, depth=3) as ahead:
        assert ahead.state_dict() == {"position": 0}
        batches = iter(ahead)
        got = [rows(next(batches)) for _ in range(3)]
        time.sleep(0.1)
        assert inner.position > 6  # it did read ahead
        assert ahead.state_dict() == {"position": 6}
        state = ahead.state_dict()
        ahead.load_state_dict(state)
        got += [rows(next(iter(ahead)))]  # iterating again goes on
    assert inner.state_dict() == {"position": 8}
    assert got == expected[:4]
    other = Prefetch(SourceStream(Shuffled(range(10), numbers, seed=3), batch_size=2))
    other.load_state_dict(state)
    assert rows(next(iter(other))) == expected[3]
    other.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "zoo-prefetch"]


def test_prefetch_ends_and_passes_errors_on():
    inner = SourceStream(Shuffled(range(5), numbers, seed=None), batch_size=2, endless=False)
    ahead = Prefetch(inner)
    assert [rows(batch) for batch in ahead] == [[0, 1], [2, 3], [4]]
    assert ahead.state_dict() == {"position": 5}
    broken = SourceStream(Shuffled(Broken({4}), numbers, seed=None), batch_size=2, max_bad=0)
    batches = iter(Prefetch(broken))
    assert [rows(next(batches)), rows(next(batches))] == [[0, 1], [2, 3]]
    with pytest.raises(BadSample, match="item 4 is torn"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name == "zoo-prefetch"]
