"""The probability model of one integer matrix: contexts by row and column class, a table of frequencies for each."""

import math
import struct
from dataclasses import dataclass

import numpy as np

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError
from vllm_babai.format.entropy import tables
from vllm_babai.format.entropy.classes import Classes, fit_classes, one_class, spread
from vllm_babai.format.entropy.tables import ESCAPE
from vllm_babai.format.entropy.vectors import pack_vectors, unpack_vectors, vector_bits

CLASS_STEPS = (0.25, 0.125)  # octaves between neighbouring classes
COARSE = 5.0  # root mean square from which low bits are stored as they are
SAMPLE = 1 << 16  # integers that tell the centre and the reach of all
HISTOGRAM_WEIGHTS = 1 << 20  # per piece of work for a thread

_TABLE_HEADER = struct.Struct("<2B")  # first symbol, number of symbols


@dataclass(frozen=True)
class CodeModel:
    """What encoder and decoder must agree on before the first symbol.

    offset: subtracted from every integer. shift: low bits stored as they are. classes: see `entropy.classes`.
    codes: uint8 [contexts], the Gaussian of each context, or 0 where its table is explicit.
    frequencies: uint32 [contexts, ESCAPE + 1].
    """

    offset: int
    shift: int
    classes: Classes
    codes: np.ndarray
    frequencies: np.ndarray


def fit_code_model(integers: np.ndarray) -> tuple[CodeModel, float]:
    """The model for int16 [rows, columns] that takes the fewest bits, and those bits: its own and the symbols'."""
    if not integers.size:
        return _fit_tables(integers, 0, 0, one_class(*integers.shape))
    offset, reach = _centre_and_reach(integers)
    centred = np.clip(integers, max(offset - reach, -(2**15)), min(offset + reach, 2**15 - 1)).astype(np.float32)
    row_spread, column_spread = spread(centred - np.float32(offset))
    rms = math.sqrt(np.exp2(2 * row_spread).mean() * np.exp2(2 * column_spread).mean())
    shift = min(max(math.floor(math.log2(rms / COARSE)), 0), tables.MAX_SHIFT)
    choices = [one_class(*integers.shape), *(fit_classes(row_spread, column_spread, step) for step in CLASS_STEPS)]
    return min((_fit_tables(integers, offset, shift, classes) for classes in choices), key=lambda fitted: fitted[1])


def _centre_and_reach(integers: np.ndarray) -> tuple[int, int]:
    """The median, and a distance from it beyond which integers are outliers that say nothing about the others."""
    every = integers.size // SAMPLE | 1  # odd, lest it meet the same columns in every row
    sample = integers.reshape(-1)[::every].astype(np.int32)
    offset = int(np.median(sample))
    return offset, max(8, 4 * int(np.quantile(np.abs(sample - offset), 0.99)))


def _fit_tables(integers: np.ndarray, offset: int, shift: int, classes: Classes) -> tuple[CodeModel, float]:
    """The best table for every context, and the bits of these tables, the classes and the symbols."""
    codes = np.zeros(classes.contexts, np.uint8)
    frequencies = np.zeros((classes.contexts, ESCAPE + 1), np.uint32)
    bits = integers.size * shift + _class_bits(classes)
    for context, counts in enumerate(_histogram(integers, offset, shift, classes)):
        codes[context], frequencies[context], table_bits = _best_table(counts, shift)
        bits += table_bits
    return CodeModel(offset, shift, classes, codes, frequencies), bits


def _class_bits(classes: Classes) -> float:
    return 32 + vector_bits(classes.rows) + vector_bits(classes.columns) + 24 if classes.contexts > 1 else 0.0


def _best_table(counts: np.ndarray, shift: int) -> tuple[int, np.ndarray, float]:
    """Code (0: explicit), frequencies, and bits of the table and of symbols with these counts."""
    code, bits = tables.best_gaussian(counts, shift)
    if counts.any():
        frequency = tables.explicit(counts)
        explicit_bits = tables.coded_bits(counts, frequency) + 8 * len(_pack_table(frequency))
        if explicit_bits < bits:
            return 0, frequency, 8 + explicit_bits
    return code, tables.gaussian(code, shift), 8 + bits


def _histogram(integers: np.ndarray, offset: int, shift: int, classes: Classes) -> np.ndarray:
    """Symbols by context, int64 [contexts, ESCAPE + 1]."""
    from vllm_babai.format.entropy import rans

    def count(first: int) -> np.ndarray:
        counts = np.zeros((classes.contexts, ESCAPE + 1), np.int64)
        last = min(first + height, len(integers))
        rans.histogram(integers, classes, offset, shift, first, last, counts)
        return counts

    height = max(1, HISTOGRAM_WEIGHTS // max(1, integers.shape[1]))
    empty = np.zeros((classes.contexts, ESCAPE + 1), np.int64)
    return sum(parallel_map(count, range(0, len(integers), height)), empty)


def pack_code_model(model: CodeModel) -> bytes:
    """Tables and classes as bytes; offset, shift and the number of contexts are the blob header's."""
    parts = [model.codes.tobytes()]
    parts += [_pack_table(table) for code, table in zip(model.codes, model.frequencies, strict=True) if not code]
    if model.classes.contexts > 1:
        parts.append(pack_vectors([model.classes.rows, model.classes.columns]))
    return b"".join(parts)


def unpack_code_model(
    raw: memoryview, shape: tuple[int, int], offset: int, shift: int, contexts: int
) -> tuple[CodeModel, int]:
    """The model that `pack_code_model` wrote at the start of `raw`, and how many bytes it takes. Raises FormatError."""
    try:
        codes = np.frombuffer(raw, np.uint8, contexts).copy()
        position = contexts
        frequencies = np.zeros((contexts, ESCAPE + 1), np.uint32)
        for context, code in enumerate(codes):
            if code:
                frequencies[context] = tables.gaussian(int(code), shift)
            else:
                frequencies[context], position = _unpack_table(raw, position)
        classes = one_class(*shape)
        if contexts > 1:
            vectors, position = unpack_vectors(raw, position, list(shape))
            classes = Classes(*vectors)
    except (struct.error, ValueError) as error:
        raise FormatError(f"codes blob has a damaged model: {error}") from error
    if classes.contexts > contexts or min(classes.rows.min(initial=0), classes.columns.min(initial=0)) < 0:
        raise FormatError(f"codes blob has classes outside the {contexts} contexts of its header")
    return CodeModel(offset, shift, classes, codes, frequencies), position


def _pack_table(frequency: np.ndarray) -> bytes:
    """First symbol, number of symbols, then their frequencies and the escape's as uint16."""
    used = np.flatnonzero(frequency[:ESCAPE])
    first, count = (int(used[0]), int(used[-1] - used[0]) + 1) if len(used) else (0, 0)
    listed = np.append(frequency[first : first + count], frequency[ESCAPE])
    return _TABLE_HEADER.pack(first, count) + listed.astype("<u2").tobytes()


def _unpack_table(raw: memoryview, position: int) -> tuple[np.ndarray, int]:
    first, count = _TABLE_HEADER.unpack_from(raw, position)
    position += _TABLE_HEADER.size
    listed = np.frombuffer(raw, "<u2", count + 1, position)
    if first + count > ESCAPE or listed.sum(dtype=np.int64) != tables.TOTAL:
        raise FormatError("codes blob has a table whose frequencies do not add up")
    frequency = np.zeros(ESCAPE + 1, np.uint32)
    frequency[first : first + count] = listed[:count]
    frequency[ESCAPE] = listed[count]
    return frequency, position + 2 * (count + 1)
