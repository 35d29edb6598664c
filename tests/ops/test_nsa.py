"""Native Sparse Attention on the reference back end: against scalar loops, and properties of its own."""

import pytest
import torch

from tests.ops.definition import relative_error
from tests.ops.definition_nsa import CASES, NSACase, nsa_loops
from tests.ops.run_nsa import run
from zoo import ops
from zoo.ops import nsa, nsa_blocks, reference_nsa


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of queries even with few tokens."""
    monkeypatch.setattr(reference_nsa, "CHUNK_ELEMENTS", 1 << 11)


@pytest.mark.parametrize("short", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_loops(case, short, monkeypatch):
    """The chosen keys gathered, and all keys under a mask."""
    monkeypatch.setattr(reference_nsa, "SHORT", short)
    tensors = case.tensors(torch.float32)
    expected = case.expected(tensors)
    found = {name: relative_error(x, expected[name]) for name, x in run(case, tensors).items()}
    print(found)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_float64_is_exact(case):
    tensors = case.tensors()
    expected = case.expected(tensors)
    found = {name: relative_error(x, expected[name]) for name, x in run(case, tensors).items()}
    assert max(found.values()) <= 1e-12, found


def as_sets(block_index: torch.Tensor) -> dict:
    batch, length, kv_heads, _ = block_index.shape
    return {
        (b, t, g): set(block_index[b, t, g].tolist()) - {-1}
        for b in range(batch) for t in range(length) for g in range(kv_heads)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("block", "stride", "select"), [(4, 4, 4), (4, 2, 4), (4, 2, 8), (4, 1, 4), (2, 1, 4), (4, 4, 8)]
)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 3, 3, 40, 66)])
@pytest.mark.parametrize("importance", ["spatial", "printed"])
def test_choice_and_overlapping_blocks_equal_the_loops(block, stride, select, cu_seqlens, importance):
    case = NSACase("choice", 66, group=2, kv_heads=2, cu_seqlens=cu_seqlens)
    x = case.tensors()
    x["branch_gates"] = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand_as(x["branch_gates"])
    out, choice = nsa_loops(
        x["q"], x["k"], x["v"], x["branch_gates"], block=block, stride=stride, select=select, top=5, window=1,
        cu_seqlens=cu_seqlens, importance=importance,
    )  # fmt: skip
    index = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    k, v = (ops.gather_blocks(y, block, stride, select=select, cu_seqlens=index).mean(2) for y in (x["k"], x["v"]))
    found, _, block_index = ops.compressed_attention(
        x["q"], k, v, block=block, stride=stride, select=select, top=5, importance=importance, cu_seqlens=index
    )
    assert relative_error(found, out) <= 1e-12
    assert as_sets(block_index) == choice


def test_paper_weights():
    assert reference_nsa.Geometry(32, 16, 64, 16).weights() == {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}
    assert reference_nsa.Geometry(64, 64, 64, 16).weights() == {0: 1}
    assert reference_nsa.Geometry(32, 16, 64, 16, printed=True).weights() == {-4: 1, -3: 2, -2: 2, -1: 2, 0: 1}
    assert reference_nsa.Geometry(64, 64, 64, 16, printed=True).weights() == {0: 1}


def test_the_printed_importance_is_another():
    """SPEC.md 5.1: the two forms look at different tokens; which one is taken can be seen."""
    x = NSACase("printed", 66, group=2).tensors()
    k, v = (ops.gather_blocks(x[name], 2, 1, select=4).mean(2) for name in "kv")
    spatial, printed = (
        ops.compressed_attention(x["q"], k, v, block=2, stride=1, select=4, top=5, importance=form)
        for form in ("spatial", "printed")
    )
    assert torch.equal(spatial[0], printed[0])
    assert not torch.equal(spatial[2], printed[2])
    with pytest.raises(ValueError, match="importance"):
        ops.compressed_attention(x["q"], k, v, block=2, stride=1, select=4, importance="literal")


@pytest.mark.parametrize("cu_seqlens", [None, (0, 5, 5, 31, 50)])
@pytest.mark.parametrize("short", [0, 3])
def test_every_block_selected_is_full_attention(cu_seqlens, short, monkeypatch):
    monkeypatch.setattr(reference_nsa, "SHORT", short)
    x = NSACase("all", 50, group=2, kv_heads=2).tensors()
    q, k, v = (x[name].requires_grad_() for name in ("q", "k", "v"))
    index = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    every = torch.arange(13, dtype=torch.int32).flip(0).expand(1, 50, 2, 13).contiguous()
    out, lse = ops.selected_attention(q, k, v, every, block=4, cu_seqlens=index, return_lse=True)
    full, full_lse = ops.window_attention(q, k, v, cu_seqlens=index, return_lse=True)
    torch.testing.assert_close(out, full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, full_lse, rtol=1e-12, atol=1e-12)
    loss = (out * x["dout"]).sum() + lse.sin().sum()
    full_loss = (full * x["dout"]).sum() + full_lse.sin().sum()
    for grad, expected in zip(
        torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(full_loss, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


def test_the_dense_path_stays_where_it_is_equal(monkeypatch):
    assert ops.runs_dense(1024, 64, 16)
    assert not ops.runs_dense(1025, 64, 16)
    x = NSACase("edge", 16, group=2).tensors()
    dense = run(NSACase("edge", 16, group=2), x)
    monkeypatch.setattr(nsa, "runs_dense", lambda *sizes: False)
    for name, found in run(NSACase("edge", 16, group=2), x).items():
        torch.testing.assert_close(found, dense[name])


def test_equal_scores_choose_the_earlier_block():
    q, k = torch.ones(1, 40, 2, 4), torch.ones(1, 10, 1, 4)
    index = ops.compressed_attention(q, k, k, block=4, top=6)[2]
    assert index[0, 39, 0].tolist() == [0, 1, 2, 3, 8, 9]
    assert index[0, 7, 0].tolist() == [0, 1, -1, -1, -1, -1]
    assert index[0, 2, 0].tolist() == [0, -1, -1, -1, -1, -1]


def test_early_tokens_get_zero_from_the_compressed_branch():
    x = NSACase("early", 10).tensors()
    k, v = (ops.pool_blocks(x[name], 4) for name in "kv")
    out, lse, _ = ops.compressed_attention(x["q"], k, v, block=4)
    assert (out[:, :3] == 0).all()
    assert (lse[:, :3] == -torch.inf).all()
    assert lse[:, 3:].isfinite().all()


@pytest.mark.parametrize("queries", [1, 7, 23])
def test_later_queries_equal_the_whole(queries):
    """k and v longer than q, and the same through query_start with room beyond the last key."""
    case = NSACase("later", 50, group=2, kv_heads=2, batch=2)
    x = case.tensors()
    whole = ops.nsa_attention(x["q"], x["k"], x["v"], x["branch_gates"], x["log_decay"], **case.options)
    last = slice(50 - queries, 50)
    part = ops.nsa_attention(
        x["q"][:, last], x["k"], x["v"], x["branch_gates"][:, last], x["log_decay"], **case.options
    )
    torch.testing.assert_close(part, whole[:, last], rtol=1e-12, atol=1e-12)


def test_rows_start_where_they_say_and_padding_is_harmless():
    x = NSACase("ragged", 40, group=2, batch=2).tensors()
    k, v = (ops.pool_blocks(x[name], 4) for name in "kv")
    start = torch.tensor([9, 33], dtype=torch.int32)
    q = torch.stack((x["q"][0, 9:21], x["q"][1, 28:40].roll(-5, 0)))  # row 1 has 7 valid queries, then padding
    whole, _, whole_index = ops.compressed_attention(x["q"], k, v, block=4, top=4)
    out, _, index = ops.compressed_attention(q, k, v, block=4, top=4, query_start=start)
    torch.testing.assert_close(out[0], whole[0, 9:21])
    torch.testing.assert_close(out[1, :7], whole[1, 33:])
    assert torch.equal(index[0], whole_index[0, 9:21])
    assert torch.equal(index[1, :7], whole_index[1, 33:])
    detail = ops.selected_attention(q, x["k"], x["v"], index, block=4, query_start=start)
    expected = ops.selected_attention(x["q"], x["k"], x["v"], whole_index, block=4)
    torch.testing.assert_close(detail[1, :7], expected[1, 33:])
    assert detail.isfinite().all()


def test_nothing_flows_between_documents():
    case = NSACase("leak", 60, group=2)
    x = {name: y.requires_grad_() for name, y in case.tensors().items() if name != "dout"}
    out = ops.nsa_attention(**x, **case.options, cu_seqlens=torch.tensor([0, 22, 60], dtype=torch.int32))
    grads = torch.autograd.grad(out[:, 22:].sum(), list(x.values()))
    assert all((grad[:, :22] == 0).all() for grad in grads)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top": 2}, "top"),
        ({"block": 0}, "block"),
        ({"window": 0}, "window"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens"),
        ({"branch_gates": torch.zeros(1, 8, 2, 2)}, "branch_gates"),
        ({"k": torch.zeros(1, 7, 1, 4), "v": torch.zeros(1, 7, 1, 4)}, "keys"),
        ({"k": torch.zeros(1, 8, 3, 4), "v": torch.zeros(1, 8, 3, 4)}, "multiple"),
    ],
)
def test_errors_name_the_argument(fields, named):
    arguments = {
        "q": torch.zeros(1, 8, 2, 4), "k": torch.zeros(1, 8, 1, 4), "v": torch.zeros(1, 8, 1, 4),
        "branch_gates": torch.zeros(1, 8, 2, 3), "block": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=named):
        ops.nsa_attention(**arguments | fields)


def compressed(**fields):
    q, k = torch.zeros(1, 8, 2, 4), torch.zeros(1, 3, 1, 4)
    return ops.compressed_attention(**{"q": q, "k": k, "v": k, "block": 4, "top": 3} | fields)


def selected(**fields):
    q, k = torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 1, 4)
    index = torch.zeros(1, 8, 1, 3, dtype=torch.int32)
    return ops.selected_attention(**{"q": q, "k": k, "v": k, "block_index": index, "block": 4} | fields)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "fields", "message"),
    [
        (compressed, {"query_start": ints(-1)}, r"query_start must lie between 0 and 15, got \[-1\]"),
        (compressed, {"query_start": ints(16)}, r"query_start must lie between 0 and 15, got \[16\]"),
        (selected, {"query_start": ints(-1)}, r"query_start must lie between 0 and 8, got \[-1\]"),
        (selected, {"query_start": ints(9)}, r"query_start must lie between 0 and 8, got \[9\]"),
        (compressed, {"query_start": ints(0, 1)}, r"query_start has shape \(2,\), it must be \(B,\) = \(1,\)"),
        (selected, {"query_start": torch.zeros(1)}, r"query_start must be a non-empty int32 vector"),
        (selected, {"query_start": ints(0), "cu_seqlens": ints(0, 8)}, r"can't be given together"),
        *(
            (call, {"cu_seqlens": ints(*bounds)}, r"cu_seqlens must go from 0 to T = 8 and never fall")
            for call in (compressed, selected)
            for bounds in ((1, 8), (0, 7), (0, 9), (0, 5, 4, 8))
        ),
        *((call, {"cu_seqlens": ints()}, r"cu_seqlens must be a non-empty int32") for call in (compressed, selected)),
        (selected, {"cu_seqlens": ints(0, 8), "k": torch.zeros(1, 9, 1, 4), "v": torch.zeros(1, 9, 1, 4)}, r"as many"),
        (selected, {"block_index": ints(0)}, r"block_index must be int32 \(B, T, G, top\)"),
        (compressed, {"stride": 3}, r"stride must divide both"),
    ],
)
def test_the_branches_refuse_what_they_cannot_place(call, fields, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**fields)


def test_values_off_the_cpu_are_looked_at_under_debug_only(monkeypatch):
    """Another device stands behind the same question (zoo/ops/backend.py)."""
    monkeypatch.setattr(nsa.backend, "may_look", lambda tensor: False)
    assert selected(query_start=ints(9)).shape == compressed(query_start=ints(16))[0].shape


def test_a_ragged_row_may_end_with_its_keys():
    """Its start is then the first place after them, and what it asks for is padding."""
    assert selected(query_start=ints(8)).isfinite().all()
    assert compressed(query_start=ints(15))[0].isfinite().all()


@pytest.mark.parametrize("there", [(0, 1, 2), (0, 1), (2,), (1, 2)])
def test_the_sum_of_branches_and_its_gradients(there):
    torch.manual_seed(0)
    gates = torch.rand(2, 5, 3, 3, dtype=torch.float64).requires_grad_()
    branches = [torch.randn(2, 5, 3, 4, dtype=torch.float64).requires_grad_() if i in there else None for i in range(3)]
    out = ops.mix_branches(gates, *branches)
    expected = sum(x * gates[..., i : i + 1] for i, x in enumerate(branches) if x is not None)
    leaves = [gates, *(x for x in branches if x is not None)]
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(a, b)


def test_branches_that_do_not_fit_are_named():
    gates, x = torch.rand(1, 5, 2, 3), torch.rand(1, 5, 2, 4)
    with pytest.raises(ValueError, match="no branch"):
        ops.mix_branches(gates, None, None, None)
    with pytest.raises(ValueError, match="alike"):
        ops.mix_branches(gates, x, x[:, :4], None)
    with pytest.raises(ValueError, match="branch_gates"):
        ops.mix_branches(gates[..., :2], x, x, x)


def test_operators_pass_torchs_own_checks():
    x = NSACase("opcheck", 20, group=2).tensors(torch.float32)
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    means = [ops.pool_blocks(y, 4).detach().requires_grad_() for y in (k, v)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(nsa._compressed_attention, (q, *means, 4, 4, 4, 4, False, 0.3, None, None), test_utils=tests)
    torch.library.opcheck(nsa_blocks._pool, ([k, v], 4), test_utils=tests)
    index = torch.zeros(1, 20, 1, 4, dtype=torch.int32) - 1
    index[..., 0] = 0
    torch.library.opcheck(nsa._selected_attention, (q, k, v, index, 4, 0.3, None, None), test_utils=tests)
    gates = x["branch_gates"].requires_grad_()
    torch.library.opcheck(nsa._mix_branches, (gates, q, None, q.detach() * 2), test_utils=tests)
    branches = (gates, q.detach() * 2, (q.detach() * 3).requires_grad_())
    torch.library.opcheck(nsa._selected_mix, (q, k, v, index, *branches, 4, 0.3, None, None, True), test_utils=tests)
    constants = [y.detach() for y in (q, k, v, index, *branches)]
    torch.library.opcheck(nsa._selected_mix, (*constants, 4, 0.3, None, None, False), test_utils=tests)


def test_the_whole_is_the_sum_of_its_branches_with_or_without_gradients():
    case = NSACase("composed", 40, group=2, kv_heads=2)
    x = case.tensors()
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "branch_gates", "log_decay")]
    q, k, v, gates, log_decay = leaves
    out = ops.nsa_attention(*leaves, **case.options)
    block, top, window = (case.options[name] for name in ("block", "top", "window"))
    assert not ops.runs_dense(40, block, top)
    gist, _, index = ops.compressed_attention(q, *(ops.pool_blocks(y, block) for y in (k, v)), block=block, top=top)
    detail = ops.selected_attention(q, k, v, index, block=block)
    expected = ops.mix_branches(gates, gist, detail, ops.window_attention(q, k, v, log_decay, window=window))
    torch.testing.assert_close(out, expected)
    grads, truth = (torch.autograd.grad((y * x["dout"]).sum(), leaves) for y in (out, expected))
    torch.testing.assert_close(grads, truth)
    with torch.no_grad():
        assert torch.equal(ops.nsa_attention(*leaves, **case.options), out)


def test_compiles_without_a_break_and_for_other_lengths():
    case = NSACase("compile", 40, group=2)
    compiled = torch.compile(ops.nsa_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 44, 51):
        x = NSACase("compile", tokens, group=2).tensors(torch.float32)
        inputs = {name: y.requires_grad_() for name, y in x.items() if name != "dout"}
        torch.testing.assert_close(compiled(**inputs, **case.options), ops.nsa_attention(**inputs, **case.options))
