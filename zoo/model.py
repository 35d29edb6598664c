"""Model = backbone + head, one class for every domain; and what domains and trainer exchange: Batch and Output.

A head is the domain's parameters on both ends of the backbone: it embeds inputs, scores hidden states against targets,
and turns the last hidden state into the distribution of the next element and a sample of it.
"""

import fnmatch
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo import config as configs
from zoo import registry
from zoo.backbone import Backbone, BackboneConfig
from zoo.config import Choice
from zoo.mixers.base import Context
from zoo.registry import heads
from zoo.state import State

__all__ = ["Batch", "Context", "Head", "Model", "ModelConfig", "Output", "create_model", "heads", "list_models"]


@dataclass
class Batch:
    """What a stream yields and a model takes.

    inputs     the head's own form, batch first; tokens (B, T) int64 for text
    targets    aligned with the hidden states: already shifted; -100 is not scored
    mask       (B, T) bool, True where an element is real (series with missing values); None: all
    condition  class labels or other conditioning in the head's own form, batch first, or None
    ctx        positions, cu_seqlens, lengths
    """

    inputs: Any
    targets: Any = None
    mask: Tensor | None = None
    condition: Any = None
    ctx: Context = field(default_factory=Context)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; copies do not wait for the device."""
        return Batch(**{name: _to(getattr(self, name), device) for name in self.__dataclass_fields__})


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Context):
        return replace(value, **{name: _to(getattr(value, name), device) for name in value.__dataclass_fields__})
    if isinstance(value, dict):
        return {name: _to(part, device) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(part, device) for part in value)
    return value


@dataclass
class Output:
    """A loss as a sum and a count, never a mean: counts differ between micro-batches and ranks.

    loss_sum  () float32, nats (or the head's unit) summed over `count` scored elements
    count     () int64 or float32
    metrics   name -> (sum, count), each a () tensor
    """

    loss_sum: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The mean, for reading."""
        return self.loss_sum / self.count.clamp(min=1)


class Head(nn.Module):
    """The domain's parameters. `__init__(config: Config, width: int)`."""

    Config: ClassVar[type]
    tokenwise: ClassVar[bool] = False  # embed and loss look at each token alone: rows may be split between ranks

    def check(self, inputs: Any) -> None:
        """Raises ValueError for inputs with values that cannot be embedded, where `ops.may_look` allows to look."""

    def init_state(self, inputs: Any, condition: Any = None, lengths: Tensor | None = None) -> State:
        """What sampling must remember between steps (history, scaling, place in a pattern); {} if nothing. `lengths`
        (B,) int64 where the rows of `inputs` are padded on the right."""
        return {}

    def embed(self, inputs: Any, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """inputs -> (B, T, C)."""
        raise NotImplementedError

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Hidden states (B, T, C) against batch.targets."""
        raise NotImplementedError

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C) -> parameters of the next element's distribution, (B, V) for a softmax."""
        raise NotImplementedError

    def sample(self, params: Tensor, state: Any, sampling: Any, generator: Any) -> tuple[Any, Any]:
        """Draw the next element: (inputs of one more token for `embed`, the head's next state)."""
        raise NotImplementedError

    def coordinates(self, places: Tensor) -> Tensor:
        """Places counted along the rows (B, T) int64 -> coordinates on the rotary axes, (B, T) or (B, T, A): where the
        elements of a row stand, if that is no line."""
        return places

    def unconditional(self, state: State) -> State:
        """The state without its condition, all else the same: what classifier-free guidance compares with."""
        raise ValueError(f"{type(self).__name__} was not trained without its condition: guidance takes 1")


@dataclass
class ModelConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: Choice | None = configs.choice(heads)

    def build(self) -> "Model":
        return Model(self)


class Model(nn.Module):
    """backbone + head: parameters read `backbone.blocks.{i}.mixer.*`, `head.embed.*`, `head.out.*`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config = configs.build(ModelConfig, config)
        if config.head is None:
            raise configs.ConfigError(f"model.head needs a name; accepted: {', '.join(heads.names())}")
        self.backbone = Backbone(config.backbone)
        self.head: Head = heads.get(config.head.name)(config.head.config, config.backbone.width)

    def forward(self, batch: Batch) -> Output:
        if not isinstance(batch, Batch):
            raise TypeError(
                f"a model takes a Batch (inputs, targets, …), not {type(batch).__name__}: Batch(inputs, targets)"
            )
        if batch.ctx.halo is not None and not self.head.tokenwise:
            raise ValueError(f"rows cannot be split between ranks: {type(self.head).__name__} is not tokenwise")
        self.head.check(batch.inputs)
        h, _ = self.head.embed(batch.inputs, batch.ctx, self._given(batch))
        h, _ = self.hidden(h, batch.ctx)
        return self.head.loss(h, batch)

    def _given(self, batch: Batch) -> State | None:
        """A condition reaches the head as it does in sampling: by the state before the first element."""
        if batch.condition is None:
            return None
        return self.head.init_state(batch.inputs, batch.condition, batch.ctx.lengths)

    def hidden(self, h: Tensor, ctx: Context, cache: Any = None) -> tuple[Tensor, Any]:
        """The backbone on embedded elements, which stand where the head says."""
        elsewhere = type(self.head).coordinates is not Head.coordinates
        counted = ctx.positions is None and ctx.cu_seqlens is None
        if elsewhere and counted and self.backbone.config.positions == "rotary":
            places = torch.arange(h.shape[1], device=h.device).unsqueeze(0)
            if cache is not None:
                places = places + cache["position"].unsqueeze(1)
            ctx = replace(ctx, positions=self.head.coordinates(places))
        return self.backbone(h, ctx, cache)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one row of `tokens` tokens: the backbone on exact visible pairs, and the head if it says."""
        head = getattr(self.head, "flops", None)
        return self.backbone.flops(tokens) + (head(tokens) if head else 0)


# ---------------------------------------------------------------------------------------------------------------------


def list_models(pattern: str = "*", pretrained: bool | None = None) -> list[str]:
    """Names of model sizes matching a shell pattern, natural order. pretrained=True: only those with weights, as
    `name.tag`; False: only sizes without any."""
    from zoo.weights import tags_of

    names = registry.models.names()
    tagged = [f"{name}.{tag}" for name in names for tag in tags_of(name)]
    if pretrained is True:
        listed = tagged
    elif pretrained is False:
        listed = [name for name in names if not tags_of(name)]
    else:
        listed = names
    return [name for name in listed if fnmatch.fnmatch(name, pattern)]


def create_model(name: str, *, pretrained: bool = False, backbone_from: str = "", **overrides: Any) -> nn.Module:
    """A model by its registered name, `<domain>_<mixer>_<size>` or `<name>.<tag>` for given weights.

    overrides are nodes of the model's config: create_model("text_gatedfwa_1m", backbone={"mixer": {"window": 64}}).
    backbone_from: a run folder or published weights, of any domain, whose backbone the model begins with.
    Raises UnknownName, ConfigError; FileNotFoundError when weights are not at hand, WeightsError when they do not fit.
    """
    size, _, tag = name.partition(".")
    base = registry.models.get(size)()
    if (pretrained or tag) and backbone_from:
        raise ValueError(f"{name!r} has weights of its own: leave out backbone_from={backbone_from!r}")
    if pretrained or tag:
        from zoo.weights import load_pretrained

        return load_pretrained(size, tag or None, overrides)
    model = configs.build(type(base), base, overrides).build()
    if backbone_from:
        from zoo.frozen import start_backbone

        start_backbone(model, backbone_from)
    return model
