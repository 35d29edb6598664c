"""Which tiles meet: the two walks visit exactly the pairs of tiles that hold a visible pair."""

import pytest

pytest.importorskip("triton")

from zoo.kernels import tiles


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 50, 64, 1000, None])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (1, 65), (33, 100), (16, 200)])
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 16), (16, 64)])
def test_the_walks_visit_every_visible_pair(window, queries, keys, block_q, block_k):
    offset, width, windowed = keys - queries, window or keys, window is not None
    needed = {
        (t // block_q, j // block_k)
        for t in range(offset, keys)
        for j in range(0 if window is None else max(0, t - window + 1), t + 1)
    }
    by_query, by_key = set(), set()
    for q0 in range(offset // block_q * block_q, keys, block_q):
        newest, count = tiles.key_range.fn(q0, offset, keys, width, 0, block_q, block_k, windowed)
        # Device integers divide towards zero, Python's downwards: they differ below zero only, where nothing is.
        by_query |= {(q0 // block_q, newest // block_k - i) for i in range(count) if newest // block_k - i >= 0}
    for k0 in range(0, keys, block_k):
        oldest, count = tiles.query_range.fn(k0, offset, keys, width, keys, block_q, block_k, windowed)
        by_key |= {(oldest // block_q + i, k0 // block_k) for i in range(count)}
    assert by_query == needed
    assert needed <= by_key
    assert len(by_key) - len(needed) <= len({k for _, k in by_key})  # a first tile of which no row is a query's


def test_a_full_tile_is_one_that_the_mask_would_not_change():
    for q0 in range(0, 96, 16):
        for k0 in range(0, 96, 32):
            for window in (1, 40, 64, 200):
                full = tiles.tile_is_full.fn(q0, k0, window, 16, 32, True)
                visible = [
                    tiles.is_visible.fn(t, j, window, True) for t in range(q0, q0 + 16) for j in range(k0, k0 + 32)
                ]
                assert full == all(visible)


def test_a_tile_must_divide_the_gate_chunk():
    with pytest.raises(ValueError, match=r"Tile\.queries is 48"):
        tiles.Tile(48, 64, 4, 2)
    with pytest.raises(ValueError, match=r"Tile\.keys is 8"):
        tiles.Tile(64, 8, 4, 2)
