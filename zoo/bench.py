"""`zoo bench kernels`: our attention beside its peers, on the same inputs in the same process, forward and backward.

A speed is printed only after the kernels' own tests passed in the same call. Every round is a process of its own, since
a kernel's speed differs between starts; what is printed is the median over rounds with their spread. Speeds count exact
visible pairs (4 D FLOPs each forward, 2.5 times that backward) and, beside it, the pairs of the 64 x 64 tiles computed.
Peers that cannot be imported, or do not do a shape, are left out by name.
"""

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import ops
from zoo.mixers.base import visible_pairs
from zoo.ops import backend

TILE = 64
MILLISECONDS = 100  # of repeats behind each median
Call = Callable[[], Any]


class BenchError(ValueError):
    """What keeps a bench from running; a figure that cannot be trusted is none."""


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    head_dim: int
    window: int

    def flops(self, pairs: int) -> float:
        return 4.0 * self.batch * self.heads * self.head_dim * pairs

    @property
    def exact(self) -> float:
        return self.flops(visible_pairs(self.tokens, self.window))

    @property
    def tiled(self) -> float:
        return self.flops(tile_pairs(self.tokens, self.window))

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.tokens} D{self.head_dim} W{self.window}"


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


def tile_pairs(tokens: int, window: int, tile: int = TILE) -> int:
    """Pairs in the tile x tile blocks that hold at least one visible pair."""
    touched = 0
    for first in range(0, tokens, tile):
        last = min(first + tile, tokens) - 1
        touched += last // tile - max(0, first - window + 1) // tile + 1
    return touched * tile * tile


# ---------------------------------------------------------------------------------------------------------------------
# Who is measured


@dataclass(frozen=True)
class Inputs:
    """q, k, v, dout (B, T, H, D) bf16 and log_decay (B, T, H) float32, random; gates as a trained model has them."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    log_decay: Tensor

    @classmethod
    def random(cls, shape: Shape, seed: int = 0) -> "Inputs":
        generator = torch.Generator("cuda").manual_seed(seed)
        size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
        tensors = [torch.randn(size, device="cuda", generator=generator).bfloat16() for _ in range(4)]
        z = 4 + torch.randn(size[:3], device="cuda", generator=generator)
        q, k, v = (x.requires_grad_() for x in tensors[:3])
        return cls(shape, q, k, v, tensors[3], F.logsigmoid(z).requires_grad_())


@dataclass(frozen=True)
class Peer:
    """`make(inputs)` gives (a forward call, the tensors to differentiate, dout in the peer's layout). It may raise
    ImportError, or Skip for a shape that the peer does not do."""

    name: str
    gated: bool
    make: Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]


class Skip(Exception):
    pass


def ours(gated: bool) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        decay = x.log_decay if gated else None
        leaves = [x.q, x.k, x.v, *([x.log_decay] if gated else [])]
        return (lambda: ops.window_attention(x.q, x.k, x.v, decay, window=x.shape.window)), leaves, x.dout

    return make


def flash_attention_4(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    def call() -> Tensor:
        out = flash_attn_func(x.q, x.k, x.v, causal=True, window_size=(x.shape.window - 1, 0))
        return out[0] if isinstance(out, tuple) else out

    return call, [x.q, x.k, x.v], x.dout


def fla_forgetting(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    from fla.ops.forgetting_attn import parallel_forgetting_attn  # type: ignore[import-not-found]

    def call() -> Tensor:
        return parallel_forgetting_attn(x.q, x.k, x.v, x.log_decay, window_size=x.shape.window)

    return call, [x.q, x.k, x.v, x.log_decay], x.dout


def by_head(x: Tensor) -> Tensor:
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)


def flex(gated: bool) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    """torch.compile(flex_attention) with the key-side bias: what a user would write (SPEC.md 0.1)."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        window, tokens = x.shape.window, x.shape.tokens
        mask = create_block_mask(
            lambda b, h, i, j: (j <= i) & (i - j < window), None, None, tokens, tokens, _compile=True
        )
        q, k, v, dout = (by_head(t) for t in (x.q, x.k, x.v, x.dout))
        bias = (-x.log_decay.detach().cumsum(1)).transpose(1, 2).contiguous().requires_grad_(gated)
        score = (lambda s, b, h, i, j: s + bias[b, h, j]) if gated else None
        compiled = torch.compile(flex_attention)
        leaves = [q, k, v, *([bias] if gated else [])]
        return (lambda: compiled(q, k, v, score_mod=score, block_mask=mask)), leaves, dout

    return make


def sdpa(kind: str) -> Callable[[Inputs], tuple[Call, list[Tensor], Tensor]]:
    """Full causal attention, for scale: its own FLOPs are counted."""

    def make(x: Inputs) -> tuple[Call, list[Tensor], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if x.shape.tokens > 65536:
            raise Skip("full attention over a million tokens")
        q, k, v, dout = (by_head(t) for t in (x.q, x.k, x.v, x.dout))

        def call() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, kind)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call, [q, k, v], dout

    return make


PEERS = (
    Peer("zoo", True, ours(True)),
    Peer("zoo no gate", False, ours(False)),
    Peer("flash-attention-4", False, flash_attention_4),
    Peer("fla forgetting", True, fla_forgetting),
    Peer("flex", True, flex(True)),
    Peer("flex no gate", False, flex(False)),
    Peer("cudnn full", False, sdpa("CUDNN_ATTENTION")),
    Peer("fa2 full", False, sdpa("FLASH_ATTENTION")),
)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def time_ms(call: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=MILLISECONDS, return_mode="median"))


def measure_attention(shape: Shape, peer: Peer) -> Iterable[dict[str, Any]]:
    """Rows for forward and backward of one peer on one shape."""
    call, leaves, dout = peer.make(Inputs.random(shape))
    pairs = visible_pairs(shape.tokens, None if peer.name.endswith("full") else shape.window)
    with torch.no_grad():
        forward = time_ms(call)
    out = call()
    backward = time_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    for what, ms, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        rate = factor / ms / 1e9
        yield {
            **{"peer": peer.name, "gated": peer.gated, "what": what, "ms": ms, **asdict(shape)},
            "tflops_exact": shape.flops(pairs) * rate,
            "tflops_tiles": shape.tiled * rate if not peer.name.endswith("full") else None,
        }


def measure_gate() -> Iterable[dict[str, Any]]:
    """Pre-activations to what the kernels eat, B 1, H 16, T 65,536; against torch.compile of the formula."""
    from zoo.kernels import gate

    z, u = (torch.randn(1, 65536, 16, device="cuda") for _ in range(2))
    formula = torch.compile(lambda z, u: ops.log_decay(z, u).cumsum(1))
    calls: dict[str, Call] = {
        "zoo": lambda: gate.prefix((z, u)),
        "compiled formula": lambda: formula(z, u),
        "eager formula": lambda: ops.log_decay(z, u).cumsum(1),
    }
    shape = {"batch": 1, "heads": 16, "tokens": 65536}
    for name, call in calls.items():
        yield {"peer": name, "what": "gate forward", "ms": time_ms(call), **shape}
    suffix, _ = gate.prefix((z, u))
    grad = torch.randn_like(suffix)
    yield {
        "peer": "zoo",
        "what": "gate backward",
        "ms": time_ms(lambda: gate.prefix_backward(grad, (z, u), None)),
        **shape,
    }


def measure_decode() -> Iterable[dict[str, Any]]:
    """One token over a full ring: bytes of keys, values and decays over time."""
    for batch, heads, kv_heads, slots, dim in ((64, 16, 16, 512, 128), (64, 16, 4, 512, 128), (1, 16, 16, 65536, 128)):
        q = torch.randn(batch, 1, heads, dim, device="cuda").bfloat16()
        k, v = (torch.randn(batch, slots, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
        decay = -torch.rand(batch, slots, heads, device="cuda")
        live = torch.full((batch,), slots, dtype=torch.int32, device="cuda")
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        attend: Any = partial(F.scaled_dot_product_attention, enable_gqa=heads != kv_heads)
        calls: dict[str, Call] = {
            "zoo": lambda: ops.ring_attention(q, k, v, decay, live),  # noqa: B023  timed at once
            "zoo no gate": lambda: ops.ring_attention(q, k, v, None, live),  # noqa: B023
            "sdpa no gate": lambda: attend(*heads_first),  # noqa: B023
        }
        for name, call in calls.items():
            ms = time_ms(call)
            moved = 2 * k.numel() * k.element_size() + (decay.numel() * 4 if name == "zoo" else 0)
            sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "slots": slots, "head_dim": dim}
            yield {"peer": name, "what": "decode", "ms": ms, "tb_per_s": moved / ms / 1e9, **sizes}


def one_round() -> list[dict[str, Any]]:
    """Everything once, in this process; what a peer cannot do is said on stderr."""
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for peer in PEERS:
            try:
                rows += measure_attention(shape, peer)
            except (ImportError, Skip, RuntimeError, NotImplementedError) as error:
                sys.stderr.write(f"{peer.name}, {shape}: left out, {type(error).__name__} {str(error)[:160]}\n")
            torch.cuda.empty_cache()
    return [*rows, *measure_gate(), *measure_decode()]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(out: Path, rounds: int = 3) -> str:
    """Test, measure `rounds` times in processes of their own, write bench.csv and bench.png to `out`; returns a table.

    Raises BenchError without a CUDA device, or when the kernels' tests are not there or do not pass.
    """
    if not torch.cuda.is_available():
        raise BenchError("zoo bench kernels measures a GPU, and torch finds none here")
    check_kernels()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(rounds):
        done = subprocess.run([sys.executable, "-m", "zoo.bench"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise BenchError(f"round {number + 1} of {rounds} failed with exit code {done.returncode}")
        rows += [{"round": number, **json.loads(line)} for line in done.stdout.splitlines()]
    write_csv(rows, out / "bench.csv")
    summary = summarise(rows)
    plot(summary, out / "bench.png")
    return table(summary)


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
    measured = {"ms", "tflops_exact", "tflops_tiles", "tb_per_s", "round"}
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


def table(summary: list[dict[str, Any]]) -> str:
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16"]
    for row in summary:
        place = " ".join(f"{k[0].upper() if k != 'kv_heads' else 'G'}{row[k]}" for k in SIZE_FIELDS if k in row)
        figures = [f"{row['ms']:.4f} ms"]
        figures += [f"{row['tflops_exact']:.0f} TFLOP/s"] if "tflops_exact" in row else []
        figures += [f"({row['tflops_tiles']:.0f} on tiles)"] if "tflops_tiles" in row else []
        figures += [f"{row['tb_per_s']:.2f} TB/s"] if "tb_per_s" in row else []
        lines.append(f"{row['what']:<14}{place:<32}{row['peer']:<20}{' '.join(figures)}  ±{50 * row['ms_spread']:.0f}%")
    return "\n".join(lines)


SIZE_FIELDS = ("batch", "heads", "kv_heads", "tokens", "slots", "head_dim", "window")


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s on exact pairs over the shapes, a panel each for forward and backward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, what in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        rows = [row for row in summary if row["what"] == what]
        shapes = list(dict.fromkeys((row["tokens"], row["head_dim"], row["window"]) for row in rows))
        for peer in dict.fromkeys(row["peer"] for row in rows):
            known = {(r["tokens"], r["head_dim"], r["window"]): r["tflops_exact"] for r in rows if r["peer"] == peer}
            axes.plot(range(len(shapes)), [known.get(shape) for shape in shapes], marker="o", label=peer)
        axes.set_xticks(range(len(shapes)), [f"T {t}\nD {d} W {w}" for t, d, w in shapes])
        axes.set_ylabel(f"{what}, TFLOP/s on exact pairs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    backend.choose("window", torch.device("cuda"), torch.bfloat16, 64)
    for measured in one_round():
        sys.stdout.write(json.dumps(measured) + "\n")
