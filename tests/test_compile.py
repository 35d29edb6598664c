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


def test_rotary_angles_are_computed_once():
    """Whatever the compiler makes of a block, float64 cosines are no part of it."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    seen = []

    def keep(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backbone = Backbone(config.build(BackboneConfig, {"width": 32, "depth": 2, "heads": 2, "mixer": "gatedfwa"}))
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    h = torch.ones(2, 20, 32, requires_grad=True)
    torch.compile(backbone, fullgraph=True, backend=backend)(h, Context())[0].sum().backward()
    forward, backward = seen
    assert sum("zoo.rotary_table" in name for name in forward) == 1
    assert not any("cos" in name or "rotary" in name for name in forward + backward if "zoo.rotary" not in name)
    assert not any("zoo.rotary" in name for name in backward)
