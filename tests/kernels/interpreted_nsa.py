"""The NSA kernels under Triton's interpreter. Run by test_interpret.py in a process of its own, TRITON_INTERPRET=1."""

import math

import pytest
import torch

from tests.kernels.interpreter import repair
from tests.ops.cases import poison_new_tensors
from tests.ops.definition import relative_error
from tests.ops.definition_nsa import CASES, NSACase
from tests.ops.run_nsa import run, spans
from zoo import ops
from zoo.kernels import nsa as kernels
from zoo.kernels import (
    nsa_choice,
    nsa_compressed,
    nsa_count,
    nsa_inverse,
    nsa_mix,
    nsa_near,
    nsa_piece,
    nsa_places,
    nsa_pool,
    nsa_runs,
    nsa_selected,
    nsa_selected_backward,
)
from zoo.ops import backend, nsa, reference_nsa

repair()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, shares, items and pieces even with few tokens."""
    tiles = {"forward": (32, 16, 4, 1), "choose": (16, 16, 4, 1), "dq": (16, 16, 4, 1), "dkdv": (32, 16, 4, 1)}
    for module in (nsa_compressed, nsa_choice):
        monkeypatch.setattr(module, "choose_tile", lambda kernel, q, rows: tiles[kernel])
    monkeypatch.setattr(nsa_compressed, "PROGRAMS", 6)
    monkeypatch.setattr(nsa_choice, "SORTED", 32)
    tiles |= {"partial": (32, 4, 1), "grads": (32, 4, 1), "near": (16, 16, 4, 1)}
    for module in (nsa_selected, nsa_selected_backward):
        monkeypatch.setattr(module, "choose_tile", lambda kernel, q: tiles[kernel])
    monkeypatch.setattr(nsa_inverse, "ITEM_ROWS", {"partial": 24, "grads": 40})
    monkeypatch.setattr(nsa_inverse, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(nsa_inverse, "LISTED", 16)
    for module in (nsa_count, nsa_inverse, nsa_runs):
        monkeypatch.setattr(module, "SUMMED", 32)
    monkeypatch.setattr(nsa_count, "SLOTS", 8)
    monkeypatch.setattr(nsa_count, "TOKENS", 4)
    monkeypatch.setattr(nsa_selected, "FEW_PAIRS", 0)
    monkeypatch.setattr(nsa_piece, "SCRATCH_BYTES", 1 << 30)


def errors(case: NSACase, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    tensors = case.tensors(dtype)
    actual, expected = run(case, tensors), case.expected(tensors)
    return {name: relative_error(x, expected[name]) for name, x in actual.items()}


def test_the_kernels_run_here():
    assert backend.choose("nsa", torch.device("cpu"), torch.float32, 16).__name__ == "zoo.kernels.nsa"


def test_a_few_tokens_equal_the_loops():
    found = errors(NSACase("few", 26, group=2, kv_heads=2, cu_seqlens=(0, 5, 26)))
    assert max(found.values()) <= 1e-4, found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_loops(case):
    found = errors(case)
    print(found)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.slow
@pytest.mark.parametrize("scratch", [1 << 12, 1 << 14])
def test_pieces(scratch, monkeypatch):
    """Runs of tokens of one head, and runs of heads."""
    monkeypatch.setattr(nsa_piece, "SCRATCH_BYTES", scratch)
    found = errors(NSACase("pieces", 37, group=2, kv_heads=3))
    assert max(found.values()) <= 1e-4, found


def test_a_program_per_pair(monkeypatch):
    monkeypatch.setattr(nsa_selected, "FEW_PAIRS", 1 << 20)
    found = errors(NSACase("few", 18, group=2, batch=2))
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize(
    ("block", "stride", "select", "printed", "cu_seqlens"),
    [
        (4, 2, 8, False, (0, 3, 3, 40, 50)),
        (4, 1, 4, True, (0, 3, 3, 40, 50)),
        pytest.param(4, 2, 8, False, None, marks=pytest.mark.slow),
        pytest.param(4, 2, 8, True, None, marks=pytest.mark.slow),
        pytest.param(2, 1, 4, False, (0, 3, 3, 40, 50), marks=pytest.mark.slow),
        pytest.param(4, 4, 8, False, None, marks=pytest.mark.slow),
    ],
)
def test_overlapping_blocks_equal_the_reference(block, stride, select, printed, cu_seqlens):
    x = NSACase("overlap", 50, group=2, kv_heads=2).tensors(torch.float32)
    index = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    k, v = (ops.gather_blocks(y, block, stride, select=select, cu_seqlens=index).mean(2) for y in (x["k"], x["v"]))
    geometry = reference_nsa.Geometry(block, stride, select, 5, printed)
    places = nsa._compressed_places(x["q"], k, geometry, index, None)
    actual = kernels.compressed_forward(x["q"], k, v, places, geometry, 0.3)
    expected = reference_nsa.compressed_forward(x["q"], k, v, places, geometry, 0.3)
    assert torch.equal(actual[2], expected[2])
    assert relative_error(actual[0], expected[0].double()) <= 1e-5
    dout, dlse = x["dout"], torch.randn_like(expected[1])
    arguments = (dout, dlse, x["q"], k, v, *expected[:2], places, geometry, 0.3)
    for a, e in zip(
        nsa_compressed.compressed_backward(*arguments), reference_nsa.compressed_backward(*arguments), strict=True
    ):
        assert relative_error(a, e.double()) <= 1e-4


@pytest.mark.parametrize("different", [(), (3, 9, 14)])
def test_of_equal_blocks_the_earliest_are_chosen(different):
    x = NSACase("ties", 90, group=2, kv_heads=2).tensors(torch.float32)
    k = torch.zeros_like(ops.pool_blocks(x["k"], 4))
    k[:, different] = ops.pool_blocks(x["k"], 4)[:, different]
    geometry = reference_nsa.Geometry(4, 4, 4, 6)
    places = nsa._compressed_places(x["q"], k, geometry, None, None)
    expected = reference_nsa.compressed_forward(x["q"], k, k, places, geometry, 0.3)
    assert torch.equal(nsa_choice.choose(x["q"], k, expected[1], places, geometry, 0.3), expected[2])


@pytest.mark.parametrize("kind", ["equal", "falling", "rising", "random", "one run"])
def test_the_last_tokens_of_many_blocks_choose_as_the_reference(kind):
    """Equal scores: all runs of blocks reach the limit, more than the list has places for. Blocks that are as good as
    their neighbours, best first or last, or that all stand in a few runs."""
    generator = torch.Generator().manual_seed(0)
    blocks, rank = 80, {"falling": -1.0, "rising": 1.0}
    strength = torch.arange(blocks) * rank[kind] if kind in rank else torch.zeros(blocks)
    if kind == "random":
        strength = 20 * torch.rand(blocks, generator=generator)
    elif kind == "one run":
        strength[36:47] = 20.0 + torch.arange(11).flip(0)
    direction = torch.rand(16, generator=generator) + 0.5
    q = direction.expand(1, 12, 4, 16).contiguous()
    k = (strength[:, None, None] * direction / direction.norm()).expand(1, blocks, 2, 16).contiguous()
    geometry = reference_nsa.Geometry(4, 4, 4, 7)
    places = nsa._compressed_places(q, k, geometry, None, torch.tensor([305], dtype=torch.int32))
    expected = reference_nsa.compressed_forward(q, k, k, places, geometry, 0.3)
    assert torch.equal(nsa_choice.choose(q, k, expected[1], places, geometry, 0.3), expected[2])


def test_ragged_rows_equal_the_reference():
    """Rows that start elsewhere, room beyond the last key, padding beyond the room."""
    x = NSACase("ragged", 40, group=2, batch=2).tensors(torch.float32)
    k, v = (ops.pool_blocks(x[name], 4) for name in "kv")
    start = torch.tensor([9, 33], dtype=torch.int32)
    q = x["q"][:, :12]
    geometry = reference_nsa.Geometry(4, 4, 4, 5)
    places = nsa._compressed_places(q, k, geometry, None, start)
    actual = kernels.compressed_forward(q, k, v, places, geometry, 0.3)
    expected = reference_nsa.compressed_forward(q, k, v, places, geometry, 0.3)
    assert torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[0], expected[0])
    places = nsa._places(q, 4, 40, None, start)
    actual = kernels.selected_forward(q, x["k"], x["v"], expected[2], places, 4, 0.3)
    expected = reference_nsa.selected_forward(q, x["k"], x["v"], expected[2], places, 4, 0.3)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("batch", "length", "cu_seqlens", "start"),
    [(3, 7, None, None), (3, 7, None, (0, 2, 9)), (1, 61, (0, 0, 3, 25, 26, 61, 61), None), (1, 9, (0, 9), None)],
)
def test_places_equal_the_reference(batch, length, cu_seqlens, start, monkeypatch):
    monkeypatch.setattr(nsa_places, "TOKENS", 8)
    poison_new_tensors(monkeypatch)
    packed, start = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in (cu_seqlens, start))
    arguments = (torch.zeros(batch, length, 2, 8), 4, 12, packed, start)
    for actual, expected in zip(nsa_places.locate(*arguments), reference_nsa.locate(*arguments), strict=True):
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 3, 25, 26, 61)])
@pytest.mark.parametrize("kernel", ["partial", "grads"])
@pytest.mark.parametrize("way", ["counted", "short keys", "long keys"])
def test_the_inverse_index_is_a_stable_sort(way, kernel, cu_seqlens, monkeypatch):
    """By (row, head, chunk of tokens, block); the items cover every pair once, in order, each of one block."""
    poison_new_tensors(monkeypatch)
    if way != "counted":
        monkeypatch.setattr(nsa_count, "MOST_SLOTS", 0)
        monkeypatch.setattr(nsa_inverse, "SHORT_KEYS", 1 << 16 if way == "short keys" else 0)
    generator = torch.Generator().manual_seed(0)
    batch, length, heads, top, block = (1 if cu_seqlens else 2), 61, 2, 5, 4
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    q, k = torch.zeros(batch, length, 4, 8), torch.zeros(batch, length, heads, 8)
    places = nsa._places(q, block, length, packed, None)
    own = places.place.div(block, rounding_mode="floor")[:, :, None, None]
    index = (
        torch.rand(batch, length, heads, 17, generator=generator).argsort(-1)[..., :top].int()
    )  # distinct; some late
    index[torch.rand(index.shape, generator=generator) < 0.1] = -1
    (piece,) = nsa_piece.pieces(q, k, index, places, block)
    items = nsa_inverse.inverse(piece, kernel)
    assert nsa_count.takes(piece, items.blocks) == (way == "counted")

    wanted = (index >= 0) & (index <= own)
    if kernel == "partial":
        wanted &= ~((index == 0) | (index == own) | (index == own - 1))
    chunk = max(nsa_inverse.CHUNK_TOKENS, math.ceil(length / nsa_inverse.CHUNKS[kernel]))
    assert items.chunks == math.ceil(length / chunk) > 1
    head = torch.arange(batch * heads).view(batch, 1, heads, 1)
    key = (head * items.chunks + torch.arange(length).view(1, -1, 1, 1) // chunk) * piece.slots
    key = torch.where(wanted, key + places.first_block[:, :, None, None] + index, items.blocks).flatten()
    ordered, expected = key.sort(stable=True)
    pairs = int(wanted.sum())
    assert torch.equal(items.order[:pairs], expected[:pairs].int())
    found = [(int(a), int(b), int(c)) for a, b, c in zip(*spans(items), strict=True)]
    assert [i for a, b, _ in found for i in range(a, b)] == list(range(pairs))
    assert all((ordered[a:b] == c).all() for a, b, c in found)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 5, 6, 27, 37)])
def test_near_blocks_that_nobody_or_somebody_chose(cu_seqlens):
    """Any of the first, previous and own block may be missing: each query reads what it chose, no more."""
    generator = torch.Generator().manual_seed(1)
    x = NSACase("near", 37, group=3, kv_heads=2).tensors(torch.float32)
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    index = torch.rand(1, 37, 2, 10, generator=generator).argsort(-1)[..., :4].int()
    places = nsa._places(x["q"], 4, 37, packed, None)
    arguments = (x["q"], x["k"], x["v"], index, places, 4, 0.3)
    actual, expected = kernels.selected_forward(*arguments), reference_nsa.selected_forward(*arguments)
    torch.testing.assert_close(actual, expected)


BLOCK = 4
EACH, CONSUMERS, STAGES = 4, 3, 6  # of hopper_partial.py: pairs of a tile, warpgroups, tiles of the ring
NEAR = [  # batch, tokens, keys, documents
    (1, 37, 37, None),
    (1, 3, 3, None),  # below a block
    (1, 64, 64, None),
    (2, 21, 45, None),  # each row's queries begin somewhere among more keys
    (1, 50, 50, (0, 3, 3, 40, 50)),
    (1, 60, 60, (0, 1, 5, 8, 20, 33, 60)),
]


@pytest.mark.parametrize("tokens", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 12, 16))])
@pytest.mark.parametrize("top", [1, 2, 7])
@pytest.mark.parametrize("sizes", NEAR, ids=str)
def test_the_walks_of_near_show_each_query_its_near_keys_once(sizes, top, tokens, monkeypatch):
    """What zoo/kernels/hopper_near.py does with nsa_near's tables, in place of a device that runs it."""
    monkeypatch.setattr(nsa_near, "LOADED", 256)
    poison_new_tensors(monkeypatch)
    batch, length, keys, documents = sizes
    generator = torch.Generator().manual_seed(top)
    packed = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    start = None if length == keys else torch.tensor([3, keys - length], dtype=torch.int32)
    q, k = torch.empty(batch, length, 4, 16), torch.empty(batch, keys, 2, 16)
    places = nsa._places(q, BLOCK, keys, packed, start)
    own = places.place.div(BLOCK, rounding_mode="floor")[..., None, None].expand(-1, -1, 2, -1)
    index = torch.rand(batch, length, 2, keys // BLOCK + 7, generator=generator).argsort(-1)[..., :top]
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.2, -1, index)
    forced = torch.cat((own, own - 1, own * 0), -1)[..., :top]
    index[:, length // 2 :, :, : forced.shape[-1]] = forced[:, length // 2 :]  # as they are chosen
    (piece,) = nsa_piece.pieces(q, k, index.int(), places, BLOCK)
    table = nsa_near.walks(piece, tokens)
    assert table.items == math.ceil(length / tokens) * batch * 2 == len(table.item)
    seen = torch.zeros(batch, length, 2, keys, dtype=torch.int32)
    masks = []
    for item, (begin, then, count, ragged, last_low, first_high) in enumerate(table.item.tolist()):
        pair, tile = item % table.pairs, (table.items - 1 - item) // table.pairs  # hopper_rows.locate
        for i in range(count):
            key0 = then + (i - 1) * BLOCK if i else begin
            key = torch.arange(key0, key0 + BLOCK)
            masked = (key0 < last_low or key0 + BLOCK > first_high) if i else ragged
            masks.append(bool(masked))
            for t in range(tile * tokens, min((tile + 1) * tokens, length)):
                first, end, low, high = table.query[:, pair // 2, pair % 2, t].tolist()
                low, high = (low, high) if key0 + BLOCK > low else (first, end)
                shown = (key >= low) & (key < high) if masked else torch.ones(BLOCK, dtype=torch.bool)
                seen[pair // 2, t, pair % 2, key[shown]] += 1
    key = torch.arange(keys) - places.first_key[..., None, None]
    near = (index >= 0) & ((index == 0) | (index == own - 1) | (index == own))
    there = (key.div(BLOCK, rounding_mode="floor")[..., None] == index[..., None, :]) & near[..., None, :]
    expected = there.any(-1) & (key >= 0) & (key <= places.place[..., None, None])
    assert torch.equal(seen, expected.int())
    assert documents or top < 3 or length < 37 or not all(masks)


RUNS = [  # batch, tokens, keys, documents
    (1, 61, 61, None),
    (2, 40, 70, None),
    (1, 9, 9, None),  # nothing is far
    (1, 61, 61, (0, 0, 3, 25, 26, 61)),
]


@pytest.mark.parametrize("programs", [1, pytest.param(5, marks=pytest.mark.slow), 300])
@pytest.mark.parametrize("sizes", RUNS, ids=str)
def test_the_runs_of_partial_leave_what_each_pair_must(sizes, programs, monkeypatch):
    """What zoo/kernels/hopper_partial.py does with nsa_runs' tables, in place of a device that runs it: each consumer's
    tiles are those of its slots, each pair's rows are written, of the right block."""
    monkeypatch.setattr(nsa_runs, "COUNTED", 16)
    poison_new_tensors(monkeypatch)
    batch, length, keys, documents = sizes
    generator = torch.Generator().manual_seed(0)
    packed = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    start = None if length == keys else torch.tensor([3, keys - length], dtype=torch.int32)
    q = torch.randn(batch, length, 4, 16, generator=generator)
    k, v = (torch.randn(batch, keys, 2, 16, generator=generator) for _ in "kv")
    places = nsa._places(q, BLOCK, keys, packed, start)
    index = torch.rand(batch, length, 2, keys // BLOCK + 3, generator=generator).argsort(-1)[..., :5].int()
    (piece,) = nsa_piece.pieces(q, k, index, places, BLOCK)
    expected, expected_lse = nsa_selected.far_outputs(piece, q, k, v, 0.3)
    pairs = nsa_inverse.sorted_pairs(piece, "partial")
    table = nsa_runs.runs(piece, pairs, programs)

    order, begin, found = pairs.order.tolist(), table.begin.tolist(), torch.full_like(expected, torch.nan)
    found_lse, sizes_of_runs = torch.full_like(expected_lse, torch.nan), []
    for program in range(programs):
        slot, ahead = 0, list(range(CONSUMERS))
        for share in range(program, table.count, programs):
            sizes_of_runs.append(0)
            for first, last, row, head, key0 in table.item[begin[share] : begin[share + 1]].tolist():
                count = math.ceil((last - first) / EACH)
                takers = {}
                for c in range(CONSUMERS):
                    for i in range((count - ahead[c] + CONSUMERS - 1) // CONSUMERS):
                        takers[ahead[c] + i * CONSUMERS] = c
                    ahead[c] = (ahead[c] + CONSUMERS - count % CONSUMERS) % CONSUMERS
                assert [takers[i] for i in range(count)] == [(slot + i) % STAGES % CONSUMERS for i in range(count)]
                slot = (slot + count) % STAGES
                sizes_of_runs[-1] += last - first
                for pair in order[first:last]:
                    assert found_lse[pair].isnan().all()
                    heads = slice(2 * head, 2 * head + 2)
                    here = k[row, key0 : key0 + BLOCK, head], v[row, key0 : key0 + BLOCK, head]
                    s = 0.3 * q[row, pair // 10 - row * length, heads] @ here[0].T
                    found[pair], found_lse[pair] = s.softmax(-1) @ here[1], s.logsumexp(-1) / math.log(2)
    torch.testing.assert_close(found_lse, expected_lse, equal_nan=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    total = sum(sizes_of_runs)
    assert len(sizes_of_runs) == table.count
    assert max(sizes_of_runs) <= math.ceil(total / table.count)
    assert (total > 0) == (length >= 10)


@pytest.mark.parametrize("rows", [16, 32])
def test_queries_without_blocks_and_the_lse_gradient(rows, monkeypatch):
    for module in (nsa_selected, nsa_selected_backward):
        monkeypatch.setattr(
            module, "choose_tile", lambda kernel, q: (rows, 16, 4, 1) if kernel == "near" else (rows, 4, 1)
        )
    x = NSACase("holes", 30, group=2, kv_heads=2).tensors(torch.float32)
    index = torch.full((1, 30, 2, 3), -1, dtype=torch.int32)
    index[:, 5:, 0, 1] = 1
    index[:, 3:20, 1, 0] = 0
    index[:, 9:, 1, 2] = torch.arange(9, 30).div(4, rounding_mode="floor").int()
    places = nsa._places(x["q"], 4, 30, None, None)
    arguments = (x["q"], x["k"], x["v"], index, places, 4, 0.3)
    actual, expected = kernels.selected_forward(*arguments), reference_nsa.selected_forward(*arguments)
    torch.testing.assert_close(actual, expected)
    assert (actual[0][:, :3] == 0).all()
    arguments = (x["dout"], torch.randn_like(expected[1]), *arguments[:3], *expected, index, places, 4, 0.3)
    for a, e in zip(kernels.selected_backward(*arguments), reference_nsa.selected_backward(*arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("group", "select"), [(3, 4), (1, 8)])
def test_a_step_equals_the_reference(group, select, monkeypatch):
    """One token a row, with the tiles for that."""
    monkeypatch.undo()
    x = NSACase("step", 90, group=group, kv_heads=2, batch=3).tensors(torch.float32)
    k, v = (ops.gather_blocks(x[name], 4, select=select).mean(2) for name in "kv")
    q, start = x["q"][:, :1], torch.tensor([2, 50, 89], dtype=torch.int32)
    geometry = reference_nsa.Geometry(4, 4, select, 5)
    places = nsa._compressed_places(q, k, geometry, None, start)
    actual = kernels.compressed_forward(q, k, v, places, geometry, 0.3)
    expected = reference_nsa.compressed_forward(q, k, v, places, geometry, 0.3)
    assert torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[:2], expected[:2])
    places = nsa._places(q, select, 90, None, start)
    arguments = (q, x["k"], x["v"], expected[2], places, select, 0.3)
    torch.testing.assert_close(kernels.selected_forward(*arguments), reference_nsa.selected_forward(*arguments))


@pytest.mark.slow
def test_table_tiles_equal_the_loops(monkeypatch):
    monkeypatch.undo()
    found = errors(NSACase("table", 70, group=2, dim=16))
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize(("length", "block"), [(37, 4), (3, 8), (40, 20), (64, 32)])
def test_means_of_blocks_equal_the_reference(length, block, monkeypatch):
    """Several programs a token, some columns and tokens that are not there, strides that are not those of a tensor."""
    monkeypatch.setattr(nsa_pool, "WIDTH", 8)
    poison_new_tensors(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, length, 24, generator=generator).transpose(1, 2)[..., 5:17]
    others = (x.flip(1).transpose(0, 1).contiguous().transpose(0, 1), torch.randn_like(x))  # alike, and not
    for tensors in ([x], *([x, other] for other in others)):
        means = nsa_pool.pool_forward(tensors, block)
        torch.testing.assert_close(means, reference_nsa.pool_forward(tensors, block))
    dmeans = torch.randn(2, 3, means[0].shape[1], 12, generator=generator).transpose(1, 2)
    for tensors in ([dmeans], [dmeans, 2 * dmeans], [dmeans, dmeans.contiguous() - 1]):
        dx = nsa_pool.pool_backward(tensors, length, block)
        torch.testing.assert_close(dx, reference_nsa.pool_backward(tensors, length, block))


@pytest.mark.parametrize("there", [(0, 1, 2), (0, 1), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sum_of_branches_equals_the_reference(dtype, there, monkeypatch):
    monkeypatch.setattr(nsa_mix, "ELEMENTS", 64)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 5, 3, 12)
    gates = torch.rand(2, 5, 3, 3, generator=generator)
    branches = [torch.randn(shape, generator=generator).to(dtype) if i in there else None for i in range(3)]
    dout = torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 4e-3}
    expected = reference_nsa.mix_forward(gates, branches)
    torch.testing.assert_close(nsa_mix.mix_forward(gates, branches), expected, **tolerance)
    grads, truth = (f.mix_backward(dout, gates, branches) for f in (nsa_mix, reference_nsa))
    torch.testing.assert_close(grads, truth, **tolerance)


@pytest.mark.parametrize(("scratch", "few"), [(1 << 30, 0), (1 << 12, 0), (1 << 30, 1 << 20)])
def test_the_sum_where_the_selected_branch_is_merged_equals_the_sum_of_branches(scratch, few, monkeypatch):
    """Bit for bit: the roundings are the same. Pieces of tokens and of heads too, and a program for each pair."""
    monkeypatch.setattr(nsa_piece, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(nsa_selected, "FEW_PAIRS", few)
    poison_new_tensors(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = NSACase("mix", 37, group=2, kv_heads=3, dim=12).tensors(torch.float16)
    index = torch.rand(1, 37, 3, 10, generator=generator).argsort(-1)[..., :4].int()
    gates = torch.rand(1, 37, 6, 3, generator=generator)
    compressed, window = (torch.randn(x["q"].shape, generator=generator).half() for _ in range(2))
    places = nsa._places(x["q"], 4, 37, None, None)
    selected, lse = kernels.selected_forward(x["q"], x["k"], x["v"], index, places, 4, 0.3)
    expected = nsa_mix.mix_forward(gates, (compressed, selected, window))
    for keep in (True, False):
        arguments = (x["q"], x["k"], x["v"], index, gates, compressed, window, places, 4, 0.3, keep)
        mixed, kept, again = nsa_selected.selected_mix_forward(*arguments)
        assert torch.equal(mixed, expected)
        assert torch.equal(again, lse)
        assert torch.equal(kept, selected if keep else selected[:, :0])
        reference = reference_nsa.selected_mix_forward(*arguments)
        torch.testing.assert_close((mixed, kept, again), reference, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_without_keys_nobody_sees_any(few, monkeypatch):
    monkeypatch.setattr(nsa_selected, "FEW_PAIRS", few)
    poison_new_tensors(monkeypatch)
    q, k = torch.randn(1, 9, 4, 16), torch.randn(1, 0, 2, 16)
    places, index = nsa._places(q, 4, 0, None, None), torch.full((1, 9, 2, 3), -1, dtype=torch.int32)
    out, lse = kernels.selected_forward(q, k, k, index, places, 4, 0.3)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    grads = kernels.selected_backward(torch.ones_like(q), None, q, k, k, out, lse, index, places, 4, 0.3)
    assert (grads[0] == 0).all()
    assert [x.numel() for x in grads[1:]] == [0, 0]


def test_float16():
    """The selected branch against the reference in float64, on the blocks that float16 chose."""
    x = NSACase("half", 40, group=2, dim=16, gated=False).tensors(torch.float16)
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    index = ops.compressed_attention(q, ops.pool_blocks(k, 4), ops.pool_blocks(v, 4), block=4, top=4)[2]
    out = ops.selected_attention(q, k, v, index, block=4)
    grads = torch.autograd.grad((out * x["dout"]).sum(), (q, k, v))
    wide = [y.detach().double() for y in (q, k, v)]
    places = nsa._places(q, 4, 40, None, None)
    expected, lse = reference_nsa.selected_forward(*wide, index, places, 4, 0.25)
    assert relative_error(out.detach(), expected) <= 5e-3
    again = reference_nsa.selected_backward(x["dout"].double(), None, *wide, expected, lse, index, places, 4, 0.25)
    assert max(relative_error(a, e) for a, e in zip(grads, again, strict=True)) <= 5e-3


@pytest.mark.slow
def test_same_bits_every_time():
    case = NSACase("bits", 50, group=2, kv_heads=2)
    first, second = (run(case, case.tensors(torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_nothing_uninitialised_is_returned(case, monkeypatch):
    poison_new_tensors(monkeypatch)
    for name, x in run(case, case.tensors(torch.float32)).items():
        assert not x.isnan().any(), name
