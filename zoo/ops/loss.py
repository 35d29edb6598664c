"""Linear layer and cross-entropy in one: the loss and both gradients without the (N, V) logits ever standing whole.

The gradient of the loss in the logits is softmax - onehot, known as soon as a chunk's logits are; so the forward pass
goes through the tokens in chunks and leaves the gradients of hidden and weight behind for the backward pass to scale
(as in Liger, arXiv 2410.10989). Three products a chunk, none of them computed twice; between the first and the other
two a back end turns logits into their gradients in place (`cross_entropy_rows` of backend op family "loss").
"""

import torch
from torch import Tensor

from zoo.ops import backend, linear
from zoo.ops.stacking import in_front

CHUNK_ELEMENTS = 1 << 24  # logits held at once on a CPU: 64 MiB in float32
# On a GPU: 512 MiB in bfloat16. Rows of a chunk are a multiple of ROWS, so that the products have whole tiles; and a
# large chunk, because grad_weight (V, C) is read and written once for each
CHUNK_ELEMENTS_GPU, ROWS = 1 << 28, 256


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(hidden @ weight.T) in nats.

    hidden   (..., C) floating
    weight   (V, C)
    targets  (...) int64 in [0, V), or `ignore_index` for an element that is not scored
    Returns (loss_sum () float32 (float64 for float64 input), count () int64). Differentiable in hidden and weight.
    Under autocast hidden and weight enter in the autocast dtype; sums stay float32.
    Raises ValueError for shapes that do not belong together, and for a target outside [0, V) (looked at on the CPU, or
    under ZOO_DEBUG=1).
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not "
            "belong together; they take (..., C), (V, C) and (...)"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}; one dtype is accepted")
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    loss_sum, _, _ = _linear_cross_entropy(hidden, weight, targets, ignore_index, needs_grad)
    return loss_sum, (targets != ignore_index).sum()


@torch.library.custom_op("zoo::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, d loss_sum / d hidden, d loss_sum / d weight); the gradients are empty unless asked for.

    hidden (N, C), weight (V, C), targets (N,); or all of them with a stack of S in front, and loss_sum (S,).
    """
    _check_targets(targets, weight.shape[-2], ignore_index)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss_sum = torch.zeros(hidden.shape[:-2], dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else weight.new_empty(0, dtype=wide)
    module = backend.choose("loss", hidden.device, hidden.dtype, backend.NO_HEADS)
    rows = chunk_rows(hidden, weight.numel() // weight.shape[-1])
    for begin in range(0, hidden.shape[-2], rows):
        part, target = hidden[..., begin : begin + rows, :], targets[..., begin : begin + rows]
        logits = part @ weight.mT  # becomes its own gradient
        losses = module.cross_entropy_rows(logits.flatten(0, -2), target.flatten(), ignore_index, needs_grad)
        loss_sum += losses.view(target.shape).sum(dim=-1, dtype=wide)
        if needs_grad:
            grad_hidden[..., begin : begin + rows, :] = logits @ weight
            linear.add_product(grad_weight, logits.mT, part)
    return loss_sum, grad_hidden, grad_weight


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if not backend.may_look(targets):
        return
    wrong = targets[((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"target {int(wrong[0])} is none of the {vocabulary} classes, 0 to {vocabulary - 1}; "
            f"{ignore_index} marks what is not scored"
        )


def chunk_rows(hidden: Tensor, vocabulary: int) -> int:
    """Tokens whose logits stand at once; `vocabulary` counts those of a whole stack together."""
    if hidden.device.type == "cpu":
        return max(1, CHUNK_ELEMENTS // vocabulary)
    return max(1, CHUNK_ELEMENTS_GPU // vocabulary // ROWS) * ROWS


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, ignore_index, needs_grad):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        torch.empty(hidden.shape[:-2], dtype=wide, device=hidden.device),
        torch.empty_like(hidden) if needs_grad else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if needs_grad else weight.new_empty(0, dtype=wide),
    )


def _keep_gradients(ctx, inputs, output):
    _, weight, _, _, _ = inputs
    _, grad_hidden, grad_weight = output
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.weight_dtype = weight.dtype
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad_loss, _grad_hidden, _grad_weight):
    grad_hidden, grad_weight = ctx.saved_tensors
    grad_loss = grad_loss[..., None, None]
    return (
        grad_hidden * grad_loss.to(grad_hidden.dtype),
        (grad_weight * grad_loss).to(ctx.weight_dtype),
        None,
        None,
        None,
    )


torch.library.register_autograd("zoo::linear_cross_entropy", _scale_gradients, setup_context=_keep_gradients)


@_linear_cross_entropy.register_vmap
def _(info, in_dims, hidden, weight, targets, ignore_index, needs_grad):
    tensors = [in_front(x, dim, info.batch_size) for x, dim in zip((hidden, weight, targets), in_dims[:3], strict=True)]
    # A tensor seen from inside vmap does not say that it requires a gradient; these do
    needs_grad = needs_grad or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:2]))
    return _linear_cross_entropy(*tensors, ignore_index, needs_grad), (0, 0, 0)
