"""How the errors of a layer's output rows add up to its loss: the row covariance G, factored.

G is the covariance of the loss's gradients by the outputs. With H, the Hessian of the inputs, the loss grows by
½ tr(G E H Eᵀ) for an error E of the weight (Kronecker-factored Hessians: arXiv 2505.22988, YAQA). G is kept in blocks
of consecutive rows. Blocks are independent problems.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.offline.solver.factor import factorize

# λ of G over its mean diagonal. G comes from one drawn label a token, and a block of 256 rows from a few thousand
# tokens, so it is noisier than H, which has 0.01. `python tests/benchmarks/constants.py ROW_DAMPING` compares values.
ROW_DAMPING = 0.05
# Independent rows that one thread solves at a time. Rows share nothing, so results do not depend on it; it was chosen
# so that a block's state (a few arrays of n × 256 numbers) stays small and there are blocks for every core.
INDEPENDENT_BLOCK = 256


@dataclass(frozen=True)
class RowBlock:
    """Rows that are solved together.

    rows: int64 [rows], the row of the layer at each position; the last position is decided first.
    unit_upper: the unit upper triangular factor of their G, float32 [rows, rows]; [0, 0] where they are independent.
    pivots: D by position, float64 [rows].
    """

    rows: Tensor
    unit_upper: Tensor
    pivots: Tensor

    @property
    def is_independent(self) -> bool:
        """Whether no row carries its error into another."""
        return not len(self.unit_upper)


@dataclass(frozen=True)
class RowGeometry:
    """The factored G of a layer. pivots: D by row, in the layer's own order of rows, float64 [out]."""

    blocks: list[RowBlock]
    pivots: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether all rows are independent."""
        return all(block.is_independent for block in self.blocks)


def row_geometry(covariance: Tensor) -> RowGeometry:
    """Factor the blocks of G; covariance: [out, block], row i's covariances with the rows of its own block.

    Raises QuantizationError like `factorize`.
    """
    out, size = covariance.shape
    blocks, pivots = [], torch.empty(out, dtype=torch.float64)
    for first in range(0, out, size):
        rows = covariance[first : first + size]
        factor = factorize(rows[:, : len(rows)], "activation", ROW_DAMPING)
        block = RowBlock(first + factor.order, factor.unit_upper, factor.pivots)
        pivots[block.rows] = block.pivots
        blocks.append(block)
    return RowGeometry(blocks, pivots)


def independent_rows(pivots: Tensor) -> RowGeometry:
    """Rows that carry nothing into each other; pivots: how much the error of each counts, float64 [out]."""
    rows, nothing = torch.arange(len(pivots)), torch.empty(0, 0)
    parts = zip(rows.split(INDEPENDENT_BLOCK), pivots.split(INDEPENDENT_BLOCK), strict=True)
    return RowGeometry([RowBlock(of_block, nothing, part) for of_block, part in parts], pivots)


def equal_rows(out_features: int) -> RowGeometry:
    """Independent rows whose errors count alike."""
    return independent_rows(torch.ones(out_features, dtype=torch.float64))
