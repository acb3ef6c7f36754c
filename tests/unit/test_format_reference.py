"""The blobs decoded by a plain reading of vllm_babai/format/README.md, without any of the package's own decoders.

Slow and simple on purpose: whoever writes a decoder in another language can start from this file.
"""

import math
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_babai.format import BIT_WIDTHS, HPTQ, SSQR, LatticeWeight, Trellis, TrellisWeight, step_exponents
from vllm_babai.format.dense_sparse import overflow
from vllm_babai.format.entropy import hptq
from vllm_babai.format.trellis import blob as trellis

README = Path(__file__).parents[2] / "vllm_babai" / "format" / "README.md"
MULTIPLIERS = [0, 0, 0x3BBD85A1, 0x6D7D2377, 0x41EE7ED1, 0xF25867C1, 0x9394C293, 0x8FCB4199, 0xB303FCD9]
MULTIPLIERS += [0xBB1EB813, 0xBB1EB813]
TOTAL, ESCAPE, CENTRE = 4096, 255, 127
LINEAR = "model.layers.7.up_proj"
Matrix = list[list[int]]


class Reader:
    """Little-endian numbers from a byte string, one after another."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.position = raw, 0

    def take(self, kind: str) -> int:
        (value,) = struct.unpack_from("<" + kind, self.raw, self.position)
        self.position += struct.calcsize("<" + kind)
        return value

    def several(self, kind: str, count: int) -> list[int]:
        return [self.take(kind) for _ in range(count)]


def normalize(weights: list[int]) -> list[int]:
    """ "Frequencies" in the README."""
    total = sum(weights)
    frequency = [max(math.floor(weight / total * TOTAL + 0.5), 1) if weight else 0 for weight in weights]
    while surplus := sum(frequency) - TOTAL:
        largest = sorted(range(len(frequency)), key=lambda symbol: -frequency[symbol])
        step = 1 if surplus > 0 else -1
        for symbol in largest[: min(abs(surplus), max(1, sum(f > 1 for f in frequency)))]:
            frequency[symbol] -= step
    return frequency


def halved(exponent: float) -> float:
    """ "Powers of two" in the README."""
    fixed = int(min(exponent, 63.0) * 2**24)
    result, root = math.ldexp(1.0, -(fixed >> 24)), 0.5
    for bit in range(23, -1, -1):
        root = math.sqrt(root)
        if fixed >> bit & 1:
            result *= root
    return result


def gaussian(code: int, shift: int) -> list[int]:
    """ "Gaussians" in the README."""
    precision = 0.5 * 1.4426950408889634 * halved(2 * code / 16) * 4.0**4
    weights = []
    for symbol in range(ESCAPE):
        points = [(symbol - CENTRE + (sample + 0.5) / 8) * (1 << shift) - 0.5 for sample in range(8)]
        weights.append(int(sum(halved(point * point * precision) for point in points) * (1 << 40)))
    total = sum(weights)
    rare = sum(weight for weight in weights if weight * 4 * TOTAL < total)
    return normalize([0 if weight * 4 * TOTAL < total else weight for weight in weights] + [max(rare, 1)])


def find(frequency: list[int], slot: int) -> tuple[int, int, int]:
    """Symbol of a slot, its frequency, and the position of the slot within it."""
    for symbol, count in enumerate(frequency):
        if slot < count:
            return symbol, count, slot
        slot -= count
    raise AssertionError("frequencies do not sum to 4096")


def decode_ssqr(stored: SSQR) -> Matrix:
    """Integers of an SSQR linear."""
    reader = Reader(stored.overflow.numpy().tobytes())
    assert reader.raw[:4] == b"BBOV"
    reader.position = 4
    assert reader.take("B") == 3
    bits, gap_classes, excess_classes = reader.several("B", 3)
    tile_rows, tile_columns = reader.several("H", 2)
    rows, columns, entries, name = reader.several("I", 4)
    assert name == zlib.crc32(b"7.up_proj")
    assert reader.take("I") == zlib.crc32(reader.raw[:28] + bytes(4) + reader.raw[32:])
    across = math.ceil(columns / tile_columns)
    tiles = math.ceil(rows / tile_rows) * across
    five_digits = sorted({digits << power for digits, power in product(range(32), range(8))})
    tables = [
        normalize([five_digits[code] for code in reader.several("B", classes)])
        for classes in (gap_classes, excess_classes)
    ]
    crcs, counts, lengths = (reader.several("I", tiles) for _ in range(3))
    groups = stored.scales.shape[1]
    for tile, crc in enumerate(crcs):
        down, left = slice(tile // across * tile_rows, (tile // across + 1) * tile_rows), tile % across * tile_columns
        right = min(left + tile_columns, columns)
        dense = stored.qweight[down, left * bits // 8 : math.ceil(right * bits / 8)]
        scales = stored.scales[down, left * groups // columns : math.ceil(right * groups / columns)]
        assert crc == zlib.crc32(bytes(dense.flatten()) + bytes(scales.contiguous().view(torch.uint8).flatten()))
    assert sum(counts) == entries

    integers = []
    for row in stored.qweight.tolist():
        stream = int.from_bytes(bytes(row), "little")
        integers.append([(stream >> bits * k) % 2**bits - 2 ** (bits - 1) for k in range(columns)])
    for tile in range(tiles):
        words = reader.several("H", lengths[tile])
        state, at, position = 2**16, 0, -1
        if counts[tile]:
            state, at = words[0] | words[1] << 16, 2
        for _ in range(counts[tile]):
            pair = []
            for table in tables:
                symbol, frequency, within = find(table, state % TOTAL)
                state = frequency * (state // TOTAL) + within
                if state < 2**16:
                    state, at = state << 16 | words[at], at + 1
                low = symbol // 2 - 1 if symbol > 3 else 0
                pair.append((symbol - 2 * low << low) + state % 2**low)
                state >>= low
                if state < 2**16:
                    state, at = state << 16 | words[at], at + 1
            position += pair[0] + 1
            excess = (pair[1] // 2 + 1) * (-1 if pair[1] % 2 else 1)
            row = tile // across * tile_rows + position // tile_columns
            integers[row][tile % across * tile_columns + position % tile_columns] += excess
        assert (state, at) == (2**16, len(words))
    assert reader.position == len(reader.raw)
    return integers


def decode_stream(
    words: list[int], rows: list[int], columns: list[int], tables: list[list[int]], code: tuple[int, int, int]
) -> Matrix:
    """One stream of HPTQ; rows, columns: their classes. code: offset, shift, lanes."""
    offset, shift, lanes = code
    states = [words[2 * lane] | words[2 * lane + 1] << 16 for lane in range(lanes)]
    at, integers = 2 * lanes, []
    for row in rows:
        decoded: list[int] = []
        for first in range(0, len(columns), lanes):
            for lane, column in enumerate(columns[first : first + lanes]):
                state = states[lane]
                symbol, frequency, within = find(tables[row + column], (state >> shift) % TOTAL)
                low = state % 2**shift
                state = frequency * (state >> 12 + shift) + within
                if state < 2**16:
                    state, at = state << 16 | words[at], at + 1
                integer = (symbol - CENTRE << shift) + low + offset
                if symbol == ESCAPE:
                    integer, at = (words[at] + 2**15) % 2**16 - 2**15, at + 1
                states[lane] = state
                decoded.append(integer)
        integers.append(decoded)
    assert at == len(words)
    assert set(states) == {2**16}
    return integers


def read_vectors(reader: Reader, lengths: list[int]) -> Matrix:
    """ "Vectors" in the README."""
    heads = [(reader.take("h"), reader.take("B")) for _ in lengths]
    words = reader.several("H", reader.take("I"))
    contexts = [context for context, length in enumerate(lengths) for _ in range(length)]
    (row,) = decode_stream(words, [0], contexts, [gaussian(code, 0) for _, code in heads], (0, 0, 1))
    return [
        [value + centre for value, context in zip(row, contexts, strict=True) if context == index]
        for index, (centre, _) in enumerate(heads)
    ]


def decode_hptq(stored: HPTQ) -> tuple[Matrix, list[int] | None]:
    """Integers of an HPTQ linear, and exponents of its columns' steps."""
    reader = Reader(stored.codes.numpy().tobytes())
    assert reader.raw[:4] == b"BBHQ"
    reader.position = 4
    assert reader.take("B") == 2
    shift, lanes, contexts, steps = reader.several("B", 4)
    rows, columns = reader.several("I", 2)
    tile_rows, tile_columns = reader.several("H", 2)
    offset, name = reader.take("h"), reader.take("I")
    assert name == zlib.crc32(b"7.up_proj")
    assert reader.take("I") == zlib.crc32(bytes(stored.scales.view(torch.uint8).flatten()))
    assert reader.take("I") == zlib.crc32(reader.raw[:31] + bytes(4) + reader.raw[35:])

    tables = []
    for code in reader.several("B", contexts):
        if code:
            tables.append(gaussian(code, shift))
            continue
        first, count = reader.several("B", 2)
        listed = reader.several("H", count + 1)
        tables.append([0] * first + listed[:-1] + [0] * (ESCAPE - first - count) + listed[-1:])
    row_class, column_class = [0] * rows, [0] * columns
    if contexts > 1:
        row_class, column_class = read_vectors(reader, [rows, columns])
    exponents = read_vectors(reader, [columns])[0] if steps else None
    reader.position += -reader.position % 4
    across = math.ceil(columns / tile_columns)
    ends = reader.several("I", math.ceil(rows / tile_rows) * across)

    integers = [[0] * columns for _ in range(rows)]
    for tile, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        top, left = tile // across * tile_rows, tile % across * tile_columns
        classes = row_class[top : top + tile_rows], column_class[left : left + tile_columns]
        part = decode_stream(reader.several("H", end - start), *classes, tables, (offset, shift, lanes))
        for row, values in enumerate(part):
            integers[top + row][left : left + len(values)] = values
    assert reader.position == len(reader.raw)
    return integers, exponents


def decode_trellis(stored: Trellis) -> list[list[float]]:
    """The dense weight, row by row."""
    blob = stored.trellis.numpy().tobytes()
    rows, columns, base = struct.unpack_from("<2If", blob, 8)
    blocks, tiles, start = -(-rows // 16), -(-columns // 64), 28
    half = -(-tiles // 2)
    nibbles = [[byte >> 4 * k & 15 for byte in blob[start + half * b :][:half] for k in (0, 1)] for b in range(blocks)]
    rates, start = [row[:tiles] for row in nibbles], start + half * blocks
    order, exponents, start = blob[start:][: 16 * blocks], blob[start + 16 * blocks :], start + 32 * blocks
    start += -start % 4 + 4 * -(-rows // 256)
    words = struct.unpack_from(f"<{16 * sum(map(sum, rates))}I", blob, start)
    weight, at = [[0.0] * columns for _ in range(rows)], 0
    for place in range(16 * blocks):
        block, own = divmod(place, 16)
        row, word, state, values = block // 16 * 256 + order[place], at + own, 0, []
        for bits in rates[block]:
            stream = "".join(f"{words[word + 16 * i]:032b}" for i in range(bits))
            for pair in range(32):
                state = (state << bits | int(stream[bits * pair :][:bits], 2)) % (1 << 32)
                product = state * MULTIPLIERS[bits] % (1 << 32) & 0x8FFF8FFF
                values += struct.unpack("<2e", struct.pack("<I", product))
            word += 16 * bits
        if own == 15:
            at += 16 * sum(rates[block])
        scale = 0.0 if exponents[place] == 255 else base * halved(exponents[place] / 16)
        if row < rows:
            rounded = float(torch.tensor(scale).bfloat16())
            weight[row] = [value * rounded for value in values[:columns]]
    return weight


def matrix(rows: int, columns: int, sigma: float) -> torch.Tensor:
    return torch.round(sigma * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))).short()


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_ssqr(bits: int) -> None:
    integers = matrix(140, 37, 2.0 ** (bits - 2))  # two tiles, one of them short
    integers[139, 36] = -32767
    stored = SSQR.encode(LatticeWeight(integers, torch.ones(140, 1).bfloat16()), bits, LINEAR)
    assert decode_ssqr(stored) == integers.tolist()


def test_ssqr_tiles_side_by_side() -> None:
    integers = matrix(3, 1500, 3.0)
    scales = torch.rand(3, 3).bfloat16() + 1  # the tiles share the scale in the middle
    assert decode_ssqr(SSQR.encode(LatticeWeight(integers, scales), 3, LINEAR)) == integers.tolist()


@pytest.mark.parametrize("sigma", [0.5, 3.0, 60.0])
@pytest.mark.parametrize("shape", [(40, 33), (150, 50), (3, 1500)])
def test_hptq(shape: tuple[int, int], sigma: float) -> None:
    integers = matrix(*shape, sigma)
    integers[:, : shape[1] // 2] //= 4
    integers[1, 2] = 32767
    exponents = step_exponents(torch.linspace(1, 2, shape[1]))
    stored = HPTQ.encode(LatticeWeight(integers, torch.ones(1, 1).bfloat16(), exponents), linear=LINEAR)
    assert decode_hptq(stored) == (integers.tolist(), exponents.tolist())


def test_hptq_with_classes_and_lanes() -> None:
    spread = torch.linspace(-2, 2, 256).exp2()
    integers = torch.round(matrix(192, 256, 1.0) * spread).short()
    stored = HPTQ.encode(LatticeWeight(integers, torch.ones(1, 1).bfloat16()), linear=LINEAR)
    coded = hptq.read_blob(stored.codes)
    assert coded.shape.lanes > 1
    assert coded.model.classes.contexts > 1
    assert decode_hptq(stored) == (integers.tolist(), None)


@pytest.mark.parametrize("shape", [(40, 130), (300, 64), (16, 2)])
def test_trellis(shape: tuple[int, int]) -> None:
    rows, columns = shape
    generator = np.random.default_rng(0)
    blocks, tiles = -(-rows // 16), -(-columns // 64)
    rates = generator.integers(2, 11, (blocks, tiles)).astype(np.uint8)
    spans = np.split(np.arange(16 * blocks), range(256, 16 * blocks, 256))
    order = np.concatenate([generator.permutation(span) for span in spans])
    words = generator.integers(0, 1 << 32, 16 * int(rates.sum()), dtype=np.uint32)
    exponents = generator.integers(0, 256, 16 * blocks).astype(np.uint8)
    stored = Trellis.encode(TrellisWeight(shape, rates, order, 0.75, exponents, words))
    assert decode_trellis(stored) == stored.decode().dequantize().tolist()


@pytest.mark.parametrize(
    ("title", "header"),
    [
        ("Header of `overflow`", overflow.HEADER),
        ("Header of `codes`", hptq.HEADER),
        ("Header of `trellis`", trellis.HEADER),
    ],
)
def test_headers_are_as_the_readme_lists_them(title: str, header: struct.Struct) -> None:
    section = README.read_text().split(f"### {title}\n")[1].split("\n#")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
    kinds = {"4 bytes": "4s", "u8": "B", "u16": "H", "i16": "h", "u32": "I", "f32": "f"}
    types = [kinds[kind.strip()] for _, kind in rows]
    assert [int(offset) for offset, _ in rows] == [struct.calcsize("<" + "".join(types[:i])) for i in range(len(types))]
    assert struct.calcsize("<" + "".join(types)) == header.size
    assert struct.unpack("<" + "".join(types), bytes(range(header.size))) == header.unpack(bytes(range(header.size)))


def test_column_steps_are_as_the_readme_says() -> None:
    exponents = torch.arange(0, 320, 7, dtype=torch.int16)
    weight = LatticeWeight(torch.ones(1, len(exponents), dtype=torch.int16), torch.ones(1, 1).bfloat16(), exponents)
    expected = torch.tensor([halved(k / 8) for k in exponents.tolist()], dtype=torch.float64).bfloat16()
    assert np.array_equal(weight.dequantize()[0].numpy(), expected.float().numpy())
