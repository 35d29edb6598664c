"""What is to be run, in order: the first that is ready and that a place is free for goes first."""

import os
from dataclasses import dataclass, field

MIXERS = ("gatedfwa", "swa", "softmax")
# the recipe's (time=0.2, finer mel loss, equal loudness), at 3 and at 4 kbit/s; the best on held-out recordings is taken
CODECS = {"codec-six": [], "codec-eight": ["model.stages=8"]}
# the judge of session 8 beside the new one: its figures compare with those in docs/audio.md
OLD_JUDGE = ["model.noise=0.1", "model.grain=0", "model.dull=0", "train.steps=1500"]
# of speech, chosen on seed 1 and told on seed 2 (choose-sampling)
SAMPLING = [[f"task.samples.guidance={g}", f"task.samples.temperature={t}", "task.samples.seed=1"] for g in (1.5, 2.5, 4.0) for t in (0.9, 0.75)]


@dataclass
class Job:
    """kind  train: a recipe, then its evaluations (split, batch size, further words); script: job.py NAME does it
    alone  everything else stands still meanwhile: it measures time"""

    name: str
    recipe: str = ""
    words: list[str] = field(default_factory=list)
    scores: list[tuple[str, int, list[str]]] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    weights: bool = False
    alone: bool = False
    tiny: list[str] = field(default_factory=list)


def jobs() -> list[Job]:
    test = [("test", 30, [])]
    made = [
        *(Job(name, "audio/fsdd_codec", words, test, weights=True, tiny=CODEC) for name, words in CODECS.items()),
        Job("audio-fsdd_classifier", "audio/fsdd_classifier", [], [("test", 100, [])], weights=True, tiny=JUDGE),
        Job("old-judge", "audio/fsdd_classifier", OLD_JUDGE, [("test", 100, [])], tiny=JUDGE),
    ]
    for mixer in MIXERS:
        words = [] if mixer == "gatedfwa" else [f"model=audio_{mixer}_4m"]
        first = mixer == "gatedfwa"
        made.append(
            Job(f"fsdd-{mixer}", "audio/fsdd", words, [*test, ("valid", 30, [])], weights=first, tiny=SAMPLES)
        )
    places = len(CODECS) + 2
    made.insert(places, Job("choose-codec", needs=[*CODECS, "audio-fsdd_classifier", "old-judge"]))
    made.insert(
        places + 1,
        Job(
            "audio-fsdd_codes",
            "audio/fsdd_codes",
            [],
            [("test", 100, words) for words in SAMPLING],
            needs=["choose-codec"],
            weights=True,
            tiny=CODES,
        ),
    )
    made.insert(places + 2, Job("choose-sampling", needs=["audio-fsdd_codes"]))
    made.insert(places + 3, Job("show-codes", needs=["choose-sampling"]))
    made.append(Job("stream-codes", needs=["audio-fsdd_codes"], alone=True))
    for recipe, size in (("jsb_keys", "500k"), ("nottingham_keys", "1m"), ("jsb_joint", "500k"), ("nottingham_joint", "1m")):
        for mixer in MIXERS:
            words = [f"model=music_{mixer}_{size}"] if mixer != "gatedfwa" else []
            made.append(
                Job(f"{recipe}-{mixer}", f"audio/{recipe}", words, [("test", 38, []), ("valid", 38, [])], weights=mixer == "gatedfwa", tiny=MUSIC)
            )
    made.append(Job("show-music", needs=["jsb_joint-gatedfwa", "nottingham_joint-gatedfwa"]))
    made.append(Job("show-fsdd", needs=["fsdd-gatedfwa"]))
    made.append(Job("piano_keys-gatedfwa", "audio/piano_midi_keys", [], [("test", 12, []), ("valid", 12, [])], tiny=MUSIC))
    made.append(Job("piano_joint-gatedfwa", "audio/piano_midi_joint", [], [("test", 12, []), ("valid", 12, [])], tiny=MUSIC))
    made.append(Job("fsdd-gatedfwa-dropout0", "audio/fsdd", ["model.backbone.dropout=0.0"], [("valid", 30, [])], tiny=SAMPLES))
    made.append(Job("fsdd-brief", "audio/fsdd", ["train.steps=20"], [("test", 30, [])], tiny=SAMPLES))  # for times alone
    made.append(Job("stream-samples", needs=["fsdd-brief"], alone=True))
    return made


STEPS = os.environ.get("STEPS")
ROWS = ["train.batch_size=2", "train.schedule.warmup=2", "train.log_every=1", "train.precision=fp32", "train.compile=false"]
SMALL = ["model.backbone.width=64", "model.backbone.depth=2", "model.backbone.heads=2"]
LIMIT = ["task.dataset.limit=12"]
CODEC = [*ROWS, *LIMIT, "model.width=8", "model.widest=32", "model.quantizer.codes=16", "task.seconds=0.256"]
JUDGE = [*ROWS, *LIMIT, "model.widths=[8,8,8,16]"]
SAMPLES = [*ROWS, *SMALL, *LIMIT, "task.context=512"]
CODES = [*ROWS, *SMALL, *LIMIT, "task.views=2", "task.samples.count=20", "task.samples.batch=20", "task.seconds=0.512"]
MUSIC = [*ROWS, *SMALL, "task.dataset.limit=4", "task.frames=32"]


def words(job: Job) -> list[str]:
    every = max(1, int(STEPS or 0) // 2)
    tiny = [*job.tiny, f"train.steps={STEPS}", f"train.eval_every={every}", "train.eval_batches=1"] if STEPS else []
    return [*job.words, *tiny]
