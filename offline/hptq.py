"""HPTQ: one step per matrix, found so that the entropy-coded integers take a given number of bits."""

import math

import torch
from torch import Tensor

from vllm_babai.format import predicted_bytes
from vllm_babai.offline.factor import Factor
from vllm_babai.offline.lattice import Lattice
from vllm_babai.offline.nearest_plane import Solution, expected_targets

MAX_PASSES = 4
GUESSES = 3
RATE_TOLERANCE = 0.002
RELATIVE_PRICE = 0.5  # of a bit, over the rate-distortion slope; best of 0, ½ and 1 on the reference model


def search_rate(weight: Tensor, lattice: Lattice, rate: float, seed: int) -> Solution:
    """Solve with one step for the whole matrix at which it codes to `rate` bits per weight, tables included.

    weight: [n, out] in the columns' order. The step is first sought on draws of the targets that nearest plane is
    expected to meet, which cost no pass; one bit less for every octave of the step is the rule by which it moves.
    """
    factor = lattice.columns
    spread = float(weight.std()) or 1.0
    octave = math.log2(spread * math.sqrt(2 * math.pi * math.e)) - rate
    for guess in range(GUESSES):
        step = _step(octave, weight)
        targets, _ = expected_targets(weight, step, factor, seed + guess)
        octave += coded_rate(torch.round(targets * code_shrinkage(targets, step, factor) / step)) - rate
    passes, missed = 0, True
    while missed and passes < MAX_PASSES:
        step = _step(octave, weight)
        shrinkage = code_shrinkage(targets, step, factor)
        plane = lattice.solve(weight, step, shrinkage)
        reached = coded_rate(plane.integers)
        missed = abs(reached - rate) > RATE_TOLERANCE * rate
        octave += reached - rate
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


def _step(octave: float, weight: Tensor) -> Tensor:
    """2^octave as bfloat16 stores it, float32 [1, 1]."""
    return torch.tensor([[2.0**octave]], device=weight.device).to(torch.bfloat16).float()
