"""`zoo bench kernels`: our attention beside its peers, on the same inputs in the same process, forward and backward.

A speed is printed only after the kernels' own tests passed in the same call. What attention needs is compiled ahead, in
many processes at once. Every round is a process of its own, since a kernel's speed differs between starts; what is
printed is the median over rounds with their spread. In the last round alone are windows, lengths, shared key heads and
documents measured, and, of the peers, full attention and, last of all, those that are compiled for each shape. A time
is the device's: calls wait behind a kernel that only waits, until all of them are queued (`queued_ms`), or are replayed
as a CUDA graph where they are short (`graph_ms`), ours and the peers' alike; what the host takes to start one stands
beside it. Speeds count exact visible pairs (4 D FLOPs each forward, 2.5 times that backward) and, beside it, the pairs
of the 64 x 64 tiles computed; TB/s, the bytes that must be moved at least.
Peers that cannot be imported, or do not do a shape, are left out by name; where ours fails, the bench does.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from zoo import ops, recording
from zoo.bench_report import plot, summarise, table, write_csv
from zoo.ops import backend
from zoo.peers import LENGTHS, OTHERS, PEERS, SHAPES, WINDOWS, Call, Inputs, Peer, Shape, ours
from zoo.train import git_commit, versions

MILLISECONDS = 50  # of repeats behind each median
CYCLES = 2e9  # a second of the device's clock, at least
WORKERS = 15  # processes at most that test or compile: each takes memory of the device
CALM = 0.3  # seconds of work before the first figure of a process: it has been up to 60% high without


class BenchError(ValueError):
    """What keeps a bench from running; a figure that cannot be trusted is none."""


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def queued_ms(call: Call, least: float = MILLISECONDS, tries: int = 4) -> tuple[float, float]:
    """(device, host): median milliseconds from one call's end to the next one's on the device, and what it takes the
    host to start one. A kernel that only waits holds the calls back until all are queued: nobody waits for Python.

    Where the host cannot get ahead in `tries` attempts (a peer that waits for the device in its call), the device's
    time holds its waits, and a line on stderr says so. Inputs should be larger than the L2 cache: it is not emptied
    between calls."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    calls = max(4, min(24, round(least / 1e3 / (time.perf_counter() - begin))))
    wait = 2 * host * calls + 2e-3  # seconds
    spans: list[float] = []
    hosts: list[float] = []
    waits = False
    while sum(spans) < least:
        torch.cuda._sleep(int(wait * CYCLES))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        begin = time.perf_counter()
        for mark in marks[1:]:
            call()
            mark.record()
        hosts.append((time.perf_counter() - begin) / calls)
        late = marks[0].query()
        torch.cuda.synchronize()
        if late and tries > 0:
            tries, wait = tries - 1, 2 * wait
            continue
        waits = waits or late
        spans += [one.elapsed_time(other) for one, other in pairwise(marks)]
    if waits:
        sys.stderr.write("the host was late: the device's time of the next figure holds waits for it\n")
    return statistics.median(spans), 1e3 * statistics.median(hosts)


def graph_ms(calls: Sequence[Call], least: int = 16, replays: int = 20) -> float:
    """Median milliseconds of one of `calls`, which follow each other in one CUDA graph: as in a decoding model, nobody
    waits for Python. Calls on inputs of their own, larger in all than the L2 cache, find none of it there."""

    def all_of_them(rounds: int = 1) -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    aside, rounds = torch.cuda.Stream(), -(-least // len(calls))
    recording.on_stream(all_of_them, aside)
    _, replay = recording.record(partial(all_of_them, rounds), aside)
    begin = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    replays = max(3, min(replays, round(MILLISECONDS / 1e3 / (time.perf_counter() - begin))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    spans = [one.elapsed_time(other) for one, other in pairwise(marks)]
    return statistics.median(spans) / (rounds * len(calls))


def measure_attention(shape: Shape, peer: Peer) -> Iterable[dict[str, Any]]:
    """Rows for forward and backward of one peer on one shape."""
    call, leaves, dout = peer.make(Inputs.random(shape))
    flops = shape.flops(shape.window if peer.windowed else None)
    with torch.no_grad():
        forward = queued_ms(call)
    out = call()
    backward = queued_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    # the backward reads q, k, v, out and dout and writes dq, dk, dv: twice what the forward moves
    for what, (ms, host), times, moves in (("forward", forward, 1.0, 1), ("backward", backward, 2.5, 2)):
        yield {
            **{"peer": peer.name, "gated": peer.gated, "what": what, "ms": ms, "host_ms": host, **asdict(shape)},
            "tflops_exact": times * flops / ms / 1e9,
            "tflops_tiles": times * shape.tiled / ms / 1e9 if peer.windowed else None,
            "tb_per_s": moves * shape.bytes / ms / 1e9,
        }


def measure_gate(sets: int = 12) -> Iterable[dict[str, Any]]:
    """Pre-activations to what the kernels eat, B 1, H 16, T 65,536; against torch.compile of the formula. In a CUDA
    graph over `sets` of inputs, which with the results are more than the L2 cache holds."""
    from zoo.kernels import gate

    def formula(z: Tensor, u: Tensor) -> Tensor:
        return ops.log_decay(z, u).cumsum(1)

    pairs = [tuple(torch.randn(2, 1, 65536, 16, device="cuda").unbind()) for _ in range(sets)]
    forwards: dict[str, Callable[..., Any]] = {
        "zoo": lambda z, u: gate.prefix((z, u)),
        "compiled formula": torch.compile(formula),
        "eager formula": formula,
    }
    shape = {"batch": 1, "heads": 16, "tokens": 65536}
    plane = 4 * 16 * 65536 / 1e9  # bytes, over milliseconds in TB/s
    for name, forward in forwards.items():
        ms = graph_ms([partial(forward, *pair) for pair in pairs])
        yield {"peer": name, "what": "gate forward", "ms": ms, "tb_per_s": 3 * plane / ms, **shape}
    grads = [torch.randn(1, 16, 65536, device="cuda") for _ in pairs]
    calls = [partial(gate.prefix_backward, grad, grad, pair, None) for grad, pair in zip(grads, pairs, strict=True)]
    ms = graph_ms(calls)
    yield {"peer": "zoo", "what": "gate backward", "ms": ms, "tb_per_s": 6 * plane / ms, **shape}


@dataclass(frozen=True)
class Ring:
    """A decoding step's attention: one token of each row over a full ring."""

    batch: int
    heads: int
    kv_heads: int
    slots: int
    head_dim: int = 128

    def inputs(self, total: int = 1 << 29) -> list[tuple[Tensor, ...]]:
        """q, k, v, decay, live, as many sets as it takes for keys and values of `total` bytes."""
        one = 4 * self.batch * self.slots * self.kv_heads * self.head_dim
        return [self._inputs() for _ in range(-(-total // one))]

    def _inputs(self) -> tuple[Tensor, ...]:
        q = torch.randn(self.batch, 1, self.heads, self.head_dim, device="cuda").bfloat16()
        size = (self.batch, self.slots, self.kv_heads, self.head_dim)
        k, v = (torch.randn(size, device="cuda").bfloat16() for _ in range(2))
        decay = -torch.rand(self.batch, self.slots, self.heads, device="cuda")
        return q, k, v, decay, torch.full((self.batch,), self.slots, dtype=torch.int32, device="cuda")

    def tb_per_s(self, ms: float, gated: bool) -> float:
        """On the bytes of keys and values, and of the decays where there are any."""
        moved = 4 * self.kv_heads * self.head_dim + 4 * self.heads * gated
        return self.batch * self.slots * moved / ms / 1e9

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} G{self.kv_heads} S{self.slots} D{self.head_dim}"


RINGS = (Ring(64, 16, 16, 512), Ring(64, 16, 4, 512), Ring(1, 16, 16, 65536))


def measure_decode() -> Iterable[dict[str, Any]]:
    """One token over a full ring, in a CUDA graph over more keys and values than the L2 cache holds."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    attends: dict[str, Callable[..., Tensor]] = {
        "zoo": ops.ring_attention,
        "zoo no gate": lambda q, k, v, _, live: ops.ring_attention(q, k, v, None, live),
        "sdpa no gate": sdpa,
    }
    for ring in RINGS:
        sets = ring.inputs()
        for name, attend in attends.items():
            ms = graph_ms([partial(attend, *inputs) for inputs in sets])
            speed = ring.tb_per_s(ms, name == "zoo")
            yield {"peer": name, "what": "decode", "ms": ms, "tb_per_s": speed, **asdict(ring)}


def choose_peers(names: list[str]) -> list[Peer]:
    """All peers for no names. Raises BenchError for one that is none."""
    known = {peer.name: peer for peer in PEERS}
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"peers = {', '.join(unknown)}; it takes names among {'; '.join(known)}")
    return [known[name] for name in names] or list(PEERS)


def parse_shape(text: str) -> Shape:
    """B,H,T,D,window, five numbers of 1 or more; key/value heads and tokens of a document may follow."""
    numbers = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
    if not 5 <= len(numbers) <= 7 or min(numbers[:5]) < 1 or min(numbers) < 0:
        raise BenchError(
            f"shapes = {text}; it takes five numbers of 1 or more, B,H,T,D,window, such as 4,16,16384,64,512, and "
            "after them key/value heads and tokens of a document, 0 for as many as heads and for whole rows"
        )
    shape = Shape(*numbers)
    if shape.heads % (shape.kv_heads or 1):
        raise BenchError(f"shapes = {text}; {shape.heads} heads are no multiple of {shape.kv_heads} key/value heads")
    return shape


def plan(peers: list[str], shapes: list[str], last: bool = True) -> list[tuple[Shape, Peer]]:
    """What a round measures: without shapes SHAPES and, in the last one, OTHERS, WINDOWS, and LENGTHS of the first peer
    alone. Full attention and peers that are compiled by shape are measured on SHAPES, and unless somebody named them
    in the last round alone; those compiled by shape after all others."""
    chosen = choose_peers(peers)
    if shapes:
        return [(parse_shape(text), peer) for text in shapes for peer in chosen]
    steady = [peer for peer in chosen if peer.windowed and not peer.by_shape]
    if not last:
        return [(shape, peer) for shape in SHAPES for peer in (chosen if peers else steady)]
    everywhere = [(shape, peer) for shape in SHAPES for peer in chosen]
    swept = [(shape, peer) for shape in (*OTHERS, *WINDOWS) for peer in steady]
    swept += [(shape, chosen[0]) for shape in LENGTHS]
    return sorted(everywhere + swept, key=lambda pair: pair[1].by_shape)


def one_round(peers: list[str], shapes: list[str], last: bool = True) -> Iterable[dict[str, Any]]:
    """Everything once, in this process; what a peer cannot do is said on stderr."""
    calm()
    for shape, peer in plan(peers, shapes, last):
        try:
            yield from measure_attention(shape, peer)
        except Exception as error:
            if peer.name.startswith("zoo"):
                raise
            sys.stderr.write(f"{peer.name}, {shape}: left out, {type(error).__name__} {str(error)[:160]}\n")
        torch.cuda.empty_cache()
    yield from measure_gate()
    yield from measure_decode()


def calm() -> None:
    """Keeps the device busy with our own kernels, so that no figure is the first of its process."""
    call = ours(True)(Inputs.random(SHAPES[1]))[0]
    call()
    torch.cuda.synchronize()
    until = time.perf_counter() + CALM
    while time.perf_counter() < until:
        call()
        torch.cuda.synchronize()


def compiled_alike(peers: list[str], shapes: list[str]) -> list[tuple[str, list[Shape]]]:
    """What compiles all that the rounds will need: for each process a peer, and one of the shapes that it is compiled
    for, or all of one head dim that differ in heads, windows or documents."""
    found: dict[tuple[str, Any], set[Shape]] = {}
    for shape, peer in plan(peers, shapes):
        kind = shape if peer.by_shape else replace(shape, batch=1, tokens=4096)
        found.setdefault((peer.name, shape if peer.by_shape else shape.head_dim), set()).add(kind)
    return [(name, sorted(kinds, key=str)) for (name, _), kinds in found.items()]


def warm(peer: str, shapes: list[list[int]]) -> Iterable[dict[str, Any]]:
    """Compiles what one peer needs for these, into the caches on disk. No rows."""
    for numbers in shapes:
        try:
            call, leaves, dout = choose_peers([peer])[0].make(Inputs.random(Shape(*numbers)))
            torch.autograd.grad(call(), leaves, dout)
        except Exception as error:  # the round says it again, and whether it matters
            sys.stderr.write(f"{peer}: {error}\n")
    return ()


def compile_ahead(peers: list[str], shapes: list[str], workers: int) -> None:
    parts = [(peer, [astuple(shape) for shape in alike]) for peer, alike in compiled_alike(peers, shapes)]
    pool = ThreadPoolExecutor(workers)
    try:
        done = pool.map(lambda part: start("warm", *part).wait(), parts)
        list(tqdm(done, desc="compiling", total=len(parts), disable=not sys.stderr.isatty()))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends those that run, and none begins any more


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(out: Path, rounds: int = 3, peers: list[str] | None = None, shapes: list[str] | None = None) -> str:
    """Test, measure `rounds` times in processes of their own, write bench.csv and bench.png to `out`; returns a table.

    peers: names of PEERS; shapes: as `parse_shape` takes them; None: all. bench.json says what was measured: device,
    versions, commit. Raises BenchError for a peer or shape that is none, without a CUDA device, or when the kernels'
    tests are not there or do not pass.
    """
    peers, shapes = peers or [], shapes or []
    plan(peers, shapes)  # names what is none
    if rounds < 1:
        raise BenchError(f"rounds = {rounds}; it takes 1 or more")
    if not torch.cuda.is_available():
        raise BenchError("zoo bench kernels measures a GPU, and torch finds none here")
    workers = min(WORKERS, os.cpu_count() or 1)
    check_kernels(workers=workers if installed("xdist") else 0)
    compile_ahead(peers, shapes, workers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(provenance(), indent=1) + "\n", encoding="utf-8")
    rows = measure(out / "bench.csv", rounds, peers, shapes)
    plot(summarise(rows), out / "bench.png")
    return table(rows)


def measure(path: Path, rounds: int, peers: list[str], shapes: list[str]) -> list[dict[str, Any]]:
    """The figures of all rounds; the last one has more (`plan`). Each figure is in `path` once it is
    there, whatever becomes of the rest."""
    rows: list[dict[str, Any]] = []
    with tqdm(desc="zoo bench kernels", unit=" figures", disable=not sys.stderr.isatty()) as bar:
        for number in range(rounds):
            bar.set_postfix_str(f"round {number + 1} of {rounds}")
            last = number == rounds - 1
            with start("one_round", peers, shapes, last, stdout=subprocess.PIPE, stderr=None) as process:
                for line in process.stdout or ():
                    if line.startswith("{"):
                        rows.append({"round": number, **json.loads(line)})
                        write_csv(rows, path)
                        bar.update()
            if process.returncode:
                raise BenchError(f"round {number + 1} of {rounds} failed with exit code {process.returncode}")
    return rows


def start(function: str, *arguments: Any, **options: Any) -> subprocess.Popen:
    """One of this module's functions in a process of its own, with FlashAttention-4's cache of what it compiled, and
    without inductor's pool of processes in each."""
    environment = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "text": True}
    command = [sys.executable, "-m", "zoo.bench", json.dumps([function, *arguments])]
    return subprocess.Popen(command, **{**quiet, **options})


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def provenance() -> dict[str, Any]:
    """Device, driver's CUDA, versions of ours and the peers' packages, commit, command."""
    found = {}
    for package in ("triton", "flash-attn-4", "flash-linear-attention", "fla-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **{"device": device, "cuda": torch.version.cuda, "commit": git_commit(), "command": sys.argv[1:]},
        **{"versions": {**versions(), **found}},
    }


def check_kernels(name: str = "test_gpu.py", workers: int = 0) -> None:
    """The GPU tests of the checkout in tests/ops/<name>, in a process of their own, or in `workers` of them.

    Raises BenchError when they are not there or do not pass.
    """
    tests = Path(__file__).resolve().parents[1] / "tests" / "ops" / name
    if not tests.is_file():
        raise BenchError("no speed without green tests, and these come with a checkout: run zoo bench from one")
    command = [
        sys.executable,
        *["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:benchmark"],
        str(tests),
    ]
    command += ["-n", str(workers)] if workers else []
    done = subprocess.run(command, cwd=tests.parents[2], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"no speed without green tests; {' '.join(command)} ended with:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    backend.choose("window", torch.device("cuda"), torch.bfloat16, 64)
    asked, *given = json.loads(sys.argv[1])
    functions: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {"one_round": one_round, "warm": warm}
    for measured in functions[asked](*given):
        sys.stdout.write(json.dumps(measured) + "\n")
        sys.stdout.flush()
