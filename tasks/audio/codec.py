"""A neural codec: a causal convolutional autoencoder around a residual vector quantiser (SoundStream, arXiv 2107.03312;
EnCodec, arXiv 2210.13438).

    sound (B, T) -> encoder, one vector a frame of `hop` samples -> K codes a frame -> decoder -> sound (B, T)

Everything is causal: frame f of the codes looks at samples before (f + 1) hop, and its samples need codes up to f, so
sound can be decoded frame by frame with a state of fixed size. Losses are in the time domain and on mel spectrograms of
several scales; there is no adversary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tasks.audio.spectra import LOSS_SCALES, mel_distance
from zoo.model import Batch, Output
from zoo.quantize import QuantizerConfig, ResidualQuantizer
from zoo.state import State


@dataclass
class CodecConfig:
    """rate       Hz of the sounds
    strides    each divides the rate; a frame is their product, in samples
    width      channels at the rate of the sound; each stride doubles them, up to `widest`
    dilations  of the residual units between two strides
    stages     codes a frame, each refining those before
    dropout    of stages in training, so that the first few are worth something alone (quantiser dropout)
    quantizer  of one stage
    time, mel  weights of the losses: the absolute error over the sound's root mean square, and the distance of log mels
    """

    rate: int = 8000
    strides: tuple[int, ...] = (2, 4, 4, 4)
    width: int = 32
    widest: int = 256
    dilations: tuple[int, ...] = (1, 3, 9)
    stages: int = 6
    dropout: float = 0.25
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(codes=256, dim=32))
    time: float = 0.2
    mel: float = 1.0

    def __post_init__(self):
        for name in ("rate", "width", "widest", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes 1 or more")
        for name in ("strides", "dilations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes one number or more, each 1 or more")
        if min(self.time, self.mel) < 0:
            raise ValueError(f"time = {self.time}, mel = {self.mel}; weights of losses take 0 or more")

    @property
    def hop(self) -> int:
        return math.prod(self.strides)

    @property
    def bits_per_second(self) -> float:
        """Of codes stored at log2 of their number."""
        return self.rate / self.hop * self.stages * math.log2(self.quantizer.codes)

    def build(self) -> "Codec":
        return Codec(self)


# ---------------------------------------------------------------------------------------------------------------------
# Causal layers: (B, C, T) -> (B, C', T'), and `tail`, the inputs before that the next call still needs; None: silence


class CausalConv(nn.Conv1d):
    """Output t sees inputs up to (t + 1) stride - 1."""

    def __init__(self, inner: int, outer: int, kernel: int, *, stride: int = 1, dilation: int = 1):
        super().__init__(inner, outer, kernel, stride=stride, dilation=dilation)
        self.past = (kernel - 1) * dilation - (stride - 1)

    def start(self, rows: int) -> Tensor:
        return self.weight.new_zeros(rows, self.in_channels, self.past)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = torch.cat((self.start(len(x)).to(x.dtype) if tail is None else tail, x), dim=2)
        return super().forward(x), x[:, :, x.shape[2] - self.past :]


class Rise(nn.Module):
    """Each step becomes `stride` steps, which see it and the one before."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv(inner, outer * stride, 2)

    def start(self, rows: int) -> Tensor:
        return self.conv.start(rows)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, tail = self.conv(nn.functional.elu(x), tail)
        y = y.unflatten(1, (-1, self.stride)).transpose(2, 3).flatten(2)
        return y, tail


class Fall(nn.Module):
    """`stride` steps become one."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv = CausalConv(inner, outer, 2 * stride, stride=stride)

    def start(self, rows: int) -> Tensor:
        return self.conv.start(rows)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.conv(nn.functional.elu(x), tail)


class Unit(nn.Module):
    """x + a dilated convolution and a mixing of channels."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.conv = CausalConv(width, width // 2, 3, dilation=dilation)
        self.mix = nn.Conv1d(width // 2, width, 1)

    def start(self, rows: int) -> Tensor:
        return self.conv.start(rows)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, tail = self.conv(nn.functional.elu(x), tail)
        return x + self.mix(nn.functional.elu(y)), tail


class Chain(nn.ModuleList):
    """Causal layers one after another; the state is the list of their tails."""

    def start(self, rows: int) -> State:
        return [layer.start(rows) for layer in self]  # type: ignore[operator]

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        tails: list[State] = []
        for number, layer in enumerate(self):
            x, tail = layer(x, None if state is None else state[number])  # type: ignore[index]
            tails.append(tail)
        return x, tails


def encoder(config: CodecConfig, widths: list[int]) -> Chain:
    layers: list[nn.Module] = [CausalConv(1, widths[0], 7)]
    for stride, inner, outer in zip(config.strides, widths, widths[1:], strict=False):
        layers += [Unit(inner, dilation) for dilation in config.dilations] + [Fall(inner, outer, stride)]
    return Chain(layers)


def decoder(config: CodecConfig, widths: list[int]) -> Chain:
    layers: list[nn.Module] = [CausalConv(widths[-1], widths[-1], 7)]
    for stride, outer, inner in zip(reversed(config.strides), widths[-2::-1], widths[:0:-1], strict=True):
        layers += [Rise(inner, outer, stride)] + [Unit(outer, dilation) for dilation in config.dilations]
    return Chain([*layers, CausalConv(widths[0], 1, 7)])


# ---------------------------------------------------------------------------------------------------------------------


class Codec(nn.Module):
    """Sounds (B, T) float32 amplitudes in Batch.inputs, T a multiple of `hop`."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        widths = [min(config.widest, config.width << level) for level in range(len(config.strides) + 1)]
        self.encoder = encoder(config, widths)
        # A fresh encoder says nearly the same of every frame: spread out, or all codes become one
        self.spread = nn.BatchNorm1d(widths[-1], affine=False)
        self.quantizer = ResidualQuantizer(config.quantizer, widths[-1], stages=config.stages, dropout=config.dropout)
        self.decoder = decoder(config, widths)

    @property
    def levels(self) -> int:
        return self.config.quantizer.codes

    def forward(self, batch: Batch) -> Output:
        """The sum over sounds of the weighted losses, and of the commitment over the number of codes that a sound has:
        with quantiser dropout some have none, and it adds up to less."""
        sound = self._checked(batch.inputs)
        quantised = self.quantizer(self._encoded(sound))
        made = self._decoded(quantised.vectors)
        size = sound.square().mean(dim=1).sqrt() + 1e-2
        time = ((made - sound).abs().mean(dim=1) / size).sum()
        mel = mel_distance(made, sound, self.config.rate, LOSS_SCALES).sum()
        count = torch.full((), len(sound), device=sound.device)
        codes = sound.shape[1] // self.config.hop * self.config.stages
        loss = self.config.time * time + self.config.mel * mel + quantised.commitment / codes
        metrics = {
            "time": (time.detach(), count),
            "mel": (mel.detach(), count),
            "commitment": (quantised.commitment.detach(), quantised.count),
        }
        return Output(loss, count, metrics)

    def encode(self, sound: Tensor, stages: int | None = None) -> Tensor:
        """(B, T) amplitudes -> codes (B, T / hop, stages) int64."""
        return self.quantizer.encode(self._encoded(self._checked(sound)), stages)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, F, n) of the first n stages -> (B, F * hop) amplitudes, in float32 whatever the precision around:
        a bfloat16 has eight bits, a sample sixteen."""
        with torch.autocast(codes.device.type, enabled=False):
            return self._decoded(self.quantizer.decode(codes))

    def decode_on(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        """The same for the next frames of a sound, after `start_decoding`."""
        with torch.autocast(codes.device.type, enabled=False):
            sound, state = self.decoder(self.quantizer.decode(codes).movedim(-1, 1), state)
        return sound[:, 0].float(), state

    def start_decoding(self, rows: int) -> State:
        return self.decoder.start(rows)

    def decode_in_pieces(self, pieces: Iterable[Tensor]) -> Iterable[Tensor]:
        """Codes (B, f, n), the next frames each time -> (B, f * hop) amplitudes."""
        state: State | None = None
        for codes in pieces:
            sound, state = self.decode_on(codes, self.start_decoding(len(codes)) if state is None else state)
            yield sound

    def _encoded(self, sound: Tensor) -> Tensor:
        with torch.autocast(sound.device.type, enabled=False):
            return self.spread(self.encoder(sound.unsqueeze(1).float())[0]).movedim(1, -1)

    def _decoded(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.movedim(-1, 1))[0][:, 0].float()

    def _checked(self, sound: Tensor) -> Tensor:
        if sound.dim() != 2 or sound.shape[1] % self.config.hop:
            raise ValueError(
                f"sounds of shape {tuple(sound.shape)}: this codec takes (B, T), T a multiple of {self.config.hop}"
            )
        return sound
