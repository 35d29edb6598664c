"""What a step must not do if a CUDA graph is to be recorded of it, found on a CPU; and what such tests set up."""

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import config, frozen
from zoo.train.recipe import make_model, make_task


class Waits(TorchDispatchMode):
    """Refuses what a recording refuses: to look at a value, to have a shape depend on one, to bring a number over from
    the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
            raise RuntimeError(f"{func} waits for the device")
        if func is aten.lift_fresh.default:
            raise RuntimeError("a tensor is made of numbers that the host has")
        if func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise RuntimeError("a shape depends on a mask")
        return func(*args, **(kwargs or {}))


def look_at_nothing(monkeypatch):
    """From here on no check looks at values, as on a GPU."""
    for module in list(sys.modules.values()):
        if hasattr(module, "may_look") and module.__name__.partition(".")[0] in ("zoo", "tasks"):
            monkeypatch.setattr(module, "may_look", lambda tensor: False)


def frozen_after_three_batches(made, name, folder):
    """What `made`, the recipe of a tokenizer or codec, trains, saved in `folder` as `frozen.save` writes it: codebooks
    and spreads begin with the first batches."""
    torch.manual_seed(0)
    task = make_task(made)
    model, stream = make_model(made, task), iter(task.stream("train", batch_size=8))
    for _ in range(3):
        model(next(stream))
    node = config.to_dict(model.config)
    folder.mkdir(exist_ok=True)
    frozen.save(frozen.Frozen(model.eval(), name, node, frozen.digest(model), "test"), folder)
    return folder
