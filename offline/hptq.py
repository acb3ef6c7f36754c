"""HPTQ: one step per matrix, found so that the entropy-coded integers take a given number of bits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.format import predicted_bytes
from vllm_babai.offline.factor import Factor
from vllm_babai.offline.lattice import Lattice
from vllm_babai.offline.nearest_plane import Rounding, Solution, expected_targets

MAX_PASSES = 4
GUESSES = 3
RATE_TOLERANCE = 0.002
RELATIVE_PRICE = 0.5  # of a bit, over the rate-distortion slope; best of 0, ½ and 1 on the reference model


@dataclass
class _Search:
    """Secant search for the octave (binary logarithm of the step) at which a matrix codes to `rate`.

    slope: bits that an octave costs, 1 where there are many. last: the octave and rate before, if comparable.
    """

    rate: float
    octave: float
    slope: float = 1.0
    last: tuple[float, float] | None = None

    def step(self, weight: Tensor) -> Tensor:
        """The step to try, as bfloat16 stores it, float32 [1, 1]."""
        return torch.tensor([[2.0**self.octave]], device=weight.device).to(torch.bfloat16).float()

    def move(self, reached: float) -> None:
        """Go on from the rate that the step reached."""
        if self.last is not None and self.last[0] != self.octave:
            secant = (self.last[1] - reached) / (self.octave - self.last[0])
            self.slope = min(max(secant, 0.4), 1.2)
        self.last = (self.octave, reached)
        self.octave += (reached - self.rate) / self.slope


def search_rate(weight: Tensor, lattice: Lattice, rate: float, seed: int) -> Solution:
    """Solve with one step for the whole matrix at which it codes to `rate` bits per weight, tables included.

    weight: [n, out] in the columns' order. The step is first sought on draws of the targets that nearest plane is
    expected to meet, which cost no pass.
    """
    factor = lattice.columns
    spread = float(weight.std()) or 1.0
    search = _Search(rate, math.log2(spread * math.sqrt(2 * math.pi * math.e)) - rate)
    for guess in range(GUESSES):
        step = search.step(weight)
        targets, _ = expected_targets(weight, step, factor, seed + guess)
        search.move(coded_rate(torch.round(targets * code_shrinkage(targets, step, factor) / step)))
    search.last = None
    passes, missed = 0, True
    while missed and passes < MAX_PASSES:
        step = search.step(weight)
        shrinkage = code_shrinkage(targets, step, factor)
        plane = lattice.solve(weight, step, Rounding(shrinkage))
        reached = coded_rate(plane.integers)
        missed = abs(reached - rate) > RATE_TOLERANCE * rate
        search.move(reached)
        passes += 1
    row_pivots = lattice.row_pivots(weight.shape[1]).to(weight.device)
    pulled = float(factor.pivots @ ((1 - shrinkage) * targets).double().square() @ row_pivots)
    return Solution(step.to(torch.bfloat16), step, plane, passes, pulled)


def code_shrinkage(targets: Tensor, step: Tensor, factor: Factor) -> Tensor:
    """Factor [n, out] by which to shrink targets, so that rounding weighs their distortion against their code.

    A target of variance v codes z to log₂e z²/2(v/s²) bits more than 0, so that D s²(t/s − z)² + λ·bits is least at
    z = t/s / (1 + λ log₂e/2 /(D v)). At the rate-distortion slope λ = 2 ln2 s²D̄/12 the last term is (s²D̄/12)/(D v):
    the layer's mean distortion over the signal. RELATIVE_PRICE is λ over that slope. The variance is fitted as a row's
    times a column's, as the code fits it. targets: [n, out], the expected ones.
    """
    energy = targets.square()
    variance = energy.mean(1, keepdim=True) * energy.mean(0, keepdim=True) / energy.mean().clamp_min(1e-30)
    distortion = step.square() * factor.pivots.mean().float() / 12
    return 1 / (1 + RELATIVE_PRICE * distortion / (factor.pivots.float()[:, None] * variance).clamp_min(1e-30))


def coded_rate(integers: Tensor) -> float:
    """Bits per weight that integers [n, out] code to; their order does not matter."""
    return 8 * predicted_bytes(integers.T.short().contiguous().cpu()) / integers.numel()
