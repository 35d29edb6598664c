"""Bad input: an error that names the argument, its value and what is accepted."""

import pytest
import torch

from zoo.ops import gated_window_attention, window_attention


def call(operator=window_attention, **changes):
    q, k, v = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8)
    arguments = {"q": q, "k": k, "v": v, "window": 3} | changes
    return operator(**arguments)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, r"window is 0: .* >= 1"),
        ({"window": -3}, r"window is -3"),
        ({"window": True}, r"window is True"),
        ({"window": 2.0}, r"window is 2\.0"),
        ({"q": torch.zeros(2, 6, 3, 8)}, r"q has 3 heads, k and v 2: .* multiple"),
        ({"q": torch.zeros(2, 6, 8)}, r"q must be \(B, T, H, D\)"),
        ({"v": torch.zeros(2, 5, 2, 8)}, r"k and v must have one shape"),
        ({"q": torch.zeros(2, 6, 4, 4)}, r"k and v must have one shape"),
        ({"q": torch.zeros(2, 7, 4, 8)}, r"T must be at most N"),
        ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.bfloat16)}, r"one float dtype, got torch\.bfloat16"),
        ({name: torch.zeros(2, 6, 2, 8).int() for name in "qkv"}, r"one float dtype"),
        ({"k": torch.zeros(2, 6, 2, 8, device="meta")}, r"one device, got cpu, meta"),
        ({"log_decay": torch.zeros(2, 6, 2)}, r"log_decay has shape \(2, 6, 2\).*\(2, 6, 4\)"),
        ({"log_decay": torch.zeros(2, 6, 4, dtype=torch.bfloat16)}, r"log_decay is torch\.bfloat16"),
        ({"log_decay": torch.zeros(2, 6, 4, dtype=torch.float64)}, r"log_decay is torch\.float64"),
        ({"log_decay": torch.full((2, 6, 4), 0.1)}, r"log_decay must be finite and <= 0"),
        ({"log_decay": torch.full((2, 6, 4), -torch.inf)}, r"log_decay must be finite"),
        ({"log_decay": torch.full((2, 6, 4), torch.nan)}, r"log_decay must be finite"),
        ({"log_decay": torch.zeros(2, 6, 4, device="meta")}, r"log_decay is on meta"),
        ({"cu_seqlens": ints(0, 6)}, r"needs B = 1"),
        ({"key_start": ints(0, 1, 2)}, r"key_start has shape \(3,\)"),
        ({"key_start": ints(0, 7)}, r"key_start must lie between 0 and N = 6"),
        ({"key_start": ints(0, -1)}, r"key_start must lie"),
        ({"key_start": ints(0, 1, dtype=torch.int64)}, r"key_start must be a non-empty int32 vector, got torch\.int64"),
        ({"key_start": ints(0, 1), "cu_seqlens": ints(0, 6)}, r"can't be given together"),
    ],
)
def test_window_attention_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("cu_seqlens", [(1, 6), (0, 5), (0, 7), (0, 4, 3, 6)])
def test_cu_seqlens_must_cover_the_row(cu_seqlens):
    one_row = {"q": torch.zeros(1, 6, 4, 8), "k": torch.zeros(1, 6, 2, 8), "v": torch.zeros(1, 6, 2, 8)}
    with pytest.raises(ValueError, match="cu_seqlens must go from 0 to T = 6"):
        call(**one_row, cu_seqlens=ints(*cu_seqlens))
    with pytest.raises(ValueError, match="int32 vector"):
        call(**one_row, cu_seqlens=ints(0, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("z", "u", "message"),
    [
        (torch.zeros(2, 6, 2), torch.zeros(2, 6, 2), r"z has shape \(2, 6, 2\)"),
        (torch.zeros(2, 6, 4), torch.zeros(2, 6, 2), r"z has shape \(2, 6, 4\) and u \(2, 6, 2\)"),
        (torch.zeros(2, 6, 4), torch.zeros(2, 6, 4).half(), r"z is torch\.float32 and u torch\.float16"),
    ],
)
def test_gated_window_attention_refuses(z, u, message):
    with pytest.raises(ValueError, match=message):
        call(gated_window_attention, z=z, u=u)
