"""The closest-vector problem of one linear, solved by the solver that fits its lattice."""

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format.lattice import MAX_INTEGER
from vllm_babai.offline.solver.expected import mean_error, squared_error
from vllm_babai.offline.solver.joint_plane import joint_plane
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import NEAREST, NearestPlane, Rounding, nearest_plane

# Rows of random numbers on which `paths_gain` is measured. With n columns they are 32 n integers, so the standard error
# of the gain is about 1/√(32 n): 1% at 256 columns. A choice: more rows take as much longer.
GAIN_ROWS = 32


def solve(weight: Tensor, lattice: Lattice, steps: Tensor, rounding: Rounding = NEAREST) -> NearestPlane:
    """Integers z for which W ≈ s∘z costs little.

    weight: [n, out] in the columns' order, float32 (or float64 with a factor in float64). steps: broadcastable to it;
    they may be negative. Both solvers give the same integers for a lattice that both can solve, up to near ties;
    without coupled rows and with one path `nearest_plane` is faster, and runs where the weight is. Raises
    QuantizationError when an integer exceeds 2¹⁵ − 1.
    """
    solver = nearest_plane if lattice.rows is None and lattice.paths == 1 else joint_plane
    plane = solver(weight, lattice, steps, rounding)
    largest = float(plane.integers.abs().max()) if weight.numel() else 0.0
    if not largest <= MAX_INTEGER:
        raise QuantizationError(f"an integer reached {largest:.0f}, more than {MAX_INTEGER}: the step is too small")
    return plane


def paths_gain(lattice: Lattice) -> float:
    """Error with the lattice's paths over that with one, as expected for any weight.

    Measured on rows of large random numbers: their targets are uniform between integers, as those of fine steps are.
    """
    if lattice.paths == 1:
        return 1.0
    factor = lattice.columns
    generator = torch.Generator().manual_seed(0)
    weight = 1000 * torch.rand(len(factor.pivots), GAIN_ROWS, generator=generator).to(factor.unit_upper)
    steps = torch.ones(1, 1).to(weight)
    found = solve(weight, Lattice(factor, paths=lattice.paths), steps)
    return float(squared_error(found.residual, factor).mean() / mean_error(steps, factor))
