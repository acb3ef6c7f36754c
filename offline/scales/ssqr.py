"""SSQR: scales, one per output row (or per row and group), and the price of an overflow entry.

A target t is beyond the integer range low … high unless its scale is at least max(t/(high + ½), t/(low − ½)). So in one
row the k-th largest of these thresholds is the scale at which k − 1 targets are beyond. The squared error of a row
grows with s² ΣD and the row's own pivot; entries go to the rows where an entry lowers the error most, and what the last
of them saves is the price of an entry. Rounding also weighs it: a target just beyond the range stays at its edge.

A scale may be negative, as the range has one integer more below 0 than above.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vllm_babai.format.lattice import MAX_INTEGER, integer_range, share_beyond
from vllm_babai.offline.scales.select import kth_smallest
from vllm_babai.offline.scales.solution import Solution
from vllm_babai.offline.solver.expected import expected_targets
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import NearestPlane, Rounding
from vllm_babai.offline.solver.solve import solve

# `python tests/benchmarks/constants.py NAME` compares values of the first six on the reference model.
DRAWS = 2  # rounds of the first choice of scales, each on new draws of the targets
SPANS = (0.5, 0.125)  # octaves to both sides of a scale in which a better one is looked for, one round for each
CANDIDATES = 17  # scales that a round compares
MOST_BEYOND = 8  # most targets beyond the range that the first choice allows, over those that shall overflow
MAX_PASSES = 3  # of the solver
SHARE_TOLERANCE = 0.1  # relative: a share this close to what was asked for ends the search
# Independent rows that share a price. The search takes about ten times their memory: of 16384 rows of 4096 columns,
# 2.7 GB. Not measured beyond that; a linear with fewer rows is not divided.
ROWS_TOGETHER = 16384
PRICE_BISECTIONS = 20  # of 120 octaves: to 1/8700 of an octave
PRICE_OCTAVES = 60.0  # to both sides of the largest cost


def search_overflow(weight: Tensor, lattice: Lattice, groups: int, bits: int, overflow: float, seed: int) -> Solution:
    """Solve with scales and a price at which a share `overflow` overflows; weight: [n, out] in the columns' order.

    Where rows are independent, about ROWS_TOGETHER of them share a price. They are taken from all over the matrix, as
    neighbours in a vocabulary are alike.
    """

    def search(part: Tensor, of_part: Lattice) -> Solution:
        searched = ScaleSearch.of(part, of_part, groups, bits, overflow, seed)
        return searched.meet_price(searched.improve(searched.choose()))

    if not lattice.has_independent_rows or weight.shape[1] <= ROWS_TOGETHER:
        return search(weight, lattice)
    parts = -(-weight.shape[1] // ROWS_TOGETHER)
    plane = NearestPlane(*(torch.empty_like(weight) for _ in range(3)))
    found = []
    for first in range(parts):
        chosen = slice(first, None, parts)
        solution = search(weight[:, chosen].contiguous(), lattice.of_rows(chosen))
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


@dataclass(frozen=True)
class ScaleSearch:
    """The search for the scales of rows that share a price: `choose`, then `improve`, then `meet_price`.

    Scales are chosen on targets that nearest plane is expected to meet, the price is then met on those that it met.
    Every round draws the targets anew, as scales suit the draws that chose them too well.

    weight: [n, out] in the columns' order. cells: int64 [groups, n / groups], positions that share a scale.
    importance: D_j D_i of every weight, [n, out]. overflow: share of weights that shall overflow.
    """

    weight: Tensor
    lattice: Lattice
    cells: Tensor
    importance: Tensor
    bits: int
    overflow: float
    seed: int

    @classmethod
    def of(cls, weight: Tensor, lattice: Lattice, groups: int, bits: int, overflow: float, seed: int) -> "ScaleSearch":
        """The search for a weight with so many groups of consecutive input features."""
        cells = torch.argsort(lattice.columns.order).view(groups, -1)
        row_pivots = lattice.row_pivots(weight.shape[1]).to(weight)
        importance = lattice.columns.pivots.to(weight)[:, None] * row_pivots
        importance.clamp_min_(torch.finfo(weight.dtype).tiny)
        return cls(weight, lattice, cells, importance, bits, overflow, seed)

    def choose(self) -> Tensor:
        """Scales, bfloat16 [out, groups], chosen by the targets' thresholds.

        More targets are let beyond the range than shall overflow: as many as it takes for the share asked for to be
        worth the price of an entry which goes with these scales.
        """
        pivots = self.lattice.columns.pivots.to(self.weight)
        row_pivots = self.lattice.row_pivots(self.weight.shape[1]).to(self.weight)
        cells_of_both = torch.cat((self.cells, self.cells + len(self.weight)), 1)
        beyond = self.overflow
        scales, price = overflow_scales(self.weight, self.cells, pivots, row_pivots, self.bits, beyond)
        for attempt in range(DRAWS):
            draws = self._draw(self._steps(scales), attempt)
            worth = float((self._savings(draws[0], self._steps(scales)) > price).float().mean())
            beyond *= min(max(self.overflow / max(worth, 1e-9), 0.5), 4.0)
            beyond = min(max(beyond, self.overflow), MOST_BEYOND * self.overflow)
            scales, price = overflow_scales(
                torch.cat(draws), cells_of_both, pivots.repeat(2), row_pivots, self.bits, beyond
            )
        return scales

    def improve(self, scales: Tensor) -> Tensor:
        """Scales, bfloat16 [out, groups], near those given, at which the cost is least: that of rounding, and that of
        targets beyond the range, each kept at its edge or stored for the price of an entry.
        """
        rounding = self.importance[self.cells].sum(1) / 12
        for attempt, span in enumerate(SPANS, DRAWS):
            steps = self._steps(scales)
            draws = self._draw(steps, attempt)
            price = self._price(torch.cat([self._savings(targets, steps) for targets in draws]))
            multiples = torch.exp2(torch.linspace(-span, span, CANDIDATES, device=self.weight.device))
            few = self._beyond(torch.stack(draws), steps, multiples[0])
            costs = []
            for multiple in multiples:
                saved = savings(few.draws, multiple * few.steps, few.importance, self.bits)
                beyond = torch.zeros_like(self.weight)  # in the order of cells
                beyond.view(-1)[few.places] = saved.clamp_(max=price).div_(len(draws)).sum(0)
                of_cells = beyond.view(*self.cells.shape, -1).sum(1)
                costs.append((multiple * scales.T.float()).square() * rounding + of_cells)
            scales = (scales.float() * multiples[torch.stack(costs).argmin(0)].T).to(torch.bfloat16)
        return scales

    def meet_price(self, scales: Tensor) -> Solution:
        """Solve with these scales and the price at which the share asked for overflows."""
        low, high = integer_range(self.bits)
        steps = self._steps(scales)
        targets, _ = self._draw(steps, DRAWS + len(SPANS))
        saved = self._savings(targets, steps)
        shares: list[float] = []
        while not shares or (
            abs(shares[-1] - self.overflow) > SHARE_TOLERANCE * self.overflow and len(shares) < MAX_PASSES
        ):
            price = self._price(saved)
            rounding = Rounding(low=low, high=high, price=price / self.importance)
            plane = solve(self.weight, self.lattice, steps, rounding)
            saved = self._savings(plane.targets, steps)
            shares.append(share_beyond(plane.integers, (low, high)))
        kept = float(saved[saved <= price].double().sum())
        return Solution(scales, steps, plane, len(shares), kept)

    def _steps(self, scales: Tensor) -> Tensor:
        """Step of every position and output row: [n, out], or [1, out] for one scale per row."""
        if len(self.cells) == 1:
            return scales.T.float()
        steps = torch.empty(self.cells.numel(), len(scales), device=scales.device)
        steps[self.cells] = scales.T.float()[:, None]
        return steps

    def _draw(self, steps: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
        return expected_targets(self.weight, steps, self.lattice.columns, self.seed + attempt)

    def _beyond(self, draws: Tensor, steps: Tensor, smallest: Tensor) -> "_Few":
        """The weights whose targets are beyond the range at the smallest multiple of the steps in any draw, so all that
        are at a larger one. They are few, and comparing scales on them alone takes a third of the time at 4 bits.
        """
        low, high = integer_range(self.bits)
        integers = torch.round(draws / (smallest * steps))
        position, row = ((integers < low) | (integers > high)).any(0).nonzero(as_tuple=True)
        places = self.cells.flatten().argsort()[position] * draws.shape[-1] + row
        return _Few(
            draws[:, position, row], steps.expand_as(self.weight)[position, row], self.importance[position, row], places
        )

    def _savings(self, targets: Tensor, steps: Tensor) -> Tensor:
        return savings(targets, steps, self.importance, self.bits)

    def _price(self, saved: Tensor) -> float:
        """What an entry costs where a share `overflow` of all targets saves more than that."""
        fitting = max(1, saved.numel() - round(self.overflow * saved.numel()))
        return kth_smallest(saved, fitting)


@dataclass(frozen=True)
class _Few:
    """Some of the weights. draws: of their targets, [draws, weights]. places: int64, where they are in a matrix
    [n, out] with its positions in the order of cells.
    """

    draws: Tensor
    steps: Tensor
    importance: Tensor
    places: Tensor


def overflow_scales(
    targets: Tensor, cells: Tensor, pivots: Tensor, row_pivots: Tensor, bits: int, share: float
) -> tuple[Tensor, float]:
    """Scales, bfloat16 [out, groups], at which a share of all targets is beyond the range at the least error, and how
    much of D_j D_i t² the last target that is beyond saves.

    targets: [n, out]. cells: int64 [groups, n / groups], positions that share a scale. pivots: D_j of the columns, [n].
    row_pivots: D_i of the rows, [out].
    """
    low, high = integer_range(bits)
    weights = pivots[cells].sum(1)[:, None] * row_pivots / 12
    depth = min(cells.shape[1], max(4, int(cells.shape[1] * min(1.0, 4 * share)) + 2))
    candidates = []
    for sign in (1, -1):
        thresholds = torch.maximum(targets / (sign * (high + 0.5)), targets / (sign * (low - 0.5)))
        largest = thresholds[cells].topk(depth, dim=1).values
        # A cell's largest target becomes at most half of MAX_INTEGER; nearest plane may carry as much into it again.
        candidates.append(sign * torch.maximum(largest, largest[:, :1] * (high + 1) * 2 / MAX_INTEGER))
    choices = torch.cat(candidates, 1)
    cost = choices.square() * weights[:, None]
    count = torch.arange(depth, device=targets.device).repeat(2)
    price = _price_of_entry(cost, count, share * targets.numel())
    best = (cost + price * count[:, None]).argmin(1, keepdim=True)
    scales = choices.gather(1, best).squeeze(1).T
    row = scales.abs().amax(1, keepdim=True)
    scales = torch.where(scales != 0, scales, torch.where(row > 0, row, 1.0))  # a cell of zeros takes its row's scale
    return scales.to(torch.bfloat16).contiguous(), price


def _price_of_entry(cost: Tensor, count: Tensor, budget: float) -> float:
    """The error that one overflow entry must save, so that the entries worth it fit the budget. Bisection in log.

    cost: [groups, choices, out]; count: entries of every choice, [choices].
    """
    low, high = -PRICE_OCTAVES, PRICE_OCTAVES
    unit = float(cost.max()) or 1.0
    for _ in range(PRICE_BISECTIONS):
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
