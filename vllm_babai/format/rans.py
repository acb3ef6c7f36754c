"""Interleaved rANS over a tile of integers: the compiled loops of HPTQ's entropy code.

A tile is coded row by row. Step by step `lanes` consecutive columns are decoded, each lane with a state of its own and
all lanes from one stream of 16-bit words: after its symbol a lane whose state fell below 2¹⁶ takes the next word, and
after that a lane whose symbol was ESCAPE takes its integer. Words are taken in the order of the lanes, so that a warp
of a GPU finds its own by a prefix sum, and a CPU by one pointer. The stream starts with the states, low word first.
Every state starts (in the decoder: ends) at 2¹⁶, which tells a good stream from a bad one.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392.
Importing this module imports numba: import it where it is used.
"""

from typing import Any

import numpy as np
from numba import njit

from vllm_babai.format.tables import CENTRE, ESCAPE, PRECISION, TOTAL

INITIAL_STATE = 1 << 16


def compiled(function: Any) -> Any:
    """Compile without the GIL, cached on disk where any cache directory can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: no directory for the cache
        return njit(nogil=True)(function)


@compiled
def histogram(integers, row_class, column_class, offset, shift, first, last, counts):
    """Add the symbols of rows first … last − 1 to counts, int64 [contexts, ESCAPE + 1]."""
    for row in range(first, last):
        for column in range(integers.shape[1]):
            symbol = ((np.int64(integers[row, column]) - offset) >> shift) + CENTRE
            if symbol < 0 or symbol >= ESCAPE:
                symbol = ESCAPE
            counts[row_class[row] + column_class[column], symbol] += 1


@compiled
def encode_tile(integers, tile, row_class, column_class, packed, offset, shift, lanes):
    """The stream of one tile, uint16 [words].

    integers: int16 [rows, columns]. tile: row start, row stop, column start, column stop. row_class, column_class:
    int32, their sum is the context. packed: see `tables.encoder_table`.
    """
    row_start, row_stop, column_start, column_stop = tile
    precision = np.uint64(PRECISION + shift)
    low_mask = (1 << shift) - 1
    state = np.full(lanes, INITIAL_STATE, np.uint64)
    words = np.empty(2 * (row_stop - row_start) * (column_stop - column_start) + 2 * lanes, np.uint16)
    position = len(words)
    steps = (column_stop - column_start + lanes - 1) // lanes
    for row in range(row_stop - 1, row_start - 1, -1):
        for step in range(steps - 1, -1, -1):
            start = column_start + step * lanes
            for lane in range(min(lanes, column_stop - start) - 1, -1, -1):
                integer = np.int64(integers[row, start + lane])
                value = integer - offset
                context = row_class[row] + column_class[start + lane]
                symbol = (value >> shift) + CENTRE
                if symbol < 0 or symbol >= ESCAPE or packed[context, symbol] & 0xFFFF == 0:
                    symbol = ESCAPE
                    position -= 1
                    words[position] = integer & 0xFFFF
                entry = packed[context, symbol]
                frequency = np.uint64(entry & 0xFFFF)
                x = state[lane]
                if x >= frequency << (np.uint64(32) - precision):
                    position -= 1
                    words[position] = x & np.uint64(0xFFFF)
                    x >>= np.uint64(16)
                slot = x % frequency + np.uint64(entry >> 16)
                state[lane] = (x // frequency << precision) | (slot << np.uint64(shift)) | np.uint64(value & low_mask)
    for lane in range(lanes - 1, -1, -1):
        position -= 2
        words[position] = state[lane] & np.uint64(0xFFFF)
        words[position + 1] = state[lane] >> np.uint64(16)
    return words[position:].copy()


@compiled
def decode_tile(words, begin, end, tile, row_class, column_class, lut, offset, shift, lanes, out):
    """Decode words begin … end − 1 into out[tile], int16; False when they are no valid stream.

    words: uint16, with 2 · lanes words or more behind `end`. lut: see `tables.decoder_table`. The other arguments are
    those of `encode_tile`.
    """
    row_start, row_stop, column_start, column_stop = tile
    if end - begin < 2 * lanes:
        return False
    state = np.empty(lanes, np.uint32)
    for lane in range(lanes):
        state[lane] = np.uint32(words[begin + 2 * lane]) | (np.uint32(words[begin + 2 * lane + 1]) << np.uint32(16))
    position = begin + 2 * lanes
    # numba widens mixed integers to 64 bits: every constant below is cast so that the loop stays in 32
    precision, narrow = np.uint32(PRECISION + shift), np.uint32(shift)
    mask = np.uint32((1 << (PRECISION + shift)) - 1)
    low_mask, field = np.uint32((1 << shift) - 1), np.uint32(TOTAL - 1)
    for row in range(row_start, row_stop):
        for start in range(column_start, column_stop, lanes):
            if position > end:
                return False
            for lane in range(min(lanes, column_stop - start)):
                x = state[lane]
                table = np.uint32(np.uint32(row_class[row] + column_class[start + lane]) << np.uint32(PRECISION))
                entry = lut[np.uint32(table + ((x & mask) >> narrow))]
                symbol = np.int32(entry >> np.uint32(24))
                out[row, start + lane] = np.int16(((symbol - CENTRE) << shift) + np.int32(x & low_mask) + offset)
                frequency = np.uint32((entry & field) + np.uint32(1))
                inside = np.uint32((entry >> np.uint32(PRECISION)) & field)
                x = np.uint32(np.uint32(frequency * np.uint32(x >> precision)) + inside)
                # the word is read whether needed or not: a choice of values does not stall where a branch would
                word = np.uint32(words[position])
                needs_word = x < np.uint32(INITIAL_STATE)
                state[lane] = np.uint32((x << np.uint32(16)) | word) if needs_word else x
                position += np.int64(needs_word)
                if symbol == ESCAPE:
                    out[row, start + lane] = np.int16(words[position])
                    position += 1
    valid = position == end
    for lane in range(lanes):
        valid &= state[lane] == INITIAL_STATE
    return valid


def padded(words: np.ndarray, lanes: int) -> np.ndarray:
    """A writable copy of a stream, uint16, with the room behind it that `decode_tile` asks for."""
    return np.concatenate((words, np.zeros(2 * lanes, np.uint16)))
