"""One job of jobs.py in this process: a recipe trained and evaluated, its figures into $OUT/figures.jsonl as they come
and what is kept of it into slim/; or sounds and timings of finished runs."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs

OUT, ROOT = Path(os.environ["OUT"]), Path(os.environ["ROOT"])
TINY = bool(jobs.STEPS)


def emit(rows):
    """Whole lines at once, so that several processes may write."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    handle = os.open(OUT / "figures.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, data)
    os.close(handle)


def zoo(*words):
    from zoo.cli import main

    sys.argv = ["zoo", *words]
    print("$", *sys.argv, flush=True)
    code = main(list(words))
    if code:
        raise SystemExit(code)


def train(job):
    run, began = Path("runs") / job.name, time.time()
    cut = False
    try:
        zoo("train", job.recipe, *jobs.words(job), "--run", str(run), "--resume")
    except SystemExit as stop:
        if stop.code != 143:
            raise
        cut = True  # told to stop and saved: what there is is scored, and gone on with another time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is trained is scored, whatever is said
    trained = time.time() - began
    results = run / "results.jsonl"
    for split, batch, further in job.scores:
        before = len(results.read_text().splitlines()) if results.is_file() else 0
        zoo("evaluate", str(run), "--split", split, "--batch-size", str(4 if TINY else batch), *further)
        rows = [json.loads(line) for line in results.read_text().splitlines()[before:]]
        emit([{"job": job.name, "cut": cut, "train_seconds": round(trained, 1), **row} for row in rows])
    keep(job, run, done=not cut)


def keep(job, run, done):
    """slim/NAME: a run folder whose checkpoint holds the weights that count alone; of other models none."""
    from zoo.train import checkpoint
    from zoo.train.recipe import chosen_checkpoint
    from zoo.weights.published import compact

    slim = Path("slim") / job.name
    shutil.rmtree(slim, ignore_errors=True)
    shutil.copytree(run, slim, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "fitted", "profile", "samples", "evaluation"))
    if job.weights:
        path = chosen_checkpoint(run)
        manifest = checkpoint.read_manifest(path)
        average = checkpoint.read_tensors(path, "ema")
        stem, tensors = ("ema", average) if average else ("model", checkpoint.read_tensors(path, "model"))
        exact = job.name in (*jobs.CODECS, "audio-fsdd_classifier", "old-judge")  # others were trained on, judged by them
        facts = {k: v for k, v in manifest.items() if k not in ("format", "step", "files", "digest")}
        content = checkpoint.Content({stem: tensors if exact else compact(tensors)}, checkpoint.read_state(path), facts)
        checkpoint.save(slim / "checkpoints", manifest["step"], content, keep=1)
        share(slim)
    if done:
        (slim / "DONE").touch()
        (run / "DONE").touch()
    else:
        (slim / "CUT").touch()  # without an optimizer nothing goes on: a second call begins anew


def share(slim):
    """The codec in the assets of a run on its codes is the very file of its own run: a link in the tar."""
    import hashlib

    own = next(iter(Path("slim/audio-fsdd_codec").glob("checkpoints/*/model.safetensors")), None)
    copy = slim / "assets/codec/model.safetensors"
    if own and copy.is_file():
        same = len({hashlib.sha256(path.read_bytes()).hexdigest() for path in (own, copy)}) == 1
        print("the codec of the assets", "is a link" if same else "differs in bytes from its run's", flush=True)
        if same:
            copy.unlink()
            os.link(own, copy)


# ---------------------------------------------------------------------------------------------------------------------


def choose_codec():
    """The codec whose reconstructions of held-out training recordings are recognised best becomes audio-fsdd_codec; of
    equally good ones that of fewer codes. The winner alone is scored on the test files, by both judges."""
    import numpy as np
    import torch

    from tasks.audio.classifier import all_features, load_classifier
    from tasks.audio.codec_task import CodecTask, load_codec, mel_distance
    from tasks.audio.waves import fit, to_float, to_pcm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = {"name": "audio/spoken_digits", "held_out": 5, "loudness": 0.05, "limit": 12 if TINY else 0}
    data = CodecTask({"dataset": dataset}).data
    judges = {name: load_classifier(f"runs/{name}").module.to(device) for name in ("audio-fsdd_classifier", "old-judge")}

    @torch.no_grad()
    def score(name, split):
        codec, part = load_codec(f"runs/{name}").module.to(device), data.load(split)
        made, mel = [], []
        for sound in part.sounds:
            length = -(-len(sound) // codec.config.hop) * codec.config.hop
            x = torch.from_numpy(fit(to_float(sound), length))[None].to(device)
            y = codec.decode(codec.encode(x))[:, : len(sound)]
            mel.append(float(mel_distance(y, x[:, : len(sound)], codec.config.rate)))
            made.append(to_pcm(y[0].cpu().numpy()))
        row = {"job": name, "kind": "choice", "split": split, "mel": sum(mel) / len(mel), "stages": codec.config.stages}
        labels = torch.from_numpy(np.stack(part.labels))
        for judge, model in judges.items():
            right = (model.answers(all_features(model, made)).cpu() == labels).double()
            row[judge] = right.mean(0).tolist()
            row[f"{judge} by speaker"] = [float(right[labels[:, 1] == s, 0].mean()) for s in labels[:, 1].unique()]
        emit([row])
        print(row, flush=True)
        return row

    assert set(data.load("valid").names).isdisjoint(data.load("test").names)
    rows = {name: score(name, "valid") for name in jobs.CODECS}
    best = max(rows, key=lambda name: (rows[name]["audio-fsdd_classifier"][0], -rows[name]["stages"]))
    score(best, "test")
    for folder in ("runs", "slim"):
        if (Path(folder) / best).is_dir():
            shutil.copytree(Path(folder) / best, Path(folder) / "audio-fsdd_codec", dirs_exist_ok=True)
    for name in jobs.CODECS:  # the winner's weights alone come back, under its new name
        shutil.rmtree(Path("slim") / name / "checkpoints", ignore_errors=True)
    emit([{"job": "choose-codec", "kind": "choice", "chosen": best, "words": jobs.CODECS[best]}])


def choose_sampling():
    """The guidance and temperature whose sounds were recognised best on seed 1, told on seed 2 and three times as many."""
    rows = [json.loads(line) for line in (OUT / "figures.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["job"] == "audio-fsdd_codes" and row.get("name") == "digit_accuracy"]
    best = max(rows, key=lambda row: row["value"])
    words = [word for word in best["overrides"] if "seed" not in word]
    print("chosen:", words, best["value"], flush=True)
    run, results = Path("runs/audio-fsdd_codes"), Path("runs/audio-fsdd_codes/results.jsonl")
    for further in ([], ["task.samples.classifier=runs/old-judge"]):
        before = len(results.read_text().splitlines())
        count = [] if TINY else ["task.samples.count=1800"]
        zoo("evaluate", str(run), "--split", "test", "--batch-size", str(4 if TINY else 100), *words, "task.samples.seed=2", *count, *further)
        emit([{"job": "choose-sampling", "cut": False, **json.loads(line)} for line in results.read_text().splitlines()[before:]])
    Path("sampling.json").write_text(json.dumps(words))


def stream(bench, run, seconds, at):
    """scripts/bench_audio_streaming.py, its rows into the figures. Nothing else runs meanwhile."""
    import torch

    graph = ["--graph"] if torch.cuda.is_available() else []
    words = [sys.executable, str(ROOT / "scripts/bench_audio_streaming.py"), run, "--seconds", str(seconds), *graph]
    words += ["--at", *map(str, at)]
    print("$", *words, flush=True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            with contextlib.suppress(ValueError):
                emit([{"job": Path(run).name, "bench": bench, "kind": "stream", "commit": os.environ["ZOO_COMMIT"], **json.loads(line)}])
    if process.returncode:
        raise SystemExit(process.returncode)


def show_codes():
    """Every digit by every speaker, and a longer seven from the command line."""
    import torch

    from tasks.audio.spectra import picture
    from tasks.audio.task import AudioPrompt
    from tasks.audio.waves import write_wav
    from zoo.generation import Sampling
    from zoo.pipelines import pipeline

    media = Path("media/codes")
    media.mkdir(parents=True, exist_ok=True)
    pipe = pipeline("runs/audio-fsdd_codes")
    digits, speakers = pipe.task.attributes["digit"], pipe.task.attributes["speaker"]
    asked = [AudioPrompt({"digit": d, "speaker": s}) for s in speakers for d in digits]
    best = dict(word.removeprefix("task.samples.").split("=") for word in json.loads(Path("sampling.json").read_text()))
    sampling = Sampling(temperature=float(best["temperature"]), top_p=0.95, guidance=float(best["guidance"]))
    sounds = pipe.sample(asked, sampling=sampling, seed=7)
    rows = []
    for number, speaker in enumerate(speakers):
        part = sounds[number * len(digits) : (number + 1) * len(digits)]
        rows.append(torch.cat([torch.nn.functional.pad(picture(x, 8000), (0, 3)) for x in part], dim=2))
        for digit, sound in zip(digits, part, strict=True):
            write_wav(media / f"{digit}_{speaker}.wav", sound, 8000)
    save(torch.cat(rows, dim=1), media / "made.png")
    real = pipe.task.data.load("test")
    for name, change in (("real", lambda x: x), ("rebuilt", pipe.task._rebuilt)):
        places = [next(i for i, n in enumerate(real.names) if n == f"{d}_{s}_0") for s in speakers for d in digits if f"{d}_{s}_0" in real.names]
        chosen = change([pipe_fit(real.sounds[i], pipe.task.row) for i in places])
        rows = [torch.cat([torch.nn.functional.pad(picture(x, 8000), (0, 3)) for x in chosen[k : k + 10]], dim=2) for k in range(0, len(chosen), 10)]
        if rows and len({row.shape for row in rows}) == 1:
            save(torch.cat(rows, dim=1), media / f"{name}.png")
        for i, sound in list(zip(places, chosen, strict=True))[:20]:
            write_wav(media / f"{name}_{real.names[i]}.wav", sound, 8000)
    del pipe
    zoo("sample", "runs/audio-fsdd_codes", "--class", "7", "--seconds", "2", "--guidance", best["guidance"], "--out", str(media / "seven.wav"))


def pipe_fit(sound, length):
    from tasks.audio.waves import fit

    return fit(sound, length)


def save(picture, path):
    import torch
    from PIL import Image

    Image.fromarray((picture.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()).save(path)


def show_music():
    Path("media/music").mkdir(parents=True, exist_ok=True)
    for name in ("jsb_joint", "nottingham_joint"):
        for ending in ("mid", "wav", "png"):
            zoo("sample", f"runs/{name}-gatedfwa", "--seconds", "30", "--seed", "1", "--out", f"media/music/{name}.{ending}")


def show_fsdd():
    """Two seconds of babble, and recordings gone on with: eight rows at once, from a graph."""
    import numpy as np
    import torch

    from tasks.audio.waves import write_wav
    from zoo.generation import Sampling, generate
    from zoo.pipelines import pipeline

    media = Path("media/fsdd")
    media.mkdir(parents=True, exist_ok=True)
    pipe = pipeline("runs/fsdd-gatedfwa")
    given = [None] * 4
    count = pipe.task.elements(0.05 if TINY else 2.0)
    real = pipe.task.data.load("test").sounds
    begun = [sound[:1600] for sound in real[:: max(1, len(real) // 4)][:4]]
    for name, prompt, new in (("babble", given, count), ("gone_on", begun, count // 4)):
        batch = pipe.task.prompt(prompt)
        drawn = generate(pipe.model, batch, max_new=new, sampling=Sampling(temperature=0.95), seed=3, graph=torch.cuda.is_available())
        for number, sound in enumerate(pipe.task.artefacts(batch, drawn.cpu())):
            write_wav(media / f"{name}_{number}.wav", np.asarray(sound), 8000)


SCRIPTS = {
    "choose-codec": choose_codec,
    "choose-sampling": choose_sampling,
    "stream-codes": lambda: stream("stream-codes", "runs/audio-fsdd_codes", *((4, [1, 4]) if TINY else (600, [1, 10, 60, 300, 600]))),
    "stream-samples": lambda: stream("stream-samples", "runs/fsdd-brief", *((0.2, [0.2]) if TINY else (10, [1, 10]))),
    "show-codes": show_codes,
    "show-music": show_music,
    "show-fsdd": show_fsdd,
}

if __name__ == "__main__":
    name = sys.argv[1]
    job = next(job for job in jobs.jobs() if job.name == name)
    if job.recipe:
        train(job)
    else:
        SCRIPTS[name]()
    Path("done").mkdir(exist_ok=True)
    if not job.recipe or (Path("runs") / name / "DONE").exists():
        (Path("done") / name).touch()
