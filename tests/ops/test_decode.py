"""ring_attention: one step over a ring of slots."""

import pytest
import torch

from zoo.ops import ring_attention, window_attention


def test_a_ring_equals_the_last_row_of_the_window():
    """Slots in any order, each with its decay relative to now."""
    torch.manual_seed(0)
    window, length = 7, 20
    q, k, v = torch.randn(2, length, 4, 8), torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8)
    decay = -torch.rand(2, length, 4)
    whole = window_attention(q, k, v, decay, window=window)
    slots = length - window + torch.randperm(window)
    from_now = decay.flip(1).cumsum(1).flip(1) - decay
    live = torch.full((2,), window, dtype=torch.int32)
    out = ring_attention(q[:, -1:], k[:, slots], v[:, slots], from_now[:, slots], live)
    torch.testing.assert_close(out, whole[:, -1:])


@pytest.mark.parametrize("gated", [True, False])
def test_only_live_slots_count(gated):
    torch.manual_seed(0)
    q, k, v, decay = torch.randn(3, 1, 2, 4), torch.randn(3, 5, 1, 4), torch.randn(3, 5, 1, 4), -torch.rand(3, 5, 2)
    decay = decay if gated else None
    live = torch.tensor([5, 2, 0], dtype=torch.int32)
    clean = ring_attention(q, k, v, decay, live, scale=0.3)
    for row, count in enumerate(live.tolist()):
        k[row, count:] = v[row, count:] = torch.nan
    dirty = ring_attention(q, k, v, decay, live, scale=0.3)
    torch.testing.assert_close(dirty, clean)
    assert torch.equal(dirty[2], torch.zeros(1, 2, 4))
    short = ring_attention(q[1:2], k[1:2, :2], v[1:2, :2], decay[1:2, :2] if gated else None, live[1:2], scale=0.3)
    torch.testing.assert_close(dirty[1:2], short)


@pytest.mark.parametrize("counts", [(5, 5, 5), (3, 3, 3), (5, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_row_is_the_definition(dtype, gated, counts):
    """Rings that are full, half full, of several lengths and empty, slots beyond filled with NaN, grouped heads, and
    keys that are a view of something larger."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = torch.randn(3, 1, 4, 8).to(dtype), *torch.randn(2, 3, 9, 2, 8).to(dtype)[:, :, 2:7]
    decay = -torch.rand(3, 5, 4, dtype=wide) if gated else None
    for row, count in enumerate(counts):
        k[row, count:] = v[row, count:] = torch.nan
        if gated:
            decay[row, count:] = torch.nan
    out = ring_attention(q, k, v, decay, torch.tensor(counts, dtype=torch.int32))
    assert out.dtype == dtype
    for row, count in enumerate(counts):
        for head in range(4):
            keys, values = (x[row, :count, head // 2].double() for x in (k, v))
            logits = keys @ q[row, 0, head].double() / 8**0.5 + (decay[row, :count, head].double() if gated else 0)
            torch.testing.assert_close(out[row, 0, head], (logits.softmax(0) @ values).to(dtype))


def test_bad_shapes_are_named():
    q, k, live = torch.zeros(2, 1, 2, 4), torch.zeros(2, 5, 1, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="exactly one"):
        ring_attention(q.expand(2, 3, 2, 4), k, k, None, live)
    with pytest.raises(ValueError, match="H a multiple of G"):
        ring_attention(q, k.expand(2, 5, 3, 4), k.expand(2, 5, 3, 4), None, live)
    with pytest.raises(ValueError, match="decay has shape"):
        ring_attention(q, k, k, torch.zeros(2, 5, 1), live)
    with pytest.raises(ValueError, match="live is torch.int32"):
        ring_attention(q, k, k, None, live[:1])
    with pytest.raises(ValueError, match="live is torch.int64"):
        ring_attention(q, k, k, None, live.long())
    with pytest.raises(ValueError, match="four dimensions"):
        ring_attention(q[0], k, k, None, live)
    with pytest.raises(ValueError, match="one dtype"):
        ring_attention(q.half(), k, k, None, live)
