"""Any number of ranks gives the numbers of one process: gloo on the CPU, float64.

Two starts, of two and of four processes, do most of the work; the tests look at what they left behind.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import rank_worker
import torch
from rank_worker import rows_recipe

from zoo import config as configs
from zoo.backbone import Backbone, BackboneConfig
from zoo.config import Choice, ConfigError
from zoo.evaluate import evaluate_run
from zoo.mixers.base import Context
from zoo.mixers.softmax import Softmax
from zoo.train import ParallelConfig, checkpoint, optim, parallel, train, watchdog
from zoo.train.parallel import Halo, Ranks
from zoo.train.watchdog import EXIT

HERE = Path(__file__).parent
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def start(ranks, folder, jobs, check=True, launcher=None):
    """Run jobs (see rank_worker) in that many processes; returns the finished launcher."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = [str(HERE / "rank_worker.py"), str(folder / "jobs.json")]
    program = "import sys; from zoo.train.launch import launch; sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))"
    command = launcher or [sys.executable, "-c", program, str(ranks), sys.executable]
    paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *worker], env=env, capture_output=True, text=True, timeout=280)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def job(name, folder, **settings):
    return {"do": name, "folder": str(folder), **settings}


WAYS = {  # name -> ranks, parallel, model
    "ddp": (2, {"name": "ddp"}, {}),
    "fsdp": (2, {"name": "fsdp"}, {}),
    "context": (2, {"name": "ddp", "context": 2}, {}),
    "context, checkpointed": (2, {"name": "ddp", "context": 2}, {"checkpoint": True}),
    "fsdp on 4": (4, {"name": "fsdp", "reshard": False}, {}),
    "context 4": (4, {"name": "ddp", "context": 4}, {}),
    "fsdp and context": (4, {"name": "fsdp", "context": 2}, {"checkpoint": True}),
}


@pytest.fixture(autouse=True)
def rows(toys):
    rank_worker.install()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Runs of one process."""
    made = {}

    def get(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("single")
            rank_worker.RowModel.faults = {}
            train(rows_recipe(**settings), made[key])
        return made[key]

    return get


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def of(ranks, root):
    """The jobs that train in each way on so many ranks."""
    return [
        job("run", root / name, parallel_to=spread, model=model)
        for name, (count, spread, model) in WAYS.items()
        if count == ranks
    ]


@pytest.fixture(scope="module")
def scored(root):
    """A run in float32 (sums of its batches are exact in float64), made by one process."""
    with rank_worker.toytask.installed():
        rank_worker.install()
        train(rows_recipe(model={"double": False}), root / "scored")
    return root / "scored"


@pytest.fixture(scope="module")
def two(root, scored):
    jobs = [
        {"do": "agreement", "into": str(root / "agreement")},
        *of(2, root),
        job("run", root / "nan", faults={"nan": [14, 15, 27]}),
        job("run", root / "diverged", faults={"nan": [15, 27, 39]}, max_skipped=2, expect="Diverged"),
        job("run", root / "stopped", faults={"sigterm": 15}, steps=8, save_every=0, expect="Interrupted"),
        job("run", root / "half", parallel_to={"name": "fsdp"}, steps=2, eval_every=0),
        job("resave", root / "half", into=str(root / "again on 2"), parallel_to={"name": "fsdp"}, steps=2),
        job("score", scored, into=str(root / "score 2")),
    ]
    start(2, root / "two", jobs)
    return root


@pytest.fixture(scope="module")
def four(two):
    jobs = [
        *of(4, two),
        job("resave", two / "half", into=str(two / "again on 4"), parallel_to={"name": "fsdp"}, steps=2, eval_every=0),
        job("resave", two / "half", into=str(two / "ddp on 4"), steps=2),
        job("score", two / "scored", into=str(two / "score 4")),
    ]
    start(4, two / "four", jobs)
    return two


def tensors_of(run):
    path, notes = checkpoint.latest(run / "checkpoints")
    assert notes == []
    return {stem: checkpoint.read_tensors(path, stem) for stem in ("model", "ema", "optimizer")}


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def assert_same(run, other):
    for stem, named in tensors_of(other).items():
        found = tensors_of(run)[stem]
        assert sorted(found) == sorted(named)
        for name, tensor in named.items():
            torch.testing.assert_close(found[name], tensor, **EXACT, msg=lambda text, at=(stem, name): f"{at}: {text}")
    expected = rows_of(other)
    assert len(expected) == 5
    for row, wanted in zip(rows_of(run), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, gradients (Adam's first moment holds them), weights, averages


@pytest.mark.parametrize("way", WAYS)
def test_equals_one_process(way, single, request):
    root = request.getfixturevalue({2: "two", 4: "four"}[WAYS[way][0]])
    assert_same(root / way, single())


@pytest.mark.slow
def test_compiled_blocks_equal_one_process_without_a_compiler(single, tmp_path):
    """A graph for each of the two blocks, whose mixers differ, and only the exchange cuts one in pieces."""
    ways = ("ddp", "fsdp", "context", "context, checkpointed")
    jobs = []
    for way in ways:
        _, spread, model = WAYS[way]
        jobs.append(job("compiled", tmp_path / way, into=f"{tmp_path / way}.json", parallel_to=spread, model=model))
    start(2, tmp_path, jobs)
    for way in ways:
        assert_same(tmp_path / way, single())
        found = json.loads((tmp_path / f"{way}.json").read_text())
        assert found["graphs"] <= (6 if "context" in way else 2), way
        assert ("Halo._exchange" in "".join(found["breaks"])) == ("context" in way)
        assert len(found["breaks"]) == ("context" in way)


@pytest.mark.parametrize("error", [None, RuntimeError("injected")])
def test_settings_of_the_process_end_with_the_ranks(error, monkeypatch):
    from torch._dynamo import config as dynamo

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: MagicMock())
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    before, ranks = dynamo.optimize_ddp, Ranks()
    ranks.world = 2
    ranks.trainer_of(rank_worker.RowModelConfig().build(), compiled=True)
    assert not dynamo.optimize_ddp
    ranks.close(error)
    assert dynamo.optimize_ddp == before
    assert before


def test_micro_batches_change_nothing(single):
    assert_same(single(micro_batch_size=None), single())


def test_the_last_block_and_what_surrounds_the_blocks_stay_gathered(monkeypatch):
    from torch.distributed import fsdp

    freed = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda part, mesh, **asked: freed.append(asked["reshard_after_forward"]))
    ranks = Ranks()
    ranks.sharded, ranks.mesh = True, None
    model = rank_worker.RowModelConfig(mixers=["gatedfwa"]).build()
    ranks.shard(model)
    assert freed == [True, False, False]
    ranks.config.reshard = False
    freed.clear()
    ranks.shard(model)
    assert freed == [False, False, False]


def test_a_checkpoint_of_slices_is_the_same_on_any_number_of_ranks(four):
    saved = tensors_of(four / "half")
    names = {path.name for path in checkpoint.latest(four / "half" / "checkpoints")[0].iterdir()}
    assert {"model.00001-of-00002.safetensors", "optimizer.00002-of-00002.safetensors", "rng.rank1.safetensors"} < names
    for again in ("again on 2", "again on 4", "ddp on 4"):
        path = checkpoint.latest(four / again / "checkpoints")[0]
        for stem, named in tensors_of(four / again).items():
            assert sorted(named) == sorted(saved[stem])
            assert all(torch.equal(named[name], tensor) for name, tensor in saved[stem].items()), (again, stem)
        assert checkpoint.read_state(path)["data"] == {"position": 24}
        assert checkpoint.read_manifest(path)["world"] == int(again[-1])


def test_two_ranks_resume_on_one(two, single, tmp_path):
    subprocess.run(["cp", "-r", two / "half", tmp_path / "run"], check=True)
    train(rows_recipe(), tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", single())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "ddp"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_two_ranks_resume_on_more(two, single, tmp_path, ranks, way):
    subprocess.run(["cp", "-r", two / "half", tmp_path / "run"], check=True)
    jobs = [job("run", tmp_path / "run", resume=True, parallel_to={"name": way}, micro_batch_size=1)]
    start(ranks, tmp_path, jobs)
    assert_same(tmp_path / "run", single())


def test_evaluation_has_the_same_last_digit(four, scored):
    alone = evaluate_run(scored, split="valid", batch_size=4, device="cpu").values
    assert alone == json.loads((four / "score 2").read_text()) == json.loads((four / "score 4").read_text())


def test_small_words(two):
    first, second = (json.loads((two / f"agreement-{rank}").read_text()) for rank in (0, 1))
    assert first.pop("in_turn") == 0
    assert second.pop("in_turn") == 1
    assert first == second
    assert first == {
        **{"sum": [3.0], "min": 0, "first": 0, "each": [0, 1]},
        **{"each_error": "odd", "first_error": "integer division or modulo by zero"},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_nan_on_one_rank_skips_the_step_on_all(two, tmp_path):
    """Examples 14 and 15, in the second step, are of ranks 0 and 1; 27 in the third of rank 1."""
    rank_worker.RowModel.faults = {"nan": [14, 15, 27]}
    train(rows_recipe(), tmp_path)
    rank_worker.RowModel.faults = {}
    for stem, named in tensors_of(tmp_path).items():
        for name, tensor in named.items():
            torch.testing.assert_close(tensors_of(two / "nan")[stem][name], tensor, **EXACT)
    log = (two / "nan" / "log.txt").read_text()
    assert "step 2 was skipped" in log
    assert 'the batch at data {"position": 12}: rank 0, micro-batch 0 (examples 12 to 14), rank 1' in log
    assert 'the batch at data {"position": 24}: rank 1, micro-batch 0 (examples 27 to 29)' in log


def test_too_many_in_a_row_name_the_guilty_rank_on_all(two):
    for rank in (0, 1):
        message = (two / f"diverged-error-{rank}").read_text()
        assert "3 steps in a row were not finite" in message
        for first in (15, 27, 39):
            assert f"rank 1, micro-batch 0 (examples {first} to {first + 2})" in message


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two):
    assert {(two / f"stopped-error-{rank}").read_text() for rank in (0, 1)} == {"Interrupted: 143"}
    assert checkpoint.latest(two / "stopped" / "checkpoints")[0].name == "step-00000003"


def ended(tmp_path, faults, ranks=2, **settings):
    """A job whose rank 1 comes to grief in the third step (example 27): what it printed, once it has ended."""
    jobs = [job("run", tmp_path / "run", faults=faults, **settings)]
    done = start(ranks, tmp_path, jobs, check=False)
    assert done.returncode != 0
    return done


def test_a_killed_rank_ends_the_job_which_resumes(tmp_path, single):
    note = tmp_path / "killed"
    done = ended(tmp_path, {"kill": 27, "note": str(note)})
    assert time.time() - note.stat().st_mtime < 15
    assert "zoo: rank 1 ended with signal SIGKILL; ending the job" in done.stderr
    assert "rank 0: rank 1 ended with signal SIGKILL. This rank was at: step 3" in done.stderr
    assert "Stacks of this rank" in done.stderr
    assert checkpoint.latest(tmp_path / "run" / "checkpoints")[0].name == "step-00000002"
    train(rows_recipe(), tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", single())


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    done = ended(tmp_path, {"hang": 27}, parallel_to={"stall": 4.0})
    assert "no progress for 4 s; rank 1 hangs, it is the furthest behind" in done.stderr
    assert "'step 3, forward and backward'" in done.stderr
    assert "in forward" in done.stderr  # the stack of rank 1, asleep in the model
    assert done.returncode == EXIT


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others(tmp_path):
    done = ended(tmp_path, {"raise": 27}, ranks=3, batch_size=18)
    assert "RuntimeError: injected" in done.stderr
    assert "rank 1: rank 0 ended with" in done.stderr  # with 18 examples a step, 27 is of rank 0


@pytest.mark.slow
def test_plain_torchrun(tmp_path, single):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start(2, tmp_path, [job("run", tmp_path / "run", parallel_to={"name": "fsdp"})], launcher=launcher)
    assert_same(tmp_path / "run", single())


class Store(dict):
    """torch's store, as far as the watchdog asks it."""

    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]


@pytest.fixture
def watch(monkeypatch):
    """Watchdogs of one store in this process; they put their verdicts into a list instead of ending it."""
    monkeypatch.setattr(watchdog, "INTERVAL", 0.02)
    monkeypatch.setattr(watchdog, "AGREED", 0.1)
    store, verdicts, made = Store(), {}, []

    def begin(rank, **limits):
        limits = {"dead": 60.0, "stall": 60.0, **limits}
        made.append(watchdog.Watchdog(store, rank, 3, **limits, end=lambda text: verdicts.setdefault(rank, text)))
        return made[-1]

    yield begin, verdicts
    for one in made:
        one.close()


def wait_for(verdicts, count):
    deadline = time.monotonic() + 10
    while len(verdicts) < count:
        assert time.monotonic() < deadline, verdicts
        time.sleep(0.01)


def test_watchdog_names_a_dead_rank(watch):
    begin, verdicts = watch
    first, second, third = (begin(rank, dead=0.5) for rank in range(3))
    second.mark("step 7, data")
    time.sleep(0.1)
    second._stop.set()  # no more heartbeats, and no word
    wait_for(verdicts, 2)
    for rank, dog in ((0, first), (2, third)):
        assert f"rank {rank}: rank 1 is dead: no heartbeat for" in verdicts[rank]
        assert "(last at: step 7, data)" in verdicts[rank]
        assert "This rank was at: starting" in verdicts[rank]
        assert not dog._thread.is_alive() or dog._thread.join(1) is None


def test_watchdog_tells_of_an_error_and_not_of_an_end(watch):
    begin, verdicts = watch
    dogs = [begin(rank) for rank in range(3)]
    dogs[0].close()
    time.sleep(0.3)
    assert not verdicts
    dogs[1].close(RuntimeError("injected"))
    wait_for(verdicts, 1)
    assert "rank 2: rank 1 ended with RuntimeError: injected (at: starting)" in verdicts[2]


def test_watchdog_names_the_rank_furthest_behind(watch):
    begin, verdicts = watch
    dogs = [begin(rank, stall=0.5) for rank in range(3)]
    for rank in (0, 2):
        dogs[rank].mark("step 1, update")
    wait_for(verdicts, 3)
    assert "no progress for 0 s; rank 1 hangs" in verdicts[0]
    assert "rank 2 at 'step 1, update' for" in verdicts[0]


@pytest.mark.slow
def test_the_command_line_on_two_ranks(tmp_path):
    """train and evaluate with --nproc; the scores are those of one process."""
    zoo = [sys.executable, "-P", "-m", "zoo.cli"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    folder = tmp_path / "run"
    for words in (
        ["train", "text/smoke", "--run", str(folder), "--nproc", "2", "train.parallel.name=fsdp"],
        ["evaluate", str(folder), "--split", "valid", "--nproc", "2"],
        ["evaluate", str(folder), "--split", "valid"],
    ):
        done = subprocess.run([*zoo, *words], env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    half = len(rows) // 2
    assert [(row["name"], row["value"]) for row in rows[:half]] == [(row["name"], row["value"]) for row in rows[half:]]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_readable_refusals():
    with pytest.raises(ValueError, match="2 processes were started, but parallel.name = none"):
        Ranks(ParallelConfig("none"), world=2)
    with pytest.raises(ValueError, match="parallel.context = 2 does not divide the 1 processes"):
        Ranks(ParallelConfig(context=2))
    with pytest.raises(ConfigError, match="parallel.name = 'fdsp'.*fsdp"):
        configs.build(ParallelConfig, {"name": "fdsp"}, path="parallel")
    halo = Halo(0, 4, 0, None)
    with pytest.raises(ValueError, match="holds 5 tokens of a row, but a layer needs the last 6.*fewer ranks"):
        halo.exchange(6, torch.zeros(1, 5, 2))
    backbone = Backbone(BackboneConfig(width=8, heads=2, depth=1, mixer=Choice("softmax", Softmax.Config())))
    with pytest.raises(ValueError, match="Softmax layer sees the whole past.*windowed mixers"):
        backbone(torch.zeros(1, 4, 8), Context(halo=halo.exchange))
    ranks = Ranks()
    ranks.halo = halo
    model = rank_worker.RowModelConfig().build()
    model.backbone = backbone
    with pytest.raises(ValueError, match="Softmax layer sees the whole past"):
        ranks.trainer_of(model, compiled=False)  # before a step
    made = rows_recipe(batch_size=8, micro_batch_size=3 - 1)
    ranks = Ranks.__new__(Ranks)
    ranks.data_world = 3
    with pytest.raises(ConfigError, match="batch_size = 8 examples a step cannot be shared evenly by 3 ranks"):
        rank_worker.Run.__init__.__globals__["micro_batches"](made.train, ranks)


def test_only_elementwise_optimizers_take_slices():
    model = torch.nn.Linear(4, 4)
    held = {name: torch.nn.Parameter(p.detach()[:2]) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="'muon' looks at whole parameters.*adamw.*parallel.name = ddp"):
        optim.make_optimizer(model, optim.OptimizerConfig(name="muon"), held)


def test_rows_that_cannot_be_split():
    batch = rank_worker.toytask.ToyTask(rank_worker.toytask.ToyConfig(length=6)).stream("train", batch_size=2)
    batch = next(iter(batch))
    with pytest.raises(ValueError, match="rows of 6 tokens cannot be split evenly between 4 ranks"):
        Halo(0, 4, 0, None).split(batch)
    batch.ctx.lengths = torch.tensor([6, 3])
    with pytest.raises(ValueError, match="not packed documents nor padded rows"):
        Halo(0, 2, 0, None).split(batch)


def test_pieces_join_to_the_whole():
    for rows, world in ((7, 3), (2, 4), (8, 4), (5, 4), (1, 1)):
        whole = torch.arange(rows * 2).view(rows, 2)
        pieces = [parallel.piece(whole, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(pieces), whole)
