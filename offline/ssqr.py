"""SSQR: scales, one per output row (or per row and group), so that the layer overflows at a given rate.

A target t at integer range low … high overflows unless its scale is at least max(t/(high + ½), t/(low − ½)). So in one
row the k-th largest of these thresholds is the scale at which k − 1 weights overflow. The squared error of a row grows
with s² ΣD and the row's own pivot; the rows share the layer's budget of overflow entries where an entry lowers the
error most.
"""

import math

import torch
from torch import Tensor

from vllm_babai.format.lattice import MAX_INTEGER, integer_range
from vllm_babai.offline.lattice import Lattice
from vllm_babai.offline.nearest_plane import Solution, expected_targets

MAX_PASSES = 3
RATE_TOLERANCE = 0.1


def search_overflow(weight: Tensor, lattice: Lattice, groups: int, bits: int, overflow: float, seed: int) -> Solution:
    """Solve with scales whose overflow rate is `overflow`; weight: [n, out] in the columns' order.

    How the scales of rows compare is chosen on draws of the targets that nearest plane is expected to meet. These
    scales suit the draw that chose them too well, so one factor for all of them is found on a draw of its own, then on
    the targets of each pass.
    """
    factor = lattice.columns
    cells = _cells(factor.order, groups)
    pivots, row_pivots = factor.pivots, lattice.row_pivots(weight.shape[1]).to(weight.device)
    scales = overflow_scales(weight, cells, pivots, row_pivots, bits, overflow)
    both = torch.cat((cells, cells + len(weight)), 1)
    for attempt in range(2):
        targets = torch.cat(expected_targets(weight, _steps(scales, cells), factor, seed + attempt))
        scales = overflow_scales(targets, both, pivots.repeat(2), row_pivots, bits, overflow)
    targets, _ = expected_targets(weight, _steps(scales, cells), factor, seed + 2)
    rates: list[float] = []
    stretch = 1.0
    while not rates or (abs(rates[-1] - overflow) > RATE_TOLERANCE * overflow and len(rates) < MAX_PASSES):
        if len(rates) > 1 and 0 < min(rates[-2:]) < overflow < max(rates[-2:]):
            stretch = _between(stretch, rates[-2], rates[-1], overflow)
        else:
            stretch = _stretch(weight, targets, _steps(scales, cells), bits, overflow)
        scales = (scales * stretch).to(torch.bfloat16)
        plane = lattice.solve(weight, _steps(scales, cells))
        targets = plane.targets
        rates.append(overflow_rate(plane.integers, bits))
    return Solution(scales, _steps(scales, cells), plane, len(rates))


def overflow_scales(
    targets: Tensor, cells: Tensor, pivots: Tensor, row_pivots: Tensor, bits: int, rate: float
) -> Tensor:
    """Scales, bfloat16 [out, groups], at which a share `rate` of all targets overflows at the least total error.

    targets: [n, out]. cells: int64 [groups, n / groups], positions that share a scale. pivots: D of the columns, [n].
    row_pivots: how much the error of every row counts, [out].
    """
    low, high = integer_range(bits)
    thresholds = torch.maximum(targets / (high + 0.5), targets / (low - 0.5))
    weights = (pivots[cells].sum(1)[:, None] * row_pivots / row_pivots.mean()).to(targets.dtype)
    depth = min(cells.shape[1], max(4, int(cells.shape[1] * min(1.0, 6 * rate)) + 2))
    largest = thresholds[cells].topk(depth, dim=1).values
    largest = torch.maximum(largest, largest[:, :1] * (integer_range(bits)[1] + 1) * 2 / MAX_INTEGER)
    cost = largest.square() * weights[:, None]
    count = torch.arange(depth, device=targets.device, dtype=targets.dtype)[:, None]
    price = _price_of_entry(cost, count, rate * targets.numel())
    best = (cost + price * count).argmin(1, keepdim=True)
    scales = largest.gather(1, best).squeeze(1).T
    row = scales.amax(1, keepdim=True)
    scales = torch.where(scales > 0, scales, torch.where(row > 0, row, 1.0))  # a cell of zeros goes with its row
    return scales.to(torch.bfloat16).contiguous()


def _price_of_entry(cost: Tensor, count: Tensor, budget: float) -> float:
    """The error that one overflow entry must save, so that the entries worth it fit the budget. Bisection in log."""
    low, high = -60.0, 60.0
    unit = float(cost[:, 0].max()) or 1.0
    for _ in range(40):
        middle = (low + high) / 2
        entries = (cost + unit * 2.0**middle * count).argmin(1).sum()
        low, high = (middle, high) if entries > budget else (low, middle)
    return unit * 2.0**high


def _stretch(weight: Tensor, targets: Tensor, steps: Tensor, bits: int, rate: float) -> float:
    """Factor for all steps at which a share `rate` overflows, as what is carried grows in proportion to them.

    A target w + c overflows the range low … high of steps m·s unless m is at least w / ((high + ½)s − c) or
    −w / (c − (low − ½)s). When c alone does, it is taken to go on overflowing, or fitting, as it does now.
    """
    low, high = integer_range(bits)
    carried = targets - weight
    above, below = (high + 0.5) * steps - carried, carried - (low - 0.5) * steps
    least = torch.where(weight > 0, weight / above, -weight / below)
    now = torch.where((weight > above) | (-weight > below), torch.inf, 0.0)
    least = torch.where((above <= 0) | (below <= 0), now, least).flatten()
    fitting = max(1, len(least) - round(rate * len(least)))
    return min(max(float(least.kthvalue(fitting).values), 0.5), 2.0)


def _between(stretch: float, before: float, after: float, rate: float) -> float:
    """Factor for all steps at which a share `rate` overflows, when the last factor, `stretch`, led past it.

    before, after: the rates without and with that factor. At two bits what is carried changes so much with the steps
    that `_stretch` alone goes to and fro.
    """
    return stretch ** (math.log(rate / after) / math.log(after / before))


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
