"""Every registered mixer: a full forward, any split into chunks, and token by token are one function.

The tests are generated from the registry, so a new mixer gets them by registering itself.
"""

import pytest
import torch

from zoo import config, state
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers.base import Context
from zoo.registry import mixers

WINDOW = 8
LENGTHS = [WINDOW // 2, WINDOW, WINDOW + 1, 8 * WINDOW]


def small_config(name: str, **fields) -> BackboneConfig:
    """Two layers with grouped heads; a window of 8 and blocks of 3 where the mixer has them, gates that remember."""
    known = mixers.get(name).Config.__dataclass_fields__
    wanted = {"window": WINDOW, "gate_bias": 1.0, "token_shift": True, "block": 3, "top": 4}
    mixer = {"name": name, **{key: value for key, value in wanted.items() if key in known}}
    return config.build(BackboneConfig, {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mixer": mixer}, fields)


def small_backbone(name: str, **fields) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(small_config(name, **fields)).double().eval()
    for parameter in backbone.parameters():  # away from the symmetric start: gates and norms with values of their own
        parameter.data += 0.3 * torch.randn_like(parameter)
    return backbone


def random_splits(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    sizes = []
    while sum(sizes) < tokens:
        sizes.append(min(int(torch.randint(1, 2 * WINDOW, (), generator=generator)), tokens - sum(sizes)))
    return sizes


def run_chunks(backbone: Backbone, h: torch.Tensor, sizes: list[int], cache=None) -> torch.Tensor:
    cache = cache or backbone.init_cache(h.shape[0], h.shape[1], dtype=h.dtype)
    outputs = []
    for chunk in h.split(sizes, dim=1):
        y, cache = backbone(chunk, Context(), cache)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


pytestmark = pytest.mark.parametrize("name", mixers.names())


@torch.no_grad()
@pytest.mark.parametrize("tokens", LENGTHS)
def test_full_equals_chunks_equals_steps(name, tokens):
    backbone = small_backbone(name)
    h = torch.randn(2, tokens, 32, dtype=torch.float64)
    full, _ = backbone(h, Context())
    assert full.isfinite().all()
    for sizes in (random_splits(tokens, 1), random_splits(tokens, 2), [tokens], [1] * tokens):
        torch.testing.assert_close(run_chunks(backbone, h, sizes), full, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("max_len", [WINDOW // 2, 2 * WINDOW])
def test_a_row_longer_than_its_state_is_right_or_an_error(name, max_len):
    backbone = small_backbone(name)
    h = torch.randn(1, 3 * WINDOW, 32, dtype=torch.float64)
    full, _ = backbone(h, Context())
    for sizes in ([3 * WINDOW], [1] * (3 * WINDOW), [5, 1] * (WINDOW // 2)):
        cache = backbone.init_cache(1, max_len, dtype=h.dtype)
        try:
            torch.testing.assert_close(run_chunks(backbone, h, sizes, cache), full, rtol=1e-9, atol=1e-9)
        except ValueError as error:
            assert f"max_len = {max_len}" in str(error)  # noqa: PT017 (either is right, a wrong output is not)
            assert int(cache["position"]) <= max_len
    run_chunks(backbone, h[:, :max_len], [1] * max_len, backbone.init_cache(1, max_len, dtype=h.dtype))


@torch.no_grad()
def test_rows_of_different_lengths(name):
    """Ragged prefill in padded chunks, then steps: every row equals itself alone."""
    backbone = small_backbone(name)
    lengths, new = torch.tensor([3, WINDOW, 29, 1]), 5
    h = torch.randn(4, 29 + new, 32, dtype=torch.float64)
    cache = backbone.init_cache(4, 29 + new, dtype=h.dtype)
    chunk = 10
    for begin in range(0, 29, chunk):
        piece = h[:, begin : min(begin + chunk, 29)].clone()
        here = (lengths - begin).clamp(0, piece.shape[1])
        piece[torch.arange(piece.shape[1]) >= here[:, None]] = 1e3  # what pads hold must not matter
        y, cache = backbone(piece, Context(lengths=here), cache)
        for row, length in enumerate(here):
            alone, _ = backbone(h[row : row + 1, : begin + length], Context())
            torch.testing.assert_close(y[row : row + 1, :length], alone[:, begin:], rtol=1e-9, atol=1e-9)
    assert cache["position"].tolist() == lengths.tolist()
    for step in range(new):
        token = h[torch.arange(4), lengths + step].unsqueeze(1)
        y, cache = backbone(token, Context(), cache)
        for row, length in enumerate(lengths):
            alone, _ = backbone(h[row : row + 1, : length + step + 1], Context())
            torch.testing.assert_close(y[row : row + 1], alone[:, -1:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_index_repeat_clone(name):
    backbone = small_backbone(name)
    h = torch.randn(3, 2 * WINDOW, 32, dtype=torch.float64)
    cache = backbone.init_cache(3, 4 * WINDOW, dtype=h.dtype)
    _, cache = backbone(h, Context(), cache)
    token = torch.randn(3, 1, 32, dtype=torch.float64)
    expected, _ = backbone(token, Context(), state.clone(cache))

    order = torch.tensor([2, 0])
    y, _ = backbone(token[order], Context(), state.index(cache, order))
    torch.testing.assert_close(y, expected[order], rtol=1e-9, atol=1e-9)
    y, _ = backbone(token.repeat_interleave(2, 0), Context(), state.repeat(cache, 2))
    torch.testing.assert_close(y, expected.repeat_interleave(2, 0), rtol=1e-9, atol=1e-9)
    y, _ = backbone(token, Context(), cache)  # the clone above left the original as it was
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_packed_equals_separate(name):
    backbone = small_backbone(name)
    sizes = [5, 0, 1, 3 * WINDOW, WINDOW]
    h = torch.randn(1, sum(sizes), 32, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    packed, _ = backbone(h, Context(cu_seqlens=cu_seqlens))
    separate = torch.cat([backbone(part, Context())[0] for part in h.split(sizes, dim=1) if part.shape[1]], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)


def test_packed_gradients_stay_in_their_document(name):
    backbone = small_backbone(name)
    h = torch.randn(1, 30, 32, dtype=torch.float64, requires_grad=True)
    packed, _ = backbone(h, Context(cu_seqlens=torch.tensor([0, 11, 30], dtype=torch.int32)))
    packed[:, 11:].square().sum().backward()
    assert h.grad is not None
    assert h.grad[:, :11].abs().max() < 1e-12
    assert h.grad[:, 11:].abs().max() > 0


@torch.no_grad()
def test_state_bytes_are_what_the_state_holds(name):
    backbone = small_backbone(name)
    mixer = backbone.blocks[0].mixer
    for tokens in LENGTHS:
        held = state.state_bytes(mixer.init_state(1, tokens, device="cpu", dtype=torch.bfloat16))
        assert held == mixer.state_bytes(tokens, element_size=2)


def test_flops_grow_with_tokens(name):
    mixer = small_backbone(name).blocks[0].mixer
    assert 0 < mixer.flops(64) < mixer.flops(128)


@torch.no_grad()
def test_causal(name):
    backbone = small_backbone(name)
    h = torch.randn(1, 40, 32, dtype=torch.float64)
    before, _ = backbone(h, Context())
    h[:, 25:] += 1
    after, _ = backbone(h, Context())
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-12)
    assert (after[:, 25:] - before[:, 25:]).abs().amax() > 1e-3


@torch.no_grad()
def test_reach_is_how_far_a_layer_looks_back(name):
    """Context parallelism brings a rank so many tokens of the one before: fewer would be wrong without a word."""
    mixer = small_backbone(name).blocks[0].mixer
    x = torch.randn(1, 60, 32, dtype=torch.float64)

    def last_without(count: int) -> torch.Tensor:
        """The last output where the first tokens are others."""
        return mixer(torch.cat((torch.randn_like(x[:, :count]), x[:, count:]), 1), Context(), None)[0][:, -1]

    reach = WINDOW + 1 if mixer.reach is None else mixer.reach  # None: farther than a window with its token shift
    assert (last_without(60 - reach) - last_without(0)).abs().amax() > 1e-9
    if mixer.reach is not None:
        torch.testing.assert_close(last_without(59 - reach), last_without(0), rtol=0, atol=1e-12)
