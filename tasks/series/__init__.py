"""Time series: patches or quantised values in, quantiles, mixtures or points of the next values out."""

from importlib import import_module

from zoo import registry

DATASETS = {
    "series/etth1": "data:ETTh1",
    "series/etth2": "data:ETTh2",
    "series/ettm1": "data:ETTm1",
    "series/ettm2": "data:ETTm2",
    "series/exchange": "data:Exchange",
    "series/m4_hourly": "data:M4Hourly",
    "series/csv": "tables:Table",
    "series/parquet": "tables:Table",
}


def register() -> None:
    """Names of the domain; what they stand for is imported on first use."""
    registry.tasks.add("series", "tasks.series.task:SeriesTask")
    for name, attribute in DATASETS.items():
        registry.datasets.add(name, f"tasks.series.{attribute}")
    import_module("tasks.series.models")
    registry.heads.add("series", "tasks.series.head:SeriesHead")
    registry.heads.add("series_tokens", "tasks.series.tokens:SeriesTokenHead")
