"""Any number of processes ("ranks") as one: who they are, what they agree on, how a model is spread over them.

    ddp      every rank holds the whole model and sees its own examples; gradients are summed while they arise
    fsdp     every rank holds a slice (of dim 0) of each parameter and of its optimizer state, and gathers a block's
             parameters when it needs them (FSDP2, torch.distributed.fsdp.fully_shard)
    context  with either: `context` neighbouring ranks split each row of T tokens into T / context tokens each

Gradients are summed, never averaged: a loss is a sum and a count, and the step divides by the count of all ranks. So
any number of ranks gives the gradients of one process, up to rounding.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo import weights
from zoo.backbone import Block
from zoo.model import Batch, Model
from zoo.train.watchdog import Watchdog

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
LOST = re.compile(r"by peer|[Cc]onnection|gloo/|NCCL")  # errors of a rank whose partner is gone


@dataclass
class ParallelConfig:
    """name     what to do with more than one process; none: refuse to run. One process needs and does nothing
    context  ranks that share each row of tokens; it divides the number of ranks, and T
    reshard  fsdp: free a block's gathered parameters after its forward pass, and gather them again for the backward
    dead     seconds without a heartbeat after which a rank is taken for dead, and the job ends
    stall    seconds without progress after which the job ends; longer than the longest evaluation or save
    """

    name: Literal["ddp", "fsdp", "none"] = "ddp"
    context: int = 1
    reshard: bool = True
    dead: float = 20.0
    stall: float = 1800.0

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"parallel.context = {self.context}; it takes 1 (rows stay whole) or more ranks a row")
        if self.dead <= 0 or self.stall <= 0:
            raise ValueError("parallel.dead and parallel.stall take seconds, more than 0")


# ---------------------------------------------------------------------------------------------------------------------
# The ranks


class Ranks:
    """All processes of a job, as one of them sees it. `Ranks()` is a single process: nothing is exchanged.

    rank, world             of all; a context group is `context` neighbours
    data_rank, data_world   of the ranks that read different examples
    """

    def __init__(self, config: ParallelConfig | None = None, *, rank: int = 0, world: int = 1, device: Any = "cpu"):
        self.config = config or ParallelConfig()
        self.rank, self.world, self.device = rank, world, torch.device(device)
        context = self.config.context
        if world > 1 and self.config.name == "none":
            raise ValueError(f"{world} processes were started, but parallel.name = none; it takes ddp or fsdp")
        if world % context:
            raise ValueError(f"parallel.context = {context} does not divide the {world} processes of this job")
        self.data_rank, self.context_rank = divmod(rank, context)
        self.data_world = world // context
        self.sharded = world > 1 and self.config.name == "fsdp"
        self.compiled = False  # block by block
        self.settings = contextlib.ExitStack()  # of the whole process: put back by `close`
        self.watchdog: Watchdog | None = None
        self.halo: Halo | None = None
        if world > 1:
            self.mesh = dist.init_device_mesh(self.device.type, (world,))
        if context > 1:
            names = ("data", "context")
            grid = dist.init_device_mesh(self.device.type, (self.data_world, context), mesh_dim_names=names)
            self.halo = Halo(self.context_rank, context, rank, grid.get_group("context"))

    # -- numbers -------------------------------------------------------------------------------------------------------

    def gather(self, tensor: Tensor) -> Tensor:
        """(…) on each rank -> (world, …) on all, in the order of the ranks. Does not wait for the device."""
        if self.world == 1:
            return tensor.unsqueeze(0)
        parts = tensor.new_empty(self.world, *tensor.shape)
        dist.all_gather_into_tensor(parts.view(-1), tensor.detach().contiguous().view(-1))
        return parts

    def sum(self, tensor: Tensor) -> Tensor:
        """In the order of the ranks, so that all have the same last digit."""
        return tensor if self.world == 1 else self.gather(tensor).sum(dim=0, dtype=tensor.dtype)

    def min(self, tensor: Tensor) -> Tensor:
        return tensor if self.world == 1 else self.gather(tensor).amin(dim=0)

    # -- agreement -----------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        self.each(lambda: None)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on all; what it raises there, all raise."""
        if self.world == 1:
            return work()
        result: list[Any] = [None, None]
        if self.rank == 0:
            try:
                result[0] = work()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank, on all; if it raises on one, all raise."""
        if self.world == 1:
            return [work()]
        mine: tuple[Any, Exception | None]
        try:
            mine = (work(), None)
        except Exception as error:
            mine = (None, error)
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine)
        if mine[1] is not None:
            raise mine[1]
        for _, fault in everyone:
            if fault is not None:
                raise fault
        return [result for result, _ in everyone]

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` on the first rank of each machine, then on its others: what one downloads the others find."""
        if self.world == 1:
            return work()
        made: list[T] = []
        ahead = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        self.each(lambda: made.append(work()) if ahead else None)
        return made[0] if made else work()

    def mark(self, doing: str) -> None:
        """What this rank is about to do, for the watchdog's message."""
        if self.watchdog is not None:
            self.watchdog.mark(doing)

    # -- the model -----------------------------------------------------------------------------------------------------

    def shard(self, model: nn.Module) -> "Skeleton | None":
        """fsdp: leave this rank its slices of the parameters, in place; returns what rebuilds the whole. Blocks are
        gathered one by one, the rest of the model together."""
        if not self.sharded:
            return None
        from torch.distributed.fsdp import FSDPModule, fully_shard  # half a second, for those who shard alone

        skeleton = Skeleton(model, self.device)
        blocks = blocks_of(model)
        # What the backward pass needs first stays gathered: the last block, and what surrounds the blocks
        keep = [model, *blocks[-1:]]
        for part in [*blocks, model]:
            again = self.config.reshard and not any(part is one for one in keep)
            fully_shard(part, mesh=self.mesh, reshard_after_forward=again)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)
        return skeleton

    def trainer_of(self, model: nn.Module, compiled: bool) -> Any:
        """The callable that a training step calls instead of the model.

        Several ranks compile each block by itself: the gradients of a model that is one graph would all arrive at its
        end, and could cross between ranks only then; so they cross while the blocks before are still at work."""
        if self.halo is not None:
            if not isinstance(model, Model):
                raise ValueError(f"parallel.context splits rows for zoo's Model; {type(model).__name__} is none")
            for block in blocks_of(model):
                block.check_split_rows()
        if self.world == 1:
            return torch.compile(model) if compiled else model
        self.compiled = compiled
        blocks = blocks_of(model) if compiled else []
        for block in blocks:
            block.compile()
        if self.sharded:
            return model
        if blocks:
            from torch._dynamo import config as dynamo

            # It would cut a block where a bucket of gradients is full; what is compiled whole is better cut there
            self.settings.enter_context(dynamo.patch(optimize_ddp=False))
        forward = torch.compile(model) if compiled and not blocks else model
        # No device_ids: all they do is to look for inputs that have to be moved, and a batch is on the device already
        spread = nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
        spread.register_comm_hook(None, _sum_bucket)
        return spread

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """Around evaluation and samples, whose many shapes are not worth compiling the blocks for."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, forward: Any, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients cross between ranks in the last one alone."""
        if isinstance(forward, nn.parallel.DistributedDataParallel) and not last:
            with forward.no_sync():
                yield
            return
        if self.sharded:
            forward.set_requires_gradient_sync(last)
            forward.set_is_last_backward(last)
        yield

    def split(self, batch: Batch) -> Batch:
        """This rank's tokens of the rows that its context group shares."""
        return batch if self.halo is None else self.halo.split(batch)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the job; on an error the others are told whose it was."""
        self.settings.close()
        if self.watchdog is not None:
            if error is not None and LOST.search(str(error)):
                self.watchdog.lost(str(error))  # another's fault: stays to learn whose
            self.watchdog.close(error)
        if self.world > 1 and error is None:
            dist.destroy_process_group()


def start_ranks(config: ParallelConfig, device: torch.device) -> Ranks:
    """The ranks of this job, from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, …)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(config, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(iter(dist.rendezvous("env://")))
    session = (store.add("zoo/started", 1) - 1) // world  # one process may train more than once
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"zoo/{session}", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=config.stall + config.dead),  # the watchdog knows more, and comes first
    )
    ranks = Ranks(config, rank=rank, world=world, device=device)
    ranks.watchdog = Watchdog(store.clone(), rank, world, dead=config.dead, stall=config.stall, session=session)
    return ranks


def blocks_of(model: nn.Module) -> list[Block]:
    """In the order of a forward pass."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _sum_bucket(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's gradients summed, where it would average them."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


# ---------------------------------------------------------------------------------------------------------------------
# Slices of parameters


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor that is spread over ranks; sharing memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def is_spread(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether fsdp holds `tensor` in slices; only then is the module of their class imported at all."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def held(model: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by name, as this rank holds them: what its optimizer updates."""
    return {
        name: nn.Parameter(local(p.detach()), p.requires_grad) if is_spread(p) else p
        for name, p in model.named_parameters()
    }


def piece(whole: Tensor, rank: int, world: int) -> Tensor:
    """The slice of a whole tensor that falls to a rank; may be empty. It is FSDP2's own rule."""
    pieces = whole.chunk(world)
    return pieces[rank] if rank < len(pieces) else whole[:0]


def tensors_to_save(
    ranks: Ranks, modules: dict[str, nn.Module], optimizer: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """What this rank writes into a checkpoint, by file stem: slices each rank its own, all else the first."""
    if not ranks.sharded:
        whole = {stem: weights.named_tensors(module) for stem, module in modules.items()} | {"optimizer": optimizer}
        return whole if ranks.rank == 0 else {}
    shares: dict[str, dict[str, Tensor]] = {}
    model = dict(modules["model"].named_parameters())
    for stem, module in modules.items():
        shares[stem] = {name: local(parameter.detach()) for name, parameter in module.named_parameters()}
    shares["optimizer"] = {at: t for at, t in optimizer.items() if _is_slice(t, local(model[at.partition("/")[2]]))}
    rest = {stem: _buffers(module) for stem, module in modules.items()}
    rest["optimizer"] = {at: tensor for at, tensor in optimizer.items() if at not in shares["optimizer"]}
    found = rest if ranks.rank == 0 else {}
    for stem, named in shares.items():
        full = {name: tensor for name, tensor in named.items() if tensor.numel()}
        found[f"{stem}.{ranks.rank + 1:05d}-of-{ranks.world:05d}"] = full
    return found


def _is_slice(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a moment goes with its parameter element by element. One without dimensions is the same on all ranks."""
    return tensor.dim() > 0 and tensor.shape == parameter.shape


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.state_dict().items() if not is_spread(t)}


def slices_of(ranks: Ranks, parameters: Mapping[str, Tensor], optimizer: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of the optimizer's whole tensors `moment/parameter`."""
    if not ranks.sharded:
        return optimizer
    return {
        at: piece(whole, ranks.rank, ranks.world).clone()
        if whole.shape == parameters[at.partition("/")[2]].shape
        else whole
        for at, whole in optimizer.items()
    }


class Skeleton:
    """A module without its parameters, from which the whole module is built again."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
        self.model = deepcopy(model, memo)  # type: ignore[arg-type]

    @torch.no_grad()
    def whole(self, model: nn.Module) -> nn.Module:
        """A copy of the sharded `model` that any rank may use alone. All ranks have to call it."""
        memo: dict[int, Any] = {}
        for empty, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            full = parameter.full_tensor() if is_spread(parameter) else parameter.clone()
            memo[id(empty)] = nn.Parameter(full, requires_grad=False)
        made = deepcopy(self.model, memo).to(self.device)
        for own, buffer in zip(made.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        return made.train(model.training)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are split between neighbours


class Halo:
    """The exchange between ranks that hold consecutive slices of the same rows (Context.halo)."""

    def __init__(self, place: int, size: int, rank: int, group: Any):
        self.place, self.size, self.group = place, size, group
        self.before = rank - 1 if place > 0 else None  # global ranks
        self.after = rank + 1 if place < size - 1 else None
        self.exchange = torch.compiler.disable(self._exchange)  # a decorator would import the compiler at every start

    def split(self, batch: Batch) -> Batch:
        """The slice of this rank. Raises ValueError for rows that cannot be split."""
        if not (isinstance(batch.inputs, Tensor) and isinstance(batch.targets, Tensor)):
            raise ValueError("parallel.context splits inputs and targets that are one tensor each, (B, T, …)")
        if batch.ctx.cu_seqlens is not None or batch.ctx.lengths is not None:
            raise ValueError("parallel.context splits plain rows, not packed documents nor padded rows")
        tokens = batch.targets.shape[1]
        if tokens % self.size:
            raise ValueError(f"rows of {tokens} tokens cannot be split evenly between {self.size} ranks")
        each = tokens // self.size

        def cut(x: Any) -> Any:
            if x is None:
                return None
            if x.dim() < 2 or x.shape[1] != tokens:
                raise ValueError(f"parallel.context cannot split {tuple(x.shape)} along {tokens} tokens")
            return x[:, self.place * each : (self.place + 1) * each]

        if batch.ctx.positions is None:
            positions = torch.arange(self.place * each, (self.place + 1) * each).unsqueeze(0)
            if batch.targets.is_pinned():  # as a batch for a GPU is: copies from other memory wait for the device
                positions = positions.pin_memory()
        else:
            positions = cut(batch.ctx.positions)
        ctx = replace(batch.ctx, positions=positions, halo=self.exchange)
        return replace(batch, inputs=cut(batch.inputs), targets=cut(batch.targets), mask=cut(batch.mask), ctx=ctx)

    def _exchange(self, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors (B, n, …) -> (B, count + n, …): with the last `count` tokens of the rank before in front; on the
        first rank as they are. Differentiable: gradients of what came from before go back there."""
        if count > (n := tensors[0].shape[1]):
            raise ValueError(
                f"each of {self.size} ranks holds {n} tokens of a row, but a layer needs the last {count} before them, "
                "which lie on more than one rank; take fewer ranks (parallel.context), longer rows or a smaller window"
            )
        return _WithPast.apply(self, count, *tensors) if count else tensors

    def send(self, tensors: list[Tensor], *, to: int | None, come_from: int | None) -> list[Tensor]:
        """Tensors of the same shapes travel to one rank and come from another, as one message; [] if none comes."""
        whole = torch.cat([_as_bytes(tensor) for tensor in tensors])
        came, moves = torch.empty_like(whole), []
        if to is not None:
            moves.append(dist.P2POp(dist.isend, whole, to, self.group))
        if come_from is not None:
            moves.append(dist.P2POp(dist.irecv, came, come_from, self.group))
        for work in dist.batch_isend_irecv(moves):
            work.wait()
        if come_from is None:
            return []
        parts = came.split([_as_bytes(tensor).numel() for tensor in tensors])
        return [p[: t.nbytes].view(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]


def _as_bytes(tensor: Tensor) -> Tensor:
    """Padded to 16 bytes, so that what follows is aligned."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return nn.functional.pad(flat, (0, -flat.numel() % 16))


class _WithPast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halo: Halo, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.halo, ctx.count = halo, count
        past = halo.send([t[:, -count:] for t in tensors], to=halo.after, come_from=halo.before)
        joined = [torch.cat(pair, dim=1) for pair in zip(past, tensors, strict=True)] if past else list(tensors)
        constant = [t for t, asks in zip(joined, ctx.needs_input_grad[2:], strict=True) if not asks]
        ctx.mark_non_differentiable(*constant)
        return tuple(t.view_as(t) if asks else t for t, asks in zip(joined, ctx.needs_input_grad[2:], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        halo, count, asked = ctx.halo, ctx.count, ctx.needs_input_grad[2:]
        wanted = [grad for grad, asks in zip(grads, asked, strict=True) if asks]
        own = [(grad if halo.before is None else grad[:, count:]).clone() for grad in wanted]
        # The first rank sends nothing back; these still have the shapes of what comes
        past = [grad[:, :count] for grad in wanted]
        for grad, back in zip(own, halo.send(past, to=halo.before, come_from=halo.after), strict=False):
            grad[:, -count:] += back
        found = iter(own)
        return (None, None, *(next(found) if asks else None for asks in asked))
