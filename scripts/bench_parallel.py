"""Two GPUs of one machine against one: equal losses, speed, long rows, checkpoints, a killed rank.

    python scripts/bench_parallel.py --out $OUT/parallel.jsonl          everything, about 6 minutes on two H200
    python scripts/bench_parallel.py --only equal resume kill           some parts
    python scripts/bench_parallel.py --tiny                             the same on two processes of a CPU, in no time

    equal    8M-class model, 50 steps from one recipe and seed: ddp, fsdp and context on two ranks against one; a second
             run of one with smaller micro-batches shows what bfloat16's rounding alone does
    scaling  tokens/s of one GPU and of two. Each GPU has the same batch in both (weak scaling). Also how the GPUs are
             linked, and what an all-reduce moves
    long     one row of T = 1,048,576 on one GPU, and split between two
    resume   a checkpoint of two ranks on one, and of one on two: every tensor, and the losses that follow
    kill     rank 1 killed in mid-step: seconds until the job has ended, what it said, and going on from its checkpoint
    trace    how long a step's exchanges take, and how much of that no computation hides (needs `scaling`'s settings)

Recipes and arms are those of bench_train.py: made-up tokens, bfloat16, compiled. Jobs of one GPU run two at a time, a
GPU each; jobs of both GPUs one after the other in the same two processes. A job that fails or takes longer than its
limit costs itself alone: its processes end, and the rest begins anew. Every finding is a JSON line, printed and added
to --out as soon as it is known. --work keeps the runs; a job whose run is there already is not repeated. What a job
does in its processes: parallel_worker.py.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from parallel_worker import Job, Row, rows_of

PARTS = ("equal", "scaling", "long", "resume", "kill", "trace")
# NVLink multicast can put a shared machine's GPUs out of service: off, in every process that is started here
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
LAUNCH = "import sys; from zoo.train.launch import launch; sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))"

# ---------------------------------------------------------------------------------------------------------------- plan
# arm, tokens of a row, tokens of a step on one GPU, rows of a micro-batch
SMALL = {"arm": "gatedfwa-8m+narrow", "tokens": 2048, "budget": 16384, "micro": 2, "steps": 50}
SHORT = {"arm": "gatedfwa+narrow", "tokens": 4096, "budget": 65536, "micro": 8, "steps": 30}
MIDDLE = {**SHORT, "tokens": 16384, "micro": 2}
LARGE = {"arm": "gatedfwa-1b+narrow", "tokens": 4096, "budget": 65536, "micro": 8, "steps": 20}
LONG = {"arm": "gatedfwa+narrow", "tokens": 1 << 20, "budget": 1 << 20, "micro": 1, "steps": 4}
SPREADS = {"ddp": {"name": "ddp"}, "fsdp": {"name": "fsdp"}, "context": {"name": "ddp", "context": 2}}


def plan(parts: list[str]) -> tuple[list[Job], list[list[Job]], list[Job]]:
    """(of both GPUs, of one GPU each, of both GPUs once those are done), without what is in no part."""
    save = SMALL["steps"] // 2
    equal = [train_job("equal", way, SMALL, spread=spread, save_every=save) for way, spread in SPREADS.items()]
    scaling = [
        train_job("scaling", "1b-on-2", LARGE, spread=SPREADS["fsdp"], each=2, limit=120),
        train_job("scaling", "4096-on-2", SHORT, spread=SPREADS["ddp"], each=2),
        train_job("scaling", "16384-on-2", MIDDLE, spread=SPREADS["ddp"], each=2),
    ]
    both = [
        {"part": "scaling", "do": "links", "name": "links", "limit": 60},
        *(equal[1:] + equal[:1]),  # fsdp first: `resume` takes up its checkpoint
        *scaling,
        train_job("long", "long-on-2", LONG, spread=SPREADS["context"], limit=120),
        train_job("trace", "trace-1b", {**LARGE, "steps": 9}, spread=SPREADS["fsdp"], each=2, trace=True, limit=120),
        train_job("trace", "trace-4096", {**SHORT, "steps": 9}, spread=SPREADS["ddp"], each=2, trace=True, limit=90),
    ]
    one_a = [
        train_job("equal", "one", SMALL, save_every=save),
        *carried_over("fsdp", "fsdp-then-one", save, None),
        train_job("scaling", "4096-on-1", SHORT, limit=120),
        train_job("scaling", "16384-on-1", MIDDLE, limit=120),
        train_job("scaling", "4096-on-1-blocks", with_variant(SHORT, "blocks")),
    ]
    one_b = [
        train_job("equal", "one-other", {**SMALL, "micro": 1}, save_every=0),
        train_job("scaling", "1b-on-1", with_variant(LARGE, "blocks"), limit=120),
        train_job("long", "long-on-1", with_variant(LONG, "blocks"), limit=120),
    ]
    late = [
        *carried_over("one", "one-then-fsdp", save, SPREADS["fsdp"]),
        train_job("kill", "killed", SMALL, spread=SPREADS["fsdp"], save_every=save, kill=save + save // 2),
        train_job("kill", "killed", SMALL, spread=SPREADS["fsdp"], save_every=save, resume=True),
    ]
    needed = {"one": {"equal", "resume"}, "fsdp": {"equal", "resume", "kill"}}  # runs that other parts take up

    def chosen(jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if not needed.get(job["name"], {job["part"]}).isdisjoint(parts)]

    return chosen(both), [chosen(one_a), chosen(one_b)], chosen(late)


def train_job(
    part: str, name: str, size: Job, *, spread: Job | None = None, each: int = 1, limit: int = 75, **more: Any
) -> Job:
    """each: how often a step holds the size's budget: once a GPU for weak scaling."""
    size = {**size, "budget": size["budget"] * each}
    return {"part": part, "do": "train", "name": name, "size": size, "spread": spread, "limit": limit, **more}


def carried_over(source: str, name: str, save: int, spread: Job | None) -> list[Job]:
    """Take up the checkpoint in the middle of a run: write it again as it is, and go on from it."""
    common = {"spread": spread, "save_every": save, "source": source, "at": save}
    return [
        train_job("resume", f"{name}-resaved", SMALL, **common) | {"do": "resave"},
        train_job("resume", name, SMALL, **common, resume=True),
    ]


def with_variant(size: Job, variant: str) -> Job:
    return {**size, "arm": f"{size['arm']}+{variant}"}


def shrink() -> None:
    """--tiny: what a CPU does in seconds; the same code, the same plan."""
    tiny = {"tokens": 64, "budget": 256, "micro": 1, "steps": 8}
    for size in (SMALL, SHORT, MIDDLE, LARGE, LONG):
        size.update(tiny)
    SMALL.update(budget=512, micro=2)
    LONG.update(budget=64)


# ----------------------------------------------------------------------------------------------------------- the parent


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work = options, work
        self.lock = threading.Lock()
        self.found: dict[str, Row] = {}
        self.live: list[subprocess.Popen] = []
        work.mkdir(parents=True, exist_ok=True)

    def say(self, row: Row) -> None:
        line = json.dumps(row)
        with self.lock:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            if self.options.out:
                with Path(self.options.out).open("a") as file:
                    file.write(line + "\n")

    def run(self, jobs: list[Job], ranks: int, gpu: int | None = None) -> None:
        """Jobs one after the other in `ranks` processes; new ones after a job that failed."""
        jobs = [job for job in jobs if self.prepare(job)]
        while jobs:
            done = self.start(jobs, ranks, gpu)
            jobs = jobs[done:]

    def prepare(self, job: Job) -> bool:
        """False for a run that is there already. A job that goes on from another's checkpoint gets a copy of it."""
        folder = self.work / job["name"]
        if "source" not in job:
            if (folder / "checkpoints" / f"step-{job.get('size', {}).get('steps', 0):08d}").exists():
                return False
            if not job.get("resume"):
                shutil.rmtree(folder, ignore_errors=True)
            return True
        source = self.work / job["source"]
        kept = source / "checkpoints" / f"step-{job['at']:08d}"
        if not kept.exists():
            self.say({"part": job["part"], "name": job["name"], "error": f"{job['source']} left no checkpoint"})
            return False
        shutil.rmtree(folder, ignore_errors=True)
        later = [path.name for path in (source / "checkpoints").iterdir() if path != kept]
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*later, "profile", "tensorboard"))
        return True

    def start(self, jobs: list[Job], ranks: int, gpu: int | None) -> int:
        """Run jobs until one fails; returns how many are done with."""
        base = self.work / f"start-{'both' if gpu is None else gpu}-{time.monotonic_ns()}"
        events, told = base.with_suffix(".events"), base.with_suffix(".json")
        events.touch()
        content = {"jobs": jobs, "tiny": self.options.tiny, "work": str(self.work), "events": str(events)}
        told.write_text(json.dumps(content))
        root = Path(__file__).resolve().parents[1]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if gpu is not None and not self.options.tiny:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        worker = [sys.executable, str(root / "scripts" / "parallel_worker.py"), str(told)]
        command = worker if ranks == 1 else [sys.executable, "-c", LAUNCH, str(ranks), *worker]
        with base.with_suffix(".log").open("w") as log:
            # A group of its own, to be ended whole; in the session of this one, to end with it
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0)
            self.live.append(process)
            done, error = self.follow(process, jobs, events)
            seconds = end_group(process)
        text = base.with_suffix(".log").read_text(errors="replace")
        if done < len(jobs):
            self.failed(jobs[done], error or f"exit code {process.returncode}", text, seconds)
            return done + 1
        return done

    def follow(self, process: subprocess.Popen, jobs: list[Job], path: Path) -> tuple[int, str]:
        """Says what jobs found, as they do; returns how many ended well, and why the next did not, if it took long."""
        done, read, since = 0, 0, time.monotonic()
        while True:
            ended = process.poll() is not None
            lines = path.read_text().splitlines(keepends=True)
            for line in (line for line in lines[read:] if line.endswith("\n")):
                read += 1
                event, since = json.loads(line), time.monotonic()
                if "ended" in event:
                    job = jobs[event["ended"]]
                    self.found[job["name"]] = event["row"]
                    done = event["ended"] + 1
                    if event["row"]:
                        self.say({"part": job["part"], "name": job["name"], **event["row"]})
                    self.judge(job)
            if ended:
                return done, ""
            start = self.options.start if read == 0 else 0
            if done < len(jobs) and time.monotonic() - since > start + jobs[done]["limit"]:
                return done, f"no end after {jobs[done]['limit']} s"
            if done == len(jobs) and time.monotonic() - since > 30:
                return done, ""
            time.sleep(0.05)

    def failed(self, job: Job, error: str, log: str, seconds: float) -> None:
        note = self.work / job["name"] / "killed"
        if job.get("kill") and note.exists():
            said = [line for line in log.splitlines() if line.startswith(("zoo: rank", "rank "))]
            self.say(
                {
                    "part": "kill",
                    "name": job["name"],
                    "killed_in_step": job["kill"],
                    "seconds_to_the_end": round(seconds - note.stat().st_mtime, 2),
                    "said": said[:4],
                    "error": error,
                }
            )
            return
        self.say({"part": job["part"], "name": job["name"], "error": error, "log": log[-1500:]})

    def close(self) -> None:
        for process in self.live:
            if process.poll() is None:
                end_group(process)

    # -- what several jobs say together -------------------------------------------------------------------------------

    def judge(self, job: Job) -> None:
        with suppress(FileNotFoundError):  # of a run that is not there yet
            if job["do"] == "resave":
                self.same_tensors(job)
            elif job["part"] in ("resume", "kill"):
                other = job.get("source", "fsdp")
                self.same_losses(job["part"], job["name"], other, after=job["save_every"])
            elif job["part"] == "equal" and job["name"] in ("one", "one-other"):
                self.all_equal()
            elif job["part"] in ("scaling", "long"):
                self.speed_up(job)

    def all_equal(self, late: bool = False) -> None:
        """Once both runs of one GPU are there; late: now, also without the one that shows the noise."""
        with self.lock:
            known = {"one", "one-other"} & self.found.keys()
            if "equal" in self.found or "one" not in known or (len(known) < 2 and not late):
                return
            self.found["equal"] = {}
        noise = None
        if len(known) == 2:
            noise = apart(self.losses("one-other"), self.losses("one"))
            self.say({"part": "equal", "name": "one-other", "against": "one", "noise": True, **noise})
        for way in SPREADS:
            with suppress(FileNotFoundError):
                self.same_losses("equal", way, "one", noise)

    def same_losses(self, part: str, name: str, other: str, noise: Row | None = None, after: int = 0) -> None:
        mine = {step: loss for step, loss in self.losses(name).items() if step > after}
        theirs = self.losses(other)
        row = {"part": part, "name": name, "against": other, **apart(mine, theirs)}
        if "mean" in row and noise is not None and noise.get("mean"):
            row["mean_over_noise"] = round(row["mean"] / noise["mean"], 2)
        self.say(row)

    def losses(self, name: str) -> dict[int, float]:
        return {row["step"]: row["train/loss"] for row in rows_of(self.work / name)}

    def same_tensors(self, job: Job) -> None:
        """The checkpoint that was taken up, and the one written from what was loaded."""
        from zoo.train import checkpoint

        folder = self.work / job["name"]
        paths = [found / "checkpoints" / f"step-{job['at']:08d}" for found in (folder, folder / "again")]
        worlds = [checkpoint.read_manifest(path)["world"] for path in paths]
        count, different = 0, []
        for stem in ("model", "optimizer"):
            before, after = (checkpoint.read_tensors(path, stem) or {} for path in paths)
            count += len(before)
            different += [name for name in before if name not in after or not torch.equal(before[name], after[name])]
            different += [name for name in after if name not in before]
        row = {"saved_by": worlds[0], "loaded_by": worlds[1], "tensors": count, "different": different[:5]}
        self.say({"part": "resume", "name": job["name"], "equal": not different, **row})

    def speed_up(self, job: Job) -> None:
        """Of two GPUs over one, as soon as both are known."""
        kind, _, ranks = job["name"].partition("-on-")
        if (
            ranks not in ("1", "2")
            or (one := self.found.get(f"{kind}-on-1")) is None
            or (two := self.found.get(f"{kind}-on-2")) is None
        ):
            return
        rates = one["tokens_per_second"], two["tokens_per_second"]
        row = {"part": job["part"], "name": f"{kind}: two over one", "speed_up": round(rates[1] / rates[0], 3)}
        row |= {"tokens_per_second": rates, "step_seconds": (one["step_seconds"], two["step_seconds"])}
        self.say({**row, "peak_gib_a_rank": (one["peak_gib"], two["peak_gib"])})


def apart(mine: dict[int, float], theirs: dict[int, float]) -> Row:
    """How far two curves lie from each other, over the steps that both have."""
    steps = sorted(mine.keys() & theirs.keys())
    if not steps:
        return {"steps": 0}
    differences = [abs(mine[step] - theirs[step]) for step in steps]
    row: Row = {"steps": len(steps), "first": steps[0], "largest": round(max(differences), 5)}
    row["mean"] = round(statistics.mean(differences), 6)
    return row | {"last_losses": [round(curve[steps[-1]], 4) for curve in (mine, theirs)]}


def end_group(process: subprocess.Popen) -> float:
    """End a launch and all that it started; returns when it was over."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    over = time.time()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", help="a file that findings are added to")
    parser.add_argument("--work", help="where runs are kept; without it they are deleted at the end")
    parser.add_argument("--start", type=float, default=60, help="seconds that processes may take to start")
    parser.add_argument("--tiny", action="store_true", help="a small model on two processes of the CPU")
    options = parser.parse_args()
    if options.tiny:
        shrink()
    elif torch.cuda.device_count() < 2:
        raise SystemExit(f"this machine has {torch.cuda.device_count()} GPUs that torch can use; it takes two")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(options.work or folder))
        try:
            run_plan(bench, *plan(options.only))
        finally:
            bench.close()


def run_plan(bench: Bench, both: list[Job], singles: list[list[Job]], late: list[Job]) -> None:
    began = time.monotonic()
    bench.run(both, ranks=2)
    beside: list[Callable[[], None]] = [
        lambda jobs=jobs, gpu=gpu: bench.run(jobs, ranks=1, gpu=gpu)
        for gpu, jobs in enumerate(singles)  # type: ignore[misc]
    ]
    threads = [threading.Thread(target=work, daemon=True) for work in beside]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if "equal" in bench.options.only:
        bench.all_equal(late=True)
    bench.run(late, ranks=2)
    bench.say({"part": "all", "seconds": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
