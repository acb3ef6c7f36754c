"""HPTQ: one step per matrix, found so that the entropy-coded integers take a given number of bits."""

import math

import torch
from torch import Tensor

from vllm_babai.format import predicted_bytes
from vllm_babai.offline.factor import Factor
from vllm_babai.offline.nearest_plane import Solution, expected_targets, nearest_plane

MAX_PASSES = 4
GUESSES = 3
RATE_TOLERANCE = 0.002


def search_rate(weight: Tensor, factor: Factor, rate: float, seed: int) -> Solution:
    """Solve with one step for the whole matrix at which it codes to `rate` bits per weight, tables included.

    weight: [n, out] in the factor's order. The step is first sought on draws of the targets that nearest plane is
    expected to meet, which cost no pass; one bit less for every octave of the step is the rule by which it moves.
    """
    spread = float(weight.std()) or 1.0
    octave = math.log2(spread * math.sqrt(2 * math.pi * math.e)) - rate
    for guess in range(GUESSES):
        step = _step(octave, weight)
        targets, _ = expected_targets(weight, step, factor, seed + guess)
        octave += coded_rate(torch.round(targets / step)) - rate
    passes, missed = 0, True
    while missed and passes < MAX_PASSES:
        step = _step(octave, weight)
        plane = nearest_plane(weight, factor.unit_upper, step)
        reached = coded_rate(plane.integers)
        missed = abs(reached - rate) > RATE_TOLERANCE * rate
        octave += reached - rate
        passes += 1
    return Solution(step.to(torch.bfloat16), step, plane, passes)


def coded_rate(integers: Tensor) -> float:
    """Bits per weight that integers [n, out] code to; their order does not matter."""
    return 8 * predicted_bytes(integers.T.short().contiguous().cpu()) / integers.numel()


def _step(octave: float, weight: Tensor) -> Tensor:
    """2^octave as bfloat16 stores it, float32 [1, 1]."""
    return torch.tensor([[2.0**octave]], device=weight.device).to(torch.bfloat16).float()
