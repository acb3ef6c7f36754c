"""The trellis form of a linear: bits for its tiles, scales for its rows, then the search."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.trellis.blob import ZERO_SCALE, TrellisWeight, pack_symbols, row_scales, scale_exponents
from vllm_babai.format.trellis.code import FEWEST_BITS, TILE_COLUMNS, TILE_ROWS, root_mean_square
from vllm_babai.offline.scales.tiles import DISTORTION, allocate, tile_costs
from vllm_babai.offline.solver.expected import carried_variance, error
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.row_geometry import independent_rows
from vllm_babai.offline.solver.trellis import trellis_plane

# Factors that are tried on the scales with which code and targets have the same variance. The best on Gaussian numbers
# lie between 1.05 and 1.35, see `python tests/benchmarks/trellis_code.py`; the spacing of 8% was not measured.
GAINS = (0.97, 1.06, 1.15, 1.25, 1.36)


@dataclass(frozen=True)
class TrellisSolution:
    """A solved linear. residual: float32 [n, out] in the factor's order. predicted: its error, as expected."""

    weight: TrellisWeight
    residual: Tensor
    predicted: float


def search_trellis(weight: Tensor, lattice: Lattice, rate: float, seed: int) -> TrellisSolution:
    """Solve with tiles that take `rate` bits per weight, everything counted, and the scales that suit them.

    weight: float32 [n, out] in the factor's order, which must be `reverse`: the stream runs from the first column on.
    """
    columns, out = weight.shape
    carried = carried_variance(lattice.columns, seed) * 12
    power = weight.square()
    variance = power.mean(0)
    for _ in range(2):
        costs = tile_costs(variance, lattice)
        (rates,) = allocate([costs], rate)
        by_row = np.empty(len(costs.order))
        by_row[costs.order] = np.repeat(DISTORTION[rates - FEWEST_BITS] @ _share_of_columns(columns), TILE_ROWS)
        distortion = torch.from_numpy(by_row[:out]).to(weight)
        energy = power + carried * (distortion * variance)
        weights = lattice.columns.pivots.float().sqrt()[:, None]
        variance = (energy * weights).sum(0) / weights.sum()
    bits = pair_bits(rates, costs.order, (out, columns))
    best = (variance * (1 - distortion)).sqrt() / root_mean_square()
    gain = _choose_gain(weight, lattice, best, bits)
    base, exponents = scale_exponents(gain * best)
    plane = trellis_plane(weight, lattice, torch.from_numpy(row_scales(base, exponents)), bits)
    by_place = np.full(len(costs.order), ZERO_SCALE, np.uint8)
    real = costs.order < out
    by_place[real] = exponents[costs.order[real]]
    words = pack_symbols(plane.symbols, rates, costs.order)
    stored = TrellisWeight((out, columns), rates, costs.order, base, by_place, words)
    return TrellisSolution(stored, plane.residual, costs.error(rates))


def _share_of_columns(columns: int) -> np.ndarray:
    """Share of the columns that each tile has, float64 [tiles]."""
    sizes = np.full(-(-columns // TILE_COLUMNS), float(TILE_COLUMNS))
    sizes[-1] = columns - TILE_COLUMNS * (len(sizes) - 1)
    return sizes / columns


def pair_bits(rates: np.ndarray, order: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bits of every pair, uint8 [out, in / 2]."""
    out, columns = shape
    bits = np.empty((len(order), rates.shape[1] * TILE_COLUMNS // 2), np.uint8)
    bits[order] = rates.repeat(TILE_ROWS, 0).repeat(TILE_COLUMNS // 2, 1)
    return bits[:out, : columns // 2]


def _choose_gain(weight: Tensor, lattice: Lattice, scales: Tensor, bits: np.ndarray) -> float:
    """The factor of the scales with which a sample of rows, each on its own, has the least error."""
    out = weight.shape[1]
    some = torch.arange(0, out, max(1, out // 32))[:32]
    alone = Lattice(lattice.columns, independent_rows(lattice.row_pivots(out)[some]), min(lattice.paths, 16))
    own = weight[:, some].contiguous()
    errors = [
        error(trellis_plane(own, alone, gain * scales[some], bits[some.numpy()]).residual, alone) for gain in GAINS
    ]
    return GAINS[int(np.argmin(errors))]
