"""Nearest plane for a layer whose output errors the loss weighs jointly.

With H the Hessian of the inputs and G the covariance of the loss's gradients by the outputs, the loss grows by
½ tr(G E H Eᵀ) for an error E of the weight: a lattice with the basis R_H ⊗ R_G, of which Babai's algorithm decides one
integer after the other. In one column the rows are decided from the last to the first, each carrying its error into
the rows before it,

    t_ji = c_ji + Σ_{l>i} (G_il / G_ii)(c_jl − s z_jl),    c_ji = w_ji + Σ_{k>j} (R_jk / R_jj)(w_ki − s z_ki),

R and G standing for the triangular factors. G is kept in blocks of consecutive rows, which are problems of their own.
(Kronecker-factored Hessians: arXiv 2505.22988, YAQA.)

The order may as well be row by row, each a plain lattice problem whose weight is corrected for the rows decided before.
So a row can keep several paths, the cheapest partial solutions, and decide when it has come to an end (M-algorithm,
K-best lattice decoding). With 16 of them the error is about a tenth less than Babai's on the reference model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import QuantizationError
from vllm_babai.format.lattice import MAX_INTEGER
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.nearest_plane import (
    NEAREST,
    NearestPlane,
    Rounding,
    from_right_to_left,
    mean_error,
    squared_error,
)

ROW_DAMPING = 0.05
LEAF = 256  # columns decided row by row between matrix products; at their end one path is left
BLOCK = 256  # rows that are solved together where all are alone
PROBES = 32


@dataclass(frozen=True)
class RowGeometry:
    """G, factored. blocks: first row and factor of each. pivots: D by row, in the rows' own order, float64 [out]."""

    blocks: list[tuple[int, Factor]]
    pivots: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether every row is alone."""
        return not any(len(factor.unit_upper) for _, factor in self.blocks)


def row_geometry(covariance: Tensor) -> RowGeometry:
    """Factor the blocks of G; covariance: [out, block], row i's covariances with the rows of its own block."""
    out, size = covariance.shape
    blocks, pivots = [], torch.empty(out, dtype=torch.float64)
    for first in range(0, out, size):
        rows = covariance[first : first + size]
        factor = factorize(rows[:, : len(rows)], "activation", ROW_DAMPING)
        pivots[first + factor.order] = factor.pivots
        blocks.append((first, factor))
    return RowGeometry(blocks, pivots)


def independent_rows(pivots: Tensor) -> RowGeometry:
    """Rows that are alone; pivots: how much the error of each counts, float64 [out]."""
    nothing = torch.empty(0, 0)
    blocks = [
        (first, Factor(nothing, part, torch.arange(len(part)), 0.0))
        for first, part in zip(range(0, len(pivots), BLOCK), pivots.split(BLOCK), strict=True)
    ]
    return RowGeometry(blocks, pivots)


def equal_rows(out_features: int) -> RowGeometry:
    """Rows that are alone and count alike."""
    return independent_rows(torch.ones(out_features, dtype=torch.float64))


def joint_plane(
    weight: Tensor, factor: Factor, rows: RowGeometry, steps: Tensor, rounding: Rounding = NEAREST, paths: int = 1
) -> NearestPlane:
    """Decide every integer, like `nearest_plane.nearest_plane` and with its shapes; blocks of rows run in parallel.

    paths: that a row keeps while LEAF columns are decided. Runs on the CPU, wherever the tensors are. Raises
    QuantizationError when an integer exceeds 2¹⁵ − 1.
    """
    full_steps = steps.expand_as(weight).cpu()
    inverse = (rounding.shrinkage / steps).expand_as(weight).cpu()
    price = torch.zeros_like(steps) if rounding.price is None else rounding.price
    full_price = price.expand_as(weight).cpu()
    host = weight.cpu()
    found = NearestPlane(*(torch.empty_like(host) for _ in range(3)))

    def solve(block: tuple[int, Factor]) -> None:
        first, row_factor = block
        rows_in_order = first + row_factor.order
        own, own_steps, own_inverse, own_price = (
            t[:, rows_in_order].contiguous() for t in (host, full_steps, inverse, full_price)
        )
        solved = _solve_block(
            own, own_steps, own_inverse, own_price, factor, row_factor.unit_upper.contiguous(), rounding, paths
        )
        for whole, columns in zip((found.integers, found.residual, found.targets), solved, strict=True):
            whole[:, rows_in_order] = columns

    parallel_map(solve, rows.blocks)
    largest = float(found.integers.abs().max()) if weight.numel() else 0.0
    if not largest <= MAX_INTEGER:
        raise QuantizationError(f"an integer reached {largest:.0f}, more than {MAX_INTEGER}: the step is too small")
    return NearestPlane(*(t.to(weight.device) for t in (found.integers, found.residual, found.targets)))


def paths_gain(factor: Factor, paths: int) -> float:
    """Error with so many paths over that with one, as expected for any weight.

    Measured on rows of large random numbers: their targets are uniform between integers, as those of fine steps are.
    """
    if paths == 1:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    weight = 1000 * torch.rand(len(factor.pivots), PROBES, generator=generator).to(factor.unit_upper)
    steps = torch.ones(1, 1).to(weight)
    found = joint_plane(weight, factor, equal_rows(PROBES), steps, NEAREST, paths)
    return float(squared_error(found.residual, factor).mean() / mean_error(steps, factor))


def joint_error(residual: Tensor, factor: Factor, rows: RowGeometry) -> float:
    """tr(G E H Eᵀ), damping included; twice the loss in nats per token that the error E is expected to cost."""
    total = 0.0
    for first, row_factor in rows.blocks:
        part = (factor.unit_upper @ residual[:, first + row_factor.order.to(residual.device)]).double()
        if len(row_factor.unit_upper):
            part = part @ row_factor.unit_upper.double().to(part.device).T
        total += float(factor.pivots @ part.square() @ row_factor.pivots.to(part.device))
    return total


def _solve_block(
    weight: Tensor,
    steps: Tensor,
    inverse: Tensor,
    price: Tensor,
    factor: Factor,
    row_upper: Tensor,
    rounding: Rounding,
    paths: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, residual and targets of one block of rows, [n, rows]; see `nearest_plane` for the recursion."""
    from vllm_babai.offline.solver.joint_loops import decide  # numba takes a second to import

    upper, pivots = factor.unit_upper.cpu(), factor.pivots.cpu()
    carried = weight.clone()
    integers, residual, targets = (torch.empty_like(weight) for _ in range(3))
    edges = torch.tensor([rounding.low, rounding.high], dtype=weight.dtype)
    tensors = (carried, weight, steps, inverse, price, pivots, upper, row_upper, edges, integers, residual, targets)
    arrays = [t.numpy() for t in tensors]

    def carry(low: int, middle: int, high: int) -> None:
        carried[low:middle].addmm_(upper[low:middle, middle:high], residual[middle:high])

    from_right_to_left(0, len(weight), LEAF, lambda low, high: decide(low, high, paths, *arrays), carry)
    return integers, residual, targets
