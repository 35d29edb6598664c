"""Times training steps of a 125M-class language model on a CUDA device: zoo's loop beside plain-torch peers.

    python scripts/bench_train.py                          every arm at T 4096 and 16384, 65,536 tokens a step
    python scripts/bench_train.py --arms gatedfwa flex     some of them
    python scripts/bench_train.py --arms gatedfwa --tokens 1048576 --budget 1048576 --micro 1    a million tokens a row

12 layers, 768 wide, 12 heads of 64, vocabulary 50304 tied, window 512, bfloat16 autocast, fused AdamW, compiled. Our
arms run zoo.train.train on random tokens, reading, logging and all; peers run the least loop that trains. Every arm is
a process of its own. Prints one JSON object a line: tokens/s (median over the steps after the warm-up), peak GiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, VOCABULARY, WINDOW = 768, 12, 12, 50304, 512
WARM = 10  # steps before the clock counts

# ------------------------------------------------------------------------------------------------------------ our arms


def zoo_overrides(arm: str, tokens: int) -> tuple[str, dict[str, Any]]:
    """(model name, overrides) of an arm; `name-wide` has the shape of fla's NSA: 1024 wide, 16 heads on one kv head."""
    name, _, variant = arm.partition("-")
    backbone: dict[str, Any] = {"mixer": {"gate_bias": 2.0}} if name.startswith("gatedfwa") else {}
    if variant == "wide":
        backbone |= {"width": 1024, "heads": 16, "kv_heads": 1, "depth": 12}
    if tokens > 1 << 18:
        backbone |= {"checkpoint": True, "mlp_chunk": 16384}
    return f"text_{name}_125m", {"backbone": backbone}


def run_zoo(arm: str, tokens: int, budget: int, micro: int, steps: int, profile: bool) -> dict[str, Any]:
    from zoo import config, registry
    from zoo.data import SourceStream, Windows
    from zoo.task import Task
    from zoo.train import Recipe, train

    @dataclass
    class RandomConfig:
        context: int = tokens

    class RandomTask(Task):
        """Tokens without a meaning, read as a corpus is."""

        domain, Config = "random", RandomConfig

        def __init__(self, config: RandomConfig, assets: Path | None = None):
            self.config = config

        def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
            corpus = torch.randint(0, VOCABULARY, (64 * budget + 1,), dtype=torch.int32).numpy()
            source = Windows(corpus, self.config.context, seed=seed)
            return SourceStream(source, batch_size=batch_size, rank=rank, world=world)

    registry.tasks.register("random")(RandomTask)
    model, overrides = zoo_overrides(arm, tokens)
    recipe = config.build(
        Recipe,
        {
            "task": {"name": "random"},
            "model": {"name": model, **overrides},
            "train": {
                "steps": steps,
                "batch_size": budget // tokens,
                "micro_batch_size": micro,
                "precision": "bf16",
                "compile": True,
                "log_every": 5,
                "save_every": 0,
                "optimizer": {"lr": 3e-4},
                "schedule": {"warmup": 20},
            },
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder) / "run", profile=profile)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["tokens_per_second"] for row in rows if row["step"] > WARM]
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "spread": round((max(rates) - min(rates)) / statistics.median(rates), 3),
        "mfu": round(statistics.median(row.get("mfu", 0.0) for row in rows if row["step"] > WARM), 3),
        "losses": [round(row["train/loss"], 4) for row in rows],
    }


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
    return {"tokens_per_second": round(budget / statistics.median(times[WARM:]))}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = ["gatedfwa", "sdpa", "flex", "gatedfwa_nsa", "gatedfwa_nsa-wide", "fla_nsa"]
    parser.add_argument("--arms", nargs="*", default=arms)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--budget", type=int, default=65536, help="tokens a step")
    parser.add_argument("--micro", type=int, default=0, help="rows a micro-batch; 0: 32,768 tokens, all for the peers")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="with --here, of our arms: where the time goes")
    parser.add_argument("--here", action="store_true", help="one arm, in this process")
    options = parser.parse_args()
    if options.here:
        sys.stdout.write(json.dumps(run_arm(options, options.arms[0], options.tokens[0])) + "\n")
        return
    for tokens in options.tokens:
        for arm in options.arms:
            sizes = {"tokens": tokens, "budget": options.budget, "micro": options.micro, "steps": options.steps}
            flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, __file__, "--here", "--arms", arm, *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            failed = json.dumps({"arm": arm, "tokens": tokens, "error": done.stderr[-1500:]}) + "\n"
            sys.stdout.write(failed if done.returncode else done.stdout.splitlines()[-1] + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
