"""The codec: causal, the same in pieces as at once, measured by definitions; and the classifier that judges speech."""

import copy
import math

import numpy as np
import pytest
import torch

import zoo
from tasks.audio.classifier import Accuracy, ClassifierConfig, Varied, all_features, collate_labelled, disturbed
from tasks.audio.codec_task import Crops, Fidelity, collate_whole, decode_all, encode_all, si_sdr
from tasks.audio.data import Recordings
from tasks.audio.spectra import FLOOR, below_each_other, log_mel, mel_distance, picture
from tasks.audio.waves import amplitudes, at_loudness, fit, from_levels, mu_law_table, to_float, to_levels, to_pcm
from zoo.config import ConfigError, build
from zoo.model import Batch, Context


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    made = zoo.create_model(
        "audio_codec_8khz", width=8, widest=16, strides=(2, 4, 4), stages=3, quantizer={"codes": 16, "dim": 6}
    )
    for _ in range(40):  # codebooks begin with the first batches, the spread's running mean takes a few tens
        made(Batch(0.1 * torch.randn(8, 1024)))
    return made.eval()


@torch.no_grad()
def test_it_is_causal(codec):
    sound = 0.1 * torch.randn(2, 1024)
    changed = sound.clone()
    changed[:, 512:] = 0.1 * torch.randn(2, 512)
    codes, others = codec.encode(sound), codec.encode(changed)
    assert codes.shape == (2, 32, 3)
    assert torch.equal(codes[:, :16], others[:, :16])
    assert not torch.equal(codes[:, 16:], others[:, 16:])
    made, again = codec.decode(codes), codec.decode(others)
    torch.testing.assert_close(made[:, :512], again[:, :512], rtol=0, atol=1e-6)
    assert made.shape == sound.shape


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 32, [5, 1, 20, 6], [32]])
def test_pieces_are_the_whole(codec, sizes):
    codes = torch.randint(0, 16, (2, 32, 3))
    pieces = torch.cat(list(codec.decode_in_pieces(codes.split(sizes, dim=1))), dim=1)
    torch.testing.assert_close(pieces, codec.decode(codes), rtol=0, atol=1e-5)


@torch.no_grad()
def test_sounds_have_all_their_bits_under_autocast(codec):
    """Speech is made and judged at the precision that its generator trains in; the codec is not."""
    codes = torch.randint(0, 16, (2, 32, 3))
    with torch.autocast("cpu", torch.bfloat16):
        whole, pieces = codec.decode(codes), torch.cat(list(codec.decode_in_pieces(codes.split(8, dim=1))), dim=1)
    assert whole.dtype == pieces.dtype == torch.float32
    assert torch.equal(whole, codec.decode(codes))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_codec_held_in_bfloat16_makes_float32_whole_and_in_pieces(codec):
    held, codes = copy.deepcopy(codec).bfloat16(), torch.randint(0, 16, (2, 32, 3))
    whole, pieces = held.decode(codes), torch.cat(list(held.decode_in_pieces(codes.split(8, dim=1))), dim=1)
    assert whole.dtype == pieces.dtype == torch.float32
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-2)


@torch.no_grad()
def test_the_state_of_decoding_does_not_grow(codec):
    from zoo.state import state_bytes

    state, sizes = codec.start_decoding(2), set()
    for _ in range(5):
        _, state = codec.decode_on(torch.zeros(2, 3, 3, dtype=torch.int64), state)
        sizes.add(state_bytes(state))
    assert len(sizes) == 1


@torch.no_grad()
def test_fewer_stages_can_be_decoded(codec):
    sound = 0.1 * torch.randn(1, 512)
    codes = codec.encode(sound)
    assert torch.equal(codec.encode(sound, stages=2), codes[..., :2])
    assert not torch.equal(codec.decode(codes[..., :2]), codec.decode(codes))


def test_everything_learns():
    model = zoo.create_model("audio_codec_8khz", width=8, widest=16)
    output = model(Batch(0.1 * torch.randn(2, 2048)))
    output.loss_sum.backward()
    assert output.count == 2
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.config.hop == 128
    assert model.config.bits_per_second == 8000 / 128 * 6 * 8


@torch.no_grad()
def test_losses_add_up_over_sounds(codec):
    sounds = 0.1 * torch.randn(4, 1024)
    whole, parts = codec(Batch(sounds)), [codec(Batch(sounds[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))
    assert whole.count == sum(part.count for part in parts) == 4


def test_what_it_cannot_take(codec):
    with pytest.raises(ValueError, match=r"shape \(1, 1000\): this codec takes \(B, T\), T a multiple of 32"):
        codec.encode(torch.zeros(1, 1000))
    for field, message in (({"strides": ()}, "strides = "), ({"stages": 0}, "stages = 0"), ({"mel": -1.0}, "mel = -1")):
        with pytest.raises(ConfigError, match=message):
            zoo.create_model("audio_codec_8khz", **field)


def test_si_sdr_by_its_definition():
    wanted, noise = torch.randn(4000, dtype=torch.float64), torch.randn(4000, dtype=torch.float64)
    wanted, noise = wanted - wanted.mean(), noise - noise.mean()
    noise = noise - (noise @ wanted) / (wanted @ wanted) * wanted
    noise = noise * (wanted.norm() / noise.norm()) * 10 ** (-12 / 20)
    for scale in (1.0, 0.01, -3.0):  # of no consequence
        assert float(si_sdr(scale * (wanted + noise) + 0.5, wanted)) == pytest.approx(12.0)


def test_mel_distance():
    sound = 0.1 * torch.randn(2, 4096)
    assert mel_distance(sound, sound, 8000).tolist() == [0, 0]
    double = mel_distance(2 * sound, sound, 8000)
    torch.testing.assert_close(double, torch.full((2,), math.log(2)), rtol=0, atol=0.02)  # all but what is silent
    assert log_mel(torch.zeros(512), 8000).max() == pytest.approx(math.log(FLOOR))


@torch.no_grad()
def test_fidelity_is_over_real_samples_alone(codec):
    rng = np.random.default_rng(0)
    sounds = [to_pcm(0.1 * rng.standard_normal(size)) for size in (1500, 3000, 2111)]
    collate = collate_whole(32)
    together, apart = Fidelity(), Fidelity()
    together.update(codec, collate(sounds))
    for sound in sounds:
        apart.update(codec, collate([sound]))
    found, expected = together.compute(), apart.compute()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    sdr = 0.0
    for sound in sounds:
        whole = torch.from_numpy(fit(to_float(sound), -(-len(sound) // 32) * 32))[None]
        sdr += float(si_sdr(codec.decode(codec.encode(whole))[0, : len(sound)], whole[0, : len(sound)]))
    assert expected["si_sdr"] == pytest.approx(sdr / 3)
    assert found["recordings"] == 3
    assert found["bits_per_second"] == 8000 / 32 * 3 * 4
    assert 0 < found["codebook_usage_first"] <= 1
    assert encode_all(codec, np.zeros((3, 64), np.int16), batch=2).shape == (3, 2, 3)
    assert decode_all(codec, np.zeros((3, 2, 3), np.int64), batch=2).dtype == np.int16


def recordings(*sizes):
    sounds = [np.full(size, 1000 + 100 * number, np.int16) for number, size in enumerate(sizes)]
    labels = np.array([[number % 2, number % 3] for number in range(len(sizes))])
    return Recordings(sounds, labels, [str(number) for number in range(len(sizes))])


def test_crops_are_cut_or_filled_up():
    crops = Crops(recordings(50, 400), 200, gain=6.0, seed=0)
    seen = {0: 0, 1: 0}
    for position in range(300):
        item = crops.item(position)
        assert np.array_equal(item, crops.item(position))
        which = int((item > 0).all())
        seen[which] += 1
        assert (item > 0).sum() == (200 if which else 50)
        assert 0.499 < item.max() / ((1100 if which else 1000) / 32768) < 2.0
    assert 0.8 < seen[1] / 300 < 0.97  # 400 of 450 samples
    assert crops.collate([item, item]).inputs.shape == (2, 200)


# ---------------------------------------------------------------------------------------------------------------------


def test_mu_law_is_torchaudios_and_nearly_its_own_inverse():
    table = mu_law_table()
    assert (np.diff(table.astype(int)) >= 0).all()
    assert (table[0], table[32768], table[-1]) == (0, 128, 255)
    levels = np.arange(256)
    assert np.array_equal(to_levels(from_levels(levels)), levels)  # what was drawn is what is written
    sound = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    error = np.abs(to_float(from_levels(to_levels(sound))) - to_float(sound))
    assert (error <= np.abs(to_float(sound)) * 0.025 + 1e-4).all()
    assert amplitudes().min() == -1
    assert amplitudes().max() == 1


def test_fit():
    sound = np.arange(1, 5, dtype=np.int16)
    assert fit(sound, 6, 1).tolist() == [0, 1, 2, 3, 4, 0]
    assert fit(sound, 3).tolist() == [1, 2, 3]
    assert fit(sound, 3, 5).tolist() == [0, 0, 0]


def test_a_spectrogram_shows_a_tone_at_its_height():
    time = np.arange(8000) / 8000
    low, high = (picture(to_pcm(0.3 * np.sin(2 * np.pi * f * time)), 8000) for f in (300, 3000))
    assert low.shape[:2] == (3, 80)
    assert low.sum(dim=(0, 2)).argmax() > high.sum(dim=(0, 2)).argmax() + 20


def test_spectrograms_of_short_sounds_are_drawn_wider():
    short, long = (picture(np.arange(frames * 64, dtype=np.int16), 8000) for frames in (8, 199))
    assert (short.shape[2], long.shape[2]) == (9, 200)
    drawn = below_each_other([short])
    assert drawn.shape == (3, 82, 162)
    assert torch.equal(drawn[:, :80, ::18], short)
    assert below_each_other([short, long]).shape == (3, 164, 200)


def test_a_classifier_hears_no_loudness_and_scores_are_shares():
    torch.manual_seed(0)
    model = build(ClassifierConfig, {"widths": (4, 4, 8, 8), "classes": (2, 3)}).build().eval()
    sounds = torch.randn(4, 8192)
    torch.testing.assert_close(model.features(0.1 * sounds), model.features(0.3 * sounds), rtol=1e-3, atol=1e-3)
    items = [(sound.numpy(), np.array([number % 2, number % 3])) for number, sound in enumerate(sounds)]
    accuracy = Accuracy(("word", "voice"))
    for part in (items[:3], items[3:]):
        accuracy.update(model, collate_labelled(part))
    scores = accuracy.compute()
    answers = model.answers(model.features(sounds))
    labels = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 0]])
    assert scores["sounds"] == 4
    for place, name in enumerate(("word", "voice")):
        assert scores[f"{name}_accuracy"] == (answers == labels)[:, place].float().mean()
    pcm = [to_pcm(sound[:size].numpy() / 10) for sound, size in zip(sounds, (100, 8192, 9000, 50), strict=True)]
    assert all_features(model, pcm, batch=3).shape == (4, 8)


def test_training_sounds_of_the_classifier_move():
    items = [Varied(recordings(50, 400), 200, seed=0).item(position) for position in range(20)]
    starts = {int((sound > 0).argmax()) for sound, labels in items if labels[0] == 0}
    assert len(starts) > 3
    assert max(starts) <= 50
    assert all((sound > 0).sum() == (50, 200)[labels[0]] for sound, labels in items)


@pytest.mark.parametrize("kind", ["noise", "grain", "dull"])
def test_half_of_the_training_sounds_are_disturbed_as_far_as_they_may(kind):
    """A tone of 500 Hz with one of 3.5 kHz, at 8 kHz, then silence."""
    torch.manual_seed(0)
    most = {"noise": 0.5, "grain": 0.7, "dull": 0.6}
    config = ClassifierConfig(**{name: most[name] * (name == kind) for name in most})
    time = torch.arange(4096) / 8000
    tones = (2 * torch.pi * 500 * time).sin() + (2 * torch.pi * 3500 * time).sin()
    sound = torch.cat((tones, torch.zeros(4096))).expand(400, -1)
    error = disturbed(sound, config) - sound
    size = error.square().mean(dim=1).sqrt() / sound[0].square().mean().sqrt()
    hit = size > 1e-4
    assert 160 < hit.sum() < 240
    assert (error[~hit].abs() < 1e-4).all()
    if kind == "dull":  # what is lost is of the upper tone alone, at the most all of it
        assert 0.6 < size.max() < 0.75
        lost = torch.fft.rfft(error[hit]).abs().mean(dim=0)
        assert lost[:2000].sum() < 0.1 * lost.sum()
    else:
        assert 0.9 * most[kind] < size.max() < 1.05 * most[kind]
        silent = error[hit][:, 4200:].square().mean() / error[hit].square().mean()
        assert (silent < 1e-6) == (kind == "grain")  # noise goes on where the sound is silent


def test_a_judge_disturbs_nothing_but_its_training():
    torch.manual_seed(0)
    model = build(ClassifierConfig, {"widths": (4, 4, 8, 8), "classes": (2, 3), "dropout": 0.0}).build()
    batch = Batch(torch.randn(8, 8192), torch.zeros(8, 2, dtype=torch.int64))
    model.eval()
    assert torch.equal(model(batch).loss_sum, model(batch).loss_sum)
    model.train()
    assert not torch.equal(model(batch).loss_sum, model(batch).loss_sum)


def test_sounds_are_brought_to_one_loudness():
    quiet = (200 * np.sin(np.arange(4000) / 7)).astype(np.int16)
    for sound in (quiet, 50 * quiet):
        made = to_float(at_loudness(sound, 0.05))
        assert float(np.sqrt(np.square(made).mean())) == pytest.approx(0.05, rel=1e-3)
        assert np.corrcoef(made, sound)[0, 1] > 0.999
    assert not at_loudness(np.zeros(100, np.int16), 0.05).any()


def test_lengths_reach_the_device():
    batch = collate_whole(32)([np.zeros(10, np.int16)])
    assert isinstance(batch.ctx, Context)
    assert batch.ctx.lengths.tolist() == [10]
    assert batch.inputs.shape == (1, 32)
