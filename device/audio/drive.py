"""Runs the jobs as processes, the most important first, until LIMIT: figures come out as they are known; near the end
trainings are told to stop and are scored as they are; what is worth keeping is packed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE, OUT = Path(os.environ["HERE"]), Path(os.environ["OUT"])
sys.path.insert(0, str(HERE))
from jobs import CODECS, jobs

START, LIMIT = float(os.environ["START"]), float(os.environ["LIMIT"])
PLACES = int(os.environ.get("PLACES", 7))  # jobs at once on a card
SOFT, HARD = 55.0, 20.0  # seconds before the limit: trainings are told to stop; all are killed, and packed
PIECE = 15 * 2**20


def now():
    return time.time() - START


def say(*words):
    print(f"[{now():5.0f}]", *words, flush=True)


def cards():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
        return max(1, listed.count("GPU "))
    except (OSError, subprocess.SubprocessError):
        return 1


def pack():
    """media.tar.xz: all but weights. state.tar.NN: slim run folders, which a second call goes on with."""
    (Path("slim")).mkdir(exist_ok=True)
    found = [str(p) for p in Path().glob("runs/*/*") if p.name in ("log.txt", "metrics.jsonl", "recipe.yaml", "provenance.json", "results.jsonl", "evaluation", "samples")]
    found += [str(p) for p in (Path("logs"), Path("media")) if p.is_dir()]
    if found:
        part = OUT.with_name(OUT.name + ".part.tar.xz")
        # of music, whose sounds are long, those of show-music alone
        rendered = ["--exclude=runs/*_keys-*/samples/*.wav", "--exclude=runs/*_joint-*/samples/*.wav"]
        subprocess.run(["tar", *rendered, "-cJf", str(part), *found], env={**os.environ, "XZ_OPT": "-2 -T8"}, check=False)
        (OUT / "media.tar.xz").write_bytes(part.read_bytes())
        part.unlink()
    first = [f"slim/{name}" for name in ("audio-fsdd_codec", "audio-fsdd_classifier", "audio-fsdd_codes") if Path("slim", name).is_dir()]
    state = [*(["done"] if Path("done").is_dir() else []), *first, *(str(p) for p in sorted(Path("slim").iterdir()) if str(p) not in first)]
    whole = subprocess.run(["tar", "-cf", "-", "--transform", "s,^slim,runs,", *state], capture_output=True, check=False).stdout
    for old in OUT.glob("state.tar.*"):
        old.unlink()
    room = 3  # of 8 files of 16 MiB, 64 MiB in all; media and logs take the others
    for number, at in enumerate(range(0, len(whole), PIECE)):
        if number == room:
            say("state is larger than what comes back:", len(whole))
            break
        (OUT / f"state.tar.{number:02d}").write_bytes(whole[at : at + PIECE])
    say("packed", {p.name: p.stat().st_size for p in sorted(OUT.iterdir()) if p.is_file()})


def stopped(*_):
    raise SystemExit("told to stop")


def main():
    signal.signal(signal.SIGTERM, stopped)
    running = {}
    try:
        work(running)
    finally:
        for process, *_ in running.values():
            signal_group(process, signal.SIGKILL)
        pack()


def work(running):
    only = re.compile(os.environ.get("ONLY", "."))
    todo = [job for job in jobs() if only.search(job.name)]
    for path in Path("runs").glob("*/CUT"):
        shutil.rmtree(path.parent)
    done = {p.name for p in Path("done").glob("*")} if Path("done").is_dir() else set()
    for path in sorted(Path("runs").glob("*/DONE")):  # of an earlier call: their figures once more
        done.add(path.parent.name)
        if not (kept := Path("slim") / path.parent.name).exists():
            shutil.copytree(path.parent, kept)
        rows = [json.loads(line) for line in (path.parent / "results.jsonl").read_text().splitlines()]
        with (OUT / "figures.jsonl").open("a") as file:
            file.writelines(json.dumps({"job": path.parent.name, "cut": False, "earlier_call": True, **row}) + "\n" for row in rows)
    waiting = [job for job in todo if job.name not in done]
    count = cards()
    say(len(waiting), "jobs,", len(done), "done before,", count, "cards, limit", LIMIT)
    failed, told = [], set()
    held = False
    while (waiting or running) and now() < LIMIT - HARD:
        for name, (process, job, began, card) in list(running.items()):
            if (code := process.poll()) is None:
                if job.alone and now() - began > 110:
                    signal_group(process, signal.SIGKILL)
                continue
            del running[name]
            if job.alone and held:
                held = False
                for other, *_ in running.values():
                    signal_group(other, signal.SIGCONT)
            ok = code == 0
            cut = ok and job.recipe and not (Path("runs") / name / "DONE").exists()
            (done.add(name) if ok and not cut else failed.append(name))  # what needs a run that was cut waits for another call
            say(name, "CUT, scored as it was," if cut else "done" if ok else f"FAILED ({code})", f"after {now() - began:.0f} s")
            tell(name, ok)
        gone = {job.name for job in waiting if any(need in failed for need in job.needs)}
        for job in [job for job in waiting if job.name in gone]:
            say(job.name, "is left out: it needs", *job.needs)
            failed.append(job.name)
            waiting.remove(job)
        late = now() > LIMIT - SOFT
        if late:
            for name, (process, job, *_) in running.items():
                if name not in told and job.recipe:
                    told.add(name)
                    say(name, "is told to stop")
                    os.kill(process.pid, signal.SIGTERM)
        for job in list(waiting):
            first = not {"audio-fsdd_codes"} <= done | {*failed}  # the chain from codecs to codes has the card almost to itself
            if late or held or len(running) >= (min(4, PLACES) if first else PLACES) * count:
                break
            if not all(need in done for need in job.needs):
                continue
            if job.alone and now() > LIMIT - SOFT - 50:
                continue
            waiting.remove(job)
            if job.alone:
                held = True
                for other, *_ in running.values():
                    signal_group(other, signal.SIGSTOP)
            loads = [sum(1 for *_, card in running.values() if card == c) for c in range(count)]
            card = loads.index(min(loads))
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(card)} if count > 1 else dict(os.environ)
            log = (Path("logs") / f"{job.name}.log").open("a")
            process = subprocess.Popen([sys.executable, str(HERE / "job.py"), job.name], stdout=log, stderr=log, env=env, start_new_session=True)
            running[job.name] = (process, job, now(), card)
            say(job.name, "begins")
        time.sleep(0.2)
    for name, (process, *_) in running.items():
        say(name, "is killed")
        signal_group(process, signal.SIGKILL)
        tell(name, False)
    say("done:", *sorted(done & {job.name for job in jobs()}))
    say("failed:", *failed, "left:", *(job.name for job in waiting), *running)


def signal_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def tell(name, ok):
    """The figures of a job, or the end of its log."""
    if not ok:
        text = (Path("logs") / f"{name}.log").read_text(errors="replace").splitlines()
        print("\n".join("    " + line[:300] for line in text[-12:]), flush=True)
        return
    shown = ("bits_per_sample", "nats_per_frame", "nats_per_frame_all", "si_sdr", "mel_distance", "codebook_usage", "codebook_perplexity", "bits_per_second", "bits_per_code", "frechet_own_features", "frechet_own_features_rebuilt")
    if (OUT / "figures.jsonl").is_file():
        for line in (OUT / "figures.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row.get("bench") == name:
                print("    ", {k: row[k] for k in ("second", "real_time_factor", "worst_piece", "processor_factor", "first_piece_after_s", "state_bytes")}, flush=True)
            elif row["job"] == name and row.get("kind") == "metric" and (row["name"] in shown or "accuracy" in row["name"]):
                print(f"     {row['split']} {row['name']} {row['value']:.4f} {' '.join(row.get('overrides', []))}", flush=True)


main()
