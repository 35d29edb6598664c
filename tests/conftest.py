"""What every test can rely on: one thread, fixed seeds, a home of its own, no network, a reason for every skip."""

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

KEPT_SETTINGS = ("ZOO_DATA", "ZOO_REQUIRE_DATA", "ZOO_TEST_WORKERS")
CACHES = (
    "HOME",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "HF_HOME",
    "TORCH_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports torch or huggingface_hub, which read these once. xdist's workers inherit them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    for name in [name for name in os.environ if name.startswith("ZOO_") and name not in KEPT_SETTINGS]:
        del os.environ[name]
    config.zoo_home = Path(tempfile.mkdtemp(prefix="zoo-tests-"))  # type: ignore[attr-defined]
    for name in CACHES:
        os.environ[name] = str(config.zoo_home / name.lower())  # type: ignore[attr-defined]
        Path(os.environ[name]).mkdir()
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "zoo_home"):
        shutil.rmtree(config.zoo_home, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the standard data sets. Without one the test is skipped, or fails under ZOO_REQUIRE_DATA=1."""
    named = os.environ.get("ZOO_DATA", "")
    if named and Path(named).is_dir():
        return Path(named)
    reason = f"ZOO_DATA={named} is no folder" if named else "ZOO_DATA does not name a folder with the data sets"
    if os.environ.get("ZOO_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
