"""A state is a tree of tensors, batch first."""

import pytest
import torch

from zoo import state


def tree():
    return {"a": torch.arange(6).reshape(3, 2), "blocks": [{"b": torch.zeros(3, 4, dtype=torch.bfloat16)}, {}]}


def test_bytes_and_leaves():
    assert state.state_bytes(tree()) == 6 * 8 + 12 * 2
    assert [leaf.shape for leaf in state.leaves(tree())] == [(3, 2), (3, 4)]


def test_index_repeat_clone():
    picked = state.index(tree(), torch.tensor([2, 0]))
    assert picked["a"].tolist() == [[4, 5], [0, 1]]
    assert state.repeat(tree(), 2)["a"][:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    old = tree()
    new = state.clone(old)
    new["a"].zero_()
    assert old["a"].sum() == 15


def test_only_trees_of_tensors():
    with pytest.raises(TypeError, match="str"):
        state.leaves({"a": "text"})
