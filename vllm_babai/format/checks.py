"""What every format checks before it believes a stored tensor. All raise FormatError."""

import zlib

import torch
from torch import Tensor

from vllm_babai.errors import FormatError


def name_crc(linear: str) -> int:
    """Which linear a blob belongs to: CRC-32 of its full name from the first number in it on, 0 for no name.

    `model.layers.7.mlp.up_proj` counts as `7.mlp.up_proj`, and a name without numbers as its last part: what comes
    before is not the same in a checkpoint, in transformers and in vLLM.
    """
    parts = linear.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return zlib.crc32(".".join(parts[first:]).encode())


def check_owner(stored: int, linear: str, tensor: str) -> None:
    """Raise when a tensor, stored with this `name_crc`, is of another linear. Without a name nothing is known."""
    if stored and linear and stored != name_crc(linear):
        raise FormatError(f"{tensor} belongs to another linear")


def check_shape(stored: tuple[int, int], expected: tuple[int, int] | None, tensor: str) -> None:
    """Raise when a tensor says that it is of a matrix of another shape."""
    if expected is not None and stored != expected:
        raise FormatError(f"the layer is {expected[0]} × {expected[1]}, but {tensor} is of {stored[0]} × {stored[1]}")


def check_scales(scales: Tensor) -> None:
    """Raise for scales that are not finite or 0. SSQR has scales of either sign, and HPTQ too, converted from it."""
    if not bool(torch.isfinite(scales).all()) or not bool((scales != 0).all()):
        raise FormatError("scales are corrupt: some are 0 or not finite")
