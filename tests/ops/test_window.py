"""window_attention and gated_window_attention on the CPU: against scalar loops, and the identities they must obey."""

import math

import pytest
import torch

from tests.ops.cases import CASES, poison_new_tensors
from tests.ops.definition import relative_error
from tests.ops.run_case import run
from zoo.ops import gated_window_attention, log_decay, reference, window_attention


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries, so that short sequences cross many of them."""
    monkeypatch.setattr(reference, "BLOCK", 16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_loops(case, small_blocks):
    tensors = case.tensors(torch.float32)
    actual, expected = run(case, tensors), case.expected(tensors)
    errors = {name: relative_error(x, expected[name]) for name, x in actual.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case", CASES[4::7], ids=lambda case: case.name)
def test_float64_equals_the_loops(case, small_blocks):
    tensors = case.tensors(torch.float64)
    actual, expected = run(case, tensors), case.expected(tensors)
    errors = {name: relative_error(x, expected[name]) for name, x in actual.items()}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition_equals_blocked(case, block, monkeypatch):
    """The oracle of later tests is itself right."""
    monkeypatch.setattr(reference, "BLOCK", block)
    tensors = case.tensors()
    decay = log_decay(tensors["z"], tensors["u"]) if case.gate == "fused" else tensors.get("log_decay")
    spans = None
    if case.cu_seqlens is not None:
        spans = reference.document_spans(torch.tensor(case.cu_seqlens, dtype=torch.int32), case.queries)
    if case.key_start is not None:
        keys = tensors["k"].shape[1]
        spans = reference.key_start_spans(torch.tensor(case.key_start, dtype=torch.int32), keys)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    out, lse = reference.definition(q, k, v, decay, window=case.window, spans=spans)
    gate = () if decay is None else (decay,)
    blocked = reference.window_forward(q, k, v, gate, window=case.window, scale=case.dim**-0.5, spans=spans)
    torch.testing.assert_close(blocked, (out, lse), rtol=1e-10, atol=1e-12)


def inputs(length, heads=2, kv_heads=1, dim=5, batch=2, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, length, heads, dim, dtype=dtype)
    k, v = torch.randn(2, batch, length, kv_heads, dim, dtype=dtype)
    return q, k, v, -torch.rand(batch, length, heads, dtype=dtype)


@pytest.mark.parametrize("window", [1, 3, None])
def test_gradcheck(window, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 4)
    q, k, v, decay = (x.requires_grad_() for x in inputs(9, heads=2, dim=2, batch=1))
    z, u = torch.randn(2, *decay.shape, dtype=torch.float64)
    z, u = z.requires_grad_(), u.requires_grad_()

    def with_lse(*args):
        return window_attention(*args, window=window, return_lse=True)

    assert torch.autograd.gradcheck(with_lse, (q, k, v, decay))
    assert torch.autograd.gradcheck(with_lse, (q, k, v))
    assert torch.autograd.gradcheck(lambda *args: gated_window_attention(*args, window=window), (q, k, v, z, u))


def test_a_zero_gate_is_sliding_window_attention():
    q, k, v, decay = inputs(50, dtype=torch.float32)
    plain = window_attention(q, k, v, window=9)
    assert relative_error(window_attention(q, k, v, torch.zeros_like(decay), window=9), plain.double()) < 1e-6


def test_a_constant_gate_is_windowed_alibi():
    q, k, v, decay = inputs(60)
    slope = torch.tensor([0.5, 0.0625], dtype=torch.float64)
    distance = torch.arange(60)[:, None] - torch.arange(60)[None, :]
    logits = torch.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / math.sqrt(5) - slope[:, None, None] * distance
    p = logits.masked_fill((distance < 0) | (distance >= 17), -math.inf).softmax(-1)
    alibi = torch.einsum("bhts,bsd->bthd", p, v[:, :, 0])
    torch.testing.assert_close(window_attention(q, k, v, -slope.expand(decay.shape), window=17), alibi)


def test_no_window_with_a_gate_is_the_forgetting_transformer():
    """beta = 1: f = sigmoid(z) to the power 1/1.001, bias = cumsum difference (Forgetting Transformer, eq. 5)."""
    q, k, v, decay = inputs(40)
    z = torch.randn_like(decay)
    prefix = (torch.log(torch.sigmoid(z)) / 1.001).cumsum(1).transpose(1, 2)
    logits = torch.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / math.sqrt(5)
    logits = logits + prefix[..., :, None] - prefix[..., None, :]
    p = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bsd->bthd", p, v[:, :, 0])
    torch.testing.assert_close(gated_window_attention(q, k, v, z, torch.zeros_like(z)), expected)


def test_window_1_returns_the_values():
    q, k, v, decay = inputs(33, kv_heads=2)
    torch.testing.assert_close(window_attention(q, k, v, decay, window=1), v)


def test_fused_equals_composed():
    q, k, v, decay = inputs(70)
    z, u = torch.randn(2, *decay.shape, dtype=torch.float64)
    composed = window_attention(q, k, v, log_decay(z, u), window=11)
    torch.testing.assert_close(gated_window_attention(q, k, v, z, u, window=11), composed)


def test_packed_documents_equal_separate_ones():
    q, k, v, decay = inputs(80, batch=1)
    ends = [0, 13, 13, 14, 60, 80]
    packed = window_attention(q, k, v, decay, window=10, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    parts = [
        window_attention(*(x[:, a:b] for x in (q, k, v, decay)), window=10)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    torch.testing.assert_close(packed, torch.cat(parts, 1))


def test_chunks_equal_the_whole():
    """Keys may outnumber queries: any split of the queries gives the rows of the full call."""
    q, k, v, decay = inputs(64)
    whole = window_attention(q, k, v, decay, window=20)
    for first, last in [(0, 1), (1, 20), (20, 63), (63, 64)]:
        lowest = max(0, first - 19)
        chunk = window_attention(q[:, first:last], *(x[:, lowest:last] for x in (k, v, decay)), window=20)
        torch.testing.assert_close(chunk, whole[:, first:last])


def test_no_tokens():
    q, k, v, decay = inputs(0)
    out, lse = window_attention(q.requires_grad_(), k, v, decay, window=4, return_lse=True)
    assert out.shape == (2, 0, 2, 5)
    assert lse.shape == (2, 0, 2)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    """Computed in float32, rounded once."""
    q, k, v, decay = (x.to(dtype) for x in inputs(60))
    decay = decay.float()
    out, lse = window_attention(q, k, v, decay, window=12, return_lse=True)
    exact = window_attention(*(x.double() for x in (q, k, v, decay)), window=12)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert relative_error(out, exact) <= torch.finfo(dtype).eps


def test_nothing_uninitialised_is_returned(monkeypatch, small_blocks):
    """Every buffer starts as NaN."""
    poison_new_tensors(monkeypatch)
    for case in CASES:
        for name, x in run(case, case.tensors(torch.float32)).items():
            assert not x.isnan().any(), (case.name, name)
