"""The trellis form: what is packed is decoded to the same values, and blobs that are damaged or hostile are refused."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_babai.format import FormatError, Trellis, TrellisWeight
from vllm_babai.format.trellis import blob as layout
from vllm_babai.format.trellis.blob import pack_symbols, read_trellis, row_scales, scale_exponents, stored_bits
from vllm_babai.format.trellis.code import MOST_BITS, MULTIPLIERS, root_mean_square, values_of


def sample(rows: int, columns: int, seed: int = 0) -> tuple[TrellisWeight, np.ndarray, np.ndarray]:
    """Random symbols as a weight, the symbols [rows, pairs], and the bits of each."""
    generator = np.random.default_rng(seed)
    blocks, tiles = -(-rows // 16), -(-columns // 64)
    rates = generator.integers(2, MOST_BITS + 1, (blocks, tiles)).astype(np.uint8)
    places = np.arange(16 * blocks)
    order = np.concatenate([generator.permutation(span) for span in np.split(places, range(256, len(places), 256))])
    by_place = rates.repeat(16, 0).repeat(32, 1)
    bits = np.empty_like(by_place)
    bits[order] = by_place
    bits = bits[:rows, : columns // 2]
    symbols = (generator.integers(0, 1 << 16, bits.shape) & ((1 << bits.astype(np.int64)) - 1)).astype(np.uint16)
    exponents = generator.integers(0, 256, len(order)).astype(np.uint8)
    words = pack_symbols(symbols, rates, order)
    return TrellisWeight((rows, columns), rates, order, 0.375, exponents, words), symbols, bits


def spelled(weight: TrellisWeight, symbols: np.ndarray, bits: np.ndarray) -> torch.Tensor:
    """The dense weight by the definition of the code, one pair after the other."""
    scales = np.empty(len(weight.order), np.float32)
    scales[weight.order] = weight.scales
    states, columns = np.zeros(len(symbols), np.int64), []
    for pair in range(symbols.shape[1]):
        own = bits[:, pair].astype(np.int64)
        states = ((states << own) + symbols[:, pair]) & 0xFFFFFFFF
        words = (states * MULTIPLIERS[own].astype(np.int64)) & 0xFFFFFFFF
        columns.append(values_of(words.astype(np.uint32)))
    values = np.stack(columns, 1).reshape(len(symbols), -1)
    return torch.from_numpy(values * scales[: len(symbols), None])


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 300), pairs=st.integers(1, 110), seed=st.integers(0, 99))
def test_round_trip(rows: int, pairs: int, seed: int) -> None:
    weight, symbols, bits = sample(rows, 2 * pairs, seed)
    stored = Trellis.encode(weight)
    decoded = stored.decode()
    assert torch.equal(decoded.dequantize(), spelled(weight, symbols, bits))
    assert 8 * stored.trellis.numel() == stored_bits(weight.rates, weight.shape)


def test_the_code_is_symmetric_and_its_values_are_fp16() -> None:
    values = values_of(np.arange(1 << 16, dtype=np.uint32))[:, 0]
    assert np.array_equal(np.sort(values), -np.sort(values)[::-1])
    assert np.array_equal(values.astype(np.float16).astype(np.float32), values)
    assert root_mean_square() == pytest.approx(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def test_scales_are_kept_to_two_percent_and_zero_stays_zero() -> None:
    wanted = torch.cat((torch.logspace(-3, 1, 200), torch.zeros(3)))
    base, exponents = scale_exponents(wanted)
    stored = torch.from_numpy(row_scales(base, exponents))
    assert torch.equal(stored[-3:], torch.zeros(3))
    assert torch.allclose(stored[:-3], wanted[:-3], rtol=0.027)
    assert torch.equal(stored, stored.bfloat16().float())


@pytest.mark.parametrize("place", range(0, 4000, 61))
def test_any_changed_byte_is_noticed(place: int) -> None:
    blob = Trellis.encode(sample(40, 96)[0]).trellis
    blob[place % len(blob)] ^= 0x10
    with pytest.raises(FormatError):
        read_trellis(blob)


@pytest.mark.parametrize("length", [0, 3, 20, 27, 60, 400, -4, -1])
def test_truncated_blobs_are_refused(length: int) -> None:
    with pytest.raises(FormatError):
        read_trellis(Trellis.encode(sample(40, 96)[0]).trellis[:length])


def test_a_blob_of_two_dimensions_is_refused() -> None:
    with pytest.raises(FormatError, match="trellis blob is truncated or is not one"):
        read_trellis(Trellis.encode(sample(40, 96)[0]).trellis.reshape(-1, 1))


def test_the_part_that_is_corrupt_is_named() -> None:
    blob = Trellis.encode(sample(600, 96)[0]).trellis
    blob[-1] ^= 1
    with pytest.raises(FormatError, match="rows 512 to 599"):
        read_trellis(blob)


def signed(blob: torch.Tensor, **changed: int | float) -> torch.Tensor:
    """A blob with other fields in its header, and a CRC that fits them."""
    raw = bytearray(blob.numpy().tobytes())
    magic, version, rows, columns, base, name, _ = layout.HEADER.unpack_from(raw)
    fields = {"version": version, "rows": rows, "columns": columns, "base": base, "name": name} | changed
    weight = read_trellis(blob)
    end = len(raw) - 4 * len(weight.words)
    head = struct.pack("<4sI2IfI", magic, *fields.values())
    crc = zlib.crc32(bytes(raw[layout.HEADER.size : end]), zlib.crc32(head + bytes(4)))
    raw[: layout.HEADER.size] = head + struct.pack("<I", crc)
    return torch.frombuffer(raw, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 7}, "version 7"),
        ({"rows": 0xFFFFFFFF}, "claims a matrix"),
        ({"rows": 1 << 24, "columns": 1 << 24}, "too short"),
        ({"columns": 97}, "claims a matrix"),
        ({"base": float("inf")}, "not finite"),
    ],
)
def test_hostile_headers_are_refused(changed: dict[str, int | float], message: str) -> None:
    blob = Trellis.encode(sample(40, 96)[0]).trellis
    assert torch.equal(signed(blob), blob)
    with pytest.raises(FormatError, match=message):
        read_trellis(signed(blob, **changed))


def test_another_layers_blob_is_refused() -> None:
    with pytest.raises(FormatError, match="the layer is 40 × 128, but trellis is of 40 × 96"):
        read_trellis(Trellis.encode(sample(40, 96)[0]).trellis, (40, 128))


def test_a_blob_below_another_name_is_refused() -> None:
    stored = Trellis.encode(sample(40, 96)[0], linear="model.layers.7.mlp.up_proj")
    stored.decode((40, 96), "language_model.layers.7.mlp.up_proj")
    stored.decode((40, 96))
    with pytest.raises(FormatError, match="trellis belongs to another linear"):
        stored.decode((40, 96), "model.layers.8.mlp.up_proj")


def test_rows_that_are_there_twice_are_refused() -> None:
    weight = sample(40, 96)[0]
    twice = weight.order.copy()
    twice[1] = twice[0]
    with pytest.raises(FormatError, match="there twice"):
        read_trellis(
            Trellis.encode(
                TrellisWeight(weight.shape, weight.rates, twice, 0.5, weight.exponents, weight.words)
            ).trellis
        )
