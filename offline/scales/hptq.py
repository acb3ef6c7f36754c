"""HPTQ: the step of a matrix, found so that the entropy-coded integers take a given number of bits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.format import column_factors, predicted_bytes
from vllm_babai.offline.scales.solution import Solution
from vllm_babai.offline.solver.expected import expected_targets
from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import Rounding
from vllm_babai.offline.solver.solve import solve

# Price of a bit, over the rate-distortion slope. Best of 0, ½ and 1 by the loss of the reference model:
# `python tests/benchmarks/quality.py`, "code-aware rounding" against "plain"; `constants.py RELATIVE_PRICE` beside it.
RELATIVE_PRICE = 0.5
# Choices that were not measured one by one. What a linear misses of its rate goes to the next (`plan.budget`), so the
# tolerance need not be small; a pass of the solver costs more than all guesses together.
RATE_TOLERANCE = 0.002  # relative: a rate this close to what was asked for ends the search
MAX_PASSES = 4  # of the solver
GUESSES = 3  # on drawn targets, before the first pass
SLOPES = (0.4, 1.2)  # bits that an octave of the step may cost: 1 at many bits, less as integers become 0


@dataclass
class StepSearch:
    """Secant search for the octave (binary logarithm of the step) at which a matrix codes to `rate` bits per weight.

    slope: bits that an octave costs. last: octave and rate of the step tried before, None before the first.
    """

    rate: float
    octave: float
    slope: float = 1.0
    last: tuple[float, float] | None = None

    def step(self, weight: Tensor) -> Tensor:
        """The step to try, as bfloat16 stores it, float32 [1, 1]."""
        return torch.tensor([[2.0**self.octave]], device=weight.device).to(torch.bfloat16).float()

    def move(self, reached: float) -> None:
        """Choose the next octave from the rate that the last one reached."""
        if self.last is not None and self.last[0] != self.octave:
            secant = (self.last[1] - reached) / (self.octave - self.last[0])
            self.slope = min(max(secant, SLOPES[0]), SLOPES[1])
        self.last = (self.octave, reached)
        self.octave += (reached - self.rate) / self.slope


@dataclass(frozen=True)
class Draft:
    """What nearest plane is expected to find, without running it.

    octave: of the step at which the matrix codes to the rate. slope: bits that an octave costs there. targets: a draw
    of the targets, [n, out]. error: expected at exactly the rate, all rows counting alike.
    """

    octave: float
    slope: float
    targets: Tensor
    error: float


def draft(weight: Tensor, factor: Factor, rate: float, seed: int, exponents: Tensor | None = None) -> Draft:
    """Look for the step on draws of the targets that nearest plane is expected to meet; see `search_rate`."""
    relative = relative_steps(factor, exponents).to(weight.device)
    spread = float(weight.std()) or 1.0
    octave = math.log2(spread * math.sqrt(2 * math.pi * math.e)) - rate - float(relative.log2().mean())
    search = StepSearch(rate, octave)
    for guess in range(GUESSES):
        steps = search.step(weight) * relative
        targets, _ = expected_targets(weight, steps, factor, seed + guess)
        integers = torch.round(targets * code_shrinkage(targets, steps, factor) / steps)
        reached = coded_rate(integers, exponents)
        search.move(reached)
    error = float((factor.pivots @ (targets - steps * integers).double().square()).sum())
    return Draft(search.octave, search.slope, targets, error * 4 ** (reached - rate))


def search_rate(weight: Tensor, lattice: Lattice, rate: float, seed: int, exponents: Tensor | None = None) -> Solution:
    """Solve with the step at which the matrix codes to `rate` bits per weight, tables and all steps counted.

    weight: float32 [n, out] in the columns' order. exponents: int16 [n] of the column steps, see `format.steps`, in the
    order of the features; None: one step for the whole matrix.
    """
    factor = lattice.columns
    relative = relative_steps(factor, exponents).to(weight.device)
    drafted = draft(weight, factor, rate, seed, exponents)
    targets, search = drafted.targets, StepSearch(rate, drafted.octave, drafted.slope)
    passes, missed = 0, True
    while missed and passes < MAX_PASSES:
        step = search.step(weight)
        steps = step * relative
        shrinkage = code_shrinkage(targets, steps, factor)
        plane = solve(weight, lattice, steps, Rounding(shrinkage))
        reached = coded_rate(plane.integers, exponents)
        missed = abs(reached - rate) > RATE_TOLERANCE * rate
        search.move(reached)
        passes += 1
    row_pivots = lattice.row_pivots(weight.shape[1]).to(weight.device)
    pulled = float(factor.pivots @ ((1 - shrinkage) * targets).double().square() @ row_pivots)
    return Solution(step.to(torch.bfloat16), steps, plane, passes, pulled)


def relative_steps(factor: Factor, exponents: Tensor | None) -> Tensor:
    """Relative steps of the columns in the factor's order, float32 [n, 1]; [1, 1] where there is one step for all."""
    if exponents is None:
        return torch.ones(1, 1)
    return column_factors(exponents)[factor.order.cpu()].float().unsqueeze(1)


def code_shrinkage(targets: Tensor, steps: Tensor, factor: Factor) -> Tensor:
    """Factor [n, out] by which to shrink targets, so that rounding weighs their distortion against their code length.

    z of a target of variance v takes log₂e z²/2(v/s²) bits more than 0, so D s²(t/s − z)² + λ·bits is least at
    z = t/s / (1 + λ log₂e/2 /(D v)). At the rate-distortion slope λ = 2 ln2 E, E being the mean of s²D/12 over the
    layer, the last term is E/(D v): the layer's mean distortion over the signal. RELATIVE_PRICE is λ over that slope.
    The variance is fitted as a row's times a column's, like the probability model of the format. targets: [n, out], the
    expected ones. steps: [1 or n, 1].
    """
    energy = targets.square()
    variance = energy.mean(1, keepdim=True) * energy.mean(0, keepdim=True) / energy.mean().clamp_min(1e-30)
    pivots = factor.pivots.float()[:, None]
    distortion = (steps.square() * pivots).mean() / 12
    return 1 / (1 + RELATIVE_PRICE * distortion / (pivots * variance).clamp_min(1e-30))


def coded_rate(integers: Tensor, exponents: Tensor | None = None) -> float:
    """Bits per weight that integers [n, out] and exponents [n] of their columns' steps code to, in any order."""
    return 8 * predicted_bytes(integers.T.short().contiguous().cpu(), exponents) / integers.numel()
