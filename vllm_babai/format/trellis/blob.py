"""The trellis form on disk: one self-describing blob per linear, of which all but a header goes to the device as it is.

The bytes stand in `format/README.md`. Why they do:

Rows are sorted within spans of 256 rows, so that those of a block need alike bits. A tensor-parallel rank takes the
blocks that hold its rows: no more than these where its rows are whole spans. Columns stay where they are: a rank takes
whole tiles, and of every row the word before the first of them. A row's stream goes on from tile to tile; were it to
start anew in each, the first pairs would have fewer states to choose among.

A scale is 2% off at most, where the error hardly changes, and a bfloat16 per row would take 8 bits more.
"""

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError
from vllm_babai.format.base import Format
from vllm_babai.format.checks import check_owner, check_shape, name_crc
from vllm_babai.format.exact import halved
from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS, MULTIPLIERS, TILE_COLUMNS, TILE_ROWS

MAGIC = b"BBTR"
VERSION = 1
HEADER = struct.Struct("<4sI2If2I")  # magic, version; matrix; base; name, CRC of all this and what precedes the words
SPAN = 256  # rows
STEPS_PER_OCTAVE = 16
ZERO_SCALE = 255
MOST_ROWS = MOST_COLUMNS = 1 << 24


@dataclass(frozen=True)
class TrellisWeight:
    """One linear as the trellis form holds it. A place is where a row stands: row `order[place]` of the linear, or
    padding where that is not less than its rows.

    shape: (out_features, in_features). rates: uint8 [blocks, tiles], bits of a pair. order: int64 [places].
    base, exponents: of the scales, uint8 [places]. words: uint32 [Σ rates · TILE_ROWS].
    """

    shape: tuple[int, int]
    rates: np.ndarray
    order: np.ndarray
    base: float
    exponents: np.ndarray
    words: np.ndarray

    @property
    def scales(self) -> np.ndarray:
        """Scale of the row at every place, float32 [places], as bfloat16 holds it."""
        return row_scales(self.base, self.exponents)

    @property
    def starts(self) -> np.ndarray:
        """Where the words of each block begin, and where the last one's end, int64 [blocks + 1]."""
        return block_starts(self.rates)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features], exact in float32."""
        from vllm_babai.format.trellis.loops import decode_block

        rows, columns = self.shape
        blocks, tiles = self.rates.shape
        starts, scales = self.starts, self.scales.reshape(blocks, TILE_ROWS)
        weight = np.empty((blocks, TILE_ROWS, tiles * TILE_COLUMNS), np.float32)
        before = np.zeros(TILE_ROWS, np.uint32)

        def decode(block: int) -> None:
            words = self.words[starts[block] : starts[block + 1]]
            decode_block(words, before, self.rates[block], MULTIPLIERS, scales[block], weight[block])

        parallel_map(decode, range(blocks))
        real = self.order < rows
        dense = torch.empty(rows, columns)
        dense[torch.from_numpy(self.order[real])] = torch.from_numpy(
            weight.reshape(-1, weight.shape[2])[real, :columns]
        )
        return dense.to(dtype)


@dataclass(frozen=True)
class Trellis(Format[TrellisWeight]):
    """One linear layer as it lies on disk. trellis: uint8 [bytes], the blob."""

    name: ClassVar[str] = "trellis"
    dtypes: ClassVar[dict[str, torch.dtype]] = {"trellis": torch.uint8}
    residencies: ClassVar[tuple[str, ...]] = ("tiled",)

    trellis: Tensor

    @classmethod
    def encode(cls, weight: TrellisWeight, bits: int | None = None, linear: str = "") -> "Trellis":
        """Store a weight. Its tiles have bits of their own: `bits` changes nothing."""
        rows, columns = weight.shape
        nibbles = np.zeros((len(weight.rates), -(-weight.rates.shape[1] // 2) * 2), np.uint8)
        nibbles[:, : weight.rates.shape[1]] = weight.rates
        tables = [nibbles[:, ::2] | nibbles[:, 1::2] << 4, (weight.order % SPAN).astype(np.uint8), weight.exponents]
        body = b"".join(table.tobytes() for table in tables)
        body += bytes(-len(body) % 4)
        body += _word_crcs(weight.words, weight.starts).tobytes()
        fields = (MAGIC, VERSION, rows, columns, weight.base, name_crc(linear))
        crc = zlib.crc32(body, zlib.crc32(HEADER.pack(*fields, 0)))
        blob = HEADER.pack(*fields, crc) + body + weight.words.astype("<u4").tobytes()
        return cls(torch.from_numpy(np.frombuffer(blob, np.uint8).copy()))

    def decode(self, shape: tuple[int, int] | None = None, linear: str = "") -> TrellisWeight:
        """The stored weight, see `Format.decode`."""
        return read_trellis(self.trellis, shape, linear)


def read_trellis(blob: Tensor, shape: tuple[int, int] | None = None, linear: str = "") -> TrellisWeight:
    """Take a blob apart; its words are not copied. shape, linear: see `Format.decode`.

    Raises FormatError on anything truncated, corrupt, of another version, shape or linear. Nothing is allocated before
    the sizes that the header claims are held against the blob's own.
    """
    raw = blob.contiguous().numpy()
    if raw.ndim != 1 or len(raw) < HEADER.size or raw[:4].tobytes() != MAGIC:
        raise FormatError("trellis blob is truncated or is not one")
    magic, version, rows, columns, base, name, crc = HEADER.unpack_from(raw.data)
    if version != VERSION:
        raise FormatError(f"trellis blob has format version {version}; this version reads {VERSION}")
    check_shape((rows, columns), shape, "trellis")
    blocks, tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    if not 1 <= rows <= MOST_ROWS or not 1 <= columns <= MOST_COLUMNS or columns % 2:
        raise FormatError(f"trellis blob claims a matrix of {rows} × {columns}")
    nibble_bytes, places, spans = blocks * -(-tiles // 2), blocks * TILE_ROWS, -(-rows // SPAN)
    tables = nibble_bytes + 2 * places
    end = HEADER.size + tables + -tables % 4 + 4 * spans
    if len(raw) < end or (len(raw) - end) % 4:
        raise FormatError("trellis blob is too short for its tables")
    header = HEADER.pack(magic, version, rows, columns, base, name, 0)
    if zlib.crc32(raw[HEADER.size : end].data, zlib.crc32(header)) != crc:
        raise FormatError("trellis blob is truncated or corrupt: its CRC does not match")
    check_owner(name, linear, "trellis")
    packed, places_in_span, exponents = np.split(
        raw[HEADER.size : HEADER.size + tables], [nibble_bytes, nibble_bytes + places]
    )
    pairs = packed.reshape(blocks, -1)
    rates = np.ascontiguousarray(np.stack((pairs & 15, pairs >> 4), axis=2).reshape(blocks, -1)[:, :tiles])
    if rates.min() < FEWEST_BITS or rates.max() > MOST_BITS:
        raise FormatError(f"trellis blob has tiles of {rates.min()} to {rates.max()} bits a pair")
    if not np.isfinite(base) or base < 0:
        raise FormatError("trellis blob has scales that are negative or not finite")
    words = raw[end:].view("<u4") if raw[end:].ctypes.data % 4 == 0 else raw[end:].copy().view("<u4")
    starts = block_starts(rates)
    if len(words) != starts[-1]:
        raise FormatError(f"trellis blob has {len(words)} words, but its tiles need {starts[-1]}")
    damaged = np.flatnonzero(_word_crcs(words, starts) != raw[end - 4 * spans : end].copy().view("<u4"))
    if len(damaged):
        first = int(damaged[0]) * SPAN
        raise FormatError(f"trellis blob is corrupt in rows {first} to {min(first + SPAN, rows) - 1}")
    return TrellisWeight((rows, columns), rates, _whole_order(places_in_span, rows), base, exponents.copy(), words)


def row_scales(base: float, exponents: np.ndarray) -> np.ndarray:
    """Scales of rows, float32, as bfloat16 holds them. exponents: uint8."""
    scales = torch.from_numpy(base * halved(exponents / STEPS_PER_OCTAVE)).bfloat16().float().numpy()
    return np.where(exponents == ZERO_SCALE, np.float32(0), scales)


def scale_exponents(scales: Tensor) -> tuple[float, np.ndarray]:
    """Base and exponents, uint8, of the nearest scales that can be stored. scales: ≥ 0, [any]."""
    base = float(scales.max().bfloat16())
    if base == 0:
        return 0.0, np.full(len(scales), ZERO_SCALE, np.uint8)
    octaves = torch.log2(base / scales.double())
    steps = torch.round(STEPS_PER_OCTAVE * octaves).clamp(0, ZERO_SCALE - 1)
    return base, torch.where(scales > 0, steps, ZERO_SCALE).to(torch.uint8).cpu().numpy()


def block_starts(rates: np.ndarray) -> np.ndarray:
    """Where the words of each block of rows begin, and where the last one's end, int64 [blocks + 1]."""
    return np.concatenate(([0], np.cumsum(rates.astype(np.int64).sum(1) * TILE_ROWS)))


def stored_bits(rates: np.ndarray, shape: tuple[int, int]) -> int:
    """Bits that a linear with these rates takes, everything counted."""
    tables = len(rates) * (-(-rates.shape[1] // 2) + 2 * TILE_ROWS)
    fixed = HEADER.size + tables + -tables % 4 + 4 * -(-shape[0] // SPAN)
    return 8 * fixed + 32 * TILE_ROWS * int(rates.sum(dtype=np.int64))


def _word_crcs(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """CRC-32 of the words of every span, uint32 [spans]."""
    edges = [*starts[: -1 : SPAN // TILE_ROWS], starts[-1]]
    little = words.astype("<u4", copy=False)
    return np.array([zlib.crc32(little[a:b].data) for a, b in pairwise(edges)], "<u4")


def _whole_order(places_in_span: np.ndarray, rows: int) -> np.ndarray:
    """Row of the linear at every place, int64. Raises FormatError when rows are missing or there twice."""
    places = np.arange(len(places_in_span))
    order = places // SPAN * SPAN + places_in_span
    if not np.array_equal(np.sort(order), places):
        raise FormatError("trellis blob has rows that are missing or there twice")
    return order


def pack_symbols(symbols: np.ndarray, rates: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Words of a whole linear. symbols: uint16 [out, in / 2]. rates, order: see `TrellisWeight`."""
    from vllm_babai.format.trellis.loops import PAIRS, pack_block

    rows, pairs = symbols.shape
    starts = block_starts(rates)
    by_place = np.zeros((len(order), rates.shape[1] * PAIRS), np.uint16)
    real = order < rows
    by_place[real, :pairs] = symbols[order[real]]
    words = np.empty(starts[-1], np.uint32)

    def pack(block: int) -> None:
        own = by_place[block * TILE_ROWS : (block + 1) * TILE_ROWS]
        pack_block(own, rates[block], words[starts[block] : starts[block + 1]])

    parallel_map(pack, range(len(rates)))
    return words
