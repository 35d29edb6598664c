"""What a process of bench_parallel.py does: the jobs of a file, one after another.

    python scripts/parallel_worker.py told.json

The file holds the jobs of bench_parallel.plan, where runs are kept, and where this process tells what it is at: a line
when a job begins, and one with its findings when it has ended.
"""

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import bench_train
import torch
import torch.distributed as dist

Job = dict[str, Any]
Row = dict[str, Any]


class Worker:
    """One process, of one rank: runs jobs and tells the parent of each by a line in a file."""

    def __init__(self, path: Path):
        told = json.loads(path.read_text())
        self.jobs: list[Job] = told["jobs"]
        self.tiny: bool = told["tiny"]
        self.work, self.events = Path(told["work"]), Path(told["events"])
        self.rank = int(os.environ.get("RANK", "0"))
        if self.tiny:
            bench_train.VOCABULARY = 512

    def run(self) -> None:
        for place, job in enumerate(self.jobs):
            self.tell({"began": place})
            row = {"train": self.train, "resave": self.resave, "links": self.links}[job["do"]](job)
            self.tell({"ended": place, "row": row})
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    def tell(self, event: Job) -> None:
        if self.rank == 0:
            with self.events.open("a") as file:
                file.write(json.dumps(event) + "\n")

    def recipe(self, job: Job) -> Any:
        size = job["size"]
        arm, *variants = size["arm"].split("+")
        train = {"parallel": job["spread"] or {}, "save_every": job.get("save_every") or 0, "keep": 0}
        changes = [*bench_train.apply(variants), {"train": train}]
        if self.tiny:
            backbone = {"width": 32, "heads": 2, "depth": 2, "mixer": {"window": 8}}
            quick = {"compile": False, "device": "cpu", "schedule": {"warmup": 2}}
            changes.append({"model": {"backbone": backbone, "head": {"vocabulary": 512}}, "train": quick})
        return bench_train.recipe_of(arm, *(size[name] for name in ("tokens", "budget", "micro", "steps")), changes)

    def train(self, job: Job) -> Row:
        from zoo.train import train

        recipe, folder, size = self.recipe(job), self.work / job["name"], job["size"]
        profile = bool(job.get("trace")) and not self.tiny  # on a CPU it takes a minute
        began = time.monotonic()
        with self.watched(job, folder) as peaks:
            train(recipe, folder, resume=bool(job.get("resume")), profile=profile)
        rows = rows_of(folder)
        late = [row for row in rows if row["step"] > bench_train.warm_steps(size["steps"])]
        row: Row = {"arm": size["arm"], "tokens": size["tokens"], "budget": size["budget"], "micro": size["micro"]}
        row |= {"parallel": job["spread"] or "one GPU", "ranks": len(peaks)}
        if not profile:
            row["tokens_per_second"] = round(statistics.median(r["tokens_per_second"] for r in late))
            row["step_seconds"] = round(size["budget"] / row["tokens_per_second"], 4)
            row["mfu"] = round(statistics.median(r.get("mfu", 0.0) for r in late), 3)
        seconds = round(time.monotonic() - began, 1)
        row |= {"peak_gib": peaks, "last_loss": rows[-1]["train/loss"], "job_seconds": seconds}
        if profile and self.rank == 0:
            row |= exchange_table(folder / "profile" / "trace-rank0.json")
        return row

    @contextmanager
    def watched(self, job: Job, folder: Path) -> Iterator[list[float]]:
        """Memory of each rank is read before it leaves; a run that is only timed is not saved (its end would write and
        hash gigabytes); `kill`: rank 1 is killed after the first micro-batch of that step, the other rank goes on."""
        from zoo.train import parallel
        from zoo.train.run import Run

        peaks: list[float] = []
        close, save, micro_batch = parallel.Ranks.close, Run.save, parallel.Ranks.micro_batch

        def close_and_tell(ranks: Any, error: BaseException | None = None) -> None:
            if error is None:
                peaks[:] = ranks.each(peak_gib)
            close(ranks, error)

        seen = [0]

        @contextmanager
        def until_killed(ranks: Any, forward: Any, *, last: bool) -> Iterator[None]:
            with micro_batch(ranks, forward, last=last):
                yield
            seen[0] += last
            if ranks.rank == 1 and seen[0] + 1 == job["kill"] and not last:
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        parallel.Ranks.close = close_and_tell  # type: ignore[method-assign]
        if not job.get("save_every"):
            Run.save = lambda run: run.run  # type: ignore[method-assign,assignment]
        if job.get("kill"):
            parallel.Ranks.micro_batch = until_killed  # type: ignore[method-assign,assignment]
        try:
            yield peaks
        finally:
            parallel.Ranks.close, Run.save = close, save  # type: ignore[method-assign]
            parallel.Ranks.micro_batch = micro_batch  # type: ignore[method-assign]

    def resave(self, job: Job) -> Row:
        """Take up the checkpoint in `name` and write it again into `name`-again."""
        from zoo.train import checkpoint, parallel
        from zoo.train.recipe import find_start, make_model, make_task, pick_device, what_a_number_carries
        from zoo.train.run import Run

        recipe, folder = self.recipe(job), self.work / job["name"]
        device = pick_device(recipe.train.device)
        ranks = parallel.start_ranks(recipe.train.parallel, device)
        checkpoint.seed_everything(recipe.train.seed)
        task = make_task(recipe)
        found, _ = ranks.first(lambda: find_start(recipe, folder, True))
        facts = what_a_number_carries(recipe, task)
        state = Run(recipe, folder / "again", task, make_model(recipe, task), device, ranks, facts, found)
        state.save()
        state.stream.close()
        ranks.close()
        return {}

    def links(self, job: Job) -> Row:
        """What an all-reduce moves, and how nvidia-smi draws the machine."""
        from zoo.train import parallel
        from zoo.train.recipe import pick_device

        device = pick_device("cpu" if self.tiny else "auto")
        ranks = parallel.start_ranks(parallel.ParallelConfig(), device)
        data = torch.ones(1 << 10 if self.tiny else 1 << 27, device=device)  # 512 MiB
        times = []
        for _ in range(8):
            wait(device)
            began = time.monotonic()
            dist.all_reduce(data)
            wait(device)
            times.append(time.monotonic() - began)
        row: Row = {"all_reduce_gb_per_second": round(data.nbytes / statistics.median(times[3:]) / 1e9, 1)}
        if device.type == "cuda":
            row["peer_access"] = torch.cuda.can_device_access_peer(0, 1)
            row["device"] = torch.cuda.get_device_name(device)
            row["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[arg-type]
            with suppress(OSError, subprocess.SubprocessError):
                topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20)
                row["topology"] = topology.stdout.splitlines()[:4]
        ranks.close()
        return row


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def exchange_table(trace: Path) -> Row:
    """ms a step of rank 0: exchanges between ranks, the part of them beside which nothing is computed, computation, and
    no work at all."""
    from zoo.train.profile import ACTIVE

    events = json.loads(trace.read_text())["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    exchanges = [(e["ts"], e["ts"] + e["dur"]) for e in work if "nccl" in e["name"].lower()]
    computing = [(e["ts"], e["ts"] + e["dur"]) for e in work if "nccl" not in e["name"].lower()]
    every = covered(exchanges + computing)
    span = max(end for _, end in exchanges + computing) - min(begin for begin, _ in exchanges + computing)
    found = {
        "exchanges": covered(exchanges),
        "exchanges_alone": every - covered(computing),
        "computation": covered(computing),
        "idle": span - every,
    }
    return {"ms_a_step": {name: round(us / 1000 / ACTIVE, 2) for name, us in found.items()}}


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of their union."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def rows_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    Worker(Path(sys.argv[1])).run()
