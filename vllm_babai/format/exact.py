"""Powers of two that every machine computes alike, to the last bit: files depend on them."""

import math

import numpy as np

_FRACTION = 24  # fractional bits of the exponents


def halved(exponent: np.ndarray) -> np.ndarray:
    """2^−exponent for exponents ≥ 0, as a product of repeated square roots of ½."""
    fixed = (np.minimum(exponent, 63.0) * (1 << _FRACTION)).astype(np.int64)
    result = np.ldexp(1.0, -(fixed >> _FRACTION).astype(np.int32))
    root = 0.5
    for bit in range(_FRACTION - 1, -1, -1):
        root = math.sqrt(root)
        result = np.where(fixed >> bit & 1, result * root, result)
    return result
