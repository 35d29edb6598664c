"""The bench without a GPU: what it counts, how it sums up, and that it refuses to print what it cannot trust."""

import subprocess
import time

import pytest
import torch

from zoo import bench, peers, tuning
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
        shape = bench.Shape(4, 16, 16384, 64, window)
        assert 100 * shape.exact / shape.tiled == pytest.approx(share, abs=0.1)
    assert bench.Shape(4, 16, 16384, 64, 512).exact / 1e9 == pytest.approx(135.3, abs=0.1)


def rows():
    sizes = {"batch": 1, "heads": 2, "tokens": 4096, "head_dim": 64, "window": 512}
    for number, ms in enumerate((1.0, 1.2, 0.9)):
        for what in ("forward", "backward"):
            yield {"round": number, "peer": "zoo", "what": what, "ms": ms, "tflops_exact": 100 / ms, **sizes}
    yield {"round": 0, "peer": "zoo", "what": "decode", "ms": 0.1, "tb_per_s": 3.0, "batch": 1, "slots": 512}


def test_medians_and_spread_over_rounds(tmp_path):
    forward, backward, decode = bench.summarise(list(rows()))
    assert (forward["ms"], forward["tflops_exact"]) == (1.0, 100.0)
    assert forward["ms_spread"] == pytest.approx(0.3)
    assert (backward["what"], decode["tb_per_s"]) == ("backward", 3.0)
    bench.write_csv(list(rows()), tmp_path / "bench.csv")
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 8
    bench.plot([forward, backward, decode], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5_000


def test_ratios_are_those_of_each_round(monkeypatch):
    """Rounds at different clocks: the peer's times spread, its ratios to ours do not."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    peer = [{**row, "peer": "other", "ms": 2 * row["ms"]} for row in rows() if row["what"] == "forward"]
    timed = [{**row, "host_ms": 0.1} for row in [*rows(), *peer]]
    _, forward, backward, decode = bench.table(timed).splitlines()
    assert forward.startswith("forward B1 H2 T4096 D64 W512: zoo 1.0000 ±15%")
    assert "122.070 ns" in forward  # 1 ms over 2 x 4096
    assert "other 2.0000 ±15% 2.00x (2.00-2.00)" in forward
    assert backward.startswith("backward B1 H2")
    assert "other" not in backward
    assert decode.endswith("3.00 TB/s")


def test_rows_of_all_lengths_hold_as_many_tokens():
    for shape in bench.LENGTHS:
        assert shape.batch * shape.heads * shape.tokens == 4 << 20
        assert bench.Shape(1, 4, 1 << 20, shape.head_dim, shape.window) in bench.SHAPES


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
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(bench.BenchError, match=r"(?s)no speed without green tests.*2 failed"):
        bench.check_kernels()


@pytest.mark.parametrize("text", ["", "1,2,3,4", "4,16,16384,64,0", "4,16,16384,64,-5", "a,b,c,d,e", "1,2,3,4,5,6"])
def test_a_shape_is_five_numbers(text, tmp_path):
    with pytest.raises(bench.BenchError, match="it takes five numbers of 1 or more"):
        bench.run(tmp_path, shapes=[text])
    assert bench.parse_shape("4,16,16384,64,512") == bench.SHAPES[1]


def test_documents_are_the_rows_of_a_batch_one_after_another():
    shape = peers.Shape(2, 1, 30, 8, 5)
    q, k, v, dout = torch.randn(4, 2, 30, 1, 8).unbind()
    x = peers.Inputs(shape, q.requires_grad_(), k.requires_grad_(), v, dout, -torch.rand(2, 30, 1))
    whole, _, _ = peers.ours(True)(x)
    packed, leaves, gradient = peers.ours(True, document=30)(x)
    torch.testing.assert_close(packed().view_as(whole()), whole())
    assert gradient.shape == packed().shape
    assert leaves[0] is q
    cut = peers.ours(True, document=7)(x)[0]().view_as(whole())
    torch.testing.assert_close(cut[0, :7], whole()[0, :7])
    assert not torch.allclose(cut[0, 7:], whole()[0, 7:])


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
