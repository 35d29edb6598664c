"""Vector quantisation: what a code is, how a codebook learns, bad vectors, stages of residuals, several ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo.quantize import QuantizerConfig, ResidualQuantizer, VectorQuantizer, code_use


def clusters(count: int, each: int, dim: int = 4, spread: float = 0.05) -> torch.Tensor:
    """(count * each, dim), `each` vectors about each of `count` far-apart centres."""
    centres = 5 * torch.randn(count, dim)
    return (centres.repeat_interleave(each, 0) + spread * torch.randn(count * each, dim))[torch.randperm(count * each)]


def test_codes_are_the_nearest_and_decode_gives_their_vectors():
    quantizer = VectorQuantizer(QuantizerConfig(codes=7), 3).eval()
    z = torch.randn(2, 5, 3)
    taken = quantizer(z)
    expected = torch.cdist(z.double().flatten(0, 1), quantizer.codebook.double()).argmin(1).view(2, 5)
    assert torch.equal(taken.codes, expected)
    assert torch.equal(quantizer.encode(z), expected)
    torch.testing.assert_close(taken.vectors, quantizer.decode(expected))
    apart = (z - quantizer.codebook[expected]).square().mean(-1).sum()
    torch.testing.assert_close(taken.commitment, 0.25 * apart)
    assert taken.count == 10


def test_the_gradient_passes_straight_through_and_the_commitment_pulls():
    quantizer = VectorQuantizer(QuantizerConfig(codes=4, commitment=1.0), 3).eval()
    z = torch.randn(6, 3, requires_grad=True)
    taken = quantizer(z)
    weight = torch.randn(6, 3)
    (straight,) = torch.autograd.grad((taken.vectors * weight).sum(), z, retain_graph=True)
    torch.testing.assert_close(straight, weight)
    (pull,) = torch.autograd.grad(taken.commitment, z)
    torch.testing.assert_close(pull, 2 / 3 * (z - taken.vectors).detach())


def test_the_moving_average_is_the_papers():
    """One step against sums and counts kept apart, as in arXiv 1711.00937, A.1."""
    config = QuantizerConfig(codes=3, decay=0.9, restart=0)
    quantizer = VectorQuantizer(config, 2)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]))
    quantizer.share.copy_(torch.tensor([0.5, 0.25, 0.25]))
    old = quantizer.codebook.clone()
    z = torch.tensor([[0.5, 0.0], [4.5, 0.5], [3.0, 0.0], [4.0, 1.0]])
    count = 0.9 * torch.tensor([0.5, 0.25, 0.25]) + 0.1 * torch.tensor([0.25, 0.75, 0.0])
    total = 0.9 * torch.tensor([[0.5], [0.25], [0.25]]) * old
    total += 0.1 * torch.stack((z[0], z[1:].sum(0), torch.zeros(2))) / 4
    quantizer(z)
    torch.testing.assert_close(quantizer.share, count)
    torch.testing.assert_close(quantizer.codebook, total / count[:, None])


@pytest.mark.parametrize("unit", [False, True])
def test_every_cluster_gets_a_code_and_dead_codes_come_back(unit):
    """From codes far away from all data: without restarts one of them would win everything."""
    z = clusters(8, 32)
    config = QuantizerConfig(codes=16, decay=0.9, restart=0.1, unit=unit)
    quantizer = VectorQuantizer(config, 4)
    for _ in range(300):
        quantizer(z[torch.randperm(len(z))[:64]])
    quantizer.eval()
    codes = quantizer.encode(z)
    scaled = F.normalize(z, dim=-1) if unit else z
    assert (quantizer.decode(codes) - scaled).square().mean() < (0.002 if unit else 0.01)
    assert code_use(torch.bincount(codes, minlength=16))["usage"] >= 0.5


def test_a_code_restarts_where_the_error_is():
    """Nine in ten vectors are right on a code; one far group has none."""
    quantizer = VectorQuantizer(QuantizerConfig(codes=3), 2)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0]]))
    quantizer.share.copy_(torch.tensor([0.5, 0.5, 0.0]))
    z = torch.tensor([[0.01, 0.0], [1.01, 0.0]]).repeat(45, 1)
    z = torch.cat((z, torch.tensor([[-5.0, 5.0]]).expand(10, 2), torch.tensor([[9.0, 9.0]]).expand(10, 2)))
    quantizer._restart(z, torch.arange(len(z)) < 100)  # the last ten are masked
    assert quantizer.codebook.tolist() == [[0.0, 0.0], [1.0, 0.0], [-5.0, 5.0]]


def test_restarts_among_vectors_that_are_all_right_or_all_masked():
    quantizer = VectorQuantizer(QuantizerConfig(codes=3), 2)
    z = torch.zeros(4, 2)
    for counted in (torch.zeros(4, dtype=torch.bool), torch.tensor([False, True, True, False])):
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
        quantizer.share.copy_(torch.tensor([0.5, 0.5, 0.0]))
        quantizer._restart(z.masked_fill(~counted[:, None], torch.nan), counted)
        assert quantizer.codebook.tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0 if counted.any() else 2.0, 0.0]]


def test_evaluation_changes_nothing_and_training_is_reproducible():
    z = torch.randn(40, 4)

    def learned():
        torch.manual_seed(1)
        quantizer = VectorQuantizer(QuantizerConfig(codes=8), 4)
        for _ in range(3):
            quantizer(z)
        return quantizer

    quantizer = learned()
    assert torch.equal(quantizer.codebook, learned().codebook)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.eval()(z)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_vectors_that_are_not_finite_or_masked_teach_nothing():
    z = clusters(4, 16)
    bad = torch.cat((z, torch.full((8, 4), torch.nan), torch.full((8, 4), 1e6)))
    mask = torch.arange(len(bad)) < 72
    quantizer = VectorQuantizer(QuantizerConfig(codes=4, decay=0.5), 4)
    for _ in range(20):
        taken = quantizer(bad, mask)
    assert taken.count == 64
    assert quantizer.codebook.abs().max() < 100
    assert taken.commitment.isfinite()

    untouched = VectorQuantizer(QuantizerConfig(codes=4), 4)
    before = untouched.codebook.clone()
    assert untouched(torch.full((8, 4), torch.nan)).count == 0
    assert torch.equal(untouched.codebook, before)
    assert (untouched.share == 0).all()  # still waits for its first vector


def test_a_projected_codebook_trains_its_projections():
    quantizer = VectorQuantizer(QuantizerConfig(codes=8, dim=2), 6)
    z = torch.randn(32, 6, requires_grad=True)
    taken = quantizer(z)
    assert taken.vectors.shape == (32, 6)
    (taken.vectors.square().sum() + taken.commitment).backward()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())
    assert z.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------


def test_each_stage_takes_away_and_any_number_decodes():
    torch.manual_seed(0)
    z = torch.randn(512, 4)
    quantizer = ResidualQuantizer(QuantizerConfig(codes=16, decay=0.8), 4, stages=4, dropout=0.5)
    for _ in range(60):
        quantizer(z)
    quantizer.eval()
    codes = quantizer.encode(z)
    assert codes.shape == (512, 4)
    errors = [(quantizer.decode(codes[:, :n]) - z).square().mean().item() for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    taken = quantizer(z)
    assert torch.equal(taken.codes, codes)
    torch.testing.assert_close(taken.vectors, quantizer.decode(codes))


@pytest.mark.parametrize("dim", [0, 3])
def test_the_gradient_of_all_stages_together_is_one(dim):
    quantizer = ResidualQuantizer(QuantizerConfig(codes=4, dim=dim), 5, stages=3).eval()
    z = torch.randn(7, 5, requires_grad=True)
    taken = quantizer(z)
    weight = torch.randn(7, 5)
    (straight,) = torch.autograd.grad((taken.vectors * weight).sum(), z)
    if dim:
        assert isinstance(quantizer.up, nn.Linear)
        weight = weight @ quantizer.up.weight @ quantizer.down.weight
    torch.testing.assert_close(straight, weight)


def test_rows_with_fewer_stages_say_so_and_decode_alike():
    quantizer = ResidualQuantizer(QuantizerConfig(codes=4), 3, stages=3, dropout=1.0)
    z = torch.randn(50, 6, 3)
    taken = quantizer(z)
    used = (taken.codes >= 0).sum(-1)
    assert set(used.unique().tolist()) == {1, 2, 3}
    assert (used == used[:, :1]).all()  # of a row, all alike
    fixed = quantizer.eval()
    before = fixed.decode(taken.codes)
    full = taken.codes.clone()
    full[used < 3] = full[used < 3].clamp(min=0)
    assert not torch.allclose(before, fixed.decode(full))


def test_code_use():
    assert code_use(torch.tensor([5, 5, 0, 0])) == {"usage": 0.5, "perplexity": pytest.approx(2.0)}
    assert code_use(torch.tensor([0, 7]))["perplexity"] == pytest.approx(1.0)


@pytest.mark.parametrize("field", [{"codes": 1}, {"decay": 1.0}, {"restart": 1.0}, {"commitment": -1.0}, {"dim": -1}])
def test_settings_are_checked(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"quantizer.{name} = "):
        QuantizerConfig(**field)
    with pytest.raises(ValueError, match="stages = 0"):
        ResidualQuantizer(QuantizerConfig(), 4, stages=0)
    with pytest.raises(ValueError, match="unit = True"):
        ResidualQuantizer(QuantizerConfig(unit=True), 4, stages=2)


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from zoo.quantize import QuantizerConfig, VectorQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(rank)  # what is drawn differs between ranks, as in training
quantizer = VectorQuantizer(QuantizerConfig(codes=6), 3)
for step in range(3):
    quantizer(torch.load(f"{folder}/{step}.pt", weights_only=True)[rank])
torch.save(quantizer.state_dict(), f"{folder}/learned{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_learn_one_codebook(tmp_path):
    steps = [torch.randn(2, 20, 3) for _ in range(3)]
    for number, both in enumerate(steps):
        torch.save(both, tmp_path / f"{number}.pt")
    command = [sys.executable, "-P", "-W", "ignore", "-c", TWO_RANKS]
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"learned{rank}.pt", weights_only=True) for rank in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name

    torch.manual_seed(0)  # rank 0 draws where codes begin, from its own rows: 20 vectors here too, then all 40
    alone = VectorQuantizer(QuantizerConfig(codes=6), 3)
    alone._restart(steps[0][0], torch.ones(20, dtype=torch.bool))
    alone.config.restart = 0.0
    for both in steps:
        alone(both.flatten(0, 1))
    torch.testing.assert_close(alone.codebook, first["codebook"])
