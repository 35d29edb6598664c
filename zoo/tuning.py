"""`zoo bench kernels --tune`: tiles of the Hopper and ring kernels against each other, as rows for their tables."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.bench import RINGS, BenchError, Inputs, Shape, check_kernels, graph_ms, queued_ms

# By table and head dim: the fields of hopper_band.Schedule.
CANDIDATES = {
    "TABLE": {
        64: [(3, 4, False, 160, 32), (3, 3, False, 160, 32), (3, 4, True, 160, 32), (2, 4, False, 224, 56)],
        128: [(3, 3, True, 160, 32), (2, 3, True, 224, 56), (2, 4, True, 224, 56), (2, 3, False, 224, 56)],
    },
    "DQ_TABLE": {
        64: [(3, 4, True, 160, 32), (3, 3, True, 160, 32), (2, 4, True, 224, 56), (2, 4, False, 224, 56)],
        128: [(2, 3, True, 224, 56), (2, 2, True, 224, 56)],
    },
    "DKV_TABLE": {
        64: [(2, 4, False, 232, 40), (2, 3, False, 232, 40), (2, 5, False, 232, 40), (2, 4, True, 232, 40)],
        128: [(2, 3, True, 232, 40), (2, 2, True, 232, 40)],
    },
}
SAME = 1e-2  # of the largest value: other sums, rounded to bfloat16
# Fields of decode.Steps: slots of a step, warps, stages, programs to aim for.
RING_STEPS = [
    (*step, programs)
    for step in [(64, 4, 3), (64, 4, 4), (64, 2, 3), (64, 8, 3), (32, 4, 4), (32, 2, 4), (32, 2, 6), (128, 4, 2),
                 (128, 8, 2), (128, 8, 3)]
    for programs in (132, 264, 396, 528, 1056)
]  # fmt: skip


def tune(part: str = "all") -> Iterable[str]:
    """Rows for the tables of the Hopper ("window") and ring ("ring") kernels, the fastest first.

    A difference below 10% is none until it repeats in other processes. Raises BenchError off a Hopper card."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise BenchError("the tables are those of a Hopper card (compute capability 9.0), and torch finds none here")
    check_kernels()
    if part in ("all", "ring"):
        yield from tune_ring()
    if part in ("all", "window"):
        yield from tune_window()


def tune_window() -> Iterable[str]:
    """Schedules of the Hopper kernels, with their time over windows 512 and 2048.

    One whose results are not those of the table's row is left out, and stderr says so."""
    from zoo.kernels import hopper_backward, hopper_forward
    from zoo.kernels.hopper_band import Schedule

    tables = {
        "TABLE": hopper_forward.TABLE,
        "DQ_TABLE": hopper_backward.DQ_TABLE,
        "DKV_TABLE": hopper_backward.DKV_TABLE,
    }
    for table, by_dim in CANDIDATES.items():
        for dim, candidates in by_dim.items():
            totals = {Schedule(*values): 0.0 for values in candidates}
            for width in (512, 2048):
                call = window_call(table, Inputs.random(Shape(4, 16, 16384, dim, width)), width)
                usual = call(tables[table][dim])
                for schedule in list(totals):
                    off = difference(call(schedule), usual)
                    if off <= SAME:
                        totals[schedule] += queued_ms(partial(call, schedule))[0]
                    else:
                        del totals[schedule]
                        sys.stderr.write(f"{table} {dim}: {schedule} left out, {off:.1e} off at window {width}\n")
            for schedule in sorted(totals, key=lambda schedule: totals[schedule]):
                yield f"{table}  {dim}: {schedule},  # {totals[schedule]:.3f} ms"


def window_call(table: str, x: Inputs, width: int) -> Callable[[Any], list[Tensor]]:
    """The results of the forward or of a whole backward under a Schedule for the kernel of `table`."""
    from zoo.kernels import hopper_backward, hopper_forward

    q, k, v, decay = (tensor.detach() for tensor in (x.q, x.k, x.v, x.log_decay))
    options: dict[str, Any] = {"window": width, "scale": q.shape[3] ** -0.5, "spans": None}
    forward = partial(hopper_forward.window_forward, q, k, v, (decay,), **options)
    if table == "TABLE":
        return lambda schedule: list(forward(schedule=schedule))
    name = "dq_schedule" if table == "DQ_TABLE" else "dkv_schedule"
    backward = partial(hopper_backward.window_backward, x.dout, None, q, k, v, *forward(), (decay,), **options)

    def call(schedule: Any) -> list[Tensor]:
        dq, dk, dv, gate = backward(**{name: schedule})
        return [dq, dk, dv, *gate]

    return call


def difference(found: list[Tensor], usual: list[Tensor]) -> float:
    """The largest one over the largest value of its tensor; NaN where something is."""
    shares = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, usual, strict=True)]
    return float(torch.stack(shares).max())


def tune_ring(best: int = 5) -> Iterable[str]:
    """Steps of the ring kernel: the `best` of each of RINGS, then those that lose least to them over all."""
    from zoo.kernels import decode

    times: dict[Any, list[float]] = {decode.Steps(*values): [] for values in RING_STEPS}
    for ring in RINGS:
        sets = ring.inputs()
        for steps in times:
            attend = partial(decode.ring_attention, scale=ring.head_dim**-0.5, steps=steps)
            times[steps].append(graph_ms([partial(attend, *inputs) for inputs in sets]))
        for steps in sorted(times, key=lambda steps: times[steps][-1])[:best]:  # noqa: B023  sorted at once
            ms = times[steps][-1]
            yield f"{ring}  {steps}  # {ms:.4f} ms, {ring.tb_per_s(ms, gated=True):.2f} TB/s"
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    losses = {steps: [ms / least for ms, least in zip(row, fastest, strict=True)] for steps, row in times.items()}
    for steps in sorted(losses, key=lambda steps: max(losses[steps]))[:best]:
        yield f"STEPS = {steps}  # {' '.join(f'{loss:.2f}' for loss in losses[steps])} of the fastest"
