"""SSQR, dense + sparse: `bits` per weight, and an overflow blob with what does not fit. Nothing is clipped."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_babai.errors import FormatError
from vllm_babai.format.base import Format
from vllm_babai.format.dense_sparse.overflow import decode_overflow, encode_overflow, read_header
from vllm_babai.format.dense_sparse.packing import pack, unpack
from vllm_babai.format.lattice import BIT_WIDTHS, MAX_INTEGER, LatticeWeight, integer_range


@dataclass(frozen=True)
class SSQR(Format):
    """One linear layer as it lies on disk.

    qweight: uint8 [out_features, packed_bytes(in_features, bits)], see `dense_sparse.packing`.
    scales: bfloat16 [out_features, groups].
    overflow: uint8 [bytes], see `dense_sparse.overflow`.
    """

    name: ClassVar[str] = "ssqr"
    dtypes: ClassVar[dict[str, torch.dtype]] = {
        "qweight": torch.uint8,
        "scales": torch.bfloat16,
        "overflow": torch.uint8,
    }
    bit_widths: ClassVar[tuple[int, ...] | None] = BIT_WIDTHS

    qweight: Tensor
    scales: Tensor
    overflow: Tensor

    @classmethod
    def encode(cls, weight: LatticeWeight, bits: int | None = None) -> "SSQR":
        """Store a lattice point with `bits` dense bits per weight; exact for any |z| ≤ 2¹⁵ − 1.

        Raises ValueError when no width is given, or the columns have steps of their own.
        """
        if bits is None:
            raise ValueError(f"SSQR needs a width: one of {BIT_WIDTHS}")
        if weight.column_exponents is not None:
            raise ValueError("SSQR holds no steps of columns")
        if weight.integers.numel() and weight.integers.min() < -MAX_INTEGER:  # int16 itself ends at +MAX_INTEGER
            raise ValueError(f"integers larger than {MAX_INTEGER} cannot be stored")
        low, high = integer_range(bits)
        dense = weight.integers.clamp(low, high)
        qweight = pack(dense, bits)
        scales = weight.scales.expand(weight.integers.shape[0], -1).contiguous()
        excess = weight.integers.int() - dense.int()
        return cls(qweight, scales, encode_overflow(excess, bits, dense_crc(qweight, scales)))

    def decode(self) -> LatticeWeight:
        """The stored lattice point. Raises FormatError on anything truncated or corrupt."""
        header = read_header(self.overflow)
        if self.qweight.shape[0] != header.rows or self.scales.shape[0] != header.rows:
            raise FormatError(
                f"overflow blob is of a layer with {header.rows} rows, but qweight has {self.qweight.shape[0]}"
                f" and scales {self.scales.shape[0]}"
            )
        integers = unpack(self.qweight, header.bits, header.columns)
        if dense_crc(self.qweight, self.scales) != header.dense_crc:
            raise FormatError("qweight or scales are corrupt: their CRC does not match the overflow blob's")
        sparse = decode_overflow(self.overflow)
        integers[sparse.rows.long(), sparse.columns.long()] += sparse.excess.short()
        return LatticeWeight(integers, self.scales)

    @property
    def dense_range(self) -> tuple[int, int]:
        """Smallest and largest integer of the dense part. Raises FormatError."""
        return integer_range(read_header(self.overflow).bits)


def dense_crc(qweight: Tensor, scales: Tensor) -> int:
    """CRC-32 of the bytes of qweight, then of scales."""
    crc = 0
    for part in (qweight, scales):
        crc = zlib.crc32(part.flatten().view(torch.uint8).numpy().data, crc)
    return crc
