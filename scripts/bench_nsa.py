"""Times Native Sparse Attention stage by stage on a CUDA device, beside fla's and full attention where they import.

    python scripts/bench_nsa.py                          the stages at T 16384 and 65536, for 16, 4 and 1 heads a group
    python scripts/bench_nsa.py --tokens 65536 --groups 16 --tune    every kernel over candidate tiles (set the tables)
    python scripts/bench_nsa.py --crossover              the whole op against dense causal attention, T 1k to 32k
    python scripts/bench_nsa.py --decode                 one step at a context of 64k, time and bytes read

Prints one JSON object per line. 64 query heads, head_dim 128, block 64, top 16, window 512, bfloat16, batch 1.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from zoo import ops
from zoo.kernels import nsa_compressed, nsa_selected
from zoo.ops import nsa, reference_nsa

HEADS, DIM, BLOCK, TOP, WINDOW = 64, 128, 64, 16, 512
TILES = {
    ("compressed", "forward"): [
        (64, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 3), (64, 64, 4, 2),
        (64, 64, 4, 1), (64, 128, 4, 1), (64, 32, 4, 3), (128, 128, 8, 1), (128, 128, 8, 2), (128, 32, 4, 3),
    ],
    ("compressed", "choose"): [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 1), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 128, 4, 1), (64, 128, 4, 2), (128, 128, 8, 1), (128, 128, 8, 2), (128, 64, 4, 3), (64, 32, 4, 2),
    ],
    ("compressed", "dq"): [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)],
    ("compressed", "dkdv"): [(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (32, 128, 8, 2)],
    ("selected", "partial"): [(128, 8, 3), (128, 8, 2), (64, 4, 3), (64, 4, 2), (64, 4, 4), (128, 4, 2), (64, 8, 3)],
    ("selected", "merge"): [
        (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 1),
        (32, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2),
    ],
    ("selected", "grads"): [(64, 8, 3), (64, 8, 2), (32, 4, 2), (32, 4, 3), (32, 8, 2)],
}  # fmt: skip


def milliseconds(call: Callable[[], Any]) -> float:
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median"))


def inputs(tokens: int, group: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kv_heads = HEADS // group
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = {"q": torch.randn(1, tokens, HEADS, DIM, **options), "dout": torch.randn(1, tokens, HEADS, DIM, **options)}
    x |= {name: torch.randn(1, tokens, kv_heads, DIM, **options) for name in "kv"}
    x["gates"] = torch.rand(1, tokens, HEADS, 3, **options)
    x["log_decay"] = -0.05 * torch.rand(1, tokens, HEADS, device="cuda")
    return x


def backward(out: torch.Tensor, leaves: list[torch.Tensor], dout: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def stages(tokens: int, group: int) -> None:
    x = inputs(tokens, group)
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    row: dict[str, Any] = {"tokens": tokens, "group": group}
    row["pool"] = milliseconds(lambda: (ops.pool_blocks(k, BLOCK), ops.pool_blocks(v, BLOCK)))
    means = [ops.pool_blocks(y, BLOCK).requires_grad_() for y in (k, v)]
    leaves = [y.requires_grad_() for y in (q, k, v)]
    row["compressed"] = milliseconds(lambda: ops.compressed_attention(q, *means, block=BLOCK, top=0))
    row["compressed and choice"] = milliseconds(lambda: ops.compressed_attention(q, *means, block=BLOCK, top=TOP))
    out, _, index = ops.compressed_attention(q, *means, block=BLOCK, top=TOP)
    row["compressed backward"] = milliseconds(backward(out, [q, *means], dout))
    row["selected"] = milliseconds(lambda: ops.selected_attention(q, k, v, index, block=BLOCK))
    out = ops.selected_attention(q, k, v, index, block=BLOCK)
    row["selected backward"] = milliseconds(backward(out, leaves, dout))
    places = nsa._places(q, BLOCK, tokens, None, None)
    pieces = list(nsa_selected._pieces(q, k, index, places, BLOCK))
    row["inverse index"] = milliseconds(lambda: [nsa_selected._inverse(piece, "partial") for piece in pieces])
    row["window"] = milliseconds(lambda: ops.window_attention(q, k, v, x["log_decay"], window=WINDOW))
    arguments = (q, k, v, x["gates"], x["log_decay"])
    del out
    row["whole"] = milliseconds(lambda: ops.nsa_attention(*arguments, block=BLOCK, top=TOP, window=WINDOW))
    print(json.dumps({name: round(y, 3) if isinstance(y, float) else y for name, y in row.items()}), flush=True)
    peers(tokens, group, x)


def peers(tokens: int, group: int, x: dict[str, torch.Tensor]) -> None:
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    row: dict[str, Any] = {"tokens": tokens, "group": group}
    gates = x["gates"]
    try:
        from fla.ops.nsa.parallel import parallel_nsa

        def call() -> torch.Tensor:
            return parallel_nsa(
                q, k, v, g_cmp=gates[..., 0], g_slc=gates[..., 1], block_counts=TOP, block_size=BLOCK, window_size=0
            )

        row["fla compression and selection"] = milliseconds(call)
        row["fla backward"] = milliseconds(backward(call(), [q, k, v], dout))
    except (ImportError, ValueError) as error:
        row["fla"] = str(error)
    try:
        from flash_attn.cute.interface import flash_attn_func

        row["flash attention 4, full"] = milliseconds(lambda: flash_attn_func(q, k, v, causal=True))
    except ImportError as error:
        row["flash attention 4"] = str(error)
    print(json.dumps(row), flush=True)


def tune(tokens: int, group: int) -> None:
    x = inputs(tokens, group)
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    means = [ops.pool_blocks(y, BLOCK) for y in (k, v)]
    geometry = reference_nsa.Geometry(BLOCK, BLOCK, BLOCK, TOP)
    scale = DIM**-0.5
    compressed = nsa._compressed_places(q, means[0], geometry, None, None)
    selected = nsa._places(q, BLOCK, tokens, None, None)
    out, lse, index = nsa_compressed.compressed_forward(q, *means, compressed, geometry, scale)
    detail, detail_lse = nsa_selected.selected_forward(q, k, v, index, selected, BLOCK, scale)
    calls = {
        "forward": lambda: nsa_compressed.compressed_forward(
            q, *means, compressed, reference_nsa.Geometry(BLOCK, BLOCK, BLOCK, 0), scale
        ),
        "choose": lambda: nsa_compressed.compressed_forward(q, *means, compressed, geometry, scale),
        "dq": lambda: nsa_compressed.compressed_backward(dout, None, q, *means, out, lse, compressed, geometry, scale),
        "partial": lambda: nsa_selected.selected_forward(q, k, v, index, selected, BLOCK, scale),
        "grads": lambda: nsa_selected.selected_backward(
            dout, None, q, k, v, detail, detail_lse, index, selected, BLOCK, scale
        ),
    }
    calls["dkdv"], calls["merge"] = calls["dq"], calls["partial"]
    for (family, kernel), tiles in TILES.items():
        module: Any = nsa_compressed if family == "compressed" else nsa_selected
        usual = module.SM90[kernel][DIM]
        for tile in tiles:
            module.SM90[kernel][DIM] = tile
            try:
                taken: Any = round(milliseconds(calls[kernel]), 3)
            except Exception as error:  # a tile that does not compile or fit is a finding, not an end
                taken = f"{type(error).__name__}: {error}"[:120]
            print(json.dumps({"kernel": kernel, "group": group, "tile": tile, "pass ms": taken}), flush=True)
        module.SM90[kernel][DIM] = usual
    for rows in (1024, 2048, 4096, 8192, 16384):
        nsa_selected.ITEM_ROWS = {"partial": rows, "grads": rows}
        taken = [round(milliseconds(calls[name]), 3) for name in ("partial", "grads")]
        print(json.dumps({"item rows": rows, "forward, backward ms": taken}), flush=True)
    nsa_selected.ITEM_ROWS = {"partial": 4096, "grads": 8192}
    pieces = list(nsa_selected._pieces(q, k, index, selected, BLOCK))
    for sort in ((64, 32, 4), (64, 64, 4), (32, 64, 4), (32, 32, 4), (128, 32, 8), (128, 16, 4)):
        nsa_selected.SORT = sort
        taken = [
            round(milliseconds(lambda kernel=name: [nsa_selected._inverse(piece, kernel) for piece in pieces]), 3)
            for name in ("partial", "grads")
        ]
        print(json.dumps({"inverse index tile": sort, "forward's, backward's ms": taken}), flush=True)
    nsa_selected.SORT = (64, 32, 4)
    for chunks in (1, 2, 4, 8, 16, 32, 64):
        nsa_selected.CHUNKS = {"partial": chunks, "grads": chunks}
        taken = [round(milliseconds(calls[name]), 3) for name in ("partial", "grads")]
        print(json.dumps({"chunks": chunks, "forward, backward ms": taken}), flush=True)
    nsa_selected.CHUNKS = {"partial": 16, "grads": 4}
    for scratch in (256 << 20, 1 << 30, 2 << 30, 8 << 30):
        nsa_selected.SCRATCH_BYTES = scratch
        taken = [round(milliseconds(calls[name]), 3) for name in ("partial", "grads")]
        print(json.dumps({"scratch MiB": scratch >> 20, "forward, backward ms": taken}), flush=True)


def crossover(tokens: int, group: int) -> None:
    x = inputs(tokens, group)
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v")]
    row: dict[str, Any] = {"tokens": tokens, "group": group}
    for name, call in {
        "nsa": lambda: ops.nsa_attention(*leaves, x["gates"], x["log_decay"], block=BLOCK, top=TOP, window=WINDOW),
        "dense": lambda: ops.window_attention(*leaves),
    }.items():
        row[name] = round(milliseconds(call), 3)
        row[f"{name} backward"] = round(milliseconds(backward(call(), leaves, x["dout"])), 3)
    print(json.dumps(row), flush=True)


@torch.no_grad()
def decode(tokens: int, group: int) -> None:
    x = inputs(tokens, group)
    q, k, v = x["q"][:, -1:], x["k"], x["v"]
    start = torch.tensor([tokens - 1], dtype=torch.int32, device="cuda")
    live = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    means = [ops.pool_blocks(y, BLOCK) for y in (k, v)]

    def sparse() -> torch.Tensor:
        gist, _, index = ops.compressed_attention(q, *means, block=BLOCK, top=TOP, query_start=start)
        return gist + ops.selected_attention(q, k, v, index, block=BLOCK, query_start=start)

    times = []
    for call in (sparse, lambda: ops.ring_attention(q, k, v, None, live)):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times.append(statistics.median(milliseconds(graph.replay) for _ in range(3)))
    read = tokens // BLOCK + TOP * BLOCK + WINDOW
    print(json.dumps({
        "decode at": tokens, "group": group, "nsa ms": times[0], "full ms": times[1], "tokens read": read,
        "fewer": round(tokens / read, 1),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16384, 65536])
    parser.add_argument("--groups", type=int, nargs="*", default=[16, 4, 1])
    for mode in ("tune", "crossover", "decode"):
        parser.add_argument(f"--{mode}", action="store_true")
    options = parser.parse_args()

    for group in options.groups:
        if options.crossover:
            for tokens in (1024, 2048, 4096, 8192, 16384, 32768):
                crossover(tokens, group)
            continue
        for tokens in options.tokens:
            (tune if options.tune else decode if options.decode else stages)(tokens, group)


if __name__ == "__main__":
    main()
