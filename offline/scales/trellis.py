"""The trellis form of a linear: bits for its tiles, scales for its rows, then the search."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.trellis.blob import ZERO_SCALE, TrellisWeight, pack_symbols, row_scales, scale_exponents
from vllm_babai.format.trellis.code import FEWEST_BITS, TILE_COLUMNS, TILE_ROWS, root_mean_square
from vllm_babai.offline.scales.code_error import CHOICES, code_error
from vllm_babai.offline.scales.tiles import allocate, row_energies, tile_costs
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.trellis import trellis_plane

# Octaves of a row's mean target over the mean square of its code that are tried: the best lie from −1 (10 bits) to ¼ (2
# bits) where all tiles are alike. The spacing is that of the stored scales, of which the error hardly depends.
TRIED_LEVELS = np.arange(-2.0, 1.01, 0.125)


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
    energies = row_energies(weight, lattice, seed)
    costs = tile_costs(energies)
    (rates,) = allocate([costs], rate)
    order = costs.order
    distortion = _by_row(costs.settled(rates), order, out)
    targets, by_row = energies.targets(distortion), _by_row(rates, order, out)
    scales, errors = _best_scales(targets, by_row, energies.columns)
    scales[energies.means == 0] = 0
    base, exponents = scale_exponents(torch.from_numpy(scales / root_mean_square()))
    bits = by_row.repeat(TILE_COLUMNS // 2, 1)[:, : columns // 2]
    plane = trellis_plane(weight, lattice, torch.from_numpy(row_scales(base, exponents)), bits)
    by_place = np.full(len(order), ZERO_SCALE, np.uint8)
    real = order < out
    by_place[real] = exponents[order[real]]
    stored = TrellisWeight((out, columns), rates, order, base, by_place, pack_symbols(plane.symbols, rates, order))
    return TrellisSolution(stored, plane.residual, float(energies.pivots @ errors))


def _by_row(values: np.ndarray, order: np.ndarray, out: int) -> np.ndarray:
    """Values of the blocks, [blocks, ...], by row of the linear, [out, ...]."""
    found = np.empty((len(order), *values.shape[1:]), values.dtype)
    found[order] = values.repeat(TILE_ROWS, 0)
    return found[:out]


def _best_scales(targets: np.ndarray, bits: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square of the code that suits each row, and its expected error Σ_j D_j · error; both float64 [out].

    targets: [out, tiles], variance. bits: uint8 [out, tiles], of a pair. columns: [tiles], sum of D.
    """
    means = targets @ (columns / columns.sum())
    levels = np.log2(targets / means[:, None])
    errors = np.empty((len(TRIED_LEVELS), len(targets)))
    for tried, level in enumerate(TRIED_LEVELS):
        found = np.empty_like(levels)
        for choice in np.unique(bits) - FEWEST_BITS:
            where = bits == CHOICES[choice]
            found[where] = code_error(levels[where] + level, int(choice))
        errors[tried] = means * 2.0**-level * (found @ columns)
    best = errors.argmin(0)
    return np.sqrt(means * 2.0 ** -TRIED_LEVELS[best]), errors.min(0)
