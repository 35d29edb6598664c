"""Native Sparse Attention in Triton: compressed attention with the choice of blocks, and attention over chosen blocks.

The kernels are in nsa_pool.py, nsa_compressed.py, nsa_choice.py, nsa_selected.py, nsa_selected_backward.py,
nsa_near.py, nsa_piece.py, nsa_inverse.py, nsa_count.py, nsa_runs.py, nsa_places.py and nsa_mix.py; this module is the
back end that `zoo.ops.nsa` loads, and says what bounds them. Figures are estimates that the design follows, not
measurements: one H200 (790 TFLOP/s dense bf16, 4.8 TB/s memory), B1, T 65536, 64 query heads, 4 key/value heads, D 128,
block 64, top 16.

Compressed branch: 2.1e9 visible pairs. Forward three products (scores twice: the probabilities that the choice needs
are known only once the normaliser is), 1.65 TFLOP; backward seven, 3.8 TFLOP. Tensor cores bound it. Rows of a tile are
(token, head) pairs of a group, whatever its size, so tiles are always full; invisible tiles are never visited. Nothing
of size T * T/block is stored: a program's scores wait in a room of its own. What a bitonic network sorts is the best of
every run of four blocks; then only the runs that reach the top-th best are looked at block by block. dK and dV
have few key tiles, so the queries are split into shares, whose partial sums are added in order.

Selected branch: forward 2.2 TFLOP, 4 ms; what decides is traffic. With a program per token (the paper, fla) each of the
T * 4 * 16 (token, block) pairs reads a block's keys and values, 32 KiB: 137 GB through L2, 20 ms and more; with one
query head a group, 2.2 TB. So the loops are turned around, as Flash Sparse Attention (arXiv 2508.18224) does: a program
holds ONE block's keys and values and walks the queries that chose it, through an inverse index. A pair then moves a
query row in and a partial output row out, 4 KiB each at a group of 16 and 256 bytes at a group of 1, and once more when
a query's partial outputs are merged by their log-sum-exp: 17 GB each, 8 ms in all, the same for every
group size. The softmax inside a block is complete: nothing is carried from tile to tile. The backward walks the same
way for dK and dV; it leaves its share of dQ in the same scratch, so it takes five products, not seven, and reads no
block twice.

Of those blocks three are the first, the previous and the own one, the same for neighbouring queries: a kernel of its
own reads them as dense attention does, a tile of rows and three blocks at a time, and leaves one more partial output.
Only top - 3 blocks go through scratch. The items run chunk by chunk of tokens, so that their query rows stay in L2:
what memory has to move is the partial rows, written once and read once, by programs that keep as many loads under way
as they have registers for. An item's next query rows are gathered while its present ones are computed with.

The price is scratch memory for the partial rows, SCRATCH_BYTES at a time: the call is cut into runs of heads and
tokens. The inverse index is a counting sort of the pairs' blocks, or a stable radix sort (torch's) where there are
many: no atomics anywhere, the same inputs give the same bits. A call with few queries (decoding) skips the index: one
program per (token, block) pair, then the same merge.
"""

from typing import Any

from torch import Tensor

from zoo.kernels.nsa_choice import choose
from zoo.kernels.nsa_compressed import attend, compressed_backward
from zoo.kernels.nsa_mix import mix_backward, mix_forward
from zoo.kernels.nsa_places import locate
from zoo.kernels.nsa_pool import pool_backward, pool_forward
from zoo.kernels.nsa_selected import selected_forward, selected_mix_forward
from zoo.kernels.nsa_selected_backward import selected_backward

__all__ = [
    "compressed_backward",
    "compressed_forward",
    "locate",
    "mix_backward",
    "mix_forward",
    "pool_backward",
    "pool_forward",
    "selected_backward",
    "selected_forward",
    "selected_mix_forward",
]


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, places: Any, geometry: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out like q, natural-log lse (B,T,H) float32 and block_index (B,T,G,top) int32: ascending, then -1."""
    out, lse = attend(q, k, v, places, geometry, scale)
    return out, lse, choose(q, k, lse, places, geometry, scale)
