"""The kernels under Triton's interpreter. Run by test_interpret.py in a process of its own, with TRITON_INTERPRET=1."""

import math

import pytest
import torch

from tests.kernels.interpreter import repair
from tests.ops.cases import CASES, poison_new_tensors
from tests.ops.definition import Case, is_negligible, relative_error
from tests.ops.run_case import run
from zoo.kernels import decode
from zoo.kernels import gate as gates
from zoo.kernels import loss as losses
from zoo.kernels import prune as prunes
from zoo.kernels import window as kernels
from zoo.kernels.tiles import CHUNK, Tile, Tiles
from zoo.ops import (
    backend,
    gated_window_attention,
    linear_cross_entropy,
    log_decay,
    reference,
    reference_prune,
)
from zoo.ops.reference_prune import mirror

repair()
SMALL = Tiles(forward=Tile(32, 16, 4, 1), dkdv=Tile(16, 32, 4, 1), dq=Tile(32, 32, 4, 1))
LARGE = Tiles(forward=Tile(64, 128, 4, 1), dkdv=Tile(128, 64, 4, 1), dq=Tile(128, 16, 4, 1))


@pytest.fixture
def tiles(monkeypatch):
    """Chooses the tiles of the calls that follow."""
    return lambda tiles: monkeypatch.setattr(kernels, "choose_tiles", lambda *args: tiles)


def errors(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    tensors = case.tensors(dtype)
    actual, expected = run(case, tensors), case.expected(tensors)
    return {name: relative_error(x, expected[name]) for name, x in actual.items()}


def test_the_kernels_run_here():
    assert backend.choose_backend("window", torch.device("cpu"), torch.float32, 16).name == "triton"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_loops(case, tiles):
    tiles(SMALL)
    found = errors(case)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("case", CASES[4::5], ids=lambda case: case.name)
def test_large_tiles_equal_the_loops(case, tiles):
    tiles(LARGE)
    found = errors(case)
    assert max(found.values()) <= 1e-4, found


def test_table_row_equals_the_loops():
    found = errors(Case("table", 75, 20, "fused", dim=16))
    assert max(found.values()) <= 1e-4, found


def test_float16(tiles):
    """Half precision keeps half precision's error: 2 ** -11 per rounding, a few of them."""
    tiles(SMALL)
    case = Case("float16", 50, 20, "none", dim=16)
    found = errors(case, torch.float16)
    assert max(found.values()) <= 5e-3, found


@pytest.mark.parametrize("dim", [16, 80, 96])
def test_other_head_dims(dim, tiles):
    """Heads that are no power of two are padded inside the kernel, never in memory."""
    tiles(SMALL)
    found = errors(Case("dim", 35, 12, dim=dim, heads=1))
    assert max(found.values()) <= 1e-4, found


def test_strided_inputs(tiles):
    """q, k, v as slices of one projection, and an expanded gradient: no copy is asked of the caller."""
    tiles(SMALL)
    torch.manual_seed(0)
    packed = torch.randn(2, 40, 3, 2, 16)
    q, k, v = packed.unbind(2)
    gate = torch.randn(2, 40, 4).chunk(2, -1)
    options = {"window": 9, "scale": 0.25, "spans": None}
    out, lse = kernels.window_forward(q, k, v, gate, **options)
    dout = torch.ones(1, 1, 1, 1).expand(2, 40, 2, 16)
    actual = kernels.window_backward(dout, None, q, k, v, out, lse, gate, **options)
    expected = reference.window_backward(dout, None, q, k, v, out, lse, gate, **options)
    for a, e in zip((*actual[:3], *actual[3]), (*expected[:3], *expected[3]), strict=True):
        assert relative_error(a, e.double()) <= 1e-4


@pytest.mark.parametrize("chosen", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("documents", [None, torch.tensor([0, 90, 90, 260], dtype=torch.int32)])
def test_pruned_tiles(documents, chosen, tiles):
    """The tiles that the reference skips, and no other, also where they matter: values and gradients agree."""
    tiles(chosen)
    torch.manual_seed(0)
    queries = 200 if documents is None else 260
    q, dout = torch.randn(2, 1, queries, 4, 16)
    k, v = torch.randn(2, 1, 260, 2, 16)
    decay = -torch.rand(1, 260, 4)
    decay /= 100
    first = torch.tensor([[[0, 0, 1, 2, 2], [0, 1, 1, 3, 4]]], dtype=torch.int32)
    spans = None if documents is None else reference.document_spans(documents, 260)
    options = {"window": 200, "scale": 0.25, "spans": spans, "kept": (first, mirror(first))}
    results = []
    for module in (kernels, reference):
        out, lse = module.window_forward(q, k, v, (decay,), **options)
        *grads, gate = module.window_backward(dout, None, q, k, v, out, lse, (decay,), **options)
        results.append((out, lse, *grads, *gate))
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e.double()) <= 1e-4
    whole, _ = kernels.window_forward(q, k, v, (decay,), **options | {"kept": None})
    assert relative_error(whole, results[0][0].double()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "dim", "window", "fused"),
    [
        (700, 700, 4, 4, 16, None, False),
        (700, 700, 4, 2, 16, 300, True),
        (130, 713, 3, 1, 24, 300, True),
        (1, 400, 2, 2, 16, None, False),
        (64, 64, 2, 1, 16, None, False),
    ],
)
def test_kept_tiles(queries, keys, heads, kv_heads, dim, window, fused, dtype, monkeypatch):
    """Only what may go, and all that the reference drops with a hair's breadth less."""
    monkeypatch.setattr(prunes, "SCANNED", 4)  # several steps along a head
    monkeypatch.setattr(prunes, "SEARCHED", 8)
    torch.manual_seed(0)
    q, k = torch.randn(2, queries, heads, dim).to(dtype), torch.randn(2, keys, kv_heads, dim).to(dtype)
    k[:, keys // 3] *= 2
    gate = (2.5 + 0.3 * torch.randn(2, keys, heads), 0.3 * torch.randn(2, keys, heads))
    if not fused:
        decay = log_decay(*gate)
        decay[:, keys // 2] -= 200
        gate = (decay,)
    poison_new_tensors(monkeypatch)
    options = {"window": window, "scale": dim**-0.5}
    first, last = prunes.kept_tiles(q, k, gate, prune=1e-3, **options)
    least, theirs = (reference_prune.kept_tiles(q, k, gate, prune=x, **options)[0] for x in (1e-3 * (1 - 1e-4), 1e-3))
    assert first.dtype == last.dtype == torch.int32
    assert torch.equal(last, reference_prune.mirror(first))
    assert is_negligible(first, q, k, log_decay(*gate) if fused else gate[0], prune=1e-3, **options)
    assert bool((least <= first).all())
    assert (first == theirs).double().mean() >= 0.95
    assert bool(first.any()) == (keys > 100)
    assert len((torch.arange(first.shape[2]) - first).unique()) >= min(4, first.shape[2])  # runs of several lengths


def test_tiles_are_chosen_and_used_by_one_back_end(monkeypatch):
    """The public argument, interpreted: within the bound, and the values of the reference's own choice."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 300, 2, 16)
    z, u = torch.randn(2, 1, 300, 2)
    assert backend.choose_backend("prune", q.device, q.dtype, 16).modules["prune"] == "zoo.kernels.prune"
    calls = [gated_window_attention(q, k, v, z, u, prune=prune) for prune in (None, 1e-3)]
    assert (calls[0] - calls[1]).norm(dim=-1).max() <= 2e-3 * v.norm(dim=-1).max()
    monkeypatch.setenv("ZOO_BACKEND", "reference")
    assert relative_error(calls[1], gated_window_attention(q, k, v, z, u, prune=1e-3).double()) <= 1e-4


def test_same_bits_every_time(tiles):
    tiles(SMALL)
    case = Case("bits", 60, 20, "fused", heads=4, kv_heads=2)
    first, second = (run(case, case.tensors(torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_nothing_uninitialised_is_returned(case, tiles, monkeypatch):
    tiles(SMALL)

    poison_new_tensors(monkeypatch)
    for name, x in run(case, case.tensors(torch.float32)).items():
        assert not x.isnan().any(), name


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_chunk_prefix(length):
    """suffix and total give every difference of the prefix sum."""
    torch.manual_seed(0)
    z, u = torch.randn(2, 1, length, 20).unbind()
    decay = log_decay(z, u)
    suffix, total = gates.prefix((z, u))
    prefix = decay.double().cumsum(1)[0].T
    chunk = torch.arange(length) // CHUNK
    carry = torch.cat([total[0].double(), torch.zeros(20, 1)], 1).cumsum(1)
    t = length - 1
    bias = suffix[0].double() - suffix[0, :, t:].double() + carry[:, chunk[t]][:, None] - carry[:, chunk]
    expected = (prefix[:, t:] - prefix) / math.log(2)
    torch.testing.assert_close(bias, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", [(1,), (2,), (2, 8), gates.SEGMENTS])
@pytest.mark.parametrize(("length", "queries"), [(1, 1), (128, 128), (700, 700), (700, 300), (704, 304), (704, 303)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 20])
def test_prefix_backward(heads, length, queries, documents, segments, monkeypatch):
    """Both sides of d prefix to d z and d u: segments of several chunks, of one, and a row that is all one segment; the
    lower tile of their sums and the taller; lengths and offsets that are multiples of 16, and others."""
    torch.manual_seed(0)
    monkeypatch.setattr(gates, "SEGMENTS", segments)
    z, u = torch.randn(2, 1, length, heads).unbind()
    keys, few = torch.randn(1, heads, length), torch.randn(1, heads, queries)
    spans = reference.document_spans(torch.tensor([0, length // 3, length], dtype=torch.int32), length)
    both = keys.double() + torch.nn.functional.pad(few, (length - queries, 0)).double()
    spans = spans if documents else None
    expected = reference._gate_backward(both[:, :, None], (z.double(), u.double()), spans)
    actual = gates.prefix_backward(keys, few, (z, u), None if spans is None else spans[1])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= 1e-5


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "slots"),
    [(2, 4, 2, 32, 70), (3, 4, 4, 64, 300), (1, 16, 1, 80, 1000), (2, 2, 2, 16, 1)],
)
@pytest.mark.parametrize("gated", [True, False])
def test_one_token_over_a_ring(batch, heads, kv_heads, dim, slots, gated):
    """Several shares and one; rows full, partly live and empty; whatever dead slots hold."""
    torch.manual_seed(0)
    q = torch.randn(batch, 1, heads, dim)
    k, v = torch.randn(2, batch, slots, kv_heads, dim)
    live = torch.tensor([slots, 0, slots // 2 + 1])[:batch].int()
    dead = torch.arange(slots) >= live[:, None]
    k[dead], v[dead] = math.nan, math.nan
    decay = -3 * torch.rand(batch, slots, heads) if gated else None
    actual = decode.ring_attention(q, k, v, decay, live, 0.3)
    wide = (x if x is None else x.double() for x in (q, k, v, decay))
    expected = reference.ring_attention(*wide, live, 0.3)
    assert relative_error(actual, expected.nan_to_num()) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("rows", "width", "held"), [(5, 7, True), (3, 300, True), (2, 9001, True), (2, 9001, False)])
def test_cross_entropy_rows(rows, width, held, dtype, bound, monkeypatch):
    """Widths that fill a part of a tile, one tile, and two, held in registers and read again; an unscored row among the
    others; a column of -inf, and in one row a whole tile."""
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "HELD", losses.HELD if held else 0)
    logits = (5 * torch.randn(rows, width)).to(dtype)
    logits[:, 0] = float("-inf")
    logits[0, : width - 809] = float("-inf")
    targets = torch.randint(max(1, width - 809), width, (rows,))
    targets[1] = -100
    for needs_grad in (False, True):
        ours, theirs = logits.clone(), logits.double()
        loss = losses.cross_entropy_rows(ours, targets, -100, needs_grad)
        torch.testing.assert_close(loss.double(), reference.cross_entropy_rows(theirs, targets, -100, needs_grad))
        assert (ours.double() - theirs).nan_to_num().abs().max() <= bound


def test_linear_cross_entropy():
    """The op on the kernel: in float32 against the definition in float64, forward and backward."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (13,))
    targets[3] = -100
    assert backend.choose("loss", hidden.device, hidden.dtype, 0) is losses
    loss_sum, count = linear_cross_entropy(hidden, weight, targets)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    assert count == 12
    torch.testing.assert_close(loss_sum.double(), expected)
    for x, y in zip(torch.autograd.grad(loss_sum, (hidden, weight)), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
