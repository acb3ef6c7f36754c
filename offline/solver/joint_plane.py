"""Nearest plane where the loss couples the errors of output rows, with one or several paths.

For an error E of the weight the loss grows by ½ tr(G E H Eᵀ), see `row_geometry`: a lattice with the basis R_H ⊗ R_G,
of which Babai's algorithm decides one integer after the other. In one column the rows are decided from the last to the
first, each carrying its error into the rows before it,

    t_ji = c_ji + Σ_{l>i} (G_il / G_ii)(c_jl − s z_jl),    c_ji = w_ji + Σ_{k>j} (R_jk / R_jj)(w_ki − s z_ki),

R and G standing for the triangular factors.

The order may as well be row by row: each row is then a plain lattice problem whose weight is corrected for the rows
decided before. So a row can keep several paths, the cheapest partial solutions, and decide when it has come to an end
(M-algorithm, K-best lattice decoding). With 16 of them the error is about a tenth less than Babai's on the reference
model (`python tests/benchmarks/quality.py`, cases "16 paths").
"""

import torch
from torch import Tensor

from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import NEAREST, NearestPlane, Rounding, from_right_to_left
from vllm_babai.offline.solver.row_geometry import RowBlock, equal_rows
from vllm_babai.offline.solver.threads import parallel_products

# Columns that are decided row by row between two matrix products. A row's paths end with a leaf: the best one is left.
# So more columns give the paths more room, and cost more time in the loops, less in products.
# `python tests/benchmarks/constants.py LEAF` compares values.
LEAF = 256


def joint_plane(weight: Tensor, lattice: Lattice, steps: Tensor, rounding: Rounding = NEAREST) -> NearestPlane:
    """Decide every integer; blocks of rows run in parallel. See `solve` for the arguments.

    The loops run on the CPU, wherever the tensors are: everything is copied there once.
    """
    from vllm_babai.offline.solver.paths import Found, Problem, decide  # numba takes a second to import

    columns, rows = lattice.columns.on_cpu, lattice.rows or equal_rows(weight.shape[1])
    price = torch.zeros_like(steps) if rounding.price is None else rounding.price
    inverse = rounding.shrinkage / steps
    arguments = [tensor.cpu().expand(weight.shape) for tensor in (weight, steps, inverse, price)]
    edges = torch.tensor([rounding.low, rounding.high], dtype=weight.dtype)
    found = NearestPlane(*(torch.empty(weight.shape, dtype=weight.dtype) for _ in range(3)))

    def solve_block(block: RowBlock) -> None:
        own = [tensor[:, block.rows].contiguous() for tensor in arguments]
        integers, residual, targets = torch.empty_like(own[0]), torch.empty_like(own[0]), own[0].clone()
        unit_uppers = (columns.unit_upper, block.unit_upper.contiguous())
        problem = Problem(*(tensor.numpy() for tensor in (*own, columns.pivots, *unit_uppers, edges)))
        arrays = Found(integers.numpy(), residual.numpy(), targets.numpy())

        def carry(low: int, middle: int, high: int) -> None:
            targets[low:middle].addmm_(columns.unit_upper[low:middle, middle:high], residual[middle:high])

        from_right_to_left(
            0, len(weight), LEAF, lambda low, high: decide(low, high, lattice.paths, problem, arrays), carry
        )
        found.integers[:, block.rows], found.residual[:, block.rows] = integers, residual
        found.targets[:, block.rows] = targets

    parallel_products(solve_block, rows.blocks)
    return NearestPlane(*(t.to(weight.device) for t in (found.integers, found.residual, found.targets)))
