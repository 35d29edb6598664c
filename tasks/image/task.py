"""The image task: pictures as rows of sub-pixels or of a tokenizer's codes, and back."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tasks.image.classifier import load_classifier
from tasks.image.data import Images
from tasks.image.grid import as_media, make_grid, write_png
from tasks.image.metrics import Likelihood, SampleConfig, Samples, order0_bits
from tasks.image.orders import ORDERS, rows_given
from tasks.image.stream import Augment, image_source, pixel_views
from tasks.image.tokenizer import Tokenizer, TokenizerConfig, decode_all, encode_all, load_tokenizer
from zoo import config as configs
from zoo import frozen, recording
from zoo.config import Choice
from zoo.data import SourceStream
from zoo.frozen import Frozen
from zoo.generation import generate
from zoo.model import Batch, Model, ModelConfig
from zoo.registry import datasets, nearest
from zoo.task import Media, Metric, Request, Task


@dataclass
class ImagePrompt:
    """What to draw: of class `label` (None: of any, without a class), beginning with the rows `given` (h, W, C) uint8.

    given  the upper rows; with codes, as many as whole rows of codes stand for
    """

    label: int | None = None
    given: np.ndarray | None = None


class ImageTask(Task):
    domain = "image"
    endings = (".png",)

    @dataclass
    class Config:
        """sequence     sub-pixels themselves, with an exact likelihood, or codes of a tokenizer
        tokenizer    of codes: a run folder or weights of an image_tokenizer
        tokenizer_sha256  refuse any other
        token        what the backbone runs over: sub-pixels or codes one by one (element), or whole pixels (pixel),
                     with the head image_pixels: as exact a likelihood, at a third of the work for colour images
        order        of the elements: raster, planar, columns, snake, spiral, hilbert, shuffled
        conditional  on the class
        augment      of training images; flips only where left and right are alike
        samples      drawn when the test split is evaluated
        grid         images in TensorBoard's grid
        """

        dataset: Choice | None = configs.choice(datasets, "image/mnist")
        sequence: Literal["pixels", "codes"] = "pixels"
        tokenizer: str = ""
        tokenizer_sha256: str = ""
        token: Literal["element", "pixel"] = "element"
        order: str = "raster"
        conditional: bool = False
        augment: Augment = field(default_factory=Augment)
        samples: SampleConfig = field(default_factory=SampleConfig)
        grid: int = 16

        def __post_init__(self):
            if self.order not in ORDERS:
                raise ValueError(f"order = {self.order!r}{nearest(self.order, ORDERS)}")
            if self.sequence == "codes" and not self.tokenizer:
                raise ValueError(
                    "sequence = 'codes' needs tokenizer, a run folder of the task image_tokenizer or a name of weights"
                )
            if self.sequence == "pixels" and self.tokenizer:
                raise ValueError(f"tokenizer = {self.tokenizer!r} has no use with sequence = 'pixels'")
            if self.sequence == "codes" and self.augment.shift:
                raise ValueError(f"augment.shift = {self.augment.shift}: codes are made once, so it takes 0 with them")
            if self.token == "pixel" and (self.sequence == "codes" or self.conditional or self.order == "planar"):
                raise ValueError(
                    "token = 'pixel' takes sequence = 'pixels', conditional = false and an order of whole pixels; got "
                    f"{self.sequence!r}, {self.conditional} and {self.order!r}"
                )
            if self.grid < 1:
                raise ValueError(f"grid = {self.grid}; it takes 1 or more")

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        self.data = datasets.get(config.dataset.name)(config.dataset.config)
        self._assets = assets
        self._codes: dict[str, list[np.ndarray]] = {}

    @cached_property
    def _tokenizer(self) -> Frozen | None:
        """From the run's assets, unless the recipe names another by now; then whoever holds the weights refuses it."""
        config = self.config
        if config.sequence == "pixels":
            return None
        kept = self._assets / "tokenizer" if self._assets else None
        if kept is not None and (kept / frozen.CARD).is_file():
            loaded = load_tokenizer(str(kept), config.tokenizer_sha256)
            if loaded.origin == config.tokenizer or loaded.origin == str(Path(config.tokenizer).expanduser()):
                return self._checked(loaded)
        return self._checked(load_tokenizer(config.tokenizer, config.tokenizer_sha256))

    def _checked(self, loaded: Frozen) -> Frozen:
        height, width, channels = self.data.shape
        made = loaded.module.config
        assert isinstance(made, TokenizerConfig)
        if made.channels != channels or height % made.factor or width % made.factor:
            raise ValueError(
                f"tokenizer = {self.config.tokenizer!r} takes {made.channels} channels and sides that are multiples of "
                f"{made.factor}; the images are {height} x {width} with {channels}"
            )
        return loaded

    @property
    def tokenizer(self) -> Tokenizer | None:
        module = self._tokenizer.module if self._tokenizer else None
        assert module is None or isinstance(module, Tokenizer)
        return module

    @cached_property
    def _classifier(self) -> Frozen | None:
        return load_classifier(self.config.samples.classifier)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of the elements: sub-pixels, or codes."""
        if self.tokenizer is None:
            return self.data.shape
        factor = self.tokenizer.config.factor
        return self.data.shape[0] // factor, self.data.shape[1] // factor, 1

    @property
    def levels(self) -> int:
        return 256 if self.tokenizer is None else self.tokenizer.codes

    @property
    def _grouped(self) -> bool:
        """Whether a token is a whole pixel."""
        return self.config.token == "pixel"

    @cached_property
    def _places(self) -> tuple[int, int, int]:
        """Rows, columns and channels of what has a place of its own in the sequence."""
        return (*self.shape[:2], 1) if self._grouped else self.shape

    @cached_property
    def _order(self) -> np.ndarray:
        return ORDERS[self.config.order](*self._places)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """Read from the run's assets where the data set is a folder that may be gone."""
        names = self._assets / "classes.txt" if self._assets else None
        if names is not None and names.is_file():
            return tuple(names.read_text(encoding="utf-8").splitlines())
        return self.data.classes

    def model_config(self, config: ModelConfig) -> ModelConfig:
        height, width, channels = self.shape
        head: dict[str, Any] = {"height": height, "width": width, "channels": channels, "levels": self.levels}
        head |= {"order": self.config.order}
        wanted, other = ("image_pixels", "image") if self._grouped else ("image", "image_pixels")
        if config.head is not None and config.head.name == other:  # a head of one's own knows what it takes
            raise configs.ConfigError(
                f"task.token = {self.config.token!r} takes model.head.name = {wanted!r}; got {other!r}"
            )
        if not self._grouped:
            head["classes"] = len(self._classes) if self.config.conditional else 0
        layers: list[Any] = [config, {"head": head}]
        if config.backbone.positions == "learned":
            layers.append({"backbone": {"max_len": len(self._order)}})
        return configs.build(ModelConfig, *layers)

    def save_assets(self, folder: Path) -> None:
        (folder / "classes.txt").write_text("\n".join(self._classes), encoding="utf-8")
        if self._tokenizer is not None:
            frozen.save(self._tokenizer, folder / "tokenizer")

    def frozen(self) -> dict[str, str]:
        return {"tokenizer": self._tokenizer.sha256} if self._tokenizer else {}

    def provenance(self) -> dict[str, Any]:
        tokenizer = {"tokenizer": self._tokenizer.card()} if self._tokenizer else {}
        judge = {"classifier": self._classifier.card()} if self._classifier else {}
        return {**self.data.provenance(), **tokenizer, **judge}

    # -- data ----------------------------------------------------------------------------------------------------------

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        images, augment = self.data.load(split), self.config.augment
        views = self._views(split, images)
        source = image_source(split, views, images.labels, self._collate, seed=seed, shift=augment.shift)
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=split == "train")

    def _views(self, split: str, images: Images) -> list[np.ndarray]:
        views = pixel_views(images.pixels, self.config.augment if split == "train" else Augment())
        if self.tokenizer is None:
            return views
        if split not in self._codes:
            tokenizer = self.tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
            self._codes[split] = [encode_all(tokenizer, view)[..., None] for view in views]
        return self._codes[split]

    def _collate(self, items: list[tuple[np.ndarray, int]]) -> Batch:
        elements, labels = zip(*items, strict=True)
        targets = self._rows(np.stack(elements))
        return Batch(
            self._shifted(targets), targets, condition=torch.tensor(labels) if self.config.conditional else None
        )

    def _rows(self, elements: np.ndarray) -> Tensor:
        """(B, h, w, c) -> (B, T) int64 in the order of the sequence; of whole pixels (B, T, c)."""
        each = (elements.shape[-1],) if self._grouped else ()
        return torch.from_numpy(elements.reshape(len(elements), -1, *each)[:, self._order].astype(np.int64))

    def _shifted(self, targets: Tensor) -> Tensor:
        """The start token, then all but the last element."""
        return torch.cat((torch.full_like(targets[:, :1], self.levels), targets[:, :-1]), dim=1)

    # -- prompts and pictures ------------------------------------------------------------------------------------------

    def prompt(self, obj: int | ImagePrompt | None | list[Any]) -> Batch:
        """Classes, or ImagePrompts with the upper rows of a picture, all of the same height -> the tokens that begin
        each row, and the classes."""
        several = list(obj) if isinstance(obj, (list, tuple)) else [obj]
        if not several:
            raise ValueError("a prompt is a class, None or an ImagePrompt, or a list of these; the list is empty")
        asked = [one if isinstance(one, ImagePrompt) else ImagePrompt(one) for one in several]
        labels = [self._label(one.label) for one in asked]
        rows = [self._beginning(one.given) for one in asked]
        if len({len(row) for row in rows}) > 1:
            raise ValueError("the given pictures of a batch have different heights; give as many rows of each")
        given = torch.stack(rows)
        inputs = torch.cat((torch.full((len(rows), 1, *given.shape[2:]), self.levels), given), dim=1)
        return Batch(inputs, condition=torch.tensor(labels) if self.config.conditional else None)

    def _label(self, label: int | None) -> int:
        """Of None the class that stands for none."""
        count = len(self._classes)
        if label is None:
            return count
        if not self.config.conditional:
            raise ValueError(f"class {label}: this model was trained without classes (task.conditional = false)")
        if not isinstance(label, int) or not 0 <= label < count:
            listed = ", ".join(f"{number} {name}" for number, name in enumerate(self._classes[:20]))
            raise ValueError(f"class {label!r} is none of the {count} classes (0 to {count - 1}): {listed}")
        return label

    def _beginning(self, given: np.ndarray | None) -> Tensor:
        """The elements (n,) of the given upper rows, or their pixels (n, C)."""
        if given is None:
            return torch.zeros(0, *((self.shape[2],) if self._grouped else ()), dtype=torch.int64)
        height, width, channels = self.data.shape
        if given.ndim != 3 or given.shape[1:] != (width, channels) or not 0 < len(given) < height:
            raise ValueError(
                f"the given rows have shape {given.shape}; they take (h, {width}, {channels}), h from 1 to {height - 1}"
            )
        tokenizer = self.tokenizer
        if tokenizer is not None and len(given) % tokenizer.config.factor:
            raise ValueError(f"{len(given)} given rows: the tokenizer takes multiples of {tokenizer.config.factor}")
        rows = len(given) // (tokenizer.config.factor if tokenizer else 1)
        count = rows_given(self._order, *self._places, rows)
        if count is None:
            raise ValueError(
                f"a model with order {self.config.order!r} cannot complete a given upper part: its rows do not come "
                "first; raster and snake can"
            )
        whole = np.zeros(self.data.shape, dtype=np.uint8)
        whole[: len(given)] = given
        # Codes near the edge of what is given depend on what is below: black there, so the last row is a guess
        elements = whole if tokenizer is None else encode_all(tokenizer, whole[None])[0][..., None]
        return self._rows(elements[None])[0, :count]

    def length(self, prompt: Batch) -> int:
        return len(self._order) + 1 - prompt.inputs.shape[1]

    def artefacts(self, prompt: Batch, drawn: Tensor) -> list[np.ndarray]:
        """Whole pictures (H, W, C) uint8. Raises ValueError where elements are missing."""
        rows = torch.cat((prompt.inputs[:, 1:].cpu(), drawn), dim=1).numpy()
        if rows.shape[1] != len(self._order):
            raise ValueError(f"{rows.shape[1]} of {len(self._order)} elements make no picture: leave out max_new")
        elements = np.empty_like(rows)
        elements[:, self._order] = rows
        elements = elements.reshape(-1, *self.shape)
        if self.tokenizer is None:
            return list(elements.astype(np.uint8))
        return list(decode_all(self.tokenizer, elements[..., 0]))

    def artefact(self, inputs: Tensor) -> np.ndarray:
        """All elements (T,) of a row, or its pixels (T, C) -> a picture (H, W, C) uint8."""
        return self.artefacts(self.prompt(None), inputs.unsqueeze(0))[0]

    def ask(self, request: Request) -> list[ImagePrompt]:
        request.only(self.domain, "label", "count", "given")
        label = None if request.label is None else self._named_class(request.label)
        given = None
        if request.given is not None:
            from tasks.image.folder import fit_picture, open_picture

            height, _, channels = self.data.shape
            picture = fit_picture(open_picture(request.given), height, channels, convert=True, enlarge=True)
            given = picture[: height // 2]
        count = 16 if request.count is None else request.count
        if count < 1:
            raise ValueError(f"--count {count}; it takes 1 or more")
        if label is None and self.config.conditional:  # the classes in turn
            return [ImagePrompt(number % len(self._classes), given) for number in range(count)]
        return [ImagePrompt(label, given)] * count

    def _named_class(self, label: str) -> int:
        if label in self._classes and not label.isdigit():
            return self._classes.index(label)
        try:
            return self._label(int(label))
        except ValueError as error:
            if label.lstrip("-").isdigit():
                raise
            raise ValueError(f"class {label!r} is unknown{nearest(label, self._classes)}") from error

    def write(self, artefacts: list[np.ndarray], path: Path) -> None:
        """A grid of all pictures as PNG, small ones magnified."""
        write_png(make_grid(np.stack(artefacts)), path, zoom=max(1, 96 // self.data.shape[0]))

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def metrics(self, split: str) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"likelihood": Likelihood(self.config.sequence == "pixels")}
        if split == "test" and self.config.samples.count:
            classifier: Any = self._classifier.module if self._classifier else None
            classes = len(self._classes) if self.config.conditional else 0
            parts = self.data.load("train"), self.data.load("test")
            metrics["samples"] = Samples(self.config.samples, self._draw, classes, classifier, *parts)
        return metrics

    def describe(self, split: str) -> str:
        what = "every sub-pixel" if self.config.sequence == "pixels" else "every code"
        given = ", given the class" if self.config.conditional else ""
        samples = self.config.samples
        drawn = f"; {samples.count} samples, temperature {samples.temperature}, guidance {samples.guidance}"
        return f"{what} of every image once, {self.config.order} order{given}" + (drawn if samples.count else "")

    def baselines(self, split: str) -> dict[str, float]:
        if self.config.sequence == "codes":
            return {}
        return {"order0_bits_per_dim": order0_bits(self.data.load("train"), self.data.load(split))}

    def _draw(self, model: Model, labels: Tensor | None, count: int, seed: int) -> np.ndarray:
        """(count, H, W, C) uint8."""
        prompts = [None] * count if labels is None else labels.tolist()
        given = self.prompt(prompts)
        graph = next(model.parameters()).device.type in recording.DEVICES
        drawn = generate(
            model, given, max_new=self.length(given), sampling=self.config.samples.sampling(), seed=seed, graph=graph
        )
        return np.stack(self.artefacts(given, drawn.cpu()))

    def media(self, model: nn.Module, batch: Batch) -> Media:
        """A grid of samples, classes in turn, and one of validation images completed from their upper half."""
        assert isinstance(model, Model)
        sampling, images = self.config.samples.sampling(), {"samples": self._grid(model)}
        shown = min(8, len(batch.targets))
        known = rows_given(self._order, *self._places, self.shape[0] // 2)
        if known:
            condition = batch.condition[:shown].cpu() if batch.condition is not None else None
            given = Batch(batch.inputs[:shown, : known + 1].cpu(), condition=condition)
            drawn = generate(model, given, max_new=self.length(given), sampling=sampling, seed=0)
            real = self.artefacts(Batch(batch.inputs[:shown, :1].cpu()), batch.targets[:shown].cpu())
            images["completions"] = make_grid(np.stack(real + self.artefacts(given, drawn.cpu())), columns=shown)
        return Media(images={name: as_media(grid) for name, grid in images.items()})

    def show(self, model: nn.Module) -> Media:
        """A grid of samples, classes in turn."""
        assert isinstance(model, Model)
        return Media(images={"samples": as_media(self._grid(model))})

    def _grid(self, model: Model) -> np.ndarray:
        count = self.config.grid
        labels = torch.arange(count) % len(self._classes) if self.config.conditional else None
        return make_grid(self._draw(model, labels, count, 0))
