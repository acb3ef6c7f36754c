"""What a linear will cost before it is quantized: its error and its bits at any step, from one factorization."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_babai.format import BIT_WIDTHS
from vllm_babai.offline.scales.tiles import TileCosts, row_energies, tile_costs
from vllm_babai.offline.solver.expected import carried_variance
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.solve import paths_gain

# Weights of a linear that are drawn to count what overflows and codes. A share of 1% of them is known to 8%
# (√(0.01 / 16384) ≈ 0.0008). A choice: four times as many take four times as long and halve that.
SAMPLE = 1 << 14
# Steps at which a linear is forecast, as octaves against the root mean square of its weights. Entropies run from 0.1
# bit, below any plan's lowest rate, to 11 bits, above 8 dense bits; between two of them rates are interpolated.
OCTAVES = torch.arange(-9.0, 3.01, 0.125)
# Prices of an overflow entry at which a linear is forecast, against the squared error of one step at a mean pivot.
# Price 1 stores what is one step or more beyond the range. They are spaced by a factor of 4, as the best share of
# overflow is flat in the price; a choice that was not measured.
PRICES = 4.0 ** torch.arange(-1, 8)


@dataclass(frozen=True)
class OverflowTable:
    """What overflows at one width of dense integers, for all steps and prices, with steps by row.

    shares: share of weights that overflow. kept: error that keeping the others within the range adds, over that of
    rounding to the nearest integer. Both float32 [OCTAVES, PRICES]: step by price of an entry.
    """

    shares: Tensor
    kept: Tensor

    @classmethod
    def measure(cls, inner: Tensor, importance: Tensor, bits: int) -> "OverflowTable":
        """Count a sample of targets over their step, float32 [OCTAVES, sample].

        importance: how much the sample's errors count, mean 1. The range is taken as symmetric, as scales may have
        either sign.
        """
        beyond = inner.abs() - (2 ** (bits - 1) - 0.5)
        further = beyond.round().clamp_min_(0)
        saved = further * (2 * beyond - further) * importance
        octaves, sample = saved.shape
        bins = len(PRICES) + 1  # one below every price and one above the last
        bin_of = torch.bucketize(saved, PRICES.to(saved)) + bins * torch.arange(octaves, device=saved.device)[:, None]

        def below(values: Tensor | None) -> Tensor:
            """Number of targets that save less than each price, or the sum of their values, [OCTAVES, PRICES]."""
            histogram = torch.bincount(bin_of.flatten(), values, bins * octaves).view(octaves, bins)
            return histogram.cumsum(1)[:, :-1].cpu().float()

        return cls(1 - below(None) / sample, 12 * below(saved.flatten()) / sample)


@dataclass(frozen=True)
class Forecast:
    """One linear, small enough to keep for a whole model.

    pivot: mean of D_j D_i over the weights, times the gain of several paths: a step s costs ½ s²/12 · weights · pivot
    nats per token. With column steps also times what these gain at the same rate.
    spread: root mean square of the weights.
    rates: HPTQ's bits per weight with one step of 2^OCTAVES · spread.
    row_pivot: like pivot, for rows whose steps are in proportion to their own root mean square.
    overflow: dense bits → what overflows with such steps.
    tiles: what the tiles of a trellis cost.
    """

    name: str
    rows: int
    columns: int
    pivot: float
    spread: float
    rates: list[float]
    row_pivot: float
    overflow: dict[int, OverflowTable]
    tiles: TileCosts

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def rate(self, step: float) -> float:
        """HPTQ's bits per weight at a step."""
        position = (math.log2(step / self.spread) - float(OCTAVES[0])) / float(OCTAVES[1] - OCTAVES[0])
        below = min(max(int(position), 0), len(self.rates) - 2)
        fraction = min(max(position - below, 0.0), 1.0)
        return self.rates[below] * (1 - fraction) + self.rates[below + 1] * fraction

    def loss(self, step: float) -> float:
        """Loss, nats per token, that nearest plane's error is expected to cost with one step."""
        return self.weights * self.pivot * step**2 / 24

    def row_losses(self) -> Tensor:
        """The same with a step per row and everything rounded to the nearest integer, for all OCTAVES."""
        return self.weights * self.row_pivot * (self.spread * 2.0**OCTAVES) ** 2 / 24


def forecast(name: str, weight: Tensor, lattice: Lattice, seed: int, by_columns: float = 1.0) -> Forecast:
    """Forecast a linear; weight: [out, in].

    Its integers are modelled as Gaussian, like HPTQ codes them: their variance is a row's times a column's plus what
    nearest plane carries. What overflows is counted on a sample of the weights. by_columns: HPTQ's error with column
    steps, over that with one step.
    """
    factor, weight = lattice.columns, weight.float()
    squares = weight.square()
    rows, columns = squares.mean(1), squares.mean(0)
    mean = squares.mean().clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(len(rows), (SAMPLE,), generator=generator).to(rows.device)
    position = torch.randint(len(columns), (SAMPLE,), generator=generator).to(rows.device)
    column = factor.order[position]
    carried = carried_variance(factor, seed).squeeze(1)[position]
    octaves = OCTAVES.to(mean.device)[:, None]
    variance = rows[row] * columns[column] / mean
    rates = _interpolate_entropy((variance / mean / 4.0**octaves + carried).sqrt()).mean(1)

    row_pivots = lattice.row_pivots(len(weight)).to(rows.device)
    column_pivot = paths_gain(lattice) * factor.pivots.mean()
    pivot = by_columns * float(column_pivot * row_pivots.mean())
    row_pivot = float(column_pivot * (row_pivots * rows).mean() / mean)
    targets = weight[row, column] / rows[row].clamp_min(1e-30).sqrt()
    noise = torch.randn(SAMPLE, generator=generator).to(targets) * carried.sqrt()
    importance = (factor.pivots[position] / factor.pivots.mean() * row_pivots[row] * rows[row]).float()
    inner, importance = targets / 2.0**octaves + noise, importance / importance.mean()
    overflow = {bits: OverflowTable.measure(inner, importance, bits) for bits in BIT_WIDTHS}
    tiles, spread = tile_costs(row_energies(weight.T[factor.order], lattice, seed)), float(mean.sqrt())
    return Forecast(name, len(rows), len(columns), pivot, spread, rates.tolist(), row_pivot, overflow, tiles)


def _interpolate_entropy(deviation: Tensor) -> Tensor:
    """Entropy in bits of a rounded Gaussian with this standard deviation in steps."""
    octaves, entropies = _entropy_table()
    position = (torch.log2(deviation.cpu().clamp(2.0**-8, 2.0**16)) - octaves[0]) / (octaves[1] - octaves[0])
    below = position.long().clamp(0, len(octaves) - 2)
    fraction = (position - below).clamp(0, 1)
    return torch.lerp(entropies[below], entropies[below + 1], fraction)


@cache
def _entropy_table() -> tuple[Tensor, Tensor]:
    """Octaves of the standard deviation, and entropies there: exact up to 16 steps, of a continuous Gaussian beyond."""
    octaves = torch.arange(-8, 16.01, 1 / 16, dtype=torch.float64)
    deviations = 2.0**octaves
    entropies = torch.log2(deviations * math.sqrt(2 * math.pi * math.e))
    fine = deviations < 16
    edges = torch.arange(-128, 128, dtype=torch.float64) - 0.5
    below = torch.special.ndtr(edges / deviations[fine, None])
    shares = below.diff(dim=1)
    entropies[fine] = -torch.special.xlogy(shares, shares).sum(1) / math.log(2)
    return octaves.float(), entropies.float()
