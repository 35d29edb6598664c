import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # toytask, here and in the processes that tests start

import toytask
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import recording
from zoo.train import graph


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Registries that hold the toy task and model alone, put back afterwards."""
    monkeypatch.setattr(toytask.FaultyModel, "faults", None)
    monkeypatch.setattr(toytask.FaultyModel, "fired", set())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with toytask.installed():
        yield
    torch.set_num_threads(threads)


class Tape(TorchDispatchMode):
    """A CUDA graph's part on a CPU: the operators that a step calls, kept with their very tensors and numbers, and
    called again by `replay` without any of the step's Python. Looking at a value is an error, as it is there."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the step looks at a value")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                pairs = zip(graph.leaves(out), graph.leaves(again), strict=True)
                for old, new in pairs:
                    if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """Recording on a CPU. The list holds a number for each recording: how often it was replayed."""
    counts = []

    def record(call, stream, **_):
        tape, place = Tape(), len(counts)
        with tape:
            outputs = call()  # this ran, so the first replay is done
        counts.append(0)

        def replay():
            counts[place] += 1
            if counts[place] > 1:
                tape.replay()

        return outputs, replay

    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(recording, "DEVICES", ("cpu",))
    return counts
