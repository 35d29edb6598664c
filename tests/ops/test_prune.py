"""Pruned tiles: what is lost stays within the bound, whatever the inputs; the rest is computed as defined."""

import math

import pytest
import torch

from tests.ops.definition import is_negligible, relative_error
from zoo.mixers.base import Context, Dims
from zoo.mixers.gatedfwa import GatedFWA
from zoo.ops import gated_window_attention, reference, window_attention
from zoo.ops.prune import KEPT_TILE, kept_tiles
from zoo.ops.reference_prune import mirror

PRUNE = 1e-3


def inputs(kind: str, *, batch=2, queries=520, keys=None, heads=4, kv_heads=2, dim=8):
    """q, k, v, log_decay in float64: logits and gates of several kinds, adversaries among them."""
    keys = keys or queries
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(batch, n, h, dim) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
    decay = -torch.rand(batch, keys, heads, generator=generator, dtype=torch.float64)
    if kind == "large logits":
        q, k = 6 * q, 6 * k
    elif kind == "resets":
        decay = torch.where(torch.rand(decay.shape, generator=generator) < 0.02, -200.0, -1e-3).double()
    elif kind == "nearly no gate":
        decay = 1e-6 * decay
    elif kind == "worst":  # every row is far from its own key and close to the oldest ones, all along one direction
        axis = torch.zeros(dim, dtype=torch.float64)
        axis[0] = 1.0
        sign = torch.where(torch.arange(keys) % (4 * KEPT_TILE) < 2 * KEPT_TILE, 1.0, -1.0)
        k = (4 * sign[None, :, None, None] * axis).expand(batch, keys, kv_heads, dim).clone()
        q = (-4 * sign[None, keys - queries :, None, None] * axis).expand(batch, queries, heads, dim).clone()
    return q, k, v, decay


KINDS = ["plain", "large logits", "resets", "nearly no gate", "worst"]
OPTIONS = {
    "full": {},
    "window": {"window": 300},
    "key_start": {"window": 300, "key_start": torch.tensor([0, 150], dtype=torch.int32)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_lost_is_within_the_bound(kind, name):
    options = OPTIONS[name]
    q, k, v, decay = (x.requires_grad_() for x in inputs(kind, queries=400, keys=520))
    out, lse = window_attention(q, k, v, decay, return_lse=True, **options)
    less, less_lse = window_attention(q, k, v, decay, return_lse=True, prune=PRUNE, **options)
    largest = v.detach().norm(dim=-1).max()
    assert (less - out).norm(dim=-1).max() <= 2 * PRUNE * largest
    seen = lse > -torch.inf
    loss = (lse - less_lse)[seen]
    assert -1e-9 <= loss.min() <= loss.max() <= -math.log1p(-PRUNE)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads, less_grads = (torch.autograd.grad(x, (q, k, v, decay), dout) for x in (out, less))
    changes = [a - b for a, b in zip(less_grads, grads, strict=True)]
    check_gradients(changes, q, k, v, dout, torch.full_like(lse, PRUNE))


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_that_is_lost_moves_gradients_within_their_bounds(kind):
    """Whatever is dropped, and however much: here keys before a start, from rows that see others too."""
    q, k, v, decay = inputs(kind, queries=400, keys=520)
    leaves = [x.requires_grad_() for x in (q, k, v, decay / 50)]
    start = torch.tensor([70, 118], dtype=torch.int32)
    (out, lse), (less, less_lse) = (window_attention(*leaves, return_lse=True, key_start=x) for x in (None, start))
    lost = -torch.expm1(less_lse - lse).detach().clamp(max=0) + 1e-12  # rounded in float64
    assert lost.max() > (0.05 if kind == "resets" else 0.5)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads, less_grads = (torch.autograd.grad(x, leaves, dout) for x in (out, less))
    changes = [a - b for a, b in zip(less_grads, grads, strict=True)]
    check_gradients(changes, q, k, v, dout, lost)


def check_gradients(changes, q, k, v, dout, lost):
    """That those of q, k, v and log_decay change by no more than zoo/ops/prune.py says. lost (B,T,H): each row's share
    of its probability. Head dim 8, and its scale."""
    dq, dk, dv, dgate = changes
    scale, kv_heads, later = 8**-0.5, k.shape[2], k.shape[1] - q.shape[1]
    moved = lost * dout.norm(dim=-1)
    rows = 6 * moved * v.detach().norm(dim=-1).max()  # a row's sum of |dS' - dS|
    assert (dq.norm(dim=-1) <= scale * rows * k.norm(dim=-1).max()).all()

    def over_rows(x):
        """(B,T,H) summed over all that share a key head."""
        return x.unflatten(2, (kv_heads, -1)).sum((1, 3))

    assert (dk.norm(dim=-1).sum(1) <= over_rows(scale * rows * q.norm(dim=-1))).all()
    assert (dv.norm(dim=-1).sum(1) <= over_rows(2 * moved)).all()
    assert (dv.norm(dim=-1).amax(1) <= over_rows(moved)).all()
    after = (rows / 2).flip(1).cumsum(1).flip(1)  # of this row and those that follow
    after = torch.cat((after[:, :1].expand(-1, later, -1), after), dim=1)
    assert (dgate.abs() <= after).all()


def test_something_is_lost_and_nothing_where_nothing_may_be():
    """A strong gate drops tiles, close to as many as the bound allows; a gate of zero none."""
    q, k, _, decay = inputs("plain", queries=2000, dim=8)
    first, _ = kept_tiles(q, k, (decay,), window=None, scale=8**-0.5, prune=PRUNE)
    tiles = torch.arange(first.shape[-1])
    assert bool((first <= tiles).all())
    assert bool((first.diff(dim=-1) >= 0).all())
    assert (first[..., -1] >= tiles[-1] - 3).all()  # 64 tokens forget 32 nats
    assert not kept_tiles(q, k, (0 * decay,), window=None, scale=8**-0.5, prune=PRUNE)[0].any()
    strict, _ = kept_tiles(q, k, (decay / 8,), window=None, scale=8**-0.5, prune=1e-12)
    loose, _ = kept_tiles(q, k, (decay / 8,), window=None, scale=8**-0.5, prune=0.5)
    assert bool((strict <= loose).all())
    assert bool((strict < loose).any())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_on_what_is_kept(kind):
    """Values and gradients are those of attention with the dropped tiles masked."""
    q, k, v, decay = (x.requires_grad_() for x in inputs(kind, batch=1))
    kept = kept_tiles(q, k, (decay,), window=300, scale=0.3, prune=PRUNE)
    spans = reference.visible_spans(None, kept, k.shape[1])
    expected, lse = reference.definition(q, k, v, decay, window=300, scale=0.3, spans=spans)
    actual, actual_lse = window_attention(q, k, v, decay, window=300, scale=0.3, prune=PRUNE, return_lse=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_lse, lse)
    dout, dlse = torch.randn_like(actual), torch.randn_like(lse)
    pairs = ((actual, actual_lse), (expected, lse))
    grads = [torch.autograd.grad([*pair], (q, k, v, decay), [dout, dlse]) for pair in pairs]
    for a, e in zip(*grads, strict=True):
        assert relative_error(a, e) <= 1e-9


def test_the_spans_mirror_each_other():
    """A key's end is one past the last query whose start lets it in, inside documents too."""
    q, k, _, decay = inputs("resets", batch=1, queries=700)
    kept = kept_tiles(q, k, (decay,), window=None, scale=8**-0.5, prune=PRUNE)
    assert torch.equal(kept[1], mirror(kept[0]))
    documents = reference.document_spans(torch.tensor([0, 10, 10, 333, 700], dtype=torch.int32), 700)
    start, end = reference.visible_spans(documents, kept, 700)
    position = torch.arange(700)
    seen = (position >= start[..., None]) & (position <= position[:, None])  # (1, G, query, key)
    mirrored = (position[:, None] < end[..., None, :]) & (position <= position[:, None])
    assert torch.equal(seen & (position < documents[1][0]) & (position[:, None] < documents[1][0]), seen & mirrored)
    assert torch.equal(seen, mirrored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_but_what_the_rule_lets_go(kind, dtype):
    """Whatever is rounded on the way. A tile more would not do."""
    q, k, _, decay = inputs(kind, queries=1500, keys=1700)
    q, k, decay = q.to(dtype), k.to(dtype), (decay / 3).to(reference.accumulator(dtype))
    options = {"window": 900, "scale": 0.3, "prune": PRUNE}
    first, _ = kept_tiles(q, k, (decay,), **options)
    assert is_negligible(first, q, k, decay, **options)
    if kind != "nearly no gate":
        tile = torch.arange(first.shape[2])
        assert not is_negligible(torch.minimum(first + 1, tile), q, k, decay, **options)


def test_absurd_gates_and_logits_drop_nothing_that_counts():
    """A reset of 1e30 nats does not blur the sums of its neighbours; keys that are not finite drop nothing."""
    q, k, _, decay = inputs("plain", batch=1, queries=1000)
    decay = decay / 100
    kept = kept_tiles(q, k, (decay,), window=None, scale=8**-0.5, prune=PRUNE)[0]
    decay[:, 500] = -1e30
    first = kept_tiles(q, k, (decay,), window=None, scale=8**-0.5, prune=PRUNE)[0]
    assert not first[..., :8].any()  # tile 7 has the reset, and tile 8 is the first to see it from behind
    assert (first[..., 8:] == 7).all()
    assert (kept <= first).all()
    k[:, 3, :, 0] = math.inf
    assert not kept_tiles(q, k, (decay,), window=None, scale=8**-0.5, prune=PRUNE)[0].any()


@pytest.mark.parametrize("documents", [None, torch.tensor([0, 100, 520], dtype=torch.int32)])
def test_fused_gate(documents):
    q, k, v, _ = (x.requires_grad_() for x in inputs("plain", batch=1))
    z, u = torch.randn(2, 1, 520, 4, dtype=torch.float64).unbind()
    z, u = z.requires_grad_(), u.requires_grad_()
    out = gated_window_attention(q, k, v, z, u, window=300, cu_seqlens=documents)
    less = gated_window_attention(q, k, v, z, u, window=300, cu_seqlens=documents, prune=1e-9)
    for a, e in zip((less, *torch.autograd.grad(less.sum(), (q, k, v, z, u))),
                    (out, *torch.autograd.grad(out.sum(), (q, k, v, z, u))), strict=True):  # fmt: skip
        assert relative_error(a.detach(), e.detach()) <= 1e-7


def test_the_choice_is_an_operator():
    """One call for the compiler, whatever it runs; S calls under vmap are one on S times the rows."""
    q, k, v, decay = (x.float() for x in inputs("plain", batch=4, queries=200))
    options = {"window": 150, "scale": 0.3, "prune": PRUNE}
    torch.library.opcheck(torch.ops.zoo.kept_tiles, (q, k, decay, None, 150, 0.3, PRUNE))
    kept = torch.stack(kept_tiles(q, k, (decay,), **options))
    assert kept[0].any()

    def rows(*x):
        return torch.stack(kept_tiles(*x[:2], x[2:], **options), dim=1)

    stacked = torch.vmap(rows)(*(x.unflatten(0, (2, 2)) for x in (q, k, decay)))
    assert torch.equal(stacked.flatten(0, 1), kept.movedim(0, 1))
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    q.requires_grad_()
    assert torch.equal(compiled(q, k, v, decay, **options), window_attention(q, k, v, decay, **options))


def test_errors_name_the_argument():
    q, k, v, decay = inputs("plain", queries=4)
    with pytest.raises(ValueError, match="prune needs log_decay"):
        window_attention(q, k, v, prune=PRUNE)
    for bad in (0.0, 1.0, -1, math.nan):
        with pytest.raises(ValueError, match="prune is"):
            window_attention(q, k, v, decay, prune=bad)


def test_gatedfwa_prunes_within_its_bound():
    """Off by default; on, what a full call loses is small, and a config that asks for nonsense names the field."""
    assert GatedFWA.Config().prune is None
    torch.manual_seed(0)
    dims = Dims(width=32, heads=2, kv_heads=1, head_dim=16)
    mixer = GatedFWA(GatedFWA.Config(window=512), dims)
    x = torch.randn(1, 700, 32)
    full, _ = mixer(x, Context())
    mixer.prune = 1e-6
    pruned, _ = mixer(x, Context())
    torch.testing.assert_close(pruned, full, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"prune = 1\.5; it takes"):
        GatedFWA.Config(prune=1.5)
