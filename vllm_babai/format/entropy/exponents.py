"""The exponents of the columns' steps (`format.steps`) as bytes."""

import struct

import numpy as np
import torch
from torch import Tensor

from vllm_babai.errors import FormatError
from vllm_babai.format.entropy.vectors import pack_vectors, unpack_vectors, vector_bits
from vllm_babai.format.steps import MAX_EXPONENT

_STREAM_BITS = 32 + 24  # length and rANS state


def exponent_bits(exponents: Tensor) -> float:
    """Bits that `pack_exponents` will take, within a few bytes."""
    return _STREAM_BITS + vector_bits(exponents.numpy())


def pack_exponents(exponents: Tensor) -> bytes:
    """Exponents, int16 [columns], as bytes."""
    return pack_vectors([exponents.int().numpy()])


def unpack_exponents(raw: memoryview, position: int, columns: int) -> tuple[Tensor, int]:
    """Exponents, int16 [columns], stored at `position`, and the position after them. Raises FormatError."""
    try:
        (exponents,), position = unpack_vectors(raw, position, [columns])
    except (struct.error, ValueError) as error:
        raise FormatError(f"codes blob has damaged column steps: {error}") from error
    if exponents.min(initial=0) < 0 or exponents.max(initial=0) > MAX_EXPONENT:
        raise FormatError("codes blob has column steps that no encoder writes")
    return torch.from_numpy(exponents.astype(np.int16)), position
