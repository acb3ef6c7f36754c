"""What a linear will cost before it is quantized: its error and its bits at any step, from one factorization."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_babai.format import BIT_WIDTHS
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import carried_variance

PAIRS = 1 << 14
OCTAVES = torch.arange(-9.0, 3.01, 0.125)  # of the step, against the root mean square of the weights
PRICES = 4.0 ** torch.arange(-1, 8)  # of an overflow entry, against a target's error of one step


@dataclass(frozen=True)
class Forecast:
    """One linear, small enough to keep for a whole model. Lists run over steps of 2^OCTAVES times `spread`.

    pivot: mean of D_j D_i over the weights, less what several paths gain, so that a step s costs ½ s²/12 · weights ·
    pivot nats per token; with steps by column, less what these gain at the same rate, which a step s then stands for.
    spread: root mean square of the weights. rates: HPTQ's bits per weight, with one step.
    row_pivot: like pivot, for rows whose steps are in proportion to their own root mean square.
    overflow: with such rows, dense bits → share of weights beyond them, [OCTAVES, PRICES]. kept: dense bits → error
    that keeping the others within the range adds, over that of rounding, [OCTAVES, PRICES].
    """

    name: str
    rows: int
    columns: int
    pivot: float
    spread: float
    rates: list[float]
    row_pivot: float
    overflow: dict[int, Tensor]
    kept: dict[int, Tensor]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def rate(self, step: float) -> float:
        """HPTQ's bits per weight at a step."""
        position = (math.log2(step / self.spread) - float(OCTAVES[0])) / float(OCTAVES[1] - OCTAVES[0])
        below = min(max(int(position), 0), len(self.rates) - 2)
        share = min(max(position - below, 0.0), 1.0)
        return self.rates[below] * (1 - share) + self.rates[below + 1] * share

    def loss(self, step: float) -> float:
        """Loss, nats per token, that nearest plane's error is expected to cost with one step."""
        return self.weights * self.pivot * step**2 / 24

    def row_losses(self) -> Tensor:
        """The same with a step per row and everything rounded to the nearest integer, over 2^OCTAVES."""
        return self.weights * self.row_pivot * (self.spread * 2.0**OCTAVES) ** 2 / 24


def forecast(name: str, weight: Tensor, lattice: Lattice, seed: int, by_columns: float = 1.0) -> Forecast:
    """Forecast a linear; weight: [out, in]. Its integers are modelled as Gaussian, their variance a row's times a
    column's plus what nearest plane carries, as HPTQ codes them; what overflows is counted on a sample of the weights.
    by_columns: HPTQ's error with steps by column, over that with one step.
    """
    factor, weight = lattice.columns, weight.float()
    squares = weight.square()
    rows, columns = squares.mean(1), squares.mean(0)
    mean = squares.mean().clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(len(rows), (PAIRS,), generator=generator).to(rows.device)
    position = torch.randint(len(columns), (PAIRS,), generator=generator).to(rows.device)
    column = factor.order[position]
    carried = carried_variance(factor, seed).squeeze(1)[position]
    octaves = OCTAVES.to(mean.device)[:, None]
    own = rows[row] * columns[column] / mean
    rates = _interpolate_entropy((own / mean / 4.0**octaves + carried).sqrt()).mean(1)

    row_pivots = lattice.row_pivots(len(weight)).to(rows.device)
    column_pivot = lattice.gain * factor.pivots.mean()
    pivot = by_columns * float(column_pivot * row_pivots.mean())
    row_pivot = float(column_pivot * (row_pivots * rows).mean() / mean)
    targets = weight[row, column] / rows[row].clamp_min(1e-30).sqrt()
    noise = torch.randn(PAIRS, generator=generator).to(targets) * carried.sqrt()
    counts = (factor.pivots[position] / factor.pivots.mean() * row_pivots[row] * rows[row]).float()
    tables = {b: _overflow_tables(targets / 2.0**octaves + noise, counts / counts.mean(), b) for b in BIT_WIDTHS}
    overflow, kept = ({bits: pair[i] for bits, pair in tables.items()} for i in (0, 1))
    return Forecast(name, *_size(weight), pivot, float(mean.sqrt()), rates.tolist(), row_pivot, overflow, kept)


def _overflow_tables(inner: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Tables `overflow` and `kept` of a Forecast from a sample of targets over their step, [OCTAVES, sample].

    importance: how much the sample's errors count, 1 in the mean. The range is taken as symmetric, as scales may have
    either sign.
    """
    beyond = inner.abs_() - (2 ** (bits - 1) - 0.5)
    further = beyond.round().clamp_min_(0)
    saved = further * (2 * beyond - further) * importance
    classes = len(PRICES) + 1
    cell = torch.bucketize(saved, PRICES.to(saved)) + classes * torch.arange(len(saved), device=saved.device)[:, None]
    counts, sums = (
        torch.bincount(cell.flatten(), weights, classes * len(saved)).view(-1, classes).cumsum(1)[:, :-1].cpu().float()
        for weights in (None, saved.flatten())
    )
    return 1 - counts / inner.shape[1], 12 * sums / inner.shape[1]


def _size(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _interpolate_entropy(deviation: Tensor) -> Tensor:
    """Entropy in bits of a rounded Gaussian with this standard deviation in steps."""
    octaves, entropies = _entropy_table()
    position = (torch.log2(deviation.cpu().clamp(2.0**-8, 2.0**16)) - octaves[0]) / (octaves[1] - octaves[0])
    below = position.long().clamp(0, len(octaves) - 2)
    share = (position - below).clamp(0, 1)
    return torch.lerp(entropies[below], entropies[below + 1], share)


@cache
def _entropy_table() -> tuple[Tensor, Tensor]:
    octaves = torch.arange(-8, 16.01, 1 / 16, dtype=torch.float64)
    deviations = 2.0**octaves
    entropies = torch.log2(deviations * math.sqrt(2 * math.pi * math.e))
    fine = deviations < 16
    edges = torch.arange(-128, 128, dtype=torch.float64) - 0.5
    below = torch.special.ndtr(edges / deviations[fine, None])
    shares = below.diff(dim=1)
    entropies[fine] = -torch.special.xlogy(shares, shares).sum(1) / math.log(2)
    return octaves.float(), entropies.float()
