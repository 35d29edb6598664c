"""Times our kernels part by part in one process, for comparing trees.

    python scripts/time_kernels.py --tree DIR --name NAME >> times.txt     once or more for each tree, in turn
    python scripts/time_kernels.py --table times.txt [--parts]             medians side by side

DIR holds another tree's `zoo` (git archive main zoo | tar -x -C DIR). Prints a line per figure: median milliseconds of
do_bench, and for the backward the time on the device of each kernel in it. Run all trees several times in turn: the
same kernel differs by up to 10% between processes.
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1])
parser.add_argument("--name", default="this")
parser.add_argument("--only", choices=["window", "gate", "step"], help="one part; all by default")
parser.add_argument("--shapes", default="", help="regular expression: of 'T16k D64 W512 gate' and so on, which")
parser.add_argument("--ms", type=int, default=40, help="of repeats behind each median")
parser.add_argument("--table", type=Path, help="no timing: medians of such lines, a column each name")
parser.add_argument("--parts", action="store_true", help="in the table, the single kernels of a backward too")
arguments = parser.parse_args()
sys.path.insert(0, str(arguments.tree.resolve()))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from zoo import ops  # noqa: E402
from zoo.kernels import gate, hopper_backward  # noqa: E402
from zoo.ops import backend  # noqa: E402
from zoo.ops.loss import chunk_rows  # noqa: E402

SHAPES = [(4, 16, 16384, dim, window) for dim in (64, 128) for window in (512, 1024, 2048)]
SHAPES += [(1, 4, 1 << 20, dim, 512) for dim in (64, 128)]


def table(lines: list[str], parts: bool) -> str:
    """Milliseconds by what was timed, a column each name; then how much faster each is than the first."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        name, what, ms = line[:6].strip(), line[6:50].rstrip(), float(line[50:58])
        if parts or "  " not in what:
            times[what][name].append(ms)
    names = list(dict.fromkeys(line[:6].strip() for line in lines))
    rows = [f"{'':<44}" + "".join(f"{name:>9}" for name in [*names, *names[1:]])]
    for what, by_name in times.items():
        medians = [statistics.median(by_name[name]) if name in by_name else float("nan") for name in names]
        gains = "".join(f"{medians[0] / ms:8.3f}x" if ms else f"{'':9}" for ms in medians[1:])
        rows.append(f"{what:<44}" + "".join(f"{ms:9.4f}" for ms in medians) + gains)
    return "\n".join(rows)


def say(what: str, ms: float, note: str = "") -> None:
    sys.stdout.write(f"{arguments.name[:5]:<6}{what[:43]:<44}{ms:8.4f} ms  {note}\n")
    sys.stdout.flush()


def median(call) -> float:
    return float(do_bench(call, warmup=10, rep=arguments.ms, return_mode="median"))


def on_device(call, repeats: int = 10) -> dict[str, float]:
    """Milliseconds of each kernel in one call, by the profiler."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.self_device_time_total > 0:  # the host's own events stand in the list too
            times[event.key[:40]] += event.self_device_time_total / repeats / 1e3
    return dict(times)


def window() -> None:
    for batch, heads, tokens, dim, width in SHAPES:
        generator = torch.Generator("cuda").manual_seed(0)
        size = (batch, tokens, heads, dim)
        q, k, v, dout = (torch.randn(size, device="cuda", generator=generator).bfloat16() for _ in range(4))
        decay = F.logsigmoid(4 + torch.randn(size[:3], device="cuda", generator=generator))
        flops = 4.0 * batch * heads * dim * (tokens * width - width * (width - 1) / 2)
        for gated in (True, False):
            name = f"T{tokens >> 10}k D{dim} W{width} {'gate' if gated else 'none'}"
            if not re.search(arguments.shapes, name):
                continue
            leaves = [x.requires_grad_() for x in (q, k, v, *([decay] if gated else []))]
            gates = decay if gated else None

            forward = partial(ops.window_attention, q, k, v, gates, window=width)
            with torch.no_grad():
                ms = median(forward)
            say(f"{name} forward", ms, f"{flops / ms / 1e9:.0f} TFLOP/s")
            out = forward()
            backward = partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
            ms = median(backward)
            say(f"{name} backward", ms, f"{2.5 * flops / ms / 1e9:.0f} TFLOP/s")
            parts = on_device(backward)
            main = sum(ms for key, ms in parts.items() if key.startswith(("dq_kernel", "dkv_kernel")))
            say(f"{name} dq + dkv kernels", main, f"{2.5 * flops / main / 1e9:.0f} TFLOP/s")
            for key, part in sorted(parts.items(), key=lambda pair: -pair[1]):
                say(f"{name}   {key}", part)


def preprocessing() -> None:
    z, u = torch.randn(2, 1, 65536, 16, device="cuda").unbind()
    suffix, _ = gate.prefix((z, u))
    grad = torch.randn_like(suffix)
    sides = (grad, grad) if hasattr(gate, "SEGMENTS") else (grad,)
    for what, call in (
        ("gate forward", partial(gate.prefix, (z, u))),
        ("gate backward", partial(gate.prefix_backward, *sides, (z, u), None)),
    ):
        say(f"{what} B1 H16 T65536", median(call))
        for key, part in on_device(call).items():
            say(f"  {key}", part)


def step() -> None:
    """The kernels around the products in a training step of 125M, 32,768 tokens each, through the operators: alike in
    every tree. GB/s of the bytes that must be read or written once."""
    rows, heads, dim, hidden, vocabulary = 32768, 12, 64, 2048, 50304
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(size, device="cuda", generator=generator).to(dtype)

    def report(what: str, call: Callable[[], object], size: float) -> None:
        ms = median(call)
        say(f"step {what}", ms, f"{size / ms / 1e6:.0f} GB/s")
        for key, part in sorted(on_device(call).items(), key=lambda pair: -pair[1]):
            say(f"step {what}   {key}", part)

    packed, grad = normal(rows, 2 * hidden), normal(rows, hidden)
    with torch.no_grad():
        report("swiglu forward", partial(torch.ops.zoo.swiglu, packed), rows * hidden * 6)
        report("swiglu backward", partial(torch.ops.zoo.swiglu_backward, grad, packed), rows * hidden * 10)
    del packed, grad

    qkv, grads = normal(8, rows // 8, 3 * heads, dim), [normal(8, rows // 8, heads, dim) for _ in range(3)]
    gates, keep = (normal(8, rows // 8, 2 * heads, dtype=torch.float32) for _ in range(2))
    weights = [torch.ones(1, heads * dim, device="cuda") for _ in range(2)]
    table = ops.rotary_table(torch.arange(rows // 8, device="cuda").unsqueeze(0), dim, 10000.0)
    rest = (qkv, keep, *weights, *table, None, heads, False, 1e-6)
    kernels, width = backend.choose("qkv", qkv.device, qkv.dtype, dim), 3 * heads * dim + 4 * heads
    with torch.no_grad():
        report("qkv forward", partial(kernels.prepare_forward, *rest), qkv.numel() * 4)
        report("qkv backward", partial(kernels.prepare_backward, *grads, gates, *rest, width), qkv.numel() * 6)
    del qkv, grads

    x = normal(rows, heads * dim, dtype=torch.float32)
    for width in (24, 48):  # gate or shift; both
        weight = normal(width, heads * dim, dtype=torch.float32)
        with torch.no_grad():
            report(f"narrow {width}", partial(torch.ops.zoo.piecewise_linear, x.bfloat16(), x, weight), x.numel() * 4)
    del x

    chunk = chunk_rows(normal(1, 1), vocabulary)
    logits, targets = normal(chunk, vocabulary), torch.randint(vocabulary, (chunk,), device="cuda")
    rows_of_loss = backend.choose("loss", logits.device, logits.dtype, backend.NO_HEADS).cross_entropy_rows
    report("loss rows", partial(rows_of_loss, logits, targets, -100, True), logits.numel() * 4)


if __name__ == "__main__":
    if arguments.table is not None:
        sys.exit(print(table(arguments.table.read_text("utf-8").splitlines(), arguments.parts)))
    assert backend.explain("window", "cuda", torch.bfloat16, 64)[0] == "hopper", "needs a Hopper card"
    assert Path(hopper_backward.__file__).is_relative_to(arguments.tree.resolve()), "another tree came first"
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    ms = median(partial(torch.matmul, x, x))
    say("matmul 8192", ms, f"{2 * 8192**3 / ms / 1e9:.0f} TFLOP/s")
    for part, run in (("gate", preprocessing), ("step", step), ("window", window)):
        if arguments.only in (None, part):
            run()
