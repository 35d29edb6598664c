"""The NSA kernels on a CUDA device: accuracy, determinism, no stall, and agreement with another library.

pytest -m gpu tests/ops/test_nsa_gpu.py
"""

import math
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.ops.cases import poison_new_tensors
from tests.ops.definition import relative_error
from tests.ops.definition_nsa import CASES, NSACase
from tests.ops.run_nsa import run, selected_with_tile, spans
from zoo import ops
from zoo.kernels import nsa_count, nsa_inverse, nsa_piece, nsa_runs
from zoo.ops import backend, nsa, nsa_blocks, reference_nsa
from zoo.peers import keep_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# tokens, query heads a kv head, kv heads, head_dim, block, stride, select, top, documents
SHAPES = [
    (2048, 16, 2, 128, 64, 64, 64, 8, None),
    (1500, 4, 2, 64, 64, 64, 64, 16, None),
    (1333, 1, 4, 64, 32, 32, 32, 8, None),
    (700, 3, 2, 96, 16, 16, 16, 5, None),
    (900, 2, 1, 256, 64, 64, 64, 4, None),
    (1024, 4, 2, 64, 32, 16, 64, 8, None),
    (1100, 4, 2, 64, 32, 32, 32, 6, (0, 0, 1, 300, 555, 1100)),
    (1100, 16, 1, 128, 32, 16, 64, 6, (0, 40, 1100)),
    (9000, 16, 2, 128, 64, 64, 64, 8, (0, 4800, 5000, 5020, 8900, 9000)),  # a dozen items for every program
    (7000, 4, 4, 64, 64, 64, 64, 8, (0, 6400, 6500, 7000)),
    (1333, 1, 4, 128, 64, 64, 64, 8, None),
]


@pytest.fixture(autouse=True)
def kernels_run():
    assert backend.explain("nsa", "cuda", torch.bfloat16, 64)[0] in ("triton", "hopper")


def inputs(shape, dtype):
    tokens, group, kv_heads, dim, block, stride, select, _, documents = shape
    torch.manual_seed(0)
    q, dout = (torch.randn(1, tokens, group * kv_heads, dim, device="cuda").to(dtype) for _ in range(2))
    k, v = (torch.randn(1, tokens, kv_heads, dim, device="cuda").to(dtype) for _ in range(2))
    packed = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cuda")
    means = [4 * ops.gather_blocks(x, block, stride, select=select, cu_seqlens=packed).mean(2) for x in (k, v)]
    return q, k, v, *means, dout, packed


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_branches_equal_the_reference_in_float64(shape, dtype, limit):
    tokens, group, kv_heads, dim, block, stride, select, top, _ = shape
    q, k, v, mean_k, mean_v, dout, packed = inputs(shape, dtype)
    dlse = torch.randn(q.shape[:3], device="cuda")
    geometry = reference_nsa.Geometry(block, stride, select, top)
    kernels = backend.choose("nsa", q.device, dtype, dim)
    q64, k64, v64, mk64, mv64, dout64 = (x.double() for x in (q, k, v, mean_k, mean_v, dout))

    places = nsa._compressed_places(q, mean_k, geometry, packed, None)
    out, lse, index = kernels.compressed_forward(q, mean_k, mean_v, places, geometry, 0.1)
    true_out, true_lse, true_index = reference_nsa.compressed_forward(q64, mk64, mv64, places, geometry, 0.1)
    dlse = dlse.masked_fill(true_lse == -torch.inf, 0)
    seen = true_lse > -torch.inf
    errors = {"out": relative_error(out, true_out), "lse": relative_error(lse[seen], true_lse[seen])}
    grads = kernels.compressed_backward(dout, dlse, q, mean_k, mean_v, out, lse, places, geometry, 0.1)
    truth = reference_nsa.compressed_backward(
        dout64, dlse.double(), q64, mk64, mv64, true_out, true_lse, places, geometry, 0.1
    )
    errors |= {f"compressed d{n}": relative_error(a, b) for n, a, b in zip("qkv", grads, truth, strict=True)}
    same = (index == true_index).float().mean().item()  # near ties are rounding's to decide, and move what follows
    assert same > (0.999 if dtype == torch.float32 else 0.9), same

    places = nsa._places(q, select, tokens, packed, None)
    out, lse = kernels.selected_forward(q, k, v, index, places, select, 0.1)
    true_out, true_lse = reference_nsa.selected_forward(q64, k64, v64, index, places, select, 0.1)
    errors |= {"selected": relative_error(out, true_out), "selected lse": relative_error(lse, true_lse)}
    grads = kernels.selected_backward(dout, dlse, q, k, v, out, lse, index, places, select, 0.1)
    truth = reference_nsa.selected_backward(
        dout64, dlse.double(), q64, k64, v64, true_out, true_lse, index, places, select, 0.1
    )
    errors |= {f"selected d{n}": relative_error(a, b) for n, a, b in zip("qkv", grads, truth, strict=True)}
    print({name: f"{error:.1e}" for name, error in errors.items()}, f"same blocks {same:.4f}")
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("length", "heads", "dim"), [(1000, 4, 128), (777, 3, 96), (31, 1, 64), (640, 64, 128)])
def test_means_of_blocks_equal_float64(length, heads, dim, dtype, limit):
    torch.manual_seed(0)
    wide = torch.randn(2, length, 3, heads, dim, device="cuda").to(dtype)
    x = wide[:, :, 1].requires_grad_()
    means = ops.pool_blocks(x, 64)
    dmeans = torch.randn_like(means)
    (dx,) = torch.autograd.grad(means, x, dmeans)
    assert relative_error(means.detach(), reference_nsa.pool_forward([x.detach().double()], 64)[0]) <= limit
    assert relative_error(dx, reference_nsa.pool_backward([dmeans.double()], length, 64)[0]) <= limit


@pytest.mark.parametrize("alike", [True, False])
def test_means_of_two_are_those_of_each(alike):
    torch.manual_seed(0)
    wide = torch.randn(2, 4097, 2, 4, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (
        x.detach().requires_grad_() for x in (wide[:, :, 0], wide[:, :, 1] if alike else wide[:, :, 1].contiguous())
    )
    pair, each = nsa_blocks.pool_each([k, v], 64), (ops.pool_blocks(k, 64), ops.pool_blocks(v, 64))
    douts = [torch.randn_like(each[0]) for _ in range(2)]
    grads, truth = (torch.autograd.grad(means, (k, v), douts) for means in (pair, each))
    assert all(torch.equal(a, b) for a, b in zip((*pair, *grads), (*each, *truth), strict=True))


@pytest.mark.parametrize("block", [32, 64])
def test_the_printed_importance_equals_the_reference(block):
    q, k, _, _, _, _, packed = inputs((1100, 4, 2, 64, block, 16, 64, 6, (0, 40, 41, 1100)), torch.float32)
    k = ops.gather_blocks(4 * k, block, 16, select=64, cu_seqlens=packed).mean(2)
    geometry = reference_nsa.Geometry(block, 16, 64, 6, printed=True)
    places = nsa._compressed_places(q, k, geometry, packed, None)
    kernels = backend.choose("nsa", q.device, q.dtype, 64)
    index = kernels.compressed_forward(q, k, k, places, geometry, 0.1)[2]
    wide = k.double()
    true_index = reference_nsa.compressed_forward(q.double(), wide, wide, places, geometry, 0.1)[2]
    assert (index == true_index).float().mean() > 0.999


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_a_step_equals_the_reference(group, dim):
    """One token a row, each at a place of its own, over keys that reach beyond it."""
    torch.manual_seed(0)
    q = torch.randn(3, 1, group * 2, dim, device="cuda")
    k, v = (torch.randn(3, 20000, 2, dim, device="cuda") for _ in "kv")
    start = torch.tensor([5, 8000, 19999], dtype=torch.int32, device="cuda")
    means = [4 * ops.pool_blocks(x, 64) for x in (k, v)]
    geometry = reference_nsa.Geometry(64, 64, 64, 16)
    kernels = backend.choose("nsa", q.device, q.dtype, dim)
    places = nsa._compressed_places(q, means[0], geometry, None, start)
    out, lse, index = kernels.compressed_forward(q, *means, places, geometry, 0.1)
    truth = reference_nsa.compressed_forward(q.double(), *(x.double() for x in means), places, geometry, 0.1)
    assert torch.equal(index, truth[2])
    assert relative_error(out, truth[0]) <= 1e-4
    assert relative_error(lse[1:], truth[1][1:]) <= 1e-4
    places = nsa._places(q, 64, 20000, None, start)
    found = kernels.selected_forward(q, k, v, index, places, 64, 0.1)
    truth = reference_nsa.selected_forward(q.double(), k.double(), v.double(), index, places, 64, 0.1)
    assert max(relative_error(a, b) for a, b in zip(found, truth, strict=True)) <= 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_equals_the_loops(case):
    tensors = case.tensors(torch.float32)
    expected = case.expected(tensors)
    found = run(case, {name: x.cuda() for name, x in tensors.items()})
    errors = {name: relative_error(x.cpu(), expected[name]) for name, x in found.items()}
    assert max(errors.values()) <= 1e-4, errors


INVERSES = [  # rows, tokens, kv heads, block, top, documents
    (1, 16384, 4, 64, 16, None),
    (2, 3001, 3, 16, 5, None),
    (1, 5000, 2, 32, 8, (0, 1, 1, 700, 733, 5000)),
]


def order_by(way, monkeypatch):
    if way != "counted":
        monkeypatch.setattr(nsa_count, "MOST_SLOTS", 0)
        monkeypatch.setattr(nsa_inverse, "SHORT_KEYS", 1 << 16 if way == "short keys" else 0)


def piece_of(shape, beyond):
    """(index, places, the one piece) of random choices among a row's blocks and as many `beyond` them."""
    batch, tokens, heads, block, top, documents = shape
    torch.manual_seed(0)
    packed = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cuda")
    q, k = (torch.empty(batch, tokens, heads, 16, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    places = nsa._places(q, block, tokens, packed, None)
    index = torch.rand(batch, tokens, heads, -(-tokens // block) + beyond, device="cuda").topk(top).indices.int()
    (piece,) = nsa_piece.pieces(q, k, index, places, block)
    return index, places, piece


@pytest.mark.parametrize("way", ["counted", "short keys", "long keys"])
@pytest.mark.parametrize("kernel", ["partial", "grads"])
@pytest.mark.parametrize("shape", INVERSES, ids=str)
def test_the_inverse_index_is_a_stable_sort(shape, kernel, way, monkeypatch):
    order_by(way, monkeypatch)
    batch, tokens, heads, block, _, _ = shape
    index, places, piece = piece_of(shape, beyond=0)
    own = places.place.div(block, rounding_mode="floor")[:, :, None, None]
    wanted = (index >= 0) & (index <= own)
    if kernel == "partial":
        wanted &= (index != 0) & (index != own) & (index != own - 1)
    for _ in range(5):
        items = nsa_inverse.inverse(piece, kernel)
        assert nsa_count.takes(piece, items.blocks) == (way == "counted")
        chunk = max(nsa_inverse.CHUNK_TOKENS, math.ceil(tokens / nsa_inverse.CHUNKS[kernel]))
        head = torch.arange(batch * heads, device="cuda").view(batch, 1, heads, 1)
        key = (head * items.chunks + torch.arange(tokens, device="cuda").view(1, -1, 1, 1) // chunk) * piece.slots
        key = torch.where(wanted, key + places.first_block[:, :, None, None] + index, items.blocks).flatten()
        ordered, expected = key.sort(stable=True)
        pairs = int(wanted.sum())
        assert torch.equal(items.order[:pairs], expected[:pairs].int())
        first, last, of = spans(items)
        assert int((last - first).sum()) == pairs
        assert torch.equal(first[1:], last[:-1])
        assert torch.equal(ordered[first], of)
        assert torch.equal(ordered[last - 1], of)


@pytest.mark.parametrize("programs", [132, 7])
@pytest.mark.parametrize("way", ["counted", "short keys", "long keys"])
@pytest.mark.parametrize("shape", [*INVERSES, (1, 100, 2, 64, 3, None)], ids=str)
def test_runs_are_equal_shares_of_the_pairs(shape, way, programs, monkeypatch):
    """Their items are each of one block, and follow one another through all pairs."""
    order_by(way, monkeypatch)
    _, tokens, heads, block, top, _ = shape
    index, places, piece = piece_of(shape, beyond=top)
    pairs = nsa_inverse.sorted_pairs(piece, "partial")
    table = nsa_runs.runs(piece, pairs, programs)
    begin, total = table.begin.long(), int(pairs.bounds[-1])
    each = max(1, math.ceil(total / table.count))
    first, last, row, head, key0 = table.item[: int(begin[-1])].long().unbind(1)
    assert int((last - first).sum()) == total
    assert torch.equal(first[1:], last[:-1])
    starts = torch.arange(table.count, device="cuda") * each
    starts = starts[starts < total]
    assert torch.equal(first[begin[: len(starts)]], starts)
    assert (begin[len(starts) :] == len(first)).all()
    for at in (first, last - 1):  # both ends lie in the item's block
        pair = pairs.order[at]
        token = pair // (heads * top)
        chosen = index.flatten()[pair]
        assert torch.equal(token // tokens, row)
        assert torch.equal(pair // top % heads, head)
        assert torch.equal(places.first_key.flatten()[token] + chosen * block, key0)


@pytest.mark.parametrize("rows", [(3, 700, None, (0, 1, 5000)), (1, 9000, (0, 0, 1, 5000, 9000, 9000), None)], ids=str)
def test_places_equal_the_reference(rows):
    batch, tokens, documents, start = rows
    packed, start = (
        None if x is None else torch.tensor(x, dtype=torch.int32, device="cuda") for x in (documents, start)
    )
    q = torch.empty(batch, tokens, 2, 64, device="cuda", dtype=torch.bfloat16)
    found = backend.choose("nsa", q.device, q.dtype, 64).locate(q, 64, 5200, packed, start)
    for actual, expected in zip(found, reference_nsa.locate(q, 64, 5200, packed, start), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[8]], ids=str)
def test_the_sum_where_the_selected_branch_is_merged_equals_the_sum_of_branches(shape, keep):
    tokens, group, kv_heads, dim, _, _, block, top, _ = shape
    q, k, v, _, _, window, packed = inputs(shape, torch.bfloat16)
    gates, compressed = torch.rand(*q.shape[:3], 3, device="cuda"), torch.randn_like(q)
    places = nsa._places(q, block, tokens, packed, None)
    index = torch.rand(1, tokens, kv_heads, -(-tokens // block), device="cuda").topk(top).indices.int()
    kernels = backend.choose("nsa", q.device, q.dtype, dim)
    selected, lse = kernels.selected_forward(q, k, v, index, places, block, 0.1)
    expected = kernels.mix_forward(gates, (compressed, selected, window))
    mixed, kept, again = kernels.selected_mix_forward(
        q, k, v, index, gates, compressed, window, places, block, 0.1, keep
    )
    assert torch.equal(mixed, expected)
    assert torch.equal(again, lse)
    assert torch.equal(kept, selected if keep else selected[:, :0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_near_block_may_be_missing(shape):
    """The first, previous and own block are read together only where they were chosen."""
    tokens, group, kv_heads, dim, _, _, block, top, _ = shape
    q, k, v, *_, packed = inputs(shape, torch.bfloat16)
    places = nsa._places(q, block, tokens, packed, None)
    index = torch.rand(1, tokens, kv_heads, -(-tokens // block), device="cuda").topk(top).indices.int()
    kernels = backend.choose("nsa", q.device, q.dtype, dim)
    out, lse = kernels.selected_forward(q, k, v, index, places, block, 0.1)
    true_out, true_lse = reference_nsa.selected_forward(q.double(), k.double(), v.double(), index, places, block, 0.1)
    seen = true_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert relative_error(out, true_out) <= 1e-2
    assert relative_error(lse[seen], true_lse[seen]) <= 1e-2


NEAR_SHAPES = [  # batch, tokens, keys, query heads a kv head, kv heads, head_dim, top, documents
    (1, 2048, 2048, 16, 2, 128, 8, None),
    (1, 1333, 1333, 1, 4, 128, 3, None),
    (1, 20000, 20000, 16, 2, 64, 5, None),  # several items for every program
    (1, 3000, 3000, 1, 8, 64, 7, (0, 900, 950, 1040, 3000)),
    (2, 1000, 1700, 4, 2, 128, 6, None),  # queries that begin somewhere among more keys
    (2, 50, 50, 64, 2, 64, 1, None),  # below a block
    (1, 50, 300, 2, 2, 128, 3, None),
    (1, 1100, 1100, 16, 1, 128, 2, (0, 0, 1, 300, 555, 1100)),
    (1, 9000, 9000, 4, 4, 128, 8, (0, 4800, 5000, 5020, 8900, 9000)),
]


@pytest.mark.parametrize("scratch", [5 << 30, 4 << 20], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", NEAR_SHAPES, ids=str)
def test_near_blocks_on_hopper_equal_float64(shape, dtype, scratch, monkeypatch):
    """zoo/kernels/hopper_near.py alone, into poisoned tensors, twice; and beside the portable kernel."""
    if backend.explain("nsa", "cuda", dtype, 128)[0] != "hopper":
        pytest.skip("not a Hopper device")
    from zoo.kernels import hopper_near, nsa_selected

    monkeypatch.setattr(nsa_piece, "SCRATCH_BYTES", scratch)
    batch, tokens, keys, group, kv_heads, dim, *_ = shape
    q, k, v, index, near_index, places = near_inputs(shape, dtype)
    assert hopper_near.takes(q, k, 64, 0.1)

    def call(near_outputs):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device="cuda")
        for piece in nsa_piece.pieces(q, k, index, places, 64):
            part = (piece.queries(q), piece.keys(k), piece.keys(v), piece.queries(out), piece.queries(lse))
            near_outputs(piece, *part, 0.1)
        return out, lse * math.log(2)

    found = call(hopper_near.near_outputs)
    truth = reference_nsa.selected_forward(q.double(), k.double(), v.double(), near_index, places, 64, 0.1)
    for got, expected in zip(found, truth, strict=True):
        there = expected > -torch.inf
        assert torch.equal(got > -torch.inf, there)
        assert relative_error(got[there], expected[there]) <= (1e-2 if dtype == torch.bfloat16 else 2e-3)
    portable = call(nsa_selected.near_outputs)
    assert relative_error(found[0], portable[0].double()) <= 1e-2
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(call(hopper_near.near_outputs), found, strict=True))


def near_inputs(shape, dtype):
    """q, k, v, the chosen blocks, those of them that are near ones, places. The first half of the queries chose any,
    the others as the compressed branch does."""
    batch, tokens, keys, group, kv_heads, dim, top, documents = shape
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, group * kv_heads, dim, device="cuda").to(dtype)
    k, v = (torch.randn(batch, keys, kv_heads, dim, device="cuda").to(dtype) for _ in "kv")
    packed = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cuda")
    start = torch.tensor([17, keys - tokens][:batch], dtype=torch.int32, device="cuda") if keys > tokens else None
    places = nsa._places(q, 64, keys, packed, start)
    own = places.place.div(64, rounding_mode="floor")[..., None, None].expand(-1, -1, kv_heads, -1)
    index = torch.rand(batch, tokens, kv_heads, -(-keys // 64) + 8, device="cuda").topk(top).indices
    forced = torch.cat((own, own - 1, torch.where(own >= 2, 0, -1)), -1)[..., :top]
    near = (index == 0) | (index == own - 1) | (index == own)
    index[:, tokens // 2 :] = index.masked_fill(near, -1)[:, tokens // 2 :]  # none is chosen twice
    index[:, tokens // 2 :, :, : forced.shape[-1]] = forced[:, tokens // 2 :]
    near = (index == 0) | (index == own - 1) | (index == own)
    return q, k, v, index.int(), index.masked_fill(~near, -1).int(), places


PARTIAL_SHAPES = [  # as NEAR_SHAPES
    (1, 2048, 2048, 16, 2, 128, 8, None),
    (1, 9000, 9000, 16, 4, 128, 16, (0, 4800, 5000, 5020, 8900, 9000)),
    (1, 20000, 20000, 16, 2, 64, 9, None),
    (1, 1333, 1333, 8, 4, 128, 6, None),
    (2, 1000, 1700, 32, 2, 128, 6, None),
    (1, 300, 300, 64, 2, 64, 5, None),  # most programs have nothing to do
    (1, 3000, 3000, 64, 1, 128, 9, (0, 900, 950, 1040, 3000)),
    (1, 4096, 4096, 8, 8, 64, 7, None),
    (1, 100, 100, 16, 2, 128, 3, None),  # no block is far
]


def partial_inputs(shape, dtype):
    """As near_inputs, without what is near; in the third quarter all queries chose block 2."""
    q, k, v, index, _, places = near_inputs(shape, dtype)
    part = index[:, index.shape[1] // 2 : index.shape[1] * 3 // 4]
    part[..., -1:] = torch.where((part == 2).any(-1, keepdim=True), part[..., -1:], 2)
    return q, k, v, index, places


def true_far(piece, q, k, v, scale):
    """What far_outputs leaves, by the definition in float64; 0 where it leaves nothing."""
    batch, length, kv_heads, top = piece.index.shape
    q = q.unflatten(2, (kv_heads, piece.group))
    out = q.new_zeros(piece.pairs, piece.group, piece.dim, dtype=torch.float64)
    lse = out.new_zeros(out.shape[:2])
    for pair in far_pairs(piece).nonzero().flatten().split(8192):
        token, head = pair // (kv_heads * top), pair // top % kv_heads
        first = piece.first_key.flatten()[token] + piece.index.flatten()[pair] * 64
        key = first[:, None] + torch.arange(64, device=q.device)
        rows = q[token // length, token % length, head].double()
        keys, values = (x[(token // length)[:, None], key, head[:, None]].double() for x in (k, v))
        s = scale * rows @ keys.mT
        out[pair], lse[pair] = s.softmax(-1) @ values, s.logsumexp(-1) / math.log(2)
    return out, lse


def far_pairs(piece):
    own = (piece.place // 64)[..., None, None]
    return ((piece.index > 0) & (piece.index < own - 1)).flatten()


def far_rows(far_outputs, q, k, v, index, places):
    """(pairs, group, D), and (pairs, group) in log2, of the pairs of far blocks."""
    found = []
    for piece in nsa_piece.pieces(q, k, index, places, 64):
        partial, lse = far_outputs(piece, piece.queries(q), piece.keys(k), piece.keys(v), 0.1)
        far = far_pairs(piece)
        found.append((partial[far], lse[far]))
    return [torch.cat(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("scratch", [5 << 30, 4 << 20], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", PARTIAL_SHAPES, ids=str)
def test_far_blocks_on_hopper_equal_float64(shape, dtype, scratch, monkeypatch):
    """zoo/kernels/hopper_partial.py alone, into poisoned tensors, four times."""
    if backend.explain("nsa", "cuda", dtype, 128)[0] != "hopper":
        pytest.skip("not a Hopper device")
    from zoo.kernels import hopper_partial

    monkeypatch.setattr(nsa_piece, "SCRATCH_BYTES", scratch)
    q, k, v, *chosen = partial_inputs(shape, dtype)
    assert hopper_partial.takes(q, k, 64, 0.1)
    truth = far_rows(true_far, q, k, v, *chosen)
    assert (len(truth[0]) > 0) == (shape[1] > 100)
    poison_new_tensors(monkeypatch)
    found = far_rows(hopper_partial.far_outputs, q, k, v, *chosen)
    for got, expected in zip(found, truth, strict=True):
        assert relative_error(got, expected) <= (1e-2 if dtype == torch.bfloat16 else 2e-3)
    for _ in range(3):
        again = far_rows(hopper_partial.far_outputs, q, k, v, *chosen)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


# What `tune_nsa.py` tries beside the table's rows, which the other tests run
TILES = {
    "near": [(64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
    "partial": [(64, 4, 3), (64, 4, 1), (64, 8, 2), (128, 4, 2)],
    "grads": [(32, 4, 2), (64, 8, 2), (64, 8, 1), (32, 8, 3), (16, 4, 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "tile"), [(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles])
def test_another_tile_gives_the_same(kernel, tile):
    """In a process of its own: one that faults on the device must not take the other tests along."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these tiles are for the shared memory of an sm_90")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(selected_with_tile, kernel, 128, tile).result(timeout=300) <= 1e-2


@pytest.mark.parametrize("there", [(0, 1, 2), (0, 1), (2,)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_sum_of_branches_equals_float64(dim, dtype, limit, there):
    torch.manual_seed(0)
    gates = torch.rand(2, 777, 6, 3, device="cuda").to(dtype)
    branches = [torch.randn(2, 777, 6, dim, device="cuda").to(dtype) if i in there else None for i in range(3)]
    dout = torch.randn(2, 777, 6, dim, device="cuda").to(dtype)
    wide = [None if x is None else x.double() for x in branches]
    kernels = backend.choose("nsa", gates.device, dtype, dim)
    out = kernels.mix_forward(gates, branches)
    assert out.dtype == dtype
    found = [out, *kernels.mix_backward(dout, gates, branches)]
    truth = [
        reference_nsa.mix_forward(gates.double(), wide),
        *reference_nsa.mix_backward(dout.double(), gates.double(), wide),
    ]
    errors = [relative_error(a, b) for a, b in zip(found, truth, strict=True)]
    assert max(errors) <= limit, errors
    again = [kernels.mix_forward(gates, branches), *kernels.mix_backward(dout, gates, branches)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


BIG = NSACase("big", 3000, group=4, kv_heads=2, dim=64, block=64, top=8, window=128)
PACKED = NSACase("packed", 3000, group=16, dim=64, block=32, top=8, window=100, cu_seqlens=(0, 1, 1300, 1300, 3000))


def on_gpu(case):
    gate = {"log_decay": torch.float32}
    return {name: x.cuda().to(gate.get(name, torch.bfloat16)) for name, x in case.tensors().items()}


@pytest.mark.parametrize("case", [BIG, PACKED], ids=lambda case: case.name)
def test_same_bits_every_time_and_in_pieces(case, monkeypatch):
    tensors = on_gpu(case)
    first = run(case, tensors)
    for _ in range(3):
        again = run(case, tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(nsa_piece, "SCRATCH_BYTES", 8 << 20)
    pieces = run(case, tensors)
    # other tiles, so other sums: near, not the same bits
    assert max(relative_error(pieces[name], first[name].double()) for name in first) <= 1e-2


@pytest.mark.parametrize("case", [BIG, PACKED], ids=lambda case: case.name)
def test_nothing_uninitialised_is_returned(case, monkeypatch):
    tensors = on_gpu(case)
    expected = run(case, tensors)

    poison_new_tensors(monkeypatch)
    found = run(case, tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_host_synchronisation():
    tensors = on_gpu(PACKED)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if name != "dout"}
    packed = torch.tensor(PACKED.cu_seqlens, dtype=torch.int32, device="cuda")

    def step():
        out = ops.nsa_attention(**leaves, **PACKED.options, cu_seqlens=packed)
        torch.autograd.backward(out, tensors["dout"])

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode announces itself as a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_equals_eager():
    tensors = on_gpu(BIG)
    arguments = [tensors[name] for name in ("q", "k", "v", "branch_gates", "log_decay")]
    compiled = torch.compile(lambda *x: ops.nsa_attention(*x, **BIG.options), fullgraph=True)
    assert relative_error(compiled(*arguments), ops.nsa_attention(*arguments, **BIG.options).double()) <= 1e-2


def swapped_blocks(q, k, ours, theirs, block=64):
    """(share of queries and key heads with other blocks, the largest relative difference between the scores of a block
    that only we chose and one that only they did), by the scores in float64. q (T,H,D), compressed k (M,G,D), blocks
    (T,G,top). As many have to be chosen."""
    place, slot = torch.arange(len(q), device=q.device), torch.arange(len(k), device=q.device)
    logits = torch.einsum("tgrd,mgd->tgrm", q.double().unflatten(1, (k.shape[1], -1)), k.double()) * q.shape[2] ** -0.5
    logits = logits.masked_fill(((slot + 1) * block > place[:, None] + 1)[:, None, None], -torch.inf)
    score = logits.softmax(-1).nan_to_num(0).sum(2)  # (T,G,M); of a query that sees none, all are chosen
    own = (place // block)[:, None, None]

    def chosen(index):
        """(T,G,M) bool"""
        index = torch.where((index >= 0) & (index <= own), index, len(k)).long()
        return score.new_zeros(*score.shape[:2], len(k) + 1, dtype=torch.bool).scatter(-1, index, True)[..., :-1]

    ours, theirs = chosen(ours), chosen(theirs)
    assert torch.equal(ours.sum(-1), theirs.sum(-1))
    differ = (ours != theirs).any(-1)
    spans = []
    for mine, other in ((ours, theirs), (theirs, ours)):
        only, score_there = (mine & ~other)[differ], score[differ]
        most, least = (score_there.masked_fill(~only, x) for x in (-torch.inf, torch.inf))
        spans.append((most.amax(-1), least.amin(-1)))
    (high, low), (other_high, other_low) = spans
    gaps = torch.maximum(high - other_low, other_high - low) / torch.minimum(low, other_low)
    return differ.double().mean().item(), gaps.max().item() if gaps.numel() else 0.0


def test_agrees_with_fla():
    """The blocks that flash-linear-attention chooses, and its output and gradients for them (SPEC.md 5.3)."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    from fla.ops.nsa import compression, parallel
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.nsa.parallel import parallel_nsa, parallel_nsa_topk

    for module in (compression, parallel):
        keep_config(module, 6)  # tuning takes two minutes

    torch.manual_seed(0)
    q, dout = (torch.randn(1, 4096, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, 4096, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gates = torch.rand(1, 4096, 32, 3, device="cuda", dtype=torch.bfloat16)
    k = k + 2 * torch.randn(1, 64, 1, 2, 128, device="cuda", dtype=torch.bfloat16).expand(-1, -1, 64, -1, -1).flatten(
        1, 2
    )
    means = [ops.pool_blocks(x, 64) for x in (k, v)]
    _, lse = parallel_nsa_compression(q=q, k=means[0], v=means[1], TK=4096, block_size=64, scale=128**-0.5)
    theirs = parallel_nsa_topk(
        q=q, k=means[0], lse=lse, TK=4096, block_counts=16, block_size=64, scale=128**-0.5, cu_seqlens=None
    )
    ours = ops.compressed_attention(q, *means, block=64, top=16)[2]
    differ, gap = swapped_blocks(q[0], means[0][0], ours[0], theirs[0])
    print(f"other blocks for {differ:.2%} of the queries, whose scores differ by at most {gap:.1e} of themselves")
    assert gap <= 2 * torch.finfo(torch.bfloat16).eps  # fla rounds scale * q
    assert differ <= 0.02  # rounded so, the blocks of 1.05% of these queries are others

    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    out = ops.nsa_attention(*leaves, block=64, top=16, window=64)
    gradients = torch.autograd.grad(out, leaves, dout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla's, that the blocks given are taken: a near tie would weigh as an error
        theirs = parallel_nsa(
            q, k, v, g_cmp=gates[..., 0], g_slc=gates[..., 1], block_indices=ours.long(), block_size=64
        )
    theirs = theirs + ops.window_attention(q, k, v, window=64) * gates[..., 2:]
    for a, b in zip((out, *gradients), (theirs, *torch.autograd.grad(theirs, leaves, dout)), strict=True):
        assert relative_error(a.detach(), b.detach().double()) <= 3e-2
