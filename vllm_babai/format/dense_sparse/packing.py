"""Dense integers as a bit stream.

Weight k of a row takes bits k·b … (k+1)·b − 1 of that row's byte stream, least significant bit first, stored with the
offset 2^(b−1). A row is padded to whole bytes. Rows and whole bytes can be cut out without unpacking, which is what a
tensor-parallel rank does.
"""

import torch
from torch import Tensor

from vllm_babai.errors import FormatError
from vllm_babai.format.lattice import BIT_WIDTHS, integer_range


def packed_bytes(in_features: int, bits: int) -> int:
    """Bytes that one row of `in_features` weights takes."""
    return (in_features * bits + 7) // 8


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers [out, in] within `integer_range(bits)` → uint8 [out, packed_bytes(in, bits)].

    Raises ValueError for an unknown width or an integer outside the range.
    """
    low, high = integer_range(bits)
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, got {bits}")
    if integers.numel() and (integers.min() < low or integers.max() > high):
        raise ValueError(f"integers outside {low}…{high} do not fit {bits} bits")
    rows, columns = integers.shape
    octets = torch.nn.functional.pad(integers, (0, -columns % 8)).unflatten(1, (-1, 8))
    words = torch.zeros(octets.shape[:2], dtype=torch.int64, device=integers.device)
    for i in range(8):
        words |= (octets[..., i].long() - low) << (bits * i)
    stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(rows, -1)
    return stream[:, : packed_bytes(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """uint8 [out, packed_bytes] → int16 [out, in_features]. Raises FormatError when the sizes do not match."""
    if bits not in BIT_WIDTHS:
        raise FormatError(f"bit width {bits} is unknown; this version reads {BIT_WIDTHS}")
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_bytes(in_features, bits):
        raise FormatError(
            f"packed weight {packed.dtype} {tuple(packed.shape)} does not hold rows of {in_features} {bits}-bit weights"
            f" ({packed_bytes(in_features, bits)} bytes each)"
        )
    rows = packed.shape[0]
    stream = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    words = torch.nn.functional.pad(stream, (0, 8 - bits)).contiguous().view(torch.int64).squeeze(-1)
    mask = (1 << bits) - 1
    integers = torch.empty(rows, words.shape[1], 8, dtype=torch.int16, device=packed.device)
    for i in range(8):
        integers[..., i] = (words >> (bits * i)) & mask
    return integers.flatten(1)[:, :in_features] + integer_range(bits)[0]
