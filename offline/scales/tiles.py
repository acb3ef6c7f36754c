"""How many bits every tile of a trellis gets.

Nearest plane searches for targets of variance v with a code that errs by `code_error` of v, so a tile of rows i and
columns j costs Σ p_i D_j · error, with the pivots p of the rows and D of the columns. Bits go where the next one lowers
the sum of all tiles most. Rows are sorted by p times the mean square of their weights first, within spans, so that the
rows of a tile need alike bits.

A target is a weight and what errors decided before carry into it. With rows and columns coupled by unit upper
triangular factors U, errors e of independent targets leave a residual U⁻¹e, so a target's variance is

    v_ij = w_ij² + Σ_l (U_G⁻¹)_il² ē_l · Σ_k (U_H⁻¹)_jk² − ē_i,

where ē_i, the mean square error of row i, is the distortion of its block times the mean square of its weights.

Where neighbours have unlike pivots, paths prefer symbols that err at the small ones. Without this `down_proj` of the
reference model, whose inputs are uneven, erred by 0.57 to 0.7 of what was expected; all others were within a tenth.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.trellis.blob import SPAN, stored_bits
from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS, TILE_COLUMNS, TILE_ROWS
from vllm_babai.offline.scales.code_error import BEST_LEVELS, CHOICES, DISTORTION, code_error
from vllm_babai.offline.solver.expected import carried_variance
from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.row_geometry import equal_rows

TINY = 1e-30
# Columns over which pivots have their geometric mean. On Gaussian numbers 8 fit best (`python
# tests/benchmarks/trellis_code.py --shaping`); with 16, `down_proj` of two blocks of the reference model erred by 0.95
# and 0.96 of what was expected.
WINDOW = 16
PASSES = 3  # from errors to targets and back; a choice


@dataclass(frozen=True)
class RowEnergies:
    """A linear before its bits are known.

    squares: float64 [out, tiles], mean square of a row's weights in each tile, weighed by pivots. columns: [tiles], sum
    of the pivots D as the search feels them. pivots: [out], p. row_spread: [out], Σ_l (U_G⁻¹)_il² ē_l over ē_i.
    column_spread: [tiles], mean of Σ_k (U_H⁻¹)_jk². width: number of columns.
    """

    squares: np.ndarray
    columns: np.ndarray
    pivots: np.ndarray
    row_spread: np.ndarray
    column_spread: np.ndarray
    width: int

    @property
    def means(self) -> np.ndarray:
        """Mean square of every row's weights, [out]."""
        return self.squares @ (self.columns / self.columns.sum())

    def targets(self, distortion: np.ndarray) -> np.ndarray:
        """Variance of every row's targets in each tile, [out, tiles]. distortion: [out], error over mean square."""
        carried = np.outer(self.row_spread, self.column_spread) - 1
        return np.maximum(self.squares + (distortion * self.means)[:, None] * carried, TINY)


@dataclass(frozen=True)
class TileCosts:
    """What the tiles of a linear cost, small enough to keep for a whole model.

    order: int64 [places], rows sorted within spans, padded to whole blocks with rows that do not exist.
    rows: float64 [blocks], sum of p times mean square. columns: float64 [tiles], sum of D. energies: float32 [blocks,
    tiles], mean square of a tile over that of its rows. row_spread: [blocks], column_spread: [tiles].
    """

    shape: tuple[int, int]
    order: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    energies: np.ndarray
    row_spread: np.ndarray
    column_spread: np.ndarray

    def errors(self, distortion: np.ndarray) -> np.ndarray:
        """Error of every tile with each of CHOICES, float32 [choices, blocks, tiles], with scales that suit it.

        distortion: of every block's rows, [blocks].
        """
        carried = np.outer(self.row_spread, self.column_spread) - 1
        targets = np.maximum(self.energies + distortion[:, None] * carried, TINY)
        means = targets @ (self.columns / self.columns.sum())
        levels = np.log2(targets / means[:, None])
        found = np.empty((len(CHOICES), *levels.shape), np.float32)
        unit = np.outer(self.rows * means, self.columns)
        for choice, best in enumerate(BEST_LEVELS):
            found[choice] = unit * code_error(levels + best, choice) / 2.0**best
        return found

    def distortion(self, rates: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """Error of every block over the mean square of its rows, [blocks]."""
        return chosen(errors, rates).sum(1) / np.maximum(self.rows * self.columns.sum(), TINY)

    def settled(self, rates: np.ndarray) -> np.ndarray:
        """Distortion of every block with these bits of the tiles, uint8 [blocks, tiles]."""
        found = DISTORTION[rates - FEWEST_BITS].mean(1)
        for _ in range(PASSES):
            found = self.distortion(rates, self.errors(found))
        return found

    def error(self, rates: np.ndarray) -> float:
        """Expected error with these bits of the tiles, uint8 [blocks, tiles]; see `Lattice.error`."""
        return float(chosen(self.errors(self.settled(rates)), rates).sum(dtype=np.float64))


def chosen(errors: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Of errors by choice, [choices, blocks, tiles], those of the bits that were chosen, [blocks, tiles]."""
    return np.take_along_axis(errors, rates[None].astype(np.int64) - FEWEST_BITS, 0)[0]


def row_energies(weight: Tensor, lattice: Lattice, seed: int) -> RowEnergies:
    """Energies of a linear; weight: float32 [n, out] in the factor's order."""
    factor, (columns, out) = lattice.columns, weight.shape
    tiles = -(-columns // TILE_COLUMNS)

    def by_tile(values: Tensor) -> np.ndarray:
        """Sums over the columns of each tile, [..., n] → float64 [tiles, ...]; values: by position."""
        natural = torch.zeros(tiles * TILE_COLUMNS, *values.shape[1:], dtype=values.dtype, device=values.device)
        natural[factor.order] = values
        return natural.view(tiles, TILE_COLUMNS, *values.shape[1:]).sum(1).double().cpu().numpy()

    pivots = factor.pivots.to(weight.dtype)
    sums = by_tile(pivots)
    squares = by_tile(weight.square() * pivots[:, None]) / sums[:, None]
    spread = by_tile((1 + 12 * carried_variance(factor, seed).squeeze(1)) * pivots) / sums
    shaped = by_tile(_shaped_pivots(factor))
    means = (shaped / shaped.sum()) @ squares
    own = lattice.row_pivots(out).cpu().numpy()
    return RowEnergies(squares.T, shaped, own, _row_spread(means, lattice), spread, columns)


def _shaped_pivots(factor: Factor) -> Tensor:
    """Pivots as the search feels them, float64 [n] by position: the geometric mean of WINDOW neighbours in a stream.

    Among symbols the search prefers those that err where pivots are small.
    """
    columns = len(factor.order)
    whole = torch.zeros(-(-columns // WINDOW) * WINDOW, dtype=torch.float64, device=factor.order.device)
    whole[factor.order] = factor.pivots.double().clamp_min(TINY).log()
    window = factor.order // WINDOW
    sums = whole.view(-1, WINDOW).sum(1)
    return (sums[window] / (columns - WINDOW * window).clamp_max(WINDOW)).exp()


def _row_spread(means: np.ndarray, lattice: Lattice) -> np.ndarray:
    """Σ_l (U_G⁻¹)_il² m_l over m_i, [out], of mean squares m."""
    found = np.ones(len(means))
    for block in (lattice.rows or equal_rows(len(means))).blocks:
        if not block.is_independent:
            own, rows = torch.from_numpy(means)[block.rows.cpu()], block.rows.cpu().numpy()
            upper = block.unit_upper.double().cpu()
            inverse = torch.linalg.solve_triangular(
                upper, torch.eye(len(own), dtype=upper.dtype), upper=True, unitriangular=True
            )
            found[rows] = (inverse.square() @ own / own.clamp_min(TINY)).numpy()
    return found


def tile_costs(rows: RowEnergies) -> TileCosts:
    """Sort the rows and add those of each block."""
    out, means = len(rows.squares), rows.means
    places = -(-out // TILE_ROWS) * TILE_ROWS
    padded = np.append(rows.pivots * means, np.full(places - out, -1.0))
    order = np.lexsort((padded, np.arange(places) // SPAN))
    present = np.minimum(order, out - 1)
    counts = np.where(order < out, padded[order], 0.0)

    def by_block(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, TILE_ROWS, *values.shape[1:]).sum(1)

    total = by_block(counts)
    weights = counts / np.repeat(np.maximum(total, TINY), TILE_ROWS)
    relative = rows.squares[present] / np.maximum(means[present], TINY)[:, None]
    energies = by_block(relative * weights[:, None]).astype(np.float32)
    spread = by_block(rows.row_spread[present] * weights)
    return TileCosts((out, rows.width), order, total, rows.columns, energies, spread, rows.column_spread)


def allocate(linears: list[TileCosts], rate: float) -> list[np.ndarray]:
    """Bits of a pair in every tile, uint8 [blocks, tiles], such that all linears together take `rate` bits per weight.

    With a common price of a bit, every tile takes what costs least; the price is found by bisection. What is then left
    goes, one bit more at a time, to the tiles where it lowers the error most. Errors depend on the bits, as they are
    carried into the targets, so this is done PASSES times.
    """
    budget = rate * sum(out * columns for out, columns in (linear.shape for linear in linears))
    distortions = [np.full(len(linear.rows), 4.0**-rate) for linear in linears]
    for _ in range(PASSES):
        errors = [linear.errors(own) for linear, own in zip(linears, distortions, strict=True)]
        rates = _cheapest(linears, errors, budget)
        distortions = [linear.distortion(r, e) for linear, r, e in zip(linears, rates, errors, strict=True)]
    return rates


def _cheapest(linears: list[TileCosts], errors: list[np.ndarray], budget: float) -> list[np.ndarray]:
    prices = CHOICES[:, None, None].astype(np.float32)

    def at(price: float) -> list[np.ndarray]:
        return [CHOICES[(own + np.float32(price) * prices).argmin(0)].astype(np.uint8) for own in errors]

    def size(rates: list[np.ndarray]) -> int:
        return sum(stored_bits(own, linear.shape) for own, linear in zip(rates, linears, strict=True))

    low, high = -100.0, 100.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(2.0**middle)) > budget else (low, middle)
    rates = at(2.0**high)
    spare = int((budget - size(rates)) // (32 * TILE_ROWS))
    saved = [_saved_by_one_bit(own, taken).ravel() for own, taken in zip(errors, rates, strict=True)]
    ends = np.cumsum([len(own) for own in saved])
    for tile in np.argsort(-np.concatenate(saved), kind="stable")[: max(spare, 0)]:
        linear = int(np.searchsorted(ends, tile, side="right"))
        own, at_tile = rates[linear].reshape(-1), tile - ends[linear] + len(saved[linear])
        own[at_tile] += own[at_tile] < MOST_BITS
    return rates


def _saved_by_one_bit(errors: np.ndarray, rates: np.ndarray) -> np.ndarray:
    return chosen(errors, rates) - chosen(errors, np.minimum(rates + 1, MOST_BITS))
