"""Two ways to model a piano roll, which are two protocols of scoring it.

NotesHead  joint over a frame's notes: its keys one after another, lowest first, then the end of the frame. A key
           that is not above the last one has no probability, so a frame is one sequence only, and the token losses of a
           frame add up to -log p of the set of its notes, exactly normalised
KeysHead   keys independent given the past: one token a frame, 88 Bernoulli variables, as in arXiv 1803.01271
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.audio.scores import KEYS
from zoo.data import IGNORED
from zoo.generation import Sampling, sample_logits
from zoo.layers import init_normal
from zoo.model import Batch, Context, Head, Output
from zoo.ops import may_look
from zoo.state import State

END = KEYS  # of a frame
START, GOES_ON = KEYS + 1, KEYS + 2  # before the first frame of a piece, or of a part from its middle
VOICES = 16  # notes of a frame that are told apart by their number


@dataclass
class MusicHeadConfig:
    """metre    frames after which the beat repeats, as far as the model is told: an embedding of the frame's number
             within it; 0: none
    dropout  on what enters the backbone
    """

    metre: int = 16
    dropout: float = 0.0

    def __post_init__(self):
        if self.metre < 0:
            raise ValueError(f"metre = {self.metre}; it takes 0 (none) or more frames")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}; it takes a number from 0 up to, not including, 1")


class NotesHead(Head):
    """Inputs (B, T) int64: START, then keys 0 to 87 and END."""

    Config = MusicHeadConfig

    def __init__(self, config: MusicHeadConfig, width: int):
        super().__init__()
        self.config = config
        # Held under the name that its weights have everywhere, head.embed.weight, which is also that of a method.
        nn.Module.__setattr__(self, "embed", nn.Embedding(GOES_ON + 1, width))
        self.pitch_class = nn.Embedding(13, width)  # 12 of octaves' notes, one for no note
        self.voice = nn.Embedding(VOICES, width)
        self.beat = nn.Embedding(config.metre, width) if config.metre else None
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, KEYS + 1)
        parts: list[nn.Module | None] = [self._modules["embed"], self.pitch_class, self.voice, self.beat, self.out]
        init_normal(parts, 0.02)

    def check(self, inputs: Tensor) -> None:
        if may_look(inputs) and inputs.numel() and not (int(inputs.min()) >= 0 and int(inputs.max()) <= GOES_ON):
            raise ValueError(
                f"tokens of music are 0 to {GOES_ON}; these reach {int(inputs.min())} to {int(inputs.max())}"
            )

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """last (B,) the newest token; frame (B,) its number; voice (B,) notes of it so far."""
        if condition is not None:
            raise ValueError("models of music take no labels")
        zero = torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device)
        return {"last": zero + START, "frame": zero, "voice": zero}

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        known: Any = self.init_state(inputs) if state is None else state
        embedding = self._modules["embed"]
        assert embedding is not None
        frame, voice = self._places(inputs, known)
        octaves = torch.where(inputs < KEYS, inputs % 12, 12)
        h = embedding(inputs) + self.pitch_class(octaves) + self.voice(voice.clamp(max=VOICES - 1))
        if self.beat is not None:
            h = h + self.beat(frame % self.config.metre)
        if state is not None:
            newest = {"last": inputs, "frame": frame, "voice": voice}
            state = {name: newest_of(each, known[name], ctx.lengths) for name, each in newest.items()}
        return self.drop(h), state

    @staticmethod
    def _places(inputs: Tensor, known: Any) -> tuple[Tensor, Tensor]:
        """After each token: the number of the frame that goes on or begins, and how many notes of it there are."""
        place = torch.arange(inputs.shape[1], device=inputs.device)
        ended, begun = (inputs == END).cumsum(dim=1), inputs >= START
        before = torch.where(begun, ended, -known["frame"].unsqueeze(1)).cummax(dim=1).values
        border = torch.where(begun | (inputs == END), place, -1 - known["voice"].unsqueeze(1)).cummax(dim=1).values
        return ended - before, place - border

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Nats, summed; counted in frames. `first`: the part of pieces' first frames, counted in pieces."""
        logits = self._possible(self.out(h).float(), batch.inputs)
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(
            batch.targets.shape
        )
        frame, _ = self._places(batch.inputs, self.init_state(batch.inputs))
        first = torch.where(frame == 0, nats.detach(), 0).sum()
        return Output(nats.sum(), (batch.targets == END).sum(), {"first": (first, (batch.inputs >= START).sum())})

    def logits(self, h_last: Tensor, state: Any) -> Tensor:
        """(B, C) -> (B, 89)."""
        return self._possible(self.out(h_last).float(), state["last"])

    @staticmethod
    def _possible(logits: Tensor, last: Tensor) -> Tensor:
        """Keys above the last one, or the end of the frame."""
        above = torch.arange(KEYS + 1, device=last.device) > torch.where(last < KEYS, last, -1).unsqueeze(-1)
        return torch.where(above, logits, -torch.inf)

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        return sample_logits(params, sampling, generator).unsqueeze(1), state

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.out.weight.numel()


class KeysHead(Head):
    """Inputs (B, T, 90) of 0 and 1: the keys of a frame, and two marks for the start of a piece or of a part."""

    Config = MusicHeadConfig

    def __init__(self, config: MusicHeadConfig, width: int):
        super().__init__()
        self.config = config
        nn.Module.__setattr__(self, "embed", nn.Linear(KEYS + 2, width, bias=False))
        self.beat = nn.Embedding(config.metre, width) if config.metre else None
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, KEYS)
        nn.init.normal_(self._modules["embed"].weight, std=0.2)  # type: ignore[union-attr,arg-type]  # few inputs, of size 1
        init_normal((self.beat, self.out), 0.02)
        nn.init.constant_(self.out.bias, -3.0)  # of 88 keys about four sound

    def check(self, inputs: Tensor) -> None:
        if inputs.dim() != 3 or inputs.shape[2] != KEYS + 2:
            raise ValueError(f"inputs of shape {tuple(inputs.shape)}; frames are (B, T, {KEYS + 2})")

    def init_state(self, inputs: Tensor, condition: Any = None, lengths: Tensor | None = None) -> State:
        """frame (B,) how many there were."""
        if condition is not None:
            raise ValueError("models of music take no labels")
        return {"frame": torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device)}

    def embed(self, inputs: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        known: Any = self.init_state(inputs) if state is None else state
        projection = self._modules["embed"]
        assert projection is not None
        h = projection(inputs.to(self.out.weight.dtype))
        frame = self._frames(inputs, known)
        if self.beat is not None:
            h = h + self.beat(frame % self.config.metre)
        if state is not None:
            state = {"frame": newest_of(frame, known["frame"] - 1, ctx.lengths) + 1}
        return self.drop(h), state

    @staticmethod
    def _frames(inputs: Tensor, known: Any) -> Tensor:
        """(B, T): the number of the frame that comes after each."""
        place = torch.arange(inputs.shape[1], device=inputs.device)
        begun = (inputs[..., KEYS:] > 0).any(dim=-1)
        return place - torch.where(begun, place, -known["frame"].unsqueeze(1)).cummax(dim=1).values

    def loss(self, h: Tensor, batch: Batch) -> Output:
        """Nats, summed over keys and frames; counted in frames. `first`: of pieces' first frames, counted in pieces."""
        real = (batch.targets != IGNORED).all(dim=-1)
        wanted = batch.targets.clamp(min=0).float()
        nats = F.binary_cross_entropy_with_logits(self.out(h).float(), wanted, reduction="none").sum(dim=-1)
        nats = torch.where(real, nats, 0)
        begun = (batch.inputs[..., KEYS:] > 0).any(dim=-1)
        return Output(nats.sum(), real.sum(), {"first": (torch.where(begun, nats.detach(), 0).sum(), begun.sum())})

    def logits(self, h_last: Tensor, state: Any) -> Tensor:
        """(B, C) -> (B, 88), of each key alone."""
        return self.out(h_last).float()

    def sample(self, params: Tensor, state: Any, sampling: Sampling, generator: Any) -> tuple[Tensor, Any]:
        if sampling.temperature == 0:
            keys = params > 0
        else:
            chance = torch.empty_like(params).uniform_(generator=generator)
            keys = chance < (params / sampling.temperature).sigmoid()
        return F.pad(keys.to(torch.uint8), (0, 2)).unsqueeze(1), state

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.out.weight.numel() + self._modules["embed"].weight.numel())  # type: ignore[union-attr,operator]


def newest_of(values: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """Of (B, T) each row's last, of its first `lengths` (B,); `before` (B,) where a row has none."""
    if lengths is None:
        return values[:, -1]
    last = values.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))[:, 0]
    return torch.where(lengths > 0, last, before)
