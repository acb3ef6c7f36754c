"""SSQR → dense + sparse, by slicing: what the checkpoint stores is what the rank holds."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from vllm_babai.format import BIT_WIDTHS, SSQR, FormatError, Overflow, packed_bytes, read_header
from vllm_babai.format.dense_sparse.overflow import read_overflow
from vllm_babai.format.dense_sparse.ssqr import check_dense
from vllm_babai.plugin.readers.reader import Reader, StoredLinear, Window, check_shape
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
        """See `Reader`. Every tile of the dense part that a window touches is checked against its CRC.

        Blobs of version 2 have one CRC, which is checked where the rank takes the whole linear.
        """
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
        stored = read_overflow(blob, linear.shape, linear.name)
        for window in [Window(slice(0, rows), slice(0, columns))] if linear.taken_whole else linear.windows:
            check_dense(qweight, scales, stored, *window)
        weights = []
        for window in linear.windows:
            first, last = window.columns.start, window.columns.stop
            packed = slice(first * bits // 8, packed_bytes(last, bits))
            overflow = stored.decode(*window)
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
