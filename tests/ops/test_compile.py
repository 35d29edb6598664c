"""torch.compile: one graph, equal to eager, and no recompilation over lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.definition import relative_error
from zoo.ops import add_norm, gated_window_attention, log_decay, ring_attention, swiglu, window_attention

LENGTHS = [17, 40, 33, 64, 100, 128, 129, 5, 77, 81]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(length):
    torch.manual_seed(length)
    shapes = [(2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 4), (2, length, 4)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def every_operator(q, k, v, z, u):
    composed = window_attention(q, k, v, log_decay(z, u), window=8)
    fused = gated_window_attention(q, k, v, z, u, window=8)
    full, lse = window_attention(q, k, v, return_lse=True)
    return (composed * fused).sum() + (full * lse[..., None]).sum()


def test_no_graph_break_no_recompile_over_ten_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(every_operator, fullgraph=True, dynamic=True, backend=counter)
    for length in LENGTHS:
        tensors = inputs(length)
        eager, graph = every_operator(*tensors), compiled(*tensors)
        torch.testing.assert_close(graph, eager)
        torch.testing.assert_close(torch.autograd.grad(graph, tensors), torch.autograd.grad(eager, tensors))
    assert counter.frame_count == 1


def test_lengths_are_generalised_at_the_second_one():
    """Without dynamic=True: one compilation for the first length, one for all others."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(every_operator, fullgraph=True, backend=counter)
    for length in LENGTHS:
        compiled(*inputs(length))
    assert counter.frame_count <= 2


def test_documents_and_starts_compile():
    def run(q, k, v, decay, cu_seqlens, key_start):
        packed = window_attention(q, k, v, decay, window=5, cu_seqlens=cu_seqlens)
        return packed + window_attention(q, k, v, decay, window=5, key_start=key_start)

    q, k, v, decay, _ = (x[:1].detach() for x in inputs(30))
    cu_seqlens = torch.tensor([0, 12, 12, 30], dtype=torch.int32)
    arguments = (q, k, v, -decay.abs(), cu_seqlens, torch.tensor([3], dtype=torch.int32))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


def test_ring_compiles():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    arguments = (q, k, v, -torch.rand(2, 9, 4), torch.tensor([9, 4], dtype=torch.int32))
    compiled = torch.compile(ring_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), ring_attention(*arguments))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_opcheck():
    """Schema, fake implementation and autograd registration agree with what the operators do."""
    cu_seqlens, start = torch.tensor([0, 5, 20], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    q, k, v, z, u = (x[:1].detach().requires_grad_() for x in inputs(20))
    decay = -z.detach().abs().requires_grad_()
    for arguments in [
        (q, k, v, None, z, u, 5, 0.3, None, None, None, None),
        (q, k, v, decay, None, None, None, 0.3, None, start, None, None),
        (q, k, v, decay, None, None, 3, 0.3, cu_seqlens, None, None, None),
        (
            q,
            k,
            v,
            decay,
            None,
            None,
            3,
            0.3,
            None,
            None,
            *torch.tensor([0, 1], dtype=torch.int32).view(2, 1, 1, 1).expand(2, 1, k.shape[2], 1),
        ),
    ]:
        torch.library.opcheck(torch.ops.zoo.window_attention.default, arguments)


@pytest.mark.slow
def test_inductor_equals_eager():
    tensors = inputs(50)
    eager, graph = every_operator(*tensors), torch.compile(every_operator, fullgraph=True)(*tensors)
    torch.testing.assert_close(graph, eager)
    pairs = zip(torch.autograd.grad(graph, tensors), torch.autograd.grad(eager, tensors), strict=True)
    assert max(relative_error(a, e.double()) for a, e in pairs) <= 1e-5


def test_inductor_never_prints_the_operators_arguments(monkeypatch):
    """With all that they were computed from, through sums and norms of one operator: doubled by each layer."""
    from torch._inductor import exc, lowering

    for operator in [name for name in lowering.lowerings if str(name).startswith("zoo.")]:
        monkeypatch.delitem(lowering.lowerings, operator)
    printed = []
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(lambda target, *rest: printed.append(target)))

    def layers(h, branch, weight):
        for _ in range(2):
            h, normed = add_norm(h, branch, weight)
            branch = swiglu(normed.repeat(1, 2))
        return h.square().sum()

    tensors = [torch.randn(shape, requires_grad=True) for shape in ((4, 8), (4, 8), (8,))]
    eager = layers(*tensors)
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(layers, fullgraph=True)(*tensors)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors))
    assert not [target for target in printed if str(target).startswith("zoo.")]
