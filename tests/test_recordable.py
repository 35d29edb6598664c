"""The tests' own finder of steps that cannot be recorded finds them."""

import pytest
import torch

from tests.recordable import Waits


def test_waits_would_be_found():
    mask = torch.ones(3) > 0
    for step in (lambda: torch.ones(2).sum().item(), lambda: torch.tensor([3, 4]), lambda: torch.ones(3)[mask]):
        with pytest.raises(RuntimeError, match="waits for|the host has|depends on a mask"), Waits():
            step()
