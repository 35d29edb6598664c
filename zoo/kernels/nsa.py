"""Native Sparse Attention in Triton: compressed attention with the choice of blocks, and attention over chosen blocks.

The kernels are in nsa_compressed.py and nsa_selected.py; this module is the back end that `zoo.ops.nsa` loads, and says
what bounds them. Figures: one H200 (about 790 TFLOP/s dense bf16, 4.8 TB/s memory), B1, T 65536, 64 query heads, 4
key/value heads, D 128, block 64, top 16. They are estimates that the design follows, not measurements.

Compressed branch. 64 heads x T^2/128 = 2.1e9 visible pairs. Forward three products (scores twice: the probabilities
that the choice needs are known only once the normaliser is) = 1.65 TFLOP; backward seven products = 3.8 TFLOP. Tensor
cores bound it: rows are (token, head) pairs of a group, whatever its size, so tiles are always full; invisible tiles
are never visited. Nothing of size T * T/block is stored: the choice is a running list of `top` per token, held in
registers as 64-bit keys (importance above, block below, so that of equal ones the earlier wins), fed by a bitonic
top-k of each tile's scores. Few slots of work per key tile in dK/dV: the queries are split, partial sums added in order.

Selected branch. 64 heads x T x 1024 keys: forward 2.2 TFLOP, about 4 ms. What decides is traffic. With a program per
token (the paper, fla) each of T * 4 * 16 (token, block) pairs reads a block's keys and values, 32 KiB: 137 GB through
L2, 20 ms and more; with one query head a group it is 2.2 TB. So the loops are turned around (as Flash Sparse Attention,
arXiv 2508.18224, does): a program holds ONE block's keys and values and walks the queries that chose it, through the
inverse index. Each pair then moves a query row in and a partial output row out, 2 x 4 KiB at a group of 16 and 2 x 256
bytes at a group of 1, and again 4 KiB when a second kernel merges the `top` partial outputs of a query by their
log-sum-exp: 17 GB each, about 8 ms, for every group size alike. The softmax inside a block is complete, so nothing is carried from
tile to tile. The backward needs the same walk for dK and dV anyway; it writes its share of dQ the same way, so it takes
five products instead of seven and reads no block twice.

The price is scratch memory for the partial rows: at most SCRATCH_BYTES at a time, the call is cut into runs of heads
and tokens. The inverse index is a stable sort of block numbers: no atomics anywhere, the same inputs give the same
bits. A call with few queries (decoding) skips the index: one program per (token, block) pair, then the same merge.
"""

from zoo.kernels.nsa_compressed import compressed_backward, compressed_forward
from zoo.kernels.nsa_selected import selected_backward, selected_forward

__all__ = ["compressed_backward", "compressed_forward", "selected_backward", "selected_forward"]
