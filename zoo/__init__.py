"""GatedFWA zoo: one backbone of linear-time token mixers, many autoregressive domains.

The public surface loads lazily: `import zoo` imports neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.generation import Sampling, generate
    from zoo.model import create_model, list_models
    from zoo.pipelines import Pipeline, pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "Sampling", "create_model", "generate", "list_models", "pipeline"]

_HOME = {
    "Pipeline": "zoo.pipelines",
    "Sampling": "zoo.generation",
    "create_model": "zoo.model",
    "generate": "zoo.generation",
    "list_models": "zoo.model",
    "pipeline": "zoo.pipelines",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
