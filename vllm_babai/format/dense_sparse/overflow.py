"""The sparse part of SSQR: what integers exceed the dense range by, in one self-describing blob per linear.

Layout: header; frequency tables for gaps and for excesses; entries, then words of every tile; the words. The README of
`vllm_babai/format` has every byte. Tiles follow each other row by row, each a stream of its own (`dense_sparse.pairs`),
so that a rank which holds some rows or columns decodes its tiles alone. Inside a tile positions count row by row, and
an entry is a pair of numbers: the gap, which is how many positions lie between it and the entry before, and the excess
e as 2(|e| − 1), + 1 if e < 0.

On a Gaussian matrix of 2048² of which 1% overflows, an entry costs 8.3, 9.3, 10.5, 11.6 or 14.6 bits at 2, 3, 4, 5 or 8
dense bits, everything counted: 0.1 more than its entropy, 8.08 of which are the position's.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_babai.errors import FormatError
from vllm_babai.format.entropy.tables import decoder_table, encoder_table
from vllm_babai.format.window import within

MAGIC = b"BBOV"
VERSION = 2
TILE_ROWS, TILE_COLUMNS = 128, 1024  # at most
MAX_EXCESS = 1 << 16
HEADER = struct.Struct("<4s4B2H5I")  # magic; version, bits, gap and excess classes; tile; matrix, entries; two CRCs


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
    gap_classes: int
    excess_classes: int
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


@dataclass(frozen=True)
class _Body:
    """What follows the header.

    frequencies: uint32 [2, ESCAPE + 1]. entries: int64 [tiles], how many each has. spans: int64 [tiles, 2], where its
    stream begins and ends in `words`, uint16, with padding at their end.
    """

    frequencies: np.ndarray
    entries: np.ndarray
    spans: np.ndarray
    words: np.ndarray


def encode_overflow(excess: Tensor, bits: int, dense_crc: int) -> Tensor:
    """Excess over the dense range, integers [out, in], mostly 0 → blob, uint8 [bytes].

    Raises ValueError when one is beyond ±MAX_EXCESS; those of int16 integers never are.
    """
    from vllm_babai.format.dense_sparse import pairs

    rows, columns = excess.shape
    across = -(-columns // TILE_COLUMNS)
    tile_columns = -(-columns // across) if across else 1
    row, column = (axis.numpy() for axis in torch.nonzero(excess, as_tuple=True))
    value = excess[row, column].numpy().astype(np.int64)
    if np.abs(value).max(initial=0) > MAX_EXCESS:
        raise ValueError(f"an excess beyond ±{MAX_EXCESS} cannot be stored")
    tile = row // TILE_ROWS * across + column // tile_columns
    position = row % TILE_ROWS * tile_columns + column % tile_columns
    order = np.argsort(tile, kind="stable")  # in a tile, positions ascend already
    tile, position, value = tile[order], position[order], value[order]
    first_of_tile = np.diff(tile, prepend=-1) > 0
    gap = np.where(first_of_tile, position, np.diff(position, prepend=0) - 1)
    numbers = np.stack((gap, 2 * (np.abs(value) - 1) + (value < 0)), axis=1)

    tables = pairs.fit_tables(numbers)
    tile_entries = np.bincount(tile, minlength=-(-rows // TILE_ROWS) * across)
    words, tile_words = pairs.encode_streams(numbers, tile_entries, encoder_table(pairs.frequencies(tables)))
    parts = (*tables, tile_entries.astype("<u4"), tile_words.astype("<u4"), words.astype("<u2"))
    body = b"".join(part.tobytes() for part in parts)
    sizes = (TILE_ROWS, tile_columns, rows, columns, len(value))
    fields = (MAGIC, VERSION, bits, *map(len, tables), *sizes, dense_crc)
    crc = zlib.crc32(body, zlib.crc32(HEADER.pack(*fields, 0)))
    return torch.from_numpy(np.frombuffer(HEADER.pack(*fields, crc) + body, dtype=np.uint8).copy())


def read_header(blob: Tensor) -> Header:
    """Check a blob's magic, version and CRC; return its header. Raises FormatError."""
    raw = blob.contiguous().numpy().data
    if len(raw) < HEADER.size or raw[:4] != MAGIC:
        raise FormatError("overflow blob is truncated, or no overflow blob")
    magic, version, *fields, crc = HEADER.unpack_from(raw)
    if version != VERSION:
        raise FormatError(f"overflow blob has format version {version}; this version reads {VERSION}")
    if zlib.crc32(raw[HEADER.size :], zlib.crc32(HEADER.pack(magic, version, *fields, 0))) != crc:
        raise FormatError("overflow blob is truncated or corrupt: its CRC does not match")
    header = Header(*fields)
    if not 1 <= header.tile_rows * header.tile_columns <= TILE_ROWS * TILE_COLUMNS:
        raise FormatError(f"overflow blob has tiles of {header.tile_rows} × {header.tile_columns} weights")
    return header


def decode_overflow(blob: Tensor, row_window: slice | None = None, column_window: slice | None = None) -> Overflow:
    """Entries of a blob inside a window of rows × columns, with coordinates relative to the window.

    Windows need no alignment: tiles that overlap the window are decoded, then filtered. Raises FormatError when the
    blob is truncated, corrupt or of another version, ValueError when the window leaves the matrix.
    """
    from vllm_babai.format.dense_sparse import pairs

    header = read_header(blob)
    rows = within(row_window, header.rows, "row")
    columns = within(column_window, header.columns, "column")
    body = _read_body(blob, header)
    down = np.arange(rows.start // header.tile_rows, -(-rows.stop // header.tile_rows))
    across = np.arange(columns.start // header.tile_columns, -(-columns.stop // header.tile_columns))
    tiles = (down[:, None] * header.tiles[1] + across).reshape(-1)
    counts = body.entries[tiles]
    numbers = np.empty((counts.sum(), 2), np.int64)
    damaged = pairs.decode_streams(body.words, body.spans[tiles], counts, decoder_table(body.frequencies), numbers)
    if damaged >= 0:
        raise FormatError(f"overflow blob has a damaged stream (tile {tiles[damaged]})")
    row, column = _coordinates(header, tiles, counts, numbers[:, 0])
    excess = ((numbers[:, 1] >> 1) + 1) * (1 - 2 * (numbers[:, 1] & 1))
    inside = (row >= rows.start) & (row < rows.stop) & (column >= columns.start) & (column < columns.stop)
    row, column, excess = row[inside] - rows.start, column[inside] - columns.start, excess[inside]
    order = np.argsort(row, kind="stable")  # in a row, tiles come by column already
    return Overflow(*(torch.from_numpy(axis[order].astype(np.int32)) for axis in (row, column, excess)))


def _read_body(blob: Tensor, header: Header) -> _Body:
    """Take a blob apart. Raises FormatError when the parts do not fit each other."""
    from vllm_babai.format.dense_sparse import pairs

    classes, tiles = [header.gap_classes, header.excess_classes], header.tiles[0] * header.tiles[1]
    raw = blob.contiguous().numpy()[HEADER.size :]
    if len(raw) < sum(classes) + 8 * tiles:
        raise FormatError("overflow blob is too short for its tiles")
    *tables, index, words = np.split(raw, np.cumsum([*classes, 8 * tiles]))
    entries, tile_words = index.view("<u4").astype(np.int64).reshape(2, tiles)
    if entries.sum() != header.entries or 2 * tile_words.sum() != len(words):
        raise FormatError("overflow blob has tiles that do not fit its entries or its length")
    if entries.max(initial=0) > header.tile_rows * header.tile_columns:
        raise FormatError("overflow blob has more entries in a tile than weights")
    ends = np.cumsum(tile_words)
    padded = np.concatenate((words.view("<u2"), pairs.PADDING))
    return _Body(pairs.frequencies(tables), entries, np.stack((ends - tile_words, ends), axis=1), padded)


def _coordinates(
    header: Header, tiles: np.ndarray, counts: np.ndarray, gaps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of entries, `counts` of them in each of `tiles`, from their gaps. Raises FormatError."""
    travelled = np.cumsum(gaps + 1)
    before_tile = np.concatenate(([0], travelled))[np.cumsum(counts) - counts]
    position = travelled - np.repeat(before_tile, counts) - 1
    tile_row, tile_column = np.repeat(tiles // header.tiles[1], counts), np.repeat(tiles % header.tiles[1], counts)
    row = tile_row * header.tile_rows + position // header.tile_columns
    column = tile_column * header.tile_columns + position % header.tile_columns
    outside = (position >= header.tile_rows * header.tile_columns) | (row >= header.rows) | (column >= header.columns)
    if outside.any():
        raise FormatError("overflow blob has entries outside their tile")
    return row, column
