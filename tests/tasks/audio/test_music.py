"""Music: notes and frames, both protocols exactly normalised, and what becomes of a roll."""

import itertools
import math
import wave

import numpy as np
import pytest
import torch

import zoo
from tasks.audio import music_heads, scores
from tasks.audio.music import (
    NatsPerFrame,
    Pieces,
    collate_keys,
    collate_notes,
    from_tokens,
    key_baselines,
    to_frames,
    to_tokens,
)
from tasks.audio.music_heads import END, GOES_ON, START
from tasks.audio.render import held_notes, render, roll_picture, write_midi
from zoo import cli, registry
from zoo.config import build
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context

COLLATE = {"music_notes": (to_tokens, collate_notes), "music_keys": (to_frames, collate_keys)}


def small_model(head, mixer="gatedfwa", **settings):
    torch.manual_seed(0)
    node = {"name": mixer} | ({"window": 12} if mixer in ("gatedfwa", "swa") else {})
    backbone = {"width": 16, "depth": 2, "heads": 2, "mixer": node}
    model = zoo.create_model(f"music_{mixer}_100k", backbone=backbone, head={"name": head, **settings})
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


def rolls(*lengths, seed=0, density=0.05):
    rng = np.random.default_rng(seed)
    return [rng.random((length, 88)) < density for length in lengths]


def test_tokens_of_a_roll_and_back():
    roll = np.zeros((3, 88), bool)
    roll[0, [40, 5]] = roll[2, 87] = True
    assert to_tokens(roll).tolist() == [START, 5, 40, END, END, 87, END]
    assert np.array_equal(from_tokens(to_tokens(roll)[1:]), roll)
    assert np.array_equal(from_tokens(np.array([5, 40, END, END, 87])), roll[:2])  # the last frame has not ended
    assert from_tokens(np.zeros(0, np.int64)).shape == (0, 88)
    frames = to_frames(roll)
    assert frames[0].nonzero()[0].tolist() == [88]
    assert to_frames(roll, GOES_ON)[0].nonzero()[0].tolist() == [89]
    assert np.array_equal(frames[1:, :88], roll)
    for each in rolls(1, 50, 7):
        assert np.array_equal(from_tokens(to_tokens(each)[1:]), each)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["gatedfwa", "softmax"])
def test_the_joint_likelihood_of_a_frame_sums_to_one(mixer, monkeypatch):
    """A keyboard of three keys: all 64 pieces of two frames."""
    for name, value in (("KEYS", 3), ("END", 3), ("START", 4), ("GOES_ON", 5)):
        monkeypatch.setattr(music_heads, name, value)
    model = small_model("music_notes", mixer)
    total = 0.0
    for keys in itertools.product((0, 1), repeat=6):
        tokens = [4]
        for frame in (keys[:3], keys[3:]):
            tokens += [key for key, on in enumerate(frame) if on] + [3]
        row = torch.tensor([tokens])
        output = model(Batch(row[:, :-1], row[:, 1:]))
        assert output.count == 2
        total += math.exp(-output.loss_sum.item())
    assert total == pytest.approx(1.0, abs=1e-6)  # logits are float32


@torch.no_grad()
@pytest.mark.parametrize("head", COLLATE)
def test_pieces_score_packed_as_alone_and_frames_are_counted(head):
    model, (layout, collate) = small_model(head), COLLATE[head]
    pieces = rolls(5, 1, 20)
    metric = NatsPerFrame()
    metric.update(model, collate([layout(roll) for roll in pieces]))
    found = metric.compute()
    nats, first = 0.0, 0.0
    for roll in pieces:
        nats += model(collate([layout(roll)])).loss_sum.item()
        first += model(collate([layout(roll[:1])])).loss_sum.item()
    assert (found["frames"], found["pieces"]) == (26, 3)
    assert found["nats_per_frame_all"] == pytest.approx(nats / 26)
    assert found["nats_per_frame"] == pytest.approx((nats - first) / 23)


@torch.no_grad()
def test_independent_keys_are_88_bernoulli_variables():
    model = small_model("music_keys")
    roll = rolls(6)[0]
    batch = collate_keys([to_frames(roll)])
    h, _ = model.head.embed(batch.inputs, batch.ctx)
    chance = model.head.logits(model.hidden(h, batch.ctx)[0][0], None).double().sigmoid().numpy()
    nats = -np.log(np.where(roll, chance, 1 - chance)).sum()
    assert model(batch).loss_sum.item() == pytest.approx(nats, rel=1e-5)


@torch.no_grad()
def test_notes_are_drawn_by_the_full_forward():
    """From prompts of different lengths; no key but above the last one."""
    model = small_model("music_notes", metre=3)
    rows = [to_tokens(roll) for roll in rolls(2, 4, density=0.03)]
    lengths = torch.tensor([len(row) for row in rows])
    inputs = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    given = Batch(inputs, ctx=Context(lengths=lengths))
    drawn = generate(model, given, max_new=25, sampling=Sampling(temperature=0), chunk=3)
    for number, row in enumerate(rows):
        tokens = torch.from_numpy(row)[None]
        for step in range(25):
            h, _ = model.head.embed(tokens, Context())
            logits = model.head.out(model.hidden(h, Context())[0][:, -1])[0]
            last = int(tokens[0, -1])
            if last < END:
                logits[: last + 1] = -torch.inf
            assert drawn[number, step] == logits.argmax()
            tokens = torch.cat((tokens, drawn[number, step].view(1, 1)), dim=1)


@torch.no_grad()
def test_frames_are_drawn_by_the_full_forward():
    model = small_model("music_keys", metre=3)
    inputs = torch.from_numpy(to_frames(rolls(4)[0]))[None]
    drawn = generate(model, Batch(inputs), max_new=7, sampling=Sampling(temperature=0), chunk=2)
    for step in range(7):
        h, _ = model.head.embed(inputs, Context())
        keys = model.head.out(model.hidden(h, Context())[0][:, -1]) > 0
        assert torch.equal(drawn[:, step, :88].bool(), keys)
        inputs = torch.cat((inputs, drawn[:, step : step + 1]), dim=1)


def test_training_pieces_are_moved_within_the_keyboard_and_cut():
    roll = np.zeros((30, 88), bool)
    roll[:, 3] = roll[::2, 86] = True
    items = [Pieces([roll], to_tokens, None, seed=1, transpose=6, frames=10).item(n) for n in range(80)]
    seen = {int(item[1]) for item in items}
    assert seen == {0, 1, 2, 3, 4}  # at most 3 down and 1 up
    assert {int(item[0]) for item in items} == {START, GOES_ON}
    assert all((item == END).sum() == 10 for item in items)
    again = [Pieces([roll], to_tokens, None, seed=1, transpose=6, frames=10).item(n) for n in range(80)]
    assert all(np.array_equal(one, other) for one, other in zip(items, again, strict=True))


def test_baselines_by_hand():
    train = [np.zeros((3, 88), bool)]
    train[0][1:, 0] = True
    test = [np.zeros((3, 88), bool)]
    test[0][1, 0] = True
    found = key_baselines(train, test)
    on, off = 3 / 5, 1 / 5  # key 0; the other 87
    frames = [-math.log(on), -math.log(1 - on)]
    rest = -87 * math.log(1 - off)
    assert found["order0_nats_per_frame"] == pytest.approx(sum(frames) / 2 + rest)
    follow = [-math.log(2 / 3), -math.log(1 / 3)]  # off to on: 1 + 1 of 3; on to off: 0 + 1 of 3
    assert found["order1_nats_per_frame"] == pytest.approx(sum(follow) / 2 - 87 * math.log(3 / 4))


# ---------------------------------------------------------------------------------------------------------------------


def test_a_midi_file_holds_the_notes(tmp_path):
    import mido

    roll = np.zeros((4, 88), bool)
    roll[0:3, 39] = roll[1, 43] = roll[3, 39] = True
    assert held_notes(roll) == [(39, 0, 4), (43, 1, 2)]
    write_midi(tmp_path / "a.mid", roll, 0.25)
    file = mido.MidiFile(str(tmp_path / "a.mid"))
    assert file.length == pytest.approx(1.0)
    now, sounding, heard = 0.0, {}, []
    for message in file:
        now += message.time
        if message.type == "note_on":
            sounding[message.note] = now
        elif message.type == "note_off":
            heard.append((message.note, sounding.pop(message.note), now))
    assert sorted(heard) == [(60, 0.0, pytest.approx(1.0)), (64, pytest.approx(0.25), pytest.approx(0.5))]


def test_a_rendered_note_has_its_pitch():
    roll = np.zeros((4, 88), bool)
    roll[:, 48] = True  # A4, 440 Hz
    sound = render(roll, 0.25, 16000)
    assert sound.dtype == np.int16
    assert len(sound) == 16000 + 4000
    spectrum = np.abs(np.fft.rfft(sound[:16000].astype(float)))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert not render(np.zeros((2, 88), bool), 0.25, 16000).any()
    picture = roll_picture(roll)
    assert picture.shape == (3, 176, 16)
    assert (picture[0, 2 * (87 - 48)] < 0.2).all()


def music_task(**fields):
    entry = registry.tasks.get("music")
    return entry(build(entry.Config, fields))


def test_the_chorales_are_the_standard_ones(data_root):
    """Pieces and frames as published; a wrong file is refused by its digest."""
    counted = {
        name: [(len(data.load(split)), sum(map(len, data.load(split)))) for split in scores.SPLITS]
        for name in ("jsb", "nottingham", "piano_midi")
        for data in [registry.datasets.get(f"music/{name}")(scores.RollConfig())]
    }
    assert counted == {
        "jsb": [(229, 13807), (76, 4602), (77, 4725)],
        "nottingham": [(694, 176561), (173, 45513), (170, 44463)],
        "piano_midi": [(87, 75911), (12, 8540), (25, 19036)],
    }


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    from zoo.files import ChecksumError

    (tmp_path / "polymusic").mkdir()
    (tmp_path / "polymusic/JSB_Chorales.mat").write_bytes(b"nothing")
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    with pytest.raises(ChecksumError, match=r"JSB_Chorales\.mat has sha256"):
        registry.datasets.get("music/jsb")(scores.RollConfig()).load("train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "both"}, "protocol"),
        ({"transpose": -1}, "transpose = -1"),
        ({"frames": 1}, "frames = 1"),
        ({"dataset": {"name": "music/jbs"}}, "did you mean 'music/jsb'"),
        ({"frame_seconds": 0.0}, "frame_seconds = 0.0"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        music_task(**fields)


def test_a_head_for_the_other_protocol_is_named():
    with pytest.raises(ValueError, match=r"needs model\.head\.name = music_keys"):
        music_task(protocol="keys").model_config(registry.models.get("music_swa_100k")())
    with pytest.raises(ValueError, match=r"a piano roll of shape \(3, 12\)"):
        music_task().prompt(np.zeros((3, 12)))


def test_smoke_on_real_chorales(data_root, tmp_path, monkeypatch, capsys):
    """CI's proof: both protocols learn, in seconds, and a piece is written as MIDI, sound and picture."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "audio/smoke_music", "train.device=cpu"]) == 0
    keys = [
        "task.protocol=keys",
        "model.head.name=music_keys",
        "train.sample_every=0",
        "train.steps=160",
        "--run",
        "runs/keys",
    ]
    assert cli.main(["train", "audio/smoke_music", "train.device=cpu", *keys]) == 0
    for run in ("runs/audio-smoke_music", "runs/keys"):
        capsys.readouterr()
        assert cli.main(["evaluate", run, "--device", "cpu"]) == 0
        values = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
        assert values["nats_per_frame"] < values["order1_nats_per_frame"]
        assert values["frames"] == 2395
    for ending, begins in ((".mid", b"MThd"), (".wav", b"RIFF"), (".png", b"\x89PNG")):
        words = ["--seconds", "4", "--seed", "1", "--out", f"piece{ending}", "--device", "cpu"]
        assert cli.main(["sample", "runs/audio-smoke_music", *words]) == 0
        assert (tmp_path / f"piece{ending}").read_bytes().startswith(begins)
    with wave.open("piece.wav") as file:
        assert file.getnframes() > 1000
    shown = {path.name for path in (tmp_path / "runs/audio-smoke_music/samples").iterdir()}
    assert shown == {"step-00000060-roll_0.png", "step-00000060-piece_0.wav"}
