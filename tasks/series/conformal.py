"""Intervals that were tried: quantiles spread until they cover the validation split (split conformal prediction).

CQR (Romano et al., arXiv 1905.03222) with scores in units of the predicted spread, as CQR-m (Kivaranovic et al., arXiv
1905.10634): of a value y and a pair of quantiles l, u around the median m

    score = max((m - y) / (m - l), (y - m) / (u - m))

and the pair becomes m - f (m - l), m + f (u - m), where f is the ceil((n + 1) a)-th smallest of n scores and a what the
pair is to cover: its own f for each step and pair. Mean and median stay, and so do forecasts of data that were shifted
or stretched. New values that are exchangeable with the validation split's fall inside with probability a or a little
more. Where a series has changed since, as long ones do, that promise is void, and the factors may follow how often the
intervals held lately (Gibbs and Candès, arXiv 2106.00170; the quantile tracker of Angelopoulos et al., arXiv
2307.16895): as truths become known, for each pair and block of steps, with a rate r,

    log f <- log f + r (a - the share of these truths inside)

which brings the share inside to a in the long run, whatever the series does. The factors of a forecast know what lies
before its origin and nothing else.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.series.rolling import Forecast

NARROW = 1e-6  # the least half-width that a score is taken in, as a share of the median's size and 1


def pairs(levels: Sequence[float]) -> list[tuple[int, int]]:
    """The places of symmetric levels around a median, the outermost first; none where the levels are not like that."""
    count = len(levels)
    symmetric = all(abs(a + b - 1) < 1e-9 for a, b in zip(levels, reversed(levels), strict=True))
    return [(i, count - 1 - i) for i in range(count // 2)] if symmetric and count % 2 else []


def scores(truth: Tensor, quantiles: Tensor, levels: Sequence[float]) -> Tensor:
    """truth (R, C, H), NaN where missing, quantiles (R, C, H, Q) -> (R, C, H, P), NaN where there is no truth."""
    median = quantiles[..., len(levels) // 2]
    least = NARROW * (1 + median.abs())
    found = []
    for low, high in pairs(levels):
        below = (median - truth) / (median - quantiles[..., low]).clamp(min=least)
        above = (truth - median) / (quantiles[..., high] - median).clamp(min=least)
        found.append(torch.maximum(below, above))
    return torch.stack(found, dim=-1)


def fit(found: Tensor, levels: Sequence[float]) -> Tensor:
    """Scores (N, C, H, P) of N windows -> factors (H, P) float32; 1 at steps that no window reached."""
    rising = found.flatten(0, 1).sort(dim=0).values  # NaN last
    count = (~rising.isnan()).sum(dim=0)  # (H, P)
    share = torch.tensor([levels[high] - levels[low] for low, high in pairs(levels)], dtype=torch.float64)
    rank = ((count + 1) * share.to(count.device) - 1e-9).ceil().long().clamp(min=1)
    chosen = rising.gather(0, (torch.minimum(rank, count) - 1).clamp(min=0).unsqueeze(0))[0]
    return torch.where(count > 0, chosen, 1.0).float()


def follow(factors: Tensor, found: Tensor, levels: Sequence[float], block: int, rate: float) -> Tensor:
    """Scores (N, C, H, P) of forecasts from N origins `block` steps apart, NaN where there is no truth -> factors
    (N + 1, H, P): at each of these origins, and one block after the last; `factors` (H', P) are those at the first."""
    steps, place = found.shape[2], torch.arange(-(-found.shape[2] // block), device=found.device)
    start = extended(factors, steps).to(found.device)
    share = torch.tensor([levels[high] - levels[low] for low, high in pairs(levels)], device=found.device)
    rest = (0, 0, 0, len(place) * block - steps)
    blocks = F.pad(found, rest, value=torch.nan).unflatten(2, (-1, block))  # (N, C, K, block, P)
    moved = torch.zeros(len(place), len(share), device=found.device)
    at = [start]
    for origin in range(len(found)):
        since = origin - place  # of the forecast from there, this block is the newest that is known
        truths = blocks[since.clamp(min=0), :, place].masked_fill((since < 0).view(-1, 1, 1, 1), torch.nan)
        now = F.pad(at[-1], rest).unflatten(0, (-1, 1, block))  # (K, 1, block, P)
        inside = (truths <= now).float().masked_fill(truths.isnan(), torch.nan).nanmean((1, 2))  # (K, P)
        moved = moved + rate * (share - inside).nan_to_num(0.0)
        at.append(start * moved.exp().repeat_interleave(block, 0)[:steps])
    return torch.stack(at)


def extended(factors: Tensor, steps: int) -> Tensor:
    """Factors (…, H', P) for so many steps; those beyond H' take the last ones."""
    return factors[..., torch.arange(steps, device=factors.device).clamp(max=factors.shape[-2] - 1), :]


def spread(forecast: Forecast, factors: Tensor | None) -> Forecast:
    """The forecast with its pairs spread by factors (H', P), or each row's own (R, H', P); steps beyond H' take the
    last ones. Quantiles stay in order: a wider pair holds the narrower ones."""
    if factors is None or forecast.quantiles is None:
        return forecast
    quantiles, levels = forecast.quantiles, forecast.levels
    by_step = extended(factors, quantiles.shape[2]).to(quantiles)  # (H, P) or (R, H, P)
    if by_step.dim() == 3:
        by_step = by_step.unsqueeze(1)
    middle = len(levels) // 2
    median = quantiles[..., middle : middle + 1]
    around = by_step.new_ones(*by_step.shape[:-1], len(levels))
    for place, (low, high) in enumerate(pairs(levels)):
        around[..., low] = around[..., high] = by_step[..., place]
    moved = median + around * (quantiles - median)
    below = moved[..., :middle].flip(-1).cummin(dim=-1).values.flip(-1)
    above = moved[..., middle + 1 :].cummax(dim=-1).values
    return Forecast(forecast.mean, torch.cat((below, median, above), dim=-1), levels)
