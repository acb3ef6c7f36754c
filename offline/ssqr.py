"""SSQR: scales, one per output row (or per row and group), so that the layer overflows at a given rate.

A target t at integer range low … high overflows unless its scale is at least max(t/(high + ½), t/(low − ½)). So in one
row the k-th largest of these thresholds is the scale at which k − 1 weights overflow. The squared error of a row grows
with s² ΣD; the rows share the layer's budget of overflow entries where an entry lowers that error most.
"""

import torch
from torch import Tensor

from vllm_babai.format.lattice import MAX_INTEGER, integer_range
from vllm_babai.offline.factor import Factor
from vllm_babai.offline.nearest_plane import Solution, expected_targets, nearest_plane

MAX_PASSES = 3
RATE_TOLERANCE = 0.1

PROBES = 128


def search_overflow(weight: Tensor, factor: Factor, groups: int, bits: int, overflow: float, seed: int) -> Solution:
    """Solve with scales whose overflow rate is `overflow`; weight: [n, out] in the factor's order.

    Scales are chosen on a draw of the targets that nearest plane is expected to meet. Choosing favours rows that were
    lucky in the draw, so a second draw tells how much more than asked for overflows, and each pass tells it exactly.
    """
    cells = _cells(factor.order, groups)
    pivots = factor.pivots.to(weight.dtype)
    scales = overflow_scales(weight, cells, pivots, bits, overflow)
    for attempt in range(2):
        targets, unseen = expected_targets(weight, _steps(scales, cells), factor, seed + attempt)
        scales = overflow_scales(targets, cells, pivots, bits, overflow)
    asked = overflow * _ratio(overflow, overflow_rate(unseen / _steps(scales, cells), bits))
    passes, missed = 0, True
    while missed and passes < MAX_PASSES:
        scales = overflow_scales(targets, cells, pivots, bits, asked)
        solution = nearest_plane(weight, factor.unit_upper, _steps(scales, cells))
        reached = overflow_rate(solution.integers, bits)
        missed = abs(reached - overflow) > RATE_TOLERANCE * overflow
        asked *= _ratio(overflow, reached)
        passes += 1
    return Solution(scales, _steps(scales, cells), solution, passes)


def overflow_scales(targets: Tensor, cells: Tensor, pivots: Tensor, bits: int, rate: float) -> Tensor:
    """Scales, bfloat16 [out, groups], at which a share `rate` of all targets overflows at the least total error.

    targets: [n, out]. cells: int64 [groups, n / groups], positions that share a scale. pivots: D, [n].
    """
    low, high = integer_range(bits)
    thresholds = torch.maximum(targets / (high + 0.5), targets / (low - 0.5))
    weights = pivots[cells].sum(1).to(targets.dtype)
    depth = min(cells.shape[1], max(4, int(cells.shape[1] * min(1.0, 6 * rate)) + 2))
    largest = thresholds[cells].topk(depth, dim=1).values
    largest = torch.maximum(largest, largest[:, :1] * (integer_range(bits)[1] + 1) * 2 / MAX_INTEGER)
    cost = largest.square() * weights[:, None, None]
    count = torch.arange(depth, device=targets.device, dtype=targets.dtype)[:, None]
    price = _price_of_entry(cost, count, rate * targets.numel())
    best = (cost + price * count).argmin(1, keepdim=True)
    scales = largest.gather(1, best).squeeze(1).T
    return torch.where(scales > 0, scales, 1.0).to(torch.bfloat16).contiguous()


def _price_of_entry(cost: Tensor, count: Tensor, budget: float) -> float:
    """The error that one overflow entry must save, so that the entries worth it fit the budget. Bisection in log."""
    low, high = -60.0, 60.0
    unit = float(cost[:, 0].max()) or 1.0
    for _ in range(40):
        middle = (low + high) / 2
        entries = (cost + unit * 2.0**middle * count).argmin(1).sum()
        low, high = (middle, high) if entries > budget else (low, middle)
    return unit * 2.0**high


def _ratio(wanted: float, reached: float) -> float:
    """Factor to correct a rate by, kept from running away where almost nothing overflows."""
    return min(max(wanted / reached, 0.5), 2.0) if reached > 0 else 1.0


def _cells(order: Tensor, groups: int) -> Tensor:
    """Positions of the input features that share a scale, int64 [groups, in / groups]."""
    return torch.argsort(order).view(groups, -1)


def _steps(scales: Tensor, cells: Tensor) -> Tensor:
    """Step of every position and output row: [in, out], or [1, out] for one scale per row."""
    if len(cells) == 1:
        return scales.T.float()
    steps = torch.empty(cells.numel(), len(scales), device=scales.device)
    steps[cells] = scales.T.float()[:, None]
    return steps


def overflow_rate(integers: Tensor, bits: int) -> float:
    """Share of integers (or of targets over their step) beyond the dense range."""
    low, high = integer_range(bits)
    return float(((integers < low - 0.5) | (integers > high + 0.5)).float().mean())
