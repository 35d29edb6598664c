"""What pruning gains at the gate statistics of a trained model, and what it costs, beside the proven bound.

    python scripts/measure_pruning.py runs/text-tinyshakespeare --window 2048 --prune 1e-3 --out pruning.jsonl

Long rows of held-out text go through a run's model; what each gated layer hands to its attention (q, k, v, log_decay)
is taken as it is and attended to at `--window`, whichever window the model was trained with: with and without pruning,
and without the gate, forward and backward. The error is taken in float64; the bound is the theorem's
(zoo/ops/prune.py). Times are medians on all rows in the run's precision, over `--rounds`.
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zoo import ops
from zoo.bench import queued_ms
from zoo.model import Context, Model
from zoo.ops.prune import KEPT_TILE, kept_tiles
from zoo.train import autocast, load_run, pick_device

EXACT = 4096  # tokens of the row whose error is taken
FORMS = ("full", "pruned", "ungated")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of a text model")
    parser.add_argument("--split", default="test")
    parser.add_argument("--tokens", type=int, default=16384, help="of each row")
    parser.add_argument("--rows", type=int, default=4, help="spread over the split; they overlap where it is short")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--prune", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="default: the GPU where there is one; on a CPU nothing is timed")
    parser.add_argument("--out", type=Path, help="JSON rows, one a layer and one for all of them")
    return parser.parse_args()


def held_out_rows(task: Any, args: argparse.Namespace) -> Tensor:
    """(rows, tokens) int64."""
    stream = torch.from_numpy(task.tokens(args.split)).long()
    if len(stream) < args.tokens:
        raise SystemExit(f"--tokens = {args.tokens}; split {args.split} has {len(stream)}")
    begins = torch.linspace(0, len(stream) - args.tokens, args.rows).long().tolist()
    return torch.stack([stream[begin : begin + args.tokens] for begin in begins])


@torch.no_grad()
def what_layers_attend_to(model: Model, tokens: Tensor, precision: str) -> list[tuple[Tensor, ...]]:
    """q, k, v, log_decay of every gated layer."""
    taken: list[tuple[Tensor, ...]] = []
    attend = ops.gated_window_attention

    def note(q: Tensor, k: Tensor, v: Tensor, z: Tensor, u: Tensor, **options: Any) -> Tensor:
        taken.append((q.detach(), k.detach(), v.detach(), ops.log_decay(z, u).detach()))
        return attend(q, k, v, z, u, **options)

    with mock.patch.object(ops, "gated_window_attention", note), autocast(precision, tokens.device):
        h, _ = model.head.embed(tokens, Context())
        model.hidden(h, Context())
    if not taken:
        raise SystemExit("the model has no gated layer")
    return taken


def tiles(q: Tensor, k: Tensor, decay: Tensor, window: int, prune: float) -> dict[str, Any]:
    """How many key tiles the query tiles see, and how many of them are skipped."""
    first, _ = kept_tiles(q, k, (decay,), window=window, scale=q.shape[-1] ** -0.5, prune=prune)
    tile = torch.arange(first.shape[-1], device=first.device)
    oldest = (tile * KEPT_TILE - window + 1).clamp(min=0) // KEPT_TILE
    seen, kept = (tile - oldest + 1).expand_as(first), tile - torch.maximum(first, oldest) + 1
    return {
        "tiles_skipped": 1 - float(kept.sum() / seen.sum()),
        "tiles_skipped_of_heads": [round(1 - float(x), 3) for x in kept.sum((0, 2)) / seen.sum((0, 2))],
        "tiles_kept_per_query_tile": float(kept.double().mean()),
    }


def gate_statistics(decay: Tensor) -> dict[str, Any]:
    """Of -log_decay, the nats forgotten at each token."""
    alpha = -decay.float()
    levels = torch.tensor([0.1, 0.5, 0.9], device=decay.device)
    quantiles = alpha.flatten()[:: max(1, alpha.numel() // 1_000_000)].quantile(levels)
    return {
        "nats_per_token": float(alpha.mean()),
        "nats_per_token_of_heads": [round(float(x), 4) for x in alpha.mean((0, 1))],
        "nats_quantiles_10_50_90": [round(float(x), 4) for x in quantiles],
    }


@torch.no_grad()
def errors(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, window: int, prune: float) -> dict[str, float]:
    """Of the first row's first EXACT tokens in float64, where rounding hides nothing."""
    wide = [x[:1, :EXACT].double() for x in (q, k, v)] + [decay[:1, :EXACT].float()]
    out, lse = ops.window_attention(*wide, window=window, return_lse=True)
    less, less_lse = ops.window_attention(*wide, window=window, return_lse=True, prune=prune)
    return {
        "error": float((less - out).norm(dim=-1).max()),
        "error_bound": 2 * prune * float(wide[2].norm(dim=-1).max()),
        "lse_error": float((lse - less_lse).max()),
        "lse_bound": -math.log1p(-prune),
    }


def times(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, window: int, prune: float, rounds: int) -> dict[str, float]:
    """Milliseconds on the device, forward and backward, with all tiles, pruned, and without a gate; and of choosing the
    tiles, which the pruned forward holds."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, decay)]
    calls: dict[str, Any] = {
        "choice": partial(kept_tiles, q, k, (decay,), window=window, scale=q.shape[-1] ** -0.5, prune=prune)
    }
    for name, some, share in (("full", leaves, None), ("pruned", leaves, prune), ("ungated", leaves[:3], None)):
        fixed = [x.detach() for x in some]
        calls[f"{name}_forward"] = partial(ops.window_attention, *fixed, window=window, prune=share)
        out = ops.window_attention(*some, window=window, prune=share)
        calls[f"{name}_backward"] = partial(torch.autograd.grad, out, some, torch.randn_like(out), retain_graph=True)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(queued_ms(call)[0])
    return {f"{name}_ms": statistics.median(values) for name, values in taken.items()}


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all layers: times summed, shares averaged, the largest error and the largest bound."""
    names = ("nats_per_token", "tiles_skipped", "tiles_kept_per_query_tile")
    total: dict[str, Any] = {name: statistics.mean(row[name] for row in rows) for name in names}
    total |= {name: max(row[name] for row in rows) for name in ("error", "error_bound", "lse_error", "lse_bound")}
    total |= {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_ms")}
    return {**total, **gains(total), "layer": "all"}


def gains(row: dict[str, Any]) -> dict[str, float]:
    if "full_forward_ms" not in row:
        return {}
    forward = row["full_forward_ms"] / row["pruned_forward_ms"]
    backward = row["full_backward_ms"] / row["pruned_backward_ms"]
    full, pruned, ungated = (row[f"{name}_forward_ms"] + row[f"{name}_backward_ms"] for name in FORMS)
    return {
        **{"gain_forward": forward, "gain_backward": backward, "gain": full / pruned},
        "gain_over_ungated": ungated / pruned,
    }


def line(row: dict[str, Any]) -> str:
    text = f"prune {row['prune']:g} layer {row['layer']!s:<4} {row['nats_per_token']:.4f} nats a token, "
    text += (
        f"{100 * row['tiles_skipped']:.1f}% of tiles skipped, error {row['error']:.2e} (bound {row['error_bound']:.2e})"
    )
    text += f", lse {row['lse_error']:.2e} ({row['lse_bound']:.2e})"
    if "gain" in row:
        text += (
            f"; forward {row['full_forward_ms']:.3f} -> {row['pruned_forward_ms']:.3f} ms ({row['gain_forward']:.2f}x,"
        )
        text += f" choice {row['choice_ms']:.3f}), backward {row['full_backward_ms']:.3f} -> "
        text += f"{row['pruned_backward_ms']:.3f} ms ({row['gain_backward']:.2f}x), both {row['gain']:.2f}x"
        text += f", over no gate ({row['ungated_forward_ms']:.3f}, {row['ungated_backward_ms']:.3f} ms) "
        text += f"{row['gain_over_ungated']:.2f}x"
    return text


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    recipe, task, model = load_run(args.run, device=device)
    assert isinstance(model, Model)
    layers = what_layers_attend_to(model, held_out_rows(task, args).to(device), recipe.train.precision)
    q, k = layers[0][:2]
    place = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    shape = f"B{q.shape[0]} T{q.shape[1]} H{q.shape[2]} G{k.shape[2]} D{q.shape[3]} {q.dtype}"
    print(f"{args.run}: {len(layers)} gated layers, {shape}, attended to at window {args.window}, {place}")
    for prune in args.prune:
        rows = []
        for number, (q, k, v, decay) in enumerate(layers):
            row: dict[str, Any] = {"run": str(args.run), "window": args.window, "prune": prune, "layer": number}
            row |= gate_statistics(decay) | tiles(q, k, decay, args.window, prune)
            row |= errors(q, k, v, decay, args.window, prune)
            if device.type == "cuda":
                row |= times(q, k, v, decay, args.window, prune, args.rounds)
            rows.append(row | gains(row))
            put(rows[-1], args.out)
        whole = {"run": str(args.run), "window": args.window, "prune": prune, "device": place, **together(rows)}
        put(whole, args.out)


def put(row: dict[str, Any], out: Path | None) -> None:
    """As soon as it is known: a layer takes seconds, and compiling before the first one takes longer."""
    print(line(row), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
