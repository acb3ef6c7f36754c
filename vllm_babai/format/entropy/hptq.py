"""HPTQ: integers of any size, entropy coded; one self-describing blob per linear.

Layout: header; the probability model (`entropy.probability`); exponents of the columns' steps (`format.steps`), if any;
padding; where the stream of every tile ends; the streams (`entropy.rans`). The README of `vllm_babai/format` has every
byte. Tiles follow each other row by row, each a stream of its own, so that thousands of threads can decode and a rank
that holds some rows or columns decodes its tiles alone. A rANS state costs 24 bits and serves at least 4096 weights:
0.006 bit per weight.

Why rANS and not Huffman: on the linears of the reference model, integers of 2.000 and 3.002 bits of entropy take 1.949
and 2.930 bits here, everything counted; a Huffman code for each context with the same classes 2.066 and 2.983, one
Huffman code per matrix without its table 2.077 and 3.064, one for pairs of integers 2.025 and 3.017. In one plain loop
Huffman decoded 260 million weights per second and core, rANS 330; in vector instructions, which need lanes, rANS
decodes 650 to 1040 (`tests/benchmarks/codec.py`).
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError
from vllm_babai.format.base import Format
from vllm_babai.format.checks import check_owner, check_scales, check_shape, name_crc
from vllm_babai.format.entropy.classes import MAX_CLASSES, Classes
from vllm_babai.format.entropy.code import Code, Stream, Tile, padded
from vllm_babai.format.entropy.exponents import exponent_bits, pack_exponents, unpack_exponents
from vllm_babai.format.entropy.probability import CodeModel, fit_code_model, pack_code_model, unpack_code_model
from vllm_babai.format.entropy.tables import MAX_SHIFT, decoder_table, encoder_table
from vllm_babai.format.lattice import LatticeWeight
from vllm_babai.format.tiling import Tiling, within

MAGIC = b"BBHQ"
VERSION = 2
HEADER = struct.Struct(
    "<4s5B2I2Hh3I"
)  # magic; version, shift, lanes, contexts, steps; matrix; tile; offset; name; CRCs
HEADERS = {1: struct.Struct("<4s5B2I2Hh2I"), VERSION: HEADER}  # version 1 had no name
TILE_COLUMNS = 1024
TILE_WEIGHTS = 1 << 17
TILE_ROWS = 1 << 15  # at most
SMALLEST_TILE = 32  # rows, and columns where the matrix has as many
MAX_CONTEXTS = 2 * MAX_CLASSES - 1
MAX_SIDE = 1 << 24  # of a matrix
MAX_LANES = 32
LANE_WEIGHTS = 1 << 14  # of a matrix, per lane, where there are few


@dataclass(frozen=True)
class Shape(Tiling):
    """How a matrix is cut into tiles, and how many lanes each has."""

    lanes: int


@dataclass(frozen=True)
class Coded:
    """A blob taken apart.

    exponents: int16 [columns] of the columns' steps, see `format.steps`, or None. ends: int64 [tiles], where each
    stream ends in `words`, uint16 [words] with room after the last.
    """

    shape: Shape
    model: CodeModel
    exponents: Tensor | None
    scales_crc: int
    ends: np.ndarray
    words: np.ndarray

    @cached_property
    def code(self) -> Code:
        """With the decoder's table."""
        table = decoder_table(self.model.frequencies)
        return Code(table, self.model.offset, self.model.shift, self.shape.lanes)

    def stream(self, tile: int) -> Stream:
        """The stream of a tile."""
        return Stream(self.words, int(self.ends[tile - 1]) if tile else 0, int(self.ends[tile]))

    def check_scales(self, scales: Tensor) -> None:
        """Raise FormatError when `scales` are not those that the blob was stored with, or are no steps."""
        if _scales_crc(scales) != self.scales_crc:
            raise FormatError("scales are corrupt: their CRC does not match the codes blob's")
        check_scales(scales)


@dataclass(frozen=True)
class HPTQ(Format[LatticeWeight]):
    """One linear layer as it lies on disk.

    codes: uint8 [bytes], the blob. scales: bfloat16 [1 or out_features, groups].
    """

    name: ClassVar[str] = "hptq"
    dtypes: ClassVar[dict[str, torch.dtype]] = {"codes": torch.uint8, "scales": torch.bfloat16}
    residencies: ClassVar[tuple[str, ...]] = ("packed", "coded")

    codes: Tensor
    scales: Tensor

    @classmethod
    def encode(cls, weight: LatticeWeight, bits: int | None = None, linear: str = "") -> "HPTQ":
        """Store a lattice point; exact for any int16 integers. There are no dense bits: `bits` changes nothing."""
        scales = weight.scales.contiguous()
        return cls(encode_integers(weight.integers, _scales_crc(scales), weight.column_exponents, linear), scales)

    def decode(self, shape: tuple[int, int] | None = None, linear: str = "") -> LatticeWeight:
        """The stored lattice point, see `Format.decode`."""
        coded = read_blob(self.codes, shape, linear)
        rows, columns = coded.shape.rows, coded.shape.columns
        if self.scales.dim() != 2 or self.scales.shape[0] not in (1, rows) or columns % max(1, self.scales.shape[1]):
            raise FormatError(f"scales {tuple(self.scales.shape)} do not fit a layer of {rows} × {columns}")
        coded.check_scales(self.scales)
        return LatticeWeight(decode_integers(coded), self.scales, coded.exponents)

    def decode_window(self, row_window: slice | None = None, column_window: slice | None = None) -> Tensor:
        """Integers of some rows and columns alone, see `decode_integers`."""
        return decode_integers(read_blob(self.codes), row_window, column_window)


def predicted_bytes(integers: Tensor, exponents: Tensor | None = None) -> float:
    """Bytes of the blob that int16 integers [out, in] and exponents of their columns' steps, int16 [in], will take,
    without coding them; within a few bytes per tile.
    """
    shape = _cut(*integers.shape)
    bits = fit_code_model(integers.numpy())[1] + shape.count * (32 + 24 * shape.lanes)
    if exponents is not None:
        bits += exponent_bits(exponents)
    return HEADER.size + bits / 8


def encode_integers(integers: Tensor, scales_crc: int, exponents: Tensor | None = None, linear: str = "") -> Tensor:
    """Integers, int16 [out, in], of a linear, and exponents of their columns' steps, if any → blob, uint8 [bytes]."""
    from vllm_babai.format.entropy import rans

    matrix = np.ascontiguousarray(integers.numpy())
    shape = _cut(*matrix.shape)
    model, _ = fit_code_model(matrix)
    code = Code(encoder_table(model.frequencies), model.offset, model.shift, shape.lanes)
    streams = parallel_map(
        lambda index: rans.encode_tile(matrix, shape.tile(index), model.classes, code), range(shape.count)
    )
    ends = np.cumsum([len(stream) for stream in streams], dtype="<u4")
    side = pack_code_model(model) + (b"" if exponents is None else pack_exponents(exponents))
    body = b"".join((side, bytes(-(HEADER.size + len(side)) % 4), ends.tobytes(), *(s.tobytes() for s in streams)))
    size = (shape.rows, shape.columns, shape.tile_rows, shape.tile_columns)
    numbers = (VERSION, model.shift, shape.lanes, len(model.codes), exponents is not None)
    fields = (MAGIC, *numbers, *size, model.offset, name_crc(linear), scales_crc)
    crc = zlib.crc32(body, zlib.crc32(HEADER.pack(*fields, 0)))
    return torch.from_numpy(np.frombuffer(HEADER.pack(*fields, crc) + body, np.uint8).copy())


def read_blob(blob: Tensor, shape: tuple[int, int] | None = None, linear: str = "") -> Coded:
    """Check a blob's magic, version, CRC and lengths, and take it apart. Raises FormatError.

    shape: rows and columns of its linear, checked before anything is allocated; None where it is not known. linear: its
    name, or "".
    """
    raw = blob.contiguous().numpy().data
    if len(raw) <= len(MAGIC) or raw[:4] != MAGIC:
        raise FormatError("codes blob is truncated, or no codes blob")
    header = HEADERS.get(raw[len(MAGIC)])
    if header is None:
        raise FormatError(f"codes blob has format version {raw[len(MAGIC)]}; this version reads {tuple(HEADERS)}")
    if len(raw) < header.size:
        raise FormatError("codes blob is truncated")
    *fields, crc = header.unpack_from(raw)
    if zlib.crc32(raw[header.size :], zlib.crc32(header.pack(*fields, 0))) != crc:
        raise FormatError("codes blob is truncated or corrupt: its CRC does not match")
    shift, lanes, contexts, steps, rows, columns, tile_rows, tile_columns, offset, *names, scales_crc = fields[2:]
    check_shape((rows, columns), shape, "codes")
    tiling = _check_header(Shape(rows, columns, tile_rows, tile_columns, lanes), shift, contexts)
    check_owner(names[0] if names else 0, linear, "codes")
    body = raw[header.size :]
    if len(body) < contexts + 4 * (1 + lanes) * tiling.count or len(raw) % 2:
        raise FormatError("codes blob is too short for its tiles")
    model, length = unpack_code_model(body, (rows, columns), offset, shift, contexts)
    exponents = None
    if steps:
        exponents, length = unpack_exponents(body, length, columns)
    start = length + -(header.size + length) % 4
    if len(body) < start + 4 * tiling.count:
        raise FormatError("codes blob is too short for its tiles")
    ends = np.frombuffer(body, "<u4", tiling.count, start).astype(np.int64)
    words = np.frombuffer(body[start + 4 * tiling.count :], "<u2")
    if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != len(words):
        raise FormatError("codes blob has tiles that do not fit its length")
    return Coded(tiling, model, exponents, scales_crc, ends, padded(words, lanes))


def _check_header(shape: Shape, shift: int, contexts: int) -> Shape:
    """The shape of a header that an encoder may have written; else FormatError. Bounds what decoding can take."""
    # Where one side is 0 there are no tiles, whose lengths would bound the other by the bytes of the blob.
    longest = MAX_SIDE if shape.rows and shape.columns else TILE_WEIGHTS
    if not (
        1 <= shape.lanes <= MAX_LANES
        and shift <= MAX_SHIFT
        and 1 <= contexts <= MAX_CONTEXTS
        and max(shape.rows, shape.columns) <= longest
        and shape.tile_rows >= SMALLEST_TILE
        and shape.tile_columns >= max(1, min(SMALLEST_TILE, shape.columns))
        and shape.tile_rows * shape.tile_columns <= TILE_WEIGHTS
    ):
        raise FormatError("codes blob has a header that no encoder writes")
    return shape


def decode_integers(coded: Coded, row_window: slice | None = None, column_window: slice | None = None) -> Tensor:
    """Integers, int16, of a window of rows × columns (without one: of all).

    Windows need no alignment: the tiles that overlap the window are decoded, then cut. Raises FormatError when a stream
    is damaged, ValueError when the window leaves the matrix.
    """
    rows = within(row_window, coded.shape.rows, "row")
    columns = within(column_window, coded.shape.columns, "column")
    decode, integers = _decoder(coded, rows, columns)
    parallel_map(decode, coded.shape.overlapping(rows, columns))
    return torch.from_numpy(np.ascontiguousarray(integers))


def bands(coded: Coded, rows: slice) -> list[slice]:
    """Rows of a window, cut at the edges of tiles."""
    height = coded.shape.tile_rows
    cuts = [rows.start, *range((rows.start // height + 1) * height, rows.stop, height), rows.stop]
    return [slice(*band) for band in pairwise(cuts)]


def decode_band(coded: Coded, rows: slice, columns: slice) -> np.ndarray:
    """As `decode_integers` on this thread alone, for rows that `bands` gave: int16 [rows, columns]."""
    decode, integers = _decoder(coded, rows, columns)
    for tile in coded.shape.overlapping(rows, columns):
        decode(tile)
    return np.ascontiguousarray(integers)


def _decoder(coded: Coded, rows: slice, columns: slice) -> tuple[Callable[[int], None], np.ndarray]:
    """A function that decodes one tile, and where the window is when it has been called for all that overlap it."""
    from vllm_babai.format.entropy import rans

    shape, classes = coded.shape, coded.model.classes
    top = rows.start // shape.tile_rows * shape.tile_rows
    left = columns.start // shape.tile_columns * shape.tile_columns
    bottom = min(-(-rows.stop // shape.tile_rows) * shape.tile_rows, shape.rows)
    right = min(-(-columns.stop // shape.tile_columns) * shape.tile_columns, shape.columns)
    covered = np.empty((bottom - top, right - left), np.int16)
    classes, code = Classes(classes.rows[top:], classes.columns[left:]), coded.code

    def decode(index: int) -> None:
        row_start, row_stop, column_start, column_stop = shape.tile(index)
        tile = Tile(row_start - top, row_stop - top, column_start - left, column_stop - left)
        if not rans.decode_tile(coded.stream(index), tile, classes, code, covered):
            raise FormatError(f"codes blob has a damaged stream (tile {index})")

    return decode, covered[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _cut(rows: int, columns: int) -> Shape:
    """Tiles of about TILE_WEIGHTS weights, of MAX_LANES lanes except in small matrices."""
    across = max(1, -(-columns // TILE_COLUMNS))
    tile_columns = max(1, min(columns, -(-columns // across // 32) * 32))
    tile_rows = min(max(1, TILE_WEIGHTS // tile_columns // 32) * 32, TILE_ROWS)
    lanes = min(MAX_LANES, 1 << max(0, (rows * columns // LANE_WEIGHTS).bit_length() - 1))
    return Shape(rows, columns, tile_rows, tile_columns, lanes)


def _scales_crc(scales: Tensor) -> int:
    return zlib.crc32(scales.contiguous().view(torch.uint8).numpy().data)
