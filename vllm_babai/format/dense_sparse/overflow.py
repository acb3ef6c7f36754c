"""The sparse part of SSQR: what integers exceed the dense range by, in one self-describing blob per linear.

Layout: header; frequency tables for gaps and for excesses; of every tile the CRC of its dense part, its entries and its
words; the words. The README of
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
from vllm_babai.format.checks import check_owner, check_shape, name_crc
from vllm_babai.format.entropy.tables import decoder_table, encoder_table
from vllm_babai.format.tiling import Tiling, within

MAGIC = b"BBOV"
VERSION = 3
WHOLE_CRC = 2  # the version in which one CRC covered the dense part, so that no rank with a part of it could check that
HEADER = struct.Struct("<4s4B2H5I")  # magic; version, bits, gap and excess classes; tile; matrix, entries; name; CRC
TILE_ROWS, TILE_COLUMNS = 128, 1024  # at most
MAX_EXCESS = 1 << 16


@dataclass(frozen=True)
class Overflow:
    """Sparse excess over the dense range, in coordinate form sorted by row, then column.

    rows, columns: int32 [entries]; excess: int32 [entries], integer − dense integer, never 0.
    """

    rows: Tensor
    columns: Tensor
    excess: Tensor

    def added_to(self, dense: Tensor) -> Tensor:
        """The whole integers: `dense`, int16 [out, in] from `packing.unpack`, to which the excess is added in place."""
        dense[self.rows.long(), self.columns.long()] += self.excess.short()
        return dense


@dataclass(frozen=True)
class Header(Tiling):
    """The fixed fields at the start of a blob.

    name_crc: see `checks.name_crc`; 0 in version 2. dense_crc: of all bytes of qweight, then scales; in version 2 only.
    """

    version: int
    bits: int
    gap_classes: int
    excess_classes: int
    entries: int
    name_crc: int
    dense_crc: int | None


@dataclass(frozen=True)
class StoredOverflow:
    """A blob taken apart.

    dense_crcs: uint32 [tiles], see `ssqr.dense_crcs`; None in version 2. frequencies: uint32 [2, ESCAPE + 1].
    entries: int64 [tiles], how many each has. spans: int64 [tiles, 2], where its stream begins and ends in `words`,
    uint16, with padding at their end.
    """

    header: Header
    dense_crcs: np.ndarray | None
    frequencies: np.ndarray
    entries: np.ndarray
    spans: np.ndarray
    words: np.ndarray

    def decode(self, row_window: slice | None = None, column_window: slice | None = None) -> Overflow:
        """Entries inside a window of rows × columns, with coordinates relative to the window.

        Windows need no alignment: tiles that overlap the window are decoded, then filtered. Raises FormatError when a
        stream is damaged, ValueError when the window leaves the matrix.
        """
        from vllm_babai.format.dense_sparse import pairs

        rows = within(row_window, self.header.rows, "row")
        columns = within(column_window, self.header.columns, "column")
        tiles = np.array(self.header.overlapping(rows, columns), np.int64)
        counts = self.entries[tiles]
        numbers = np.empty((counts.sum(), 2), np.int64)
        damaged = pairs.decode_streams(self.words, self.spans[tiles], counts, decoder_table(self.frequencies), numbers)
        if damaged >= 0:
            raise FormatError(f"overflow blob has a damaged stream (tile {tiles[damaged]})")
        row, column = _coordinates(self.header, tiles, counts, numbers[:, 0])
        excess = ((numbers[:, 1] >> 1) + 1) * (1 - 2 * (numbers[:, 1] & 1))
        inside = (row >= rows.start) & (row < rows.stop) & (column >= columns.start) & (column < columns.stop)
        row, column, excess = row[inside] - rows.start, column[inside] - columns.start, excess[inside]
        order = np.argsort(row, kind="stable")  # in a row, tiles come by column already
        return Overflow(*(torch.from_numpy(axis[order].astype(np.int32)) for axis in (row, column, excess)))


def tiling(rows: int, columns: int) -> Tiling:
    """How a matrix is cut: TILE_ROWS high, and as many columns in each tile as divide them evenly."""
    across = -(-columns // TILE_COLUMNS)
    return Tiling(rows, columns, TILE_ROWS, -(-columns // across) if across else 1)


def encode_overflow(excess: Tensor, bits: int, dense_crcs: np.ndarray, linear: str = "") -> Tensor:
    """Excess over the dense range, integers [out, in], mostly 0 → blob, uint8 [bytes].

    dense_crcs: uint32 [tiles], see `ssqr.dense_crcs`. Raises ValueError when an excess is beyond ±MAX_EXCESS; those of
    int16 integers never are.
    """
    from vllm_babai.format.dense_sparse import pairs

    tiles = tiling(*excess.shape)
    row, column = (axis.numpy() for axis in torch.nonzero(excess, as_tuple=True))
    value = excess[row, column].numpy().astype(np.int64)
    if np.abs(value).max(initial=0) > MAX_EXCESS:
        raise ValueError(f"an excess beyond ±{MAX_EXCESS} cannot be stored")
    tile = row // tiles.tile_rows * tiles.across + column // tiles.tile_columns
    position = row % tiles.tile_rows * tiles.tile_columns + column % tiles.tile_columns
    order = np.argsort(tile, kind="stable")  # in a tile, positions ascend already
    tile, position, value = tile[order], position[order], value[order]
    first_of_tile = np.diff(tile, prepend=-1) > 0
    gap = np.where(first_of_tile, position, np.diff(position, prepend=0) - 1)
    numbers = np.stack((gap, 2 * (np.abs(value) - 1) + (value < 0)), axis=1)

    tables = pairs.fit_tables(numbers)
    tile_entries = np.bincount(tile, minlength=tiles.count)
    words, tile_words = pairs.encode_streams(numbers, tile_entries, encoder_table(pairs.frequencies(tables)))
    index = (part.astype("<u4") for part in (dense_crcs, tile_entries, tile_words))
    body = b"".join(part.tobytes() for part in (*tables, *index, words.astype("<u2")))
    sizes = (tiles.tile_rows, tiles.tile_columns, tiles.rows, tiles.columns, len(value))
    fields = (MAGIC, VERSION, bits, *map(len, tables), *sizes, name_crc(linear))
    crc = zlib.crc32(body, zlib.crc32(HEADER.pack(*fields, 0)))
    return torch.from_numpy(np.frombuffer(HEADER.pack(*fields, crc) + body, dtype=np.uint8).copy())


def read_header(blob: Tensor) -> Header:
    """Check a blob's magic, version, CRC and tiles; return its header. Raises FormatError."""
    raw = blob.contiguous().numpy().data
    if len(raw) < HEADER.size or raw[:4] != MAGIC:
        raise FormatError("overflow blob is truncated, or no overflow blob")
    *fields, crc = HEADER.unpack_from(raw)
    _, version, bits, gaps, excesses, tile_rows, tile_columns, rows, columns, entries, checked = fields
    if version not in (WHOLE_CRC, VERSION):
        raise FormatError(f"overflow blob has format version {version}; this version reads {(WHOLE_CRC, VERSION)}")
    if zlib.crc32(raw[HEADER.size :], zlib.crc32(HEADER.pack(*fields, 0))) != crc:
        raise FormatError("overflow blob is truncated or corrupt: its CRC does not match")
    tiles = tiling(rows, columns)
    if (tile_rows, tile_columns) != (tiles.tile_rows, tiles.tile_columns):
        raise FormatError(f"overflow blob has tiles of {tile_rows} × {tile_columns} weights")
    crcs = (0, checked) if version == WHOLE_CRC else (checked, None)
    return Header(rows, columns, tile_rows, tile_columns, version, bits, gaps, excesses, entries, *crcs)


def read_overflow(blob: Tensor, shape: tuple[int, int] | None = None, linear: str = "") -> StoredOverflow:
    """Check a blob and take it apart. Raises FormatError when it is damaged or its parts do not fit each other.

    shape: rows and columns of its linear, checked before anything is allocated; None where it is not known. linear: its
    name, or "".
    """
    from vllm_babai.format.dense_sparse import pairs

    header = read_header(blob)
    check_shape((header.rows, header.columns), shape, "overflow")
    check_owner(header.name_crc, linear, "overflow")
    classes, tiles = [header.gap_classes, header.excess_classes], header.count
    numbers = 2 if header.version == WHOLE_CRC else 3  # of every tile
    raw = blob.contiguous().numpy()[HEADER.size :]
    if len(raw) < sum(classes) + 4 * numbers * tiles:
        raise FormatError("overflow blob is too short for its tiles")
    *tables, index, words = np.split(raw, np.cumsum([*classes, 4 * numbers * tiles]))
    *dense_crcs, entries, tile_words = index.view("<u4").reshape(numbers, tiles)
    entries, tile_words = entries.astype(np.int64), tile_words.astype(np.int64)
    if entries.sum() != header.entries or 2 * tile_words.sum() != len(words):
        raise FormatError("overflow blob has tiles that do not fit its entries or its length")
    if entries.max(initial=0) > header.tile_rows * header.tile_columns:
        raise FormatError("overflow blob has more entries in a tile than weights")
    ends = np.cumsum(tile_words)
    padded = np.concatenate((words.view("<u2"), pairs.PADDING))
    return StoredOverflow(
        header=header,
        dense_crcs=dense_crcs[0] if dense_crcs else None,
        frequencies=pairs.frequencies(tables),
        entries=entries,
        spans=np.stack((ends - tile_words, ends), axis=1),
        words=padded,
    )


def decode_overflow(blob: Tensor, row_window: slice | None = None, column_window: slice | None = None) -> Overflow:
    """Entries of a blob inside a window of rows × columns, see `StoredOverflow.decode`."""
    return read_overflow(blob).decode(row_window, column_window)


def _coordinates(
    header: Header, tiles: np.ndarray, counts: np.ndarray, gaps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of entries, `counts` of them in each of `tiles`, from their gaps. Raises FormatError."""
    travelled = np.cumsum(gaps + 1)
    before_tile = np.concatenate(([0], travelled))[np.cumsum(counts) - counts]
    position = travelled - np.repeat(before_tile, counts) - 1
    tile_row, tile_column = np.repeat(tiles // header.across, counts), np.repeat(tiles % header.across, counts)
    row = tile_row * header.tile_rows + position // header.tile_columns
    column = tile_column * header.tile_columns + position % header.tile_columns
    outside = (position >= header.tile_rows * header.tile_columns) | (row >= header.rows) | (column >= header.columns)
    if outside.any():
        raise FormatError("overflow blob has entries outside their tile")
    return row, column
