"""The bench without a GPU: what it counts, how it sums up, and that it refuses to print what it cannot trust."""

import csv
import json
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from zoo import bench, bench_report, ops, peers, tuning
from zoo.mixers.base import visible_pairs


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("window", [1, 2, 64, 65, 100, 1000])
def test_tile_pairs_are_counted_one_by_one(tokens, window):
    i, j = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    visible = (j <= i) & (i - j < window)
    tiles = {(int(a) // 64, int(b) // 64) for a, b in visible.nonzero().tolist()}
    assert peers.tile_pairs(tokens, window) == len(tiles) * 64 * 64
    assert visible_pairs(tokens, window) == visible.sum()


def test_shares_of_the_published_table():
    """ANCHORS: at T 16k, 88.9% of a window of 512 is visible in 64 x 64 tiles, 97.0% of one of 2048."""
    for window, share in ((512, 88.9), (2048, 97.0)):
        shape = peers.Shape(4, 16, 16384, 64, window)
        assert 100 * shape.exact / shape.tiled == pytest.approx(share, abs=0.1)
    assert peers.Shape(4, 16, 16384, 64, 512).exact / 1e9 == pytest.approx(135.3, abs=0.1)


def rows():
    sizes = {"batch": 1, "heads": 2, "tokens": 4096, "head_dim": 64, "window": 512}
    for number, ms in enumerate((1.0, 1.2, 0.9)):
        for what in ("forward", "backward"):
            yield {"round": number, "peer": "zoo", "what": what, "ms": ms, "tflops_exact": 100 / ms, **sizes}
    yield {"round": 0, "peer": "zoo", "what": "decode", "ms": 0.1, "tb_per_s": 3.0, "batch": 1, "slots": 512}


def test_medians_and_spread_over_rounds(tmp_path):
    forward, backward, decode = bench_report.summarise(list(rows()))
    assert (forward["ms"], forward["tflops_exact"]) == (1.0, 100.0)
    assert forward["ms_spread"] == pytest.approx(0.3)
    assert (backward["what"], decode["tb_per_s"]) == ("backward", 3.0)
    bench_report.write_csv(list(rows()), tmp_path / "bench.csv")
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 8
    bench_report.plot([forward, backward, decode], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5_000


def test_the_picture_holds_what_a_whole_round_measures():
    """Bars of the published shapes, a line over windows for each peer and head dim, one over T for each head dim."""
    from matplotlib.figure import Figure

    measured = [
        {"peer": peer.name, "what": "forward", "ms": 1.0, "tflops_exact": 9.0, **asdict(shape)}
        for shape, peer in bench.plan(["zoo", "flash-attention-4"], [])
    ]
    bars, windows, lengths = Figure().subplots(1, 3)
    bench_report.draw_shapes(bars, measured)
    bench_report.draw_windows(windows, [row for row in measured if not row["kv_heads"] and not row["document"]])
    bench_report.draw_lengths(lengths, [row for row in measured if row["peer"] == "zoo"])
    assert len(bars.patches) == 2 * len([*peers.SHAPES, *peers.OTHERS])
    assert [line.get_label() for line in windows.lines] == [
        "zoo D 64", "flash-attention-4 D 64", "zoo D 128", "flash-attention-4 D 128",
    ]  # fmt: skip
    assert list(windows.lines[0].get_xdata()) == [128, 256, 512, 1024, 2048, 4096]
    assert [line.get_label() for line in lengths.lines] == ["D 64 W 512", "D 128 W 512"]
    assert list(lengths.lines[0].get_xdata()) == [1 << 14, 1 << 16, 1 << 18, 1 << 20]


def test_ratios_are_those_of_each_round(monkeypatch):
    """Rounds at different clocks: the peer's times spread, its ratios to ours do not."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    peer = [{**row, "peer": "other", "ms": 2 * row["ms"]} for row in rows() if row["what"] == "forward"]
    timed = [{**row, "host_ms": 0.1} for row in [*rows(), *peer]]
    _, forward, backward, decode = bench_report.table(timed).splitlines()
    assert forward.startswith("forward B1 H2 T4096 D64 W512: zoo 1.0000 ±15%")
    assert "122.070 ns" in forward  # 1 ms over 2 x 4096
    assert "other 2.0000 ±15% 2.00x (2.00-2.00)" in forward
    assert backward.startswith("backward B1 H2")
    assert "other" not in backward
    assert decode.endswith("3.00 TB/s")


def test_rows_of_all_lengths_hold_as_many_tokens():
    for shape in peers.LENGTHS:
        assert shape.batch * shape.heads * shape.tokens == 4 << 20
        assert peers.Shape(1, 4, 1 << 20, shape.head_dim, shape.window) in peers.SHAPES


@pytest.mark.gpu
def test_the_host_does_not_count():
    """A call that keeps the host for 2 ms and the device for microseconds."""
    x = torch.zeros(1, device="cuda")

    def call():
        time.sleep(2e-3)
        x.add_(1)

    device, host = bench.queued_ms(call, least=0.05)
    assert device < 0.2 < 2 < host


@pytest.mark.gpu
def test_the_device_counts():
    """A kernel that waits 4 million cycles at 1 to 2.5 GHz."""
    device, host = bench.queued_ms(lambda: torch.cuda._sleep(4_000_000), least=20)
    assert 1.6 < device < 4
    assert host < device


def test_no_gpu_no_bench(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(bench.BenchError, match="measures a GPU"):
            bench.run(tmp_path)


def test_no_speed_without_green_tests(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="2 failed", stderr="")
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.extend(command) or failed)
    with pytest.raises(bench.BenchError, match=r"(?s)no speed without green tests.*2 failed"):
        bench.check_kernels(workers=2)
    assert asked[-2:] == ["-n", "2"]
    assert "no:benchmark" in asked  # whose warning about the workers would be an error


def test_what_is_measured_outlives_a_round_that_fails(monkeypatch, tmp_path):
    measured = [{"peer": "zoo", "what": "forward", "ms": 1.5}, {"peer": "zoo", "what": "backward", "ms": 2.5}]
    lines = "\n".join(["a word of a library's", *(json.dumps(row) for row in measured)])
    endings = iter((0, 3))

    def start(function, *arguments, **options):
        command = [sys.executable, "-c", f"print({lines!r}); raise SystemExit({next(endings)})"]
        return subprocess.Popen(command, text=True, **options)

    monkeypatch.setattr(bench, "start", start)
    with pytest.raises(bench.BenchError, match="round 2 of 3 failed with exit code 3"):
        bench.measure(tmp_path / "bench.csv", 3, ["zoo"], [])
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["round"], row["what"], row["ms"]) for row in rows] == [
        (number, what, ms) for number in "01" for what, ms in (("forward", "1.5"), ("backward", "2.5"))
    ]


def test_only_the_last_round_sweeps(monkeypatch, tmp_path):
    asked = []

    def start(function, names, shapes, last, **options):
        asked.append([shape for shape, _ in bench.plan(names, shapes, last)])
        return subprocess.Popen([sys.executable, "-c", ""], text=True, **options)

    monkeypatch.setattr(bench, "start", start)
    bench.measure(tmp_path / "bench.csv", 3, ["zoo"], [])
    every = [*peers.SHAPES, *peers.OTHERS, *peers.WINDOWS, *peers.LENGTHS]
    assert asked == [[*peers.SHAPES], [*peers.SHAPES], every]


def test_what_takes_long_is_measured_once():
    """Unless it was asked for: flex is compiled for each shape, full attention stands there for scale."""
    once = {"flex", "flex no gate", "cudnn full", "fa2 full"}
    every = {peer.name for peer in peers.PEERS}
    windows = {peer.name for shape, peer in bench.plan([], []) if shape in peers.WINDOWS}
    assert {peer.name for _, peer in bench.plan([], [], last=False)} == every - once
    assert {peer.name for shape, peer in bench.plan([], []) if shape in peers.SHAPES} == every
    assert windows == every - once
    by_shape = [peer.by_shape for _, peer in bench.plan([], [])]
    assert by_shape == sorted(by_shape)
    assert {peer.name for _, peer in bench.plan(["flex"], [], last=False)} == {"flex"}


def test_each_kind_of_call_is_compiled_once(monkeypatch):
    """Documents, shared key heads and windows may take kernels of their own; lengths don't, but of flex."""
    parts = {alike[0].head_dim: alike for _, alike in bench.compiled_alike(["zoo"], [])}
    assert set(parts) == {64, 128}
    assert {(x.heads, x.kv_heads, x.document) for x in parts[128]} == {(4, 0, 0), (16, 0, 0), (16, 4, 0), (16, 0, 6000)}
    assert {x.window for x in parts[128]} == {128, 256, 512, 1024, 2048, 4096}
    assert {(x.batch, x.tokens) for x in parts[128]} == {(1, 4096)}
    flex = [alike for _, alike in bench.compiled_alike(["flex"], [])]
    assert {*map(len, flex)} == {1}
    assert {shape for (shape,) in flex} == {shape for shape, _ in bench.plan(["flex"], [])}
    made = []
    monkeypatch.setattr(peers.Inputs, "random", lambda shape: made.append(shape) or 1 / 0)
    assert list(bench.warm("zoo", [[1, 2, 64, 64, 8, 0, 0], [1, 2, 64, 128, 8, 0, 0]])) == []
    assert made == [peers.Shape(1, 2, 64, 64, 8), peers.Shape(1, 2, 64, 128, 8)]


def test_of_kernels_that_tune_themselves_one_configuration_is_kept():
    import triton

    def kernel(x):
        pass

    configs = [triton.Config({}, num_warps=n) for n in (1, 2, 4)]
    tuner = triton.autotune(configs=configs, key=[])(triton.jit(kernel))
    few = triton.heuristics({})(triton.autotune(configs=configs[:2], key=[])(triton.jit(kernel)))
    peers.keep_config(SimpleNamespace(tuner=tuner, few=few, plain=triton.jit(kernel), number=3), 2)
    assert tuner.configs == configs[2:]
    assert few.fn.configs == configs[1:2]


def test_all_is_compiled_ahead_in_processes_of_their_own(monkeypatch):
    asked = []

    def start(function, peer, shapes):
        asked.append((function, peer, json.loads(json.dumps(shapes))))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(bench, "start", start)
    bench.compile_ahead(["flex", "zoo"], ["1,2,64,64,8", "1,2,96,64,16"], workers=2)
    assert sorted(asked) == [
        ("warm", "flex", [[1, 2, 64, 64, 8, 0, 0]]),
        ("warm", "flex", [[1, 2, 96, 64, 16, 0, 0]]),
        ("warm", "zoo", [[1, 2, 4096, 64, 16, 0, 0], [1, 2, 4096, 64, 8, 0, 0]]),
    ]


def test_our_own_failure_is_no_gap_in_the_table(monkeypatch, capsys):
    def fail(shape, peer):
        raise AssertionError(f"{peer.name} cannot")

    monkeypatch.setattr(bench, "calm", lambda: None)
    monkeypatch.setattr(bench, "measure_attention", fail)
    monkeypatch.setattr(bench, "measure_gate", lambda: [{"what": "gate"}])
    monkeypatch.setattr(bench, "measure_decode", list)
    assert list(bench.one_round(["flex"], ["1,2,64,64,8"])) == [{"what": "gate"}]
    assert "flex, B1 H2 T64 D64 W8: left out, AssertionError flex cannot" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="zoo no gate cannot"):
        list(bench.one_round(["zoo no gate"], ["1,2,64,64,8"]))


@pytest.mark.parametrize(
    "text", ["", "1,2,3,4", "4,16,16384,64,0", "4,16,16384,64,-5", "a,b,c,d,e", "1,2,3,4,5,-6", "1,2,3,4,5,2,7,8"]
)
def test_a_shape_is_five_numbers(text, tmp_path):
    with pytest.raises(bench.BenchError, match="it takes five numbers of 1 or more"):
        bench.run(tmp_path, shapes=[text])
    assert bench.parse_shape("4,16,16384,64,512") == peers.SHAPES[1]
    assert bench.parse_shape("4,16,16384,128,512,4") == peers.OTHERS[0]
    assert bench.parse_shape("1,16,65536,64,512,0,1500") == peers.OTHERS[1]
    with pytest.raises(bench.BenchError, match="16 heads are no multiple of 5 key/value heads"):
        bench.parse_shape("1,16,65536,64,512,5")


@pytest.mark.parametrize("document", [0, 30, 64, 70])
@pytest.mark.parametrize("window", [1, 20, 64, 500])
def test_pairs_of_documents_are_counted_one_by_one(document, window):
    shape = peers.Shape(2, 3, 100, 8, window, document=document)
    i, j = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    visible = (j <= i) & (i - j < window) & (i // (document or 100) == j // (document or 100))
    assert shape.exact == 4 * 3 * 8 * int(visible.sum())
    if document:
        tiles = {(int(a) // 64, int(b) // 64) for a, b in visible.nonzero().tolist()}
        assert shape.tiled == 4 * 3 * 8 * len(tiles) * 64 * 64


def test_inputs_have_their_shape_and_peers_take_them():
    plain = peers.Inputs.random(peers.Shape(2, 4, 30, 8, 5, kv_heads=2), device="cpu")
    assert (plain.q.shape, plain.k.shape, plain.cu_seqlens) == ((2, 30, 4, 8), (2, 30, 2, 8), None)
    packed = peers.Inputs.random(peers.Shape(2, 4, 30, 8, 5, document=25), device="cpu")
    assert packed.q.shape == packed.k.shape == (1, 60, 4, 8)
    assert packed.cu_seqlens.tolist() == [0, 25, 50, 60]
    for x in (plain, packed):
        out, leaves, dout = (made := peers.ours(True)(x))[0](), *made[1:]
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, leaves, dout))
        from_z, leaves, dout = (made := peers.from_pre_activations(x))[0](), *made[1:]
        torch.testing.assert_close(from_z, out, rtol=0.02, atol=0.02)  # eps of the gate's strength, SPEC.md 1.2
        assert len(torch.autograd.grad(from_z, leaves, dout)) == 5
    cut = peers.ours(True)(packed)[0]()[:, 25:50]
    alone = ops.window_attention(*(x[:, 25:50] for x in (packed.q, packed.k, packed.v, packed.log_decay)), window=5)
    torch.testing.assert_close(cut, alone, rtol=0.02, atol=0.02)


def test_peers_are_chosen_by_name(tmp_path):
    assert [peer.name for peer in bench.choose_peers(["flex", "zoo"])] == ["flex", "zoo"]
    assert bench.choose_peers([]) == list(bench.PEERS)
    with pytest.raises(bench.BenchError, match="peers = zo; it takes names among zoo; "):
        bench.run(tmp_path, peers=["zoo", "zo"])


def test_candidates_are_schedules_and_hold_what_stands():
    pytest.importorskip("triton.experimental.gluon")
    from zoo.kernels import decode, hopper_backward, hopper_forward
    from zoo.kernels.hopper_band import Schedule

    tables = {
        "TABLE": hopper_forward.TABLE,
        "DQ_TABLE": hopper_backward.DQ_TABLE,
        "DKV_TABLE": hopper_backward.DKV_TABLE,
    }
    for name, table in tables.items():
        for dim, schedule in table.items():
            assert schedule in [Schedule(*values) for values in tuning.CANDIDATES[name][dim]]
    assert decode.STEPS in [decode.Steps(*values) for values in tuning.RING_STEPS]


def test_a_candidate_with_other_results_is_said_and_left_out(monkeypatch, capsys):
    """Values, a gate's gradient, a NaN: wrong at one window is wrong."""
    pytest.importorskip("triton.experimental.gluon")
    from zoo.kernels import hopper_backward, hopper_forward
    from zoo.kernels.hopper_band import Schedule

    wrong = {"TABLE": (9, 9, True, 9, 9), "DQ_TABLE": (8, 8, True, 8, 8), "DKV_TABLE": (7, 7, True, 7, 7)}
    rows = {"TABLE": hopper_forward.TABLE, "DQ_TABLE": hopper_backward.DQ_TABLE, "DKV_TABLE": hopper_backward.DKV_TABLE}
    fine = {table: {64: rows[table][64]} for table in wrong}
    monkeypatch.setattr(tuning, "CANDIDATES", {t: {64: [wrong[t], tuple(asdict(fine[t][64]).values())]} for t in wrong})
    monkeypatch.setattr(tuning, "Shape", lambda *_: peers.Shape(1, 2, 40, 64, 16))
    monkeypatch.setattr(peers.Inputs, "random", partial(peers.Inputs.random, device="cpu"))
    monkeypatch.setattr(tuning, "queued_ms", lambda call: (1.0 if call() else 0.0, 0.0))

    def forward(q, k, v, gate, *, window, schedule=None, **_):
        out = ops.window_attention(q, k, v, *gate, window=window)
        return out + 0.1 * (window == 2048 and schedule == Schedule(*wrong["TABLE"])), out[..., 0].float()

    def backward(dout, dlse, q, k, v, out, lse, gate, *, dq_schedule=None, dkv_schedule=None, **_):
        if dq_schedule == Schedule(*wrong["DQ_TABLE"]):
            return q, k, v, (gate[0] * 1.1,)
        return q, k * float("nan") if dkv_schedule == Schedule(*wrong["DKV_TABLE"]) else k, v, gate

    monkeypatch.setattr(hopper_forward, "window_forward", forward)
    monkeypatch.setattr(hopper_backward, "window_backward", backward)
    assert list(tuning.tune_window()) == [f"{table}  64: {fine[table][64]},  # 2.000 ms" for table in wrong]
    said = capsys.readouterr().err
    for (table, values), off, width in zip(
        wrong.items(), ("", "1.0e-01 off", "nan off"), (2048, 512, 512), strict=True
    ):
        assert f"{table} 64: {Schedule(*values)} left out, " in said
        assert f"{off} at window {width}" in said
