"""scripts/bench_parallel.py from end to end with a tiny model on two processes of the CPU, and its real plan as far as
a CPU can read it: what is wrong with it fails here and not on the GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from zoo import registry

pytest.importorskip("triton")

FILE = Path(__file__).parents[1] / "scripts" / "bench_parallel.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FILE.parent))  # as where a script lies is
    try:
        spec = importlib.util.spec_from_file_location("bench_parallel", FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FILE.parent))
    return module


def findings(tmp_path, *parts):
    words = ["--tiny", "--only", *parts, "--out", str(tmp_path / "out.jsonl")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(FILE), *words], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "log" in row]
    return rows


def test_resuming_in_small(tmp_path):
    """On two processes, on one, and on two again."""
    rows = findings(tmp_path, "resume")
    resaved = {row["name"]: row for row in rows if "different" in row}
    for name, worlds in (("fsdp-then-one-resaved", (2, 1)), ("one-then-fsdp-resaved", (1, 2))):
        assert resaved[name]["equal"], rows
        assert resaved[name]["tensors"] > 50
        assert (resaved[name]["saved_by"], resaved[name]["loaded_by"]) == worlds
    compared = {row["name"]: row for row in rows if "against" in row}
    assert compared.keys() == {"fsdp-then-one", "one-then-fsdp"}
    assert all(row["steps"] == 4 and row["largest"] < 0.01 for row in compared.values())


@pytest.mark.slow
def test_the_rest_in_small(tmp_path):
    rows = findings(tmp_path, "equal", "scaling", "long", "kill")
    compared = {row["name"]: row for row in rows if "against" in row}
    assert compared.keys() == {"one-other", "ddp", "fsdp", "context", "killed"}
    assert all(row["largest"] < 0.01 for row in compared.values())
    assert {row["name"].partition(":")[0] for row in rows if "speed_up" in row} == {"1b", "4096", "16384", "long"}
    killed = next(row for row in rows if "killed_in_step" in row)
    assert killed["seconds_to_the_end"] < 30
    assert killed["said"][0] == "zoo: rank 1 ended with signal SIGKILL; ending the job"
    assert killed["said"][1].startswith("rank 0: rank 1 ended with signal SIGKILL. This rank was at: step 6")


def test_curves_without_a_common_step_are_a_row(bench, tmp_path):
    assert bench.apart({1: 0.5}, {2: 0.5}) == {"steps": 0}
    made = bench.Bench(Namespace(out=tmp_path / "out.jsonl"), tmp_path)
    for name, step in (("one", 1), ("ddp", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": step, "train/loss": 0.5}) + "\n")
    made.same_losses("equal", "ddp", "one", noise={"steps": 0})
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert found == {"part": "equal", "name": "ddp", "against": "one", "steps": 0}


def test_only_a_run_that_is_not_there_is_passed_over(bench, tmp_path):
    made = bench.Bench(Namespace(out=None), tmp_path)
    job = bench.train_job("resume", "fsdp-then-one", bench.SMALL, source="fsdp", save_every=4)
    made.judge(job)
    (tmp_path / "fsdp-then-one").mkdir()
    (tmp_path / "fsdp-then-one" / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(KeyError):
        made.judge(job)


def test_the_real_plan(bench, monkeypatch):
    """Every job's recipe can be built, and its batch shared by its ranks; every part has jobs."""
    monkeypatch.setitem(registry.tasks._entries, "random", None)
    parallel_worker = sys.modules["parallel_worker"]
    worker = parallel_worker.Worker.__new__(parallel_worker.Worker)
    worker.tiny = False
    monkeypatch.setattr(parallel_worker.bench_train, "put", lambda *_: None)
    both, singles, late = bench.plan(list(bench.PARTS))
    seen = set()
    for job, ranks in [*((job, 2) for job in both + late), *((job, 1) for jobs in singles for job in jobs)]:
        seen.add(job["part"])
        if job["do"] == "links":
            continue
        recipe = worker.recipe(job)
        readers = ranks // recipe.train.parallel.context
        assert recipe.train.batch_size % (recipe.train.micro_batch_size * readers) == 0, job
        parts = recipe.train.batch_size // (recipe.train.micro_batch_size * readers)
        assert parts > 1 or not job.get("kill"), "it is killed between two micro-batches"
    assert seen == set(bench.PARTS)
    assert [job["name"] for job in bench.plan(["kill"])[0]] == ["fsdp"]


def test_what_no_computation_hides(bench, tmp_path):
    trace = tmp_path / "trace.json"
    events = [("ncclDevKernel_AllReduce", 0, 3000), ("gemm", 2000, 4000), ("triton_", 9000, 3000)]
    named = [{"cat": "kernel", "name": name, "ts": ts, "dur": dur} for name, ts, dur in events]
    trace.write_text(json.dumps({"traceEvents": [*named, {"cat": "cpu_op", "name": "nccl", "ts": 0, "dur": 99}]}))
    found = sys.modules["parallel_worker"].exchange_table(trace)["ms_a_step"]
    assert found == {"exchanges": 1.0, "exchanges_alone": 0.67, "computation": 2.33, "idle": 1.0}
