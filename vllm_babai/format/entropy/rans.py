"""Interleaved rANS over a tile of integers: the compiled loops of HPTQ's entropy code.

A tile is coded row by row. In each step `lanes` consecutive columns are decoded. Every lane has a state of its own, and
all lanes read one stream of 16-bit words: after its symbol a lane whose state fell below 2¹⁶ takes the next word, then
a lane whose symbol was ESCAPE takes its integer from the next word. Words are taken in the order of the lanes, so that
a warp of a GPU finds its own by a prefix sum, and a CPU by one pointer. The stream starts with the states, low word
first. Every state starts at 2¹⁶ in the encoder and therefore ends there in the decoder, which tells a good stream from
a damaged one. The README of `vllm_babai/format` has the arithmetic of one step.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392.
Importing this module imports numba: import it where it is used.
"""

from typing import NamedTuple

import numpy as np

from vllm_babai.compiled import compiled
from vllm_babai.format.entropy.classes import Classes
from vllm_babai.format.entropy.code import Code, Stream
from vllm_babai.format.entropy.rans_vector import LANES as VECTOR
from vllm_babai.format.entropy.rans_vector import decode_vector
from vllm_babai.format.entropy.tables import CENTRE, ESCAPE, PRECISION, TOTAL

INITIAL_STATE = 1 << 16
u32, u64 = np.uint32, np.uint64


class Row(NamedTuple):
    """One row while it is decoded.

    context: class of the row. columns: int32 [columns], classes of the columns. integers: int16, takes them.
    """

    context: np.uint32
    columns: np.ndarray
    integers: np.ndarray


class Lookup(NamedTuple):
    """A `Code` as the inner loops use it. narrow: its shift. centre: the integer of symbol 0."""

    table: np.ndarray
    narrow: np.uint32
    centre: np.uint32


@compiled
def histogram(integers, classes, offset, shift, first, last, counts):
    """Add the symbols of rows first … last − 1 to counts, int64 [contexts, ESCAPE + 1]."""
    for row in range(first, last):
        for column in range(integers.shape[1]):
            symbol = ((np.int64(integers[row, column]) - offset) >> shift) + CENTRE
            if symbol < 0 or symbol >= ESCAPE:
                symbol = ESCAPE
            counts[classes.rows[row] + classes.columns[column], symbol] += 1


@compiled
def encode_tile(integers, tile, classes, code):
    """The stream of one tile, uint16 [words].

    integers: int16 [rows, columns]. tile: `Tile`. classes: `Classes` of the matrix. code: `Code` with an encoder table.
    """
    table, offset, lanes = code.table, code.offset, code.lanes
    shift, precision = np.uint64(code.shift), np.uint64(PRECISION + code.shift)
    low_mask = (1 << code.shift) - 1
    state = np.full(lanes, INITIAL_STATE, np.uint64)
    words = np.empty(
        2 * (tile.row_stop - tile.row_start) * (tile.column_stop - tile.column_start) + 2 * lanes, np.uint16
    )
    position = len(words)
    steps = (tile.column_stop - tile.column_start + lanes - 1) // lanes
    for row in range(tile.row_stop - 1, tile.row_start - 1, -1):
        for step in range(steps - 1, -1, -1):
            start = tile.column_start + step * lanes
            for lane in range(min(lanes, tile.column_stop - start) - 1, -1, -1):
                integer = np.int64(integers[row, start + lane])
                value = integer - offset
                context = classes.rows[row] + classes.columns[start + lane]
                symbol = (value >> code.shift) + CENTRE
                if symbol < 0 or symbol >= ESCAPE or table[context, symbol] & 0xFFFF == 0:
                    symbol = ESCAPE
                    position -= 1
                    words[position] = integer & 0xFFFF
                entry = table[context, symbol]
                frequency = np.uint64(entry & 0xFFFF)
                x = state[lane]
                if x >= frequency << (np.uint64(32) - precision):
                    position -= 1
                    words[position] = x & np.uint64(0xFFFF)
                    x >>= np.uint64(16)
                slot = x % frequency + np.uint64(entry >> 16)
                state[lane] = (x // frequency << precision) | (slot << shift) | np.uint64(value & low_mask)
    for lane in range(lanes - 1, -1, -1):
        position -= 2
        words[position] = state[lane] & np.uint64(0xFFFF)
        words[position + 1] = state[lane] >> np.uint64(16)
    return words[position:].copy()


@compiled
def decode_rows(stream, position, state, classes, code, out, top, left):
    """Decode rows of a tile from `position` in a stream on: the position after them, or −1 when it is beyond its end.

    stream: `Stream`. state: uint32 [lanes], changed in place. classes: `Classes` of what is decoded, no more. code:
    `Code` with a decoder table. out: int16, takes the rows at `top`, `left`.
    """
    words, end, row_class, column_class, table = stream.words, stream.end, classes.rows, classes.columns, code.table
    columns, lanes = len(column_class), len(state)
    narrow, centre = u32(code.shift), u32(code.offset - (CENTRE << code.shift))
    lookup, entries = Lookup(table, narrow, centre), np.empty(lanes, np.uint32)
    for index in range(len(row_class)):
        context, integers = u32(row_class[index]), out[top + index][left:]
        row = Row(context, column_class, integers)
        for column in range(0, columns, lanes):
            if position > end:
                return -1
            lane, active = 0, min(lanes, columns - column)
            while lane + VECTOR <= active:
                at = decode_vector(words, position, state, row, lookup, lane, column + lane)
                if at < 0:
                    break
                position, lane = at, lane + VECTOR
            if lane < active:
                some, first = (u64(lane), u64(active)), u64(column)
                look_up(some, state, context, column_class, first, table, narrow, entries)
                advance(some, state, entries, centre, narrow, integers, first)
                position = np.int64(refill(some, state, entries, words, u64(position), integers, first))
    return position


# Where `decode_vector` cannot run, three loops over some lanes, not one: the compiler makes vector instructions of the
# one in the middle. For the sake of speed, numba is kept from widening integers to 64 bits, by casts; from asking
# whether an index is negative, by unsigned ones; and from counting references, as slices would make it do, and tuples
# of arrays: with `Row` and `Lookup` in place of their fields, decoding took 7% longer.


@compiled
def look_up(some, state, context, column_class, first, table, narrow, entries):
    """Entries of the table that the states point to."""
    for lane in range(some[0], some[1]):
        base = u32(u32(context + u32(column_class[first + lane])) << u32(PRECISION))
        entries[lane] = table[u32(base + u32(u32(state[lane] >> narrow) & u32(TOTAL - 1)))]


@compiled
def advance(some, state, entries, centre, narrow, integers, first):
    """The integers of these entries, and the states after them."""
    low_mask, precision = u32(u32(u32(1) << narrow) - u32(1)), u32(narrow + u32(PRECISION))
    for lane in range(some[0], some[1]):
        entry, x = entries[lane], state[lane]
        integers[first + lane] = np.int16(u32(u32(u32(entry >> u32(24)) << narrow) + u32(x & low_mask)) + centre)
        frequency = u32(u32(entry & u32(TOTAL - 1)) + u32(1))
        inside = u32(u32(entry >> u32(PRECISION)) & u32(TOTAL - 1))
        state[lane] = u32(u32(frequency * u32(x >> precision)) + inside)


@compiled
def refill(some, state, entries, words, position, integers, first):
    """Take the words that states need, and the integers that were escaped: the position after those."""
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
def first_state(stream, lanes):
    """States at the head of a stream, uint32 [lanes]."""
    state = np.empty(lanes, np.uint32)
    for lane in range(lanes):
        low, high = stream.words[stream.begin + 2 * lane], stream.words[stream.begin + 2 * lane + 1]
        state[lane] = u32(low) | (u32(high) << u32(16))
    return state


@compiled
def is_end(stream, position, state):
    """Whether a good stream ends here, with these states."""
    return position == stream.end and (state == u32(INITIAL_STATE)).all()


@compiled
def decode_tile(stream, tile, classes, code, out):
    """Decode a stream into out[tile], int16; False when it is not a valid stream.

    classes: `Classes` of `out`. code: `Code` with a decoder table. tile: `Tile`, bounds in `out`.
    """
    if stream.end - stream.begin < 2 * code.lanes:
        return False
    state, position = first_state(stream, code.lanes), stream.begin + 2 * code.lanes
    of_tile = Classes(
        classes.rows[tile.row_start : tile.row_stop], classes.columns[tile.column_start : tile.column_stop]
    )
    position = decode_rows(stream, position, state, of_tile, code, out, tile.row_start, tile.column_start)
    return is_end(stream, position, state)


@compiled
def seek_rows(stream, classes, code, cuts, positions, states):
    """Decode the stream of a tile to note where decoding could start again; False when it is not a valid stream.

    classes: `Classes` of the tile. code: `Code` with a decoder table. cuts: int64, some of its rows, ascending.
    positions: int64 [cuts] and states: uint32 [cuts, lanes or more] take those of the decoder before these rows.
    """
    if stream.end - stream.begin < 2 * code.lanes:
        return False
    state, position, row = first_state(stream, code.lanes), stream.begin + 2 * code.lanes, 0
    unused = np.empty((len(classes.rows), len(classes.columns)), np.int16)
    for cut in range(len(cuts)):
        rows = Classes(classes.rows[row : cuts[cut]], classes.columns)
        position = decode_rows(stream, position, state, rows, code, unused, 0, 0)
        if position < 0:
            return False
        positions[cut], states[cut, : code.lanes], row = position, state, cuts[cut]
    rest = Classes(classes.rows[row:], classes.columns)
    position = decode_rows(stream, position, state, rest, code, unused, 0, 0)
    return is_end(stream, position, state)


@compiled
def decode_segments(words, segments, states, classes, table, out):
    """Decode segments into out, int16 [rows, columns]; the other arguments are as in `segments.SegmentedMatrix`.

    words: with 2 · lanes words or more after the streams.
    """
    for index in range(len(segments)):
        segment = segments[index]
        state = states[index, : segment.lanes].copy()
        stream = Stream(words, int(segment.word), len(words) - 2 * segment.lanes)
        rows = classes.rows[segment.row : segment.row + segment.rows]
        columns = classes.columns[segment.classes : segment.classes + segment.columns]
        integers = np.empty((len(rows), len(columns)), np.int16)
        code = Code(table, segment.offset, segment.shift, segment.lanes)
        decode_rows(stream, stream.begin, state, Classes(rows, columns), code, integers, 0, 0)
        first, last = max(segment.column, 0), min(segment.column + segment.columns, out.shape[1])
        inside = integers[:, first - segment.column : last - segment.column]
        out[segment.row : segment.row + len(rows), first:last] = inside
