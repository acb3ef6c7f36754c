"""Integers of any size → dense + sparse in memory, as fast as memory: what loading HPTQ to SSQR needs.

The same as `SSQR.encode` without the overflow blob. Importing this module imports numba: import it where it is used.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.overflow import Overflow
from vllm_babai.format.packing import BIT_WIDTHS, packed_bytes
from vllm_babai.format.parallel import parallel_map
from vllm_babai.format.rans import compiled

ROWS_AT_A_TIME = 64


def split(integers: Sequence[Tensor], overflow_rate: float) -> tuple[int, Tensor, Overflow]:
    """Matrices below each other, int16 [out, in] each, |z| ≤ 2¹⁵ − 1 → bits, dense part, overflow.

    bits: the smallest width of which less than `overflow_rate` of the weights overflow, or the largest there is.
    Dense part: uint8 [out, packed_bytes(in, bits)], see `format.packing`.
    """
    matrices = [np.ascontiguousarray(matrix.numpy()) for matrix in integers]
    first_rows = list(accumulate(map(len, matrices), initial=0))
    blocks = [
        (matrix[row : row + ROWS_AT_A_TIME], first_row + row)
        for matrix, first_row in zip(matrices, first_rows, strict=False)
        for row in range(0, len(matrix), ROWS_AT_A_TIME)
    ]
    widths = np.array(BIT_WIDTHS)
    counts = parallel_map(lambda block: count_overflow(block[0], widths), blocks)
    by_block = np.array(counts, np.int64).reshape(-1, len(widths))
    rows, columns = first_rows[-1], matrices[0].shape[1]
    small_enough = by_block.sum(0) < overflow_rate * rows * columns
    width = int(np.argmax(small_enough)) if small_enough.any() else len(widths) - 1
    bits, ends = BIT_WIDTHS[width], np.cumsum(by_block[:, width])

    packed = np.empty((rows, packed_bytes(columns, bits)), np.uint8)
    row, column, excess = (np.empty(ends[-1] if len(ends) else 0, np.int32) for _ in range(3))

    def pack(index: int) -> None:
        block, first_row = blocks[index]
        listed = slice(ends[index - 1] if index else 0, ends[index])
        split_rows(block, bits, packed[first_row:], row[listed], column[listed], excess[listed])
        row[listed] += first_row

    parallel_map(pack, range(len(blocks)))
    return bits, torch.from_numpy(packed), Overflow(*(torch.from_numpy(axis) for axis in (row, column, excess)))


@compiled
def count_overflow(integers, widths):
    """How many integers, int16 [rows, columns], do not fit each of `widths` bits, int64 [widths]."""
    counts = np.zeros(len(widths), np.int64)
    for row in range(len(integers)):
        for i in range(len(widths)):
            counts[i] += count_outside(integers[row], np.int16(1 << (widths[i] - 1)))
    return counts


@compiled
def split_rows(integers, bits, packed, row_index, column_index, excess):
    """Pack the rows of int16 [rows, columns], and list their overflow."""
    columns, half = integers.shape[1], 1 << (bits - 1)
    room = (columns + 7) // 8 * 8
    dense, beyond, words = np.full(room, half, np.uint8), np.zeros(room, np.uint8), np.empty(room // 8, np.uint64)
    octets, any_beyond = dense.view(np.uint64), beyond.view(np.uint64)
    position = 0
    for row in range(len(integers)):
        clamp(integers[row], np.int16(-half), np.int16(half - 1), dense, beyond)
        close_gaps(octets, np.uint64(bits), words)
        store(words, bits, packed[row])
        for octet in range(len(octets)):
            if any_beyond[octet]:
                for column in range(8 * octet, 8 * octet + 8):
                    if beyond[column]:
                        z = np.int64(integers[row, column])
                        row_index[position], column_index[position] = row, column
                        excess[position] = z - min(max(z, -half), half - 1)
                        position += 1


# Short loops that the compiler makes vector instructions of


@compiled
def count_outside(integers, limit):
    """How many integers are not in −limit … limit − 1."""
    outside = np.int32(0)
    for column in range(len(integers)):
        z = integers[column]
        outside = np.int32(outside + np.int32((z ^ (z >> np.int16(15))) >= limit))  # −z − 1 for negative z
    return outside


@compiled
def clamp(integers, low, high, dense, beyond):
    """Integers between `low` and `high`, as uint8 from 0 on, and whether they were beyond."""
    for column in range(len(integers)):
        z = integers[column]
        within = min(max(z, low), high)
        dense[column] = np.uint8(within - low)
        beyond[column] = np.uint8(within != z)


@compiled
def close_gaps(octets, bits, words):
    """Eight integers of `bits` bits, from a byte each to 8 · bits bits without gaps."""
    pairs = np.uint64(0x0001000100010001) * np.uint64((1 << (2 * bits)) - 1)
    fours = np.uint64(0x0000000100000001) * np.uint64((1 << (4 * bits)) - 1)
    for octet in range(len(octets)):
        word = octets[octet]
        word = (word | word >> (np.uint64(8) - bits)) & pairs
        word = (word | word >> (np.uint64(16) - 2 * bits)) & fours
        words[octet] = word | word >> (np.uint64(32) - 4 * bits)


@compiled
def store(words, bits, packed):
    """The lowest `bits` bytes of each word, as far as there is room."""
    for octet in range(len(words)):
        word, first = words[octet], octet * bits
        for byte in range(min(bits, len(packed) - first)):
            packed[first + byte] = np.uint8(word >> np.uint64(8 * byte))
