"""SSQR: scales, one per output row (or per row and group), and the price of an overflow entry.

A target t at integer range low … high is beyond it unless its scale is at least max(t/(high + ½), t/(low − ½)). So in
one row the k-th largest of these thresholds is the scale at which k − 1 targets are beyond. The squared error of a row
grows with s² ΣD and the row's own pivot; entries go to the rows where an entry lowers the error most, and what the last
of them saves is the price of an entry. Rounding pays it, too: a target that is little beyond stays at the range's edge.

A scale may be negative, as the range has one integer more below 0 than above.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from vllm_babai.format.lattice import MAX_INTEGER, integer_range
from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import NearestPlane, Rounding, Solution, expected_targets

DRAWS = 2  # of the targets, to choose scales on
SPANS = (0.5, 0.125)  # octaves to both sides of a scale in which a better one is looked for, with a draw for each
CANDIDATES = 17
MAX_PASSES = 3
RATE_TOLERANCE = 0.1
ROWS = 16384
MOST_BEYOND = 8  # targets beyond the range, over those that overflow


def search_overflow(weight: Tensor, lattice: Lattice, groups: int, bits: int, overflow: float, seed: int) -> Solution:
    """Solve with scales and a price at which a share `overflow` overflows; weight: [n, out] in the columns' order.

    Where rows are alone, about ROWS of them share a price: the search takes many times their memory, too much for a
    head. They are taken from all over the matrix, as neighbours in a vocabulary are alike.
    """
    if not lattice.has_single_rows or weight.shape[1] <= ROWS:
        return _search_overflow(weight, lattice, groups, bits, overflow, seed)
    parts = -(-weight.shape[1] // ROWS)
    plane = NearestPlane(*(torch.empty_like(weight) for _ in range(3)))
    found = []
    for first in range(parts):
        chosen = slice(first, None, parts)
        part = weight[:, chosen].contiguous()
        solution = _search_overflow(part, lattice.of_rows(chosen), groups, bits, overflow, seed)
        for field in fields(plane):
            getattr(plane, field.name)[:, chosen] = getattr(solution.plane, field.name)
        found.append(replace(solution, plane=plane))
    order = torch.cat([torch.arange(first, weight.shape[1], parts) for first in range(parts)])
    place = order.argsort().to(weight.device)
    return Solution(
        torch.cat([solution.scales for solution in found])[place],
        torch.cat([solution.steps for solution in found], 1)[:, place],
        plane,
        max(solution.passes for solution in found),
        sum(solution.added_error for solution in found),
    )


def _search_overflow(weight: Tensor, lattice: Lattice, groups: int, bits: int, overflow: float, seed: int) -> Solution:
    """Solve rows that share a price.

    The price is met on targets that nearest plane is expected to meet, then on those that it met. They are drawn anew,
    as scales suit the draws that chose them too well.
    """
    factor, (low, high) = lattice.columns, integer_range(bits)
    cells = _cells(factor.order, groups)
    importance = _importance(weight, lattice)
    scales = _choose_scales(weight, lattice, cells, importance, bits, overflow, seed)
    scales = _improve_scales(scales, weight, factor, cells, importance, bits, overflow, seed + DRAWS)
    steps = _steps(scales, cells)
    targets, _ = expected_targets(weight, steps, factor, seed + DRAWS + len(SPANS))
    saved = savings(targets, steps, importance, bits)
    rates: list[float] = []
    while not rates or (abs(rates[-1] - overflow) > RATE_TOLERANCE * overflow and len(rates) < MAX_PASSES):
        price = _price(saved, overflow)
        plane = lattice.solve(weight, steps, Rounding(low=low, high=high, price=price / importance))
        saved = savings(plane.targets, steps, importance, bits)
        rates.append(overflow_rate(plane.integers, bits))
    kept = float(saved[saved <= price].double().sum())
    return Solution(scales, steps, plane, len(rates), kept)


def _choose_scales(
    weight: Tensor, lattice: Lattice, cells: Tensor, importance: Tensor, bits: int, overflow: float, seed: int
) -> Tensor:
    """Scales, bfloat16 [out, groups], chosen on draws of the targets that nearest plane is expected to meet.

    So many targets are let beyond the range that as many as asked for are worth the price of an entry which goes with
    these scales.
    """
    pivots, row_pivots = lattice.columns.pivots.to(weight), lattice.row_pivots(weight.shape[1]).to(weight)
    both = torch.cat((cells, cells + len(weight)), 1)
    beyond = overflow
    scales, price = overflow_scales(weight, cells, pivots, row_pivots, bits, beyond)
    for attempt in range(DRAWS):
        steps = _steps(scales, cells)
        draws = expected_targets(weight, steps, lattice.columns, seed + attempt)
        worth = float((savings(draws[0], steps, importance, bits) > price).float().mean())
        beyond *= min(max(overflow / max(worth, 1e-9), 0.5), 4.0)
        beyond = min(max(beyond, overflow), MOST_BEYOND * overflow)
        scales, price = overflow_scales(torch.cat(draws), both, pivots.repeat(2), row_pivots, bits, beyond)
    return scales


def _improve_scales(
    scales: Tensor,
    weight: Tensor,
    factor: Factor,
    cells: Tensor,
    importance: Tensor,
    bits: int,
    overflow: float,
    seed: int,
) -> Tensor:
    """Scales, bfloat16 [out, groups], near those given, at which what rounding costs and what targets beyond the range
    cost, each kept within it or stored for the price of an entry, is least; on new draws of the targets.
    """
    rounding = importance[cells].sum(1) / 12
    for attempt, span in enumerate(SPANS):
        steps = _steps(scales, cells)
        draws = expected_targets(weight, steps, factor, seed + attempt)
        price = _price(torch.cat([savings(targets, steps, importance, bits) for targets in draws]), overflow)
        multiples = torch.exp2(torch.linspace(-span, span, CANDIDATES, device=weight.device))
        costs = []
        for multiple in multiples:
            beyond = torch.zeros_like(weight)
            for targets in draws:
                beyond += savings(targets, multiple * steps, importance, bits).clamp_(max=price) / len(draws)
            costs.append((multiple * scales.T.float()).square() * rounding + beyond[cells].sum(1))
        scales = (scales.float() * multiples[torch.stack(costs).argmin(0)].T).to(torch.bfloat16)
    return scales


def overflow_scales(
    targets: Tensor, cells: Tensor, pivots: Tensor, row_pivots: Tensor, bits: int, rate: float
) -> tuple[Tensor, float]:
    """Scales, bfloat16 [out, groups], at which a share `rate` of all targets is beyond the range at the least error,
    and how much of D_j D_i t² the last target that is beyond saves.

    targets: [n, out]. cells: int64 [groups, n / groups], positions that share a scale. pivots: D_j of the columns, [n].
    row_pivots: D_i of the rows, [out].
    """
    low, high = integer_range(bits)
    weights = pivots[cells].sum(1)[:, None] * row_pivots / 12
    depth = min(cells.shape[1], max(4, int(cells.shape[1] * min(1.0, 4 * rate)) + 2))
    candidates = []
    for sign in (1, -1):
        thresholds = torch.maximum(targets / (sign * (high + 0.5)), targets / (sign * (low - 0.5)))
        largest = thresholds[cells].topk(depth, dim=1).values
        candidates.append(sign * torch.maximum(largest, largest[:, :1] * (high + 1) * 2 / MAX_INTEGER))
    choices = torch.cat(candidates, 1)
    cost = choices.square() * weights[:, None]
    count = torch.arange(depth, device=targets.device).repeat(2)
    price = _price_of_entry(cost, count, rate * targets.numel())
    best = (cost + price * count[:, None]).argmin(1, keepdim=True)
    scales = choices.gather(1, best).squeeze(1).T
    row = scales.abs().amax(1, keepdim=True)
    scales = torch.where(scales != 0, scales, torch.where(row > 0, row, 1.0))  # a cell of zeros goes with its row
    return scales.to(torch.bfloat16).contiguous(), price


def _price_of_entry(cost: Tensor, count: Tensor, budget: float) -> float:
    """The error that one overflow entry must save, so that the entries worth it fit the budget. Bisection in log.

    cost: [groups, choices, out]; count: entries of every choice, [choices].
    """
    low, high = -60.0, 60.0
    unit = float(cost.max()) or 1.0
    for _ in range(20):
        middle = (low + high) / 2
        entries = count[(cost + unit * 2.0**middle * count[:, None]).argmin(1)].sum()
        low, high = (middle, high) if entries > budget else (low, middle)
    return unit * 2.0**high


def savings(targets: Tensor, steps: Tensor, importance: Tensor, bits: int) -> Tensor:
    """How much less D_j D_i (t − s z)² is at the nearest integer than at the nearest in the range, [n, out].

    0 for a target in the range. importance: D_j D_i, [n, out].
    """
    low, high = integer_range(bits)
    inner = targets / steps
    integers = inner.round()
    edges = integers.clamp(low, high)
    return (integers - edges) * (2 * inner - integers - edges) * steps.square() * importance


def _price(saved: Tensor, overflow: float) -> float:
    """What an entry costs where a share `overflow` of all targets saves more than that."""
    fitting = max(1, saved.numel() - round(overflow * saved.numel()))
    return float(saved.flatten().kthvalue(fitting).values)


def _importance(weight: Tensor, lattice: Lattice) -> Tensor:
    """D_j D_i of every weight, [n, out], above 0."""
    row_pivots = lattice.row_pivots(weight.shape[1]).to(weight)
    return (lattice.columns.pivots.to(weight)[:, None] * row_pivots).clamp_min_(torch.finfo(weight.dtype).tiny)


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
    """Share of integers beyond the dense range."""
    low, high = integer_range(bits)
    return float(((integers < low) | (integers > high)).float().mean())
