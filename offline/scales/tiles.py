"""How many bits every tile of a trellis gets.

A code of b bits a pair leaves DISTORTION[b] of a target's variance as error, so a tile of rows i and columns j costs
DISTORTION[b] · Σ p_i σ_i² · Σ D_j, with the pivots p of the rows and D of the columns and the variance σ² of a row's
targets. Bits go where the next one lowers this sum most. Rows are sorted by p σ² first, within spans, so that the rows
of a tile need alike bits.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_babai.format.trellis.blob import SPAN, stored_bits
from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS, TILE_COLUMNS, TILE_ROWS
from vllm_babai.offline.solver.lattice import Lattice

CHOICES = np.arange(FEWEST_BITS, MOST_BITS + 1)
# Of Gaussian numbers, by CHOICES, with the paths that `paths_by_bits` keeps of 64. Estimates, within 5% of what
# `python tests/benchmarks/trellis_code.py --paths 8 16 64` prints at 2 to 5 bits with 64 paths, at 7 with 16 and at 8
# to 10 with 8. That of 6 bits, where 32 are kept, is 5% below what it prints with 16.
DISTORTION = np.array([0.2938, 0.1522, 0.0781, 0.0415, 0.0215, 0.0115, 0.0063, 0.0033, 0.0018])


@dataclass(frozen=True)
class TileCosts:
    """What the tiles of a linear cost at a distortion of 1: rows[block] · columns[tile], float64.

    order: int64 [places], rows sorted within spans, padded to whole blocks with rows that do not exist.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    order: np.ndarray

    @property
    def products(self) -> np.ndarray:
        """Of every tile, float64 [blocks, tiles]."""
        return np.outer(self.rows, self.columns)

    def error(self, rates: np.ndarray) -> float:
        """Expected error with these bits of the tiles, uint8 [blocks, tiles]; see `Lattice.error`."""
        return float((self.products * DISTORTION[rates - FEWEST_BITS]).sum())


def tile_costs(variance: Tensor, lattice: Lattice) -> TileCosts:
    """Costs of a linear whose rows' targets have a variance [out]."""
    out = len(variance)
    counts = (lattice.row_pivots(out).cpu() * variance.double().cpu()).numpy()
    places = -(-out // TILE_ROWS) * TILE_ROWS
    padded = np.concatenate((counts, np.full(places - out, -1.0)))
    order = np.lexsort((padded, np.arange(places) // SPAN))
    rows = np.maximum(padded, 0.0)[order].reshape(-1, TILE_ROWS).sum(1)
    pivots = np.empty(len(lattice.columns.pivots))
    pivots[lattice.columns.order.cpu().numpy()] = lattice.columns.pivots.cpu().numpy()
    columns = np.add.reduceat(pivots, np.arange(0, len(pivots), TILE_COLUMNS))
    return TileCosts((out, len(pivots)), rows, columns, order)


def allocate(linears: list[TileCosts], rate: float) -> list[np.ndarray]:
    """Bits of a pair in every tile, uint8 [blocks, tiles], such that all linears together take `rate` bits per weight.

    With a common price of a bit, every tile takes what costs least; the price is found by bisection. What is then left
    goes, one bit more at a time, to the tiles where it lowers the error most.
    """
    budget = rate * sum(out * columns for out, columns in (linear.shape for linear in linears))
    products = [linear.products for linear in linears]

    def at(price: float) -> list[np.ndarray]:
        return [CHOICES[(p[..., None] * DISTORTION + price * CHOICES).argmin(-1)].astype(np.uint8) for p in products]

    def size(rates: list[np.ndarray]) -> int:
        return sum(stored_bits(own, linear.shape) for own, linear in zip(rates, linears, strict=True))

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(2.0**middle)) > budget else (low, middle)
    rates = at(2.0**high)
    spare = int((budget - size(rates)) // (32 * TILE_ROWS))
    saved = [_saved_by_one_bit(p, own).ravel() for p, own in zip(products, rates, strict=True)]
    ends = np.cumsum([len(own) for own in saved])
    for tile in np.argsort(-np.concatenate(saved), kind="stable")[: max(spare, 0)]:
        linear = int(np.searchsorted(ends, tile, side="right"))
        own, at_tile = rates[linear].reshape(-1), tile - ends[linear] + len(saved[linear])
        own[at_tile] += own[at_tile] < MOST_BITS
    return rates


def _saved_by_one_bit(products: np.ndarray, rates: np.ndarray) -> np.ndarray:
    steps = np.append(DISTORTION[:-1] - DISTORTION[1:], 0.0)
    return products * steps[rates - FEWEST_BITS]
