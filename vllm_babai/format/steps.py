"""One scale per column in a few bits each: largest scale · 2^(−k / STEPS_PER_OCTAVE), rounded to bfloat16."""

import struct

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.errors import FormatError
from vllm_babai.format.tables import halved
from vllm_babai.format.vectors import pack_vectors, unpack_vectors

STEPS_PER_OCTAVE = 8
MAX_EXPONENT = 40 * STEPS_PER_OCTAVE


def snap_scales(scales: Tensor) -> Tensor:
    """Positive scales of columns [1, columns] → the nearest that HPTQ stores compactly, bfloat16 [1, columns]."""
    if not bool((scales > 0).all()):
        raise ValueError("scales of columns must be positive")
    return column_scales(scales.max().reshape(1, 1).bfloat16(), _nearest(scales))


def column_scales(largest: Tensor, exponents: np.ndarray) -> Tensor:
    """bfloat16 [1, 1] and exponents, integers ≥ 0 [columns] → scales, bfloat16 [1, columns]."""
    factors = torch.from_numpy(halved(exponents / STEPS_PER_OCTAVE))
    return (largest.double() * factors).bfloat16()


def scale_exponents(scales: Tensor) -> np.ndarray | None:
    """Exponents, int32 [columns], of scales that `column_scales` gives back exactly; None for all others."""
    if scales.shape[0] != 1 or scales.shape[1] < 2 or not bool((scales > 0).all()):
        return None
    exponents = _nearest(scales)
    return exponents if torch.equal(column_scales(scales.max().reshape(1, 1), exponents), scales) else None


def pack_exponents(exponents: np.ndarray) -> bytes:
    """Exponents as bytes."""
    return pack_vectors([exponents])


def unpack_exponents(raw: memoryview, position: int, columns: int) -> tuple[np.ndarray, int]:
    """Exponents, int32 [columns], stored at `position`, and the position behind them. Raises FormatError."""
    try:
        (exponents,), position = unpack_vectors(raw, position, [columns])
    except (struct.error, ValueError) as error:
        raise FormatError(f"codes blob has damaged column steps: {error}") from error
    if exponents.min(initial=0) < 0:
        raise FormatError("codes blob has column steps above the largest")
    return exponents, position


def _nearest(scales: Tensor) -> np.ndarray:
    largest = scales.max().bfloat16().double()
    exponents = torch.round(STEPS_PER_OCTAVE * torch.log2(largest / scales.double().reshape(-1)))
    return exponents.clamp(0, MAX_EXPONENT).int().numpy()
