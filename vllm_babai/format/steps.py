"""Steps of columns relative to each other, in a few bits each: g = 2^(−k / STEPS_PER_OCTAVE), rounded to bfloat16.

The product of such a factor, a bfloat16 scale and an integer below 2⁸ is exact in float32, in any order.
"""

import struct

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.errors import FormatError
from vllm_babai.format.tables import halved
from vllm_babai.format.vectors import pack_vectors, unpack_vectors, vector_bits

STEPS_PER_OCTAVE = 8
MAX_EXPONENT = 40 * STEPS_PER_OCTAVE
_STREAM_BITS = 32 + 24  # length and rANS state


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


def exponent_bits(exponents: Tensor) -> float:
    """Bits that `pack_exponents` will take, within a few bytes."""
    return _STREAM_BITS + vector_bits(exponents.numpy())


def pack_exponents(exponents: Tensor) -> bytes:
    """Exponents, int16 [columns], as bytes."""
    return pack_vectors([exponents.int().numpy()])


def unpack_exponents(raw: memoryview, position: int, columns: int) -> tuple[Tensor, int]:
    """Exponents, int16 [columns], stored at `position`, and the position behind them. Raises FormatError."""
    try:
        (exponents,), position = unpack_vectors(raw, position, [columns])
    except (struct.error, ValueError) as error:
        raise FormatError(f"codes blob has damaged column steps: {error}") from error
    if exponents.min(initial=0) < 0 or exponents.max(initial=0) > MAX_EXPONENT:
        raise FormatError("codes blob has column steps that no encoder writes")
    return torch.from_numpy(exponents.astype(np.int16)), position
