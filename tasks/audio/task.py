"""The audio task: recordings as mu-law samples or as codes of a codec, and back; whole, or in pieces as they come."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tasks.audio.classifier import Classifier, load_classifier
from tasks.audio.codec import Codec
from tasks.audio.codec_task import decode_all, encode_all, load_codec
from tasks.audio.data import Recordings
from tasks.audio.metrics import Likelihood, Speech, SpeechConfig, order0_bits, order1_bits
from tasks.audio.patterns import PATTERNS, Pattern
from tasks.audio.sample_head import START
from tasks.audio.spectra import below_each_other, picture
from tasks.audio.stream import packed_stream, row_stream, scored, shifted, whole_stream
from tasks.audio.waves import LEVELS, fit, from_levels, to_levels, to_pcm, write_wav
from zoo import config as configs
from zoo import frozen
from zoo.config import Choice
from zoo.data import SourceStream
from zoo.frozen import Frozen
from zoo.generation import generate
from zoo.model import Batch, Model, ModelConfig
from zoo.registry import datasets, nearest
from zoo.task import Media, Metric, Request, Task

FRAMES_AT_ONCE = 16  # that a codec decodes in one call, whether a sound is wanted whole or in pieces


@dataclass
class AudioPrompt:
    """What to make: with these labels, by the attribute's name (those left out: any), after the sound `given` (T,)
    int16.

    With codes, as many whole frames of what is given are kept as there are.
    """

    labels: dict[str, str | int] = field(default_factory=dict)
    given: np.ndarray | None = None


class AudioTask(Task):
    domain = "audio"
    endings = (".wav",)

    @dataclass
    class Config:
        """sequence      samples, with an exact likelihood, or codes of a codec
        codec         of codes: a run folder or weights of an audio_codec
        codec_sha256  refuse any other
        pattern       in which its streams stand: parallel, delay, flat
        condition     attributes of the data set that the model is told: [digit, speaker]
        context       of unconditional samples: the length of a training row, packed with recordings
        seconds       of codes, and of samples with a condition: recordings are cut or filled up with silence to it
        views         of codes: each training recording is encoded so many times, at another place within a frame
        samples       made when the test split is evaluated
        shown         sounds in TensorBoard
        shown_seconds of these
        """

        dataset: Choice | None = configs.choice(datasets, "audio/spoken_digits")
        sequence: Literal["samples", "codes"] = "samples"
        codec: str = ""
        codec_sha256: str = ""
        pattern: str = "delay"
        condition: list[str] = field(default_factory=list)
        context: int = 8192
        seconds: float = 1.024
        views: int = 1
        samples: SpeechConfig = field(default_factory=SpeechConfig)
        shown: int = 4
        shown_seconds: float = 0.5

        def __post_init__(self):
            if self.pattern not in PATTERNS:
                raise ValueError(f"pattern = {self.pattern!r}{nearest(self.pattern, PATTERNS)}")
            if self.sequence == "codes" and not self.codec:
                raise ValueError(
                    "sequence = 'codes' needs codec, a run folder of the task audio_codec or a name of weights"
                )
            if self.sequence == "samples" and self.codec:
                raise ValueError(f"codec = {self.codec!r} has no use with sequence = 'samples'")
            if self.sequence == "samples" and self.views != 1:
                raise ValueError(f"views = {self.views}: samples are one view, so it takes 1 with them")
            for name in ("context", "views", "shown"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes 1 or more")
            for name in ("seconds", "shown_seconds"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes a number above 0")
            if self.samples.count and not self.samples.classifier:
                raise ValueError("samples.count needs samples.classifier, a run folder of the task audio_classifier")

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)
        self._assets = assets
        self._views: dict[str, list[np.ndarray]] = {}
        for name in config.condition:
            if name not in self.attributes:
                raise ValueError(f"condition = {config.condition}: {name!r}{nearest(name, self.attributes)}")

    # -- what belongs to it --------------------------------------------------------------------------------------------

    @cached_property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Read from the run's assets where the data set is a folder that may be gone."""
        names = self._assets / "attributes.json" if self._assets else None
        if names is not None and names.is_file():
            import json

            return {name: tuple(values) for name, values in json.loads(names.read_text(encoding="utf-8")).items()}
        return self.data.attributes

    @cached_property
    def _codec(self) -> Frozen | None:
        """From the run's assets, unless the recipe names another by now; then whoever holds the weights refuses it."""
        config = self.config
        if config.sequence == "samples":
            return None
        kept = self._assets / "codec" if self._assets else None
        if kept is not None and (kept / frozen.CARD).is_file():
            loaded = load_codec(str(kept), config.codec_sha256)
            if loaded.origin == config.codec or loaded.origin == str(Path(config.codec).expanduser()):
                return self._checked(loaded)
        return self._checked(load_codec(config.codec, config.codec_sha256))

    def _checked(self, loaded: Frozen) -> Frozen:
        assert isinstance(loaded.module, Codec)
        if loaded.module.config.rate != self.data.rate:
            raise ValueError(
                f"codec = {self.config.codec!r} is for {loaded.module.config.rate} Hz; the recordings have "
                f"{self.data.rate} Hz"
            )
        return loaded

    @property
    def codec(self) -> Codec | None:
        module = self._codec.module if self._codec else None
        assert module is None or isinstance(module, Codec)
        return module

    @cached_property
    def _classifier(self) -> Frozen | None:
        samples = self.config.samples
        return load_classifier(samples.classifier) if samples.count else None

    @cached_property
    def pattern(self) -> Pattern:
        assert self.codec is not None
        return PATTERNS[self.config.pattern](self.codec.config.stages)

    @cached_property
    def frames(self) -> int:
        """Frames of a row of codes."""
        assert self.codec is not None
        return -(-round(self.config.seconds * self.data.rate) // self.codec.config.hop)

    @property
    def row(self) -> int:
        """Samples of a row, where each recording has its own."""
        return self.frames * self.codec.config.hop if self.codec else round(self.config.seconds * self.data.rate)

    def model_config(self, config: ModelConfig) -> ModelConfig:
        head: dict[str, Any] = {"classes": [len(self.attributes[name]) for name in self.config.condition]}
        wanted = "audio_samples" if self.codec is None else "audio_codes"
        if config.head is None or config.head.name != wanted:
            raise ValueError(f"task.sequence = {self.config.sequence!r} needs model.head.name = {wanted}")
        if self.codec is not None:
            head |= {"streams": self.codec.config.stages, "levels": self.codec.levels, "pattern": self.config.pattern}
        return configs.build(ModelConfig, config, {"head": head})

    def save_assets(self, folder: Path) -> None:
        import json

        (folder / "attributes.json").write_text(json.dumps(self.attributes), encoding="utf-8")
        if self._codec is not None:
            frozen.save(self._codec, folder / "codec")

    def frozen(self) -> dict[str, str]:
        return {"codec": self._codec.sha256} if self._codec else {}

    def provenance(self) -> dict[str, Any]:
        codec = {"codec": self._codec.card()} if self._codec else {}
        judge = {"classifier": self._classifier.card()} if self._classifier else {}
        return {**self.data.provenance(), **codec, **judge}

    # -- data ----------------------------------------------------------------------------------------------------------

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        recordings, place = self.data.load(split), {"batch_size": batch_size, "rank": rank, "world": world}
        if self.codec is None and not self.config.condition:
            if split == "train":
                return packed_stream(recordings, self.config.context, seed=seed, **place)
            return whole_stream(recordings, **place)
        columns = [list(self.attributes).index(name) for name in self.config.condition]
        views = self._rows(split, recordings)
        return row_stream(split, views, recordings.labels[:, columns], self._collate, seed=seed, **place)

    def _rows(self, split: str, recordings: Recordings) -> list[np.ndarray]:
        """Views of a split: levels (N, T), or codes (N, F, K)."""
        if split not in self._views:
            codec = self.codec
            if codec is None:
                self._views[split] = [to_levels(np.stack([fit(sound, self.row) for sound in recordings.sounds]))]
            else:
                codec.to("cuda" if torch.cuda.is_available() else "cpu")
                count = self.config.views if split == "train" else 1
                later = [view * codec.config.hop // count for view in range(count)]
                self._views[split] = [
                    encode_all(codec, np.stack([fit(sound, self.row, before) for sound in recordings.sounds]))
                    for before in later
                ]
        return self._views[split]

    def _collate(self, items: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        rows, labels = (torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*items, strict=True))
        targets = rows if self.codec is None else self.pattern.scatter(rows, self._empty)
        condition = labels if self.config.condition else None
        return Batch(shifted(targets, self._empty), scored(targets, self._empty), condition=condition)

    @property
    def _empty(self) -> int:
        """The token before the first element; of codes also where a stream has none."""
        return START if self.codec is None else self.codec.levels

    # -- prompts and sounds --------------------------------------------------------------------------------------------

    def prompt(self, obj: Any) -> Batch:
        """AudioPrompts, sounds (T,) int16 to go on from, or None; all of a list with equally much given."""
        several = list(obj) if isinstance(obj, (list, tuple)) else [obj]
        if not several:
            raise ValueError("a prompt is an AudioPrompt, a sound or None, or a list of these; the list is empty")
        asked = [one if isinstance(one, AudioPrompt) else AudioPrompt(given=one) for one in several]
        rows = [self._beginning(one.given) for one in asked]
        if len({len(row) for row in rows}) > 1:
            raise ValueError("the given sounds of a batch have different lengths; give as much of each")
        laid = torch.stack(rows)
        inputs = torch.cat((torch.full_like(laid[:, :1], self._empty), laid[:, 1:]), dim=1)
        condition = None
        if self.config.condition or any(one.labels for one in asked):
            condition = torch.stack([self._labels(one.labels) for one in asked])
        return Batch(inputs, condition=condition)

    def _beginning(self, given: np.ndarray | None) -> Tensor:
        """One empty step, and the steps (n, …) of what is given."""
        if self.codec is None:
            levels = np.zeros(0, np.uint8) if given is None else to_levels(given)
            return torch.from_numpy(np.concatenate(([START], levels)).astype(np.int64))
        empty = torch.full((1, 1, self.pattern.streams), self._empty)
        frames = 0 if given is None else len(given) // self.codec.config.hop
        if given is None or not frames:
            return empty[0]
        codes = torch.from_numpy(encode_all(self.codec, given[None, : frames * self.codec.config.hop]))
        # Streams that lag behind have not come to the last frames yet: those steps are drawn anew
        laid = self.pattern.scatter(codes, self._empty)[:, : (frames - 1) * self.pattern.stride + 1]
        return torch.cat((empty, laid), dim=1)[0]

    def _labels(self, labels: dict[str, str | int]) -> Tensor:
        """(A,), of an attribute left out the number that stands for none."""
        for name in labels:
            if name not in self.config.condition:
                known = nearest(name, self.config.condition) or "; it was trained without any (task.condition = [])"
                raise ValueError(f"this model knows no label {name!r}{known}")
        found = []
        for name in self.config.condition:
            values = self.attributes[name]
            value = labels.get(name)
            if value is None:
                found.append(len(values))
            elif isinstance(value, int) and 0 <= value < len(values):
                found.append(value)
            elif str(value) in values:
                found.append(values.index(str(value)))
            else:
                raise ValueError(f"{name} {value!r} is unknown{nearest(str(value), values)}")
        return torch.tensor(found)

    def length(self, prompt: Batch) -> int:
        return max(1, self.elements(self.config.seconds) + 1 - prompt.inputs.shape[1])

    def elements(self, seconds: float) -> int:
        if seconds <= 0:
            raise ValueError(f"seconds = {seconds}; it takes a number above 0")
        samples = max(1, round(seconds * self.data.rate))
        return samples if self.codec is None else self.pattern.steps(-(-samples // self.codec.config.hop))

    def artefacts(self, prompt: Batch, drawn: Tensor) -> list[np.ndarray]:
        """Whole sounds (T,) int16, what was given included."""
        rows = torch.cat((prompt.inputs[:, 1:].cpu(), drawn), dim=1)
        if self.codec is None:
            return list(from_levels(rows.numpy()))
        pieces = [to_pcm(piece.numpy()) for piece in self._decoded([rows])]
        return list(np.concatenate(pieces, axis=1)) if pieces else [np.zeros(0, np.int16)] * len(rows)

    def artefact(self, inputs: Tensor) -> np.ndarray:
        """All elements of a row, without the empty step -> (T,) int16."""
        return self.artefacts(self.prompt(None), inputs.unsqueeze(0))[0]

    def pieces(self, prompt: Batch, steps: Iterator[Tensor]) -> Iterator[list[np.ndarray]]:
        """A piece (n,) int16 for each row as soon as it is known: together, sample for sample, what `artefacts`
        makes of the same steps."""
        if self.codec is not None:
            given = prompt.inputs[:, 1:].cpu()
            parts = (step.cpu() for step in steps)
            yield from (list(to_pcm(piece.numpy())) for piece in self._decoded([given], parts))
            return
        if prompt.inputs.shape[1] > 1:
            yield list(from_levels(prompt.inputs[:, 1:].cpu().numpy()))
        while block := list(islice(steps, self.data.rate // 20)):
            yield list(from_levels(torch.cat(block, dim=1).cpu().numpy()))

    @torch.no_grad()
    def _decoded(self, begun: Iterable[Tensor], steps: Iterable[Tensor] = ()) -> Iterator[Tensor]:
        """Steps (B, n, K), first those `begun` and then more -> sound (B, frames * hop), some frames at a time."""
        assert self.codec is not None
        from itertools import chain

        codec, pattern = self.codec, self.pattern
        device = next(codec.parameters()).device

        def frames() -> Iterator[Tensor]:
            """Codes (B, FRAMES_AT_ONCE, K), and what is left in the end."""
            held: Tensor | None = None  # steps from the first code of the next frame on
            for part in chain(begun, steps):
                held = part if held is None else torch.cat((held, part), dim=1)
                while pattern.complete(held.shape[1]) >= FRAMES_AT_ONCE:
                    yield pattern.gather(held[:, : pattern.steps(FRAMES_AT_ONCE)])
                    held = held[:, FRAMES_AT_ONCE * pattern.stride :]
            if held is not None and pattern.complete(held.shape[1]):
                yield pattern.gather(held)

        yield from (sound.cpu() for sound in codec.decode_in_pieces(codes.to(device) for codes in frames()))

    def ask(self, request: Request) -> list[AudioPrompt]:
        request.only(self.domain, "label", "count", "given")
        count = 1 if request.count is None else request.count
        if count < 1:
            raise ValueError(f"--count {count}; it takes 1 or more")
        given = None
        if request.given is not None:
            from tasks.audio.folder import read_sound

            given = read_sound(request.given, self.data.rate)
        labels = {} if request.label is None else self._named(request.label)
        return [AudioPrompt(labels, given)] * count

    def _named(self, words: str) -> dict[str, str | int]:
        """'7', '7,theo' or 'speaker=theo': values of the condition's attributes, each by its name or the first that
        knows it."""
        labels: dict[str, str | int] = {}
        for word in filter(None, (word.strip() for word in words.split(","))):
            name, equals, value = (part.strip() for part in word.partition("="))
            if not equals:
                value = name
                knowing = [each for each in self.config.condition if value in self.attributes[each]]
                name = next((each for each in knowing if each not in labels), "")
                if not name:
                    known = [known for each in self.config.condition for known in self.attributes[each]]
                    none = "; this model was trained without labels (task.condition = [])"
                    raise ValueError(f"class {value!r} is unknown{nearest(value, known) or none}")
            labels[name] = value
        self._labels(labels)
        return labels

    def write(self, artefacts: list[np.ndarray], path: Path) -> None:
        """A wav file, or several with numbers in their names."""
        for number, sound in enumerate(artefacts, 1):
            name = path if len(artefacts) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            write_wav(name, sound, self.data.rate)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def metrics(self, split: str) -> dict[str, Metric]:
        codec = self.codec
        rate = 0.0 if codec is None else self.data.rate / codec.config.hop * codec.config.stages
        metrics: dict[str, Metric] = {"likelihood": Likelihood(rate)}
        if split == "test" and self.config.samples.count:
            assert self._classifier is not None
            classifier: Any = self._classifier.module
            assert isinstance(classifier, Classifier)
            parts = self.data.load("train"), self.data.load("test")
            rebuild = None if codec is None else self._rebuilt
            metrics["samples"] = Speech(
                self.config.samples,
                self._make,
                rebuild,
                classifier,
                self.attributes,
                self.config.condition,
                parts,
                self.data.rate,
            )
        return metrics

    def _make(self, model: Model, labels: Tensor, seed: int) -> list[np.ndarray]:
        names = self.config.condition
        asked = [AudioPrompt(dict(zip(names, row, strict=True))) for row in labels.tolist()]
        given = self.prompt(asked)
        sampling = self.config.samples.sampling()
        drawn = generate(model, given, max_new=self.length(given), sampling=sampling, seed=seed)
        return self.artefacts(given, drawn.cpu())

    def _rebuilt(self, sounds: list[np.ndarray]) -> list[np.ndarray]:
        assert self.codec is not None
        return list(decode_all(self.codec, encode_all(self.codec, np.stack([fit(x, self.row) for x in sounds]))))

    def describe(self, split: str) -> str:
        given = f", given {' and '.join(self.config.condition)}" if self.config.condition else ""
        samples = self.config.samples
        made = f"; {samples.count} sounds, temperature {samples.temperature}, guidance {samples.guidance}"
        if self.codec is None:
            length = f"filled up with silence to {self.config.seconds:g} s" if given else "whole"
            what = f"every sample of every recording, {length}, 8-bit mu-law"
        else:
            what = f"every code of {self.config.seconds:g} s from each recording's start, {self.config.pattern} pattern"
        return what + given + (made if samples.count else "")

    def baselines(self, split: str) -> dict[str, float]:
        if self.codec is not None or self.config.condition:
            return {}
        parts = self.data.load("train"), self.data.load(split)
        return {"order0_bits_per_sample": order0_bits(*parts), "order1_bits_per_sample": order1_bits(*parts)}

    def show(self, model: nn.Module) -> Media:
        """Sounds, labels in turn, and their spectrograms below each other."""
        assert isinstance(model, Model)
        from tasks.audio.metrics import in_turn

        sizes = [len(self.attributes[name]) for name in self.config.condition]
        labels = in_turn(sizes, self.config.shown).tolist()
        given = self.prompt([AudioPrompt(dict(zip(self.config.condition, row, strict=True))) for row in labels])
        count = self.elements(self.config.shown_seconds)
        drawn = generate(model, given, max_new=count, sampling=self.config.samples.sampling(), seed=0)
        media, sounds = Media(), self.artefacts(given, drawn.cpu())
        for number, sound in enumerate(sounds):
            media.audio[f"sample_{number}"] = (
                torch.from_numpy(sound.astype(np.float32) / LEVELS / 128),
                self.data.rate,
            )
        media.images["samples"] = below_each_other([picture(sound, self.data.rate) for sound in sounds])
        return media
