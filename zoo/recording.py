"""Calls recorded as CUDA graphs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

A graph is launched at once, where Python takes its time for each kernel. Training records its steps
(zoo/train/graph.py), decoding its own (zoo/generation.py), benches what they time.
"""

from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("cuda",)  # types of device that record graphs


def on_stream(call: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
    """What `call` gives, run on `stream` in order with what the current one does before and after: the first calls of
    what will be recorded, which compile, choose tiles and let libraries keep what they keep for a stream."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        outputs = call()
    here.wait_stream(stream)
    return outputs


def record(
    call: Callable[[], Any], stream: torch.cuda.Stream, *, pool: Any = None, generator: torch.Generator | None = None
) -> tuple[Any, Callable[[], None]]:
    """(outputs, replay): nothing runs until `replay` is called, which writes `outputs` anew each time.

    stream     that records; `call` has run there before (`on_stream`)
    pool       of torch.cuda.graph_pool_handle, which graphs that are never replayed at once may share
    generator  that `call` draws from, beside the device's own: each replay takes its offset, and moves it on
    Raises RuntimeError where `call` waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # thread_local: the thread that reads batches ahead may pin memory meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        outputs = call()
    # On its stream torch has just set the graph's random offset to 0; a replay sets its own, on this one
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    return outputs, graph.replay
