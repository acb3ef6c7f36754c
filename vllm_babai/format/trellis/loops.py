"""The compiled loops of the trellis form: symbols → words → values. Importing this module imports numba.

A tile is TILE_ROWS rows by TILE_COLUMNS columns, TILE_COLUMNS / 2 pairs of b bits. A row's part of it is just b words
of 32 bits, most significant bit first, stored as [b, TILE_ROWS]: a vector of rows reads one word of each. The state
after a pair is the 32 bits that end with it, so it is cut out of two neighbouring words; the one before a tile's first
is the last word of the tile to its left.
"""

import numpy as np

from vllm_babai.compiled import compiled
from vllm_babai.format.trellis.code import MASK, TILE_COLUMNS, TILE_ROWS, UNIT

PAIRS = TILE_COLUMNS // 2

HALF_MASK = np.int32(MASK & 0xFFFF)
UNIT32 = np.float32(UNIT)


@compiled
def half(pattern):
    """The fp16 number of which the low 16 bits of an int32 are the pattern, masked, over UNIT; float32."""
    masked = pattern & HALF_MASK
    exponent = (masked >> np.int32(10)) & np.int32(3)
    normal = np.int32(exponent > np.int32(0))
    size = ((masked & np.int32(1023)) + normal * np.int32(1024)) << np.int32(exponent - normal)
    return np.float32(size) * np.float32(np.int32(1) - ((masked >> np.int32(14)) & np.int32(2)))


@compiled
def pack_block(symbols, rates, words):
    """Words of a block of rows, from tile to tile.

    symbols: uint16 [TILE_ROWS, pairs], 0 beyond the last column. rates: uint8 [tiles]. words: uint32 [Σ rates ·
    TILE_ROWS], to fill.
    """
    start = np.int64(0)
    for tile in range(len(rates)):
        bits = np.int64(rates[tile])
        for row in range(TILE_ROWS):
            buffer, held, at = np.uint64(0), np.int64(0), start + row
            for pair in range(tile * PAIRS, (tile + 1) * PAIRS):
                buffer = (buffer << np.uint64(bits)) | np.uint64(symbols[row, pair])
                held += bits
                if held >= 32:
                    held -= 32
                    words[at] = np.uint32(buffer >> np.uint64(held))
                    at += TILE_ROWS
        start += bits * TILE_ROWS


@compiled
def decode_block(words, before, rates, multipliers, scales, weight):
    """weight[row, column] = scale · value, float32 [TILE_ROWS, TILE_COLUMNS · tiles].

    words: uint32, of the block's tiles. before: uint32 [TILE_ROWS], the word before the first tile.
    multipliers: by the bits of a pair; an argument, as numba's cache would keep an older module's. scales: float32
    [TILE_ROWS].
    """
    last, start = before.copy(), np.int64(0)
    for tile in range(len(rates)):
        bits = np.int64(rates[tile])
        multiplier = multipliers[bits]
        for row in range(TILE_ROWS):
            scale = scales[row] * UNIT32
            previous, at, shift = last[row], start + row, bits
            for pair in range(PAIRS):
                state = previous
                if shift < 32:
                    state = np.uint32(previous << np.uint32(shift)) | (words[at] >> np.uint32(32 - shift))
                else:
                    previous = state = words[at]
                    at += TILE_ROWS
                    shift -= 32
                    if shift:
                        state = np.uint32(previous << np.uint32(shift)) | (words[at] >> np.uint32(32 - shift))
                word = np.int32(np.uint32(state * multiplier))
                column = tile * TILE_COLUMNS + 2 * pair
                weight[row, column] = half(word) * scale
                weight[row, column + 1] = half(word >> np.int32(16)) * scale
                shift += bits
            last[row] = words[start + (bits - 1) * TILE_ROWS + row]
        start += bits * TILE_ROWS
