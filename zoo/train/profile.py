"""Where the time goes, and how much of the device it uses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

# Dense bfloat16 FLOP/s of the makers' data sheets, by a part of the name that CUDA gives; the first that fits counts
PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
WARM, ACTIVE = 5, 3  # steps


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device can do in a second at most; None for a CPU, an unknown device, or full float32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def training_flops(model: nn.Module, batch: Any) -> float:
    """FLOPs of a step on `batch`: three times the forward pass, on exactly the visible pairs of its rows; recomputed
    activations do not count. Packed documents count as one row. 0 for a model that does not say."""
    count: Callable[[int], int] | None = getattr(model, "flops", None)
    if count is None or not isinstance(batch.targets, Tensor) or batch.targets.dim() < 2:
        return 0.0
    rows, tokens = batch.targets.shape[:2]
    return 3.0 * rows * count(tokens)


class Profile:
    """Records ACTIVE steps after WARM ones; leaves <folder>/trace-rank0.json (for https://ui.perfetto.dev) and a
    table. `step` returns the table once it is there."""

    def __init__(self, folder: Path, rank: int, device: torch.device):
        self.folder, self.rank, self.table = folder, rank, ""
        cuda = device.type == "cuda"
        self._key = "self_device_time_total" if cuda else "self_cpu_time_total"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WARM - 1, warmup=1, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._profile.start()
        self._open = True

    def step(self) -> str:
        if not self._open:
            return ""
        self._profile.step()
        if self.table:
            self.close()
        return self.table

    def close(self) -> None:
        if self._open:
            self._open = False
            self._profile.stop()

    def _write(self, done: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self.folder / f"trace-rank{self.rank}.json"))
        self.table = done.key_averages().table(sort_by=self._key, row_limit=30, max_name_column_width=60)
        (self.folder / f"table-rank{self.rank}.txt").write_text(self.table, encoding="utf-8")
