"""Interleaved rANS over a tile of integers: the compiled loops of HPTQ's entropy code.

A tile is coded row by row. Step by step `lanes` consecutive columns are decoded, each lane with a state of its own and
all lanes from one stream of 16-bit words: after its symbol a lane whose state fell below 2¹⁶ takes the next word, and
after that a lane whose symbol was ESCAPE takes its integer. Words are taken in the order of the lanes, so that a warp
of a GPU finds its own by a prefix sum, and a CPU by one pointer. The stream starts with the states, low word first.
Every state starts (in the decoder: ends) at 2¹⁶, which tells a good stream from a bad one.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392.
Importing this module imports numba: import it where it is used.
"""

import numpy as np

from vllm_babai.compiled import compiled
from vllm_babai.format.entropy.rans_vector import LANES as VECTOR
from vllm_babai.format.entropy.rans_vector import decode_vector
from vllm_babai.format.entropy.tables import CENTRE, ESCAPE, PRECISION, TOTAL

INITIAL_STATE = 1 << 16
u32, u64 = np.uint32, np.uint64


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
def decode_rows(words, position, end, state, row_class, column_class, lut, offset, shift, out, top, left):
    """Decode rows of a tile from `position` in words on: the position behind them, or −1 when it is beyond `end`.

    words: uint16, with 2 · lanes words or more behind `end`. state: uint32 [lanes], changed in place. row_class,
    column_class: int32 [rows], [columns] of what is decoded, their sum is the context. lut: see `tables.decoder_table`.
    out: int16; takes the rows at `top`, `left`.
    """
    columns, lanes = len(column_class), len(state)
    narrow, centre = u32(shift), u32(offset - (CENTRE << shift))  # centre: the integer of symbol 0
    entries = np.empty(lanes, np.uint32)
    for row in range(len(row_class)):
        context, integers = u32(row_class[row]), out[top + row][left:]
        for column in range(0, columns, lanes):
            if position > end:
                return -1
            lane, active = 0, min(lanes, columns - column)
            while lane + VECTOR <= active:
                at = decode_vector(
                    words, position, state, context, column_class, lut, narrow, centre, integers, lane, column + lane
                )
                if at < 0:
                    break
                position, lane = at, lane + VECTOR
            if lane < active:
                some, first = (u64(lane), u64(active)), u64(column)
                look_up(some, state, context, column_class, first, lut, narrow, entries)
                advance(some, state, entries, centre, narrow, integers, first)
                position = np.int64(refill(some, state, entries, words, u64(position), integers, first))
    return position


# Where there is no `decode_vector`, three loops over some lanes, not one: the compiler makes vector instructions of the
# one in the middle. For the sake of speed, numba is kept from widening integers to 64 bits, by casts; from asking
# whether an index is negative, by unsigned ones; and from counting references, as slices would make it do.


@compiled
def look_up(some, state, context, column_class, first, lut, narrow, entries):
    """Entries of the table that the states point to."""
    for lane in range(some[0], some[1]):
        table = u32(u32(context + u32(column_class[first + lane])) << u32(PRECISION))
        entries[lane] = lut[u32(table + u32(u32(state[lane] >> narrow) & u32(TOTAL - 1)))]


@compiled
def advance(some, state, entries, centre, narrow, integers, first):
    """The integers of these entries, and the states behind them."""
    low_mask, precision = u32(u32(u32(1) << narrow) - u32(1)), u32(narrow + u32(PRECISION))
    for lane in range(some[0], some[1]):
        entry, x = entries[lane], state[lane]
        integers[first + lane] = np.int16(u32(u32(u32(entry >> u32(24)) << narrow) + u32(x & low_mask)) + centre)
        frequency = u32(u32(entry & u32(TOTAL - 1)) + u32(1))
        inside = u32(u32(entry >> u32(PRECISION)) & u32(TOTAL - 1))
        state[lane] = u32(u32(frequency * u32(x >> precision)) + inside)


@compiled
def refill(some, state, entries, words, position, integers, first):
    """Take the words that states need, and the integers that were escaped: the position behind those."""
    for lane in range(some[0], some[1]):
        x = state[lane]
        # the word is read whether needed or not: a choice of values does not stall where a branch would
        refilled, needs_word = u32(x << u32(16)) | u32(words[position]), x < u32(INITIAL_STATE)
        state[lane] = refilled if needs_word else x
        position += u64(needs_word)
        if entries[lane] >= u32(ESCAPE << 24):
            integers[first + lane] = np.int16(words[position])
            position += u64(1)
    return position


@compiled
def first_state(words, begin, lanes):
    """States at the head of a stream, uint32 [lanes]."""
    state = np.empty(lanes, np.uint32)
    for lane in range(lanes):
        state[lane] = u32(words[begin + 2 * lane]) | (u32(words[begin + 2 * lane + 1]) << u32(16))
    return state


@compiled
def is_end(position, end, state):
    """Whether a good stream ends here, with these states."""
    return position == end and (state == u32(INITIAL_STATE)).all()


@compiled
def decode_tile(words, begin, end, tile, row_class, column_class, lut, offset, shift, lanes, out):
    """Decode words begin … end − 1 into out[tile], int16; False when they are no valid stream.

    words: uint16, with 2 · lanes words or more behind `end`. lut: see `tables.decoder_table`. The other arguments are
    those of `encode_tile`.
    """
    row_start, row_stop, column_start, column_stop = tile
    if end - begin < 2 * lanes:
        return False
    state = first_state(words, begin, lanes)
    rows, columns = row_class[row_start:row_stop], column_class[column_start:column_stop]
    position = begin + 2 * lanes
    position = decode_rows(words, position, end, state, rows, columns, lut, offset, shift, out, row_start, column_start)
    return is_end(position, end, state)


@compiled
def seek_rows(words, begin, end, row_class, column_class, lut, offset, shift, lanes, cuts, positions, states):
    """Decode a tile, words begin … end − 1, to note where decoding could start again; False when it is no valid stream.

    row_class, column_class: of the tile. cuts: int64, some of its rows, ascending. positions: int64 [cuts] and states:
    uint32 [cuts, lanes or more] take what the decoder has in front of those rows. The rest is as in `decode_rows`.
    """
    if end - begin < 2 * lanes:
        return False
    state, position, row = first_state(words, begin, lanes), begin + 2 * lanes, 0
    unused = np.empty((len(row_class), len(column_class)), np.int16)
    for cut in range(len(cuts)):
        rows = row_class[row : cuts[cut]]
        position = decode_rows(words, position, end, state, rows, column_class, lut, offset, shift, unused, 0, 0)
        if position < 0:
            return False
        positions[cut], states[cut, :lanes], row = position, state, cuts[cut]
    position = decode_rows(words, position, end, state, row_class[row:], column_class, lut, offset, shift, unused, 0, 0)
    return is_end(position, end, state)


@compiled
def decode_segments(words, table, states, row_class, column_class, lut, out):
    """Decode segments into out, int16 [rows, columns]; the other arguments are as in `segments.Segments`.

    words: with 2 · lanes words or more behind the streams.
    """
    for index in range(len(table)):
        segment = table[index]
        state, end = states[index, : segment.lanes].copy(), len(words) - 2 * segment.lanes
        rows = row_class[segment.row : segment.row + segment.rows]
        columns = column_class[segment.classes : segment.classes + segment.columns]
        integers = np.empty((len(rows), len(columns)), np.int16)
        code = lut, segment.offset, segment.shift
        decode_rows(words, np.int64(segment.word), end, state, rows, columns, *code, integers, 0, 0)
        first, last = max(segment.column, 0), min(segment.column + segment.columns, out.shape[1])
        inside = integers[:, first - segment.column : last - segment.column]
        out[segment.row : segment.row + len(rows), first:last] = inside


def padded(words: np.ndarray, lanes: int) -> np.ndarray:
    """A writable copy of a stream, uint16, with the room behind it that `decode_tile` asks for."""
    return np.concatenate((words, np.zeros(2 * lanes, np.uint16)))
