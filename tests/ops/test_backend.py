"""Which back end runs, and what people are told about it."""

import subprocess
import sys
import warnings

import pytest
import torch

from zoo.ops import backend, window_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("ZOO_BACKEND", "ZOO_DEBUG", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    backend._warn_once.cache_clear()


@pytest.fixture
def old_gpu(monkeypatch):
    """A device of compute capability 7.5, as far as the choice is concerned."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend, "_installed", lambda package: True)


def test_cpu_runs_the_reference_and_says_why():
    name, reason = backend.explain("window", "cpu", torch.float32, 64)
    assert name == "reference"
    assert reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose_backend("window", CPU, torch.float32, 64).name == "reference"


def test_falling_back_on_a_gpu_warns_once(old_gpu):
    with pytest.warns(RuntimeWarning, match=r"falls back to its reference path .* 8\.0, this device has 7\.5"):
        backend.choose_backend("window", CUDA, torch.float32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.choose_backend("window", CUDA, torch.float32, 64)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 64), (torch.bfloat16, 320)])
def test_what_the_kernels_do_not_take(old_gpu, monkeypatch, dtype, head_dim):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.explain("window", CUDA, torch.bfloat16, 64) == (
        "hopper",
        "first choice for cuda, bfloat16, head_dim 64",
    )
    assert backend.explain("window", CUDA, torch.bfloat16, 96)[0] == "triton"
    name, reason = backend.explain("window", CUDA, dtype, head_dim)
    assert name == "reference"
    assert "the kernels take" in reason


def test_without_triton(old_gpu, monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda package: False)
    assert backend.explain("window", CUDA, torch.bfloat16, 64) == (
        "reference",
        "triton is not installed; triton is not installed",
    )


def test_a_forced_back_end_runs_or_raises(monkeypatch):
    x = torch.zeros(1, 4, 1, 8)
    monkeypatch.setenv("ZOO_BACKEND", "reference")
    window_attention(x, x, x)
    assert backend.explain("window", "cpu", torch.float32, 8) == ("reference", "ZOO_BACKEND asks for it")
    monkeypatch.setenv("ZOO_BACKEND", "triton")
    with pytest.raises(ValueError, match="ZOO_BACKEND=triton can't run this call"):
        window_attention(x, x, x)
    assert backend.explain("window", "cpu", torch.float32, 8)[0] == "none"
    monkeypatch.setenv("ZOO_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="'cudnn' is not one of hopper, triton, reference"):
        window_attention(x, x, x)
    assert backend.explain("window", "cpu", torch.float32, 8)[0] == "none"


def test_values_are_not_looked_at_off_the_cpu(monkeypatch):
    """The check would stall a GPU: it runs there under ZOO_DEBUG=1 only."""
    from zoo.ops import window

    class Elsewhere:
        device = torch.device("cuda")
        shape = (1, 4, 1, 8)

    bad = torch.ones(1, 4, 1)
    window._check_values(Elsewhere(), Elsewhere(), bad, None, None)
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(ValueError, match="log_decay"):
        window._check_values(Elsewhere(), Elsewhere(), bad, None, None)


def test_the_cpu_path_needs_no_triton():
    """Imports of triton fail here, as they do on macOS and Windows."""
    code = "import sys; sys.modules['triton'] = None; import torch; from zoo.ops import window_attention; "
    code += "x = torch.ones(1, 3, 1, 4, requires_grad=True); window_attention(x, x, x, window=2).sum().backward(); "
    code += "assert 'zoo.kernels.window' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
