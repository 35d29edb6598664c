"""Tiles of the window kernels: their sizes, and which key tile meets which query tile.

Positions are absolute: a call has N keys at 0 .. N-1 and its T queries are the last T of them, from `offset` = N - T.
Query and key tiles start at multiples of their size, so that a tile lies in one chunk of the gate's prefix (`CHUNK`).
The forward and dQ kernels ask `key_range`, the dK/dV kernel its mirror `query_range`; `tile_is_full` says whether a
pair of tiles needs a mask, `is_visible` is that mask. No kernel computes any of it on its own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK = 128  # keys per restart of the gate's prefix; every tile size divides it


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: query rows, key columns, and how Triton schedules it."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, size in (("queries", self.queries), ("keys", self.keys)):
            if size < 16 or CHUNK % size:
                raise ValueError(f"Tile.{name} is {size}: it must be at least 16 and divide {CHUNK}")


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels of one call."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# (architecture, head_dim, window class). head_dim counts 16-bit elements: float32 reads the row of twice its size.
# "narrow" is a window of at most NARROW keys, where few tiles follow each other and small ones waste less.
NARROW = 512
TABLE: dict[tuple[str, int, str], Tiles] = {
    ("sm80", 64, "narrow"): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm80", 64, "wide"): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm80", 128, "narrow"): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ("sm80", 128, "wide"): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ("sm80", 256, "narrow"): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(64, 32, 8, 1)),
    ("sm80", 256, "wide"): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(64, 32, 8, 1)),
    ("sm80", 512, "narrow"): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ("sm80", 512, "wide"): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ("sm86", 64, "narrow"): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm86", 64, "wide"): Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm86", 128, "narrow"): Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 1), Tile(64, 32, 4, 2)),
    ("sm86", 128, "wide"): Tiles(Tile(128, 32, 4, 2), Tile(32, 64, 4, 1), Tile(64, 32, 4, 2)),
    ("sm86", 256, "narrow"): Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ("sm86", 256, "wide"): Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ("sm86", 512, "narrow"): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ("sm86", 512, "wide"): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ("sm90", 64, "narrow"): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm90", 64, "wide"): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm90", 128, "narrow"): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
    ("sm90", 128, "wide"): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
    ("sm90", 256, "narrow"): Tiles(Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    ("sm90", 256, "wide"): Tiles(Tile(128, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    ("sm90", 512, "narrow"): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ("sm90", 512, "wide"): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
SHARED_BYTES = {"sm80": 166_912, "sm86": 101_376, "sm90": 232_448}  # what one program may take


def choose_tiles(device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None) -> Tiles:
    """The table's row for such a call. A device that is not listed takes the row with the same shared memory."""
    width = max(64, triton.next_power_of_2(head_dim) * dtype.itemsize // 2)
    window_class = "narrow" if window is not None and window <= NARROW else "wide"
    return TABLE[architecture(device), width, window_class]


def architecture(device: torch.device) -> str:
    """sm80 (A100), sm86 (8.6, 8.9 and later consumer devices) or sm90 (Hopper and later data-centre devices)."""
    if device.type != "cuda":
        return "sm80"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 6):
        return "sm80"
    return "sm90" if capability[0] in (9, 10) else "sm86"


# --------------------------------------------------------------------------------- which tiles meet (device functions)


@triton.jit
def key_range(q0, offset, N, window, oldest, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WINDOWED: tl.constexpr):
    """Key tiles that a query tile at q0 meets: (start of the newest, their number, possibly <= 0).

    oldest is the first key that the tile's first query may see for reasons other than the window.
    """
    last = min(q0 + BLOCK_Q, N) - 1
    lowest = oldest
    if WINDOWED:
        lowest = max(lowest, max(q0, offset) - window + 1)
    newest = last // BLOCK_K * BLOCK_K
    return newest, (newest - lowest // BLOCK_K * BLOCK_K) // BLOCK_K + 1


@triton.jit
def query_range(k0, offset, N, window, beyond, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WINDOWED: tl.constexpr):
    """Query tiles that a key tile at k0 meets: (start of the oldest, their number, possibly <= 0).

    beyond is one past the last query that may see the tile's last key for reasons other than the window.
    """
    last = beyond
    if WINDOWED:
        last = min(last, min(k0 + BLOCK_K, N) - 1 + window)
    oldest = max(k0, offset) // BLOCK_Q * BLOCK_Q
    return oldest, (last - oldest + BLOCK_Q - 1) // BLOCK_Q


@triton.jit
def tile_is_full(q0, k0, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether the window and causality let every query of the tile see every key of it."""
    full = k0 + BLOCK_K - 1 <= q0
    if WINDOWED:
        full = full & (q0 + BLOCK_Q - 1 - k0 < window)
    return full


@triton.jit
def is_visible(query, key, window, WINDOWED: tl.constexpr):
    """The mask itself, for positions that broadcast against each other."""
    visible = key <= query
    if WINDOWED:
        visible = visible & (query - key < window)
    return visible


# ------------------------------------------------------------------------------------------ tiles in and out of memory


@triton.jit
def load_tile(base, row0, first, beyond, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows row0 .. row0 + BLOCK of a (rows, D) matrix, zero outside first .. beyond. 64-bit where row * stride is."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    inside = ((row0 + row >= first) & (row0 + row < beyond))[:, None]
    if D != BLOCK_D:
        inside = inside & (column < D)[None, :]
    corner = base + tl.cast(row0, tl.int64) * stride
    return tl.load(corner + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, tile, row0, first, beyond, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_tile`, in the matrix's own dtype."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    inside = ((row0 + row >= first) & (row0 + row < beyond))[:, None]
    if D != BLOCK_D:
        inside = inside & (column < D)[None, :]
    corner = base + tl.cast(row0, tl.int64) * stride
    tl.store(corner + row[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), mask=inside)
