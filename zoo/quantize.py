"""Vector quantisation: the nearest of K code vectors, learned as running means of what is mapped to them.

van den Oord et al. (arXiv 1711.00937), with their appendix A.1's moving averages instead of a codebook loss:

    code(z) = argmin_k |z - e_k|^2            y = z + stop_gradient(e_code(z) - z)
    p_k <- g p_k + (1 - g) n_k / N            e_k <- (g p_k e_k + (1 - g) s_k / N) / p_k   with the new p_k
    loss = commitment |z - stop_gradient(e_code(z))|^2

over the N vectors of a batch, n_k of them with code k and sum s_k; gradients pass straight through to z. A code that is
hardly used any more starts again at a vector of the batch (Jukebox, arXiv 2005.00341, section 3), drawn in proportion
to its squared error, as k-means++ draws; at the beginning all codes do, at vectors drawn evenly. `ResidualQuantizer`
stacks quantisers, each on what those before it left over (arXiv 2107.03312).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class QuantizerConfig:
    """codes       K, the number of code vectors
    dim         width of the code vectors; vectors of another width are projected to it and back. 0: that of the vectors
    unit        vectors and codes are scaled to length 1 (ViT-VQGAN, arXiv 2110.04627): nearest by angle
    decay       g, of the moving averages, for each training batch
    restart     a code starts again when its share of the vectors falls below this part of 1 / K; 0: never, after the
                first batch
    commitment  weight of the commitment loss, against a sum of squared errors of other kinds
    """

    codes: int = 512
    dim: int = 0
    unit: bool = False
    decay: float = 0.99
    restart: float = 0.03
    commitment: float = 0.25

    def __post_init__(self):
        accepted = {
            "codes": (self.codes >= 2, "2 or more"),
            "dim": (self.dim >= 0, "0 (no projection) or more"),
            "decay": (0 < self.decay < 1, "a number between 0 and 1"),
            "restart": (0 <= self.restart < 1, "a number from 0 up to, not including, 1"),
            "commitment": (self.commitment >= 0, "0 or more"),
        }
        for name, (fine, takes) in accepted.items():
            if not fine:
                raise ValueError(f"quantizer.{name} = {getattr(self, name)}; it takes {takes}")


@dataclass
class Quantized:
    """vectors     (…, C) what the codes stand for, with the gradient of the input
    codes       (…) int64; of a ResidualQuantizer (…, stages)
    commitment  () float32, the weighted commitment loss: the mean over a vector's components, summed over vectors
    count       () int64, the vectors that it is summed over
    """

    vectors: Tensor
    codes: Tensor
    commitment: Tensor
    count: Tensor

    @property
    def commitment_mean(self) -> Tensor:
        return self.commitment / self.count.clamp(min=1)


class VectorQuantizer(nn.Module):
    """(…, C) -> Quantized. The codebook is a pair of buffers and learns in training mode alone, in the forward pass.

    With several ranks all of them learn the one codebook: sums cross between them. Vectors that are not finite, and
    those that `mask` (…) leaves out, teach nothing. No step waits for the device.
    """

    codebook: Tensor  # (K, D)
    share: Tensor  # (K,) p_k; 0 for a code that waits for its first vector

    def __init__(self, config: QuantizerConfig, width: int):
        super().__init__()
        self.config, self.width = config, width
        dim = config.dim or width
        projected = dim != width
        self.down = nn.Linear(width, dim) if projected else nn.Identity()
        self.up = nn.Linear(dim, width) if projected else nn.Identity()
        self.register_buffer("codebook", torch.randn(config.codes, dim))
        self.register_buffer("share", torch.zeros(config.codes))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 distances would mistake one code for another
            x = self._scaled(self.down(z.float()))
            flat = x.detach().flatten(0, -2)
            counted = flat.isfinite().all(dim=-1)
            if mask is not None:
                counted = counted & mask.flatten()
            if self.training:
                self._restart(flat, counted)
            codes = self._nearest(flat)
            quantised = F.embedding(codes, self.codebook).view(x.shape)
            apart = F.mse_loss(x, quantised, reduction="none").mean(dim=-1).flatten()
            commitment = self.config.commitment * torch.where(counted, apart, 0).sum()
            if self.training:
                self._learn(flat, codes, counted)
            vectors = self.up(x + (quantised - x).detach())
        return Quantized(vectors.to(z.dtype), codes.view(z.shape[:-1]), commitment, counted.sum())

    def encode(self, z: Tensor) -> Tensor:
        """(…, C) -> codes (…) int64; the codebook stays as it is."""
        with torch.autocast(z.device.type, enabled=False):
            return self._nearest(self._scaled(self.down(z.float())).flatten(0, -2)).view(z.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (…) -> vectors (…, C) float32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.up(F.embedding(codes, self.codebook))

    # -- assignment and learning ---------------------------------------------------------------------------------------

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.unit else x

    def _nearest(self, flat: Tensor) -> Tensor:
        """(N, D) -> (N,): |x|^2 is the same for every code, so it is left out."""
        return (self.codebook.square().sum(dim=1) - 2 * flat @ self.codebook.T).argmin(dim=1)

    @torch.no_grad()
    def _restart(self, flat: Tensor, counted: Tensor) -> None:
        """Put codes that are hardly used, and at first all of them, on vectors of the batch drawn with replacement."""
        apart = torch.where(counted, (flat - F.embedding(self._nearest(flat), self.codebook)).square().sum(dim=1), 0)
        even = (self.share.sum() == 0) | (apart.sum() == 0)
        place = _drawn(torch.where(even, counted.to(apart.dtype), apart), self.config.codes)
        fresh = torch.where(counted.any(), flat[place], torch.nan)
        if _ranks() > 1:
            dist.broadcast(fresh, 0)
        dead = (self.share <= self.config.restart / self.config.codes) & fresh.isfinite().all()
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        self.share.copy_(torch.where(dead, 1 / self.config.codes, self.share))

    @torch.no_grad()
    def _learn(self, flat: Tensor, codes: Tensor, counted: Tensor) -> None:
        one = counted.to(flat.dtype)
        number = self.share.new_zeros(self.config.codes).index_add_(0, codes, one)
        total = torch.zeros_like(self.codebook).index_add_(0, codes, torch.where(counted[:, None], flat, 0))
        if _ranks() > 1:
            both = torch.cat((number[:, None], total), dim=1)
            dist.all_reduce(both)
            number, total = both[:, 0], both[:, 1:]
        seen = number.sum()
        decay = self.config.decay
        fresh = (1 - decay) / seen.clamp(min=1)
        share = decay * self.share + fresh * number
        mean = (decay * self.share[:, None] * self.codebook + fresh * total) / share.clamp(min=1e-12)[:, None]
        self.codebook.copy_(torch.where(seen > 0, self._scaled(mean), self.codebook))
        self.share.copy_(torch.where(seen > 0, share, self.share))


class ResidualQuantizer(nn.Module):
    """(…, C) -> Quantized with codes (…, stages): stage i quantises what the stages before it left over.

    dropout  in training, for this share of the rows (dim 0), a random number of first stages is used, so that any
             number of them can be decoded (quantiser dropout; arXiv 2107.03312, section III.C). Codes left out: -1.
    Vectors are projected once, before the first stage and after the last, and the gradient passes straight through all
    stages together.
    """

    def __init__(self, config: QuantizerConfig, width: int, *, stages: int, dropout: float = 0.0):
        super().__init__()
        if stages < 1:
            raise ValueError(f"stages = {stages}; a residual quantizer takes 1 or more")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout = {dropout}; it takes a share of the rows, from 0 to 1")
        if config.unit:
            raise ValueError("quantizer.unit = True: what a stage leaves over has no fixed length; it takes False here")
        dim = config.dim or width
        self.dropout = dropout
        self.down = nn.Linear(width, dim) if dim != width else nn.Identity()
        self.up = nn.Linear(dim, width) if dim != width else nn.Identity()
        self.stages = nn.ModuleList(VectorQuantizer(config, dim) for _ in range(stages))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        used = self._stages_used(z)  # (rows,)
        with torch.autocast(z.device.type, enabled=False):
            x = self.down(z.float())
            left, codes = x, []
            commitment, count = x.new_zeros(()), used.new_zeros(())
            for number, stage in enumerate(self.stages):
                in_use = (used > number).view(-1, *(1,) * (z.dim() - 2)).expand(z.shape[:-1])
                taken: Quantized = stage(left, in_use if mask is None else in_use & mask)
                left = left - torch.where(in_use.unsqueeze(-1), taken.vectors, 0).detach()
                codes.append(torch.where(in_use, taken.codes, -1))
                commitment, count = commitment + taken.commitment, count + taken.count
            vectors = self.up(x - left.detach())  # what is left over is no function of the input: straight through
        return Quantized(vectors.to(z.dtype), torch.stack(codes, dim=-1), commitment, count)

    def encode(self, z: Tensor, stages: int | None = None) -> Tensor:
        """(…, C) -> codes (…, stages) int64, of the first `stages`."""
        with torch.autocast(z.device.type, enabled=False):
            left, codes = self.down(z.float()), []
            for stage in self._first(stages):
                codes.append(stage.encode(left))
                left = left - stage.decode(codes[-1])
        return torch.stack(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (…, n) of the first n stages, -1 for one left out -> vectors (…, C) float32."""
        parts = []
        for stage, part in zip(self._first(codes.shape[-1]), codes.unbind(-1), strict=True):
            parts.append(torch.where((part >= 0).unsqueeze(-1), stage.decode(part.clamp(min=0)), 0))
        with torch.autocast(codes.device.type, enabled=False):
            return self.up(torch.stack(parts).sum(dim=0))

    def _first(self, count: int | None) -> list[VectorQuantizer]:
        have = len(self.stages)
        if count is not None and not 1 <= count <= have:
            raise ValueError(f"{count} stages of codes; this quantizer takes 1 to {have}")
        return list(self.stages)[:count]  # type: ignore[return-value]

    def _stages_used(self, z: Tensor) -> Tensor:
        rows, stages = z.shape[0], len(self.stages)
        every = torch.full((rows,), stages, device=z.device)
        if not (self.training and self.dropout):
            return every
        drawn = torch.randint(1, stages + 1, (rows,), device=z.device)
        return torch.where(torch.rand(rows, device=z.device) < self.dropout, drawn, every)


def code_use(counts: Tensor) -> dict[str, float]:
    """Of how often each code was used (K,): the share of codes used at all, and the perplexity, exp of their entropy:
    K if all are used alike."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return {"usage": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def _drawn(weight: Tensor, count: int) -> Tensor:
    """`count` places of `weight` (N,) >= 0, each drawn in proportion to it: (count,) int64; where all are 0, any place.
    `multinomial` would wait for the device."""
    upto = weight.double().cumsum(dim=0)
    aim = torch.rand(count, device=weight.device, dtype=torch.float64) * upto[-1]
    return torch.searchsorted(upto, aim, right=True).clamp(max=len(weight) - 1)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
