"""Times Native Sparse Attention on a CUDA device beside fla's parallel_nsa, FlashAttention-4 and dense attention.

    python scripts/bench_nsa.py                          all of it, once the GPU tests of NSA have passed
    python scripts/bench_nsa.py --only speed --groups 16 --tokens 65536

speed      compression + selection and the whole op, forward and backward, their stages, and the peers that import
crossover  the whole op against dense causal attention, one CUDA graph each
decode     a step after 64k tokens, one CUDA graph: time, bytes of keys and values, against full attention

Prints medians in ms, each on stderr as soon as it is measured; with $OUT set every row, complete, goes to
$OUT/bench_nsa.json. A row whose measurement fails says so and the others go on. 64 query heads, head_dim 128, block 64,
top 16, window 512, bfloat16. Tiles are tried by tune_nsa.py.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import bench, ops
from zoo.kernels import nsa_inverse, nsa_piece
from zoo.ops import nsa, nsa_blocks
from zoo.peers import Call, keep_config

HEADS, DIM, BLOCK, TOP, WINDOW = 64, 128, 64, 16, 512
DEVICE, DTYPE = "cuda", torch.bfloat16
CROSSOVER_TOKENS = (1024, 2048, 4096, 8192, 16384)
CONTEXT = 65536
WORKERS = 15  # processes that compile ahead
FLA_CONFIGS = 16  # that its kernels choose from, at most
SAID: set[str] = set()  # reasons that stand in the output already


# ----------------------------------------------------------------------------------------------------------- what runs


def inputs(tokens: int, group: int, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(batch, tokens, heads, DIM, device=DEVICE, generator=generator).to(DTYPE)

    x = {"q": normal(HEADS), "k": normal(HEADS // group), "v": normal(HEADS // group), "dout": normal(HEADS)}
    x["gates"] = torch.rand(batch, tokens, HEADS, 3, device=DEVICE, generator=generator).to(DTYPE)
    x["log_decay"] = -0.05 * torch.rand(batch, tokens, HEADS, device=DEVICE, generator=generator)
    return x


def whole(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, log_decay: Tensor) -> Tensor:
    return ops.nsa_attention(q, k, v, gates, log_decay, block=BLOCK, top=TOP, window=WINDOW)


def pair(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """What fla's parallel_nsa computes without a window: both branches, pooled and weighted."""
    means = (ops.pool_blocks(x, BLOCK) for x in (k, v))
    gist, _, index = ops.compressed_attention(q, *means, block=BLOCK, top=TOP)
    detail = ops.selected_attention(q, k, v, index, block=BLOCK)
    return ops.mix_branches(gates, gist, detail, None)


def fla_nsa(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.nsa.parallel import parallel_nsa  # type: ignore[import-not-found]

    weights = {"g_cmp": gates[..., 0], "g_slc": gates[..., 1]}
    return parallel_nsa(q, k, v, **weights, block_counts=TOP, block_size=BLOCK, window_size=0)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- measuring


def device_ms(call: Call) -> float:
    return bench.queued_ms(call, least=100)[0]


def host_ms(call: Call) -> float:
    return bench.queued_ms(call)[1]


def graph_ms(call: Call) -> float:
    return bench.graph_ms([call], least=1)


class DeviceLost(Exception):
    """After a fault of a kernel nothing runs on the device in this process."""


def check_device(what: str) -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(f"{what}: {str(error).splitlines()[0]}") from error


class Row(dict):
    """One row of the report; a measurement that fails leaves a None and its reason."""

    def time(
        self, name: str, make: Callable[[], Call], *, gradients: bool = False, how: Callable[[Call], float] = device_ms
    ) -> None:
        """`make` gives the call to be timed, and may fail, too."""
        try:
            with torch.set_grad_enabled(gradients):
                self[name] = round(how(make()), 4)
        except Exception as error:  # a peer that is not there, a shape that it does not do, too little memory
            self[name] = None
            self.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:300]
            check_device(f"{name} of {dict(self)}")
        sys.stderr.write(f"    {self.text(name)}\n")
        torch.cuda.empty_cache()

    def forward_and_backward(
        self, name: str, call: Callable[..., Tensor], leaves: list[Tensor], others: list[Tensor], dout: Tensor
    ) -> None:
        leaves = [x.detach().requires_grad_() for x in leaves]
        self.time(name, lambda: partial(call, *leaves, *others))
        self.time(f"{name} backward", lambda: back(call(*leaves, *others), leaves, dout), gradients=True)

    def text(self, name: str) -> str:
        names = [n for n in (name, f"{name} backward") if n in self]
        return f"{name} {' / '.join('-' if self[n] is None else f'{self[n]:.4g}' for n in names)}"

    def line(self) -> str:
        return "   ".join(self.text(name) for name in self if not name.endswith("backward") and name != "errors")

    def times(self, name: str, of: str) -> str:
        """How many times as long `of` takes as `name`."""
        return f"{self[of] / self[name]:.2f}x" if self.get(of) and self.get(name) else "-"

    def reasons(self) -> None:
        for name, reason in self.get("errors", {}).items():
            if (short := f"    {name}: {' '.join(reason.split())[:110]}") not in SAID:
                SAID.add(short)
                say(short)


def ready(call: Call) -> Callable[[], Call]:
    return lambda: call


def back(out: Tensor, leaves: list[Tensor], dout: Tensor) -> Call:
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def say(line: str) -> None:
    print(line, flush=True)


class Report:
    """Rows as they come, in $OUT/`name`.json; `facts` say of what machine, and whether the tests had passed."""

    def __init__(self, name: str, facts: dict[str, Any]):
        self.rows: list[dict[str, Any]] = []
        self.name, self.facts = name, facts

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.rows.append({"kind": kind, **row})
        if out := os.environ.get("OUT"):
            text = json.dumps({**self.facts, "rows": self.rows}, indent=1)
            Path(out, f"{self.name}.json").write_text(text + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- speed


def speed(report: Report, tokens: int, group: int) -> None:
    x = inputs(tokens, group)
    q, k, v, gates, decay, dout = (x[name] for name in ("q", "k", "v", "gates", "log_decay", "dout"))
    row = Row(tokens=tokens, group=group)
    row.forward_and_backward("compression + selection", pair, [q, k, v], [gates], dout)
    row.forward_and_backward("fla nsa", fla_nsa, [q, k, v], [gates], dout)
    row.forward_and_backward("whole", whole, [q, k, v, gates, decay], [], dout)
    row.time("flash-attention-4 full", lambda: partial(flash_attention_4, q, k, v))
    row["stages"] = stages(x)
    report.add("speed", row)
    ours = "compression + selection"
    say(f"T {tokens}, {group} query heads a kv head, forward / backward")
    say(
        f"  {row.text(ours)}   {row.text('fla nsa')}   "
        f"{row.times(ours, 'fla nsa')} / {row.times(f'{ours} backward', 'fla nsa backward')}"
    )
    full = "flash-attention-4 full"
    say(f"  {row.text('whole')}   {row.text(full)}   {row.times('whole', full)}")
    say(f"  {row['stages'].line()}")
    row.reasons()
    row["stages"].reasons()


def stages(x: dict[str, Tensor]) -> Row:
    """The parts of the op, each with its operands ready."""
    q, k, v, decay, dout = (x[name] for name in ("q", "k", "v", "log_decay", "dout"))
    means = [ops.pool_blocks(y, BLOCK) for y in (k, v)]
    index = ops.compressed_attention(q, *means, block=BLOCK, top=TOP)[2]
    pieces = list(nsa_piece.pieces(q, k, index, nsa._places(q, BLOCK, q.shape[1], None, None), BLOCK))
    row = Row()
    mixed = (q, k, v, index, x["gates"], q, dout, BLOCK, DIM**-0.5, None, None, False)

    def compressed(*y: Tensor) -> Tensor:
        return ops.compressed_attention(*y, block=BLOCK, top=0)[0]

    row.time("pool", lambda: partial(nsa_blocks.pool_each, [k, v], BLOCK))
    row.forward_and_backward("compressed", compressed, [q, *means], [], dout)
    row.time("with choice", lambda: partial(ops.compressed_attention, q, *means, block=BLOCK, top=TOP))
    row.forward_and_backward("selected", partial(ops.selected_attention, block=BLOCK), [q, k, v], [index], dout)
    row.time("its index", lambda: lambda: [nsa_inverse.inverse(piece, "partial") for piece in pieces])
    row.time("its index backward", lambda: lambda: [nsa_inverse.inverse(piece, "grads") for piece in pieces])
    row.forward_and_backward("window", partial(ops.window_attention, window=WINDOW), [q, k, v, decay], [], dout)
    row.time(
        "selected and mix",
        lambda: partial(nsa._selected_mix, *mixed),
    )
    row.forward_and_backward("mix", ops.mix_branches, [x["gates"], q, q.clone(), dout], [], dout)
    return row


# ---------------------------------------------------------------------------------------------------------- crossover


def crossover(report: Report, tokens: int, group: int) -> None:
    """Forward, and forward with backward, each as one CUDA graph; and what the host takes to start an eager forward."""
    x = inputs(tokens, group)
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v")]
    row = Row(tokens=tokens, group=group)
    calls: dict[str, Callable[[], Tensor]] = {
        "nsa": partial(whole, *leaves, x["gates"], x["log_decay"]),
        "dense": partial(ops.window_attention, *leaves),
        "sdpa": partial(sdpa, *leaves),
        "flash-attention-4": partial(flash_attention_4, *leaves),
    }

    def both(call: Callable[[], Tensor]) -> Any:
        return torch.autograd.grad(call(), leaves, x["dout"])

    for name, call in calls.items():
        row.time(name, ready(call), how=graph_ms)
        row.time(f"{name} backward", ready(partial(both, call)), gradients=True, how=graph_ms)
    row.time("nsa host", ready(calls["nsa"]), how=host_ms)
    report.add("crossover", row)
    say(
        f"crossover, T {tokens}, {group} query heads a kv head, forward / both: "
        f"{'   '.join(row.text(name) for name in [*calls, 'nsa host'])}"
    )
    row.reasons()


def crossings(report: Report, group: int) -> None:
    """Where nsa takes as long as each of the others."""
    rows = sorted((row for row in report.rows if row["kind"] == "crossover" and row["group"] == group), key=tokens_of)
    for what, suffix in (("forward", ""), ("both", " backward")):
        peers = ("dense", "sdpa", "flash-attention-4")
        found = {peer: equal_at(rows, f"nsa{suffix}", f"{peer}{suffix}") for peer in peers}
        text = "   ".join(f"{peer} {'-' if tokens is None else f'{tokens:,.0f}'}" for peer, tokens in found.items())
        say(f"as fast at T, {group} query heads a kv head, {what}: {text}")


def tokens_of(row: dict[str, Any]) -> int:
    return row["tokens"]


def equal_at(rows: list[dict[str, Any]], name: str, other: str) -> float | None:
    """The length from which on `name` is the faster one, between those of neighbouring rows: the logarithm of the ratio
    is taken as a line over that of the length. None where they do not cross."""
    ratios = [(math.log(row["tokens"]), math.log(row[name] / row[other])) for row in rows if row[name] and row[other]]
    for (shorter, above), (longer, below) in pairwise(ratios):
        if above > 0 >= below:
            return math.exp(shorter + (longer - shorter) * above / (above - below))
    return None


# ------------------------------------------------------------------------------------------------------------- decode


@torch.no_grad()
def decode(report: Report, group: int, batch: int) -> None:
    """A step as the mixer takes it: the compressed branch with its choice, the selected one, the window, their sum."""
    x = inputs(CONTEXT, group, batch)
    q, k, v, gates, decay = x["q"][:, -1:], x["k"], x["v"], x["gates"][:, -1:], x["log_decay"][:, -WINDOW:].contiguous()
    means = [ops.pool_blocks(y, BLOCK)[:, : CONTEXT // BLOCK].contiguous() for y in (k, v)]
    place = torch.arange(CONTEXT - WINDOW, CONTEXT, device=DEVICE)
    start, full, live = (
        torch.full((batch,), number, dtype=torch.int32, device=DEVICE) for number in (CONTEXT - 1, CONTEXT, WINDOW)
    )

    def compressed(top: int = TOP) -> tuple[Tensor, Tensor, Tensor]:
        return ops.compressed_attention(q, *means, block=BLOCK, top=top, query_start=start)

    def selected(index: Tensor) -> Tensor:
        return ops.selected_attention(q, k, v, index, block=BLOCK, query_start=start)

    def window() -> Tensor:
        return ops.ring_attention(q, k.index_select(1, place), v.index_select(1, place), decay, live)

    def step() -> Tensor:
        gist, _, index = compressed()
        return ops.mix_branches(gates, gist, selected(index), window())

    row = Row(context=CONTEXT, group=group, batch=batch)
    heads_first = [y.transpose(1, 2) for y in (q, k, v)]
    row.time("step", ready(step), how=graph_ms)
    row.time("full ring", ready(partial(ops.ring_attention, q, k, v, None, full)), how=graph_ms)
    sdpa_step = partial(F.scaled_dot_product_attention, *heads_first, enable_gqa=True)
    row.time("full sdpa", ready(sdpa_step), how=graph_ms)
    parts = row["stages"] = Row()
    parts.time("compressed", ready(partial(compressed, 0)), how=graph_ms)
    parts.time("with choice", ready(compressed), how=graph_ms)
    parts.time("selected", ready(partial(selected, compressed()[2])), how=graph_ms)
    parts.time("window", ready(window), how=graph_ms)
    # compressed slots pass twice, for the sums and for the choice; the window is gathered, written and read again
    read, token_bytes = (
        2 * (CONTEXT // BLOCK) + TOP * BLOCK + 3 * WINDOW,
        2 * batch * HEADS // group * DIM * k.element_size(),
    )
    row["MB read"], row["MB read, full"] = read * token_bytes / 1e6, CONTEXT * token_bytes / 1e6
    report.add("decode", row)
    say(
        f"decode at {CONTEXT}, {group} query heads a kv head, batch {batch}: {row.text('step')}   "
        f"{row.text('full ring')} {row.times('step', 'full ring')}   {row.text('full sdpa')} "
        f"{row.times('step', 'full sdpa')}   moves {row['MB read']:.1f}, full {row['MB read, full']:.1f} MB "
        f"({CONTEXT / read:.1f}x fewer)"
    )
    say(f"  {parts.line()}")
    row.reasons()
    parts.reasons()


# ------------------------------------------------------------------------------------------------- compiling beforehand


Job = tuple[str, int, int]  # what, heads a group, which of its configurations


def jobs(parts: list[str], groups: list[int]) -> Iterator[Job]:
    for group in groups:
        if {"speed", "crossover"} & set(parts):
            yield from ((what, group, 0) for what in ("whole", "dense"))
        if "speed" in parts and group == 16:  # fla takes no fewer
            yield from (("fla", group, number) for number in range(FLA_CONFIGS))
        if "decode" in parts:
            yield "step", group, 0


def run_once(job: Job) -> None:
    what, group, config = job
    x = inputs(2048, group)
    if what == "fla":
        from fla.ops.nsa import compression, parallel  # type: ignore[import-not-found]

        for module in (compression, parallel):
            keep_config(module, config)
    q, k, v = leaves = [x[name].requires_grad_() for name in ("q", "k", "v")]
    if what == "step":
        with torch.no_grad():
            start = torch.full((1,), 2047, dtype=torch.int32, device=DEVICE)
            means = [ops.pool_blocks(y, BLOCK) for y in (k, v)]
            index = ops.compressed_attention(q[:, -1:], *means, block=BLOCK, top=TOP, query_start=start)[2]
            ops.selected_attention(q[:, -1:], k, v, index, block=BLOCK, query_start=start)
    else:
        call: Callable[[], Tensor] = {
            "whole": partial(whole, *leaves, x["gates"], x["log_decay"]),
            "dense": partial(ops.window_attention, *leaves),
            "fla": partial(fla_nsa, *leaves, x["gates"]),
        }[what]
        torch.autograd.grad(call(), leaves, x["dout"])
    torch.cuda.synchronize()


def compile_ahead(run: Callable[[Any], None], todo: list[Any]) -> None:
    """Runs each of them once, in a process of its own, side by side: what they compile, all find in Triton's cache."""
    begin = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=spawn, max_tasks_per_child=1) as pool:  # keep_config is for good
        futures = [pool.submit(run, job) for job in todo]
        failed = {job: error for job, future in zip(todo, futures, strict=True) if (error := future.exception())}
    say(f"compiled ahead in {time.perf_counter() - begin:.0f} s; {len(failed)} of {len(todo)} did not run")
    for job, error in failed.items():
        say(f"  {job}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["speed", "crossover", "decode"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    add_arguments(parser)
    options = parser.parse_args()
    if (report := open_report(Path(__file__).stem, options.untested)) is None:
        return 1
    compile_ahead(run_once, list(jobs(options.only, options.groups)))
    todo: list[Call] = []
    for group in options.groups if "speed" in options.only else ():
        todo += [partial(speed, report, tokens, group) for tokens in options.tokens]
    for group in options.groups if "decode" in options.only else ():
        todo += [partial(decode, report, group, batch) for batch in ((1, 16) if group == 16 else (1,))]
    for group in options.groups if "crossover" in options.only else ():
        todo += [partial(crossover, report, tokens, group) for tokens in CROSSOVER_TOKENS]
        todo.append(partial(crossings, report, group))
    return finish(todo)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--groups", type=int, nargs="+", default=[16, 4, 1], help="query heads a kv head")
    parser.add_argument("--untested", action="store_true", help="measure without running the GPU tests first")


def open_report(name: str, untested: bool) -> Report | None:
    """The report to fill, once there is a GPU and its tests have passed; None, and why, where it can't be."""
    if not torch.cuda.is_available():
        sys.stderr.write(f"{name} measures a GPU, and torch finds none here\n")
        return None
    if not untested:
        try:
            bench.check_kernels("test_nsa_gpu.py", workers=WORKERS)
        except bench.BenchError as error:
            sys.stderr.write(f"{error}\n")
            return None
    bench.calm()
    return Report(name, {**bench.provenance(), "tests": "not run here" if untested else "passed"})


def finish(todo: list[Call]) -> int:
    """How many did not run to their end; 1 at once where the device is lost."""
    try:
        return sum(not finished(part) for part in todo)
    except DeviceLost as error:
        sys.stderr.write(f"a kernel failed, nothing else can be measured here: {error}\n")
        return 1


def finished(part: Call) -> bool:
    """Whether it ran to its end; if not its reason is printed, and the others go on."""
    try:
        part()
    except DeviceLost:
        raise
    except Exception as error:
        say(f"  {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return False
    torch.cuda.empty_cache()
    return True


if __name__ == "__main__":
    sys.exit(main())
