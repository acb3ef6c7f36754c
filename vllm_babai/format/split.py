"""Integers of any size → dense + sparse in memory, as fast as memory: what loading HPTQ to SSQR needs.

The same as `SSQR.encode` without the overflow blob. Importing this module imports numba: import it where it is used.
"""

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.overflow import Overflow
from vllm_babai.format.packing import BIT_WIDTHS, packed_bytes
from vllm_babai.format.parallel import parallel_map
from vllm_babai.format.rans import compiled

ROWS_AT_A_TIME = 64


def split(integers: Tensor, overflow_rate: float) -> tuple[int, Tensor, Overflow]:
    """Integers, int16 [out, in], |z| ≤ 2¹⁵ − 1 → bits, dense part, overflow.

    bits: the smallest width of which less than `overflow_rate` of the weights overflow, or the largest there is.
    Dense part: uint8 [out, packed_bytes(in, bits)], see `format.packing`.
    """
    matrix = np.ascontiguousarray(integers.numpy())
    rows, columns = matrix.shape
    blocks = [(first, min(first + ROWS_AT_A_TIME, rows)) for first in range(0, rows, ROWS_AT_A_TIME)]
    widths = np.array(BIT_WIDTHS)
    counts = parallel_map(lambda block: count_overflow(matrix, *block, widths), blocks)
    by_block = np.array(counts, np.int64).reshape(-1, len(widths))
    small_enough = by_block.sum(0) < overflow_rate * matrix.size
    width = int(np.argmax(small_enough)) if small_enough.any() else len(widths) - 1
    bits, ends = BIT_WIDTHS[width], np.cumsum(by_block[:, width])

    packed = np.empty((rows, packed_bytes(columns, bits)), np.uint8)
    row, column, excess = (np.empty(ends[-1] if len(ends) else 0, np.int32) for _ in range(3))

    def pack(index: int) -> None:
        position = ends[index - 1] if index else 0
        split_rows(matrix, *blocks[index], bits, packed, row, column, excess, position)

    parallel_map(pack, range(len(blocks)))
    return bits, torch.from_numpy(packed), Overflow(*(torch.from_numpy(axis) for axis in (row, column, excess)))


@compiled
def count_overflow(integers, first, last, widths):
    """How many integers of rows first … last − 1 do not fit each of `widths` bits, int64 [widths]."""
    counts = np.zeros(len(widths), np.int64)
    for row in range(first, last):
        for i in range(len(widths)):
            limit, outside = np.int16(1 << (widths[i] - 1)), 0
            for column in range(integers.shape[1]):
                z = integers[row, column]
                outside += (z ^ (z >> 15)) >= limit  # −z − 1 for negative z
            counts[i] += outside
    return counts


@compiled
def split_rows(integers, first, last, bits, packed, row_index, column_index, excess, position):
    """Pack rows first … last − 1, and list their overflow from `position` on."""
    half = 1 << (bits - 1)
    columns = integers.shape[1]
    for row in range(first, last):
        for octet in range((columns + 7) // 8):
            start, word, fits = 8 * octet, np.uint64(0), True
            for i in range(8):
                z = np.int64(integers[row, start + i]) if start + i < columns else 0
                dense = min(max(z, -half), half - 1)
                fits &= dense == z
                word |= np.uint64(dense + half) << np.uint64(bits * i)
            for byte in range(octet * bits, min((octet + 1) * bits, packed.shape[1])):
                packed[row, byte] = word & np.uint64(0xFF)
                word >>= np.uint64(8)
            if not fits:
                for column in range(start, min(start + 8, columns)):
                    z = np.int64(integers[row, column])
                    dense = min(max(z, -half), half - 1)
                    if dense != z:
                        row_index[position], column_index[position], excess[position] = row, column, z - dense
                        position += 1
