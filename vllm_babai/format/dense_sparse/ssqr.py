"""SSQR, dense + sparse: `bits` per weight, and an overflow blob with what does not fit. Nothing is clipped."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError
from vllm_babai.format.base import Format
from vllm_babai.format.checks import check_scales, check_shape
from vllm_babai.format.dense_sparse.overflow import (
    StoredOverflow,
    encode_overflow,
    read_header,
    read_overflow,
    tiling,
)
from vllm_babai.format.dense_sparse.packing import pack, packed_bytes, unpack
from vllm_babai.format.lattice import BIT_WIDTHS, MAX_INTEGER, LatticeWeight, integer_range
from vllm_babai.format.tiling import Tiling


@dataclass(frozen=True)
class SSQR(Format[LatticeWeight]):
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
    def encode(cls, weight: LatticeWeight, bits: int | None = None, linear: str = "") -> "SSQR":
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
        tiles = tiling(*weight.integers.shape)
        crcs = np.array(dense_crcs(qweight, scales, bits, tiles, range(tiles.count)), np.uint32)
        return cls(qweight, scales, encode_overflow(excess, bits, crcs, linear))

    def decode(self, shape: tuple[int, int] | None = None, linear: str = "") -> LatticeWeight:
        """The stored lattice point, see `Format.decode`."""
        header = read_header(self.overflow)
        check_shape((header.rows, header.columns), shape, "overflow")
        if self.qweight.shape[0] != header.rows or self.scales.shape[0] != header.rows:
            raise FormatError(
                f"overflow blob is of a layer with {header.rows} rows, but qweight has {self.qweight.shape[0]}"
                f" and scales {self.scales.shape[0]}"
            )
        dense = unpack(self.qweight, header.bits, header.columns)
        stored = read_overflow(self.overflow, shape, linear)
        check_dense(self.qweight, self.scales, stored, slice(0, header.rows), slice(0, header.columns))
        return LatticeWeight(stored.decode().added_to(dense), self.scales)

    @property
    def dense_range(self) -> tuple[int, int]:
        """Smallest and largest integer of the dense part. Raises FormatError."""
        return integer_range(read_header(self.overflow).bits)


def dense_crcs(qweight: Tensor, scales: Tensor, bits: int, tiles: Tiling, some: Sequence[int]) -> list[int]:
    """CRC-32 of the dense part of some tiles: of the bytes of qweight that hold its columns, then of their scales.

    Bytes and scales that a tile shares with its neighbour count in both.
    """
    stored, groups = qweight.numpy(), scales.view(torch.int16).numpy()  # numpy has no bfloat16
    per_row = groups.shape[1]

    def crc(index: int) -> int:
        tile = tiles.tile(index)
        rows, first, last = slice(tile.row_start, tile.row_stop), tile.column_start, tile.column_stop
        of_columns = slice(first * per_row // tiles.columns, -(-last * per_row // tiles.columns))
        dense = np.ascontiguousarray(stored[rows, first * bits // 8 : packed_bytes(last, bits)])
        return zlib.crc32(np.ascontiguousarray(groups[rows, of_columns]).data, zlib.crc32(dense.data))

    return parallel_map(crc, some)


def check_dense(qweight: Tensor, scales: Tensor, overflow: StoredOverflow, rows: slice, columns: slice) -> None:
    """Raise FormatError when a window of the dense part is damaged or holds scales that are none.

    All tiles that overlap the window are checked. In version 2 of the overflow blob that is possible for the whole
    linear alone; for a part of it nothing but its scales is.
    """
    header, whole = overflow.header, (slice(0, overflow.header.rows), slice(0, overflow.header.columns))
    if scales.dim() != 2 or not scales.shape[1]:
        raise FormatError(f"qweight or scales are corrupt: scales has shape {tuple(scales.shape)}")
    if overflow.dense_crcs is not None:
        tiles = header.overlapping(rows, columns)
        found = np.array(dense_crcs(qweight, scales, header.bits, header, tiles), np.uint32)
        damaged = np.flatnonzero(found != overflow.dense_crcs[tiles])
        if len(damaged):
            tile = header.tile(tiles[damaged[0]])
            raise FormatError(
                "qweight or scales are corrupt: their CRC does not match the overflow blob's "
                f"(rows {tile.row_start}…{tile.row_stop - 1}, columns {tile.column_start}…{tile.column_stop - 1})"
            )
    elif (rows, columns) == whole and _whole_crc(qweight, scales) != header.dense_crc:
        raise FormatError("qweight or scales are corrupt: their CRC does not match the overflow blob's")
    check_scales(scales[rows])


def _whole_crc(qweight: Tensor, scales: Tensor) -> int:
    crc = 0
    for part in (qweight, scales):
        crc = zlib.crc32(part.flatten().view(torch.uint8).numpy().data, crc)
    return crc
