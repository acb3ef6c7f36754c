"""Short vectors of small integers, such as classes, in few bytes: the matrix code without classes and tables.

All vectors together are one stream of one lane; every vector has a centre and a Gaussian of its own.
"""

import struct

import numpy as np

from vllm_babai.errors import FormatError
from vllm_babai.format.entropy import tables
from vllm_babai.format.entropy.classes import Classes
from vllm_babai.format.entropy.code import Code, Stream, Tile, padded
from vllm_babai.format.entropy.tables import CENTRE, ESCAPE

_VECTOR = struct.Struct("<hB")  # centre, Gaussian
_STREAM = struct.Struct("<I")  # words


def vector_bits(vector: np.ndarray) -> float:
    """Bits of one integer vector among those of `pack_vectors`."""
    return 8 * _VECTOR.size + _fit(vector)[2]


def pack_vectors(vectors: list[np.ndarray]) -> bytes:
    """Vectors of integers in −2¹⁵ … 2¹⁵ − 1; neither their number nor their lengths are stored."""
    from vllm_babai.format.entropy import rans

    fitted = [_fit(vector)[:2] for vector in vectors]
    residuals = [vector - centre for vector, (centre, _) in zip(vectors, fitted, strict=True)]
    row = np.concatenate(residuals).astype(np.int16)[None]
    frequencies = np.stack([tables.gaussian(code, 0) for _, code in fitted])
    code = Code(tables.encoder_table(frequencies), offset=0, shift=0, lanes=1)
    words = rans.encode_tile(row, _tile(row), _classes([len(vector) for vector in vectors]), code)
    heads = b"".join(_VECTOR.pack(*head) for head in fitted)
    return heads + _STREAM.pack(len(words)) + words.astype("<u2").tobytes()


def unpack_vectors(raw: memoryview, position: int, lengths: list[int]) -> tuple[list[np.ndarray], int]:
    """Vectors, int32, that `pack_vectors` wrote at `position`, and the position after them.

    Raises FormatError, struct.error or ValueError when they are damaged.
    """
    from vllm_babai.format.entropy import rans

    heads = [_VECTOR.unpack_from(raw, position + _VECTOR.size * index) for index in range(len(lengths))]
    position += _VECTOR.size * len(lengths)
    (count,) = _STREAM.unpack_from(raw, position)
    position += _STREAM.size
    words = padded(np.frombuffer(raw, "<u2", count, position), 1)
    if any(code not in tables.GAUSSIANS for _, code in heads):
        raise FormatError("codes blob has vectors without a Gaussian")
    table = tables.decoder_table(np.stack([tables.gaussian(code, 0) for _, code in heads]))
    row = np.empty((1, sum(lengths)), np.int16)
    code = Code(table, offset=0, shift=0, lanes=1)
    if not rans.decode_tile(Stream(words, 0, count), _tile(row), _classes(lengths), code, row):
        raise FormatError("codes blob has damaged classes or steps")
    parts = np.split(row[0].astype(np.int32), np.cumsum(lengths)[:-1])
    return [part + centre for part, (centre, _) in zip(parts, heads, strict=True)], position + 2 * count


def _fit(vector: np.ndarray) -> tuple[int, int, float]:
    """Centre, Gaussian, and the bits of the integers so coded."""
    centre = round(float(vector.mean())) if len(vector) else 0
    symbol = vector.astype(np.int64) - centre + CENTRE
    symbol = np.where((symbol >= 0) & (symbol < ESCAPE), symbol, ESCAPE)
    code, bits = tables.best_gaussian(np.bincount(symbol, minlength=ESCAPE + 1), 0)
    return centre, code, bits


def _tile(row: np.ndarray) -> Tile:
    return Tile(0, 1, 0, row.shape[1])


def _classes(lengths: list[int]) -> Classes:
    """Vectors beside each other in one row, each with a context of its own."""
    return Classes(np.zeros(1, np.int32), np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
