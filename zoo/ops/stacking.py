"""torch.vmap over our operators: S calls on B rows each are one call on S * B rows.

It is how a sweep of S replicas runs as one model (zoo/train/sweeps.py). The gradient needs nothing of its own: autograd
sees the one folded call.
"""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def stack_rows(operator: Any, *, packed: int | None = None) -> None:
    """Give `operator`, whose tensors all have their rows in dim 0, its rule for vmap.

    packed  place of its cu_seqlens argument: packed documents share one row and so cannot be stacked (ValueError)
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if packed is not None and args[packed] is not None:
            raise ValueError(f"{operator._qualname}: packed documents (cu_seqlens) cannot be stacked by vmap")
        folded = tree_map(lambda x, dim: fold(x, dim, info.batch_size), args, in_dims)  # arguments may be lists
        outputs = tree_map(lambda x: x.unflatten(0, (info.batch_size, -1)), operator(*folded))
        return outputs, tree_map(lambda _: 0, outputs)

    operator.register_vmap(rule)


def fold(x: Any, dim: int | None, size: int) -> Any:
    """A tensor with the stack in `dim` (None: the same for all) -> (size * B, …); anything else as it is."""
    return in_front(x, dim, size).flatten(0, 1) if isinstance(x, Tensor) else x


def in_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The stack as dim 0."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
