"""`zoo bench kernels`: our attention beside its peers, on the same inputs in the same process, forward and backward.

A speed is printed only after the kernels' own tests passed in the same call. Every round is a process of its own, since
a kernel's speed differs between starts; what is printed is the median over rounds with their spread. A time is the
device's: calls wait behind a kernel that only waits, until all of them are queued (`queued_ms`), or are replayed as a
CUDA graph where they are short (`graph_ms`), ours and the peers' alike; what the host takes to start one stands beside
it. Speeds count exact visible pairs (4 D FLOPs each forward, 2.5 times that backward) and, beside it, the pairs of the
64 x 64 tiles computed.
Peers that cannot be imported, or do not do a shape, are left out by name.
"""

import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import ops
from zoo.mixers.base import visible_pairs
from zoo.ops import backend
from zoo.peers import PEERS, Call, Inputs, Peer, Shape, Skip, ours

MILLISECONDS = 50  # of repeats behind each median
CYCLES = 2e9  # a second of the device's clock, at least
CALM = 0.3  # seconds of work before the first figure of a process: it has been up to 60% high without


class BenchError(ValueError):
    """What keeps a bench from running; a figure that cannot be trusted is none."""


# The seven shapes of the published comparison, and a million tokens.
SHAPES = (
    Shape(16, 16, 4096, 64, 512),
    Shape(4, 16, 16384, 64, 512),
    Shape(4, 16, 16384, 64, 2048),
    Shape(4, 16, 16384, 128, 512),
    Shape(4, 16, 16384, 128, 2048),
    Shape(1, 16, 65536, 64, 512),
    Shape(1, 16, 65536, 128, 1024),
    Shape(1, 4, 1 << 20, 64, 512),
    Shape(1, 4, 1 << 20, 128, 512),
)

# A million tokens in rows of other lengths: what a token costs must not depend on it.
LENGTHS = tuple(
    Shape((1 << 20) // tokens, 4, tokens, dim, 512) for dim in (64, 128) for tokens in (1 << 14, 1 << 16, 1 << 18)
)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def queued_ms(call: Call, least: float = MILLISECONDS, tries: int = 4) -> tuple[float, float]:
    """(device, host): median milliseconds from one call's end to the next one's on the device, and what it takes the
    host to start one. A kernel that only waits holds the calls back until all are queued: nobody waits for Python.

    Where the host cannot get ahead in `tries` attempts (a peer that waits for the device in its call), the device's
    time holds its waits. Inputs should be larger than the L2 cache: it is not emptied between calls."""
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
        spans += [one.elapsed_time(other) for one, other in pairwise(marks)]
    return statistics.median(spans), 1e3 * statistics.median(hosts)


def graph_ms(calls: Sequence[Call], least: int = 16, replays: int = 20) -> float:
    """Median milliseconds of one of `calls`, which follow each other in one CUDA graph: as in a decoding model, nobody
    waits for Python. Calls on inputs of their own, larger in all than the L2 cache, find none of it there."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph, rounds = torch.cuda.CUDAGraph(), -(-least // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    replays = max(3, min(replays, round(MILLISECONDS / 1e3 / (time.perf_counter() - begin))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spans = [one.elapsed_time(other) for one, other in pairwise(marks)]
    return statistics.median(spans) / (rounds * len(calls))


def measure_attention(shape: Shape, peer: Peer) -> Iterable[dict[str, Any]]:
    """Rows for forward and backward of one peer on one shape."""
    call, leaves, dout = peer.make(Inputs.random(shape))
    pairs = visible_pairs(shape.tokens, None if peer.name.endswith("full") else shape.window)
    with torch.no_grad():
        forward = queued_ms(call)
    out = call()
    backward = queued_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    for what, (ms, host), factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        rate = factor / ms / 1e9
        yield {
            **{"peer": peer.name, "gated": peer.gated, "what": what, "ms": ms, "host_ms": host, **asdict(shape)},
            "tflops_exact": shape.flops(pairs) * rate,
            "tflops_tiles": shape.tiled * rate if not peer.name.endswith("full") else None,
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
    for name, forward in forwards.items():
        ms = graph_ms([partial(forward, *pair) for pair in pairs])
        yield {"peer": name, "what": "gate forward", "ms": ms, **shape}
    grads = [torch.randn(1, 16, 65536, device="cuda") for _ in pairs]
    calls = [partial(gate.prefix_backward, grad, grad, pair, None) for grad, pair in zip(grads, pairs, strict=True)]
    yield {"peer": "zoo", "what": "gate backward", "ms": graph_ms(calls), **shape}


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
    """B,H,T,D,window, five numbers of 1 or more."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 5 or min(numbers) < 1:
        raise BenchError(
            f"shapes = {text}; it takes five numbers of 1 or more, B,H,T,D,window, such as 4,16,16384,64,512"
        )
    return Shape(*numbers)


def one_round(peers: list[str], shapes: list[str]) -> Iterable[dict[str, Any]]:
    """Everything once, in this process; what a peer cannot do is said on stderr. Without shapes also LENGTHS, of ours
    with a gate alone."""
    plan = [(shape, choose_peers(peers)) for shape in [parse_shape(text) for text in shapes] or SHAPES]
    if not shapes:
        plan += [(shape, [PEERS[0]]) for shape in LENGTHS]
    calm()
    for shape, chosen in plan:
        for peer in chosen:
            try:
                yield from measure_attention(shape, peer)
            except (ImportError, Skip, RuntimeError, NotImplementedError) as error:
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


def warm(peer: str, head_dim: int) -> Iterable[dict[str, Any]]:
    """Compiles what a round will need of one peer, into the caches on disk. No rows."""
    call, leaves, dout = choose_peers([peer])[0].make(Inputs.random(Shape(1, 16, 4096, head_dim, 512)))
    torch.autograd.grad(call(), leaves, dout)
    return ()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(out: Path, rounds: int = 3, peers: list[str] | None = None, shapes: list[str] | None = None) -> str:
    """Test, measure `rounds` times in processes of their own, write bench.csv and bench.png to `out`; returns a table.

    peers: names of PEERS; shapes: "B,H,T,D,window"; None: all. Raises BenchError for one that is none,
    without a CUDA device, or when the kernels' tests are not there or do not pass.
    """
    peers, shapes = peers or [], shapes or []
    names = [peer.name for peer in choose_peers(peers)]
    dims = {shape.head_dim for shape in [parse_shape(text) for text in shapes] or SHAPES}
    if rounds < 1:
        raise BenchError(f"rounds = {rounds}; it takes 1 or more")
    if not torch.cuda.is_available():
        raise BenchError("zoo bench kernels measures a GPU, and torch finds none here")
    warming = [start("warm", name, dim) for name in names for dim in dims]
    try:
        workers = max(2, min(12, (os.cpu_count() or 1) - len(warming))) if installed("xdist") else 0
        check_kernels(workers=workers)
    finally:
        for process in warming:
            process.wait()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(rounds):
        process = start("one_round", peers, shapes, stdout=subprocess.PIPE, stderr=None)
        text, _ = process.communicate()
        rows += [{"round": number, **json.loads(line)} for line in text.splitlines() if line.startswith("{")]
        write_csv(rows, out / "bench.csv")  # what is there when a later round fails
        if process.returncode:
            raise BenchError(f"round {number + 1} of {rounds} failed with exit code {process.returncode}")
    plot(summarise(rows), out / "bench.png")
    return table(rows)


def start(function: str, *arguments: Any, **options: Any) -> subprocess.Popen:
    """One of this module's functions in a process of its own, with FlashAttention-4's cache of what it compiled."""
    environment = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", **os.environ}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "text": True}
    command = [sys.executable, "-m", "zoo.bench", json.dumps([function, *arguments])]
    return subprocess.Popen(command, **{**quiet, **options})


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_kernels(name: str = "test_gpu.py", workers: int = 0) -> None:
    """The GPU tests of the checkout in tests/ops/<name>, in a process of their own, or in `workers` of them.

    Raises BenchError when they are not there or do not pass.
    """
    tests = Path(__file__).resolve().parents[1] / "tests" / "ops" / name
    if not tests.is_file():
        raise BenchError("no speed without green tests, and these come with a checkout: run zoo bench from one")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(tests)]
    command += ["-n", str(workers)] if workers else []
    done = subprocess.run(command, cwd=tests.parents[2], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"no speed without green tests; {' '.join(command)} ended with:\n{done.stdout[-3000:]}")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and spread over rounds for everything that was measured in each."""
    measured = {"ms", "host_ms", "tflops_exact", "tflops_tiles", "tb_per_s", "round"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple((k, v) for k, v in row.items() if k not in measured), []).append(row)
    summary = []
    for key, group in groups.items():
        entry: dict[str, Any] = dict(key)
        for name in sorted(measured - {"round"}):
            values = [row[name] for row in group if row.get(name) is not None]
            if values:
                entry[name] = statistics.median(values)
                entry[f"{name}_spread"] = (max(values) - min(values)) / statistics.median(values)
        summary.append(entry)
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each thing measured: medians over rounds of the peers that did it, and how many times the first one's
    time they took, with the least and the most of any round."""
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; ms ±half the spread (x: times the first "
        "peer's of the round), TFLOP/s on exact pairs (on tiles), host ms of a call, ns of a token and head"
    ]
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        place = " ".join(f"{letter}{row[field]}" for field, letter in SIZES.items() if field in row)
        groups.setdefault(f"{row['what']} {place}", {}).setdefault(row["peer"], []).append(row)
    for name, by_peer in groups.items():
        ours = next(iter(by_peer.values()))
        lines.append(f"{name}: " + "; ".join(figures(peer, of, ours) for peer, of in by_peer.items()))
    return "\n".join(lines)


def figures(peer: str, rows: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    (entry,) = summarise(rows)
    text = f"{peer} {entry['ms']:.4f} ±{50 * entry['ms_spread']:.0f}%"
    if rows is not first:
        base = {row["round"]: row["ms"] for row in first}
        ratios = sorted(row["ms"] / base[row["round"]] for row in rows if row["round"] in base)
        if ratios:
            text += f" {statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    elif "tflops_exact" in entry:
        per_token = 1e6 * entry["ms"] / (entry["batch"] * entry["heads"] * entry["tokens"])
        text += f" {entry['tflops_exact']:.0f} ({entry.get('tflops_tiles') or 0:.0f})"
        text += f" host {entry['host_ms']:.2f}, {per_token:.3f} ns"
    return text + (f" {entry['tb_per_s']:.2f} TB/s" if "tb_per_s" in entry else "")


SIZES = {"batch": "B", "heads": "H", "kv_heads": "G", "tokens": "T", "slots": "S", "head_dim": "D", "window": "W"}


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s on exact pairs, a group of bars for each shape and a bar for each peer; a panel each for forward and
    backward. Where some shapes have several peers, those that have one are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, what in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        rows = [row for row in summary if row["what"] == what]
        peers = list(dict.fromkeys(row["peer"] for row in rows))
        known: dict[tuple[int, ...], dict[str, float]] = {}
        for row in rows:
            shape = tuple(row[name] for name in ("batch", "heads", "tokens", "head_dim", "window"))
            known.setdefault(shape, {})[row["peer"]] = row["tflops_exact"]
        shapes = [shape for shape in known if len(known[shape]) > 1] or list(known)
        for place, peer in enumerate(peers):
            at = [i for i, shape in enumerate(shapes) if peer in known[shape]]
            left = [i + (place - (len(peers) - 1) / 2) * 0.8 / len(peers) for i in at]
            axes.bar(left, [known[shapes[i]][peer] for i in at], 0.8 / len(peers), label=peer)
        axes.set_xticks(range(len(shapes)), [f"B{b} H{h}\nT {t}\nD {d} W {w}" for b, h, t, d, w in shapes], fontsize=7)
        axes.set_ylabel(f"{what}, TFLOP/s on exact pairs")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    backend.choose("window", torch.device("cuda"), torch.bfloat16, 64)
    asked, *given = json.loads(sys.argv[1])
    functions: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {"one_round": one_round, "warm": warm}
    for measured in functions[asked](*given):
        sys.stdout.write(json.dumps(measured) + "\n")
        sys.stdout.flush()
