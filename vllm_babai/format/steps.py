"""Steps of columns relative to each other, in a few bits each: g = 2^(−k / STEPS_PER_OCTAVE), rounded to bfloat16.

The product of such a factor, a bfloat16 scale and an integer below 2⁸ is exact in float32, in any order.
"""

import torch
from torch import Tensor

from vllm_babai.format.exact import halved

STEPS_PER_OCTAVE = 8
MAX_EXPONENT = 40 * STEPS_PER_OCTAVE


def step_exponents(steps: Tensor) -> Tensor:
    """Positive steps [columns] → exponents k, int16 [columns], of the nearest factors; the largest step has 0.

    Raises ValueError when a step is not positive.
    """
    if not bool((steps > 0).all()):
        raise ValueError("steps of columns must be positive")
    octaves = torch.log2(steps.double())
    return torch.round(STEPS_PER_OCTAVE * (octaves.max() - octaves)).clamp_max(MAX_EXPONENT).short().cpu()


def column_factors(exponents: Tensor) -> Tensor:
    """Exponents k ≥ 0, int16 [columns] → factors g, bfloat16 [columns]."""
    return torch.from_numpy(halved(exponents.numpy() / STEPS_PER_OCTAVE)).bfloat16()
