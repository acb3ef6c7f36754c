"""Babai's nearest plane (arXiv 2507.18553, theorem 4), for all output rows of a layer at once.

For each row the problem is min ‖R(w − s∘z)‖² over integers z. From the last position to the first,

    t_j = w_j + Σ_{k>j} (R_jk / R_jj)(w_k − s_k z_k),    z_j = round(t_j / s_j),

so only the rows of R divided by their diagonal enter: one Cholesky factor and no inverse. GPTQ computes the same
integers in the opposite order from the factor of the inverse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.format.lattice import MAX_INTEGER
from vllm_babai.offline.solver.lattice import Lattice

# Positions that are decided one by one between two matrix products. More of them cost memory traffic, fewer cost calls
# of small products. `python tests/benchmarks/solver.py` times the solver; edit LEAF to compare.
LEAF = 16


@dataclass(frozen=True)
class Rounding:
    """How a target t becomes an integer z; the default is Babai's, the integer nearest to t / s.

    shrinkage: factor of the target before it is rounded, in 0 … 1.
    low, high, price: an integer outside low … high costs `price`, in units of the target's squared error (t − s z)²;
    z stays at the edge where that is cheaper. None: it costs nothing. Tensors are broadcastable to [n, out].
    """

    shrinkage: Tensor | float = 1.0
    low: int = -MAX_INTEGER
    high: int = MAX_INTEGER
    price: Tensor | None = None


NEAREST = Rounding()


@dataclass(frozen=True)
class NearestPlane:
    """What nearest plane found, in the factor's order and transposed: one column per output row of the layer.

    integers: Z, in the dtype of the weight, [n, out]. residual: w − s∘z, [n, out]. targets: t, [n, out].
    """

    integers: Tensor
    residual: Tensor
    targets: Tensor


def nearest_plane(weight: Tensor, lattice: Lattice, steps: Tensor, rounding: Rounding = NEAREST) -> NearestPlane:
    """Decide every integer, for rows that are independent and count alike, with one path. See `solve` for arguments.

    The halves are solved from right to left: solve the right half, carry its residual into the targets of the left half
    with one matrix product, solve the left half.
    """
    unit_upper = lattice.columns.unit_upper
    targets = weight.clone()
    residual = torch.empty_like(weight)
    integers = torch.empty_like(weight)
    steps = steps.expand_as(weight)
    inverse = (rounding.shrinkage / steps).expand_as(weight)
    price = None if rounding.price is None else rounding.price.expand_as(weight)

    def decide(low: int, high: int) -> None:
        for j in range(high - 1, low - 1, -1):
            targets[j].addmv_(residual[j + 1 : high].T, unit_upper[j, j + 1 : high])
            torch.mul(targets[j], inverse[j], out=integers[j]).round_()
            if price is not None:
                _keep_to_range(integers[j], targets[j], steps[j], price[j], rounding)
            torch.addcmul(weight[j], integers[j], steps[j], value=-1, out=residual[j])

    def carry(low: int, middle: int, high: int) -> None:
        targets[low:middle].addmm_(unit_upper[low:middle, middle:high], residual[middle:high])

    from_right_to_left(0, len(weight), LEAF, decide, carry)
    return NearestPlane(integers, residual, targets)


def _keep_to_range(integers: Tensor, targets: Tensor, steps: Tensor, price: Tensor, rounding: Rounding) -> None:
    """Put integers back to the edge of the range, in place, unless that adds more than their price to the error."""
    edge = integers.clamp(rounding.low, rounding.high)
    beyond = integers - edge
    saved = beyond * steps * (2 * targets - (integers + edge) * steps)  # (t − s edge)² − (t − s z)²
    integers.sub_(beyond.masked_fill_(saved > price, 0.0))


def from_right_to_left(
    low: int, high: int, leaf: int, decide: Callable[[int, int], None], carry: Callable[[int, int, int], None]
) -> None:
    """Solve positions low … high − 1: the right half, then what it carries into the left half, then the left half.

    decide(low, high) solves at most `leaf` positions; carry(low, middle, high) adds to the targets of low … middle − 1.
    """
    if high - low <= leaf:
        decide(low, high)
        return
    middle = low + (high - low) // 2
    from_right_to_left(middle, high, leaf, decide, carry)
    carry(low, middle, high)
    from_right_to_left(low, middle, leaf, decide, carry)
