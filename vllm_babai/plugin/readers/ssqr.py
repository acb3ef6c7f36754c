"""SSQR → dense + sparse, by slicing: what the checkpoint stores is what the rank holds."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from vllm_babai.format import BIT_WIDTHS, SSQR, FormatError, Overflow, decode_overflow, packed_bytes, read_header
from vllm_babai.format.dense_sparse.ssqr import dense_crc
from vllm_babai.plugin.readers.reader import Reader, StoredLinear, check_shape
from vllm_babai.plugin.residency import PackedWeight


class SSQRReader(Reader[PackedWeight, PackedWeight]):
    """Reads SSQR; a piece is a weight of its own."""

    form = SSQR
    residency = "packed"

    @property
    def bits(self) -> int:
        """Of the dense part. Raises FormatError for a width that this version does not know."""
        if self.scheme.bits not in BIT_WIDTHS:
            raise FormatError(f"bit width {self.scheme.bits} is unknown; this version reads {BIT_WIDTHS}")
        return self.scheme.bits

    @property
    def column_multiple(self) -> int:
        """Columns that begin with a whole byte and a whole group."""
        whole_bytes = 8 // math.gcd(8, self.bits)
        return whole_bytes if self.scheme.group_size == -1 else math.lcm(whole_bytes, self.scheme.group_size)

    def read(self, linear: StoredLinear) -> list[PackedWeight]:
        """See `Reader`. The CRC of the dense part is checked where the rank takes all of it."""
        qweight, scales, blob = (linear.tensors[name] for name in ("qweight", "scales", "overflow"))
        bits, (rows, columns) = self.bits, linear.shape
        header = read_header(blob)
        if (header.rows, header.columns, header.bits) != (rows, columns, bits):
            raise FormatError(
                f"the layer is {rows} × {columns} with {bits} bits, "
                f"but overflow is of {header.rows} × {header.columns} with {header.bits} bits"
            )
        check_shape("qweight", qweight, (rows, packed_bytes(columns, bits)))
        check_shape("scales", scales, (rows, self.scheme.groups(columns)))
        if linear.taken_whole and dense_crc(qweight, scales) != header.dense_crc:
            raise FormatError("qweight or scales are corrupt: their CRC does not match the one in overflow")
        weights = []
        for window in linear.windows:
            first, last = window.columns.start, window.columns.stop
            packed = slice(first * bits // 8, packed_bytes(last, bits))
            overflow = decode_overflow(blob, *window)
            scales_of_window = scales[window.rows, self.groups(window)]
            weights.append(PackedWeight(bits, qweight[window.rows, packed], scales_of_window, overflow))
        return weights

    def dummy(self, rows: int, columns: int) -> PackedWeight:
        """See `Reader`."""
        return PackedWeight.dummy(self.bits, rows, columns, self.scheme.groups(columns))

    def stack(self, pieces: Sequence[PackedWeight]) -> PackedWeight:
        """Linears of the same bits below each other."""
        first_rows = accumulate((len(w.qweight) for w in pieces), initial=0)
        overflow = Overflow(
            torch.cat([w.overflow.rows + first for w, first in zip(pieces, first_rows, strict=False)]),
            torch.cat([w.overflow.columns for w in pieces]),
            torch.cat([w.overflow.excess for w in pieces]),
        )
        qweight, scales = torch.cat([w.qweight for w in pieces]), torch.cat([w.scales for w in pieces])
        return PackedWeight(self.bits, qweight, scales, overflow)
