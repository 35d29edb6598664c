"""Times the kernels of Native Sparse Attention over candidate tiles, and the settings of the selected branch.

    python scripts/tune_nsa.py                                                   all, once NSA's GPU tests have passed
    python scripts/tune_nsa.py --groups 16 --tokens 16384 --kernels near choose

Prints medians in ms of the pass that runs the kernel, on the inputs of bench_nsa.py; with $OUT set every row goes to
$OUT/tune_nsa.json as soon as it is there. What wins goes to the tables SM90 of zoo/kernels/nsa_compressed.py and
zoo/kernels/nsa_selected.py.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_nsa import (
    BLOCK,
    DIM,
    TOP,
    Call,
    Report,
    Row,
    add_arguments,
    compile_ahead,
    finish,
    inputs,
    open_report,
    ready,
    say,
)

from zoo import ops
from zoo.kernels import nsa as kernels
from zoo.kernels import nsa_compressed, nsa_inverse, nsa_piece, nsa_selected
from zoo.ops import nsa, reference_nsa

TILES: dict[str, list[tuple[int, ...]]] = {
    "forward": [
        (64, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 3), (64, 64, 4, 2),
        (64, 64, 4, 1), (64, 128, 4, 1), (64, 32, 4, 3), (128, 128, 8, 1), (128, 128, 8, 2), (128, 32, 4, 3),
    ],
    "choose": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 1), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 128, 4, 1), (64, 128, 4, 2), (128, 128, 8, 1), (128, 128, 8, 2), (128, 64, 4, 3), (64, 32, 4, 2),
    ],
    "dq": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)],
    "dkdv": [(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (32, 128, 8, 2)],
    "near": [
        (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 1),
        (128, 64, 8, 1), (64, 32, 4, 3), (128, 128, 8, 1),
    ],
    "partial": [(64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 4, 1), (64, 8, 2), (128, 8, 2), (128, 4, 2)],
    # (32, *, 1) of grads are not here: wrong on an H200 (docs/kernels.md)
    "grads": [(32, 4, 3), (32, 4, 2), (64, 8, 2), (64, 8, 1), (32, 8, 3), (16, 4, 3)],
}  # fmt: skip
COMPRESSED = ("forward", "choose", "dq", "dkdv")
SETTINGS: dict[str, list[Any]] = {
    "ITEM_ROWS": [{"partial": rows, "grads": rows} for rows in (1024, 2048, 4096, 8192, 16384)],
    "SUM_BYTES": [16 << 10, 32 << 10, 64 << 10],
    "CHUNKS": [{"partial": chunks, "grads": chunks} for chunks in (1, 2, 4, 8, 16, 32, 64)],
    "SCRATCH_BYTES": [256 << 20, 1 << 30, 2 << 30, 5 << 30, 20 << 30],
}


def passes(tokens: int, group: int) -> dict[str, Call]:
    """The launcher that runs each kernel."""
    x = inputs(tokens, group)
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    means = [ops.pool_blocks(y, BLOCK) for y in (k, v)]
    geometry, none = (reference_nsa.Geometry(BLOCK, BLOCK, BLOCK, top) for top in (TOP, 0))
    scale = DIM**-0.5
    compressed = nsa._compressed_places(q, means[0], geometry, None, None)
    selected = nsa._places(q, BLOCK, tokens, None, None)
    out, lse, index = kernels.compressed_forward(q, *means, compressed, geometry, scale)
    detail = kernels.selected_forward(q, k, v, index, selected, BLOCK, scale)

    def back() -> Any:
        return kernels.compressed_backward(dout, None, q, *means, out, lse, compressed, none, scale)

    def walk() -> Any:
        return kernels.selected_forward(q, k, v, index, selected, BLOCK, scale)

    def walk_back() -> Any:
        return kernels.selected_backward(dout, None, q, k, v, *detail, index, selected, BLOCK, scale)

    return {
        "forward": lambda: kernels.compressed_forward(q, *means, compressed, none, scale),
        "choose": lambda: kernels.compressed_forward(q, *means, compressed, geometry, scale),
        "dq": back, "dkdv": back, "near": walk, "partial": walk, "grads": walk_back,
    }  # fmt: skip


def tiles(kernel: str) -> Any:
    module: Any = nsa_compressed if kernel in COMPRESSED else nsa_selected
    return module.SM90[kernel]


def with_tile(kernel: str, tile: tuple[int, ...], call: Call) -> Any:
    table = tiles(kernel)
    usual = table[DIM]
    table[DIM] = tile
    try:
        return call()
    finally:
        table[DIM] = usual


def with_setting(name: str, value: Any, call: Call) -> Any:
    module, usual = setting(name)
    setattr(module, name, value)
    try:
        return call()
    finally:
        setattr(module, name, usual)


def setting(name: str) -> tuple[Any, Any]:
    """(the module that holds it, its value)."""
    module = next(module for module in (nsa_piece, nsa_inverse, nsa_selected) if hasattr(module, name))
    return module, getattr(module, name)


def tune(report: Report, tokens: int, group: int, chosen: list[str]) -> None:
    calls = passes(tokens, group)
    say(f"tune, T {tokens}, {group} query heads a kv head; ms of the pass that runs the kernel")
    for kernel in chosen:
        usual, found = tiles(kernel)[DIM], {}
        for tile in dict.fromkeys([usual, *TILES[kernel]]):
            row = Row(kernel=kernel, tokens=tokens, group=group, tile=tile)
            with_tile(kernel, tile, partial(row.time, "pass", ready(calls[kernel])))
            report.add("tune", row)
            row.reasons()
            if row["pass"] is not None:
                found[tile] = row["pass"]
        best = sorted(found, key=found.__getitem__)[:3]
        say(f"  {kernel}, now {usual} {found.get(usual)}; best {'; '.join(f'{tile} {found[tile]}' for tile in best)}")
    for name, values in SETTINGS.items():
        lines = []
        for value in values:
            row = Row(setting=name, value=value, tokens=tokens, group=group)
            for what, kernel in (("forward", "partial"), ("backward", "grads")):
                with_setting(name, value, partial(row.time, what, ready(calls[kernel])))
            report.add("tune", row)
            short = next(iter(value.values())) if isinstance(value, dict) else value
            lines.append(f"{short}: {row['forward']} / {row['backward']}")
        say(f"  {name}, now {setting(name)[1]}; {'; '.join(lines)}")


Job = tuple[str, int, tuple[int, ...]]  # kernel, heads a group, tile


def run_once(job: Job) -> None:
    kernel, group, tile = job
    with torch.no_grad():
        with_tile(kernel, tile, passes(2048, group)[kernel])
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(TILES), default=list(TILES))
    add_arguments(parser)
    options = parser.parse_args()
    if (report := open_report(Path(__file__).stem, options.untested)) is None:
        return 1
    compile_ahead(
        run_once, [(name, group, t) for group in options.groups for name in options.kernels for t in TILES[name]]
    )
    sizes = [(tokens, group) for group in options.groups for tokens in options.tokens]
    return finish([partial(tune, report, tokens, group, options.kernels) for tokens, group in sizes])


if __name__ == "__main__":
    sys.exit(main())
