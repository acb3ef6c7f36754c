"""Integers of any size → dense part and overflow, at the speed of memory: how HPTQ is loaded as dense + sparse.

The result is that of `SSQR.encode`, without the overflow blob. Importing this module imports numba, which takes a
second: import it where it is used.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_babai.compiled import compiled, parallel_map
from vllm_babai.format.dense_sparse.overflow import Overflow
from vllm_babai.format.dense_sparse.packing import packed_bytes
from vllm_babai.format.lattice import BIT_WIDTHS

WIDTHS = np.array(BIT_WIDTHS)
SAMPLE = 16  # every 16th band is counted to guess the width; a choice that was not measured


class Band(NamedTuple):
    """Consecutive rows of a matrix. integers() returns int16 [rows, in], |z| ≤ 2¹⁵ − 1; it is called more than once."""

    rows: int
    integers: Callable[[], np.ndarray]


def split(bands: Sequence[Band], columns: int, most_overflow: float) -> tuple[int, Tensor, Overflow]:
    """Bands stacked by rows, all of `columns` columns → bits, dense part, overflow.

    bits: the smallest width at which less than `most_overflow` (a share of the weights) overflows, else the largest.
    Dense part: uint8 [out, packed_bytes(in, bits)], see `vllm_babai.format.dense_sparse.packing`.

    Each band is packed while it is in the cache, at the width that a sample of the bands needs. If all bands together
    turn out to need another width, which is rare, they are packed again.
    """
    sample = bands[::SAMPLE]
    counts = parallel_map(lambda band: count_overflow(band.integers(), WIDTHS), sample)
    bits = _smallest_width(counts, columns * sum(band.rows for band in sample), most_overflow)
    counts, packed, overflow = _pack(bands, columns, bits)
    needed = _smallest_width(counts, columns * len(packed), most_overflow)
    if needed != bits:
        _, packed, overflow = _pack(bands, columns, needed)
    return needed, torch.from_numpy(packed), overflow


def _smallest_width(counts: Sequence[np.ndarray], weights: int, most_overflow: float) -> int:
    small_enough = np.sum(counts, axis=0) < most_overflow * weights
    return BIT_WIDTHS[int(np.argmax(small_enough))] if small_enough.any() else BIT_WIDTHS[-1]


def _pack(bands: Sequence[Band], columns: int, bits: int) -> tuple[list[np.ndarray], np.ndarray, Overflow]:
    """How many integers of each band overflow each width, the dense part, and the overflow."""
    *first_rows, rows = accumulate((band.rows for band in bands), initial=0)
    packed = np.empty((rows, packed_bytes(columns, bits)), np.uint8)

    def pack(band: Band, first_row: int) -> tuple[np.ndarray, np.ndarray]:
        integers = band.integers()
        counts = count_overflow(integers, WIDTHS)
        overflow = np.empty((3, counts[BIT_WIDTHS.index(bits)]), np.int32)
        split_rows(integers, bits, packed[first_row:], *overflow)
        overflow[0] += first_row
        return counts, overflow

    results = parallel_map(lambda band: pack(*band), zip(bands, first_rows, strict=True))
    counts, overflows = zip(*results, strict=True)
    overflow = Overflow(*(torch.from_numpy(axis) for axis in np.concatenate(overflows, axis=1)))
    return list(counts), packed, overflow


@compiled
def count_overflow(integers, widths):
    """How many of the integers, int16 [rows, columns], overflow each of `widths` (bits): int64 [widths]."""
    counts = np.zeros(len(widths), np.int64)
    for row in range(len(integers)):
        for i in range(len(widths)):
            counts[i] += count_outside(integers[row], np.int16(1 << (widths[i] - 1)))
    return counts


@compiled
def split_rows(integers, bits, packed, row_index, column_index, excess):
    """Pack int16 [rows, columns] into `packed`, and list the overflow in the last three arguments, int32 [entries]."""
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


# Short loops, which the compiler turns into vector instructions


@compiled
def count_outside(integers, limit):
    """How many integers lie outside −limit … limit − 1."""
    outside = np.int32(0)
    for column in range(len(integers)):
        z = integers[column]
        outside = np.int32(outside + np.int32((z ^ (z >> np.int16(15))) >= limit))  # −z − 1 for negative z
    return outside


@compiled
def clamp(integers, low, high, dense, beyond):
    """Clamp to low … high: `dense` gets the result minus `low`, uint8, `beyond` whether it was clamped."""
    for column in range(len(integers)):
        z = integers[column]
        within = min(max(z, low), high)
        dense[column] = np.uint8(within - low)
        beyond[column] = np.uint8(within != z)


@compiled
def close_gaps(octets, bits, words):
    """Each word holds eight integers of `bits` bits, one per byte: move them together into its lowest 8 · bits bits."""
    one = np.uint64(0x0001000100010001) * np.uint64((1 << bits) - 1)  # the lower of two neighbours
    two = np.uint64(0x0000000100000001) * np.uint64((1 << (2 * bits)) - 1)
    four = np.uint64((1 << (4 * bits)) - 1)
    for octet in range(len(octets)):
        word = octets[octet]
        word = word & one | (word >> (np.uint64(8) - bits)) & (one << bits)
        word = word & two | (word >> (np.uint64(16) - 2 * bits)) & (two << 2 * bits)
        words[octet] = word & four | (word >> (np.uint64(32) - 4 * bits)) & (four << 4 * bits)


@compiled
def store(words, bits, packed):
    """Write the lowest `bits` bytes of each word to `packed`, eight at a time where there is room: one instruction."""
    whole = max(0, (len(packed) - 8) // bits + 1)
    for octet in range(whole):
        word, first = words[octet], np.uint64(octet * bits)
        for byte in range(np.uint64(8)):
            packed[first + byte] = np.uint8(word >> (np.uint64(8) * byte))
    for octet in range(whole, len(words)):
        word, first = words[octet], np.uint64(octet * bits)
        for byte in range(np.uint64(min(bits, len(packed) - octet * bits))):
            packed[first + byte] = np.uint8(word >> (np.uint64(8) * byte))
