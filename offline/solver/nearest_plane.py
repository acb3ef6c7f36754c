"""Babai's nearest plane (arXiv 2507.18553, theorem 4), for all output rows of a layer at once.

Row by row the problem is min ‖R(w − s∘z)‖² over integers z. From the last position to the first,

    t_j = w_j + Σ_{k>j} (R_jk / R_jj)(w_k − s_k z_k),    z_j = round(t_j / s_j),

so only the rows of R divided by their diagonal enter: one Cholesky factor and no inverse. GPTQ computes the same
integers in the opposite order from the factor of the inverse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format.lattice import MAX_INTEGER
from vllm_babai.offline.solver.factor import Factor

LEAF = 16  # columns decided one by one between matrix products
PROBES = 64


@dataclass(frozen=True)
class Rounding:
    """How a target t becomes an integer z; the default is Babai's, the nearest to t / s.

    shrinkage: factor of the target before it is rounded. low, high: integers beyond these cost `price`, in units of the
    target's squared error (t − s z)²; z stays at the edge where that is cheaper. Both broadcastable to [n, out].
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


@dataclass(frozen=True)
class Solution:
    """A solved layer. scales: bfloat16 [1 or out, groups], as stored. steps: the same, float32, broadcastable to
    [n, out] in the factor's order. passes: runs of nearest plane that the search took. added_error: what rounding
    otherwise than to the nearest integer is expected to add to the error.
    """

    scales: Tensor
    steps: Tensor
    plane: NearestPlane
    passes: int
    added_error: float = 0.0


def nearest_plane(weight: Tensor, unit_upper: Tensor, steps: Tensor, rounding: Rounding = NEAREST) -> NearestPlane:
    """Decide every integer.

    weight: [n, out], rows in the factor's order. unit_upper: [n, n] as in `Factor`. steps: broadcastable to [n, out].
    The halves are solved from right to left: solve the right half, carry its residual into the targets of the left half
    with one matrix product, solve the left half. Raises QuantizationError when an integer exceeds 2¹⁵ − 1.
    """
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
    largest = integers.abs().max() if integers.numel() else 0
    if not largest <= MAX_INTEGER:
        raise QuantizationError(
            f"an integer reached {float(largest):.0f}, more than {MAX_INTEGER}: the step is too small"
        )
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
    """Solve positions low … high − 1: the right half, what it carries into the left half, the left half.

    decide(low, high) solves at most `leaf` positions; carry(low, middle, high) adds to the targets of low … middle − 1.
    """
    if high - low <= leaf:
        decide(low, high)
        return
    middle = low + (high - low) // 2
    from_right_to_left(middle, high, leaf, decide, carry)
    carry(low, middle, high)
    from_right_to_left(low, middle, leaf, decide, carry)


def squared_error(residual: Tensor, factor: Factor) -> Tensor:
    """‖R(w − s∘z)‖² of every output row, float64 [out]; per calibration token, damping included."""
    step = 256
    upper = factor.unit_upper
    total = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    for i in range(0, len(upper), step):
        rows = upper[i : i + step, i:] @ residual[i:]
        total += (rows.double().square() * factor.pivots[i : i + step, None]).sum(0)
    return total


def mean_error(steps: Tensor, factor: Factor) -> Tensor:
    """Expected squared error ¹⁄₁₂ Σ_j s_j² D_j of every output row, float64 [out] (or [1] for one step).

    Three times this is the bound that no row can exceed (arXiv 2507.18553, theorem 5).
    """
    steps = steps.expand(len(factor.pivots), -1)
    return factor.pivots @ steps.double().square() / 12


def carried_variance(factor: Factor, seed: int, steps: Tensor | float = 1.0) -> Tensor:
    """Variance of what nearest plane's error adds to the target of every position, [n, 1]; steps: of positions, [n, 1].

    Rounding leaves t − s∘z = s∘u with u uniform, so the residual is w − s∘z = U⁻¹(s∘u), U being R with rows divided by
    its diagonal, and t_j − w_j has variance ¹⁄₁₂ Σ_{k>j} (U⁻¹)_jk² s_k². Random probes tell these row sums without U⁻¹.
    """
    upper = factor.unit_upper
    generator = torch.Generator(upper.device).manual_seed(seed)
    probes = torch.randn(len(upper), PROBES, generator=generator, device=upper.device, dtype=upper.dtype) * steps
    carried = probes - torch.linalg.solve_triangular(upper, probes, upper=True, unitriangular=True)
    return carried.square().mean(1, keepdim=True) / 12


def expected_targets(weight: Tensor, steps: Tensor, factor: Factor, seed: int) -> tuple[Tensor, Tensor]:
    """Two draws of nearest plane's targets without running it: the weight plus and minus noise as the carried error's.

    weight: [n, out] in the factor's order; steps: broadcastable to it. A target carries the errors of other positions'
    steps. These are taken for a row's times a position's, both root mean squares, as a variance by row would cost as
    much as nearest plane itself.
    """
    row = steps.double().square().mean(0, keepdim=True).sqrt().to(steps.dtype)  # float32 has no squares of tiny steps
    position = (steps / row).square().mean(1, keepdim=True).sqrt()
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
    noise *= carried_variance(factor, seed, position).sqrt() * row
    return weight + noise, weight - noise
