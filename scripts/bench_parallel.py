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
to --out as soon as it is known. --work keeps the runs; a job whose run is there already is not repeated.
"""

import argparse
import gc
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import bench_train
import torch
import torch.distributed as dist

PARTS = ("equal", "scaling", "long", "resume", "kill", "trace")
# NVLink multicast can put a shared machine's GPUs out of service: off, in every process that is started here
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
LAUNCH = "import sys; from zoo.train.launch import launch; sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))"
Job = dict[str, Any]
Row = dict[str, Any]

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


# ----------------------------------------------------------------------------------------------- jobs, in their process


class Worker:
    """One process, of one rank: runs jobs and tells the parent of each by a line in a file."""

    def __init__(self, path: Path):
        told = json.loads(path.read_text())
        self.jobs: list[Job] = told["jobs"]
        self.tiny: bool = told["tiny"]
        self.work, self.events = Path(told["work"]), Path(told["events"])
        self.rank = int(os.environ.get("RANK", "0"))
        if self.tiny:
            shrink()
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
        worker = [sys.executable, str(Path(__file__).resolve()), "--worker", str(told)]
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
        with suppress(FileNotFoundError, KeyError):
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
        if noise is not None and noise["mean"]:
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


def rows_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def apart(mine: dict[int, float], theirs: dict[int, float]) -> Row:
    """How far two curves lie from each other, over the steps that both have."""
    steps = sorted(mine.keys() & theirs.keys())
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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        Worker(Path(options.worker)).run()
        return
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
