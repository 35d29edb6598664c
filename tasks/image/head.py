"""The image head: elements of an image, one after another in a named order, with a softmax over their levels.

A row of inputs begins with the token `levels` and goes on with the elements; place t of the row predicts element t, so
a row's loss is the exact negative log-likelihood of the whole image. Everything that tells where element t lies
(embeddings of its row, column and channel, rotary coordinates, neighbours known already) is known before it is drawn.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.image.orders import ORDERS
from zoo.generation import Sampling, sample_logits
from zoo.model import Batch, Context, Head, Output
from zoo.ops import linear_cross_entropy, may_look
from zoo.registry import nearest
from zoo.state import State

# (rows up, columns to the left) of the pixels that `neighbours` looks at, where they come earlier in the order
NEARBY = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))

MOST_LEVELS = 32766  # where a state remembers inputs, the start among them, in int16


class ImageHead(Head):
    @dataclass
    class Config:
        """height, width, channels  of the array of elements: an image of sub-pixels, or a grid of codes with 1 channel.
                                 0: the task fills them in, and `levels` and `classes` too
        levels         values that an element takes: 256 for pixels, the size of a codebook
        order          in which the elements stand; raster, planar, columns, snake, spiral, hilbert, shuffled
        classes        class-conditional over so many; 0: unconditional
        class_dropout  share of the training rows whose class is hidden, for classifier-free guidance
        places         add learned embeddings of the row, column and channel that come next
        neighbours     show the values of the element's neighbours as far as they are known, through a small MLP: for
                       levels that are intensities
        dropout        on the embedded elements
        """

        height: int = 0
        width: int = 0
        channels: int = 1
        levels: int = 256
        order: str = "raster"
        classes: int = 0
        class_dropout: float = 0.1
        places: bool = True
        neighbours: bool = False
        dropout: float = 0.0

        def __post_init__(self):
            if self.order not in ORDERS:
                raise ValueError(f"order = {self.order!r}{nearest(self.order, ORDERS)}")
            for name, least in (("height", 0), ("width", 0), ("channels", 1), ("levels", 2), ("classes", 0)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} = {getattr(self, name)}; it takes {least} or more")
            if self.neighbours and self.levels > MOST_LEVELS:
                raise ValueError(f"levels = {self.levels}; with neighbours it takes {MOST_LEVELS} or fewer")
            for name in ("class_dropout", "dropout"):
                if not 0 <= getattr(self, name) < 1:
                    raise ValueError(
                        f"{name} = {getattr(self, name)}; it takes a number from 0 up to, not including, 1"
                    )

        @property
        def elements(self) -> int:
            return self.height * self.width * self.channels

    places: Tensor  # (T, 3) int64: row, column and channel of each place's element
    nearby: Tensor  # (T, K) int64: the place of each neighbour's element; -1 where none is known

    def __init__(self, config: Config, width: int):
        super().__init__()
        if config.elements < 1:
            raise ValueError(f"head.height = {config.height}, head.width = {config.width}; an image needs 1 or more")
        self.config = config
        order = ORDERS[config.order](config.height, config.width, config.channels)
        shape = (config.height, config.width, config.channels)
        places = np.stack(np.unravel_index(order, shape), axis=1)
        self.register_buffer("places", torch.from_numpy(places), persistent=False)
        # Held under the name that its weights have everywhere, head.embed.weight, which is also that of a method.
        nn.Module.__setattr__(self, "embed", nn.Embedding(config.levels + 1, width))
        self.positions = nn.ModuleList(nn.Embedding(size, width) for size in shape) if config.places else None
        self.label = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, config.levels, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
        self.near = None
        if config.neighbours:
            nearby = nearby_places(order, shape)
            self.register_buffer("nearby", torch.from_numpy(nearby), persistent=False)
            first, second = nn.Linear(2 * nearby.shape[1] + config.channels, width), nn.Linear(width, width)
            nn.init.normal_(second.weight, std=0.02)  # the first as torch has it: its inputs are few, and of size 1
            self.near = nn.Sequential(first, nn.GELU(), second)

    @property
    def start(self) -> int:
        """The token before the first element."""
        return self.config.levels

    def check(self, inputs: Tensor) -> None:
        check_values(inputs, self.config.levels, "element")

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """place (B,) how many inputs a row has seen; label (B,) its class, `classes` for none; seen (B, T) int16 its
        inputs so far, where neighbours are looked at."""
        rows, device = inputs.shape[0], inputs.device
        state: dict[str, State] = {"place": torch.zeros(rows, dtype=torch.int64, device=device)}
        if self.label is not None:
            hidden = torch.full((rows,), self.config.classes, dtype=torch.int64, device=device)
            state["label"] = hidden if condition is None else condition
        elif condition is not None:
            raise ValueError("this model is unconditional (head.classes = 0): it takes no class")
        if self.near is not None:
            state["seen"] = torch.zeros(rows, self.config.elements, dtype=torch.int16, device=device)
        return state

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """(B, T) int64, `levels` first and then elements -> (B, T, C)."""
        known: Any = self.init_state(inputs) if state is None else state
        place = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)  # (1, T) where all rows begin
        if state is not None:
            place = (known["place"].unsqueeze(1) + place).clamp(max=self.config.elements - 1)
        elif inputs.shape[1] > self.config.elements:
            raise ValueError(f"a row of {inputs.shape[1]} elements: an image here has {self.config.elements}")
        embedding = self._modules["embed"]
        assert embedding is not None
        h = embedding(inputs)
        if self.positions is not None:
            for axis, table in enumerate(self.positions):
                h = h + table(self.places[place, axis])
        if self.label is not None:
            label = known["label"]
            if self.training:
                hide = torch.rand(len(label), device=label.device) < self.config.class_dropout
                label = torch.where(hide, self.config.classes, label)
            h = h + self.label(label).unsqueeze(1)
        if self.near is not None:
            known["seen"] = known["seen"].scatter(1, place.expand_as(inputs), inputs.to(torch.int16))
            h = h + self.near(self._neighbours(known["seen"], place).to(h.dtype))
        known["place"] = known["place"] + (inputs.shape[1] if ctx.lengths is None else ctx.lengths)
        return self.drop(h), None if state is None else known

    def _neighbours(self, seen: Tensor, place: Tensor) -> Tensor:
        """Of places (B, T), or (1, T) that all rows share, (B, T, 2 K + channels) float32: each neighbour's value in
        [-1, 1], whether it is known, and the channel."""
        source = self.nearby[place]  # (B or 1, T, K)
        inputs = (source + 1).clamp(min=0).flatten(1).expand(len(seen), -1)  # an element is the next input
        values = seen.gather(1, inputs).view(-1, *source.shape[1:])
        present = (source >= 0).float()
        scaled = values.float() * (2 / (self.config.levels - 1)) - 1
        channel = self.places[place, 2, None] == torch.arange(self.config.channels, device=place.device)
        known = torch.cat((present, channel.float()), dim=-1).expand(len(seen), -1, -1)
        return torch.cat((scaled * present, known), dim=-1)

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Nats, summed over the elements."""
        return Output(*linear_cross_entropy(h, self.out.weight, batch.targets))

    def logits(self, h_last: Tensor, state: State | None) -> Tensor:
        """(B, C) -> (B, levels)."""
        return self.out(h_last)

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        return sample_logits(params, sampling, generator).unsqueeze(1), state

    def coordinates(self, places: Tensor) -> Tensor:
        """(B, T) -> (B, T, 2): row and column of the element that comes next."""
        return self.places[places.clamp(max=self.config.elements - 1), :2]

    def unconditional(self, state: Any) -> State:
        if self.label is None or not self.config.class_dropout:
            raise ValueError(
                "guidance needs a class-conditional model that has met hidden classes: head.classes and "
                f"head.class_dropout above 0; this one has {self.config.classes} and {self.config.class_dropout}"
            )
        return {**state, "label": torch.full_like(state["label"], self.config.classes)}

    def flops(self, tokens: int) -> int:
        near = 0 if self.near is None else sum(p.numel() for p in self.near.parameters() if p.ndim == 2)
        return 2 * tokens * (self.out.weight.numel() + near)


def check_values(inputs: Tensor, levels: int, noun: str) -> None:
    """Raises ValueError where inputs hold what is neither one of the levels nor the start; if one may look."""
    if not may_look(inputs) or not inputs.numel():
        return
    low, high = (int(x) for x in inputs.aminmax())
    if low < 0 or high > levels:
        raise ValueError(
            f"{noun} {low if low < 0 else high} is out of range: this model takes 0 to {levels - 1}, "
            f"and {levels} where an image begins"
        )


def nearby_places(
    order: np.ndarray, shape: tuple[int, int, int], nearby: tuple[tuple[int, int], ...] = NEARBY
) -> np.ndarray:
    """(T, K) int64: for the element at each place of `order`, the places of its neighbours, -1 where outside the image
    or not earlier. First those of the same channel, then the other channels in turn; last its own pixel's."""
    height, width, channels = shape
    count = len(order)
    place_of = np.empty(count, dtype=np.int64)
    place_of[order] = np.arange(count)
    row, column, channel = np.unravel_index(order, shape)
    found = []
    for turn in range(channels):
        for up, left in nearby if turn == 0 else (*nearby, (0, 0)):
            r, c, ch = row - up, column - left, (channel + turn) % channels
            inside = (r >= 0) & (c >= 0) & (c < width)
            index = (r.clip(0) * width + c.clip(0, width - 1)) * channels + ch
            place = place_of[index]
            found.append(np.where(inside & (place < np.arange(count)), place, -1))
    return np.stack(found, axis=1)
