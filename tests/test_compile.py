"""Every mixer's backbone compiles whole: no graph break, no recompilation over ten lengths, equal to eager."""

import pytest
import torch

from zoo import config
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers.base import Context
from zoo.registry import mixers


@pytest.mark.parametrize("name", mixers.names())
def test_one_graph_for_ten_lengths(name):
    torch.manual_seed(0)
    backbone = Backbone(config.build(BackboneConfig, {"width": 32, "depth": 1, "heads": 2, "mixer": name}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in range(20, 120, 10):
            results = []
            for run in (compiled, backbone):
                h = torch.arange(tokens * 64).view(2, tokens, 32).sin().requires_grad_()
                y, _ = run(h, Context())
                y.square().sum().backward()
                results.append((y.detach(), h.grad))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def graphs_of(backbone, tokens):
    """Forward and backward of one row, parted as inductor parts them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    seen = []

    def keep(graph, _):
        seen.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    h = torch.ones(1, tokens, backbone.config.width, requires_grad=True)
    torch.compile(backbone, fullgraph=True, backend=backend)(h, Context())[0].sum().backward()
    return seen


def test_rotary_angles_are_computed_once():
    """Whatever the compiler makes of a block, float64 cosines are no part of it."""
    backbone = Backbone(config.build(BackboneConfig, {"width": 32, "depth": 2, "heads": 2, "mixer": "gatedfwa"}))
    forward, backward = ([str(node.target) for node in graph.nodes] for graph in graphs_of(backbone, 20))
    assert sum("zoo.rotary_table" in name for name in forward) == 1
    assert not any("cos" in name or "rotary" in name for name in forward + backward if "zoo.rotary" not in name)
    assert not any("zoo.rotary" in name for name in backward)


def most_held(graph, tokens):
    """The most bytes that stand at once while a graph runs in its order, of tensors that grow with the tokens."""
    sizes, held = {}, []
    for node in graph.nodes:
        value = node.meta.get("val")
        values = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, torch.Tensor)]
        own = [x.untyped_storage() for x in values if tokens in x.shape]
        sizes |= {storage._cdata: storage.nbytes() for storage in own}
        held.append({storage._cdata for storage in own})
    place = {node: i for i, node in enumerate(graph.nodes)}
    last = {}
    for node in graph.nodes:
        for used in (node, *node.all_input_nodes):
            last |= dict.fromkeys(held[place[used]], place[node])
    standing, most = set(), 0
    for i, new in enumerate(held):
        standing |= new
        most = max(most, sum(sizes[storage] for storage in standing))
        standing -= {storage for storage in standing if last[storage] <= i}
    return most


@pytest.mark.parametrize(
    ("mixer", "residual"), [("gatedfwa", "autocast"), ("gatedfwa", "parameters"), ("gatedfwa_nsa", "autocast")]
)
def test_a_checkpointed_layer_costs_its_input(mixer, residual):
    """Each further layer adds its input to what stands at once, forward and backward: the compiler neither keeps more
    of it nor recomputes one layer while it holds another. At 1M tokens that makes 39 GiB or 207."""
    tokens, width, depths = 70, 32, (3, 5)
    shape = {"width": width, "heads": 2, "mixer": mixer, "residual": residual, "checkpoint": True, "mlp_chunk": 16}
    most = []
    for depth in depths:
        backbone = Backbone(config.build(BackboneConfig, {**shape, "depth": depth})).train()
        with torch.autocast("cpu", torch.bfloat16):
            most.append([most_held(graph, tokens) for graph in graphs_of(backbone, tokens)])
    stream = tokens * width * (2 if residual == "autocast" else 4)
    for few, many in zip(*most, strict=True):
        assert many - few == (depths[1] - depths[0]) * stream
