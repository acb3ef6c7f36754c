"""The sparse part of SSQR: what integers exceed the dense range by, in one self-describing blob per linear.

Layout (little endian): header, int32 entry offset of every tile (tiles + 1 of them), then all entries as one bit
stream. Tiles of TILE_ROWS × TILE_COLUMNS weights (or as wide as the matrix) follow each other row by row, so that a
rank which holds some rows or columns decodes its tiles alone. Inside a tile positions count row by row, and an entry is
(gap, digit):

- gap, `gap_bits`, unsigned: distance from the preceding position (from −1 at the start of a tile). Gap 0 stays at the
  position and brings the next higher digit of its excess. Entries of digit 0 bridge a gap too long for the field.
- digit, `digit_bits`, two's complement: one digit of the excess in the balanced base 2^digit_bits.

The encoder takes the field widths that make the blob smallest; about 12 bits an entry at 1% overflow.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.errors import FormatError

MAGIC = b"BBOV"
VERSION = 1
TILE_ROWS, TILE_COLUMNS = 32, 1024
HEADER = struct.Struct("<4s4B2H5I")  # magic; version, bits, gap and digit bits; tile; rows, columns, entries; two CRCs


@dataclass(frozen=True)
class Overflow:
    """Sparse excess over the dense range, in coordinate form sorted by row, then column.

    rows, columns: int32 [entries]; excess: int32 [entries], integer − dense integer, never 0.
    """

    rows: Tensor
    columns: Tensor
    excess: Tensor


@dataclass(frozen=True)
class Header:
    """The fixed fields at the start of a blob. `dense_crc` is the CRC-32 of the qweight and scales bytes."""

    bits: int
    gap_bits: int
    digit_bits: int
    tile_rows: int
    tile_columns: int
    rows: int
    columns: int
    entries: int
    dense_crc: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return -(-self.rows // self.tile_rows), -(-self.columns // self.tile_columns)


def encode_overflow(excess: Tensor, bits: int, dense_crc: int) -> Tensor:
    """Excess over the dense range, integers [out, in], mostly 0 → blob, uint8 [bytes]."""
    rows, columns = excess.shape
    tile_columns = min(TILE_COLUMNS, columns)
    row, column = (axis.numpy() for axis in torch.nonzero(excess, as_tuple=True))
    value = excess[row, column].numpy().astype(np.int64)
    tiles_across = -(-columns // tile_columns)
    tile = row // TILE_ROWS * tiles_across + column // tile_columns
    position = row % TILE_ROWS * tile_columns + column % tile_columns
    order = np.lexsort((position, tile))
    tile, position, value = tile[order], position[order], value[order]
    first_of_tile = np.diff(tile, prepend=-1) > 0
    distance = np.where(first_of_tile, position + 1, np.diff(position, prepend=-1))

    gap_bits, digit_bits = _smallest_fields(distance, value)
    bridges = (distance - 1) // ((1 << gap_bits) - 1)
    gap, digit, owner = _spell(distance, value, bridges, gap_bits, digit_bits)

    tile_count = -(-rows // TILE_ROWS) * tiles_across
    offsets = np.searchsorted(tile[owner], np.arange(tile_count + 1)).astype("<i4")
    words = gap | (digit & ((1 << digit_bits) - 1)) << gap_bits
    payload = _pack_words(words, gap_bits + digit_bits)
    body = offsets.tobytes() + payload.tobytes()
    fields = (MAGIC, VERSION, bits, gap_bits, digit_bits, TILE_ROWS, tile_columns, rows, columns, len(gap), dense_crc)
    crc = zlib.crc32(body, zlib.crc32(HEADER.pack(*fields, 0)))
    return torch.from_numpy(np.frombuffer(HEADER.pack(*fields, crc) + body, dtype=np.uint8).copy())


def read_header(blob: Tensor) -> Header:
    """Check a blob's magic, version, length and CRC; return its header. Raises FormatError."""
    raw = blob.numpy().tobytes()
    if len(raw) < HEADER.size or raw[:4] != MAGIC:
        raise FormatError("overflow blob is truncated or is not one")
    magic, version, bits, gap_bits, digit_bits, *sizes, entries, dense_crc, crc = HEADER.unpack_from(raw)
    if version != VERSION:
        raise FormatError(f"overflow blob has format version {version}; this version reads {VERSION}")
    tile_rows, tile_columns, rows, columns = sizes
    header = Header(bits, gap_bits, digit_bits, tile_rows, tile_columns, rows, columns, entries, dense_crc)
    if min(header.tile_rows, header.tile_columns) < 1:
        raise FormatError("overflow blob has empty tiles")
    down, across = header.tiles
    length = HEADER.size + 4 * (down * across + 1) + (entries * (gap_bits + digit_bits) + 7) // 8
    if len(raw) != length:
        raise FormatError(f"overflow blob is truncated: {len(raw)} bytes where its header asks for {length}")
    unsigned = HEADER.pack(magic, version, bits, gap_bits, digit_bits, *sizes, entries, dense_crc, 0)
    if zlib.crc32(raw[HEADER.size :], zlib.crc32(unsigned)) != crc:
        raise FormatError("overflow blob is corrupt: its CRC does not match")
    return header


def decode_overflow(blob: Tensor, row_window: slice | None = None, column_window: slice | None = None) -> Overflow:
    """Entries of a blob inside a window of rows × columns, with coordinates relative to the window.

    Windows need no alignment: tiles that overlap the window are decoded, then filtered. Raises FormatError when the
    blob is truncated, corrupt or of another version, ValueError when the window leaves the matrix.
    """
    header = read_header(blob)
    row_start, row_stop = _bounds(row_window, header.rows, "row")
    column_start, column_stop = _bounds(column_window, header.columns, "column")
    across = header.tiles[1]
    raw = blob.numpy()[HEADER.size :]
    offsets = raw[: 4 * (header.tiles[0] * across + 1)].view("<i4").astype(np.int64)
    first_tile = row_start // header.tile_rows * across
    last_tile = -(-row_stop // header.tile_rows) * across
    counts = np.diff(offsets[first_tile : last_tile + 1])
    words = _unpack_words(
        raw[4 * len(offsets) :], header.gap_bits + header.digit_bits, offsets[first_tile], offsets[last_tile]
    )
    gap = words & ((1 << header.gap_bits) - 1)
    digit = words >> header.gap_bits
    digit -= (digit >> (header.digit_bits - 1)) << header.digit_bits

    tile = np.repeat(np.arange(first_tile, last_tile), counts)
    travelled = np.cumsum(gap)
    before_tile = np.concatenate(([0], travelled))[offsets[first_tile:last_tile] - offsets[first_tile]]
    position = travelled - np.repeat(before_tile, counts) - 1
    index = np.arange(len(gap))
    start = np.flatnonzero(gap > 0)
    power = index - np.maximum.accumulate(np.where(gap > 0, index, 0)) if len(gap) else index
    value = np.add.reduceat(digit << (header.digit_bits * power), start) if len(start) else digit
    tile, position = tile[start], position[start]

    row = tile // across * header.tile_rows + position // header.tile_columns
    column = tile % across * header.tile_columns + position % header.tile_columns
    inside = (value != 0) & (row >= row_start) & (row < row_stop) & (column >= column_start) & (column < column_stop)
    row, column, value = row[inside] - row_start, column[inside] - column_start, value[inside]
    order = np.lexsort((column, row))
    return Overflow(*(torch.from_numpy(a[order].astype(np.int32)) for a in (row, column, value)))


def _bounds(window: slice | None, size: int, axis: str) -> tuple[int, int]:
    start, stop = (0, size) if window is None else (window.start, window.stop)
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{axis} window {start}…{stop} leaves a matrix of {size} {axis}s")
    return start, stop


def _digit_counts(value: np.ndarray, digit_bits: int) -> np.ndarray:
    """How many balanced base-2^digit_bits digits each value takes (at least one)."""
    counts, rest = np.ones(len(value), np.int64), value
    while True:
        rest = (rest + (1 << (digit_bits - 1))) >> digit_bits
        if not rest.any():
            return counts
        counts += rest != 0


def _smallest_fields(distance: np.ndarray, value: np.ndarray) -> tuple[int, int]:
    """Field widths (gap_bits, digit_bits) that give the fewest bits in all."""
    extra_digits = {v: int(_digit_counts(value, v).sum()) for v in range(2, 10)}
    bridges = {g: int(((distance - 1) // ((1 << g) - 1)).sum()) for g in range(1, 16)}
    return min(
        ((g, v) for g in bridges for v in extra_digits),
        key=lambda fields: sum(fields) * (bridges[fields[0]] + extra_digits[fields[1]]),
    )


def _spell(
    distance: np.ndarray, value: np.ndarray, bridges: np.ndarray, gap_bits: int, digit_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spell every value as its bridges, then its digits from the lowest: gaps, digits, and whose value each is."""
    digits = _digit_counts(value, digit_bits)
    per_value = bridges + digits
    owner = np.repeat(np.arange(len(value)), per_value)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(per_value) - per_value, per_value)
    power = step - bridges[owner]
    longest = (1 << gap_bits) - 1
    gap = np.where(power < 0, longest, np.where(power == 0, (distance - bridges * longest)[owner], 0))
    half = 1 << (digit_bits - 1)
    rest = value[owner]
    for k in range(int(digits.max(initial=1)) - 1):
        rest = np.where(power > k, (rest + half) >> digit_bits, rest)
    digit = np.where(power < 0, 0, ((rest + half) & (2 * half - 1)) - half)
    return gap, digit, owner


def _pack_words(words: np.ndarray, width: int) -> np.ndarray:
    bits = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, :width]
    return np.packbits(bits.reshape(-1), bitorder="little")


def _unpack_words(stream: np.ndarray, width: int, first: int, last: int) -> np.ndarray:
    """Words first … last − 1 of a bit stream of `width`-bit words, as int64."""
    begin, end = first * width, last * width
    bits = np.unpackbits(stream[begin // 8 : (end + 7) // 8], bitorder="little")[begin % 8 :][: end - begin]
    padded = np.zeros((last - first, 32), np.uint8)
    padded[:, :width] = bits.reshape(-1, width)
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").reshape(-1).astype(np.int64)
