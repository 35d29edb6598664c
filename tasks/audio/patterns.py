"""Where the codes of K parallel streams stand in a sequence: parallel, delayed, or one after another.

    step of stream k in frame f  =  f * stride + offset[k]

parallel  stride 1, offsets 0: a frame's codes are drawn at once, as if they did not depend on each other
delay     stride 1, offsets 0, 1, 2, …: each is drawn knowing the streams before it (MusicGen, arXiv 2306.05284)
flat      stride K, offsets 0, 1, 2, …: one code a step, exact, K times as long

A layout is invertible: `scatter` puts codes into steps, `gather` takes them out again, whatever was in between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """stride of frames, and the offset of each stream, in steps. Offsets begin with 0 and do not fall: the streams of a
    residual quantiser explain what those before them left over."""

    stride: int
    offsets: tuple[int, ...]

    def __post_init__(self):
        if self.stride < 1:
            raise ValueError(f"stride = {self.stride}; a pattern takes 1 or more")
        if not self.offsets or self.offsets[0] != 0:
            raise ValueError(f"offsets = {self.offsets}; a pattern's begin with 0")
        if any(later < earlier for earlier, later in zip(self.offsets, self.offsets[1:], strict=False)):
            raise ValueError(f"offsets = {self.offsets}; a stream may not come before the one that it refines")

    @property
    def streams(self) -> int:
        return len(self.offsets)

    @property
    def delay(self) -> int:
        """Steps from a frame's first code to its last."""
        return self.offsets[-1]

    def steps(self, frames: int) -> int:
        """The length of a sequence with all codes of so many frames."""
        return (frames - 1) * self.stride + self.delay + 1 if frames else 0

    def complete(self, steps: int) -> int:
        """How many frames are whole after so many steps."""
        return max(0, (steps - 1 - self.delay) // self.stride + 1) if steps else 0

    def active(self, step: Tensor) -> Tensor:
        """Steps (…) int64 -> (…, K) bool, which streams have a code there, in an endless sequence."""
        since = torch.stack([step - offset for offset in self.offsets], dim=-1)
        return (since >= 0) & (since % self.stride == 0)

    def scatter(self, codes: Tensor, empty: int, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, F, K) -> (B, steps(F), K), with `empty` where no code stands: between streams, and beyond the
        first `lengths` (B,) frames of a row."""
        self._check(codes)
        frames = torch.arange(codes.shape[1], device=codes.device)
        if lengths is not None:
            codes = torch.where((frames < lengths.unsqueeze(1)).unsqueeze(-1), codes, empty)
        laid = codes.new_full((len(codes), self.steps(codes.shape[1]), self.streams), empty)
        for stream, offset in enumerate(self.offsets):
            laid[:, frames * self.stride + offset, stream] = codes[:, :, stream]
        return laid

    def gather(self, laid: Tensor) -> Tensor:
        """(B, S, K) -> the codes (B, complete(S), K) of the frames that are whole."""
        self._check(laid)
        frames = torch.arange(self.complete(laid.shape[1]), device=laid.device)
        parts = [laid[:, frames * self.stride + offset, stream] for stream, offset in enumerate(self.offsets)]
        return torch.stack(parts, dim=-1)

    def _check(self, codes: Tensor) -> None:
        if codes.dim() != 3 or codes.shape[2] != self.streams:
            raise ValueError(f"codes of shape {tuple(codes.shape)}; this pattern takes (B, T, {self.streams})")


def parallel(streams: int) -> Pattern:
    return Pattern(1, (0,) * streams)


def delay(streams: int) -> Pattern:
    return Pattern(1, tuple(range(streams)))


def flat(streams: int) -> Pattern:
    return Pattern(streams, tuple(range(streams)))


PATTERNS = {"parallel": parallel, "delay": delay, "flat": flat}
