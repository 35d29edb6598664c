"""Weights files: written whole, read with errors that name the fault; nothing is unpickled."""

import os
import pickle

import pytest
import torch
from torch import nn

from zoo import weights
from zoo.weights import WeightsError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    return path, weights.save(weights.named_tensors(Tied()), path, {"note": "x"})


def test_round_trip_with_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    path = tmp_path / "deep" / "model.safetensors"
    sha256 = weights.save(weights.named_tensors(model), path)
    assert set(weights.read(path)) == {"embed.weight", "out.bias", "steps"}
    weights.load_into(other, weights.read(path, sha256=sha256))
    assert torch.equal(other.out.weight, model.embed.weight)
    assert other.out.weight is other.embed.weight
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    weights.load_into(other, model.state_dict())  # a file that has the second name, too


def test_failed_write_leaves_the_old_file(saved, monkeypatch):
    path, sha256 = saved

    def full(part, data):
        part.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.files, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save({"a": torch.zeros(1)}, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    weights.read(path, sha256=sha256)


@pytest.mark.parametrize("length", [0, 5, 8, 40, -1])
def test_truncated(saved, length):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="truncated") as error:
        weights.read(path)
    assert str(path) in str(error.value)


def test_flipped_bits(saved):
    path, sha256 = saved
    whole = path.read_bytes()
    for place in (0, 9, 20, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 16
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="damaged|truncated"):
            weights.read(path, sha256=sha256)


def test_a_file_of_other_weights_says_whose_it_is(saved, tmp_path):
    other = tmp_path / "other.safetensors"
    weights.save({"a": torch.zeros(3)}, other, {weights.LABEL: "toy_mlp_1m.b"})
    with pytest.raises(WeightsError, match="calls itself toy_mlp_1m.b, and its sha256"):
        weights.read(other, sha256=saved[1])


class Explosive:
    def __reduce__(self):
        return (os.abort, ())


def test_pickles_are_refused_by_content(tmp_path):
    path = tmp_path / "model.safetensors"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(Explosive(), protocol=protocol))
        with pytest.raises(WeightsError, match="model.safetensors is a pickle.*not opened"):
            weights.read(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="is a pickle"):
        weights.read(path)


@pytest.mark.parametrize("header", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_as_a_pickle_does(header, tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save({"w": torch.ones(2)}, path)
    name = "w" * (header - int.from_bytes(path.read_bytes()[:8], "little"))  # headers are whole multiples of 8
    weights.save({name: torch.ones(2)}, path)
    assert path.read_bytes()[:2] == header.to_bytes(2, "little")
    assert next(iter(weights.read(path).values())).tolist() == [1.0, 1.0]


def test_oversized_header_and_nonsense(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="claims 1099511627776 bytes"):
        weights.read(path)
    for header in (b"[1,2]", b'{"a": 3}', b"not json", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4 * (b"F32" in header))
        with pytest.raises(WeightsError, match="damaged"):
            weights.read(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        weights.read(tmp_path / "none")


def test_foreign_weights_are_listed_and_change_nothing():
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    foreign = {"embed.weight": torch.zeros(6, 4), "steps": torch.tensor(9), "other.weight": torch.zeros(1)}
    with pytest.raises(WeightsError) as error:
        weights.load_into(model, foreign, origin="x.safetensors")
    for words in ("x.safetensors", "1 missing: out.bias", "1 unexpected: other.weight", "(6, 4) in the file, (5, 4)"):
        assert words in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
