"""The overflow blob: any excess survives, any window of it decodes alone, damage is noticed, an entry is cheap."""

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_babai.format import (
    BIT_WIDTHS,
    SSQR,
    FormatError,
    LatticeWeight,
    decode_overflow,
    integer_range,
    read_header,
)
from vllm_babai.format.dense_sparse.overflow import (
    HEADER,
    MAX_EXCESS,
    TILE_COLUMNS,
    TILE_ROWS,
    encode_overflow,
    read_overflow,
    tiling,
)

VALUES = st.one_of(
    st.just(st.just(0)),
    st.just(st.sampled_from([-MAX_EXCESS, MAX_EXCESS])),
    st.just(st.integers(-1, 1)),
    st.just(st.integers(-MAX_EXCESS, MAX_EXCESS)),
)


def sparse(shape: tuple[int, int], density: float, spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * spread).round().int().clamp(-MAX_EXCESS, MAX_EXCESS)
    return values * (torch.rand(shape, generator=generator) < density)


def blob_of(excess: torch.Tensor) -> torch.Tensor:
    return encode_overflow(excess, 4, np.arange(tiling(*excess.shape).count, dtype=np.uint32) + 123456789, "layer")


def decoded(blob: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    entries = decode_overflow(blob, rows, columns)
    dense = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.int32)
    dense[entries.rows.long(), entries.columns.long()] = entries.excess
    return dense


def assert_round_trip(excess: torch.Tensor) -> None:
    entries = decode_overflow(blob_of(excess))
    rows, columns = torch.nonzero(excess, as_tuple=True)  # sorted by row, then column
    assert torch.equal(entries.rows, rows.int())
    assert torch.equal(entries.columns, columns.int())
    assert torch.equal(entries.excess, excess[rows, columns].int())


@settings(deadline=None, max_examples=100)
@given(
    VALUES.flatmap(
        lambda values: arrays.arrays(np.int32, st.tuples(st.integers(1, 70), st.integers(1, 40)), elements=values)
    )
)
def test_round_trip_of_any_values(excess: np.ndarray) -> None:
    assert_round_trip(torch.from_numpy(excess))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 2500)),
    density=st.sampled_from([0.0, 0.0005, 0.01, 0.2, 1.0]),
    spread=st.sampled_from([1.0, 30.0, 20000.0]),
    seed=st.integers(0, 2**32),
)
def test_round_trip_over_many_tiles(shape: tuple[int, int], density: float, spread: float, seed: int) -> None:
    assert_round_trip(sparse(shape, density, spread, seed))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 5000), (5000, 1), (0, 0), (5, 0), (129, 1025), (128, 1024)])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_odd_shapes(shape: tuple[int, int], density: float) -> None:
    assert_round_trip(sparse(shape, density, 3.0))


def test_rows_without_overflow_between_rows_full_of_it() -> None:
    excess = torch.zeros(300, 1500, dtype=torch.int32)
    excess[140], excess[299] = 1, -MAX_EXCESS
    assert_round_trip(excess)


def test_an_extreme_excess_costs_less_than_64_bits() -> None:
    excess = sparse((256, 1024), 0.01, 1.0)
    extreme = excess.clone()
    extreme[100, ::100] = MAX_EXCESS
    extreme[200, ::100] = -MAX_EXCESS
    assert_round_trip(extreme)
    added = torch.count_nonzero(extreme != excess)
    assert 8 * (len(blob_of(extreme)) - len(blob_of(excess))) < 64 * added


@pytest.mark.parametrize("value", [MAX_EXCESS + 1, -MAX_EXCESS - 1])
def test_an_excess_out_of_bounds_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="an excess beyond ±65536 cannot be stored"):
        blob_of(torch.tensor([[0, value]]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_window_decodes_to_the_slice(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 2500)), "shape")
    excess = sparse(shape, data.draw(st.sampled_from([0.0, 0.01, 0.3]), "density"), 20.0)
    window = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        window.append(slice(start, data.draw(st.integers(start, size))))
    assert torch.equal(decoded(blob_of(excess), *window), excess[window[0], window[1]])


@pytest.mark.parametrize("window", [slice(0, 11), slice(-1, 5), slice(6, 5)])
def test_a_window_outside_the_matrix_is_refused(window: slice) -> None:
    blob = blob_of(sparse((10, 10), 0.1, 3.0))
    with pytest.raises(ValueError, match="row window"):
        decode_overflow(blob, row_window=window)
    with pytest.raises(ValueError, match="column window"):
        decode_overflow(blob, column_window=window)


def test_header_describes_the_layer() -> None:
    excess = sparse((270, 2500), 0.01, 3.0)
    header = read_header(blob_of(excess))
    assert (header.rows, header.columns, header.bits, header.name_crc) == (270, 2500, 4, zlib.crc32(b"layer"))
    assert (header.tile_rows, header.tile_columns, header.down, header.across) == (TILE_ROWS, 834, 3, 3)
    assert read_overflow(blob_of(excess)).dense_crcs.tolist() == [123456789 + tile for tile in range(9)]
    assert header.entries == torch.count_nonzero(excess)
    assert read_header(blob_of(excess[:, :2048])).tile_columns == TILE_COLUMNS
    assert read_header(blob_of(excess[:, :40])).tile_columns == 40


def test_every_truncation_and_extension_is_noticed() -> None:
    blob = blob_of(sparse((40, 50), 0.05, 3.0))
    for length in range(len(blob)):
        with pytest.raises(FormatError, match="truncated"):
            decode_overflow(blob[:length])
    with pytest.raises(FormatError, match="truncated"):
        decode_overflow(torch.cat((blob, blob[:1])))


def test_every_flipped_bit_is_noticed() -> None:
    blob = blob_of(sparse((40, 50), 0.05, 3.0))
    for bit in range(8 * len(blob)):
        damaged = blob.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_overflow(damaged)


def test_a_tensor_that_is_no_blob_is_refused() -> None:
    with pytest.raises(FormatError, match="truncated, or no overflow blob"):
        read_header(torch.zeros(100, dtype=torch.uint8))


def signed(raw: bytes) -> torch.Tensor:
    """A blob with its CRC made right, as a different writer would."""
    fields = HEADER.unpack_from(raw)[:-1]
    crc = zlib.crc32(raw[HEADER.size :], zlib.crc32(HEADER.pack(*fields, 0)))
    return torch.frombuffer(bytearray(HEADER.pack(*fields, crc) + raw[HEADER.size :]), dtype=torch.uint8)


def with_field(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set a header field."""

    def change(blob: torch.Tensor) -> torch.Tensor:
        raw = blob.numpy().tobytes()
        fields = list(HEADER.unpack_from(raw))
        fields[index] = value
        return signed(HEADER.pack(*fields) + raw[HEADER.size :])

    return change


def with_byte(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set a byte after the header."""

    def change(blob: torch.Tensor) -> torch.Tensor:
        raw = bytearray(blob.numpy().tobytes())
        raw[index if index < 0 else HEADER.size + index] = value
        return signed(bytes(raw))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_field(1, 1), r"format version 1; this version reads \(2, 3\)"),
        (with_field(3, 40), "do not fit|invalid frequency table"),
        (with_field(4, 255), "too short|do not fit"),
        (with_field(5, 0), "tiles of 0 × 50 weights"),
        (with_field(6, 0), "tiles of 128 × 0 weights"),
        (with_field(6, 2000), "tiles of 128 × 2000 weights"),
        (with_field(5, 1), "tiles of 1 × 50 weights"),
        (with_field(7, 30), "outside their tile"),
        (with_field(7, 40000), "too short for its tiles"),
        (with_field(8, 49), "tiles of 128 × 50 weights"),
        (lambda blob: with_field(6, 49)(with_field(8, 49)(blob)), "outside their tile"),
        (with_field(9, 10**6), "do not fit its entries"),
        (with_byte(0, 255), "invalid frequency table"),
        (with_byte(-1, 255), "damaged stream"),
        (lambda blob: signed(blob.numpy().tobytes() + bytes(2)), "do not fit its entries or its length"),
        (lambda blob: signed(blob.numpy().tobytes()[:-2]), "do not fit its entries or its length"),
    ],
)
def test_what_no_writer_of_ours_writes_is_refused(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode_overflow(change(blob_of(sparse((40, 50), 0.05, 3.0))))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damage_under_a_right_crc_never_leaves_the_matrix(data: st.DataObject) -> None:
    """An error, or other entries: a decoder that reads or writes out of bounds may crash here."""
    raw = bytearray(blob_of(sparse((140, 200), 0.02, data.draw(st.sampled_from([2.0, 20000.0])))).numpy().tobytes())
    for index in data.draw(st.lists(st.integers(HEADER.size, len(raw) - 1), min_size=1, max_size=4)):
        raw[index] = data.draw(st.integers(0, 255))
    try:
        entries = decode_overflow(signed(bytes(raw)))
    except FormatError:
        return
    assert 0 <= int(entries.rows.min()) <= int(entries.rows.max()) < 140
    assert 0 <= int(entries.columns.min()) <= int(entries.columns.max()) < 200
    assert int(entries.excess.abs().min()) > 0 and int(entries.excess.abs().max()) <= MAX_EXCESS


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ((256, 256), {2: 9.3, 3: 10.2, 4: 11.6, 5: 12.9, 8: 16.0}),
        ((2048, 2048), {2: 8.4, 3: 9.4, 4: 10.7, 5: 11.8, 8: 14.8}),
    ],
    ids=["256", "2048"],
)
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_cost_of_an_entry_at_one_percent(
    bits: int, most: dict[int, float], shape: tuple[int, int], record_property: Callable[[str, object], None]
) -> None:
    low, high = integer_range(bits)
    gaussian = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).double()
    thresholds = torch.maximum(gaussian / (high + 0.5), gaussian / (low - 0.5))
    scale = np.quantile(thresholds.numpy(), 0.99)  # at which 1% of the integers overflow
    integers = (gaussian / scale).round().short()
    entries = int(((integers > high) | (integers < low)).sum())
    assert abs(entries / integers.numel() - 0.01) < 0.0001
    stored = SSQR.encode(LatticeWeight(integers, torch.ones(shape[0], 1, dtype=torch.bfloat16)), bits)
    cost = 8 * len(stored.overflow) / entries
    record_property("bits_per_entry", round(cost, 2))
    print(f"{bits} bits, {shape}: {entries} entries of {cost:.2f} bits, header and tile index included")
    assert cost <= most[bits]
