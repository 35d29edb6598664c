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
