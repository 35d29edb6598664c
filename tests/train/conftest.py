import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # toytask, here and in the processes that tests start

import toytask

from zoo import registry


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Registries that hold the toy task and model alone, put back afterwards."""
    for table in (registry.tasks, registry.models):
        monkeypatch.setattr(table, "_entries", table._entries)
        monkeypatch.setattr(table, "_load", table._load)
    monkeypatch.setattr(toytask.FaultyModel, "faults", None)
    monkeypatch.setattr(toytask.FaultyModel, "fired", set())
    toytask.install()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
