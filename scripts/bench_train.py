"""Times training steps of a 125M-class language model on a CUDA device: zoo's loop beside plain-torch peers.

    python scripts/bench_train.py                          every arm at T 4096 and 16384, 65,536 tokens a step
    python scripts/bench_train.py --arms gatedfwa flex     some of them
    python scripts/bench_train.py --arms gatedfwa+narrow --tokens 1048576 --budget 1048576 --micro 1 --steps 4
    python scripts/bench_train.py --arms gatedfwa --tokens 4096 --profile    where a step's time goes, kernel by kernel
    python scripts/bench_train.py --arms gatedfwa+sync     an error if a step waits for the device
    python scripts/bench_train.py --tokens 1024 --budget 16384 --curves \
        gatedfwa+narrow gatedfwa+narrow+reference+eager gatedfwa+reference+eager+fp32
                                                           losses over 200 steps: kernels, plain torch uncompiled in
                                                           bfloat16, and in float32, which both should be near

12 layers, 768 wide, 12 heads of 64, vocabulary 50304 tied, window 512, bfloat16 autocast, fused AdamW, compiled. Our
arms run zoo.train.train on random tokens, reading, logging and all; peers run the least loop that trains. Every arm is
a process of its own, with a time limit. Prints one JSON object a line: tokens/s (median over the steps after the
warm-up), peak GiB. `arm+variant+variant` times an arm with something changed: see `VARIANTS` and `CHANGES`.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, VOCABULARY, WINDOW = 768, 12, 12, 50304, 512
WARM = 10  # steps before the clock counts, or half of all

# ------------------------------------------------------------------------------------------------------------ variants


def put(owner: Any, name: str, value: Any) -> None:
    """Replaces what is there: a name that has gone is an error, not a variant that changes nothing."""
    if not hasattr(owner, name):
        raise AttributeError(f"{getattr(owner, '__name__', owner)} has no {name!r} to replace")
    setattr(owner, name, value)


def _f32_gates() -> None:
    from zoo.ops import linear

    put(linear, "in_pieces", lambda x: False)


def _inline_rotary() -> None:
    from zoo import backbone
    from zoo.ops import rotary

    put(backbone, "rotary_table", rotary._rotary_table._init_fn)


def _loss_rows(rows: int) -> Callable[[], None]:
    def apply() -> None:
        from zoo.ops import loss

        put(loss, "CHUNK_ELEMENTS_GPU", rows * VOCABULARY)

    return apply


def _inductor_swiglu() -> None:
    from zoo import layers

    def plain(packed: Tensor) -> Tensor:
        value, gate = packed.chunk(2, dim=-1)
        return F.silu(gate) * value

    put(layers, "swiglu", plain)


def _inductor_qkv() -> None:
    from zoo.mixers.attention import Attention
    from zoo.mixers.base import Context

    def prepare(self: Any, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Any]:
        from zoo.layers import apply_rotary

        q, k, v = self._project(x)
        k, v = self._shift(x, k, v, ctx, None)
        q, k = self._normalise(q, self.q_norm), self._normalise(k, self.k_norm)
        q, k = apply_rotary(q, ctx.rotary), apply_rotary(k, ctx.rotary)  # type: ignore[arg-type]
        return q.to(v.dtype), k.to(v.dtype), v, None if self.gate is None else self.gate(x)

    put(Attention, "_prepare", prepare)


def _rounded_gradients() -> None:
    from zoo.layers import Linear

    put(Linear, "forward", nn.Linear.forward)


def _sum_loss() -> None:
    from zoo.ops import linear

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        total += a @ b

    put(linear, "add_product", add_product)


def _reread_loss() -> None:
    from zoo.kernels import hopper_loss, loss

    put(loss, "HELD", 0)
    put(hopper_loss, "takes", lambda logits: False)


def _blocks() -> None:
    from zoo.train import parallel

    def trainer_of(self: Any, model: nn.Module, compiled: bool) -> nn.Module:
        for block in parallel.blocks_of(model) if compiled else []:
            block.compile()
        return model

    put(parallel.Ranks, "trainer_of", trainer_of)


def _inductor(**values: Any) -> Callable[[], None]:
    def apply() -> None:
        from torch._inductor import config

        for name, value in values.items():
            put(config, name, value)

    return apply


def _no_sync() -> None:
    """An error where the host waits for the device inside a step, once the first few have compiled."""
    from zoo.train import loop

    step = loop._step

    def watched(state: Any, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if state.step >= 5 else "default")
        try:
            return step(state, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    put(loop, "_step", watched)


# What can be changed in an arm of ours
VARIANTS: dict[str, Callable[[], None]] = {
    "f32gates": _f32_gates,  # gate and token shift projected in float32, off the tensor cores
    "inductorswiglu": _inductor_swiglu,  # the compiler makes SwiGLU's product
    "inductorqkv": _inductor_qkv,  # the compiler shifts, normalises and rotates
    "roundedgradients": _rounded_gradients,  # weights' gradients leave their products in bfloat16
    "sumloss": _sum_loss,  # the weight's gradient in the loss is added up apart from its products
    "rereadloss": _reread_loss,  # the loss's rows are read twice, not held in registers
    "inlinerotary": _inline_rotary,  # the compiler sees how rotary angles are computed
    "rows5632": _loss_rows(5632),  # tokens whose logits stand at once; 5632 * 768 is a whole wave of 132 tiles
    "rows8192": _loss_rows(8192),
    "blocks": _blocks,  # one process compiles block by block, as several do
    "autotune": _inductor(max_autotune=True),
    "descent": _inductor(coordinate_descent_tuning=True),
    "sync": _no_sync,
    "reference": lambda: os.environ.update(ZOO_BACKEND="reference"),
    "triton": lambda: os.environ.update(ZOO_BACKEND="triton"),
}

CHANGES: dict[str, dict[str, Any]] = {  # of the recipe
    "eager": {"train": {"compile": False}},  # with `reference`: plain torch and nothing else
    "fp32": {"train": {"precision": "fp32"}},
    "graph": {"train": {"graph": True}},
    "narrow": {"model": {"backbone": {"residual": "autocast"}}},  # the residual stream in bfloat16
}

# ------------------------------------------------------------------------------------------------------------ our arms


SHAPES: dict[str, dict[str, Any]] = {  # of an arm `name-shape`; without one it is that of GPT-2 small
    "": {},
    "wide": {"width": 1024, "heads": 16, "kv_heads": 1, "depth": 12},  # of fla's NSA
    "8m": {"width": 256, "heads": 4, "depth": 8},
    "1b": {"width": 1792, "heads": 28, "depth": 24},  # 0.93 G parameters in blocks, 0.09 G in the embedding
}


def zoo_overrides(arm: str, tokens: int) -> tuple[str, dict[str, Any]]:
    """(model name, overrides) of an arm."""
    name, _, shape = arm.partition("-")
    backbone: dict[str, Any] = {"mixer": {"gate_bias": 2.0}} if name.startswith("gatedfwa") else {}
    backbone |= SHAPES[shape]
    if tokens > 1 << 18:
        backbone |= {"checkpoint": True, "mlp_chunk": 65536}
    return f"text_{name}_125m", {"backbone": backbone}


def apply(variants: list[str]) -> list[dict[str, Any]]:
    """Makes the changes that are made in the code; returns those of the recipe. Exits with a name that is none."""
    if unknown := [name for name in variants if name not in VARIANTS and name not in CHANGES]:
        raise SystemExit(f"{'+'.join(unknown)}: the variants are {', '.join([*VARIANTS, *CHANGES])}")
    for name in variants:
        if name in VARIANTS:
            VARIANTS[name]()
    return [CHANGES[name] for name in variants if name in CHANGES]


def recipe_of(arm: str, tokens: int, budget: int, micro: int, steps: int, changes: list[dict[str, Any]]) -> Any:
    """The zoo.train.Recipe of an arm on made-up tokens."""
    from zoo import config, registry
    from zoo.data import SourceStream, Windows
    from zoo.task import Task
    from zoo.train import Recipe

    @dataclass
    class RandomConfig:
        context: int = tokens

    class RandomTask(Task):
        """Made-up tokens, read as a corpus is."""

        domain, Config = "random", RandomConfig

        def __init__(self, config: RandomConfig, assets: Path | None = None):
            self.config = config

        def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
            generator = torch.Generator().manual_seed(0)
            corpus = (torch.rand(64 * budget + 2, generator=generator) ** 4 * VOCABULARY).int()
            corpus[1::2] = corpus[0::2]  # some tokens are common, and every other one repeats: there is a loss to lower
            source = Windows(corpus.numpy(), self.config.context, seed=seed)
            return SourceStream(source, batch_size=batch_size, rank=rank, world=world)

    registry.tasks.register("random", replace=True)(RandomTask)
    model, overrides = zoo_overrides(arm, tokens)
    train = {
        "steps": steps,
        "batch_size": budget // tokens,
        "micro_batch_size": micro,
        "precision": "bf16",
        "compile": True,
        "log_every": 1,
        "save_every": 0,
        "optimizer": {"lr": 3e-4},
        "schedule": {"warmup": 20},
    }
    recipe = {"task": {"name": "random"}, "model": {"name": model, **overrides}, "train": train}
    return config.build(Recipe, recipe, *changes)


def run_zoo(arm: str, tokens: int, budget: int, micro: int, steps: int, profile: bool) -> dict[str, Any]:
    arm, *variants = arm.split("+")
    recipe = recipe_of(arm, tokens, budget, micro, steps, apply(variants))
    from zoo.train import train

    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder) / "run", profile=profile)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        table = kernel_table(Path(folder) / "run" / "profile" / "trace-rank0.json") if profile else {}
    late = [row for row in rows if row["step"] > warm_steps(steps)]
    rates = [row["tokens_per_second"] for row in late]
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "mfu": round(statistics.median(row.get("mfu", 0.0) for row in late), 3),
        "losses": [round(row["train/loss"], 4) for row in rows],
    } | table


def warm_steps(steps: int) -> int:
    return min(WARM, steps // 2)


# ------------------------------------------------------------------------------------------------------------- profile

KINDS = (  # the first that fits a kernel's name
    ("copies", r"^Memcpy|^Memset|copy_kernel"),
    ("loss rows", r"^cross_entropy"),
    ("inductor", r"^triton_"),
    ("GEMM float32", r"sgemm|simt|gemmSN|gemv|ffma|f32f32_f32f32|_sss_|tf32"),
    ("GEMM", r"nvjet|gemm|cutlass|xmma|splitK|cublas"),
    ("optimizer", r"multi_tensor_apply|[Ff]used_?[Aa]dam"),
    ("eager", r"at::native|^void at"),
    ("zoo kernels", r"^_|^(swiglu|qkv|narrow|forward|dq|dkv)_"),
)


def kernel_table(trace: Path) -> dict[str, Any]:
    """ms a step by kind of kernel, those of the 25 costliest kernels, and how long the device had nothing to do."""
    from zoo.train.profile import ACTIVE

    events = json.loads(trace.read_text())["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels, calls, kinds = Counter[str](), Counter[str](), Counter[str]()
    idle, until = 0.0, min(e["ts"] for e in work)
    for event in sorted(work, key=lambda e: e["ts"]):
        idle += max(0.0, event["ts"] - until)
        until = max(until, event["ts"] + event["dur"])
        name = event["name"]
        kernels[name] += event["dur"]
        calls[name] += 1
        kinds[next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")] += event["dur"]

    def per_step(microseconds: float) -> float:
        return round(microseconds / 1000 / ACTIVE, 2)

    top = [f"{per_step(time):6} ms {calls[name] / ACTIVE:5.0f}x {name[:90]}" for name, time in kernels.most_common(25)]
    return {"kinds": {kind: per_step(t) for kind, t in kinds.most_common()}, "idle": per_step(idle), "top": top}


# --------------------------------------------------------------------------------------------------------------- peers


class PlainBlock(nn.Module):
    """What one writes in plain torch: pre-norm, rotary positions, SwiGLU."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attend = attend
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4096, bias=False), nn.Linear(2048, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (y.chunk(2, -1) for y in (q, k)))
        x = x + self.out(self.attend(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class PlainModel(nn.Module):
    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(PlainBlock(attend) for _ in range(DEPTH))
        self.norm = nn.RMSNorm(WIDTH)
        half = WIDTH // HEADS // 2
        angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def plain(arm: str, tokens: int) -> nn.Module:
    if arm == "sdpa":
        return PlainModel(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tokens)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < WINDOW), None, None, tokens, tokens, "cuda")
    return PlainModel(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), tokens)


class FlaNSA(nn.Module):
    """fla's own model, 1024 wide: its kernels take 16 query heads a kv head."""

    def __init__(self) -> None:
        super().__init__()
        from fla.models import NSAConfig, NSAForCausalLM  # type: ignore[import-not-found]

        shape = {"hidden_size": 1024, "num_hidden_layers": 12, "num_heads": 16, "num_kv_heads": 1, "head_dim": 64}
        options = {"block_size": 64, "block_counts": 16, "window_size": 0, "tie_word_embeddings": True}
        self.model = NSAForCausalLM(NSAConfig(**shape, **options, vocab_size=VOCABULARY, use_cache=False))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        labels = torch.cat((inputs[:, :1], targets[:, :-1]), 1)  # it shifts by itself
        return self.model(input_ids=inputs, labels=labels).loss


def run_peer(arm: str, tokens: int, budget: int, micro: int, steps: int) -> dict[str, Any]:
    with torch.device("cuda"):
        model: Any = FlaNSA() if arm == "fla_nsa" else plain(arm, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    forward = model if arm == "fla_nsa" else torch.compile(model)
    inputs, targets = torch.randint(0, VOCABULARY, (2, budget // tokens, tokens), device="cuda")
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.monotonic()
        for part in range(0, len(inputs), micro):
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(inputs[part : part + micro], targets[part : part + micro])
            (loss * micro / len(inputs)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return {"tokens_per_second": round(budget / statistics.median(times[warm_steps(steps) :]))}


# ---------------------------------------------------------------------------------------------------------------- runs


def run_arm(options: argparse.Namespace, arm: str, tokens: int) -> dict[str, Any]:
    micro = options.micro or max(1, min(32768, options.budget) // tokens)
    peer = arm in ("sdpa", "flex", "fla_nsa")
    if peer and not options.micro:
        micro = options.budget // tokens  # as ANCHORS.md measured them
    size = (arm, tokens, options.budget, micro, options.steps)
    found = run_peer(*size) if peer else run_zoo(*size, profile=options.profile)
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {"arm": arm, "tokens": tokens, "budget": options.budget, "micro": micro, **found, "peak_gib": peak}


def in_a_process(options: argparse.Namespace, arm: str, tokens: int) -> dict[str, Any]:
    """What `run_arm` finds, or what went wrong."""
    sizes = {"tokens": tokens, "budget": options.budget, "micro": options.micro, "steps": options.steps}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--here", "--arms", arm, *flags, *(["--profile"] if options.profile else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"arm": arm, "tokens": tokens, "error": f"no end after {options.limit} s"}
    if done.returncode:
        return {"arm": arm, "tokens": tokens, "error": done.stderr[-600:]}
    return json.loads(done.stdout.splitlines()[-1])


def say(found: dict[str, Any]) -> None:
    found.pop("losses", None)
    top = found.pop("top", [])
    sys.stdout.write("\n".join([json.dumps(found), *top]) + "\n")
    sys.stdout.flush()


def compare_curves(options: argparse.Namespace) -> None:
    """Losses of each step beside each other: of any two arms their largest and mean difference, and how much higher the
    first is on average; every 20th loss. All arms run at once: their speed means nothing."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda arm: in_a_process(options, arm, options.tokens[0]), options.curves))
    curves = {arm: one["losses"] for arm, one in zip(options.curves, found, strict=True) if "losses" in one}
    for one in found:
        say(one)
    for arm, losses in curves.items():
        say({"arm": arm, "steps": len(losses), "every_20th": losses[::20]})
    for (arm, losses), (other, others) in itertools.combinations(curves.items(), 2):
        higher = [a - b for a, b in zip(losses, others, strict=True)]
        apart = [abs(x) for x in higher]
        row = {"largest": max(apart), "mean": statistics.mean(apart), "higher": statistics.mean(higher)}
        say({"arms": [arm, other], **{name: round(value, 5) for name, value in row.items()}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = ["gatedfwa", "sdpa", "flex", "gatedfwa_nsa", "gatedfwa_nsa-wide", "fla_nsa"]
    parser.add_argument("--arms", nargs="*", default=arms, help=f"variants of ours: {', '.join([*VARIANTS, *CHANGES])}")
    parser.add_argument("--curves", nargs="+", help="arms whose losses to compare over 200 steps, instead of speed")
    parser.add_argument("--limit", type=float, default=180, help="seconds an arm may take")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--budget", type=int, default=65536, help="tokens a step")
    parser.add_argument("--micro", type=int, default=0, help="rows a micro-batch; 0: 32,768 tokens, all for the peers")
    parser.add_argument("--steps", type=int, default=0, help="0: 40, or 200 for curves")
    parser.add_argument("--profile", action="store_true", help="of our arms: where the time goes")
    parser.add_argument("--here", action="store_true", help="one arm, in this process")
    options = parser.parse_args()
    options.steps = options.steps or (200 if options.curves else 40)
    if options.here:
        sys.stdout.write(json.dumps(run_arm(options, options.arms[0], options.tokens[0])) + "\n")
    elif options.curves:
        compare_curves(options)
    else:
        for tokens in options.tokens:
            for arm in options.arms:
                say(in_a_process(options, arm, tokens))


if __name__ == "__main__":
    main()
