"""The dense part of SSQR: packed rows are what their definition says, and come back unchanged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_babai.format import BIT_WIDTHS, FormatError, integer_range, pack, packed_bytes, unpack


def random_integers(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    low, high = integer_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int16)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BIT_WIDTHS), st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32))
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    integers = random_integers(rows, columns, bits, seed)
    packed = pack(integers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(columns, bits))
    restored = unpack(packed, bits, columns)
    assert restored.dtype == torch.int16
    assert torch.equal(restored, integers)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_rows_are_streams_of_offset_integers_lowest_bit_first(bits: int, columns: int) -> None:
    integers = random_integers(3, columns, bits)
    for row, stored in zip(integers.tolist(), pack(integers, bits).tolist(), strict=True):
        stream = sum((z + 2 ** (bits - 1)) << (bits * k) for k, z in enumerate(row))
        assert int.from_bytes(bytes(stored), "little") % 2 ** (bits * columns) == stream


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_whole_bytes_can_be_cut_out(bits: int) -> None:
    integers = random_integers(5, 64, bits)
    cut = pack(integers, bits)[1:4, 16 * bits // 8 : 40 * bits // 8]
    assert torch.equal(unpack(cut, bits, 24), integers[1:4, 16:40])


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_integers_outside_the_range_are_refused(bits: int, beyond: int) -> None:
    edge = integer_range(bits)[beyond > 0]
    with pytest.raises(ValueError, match=f"do not fit {bits} bits"):
        pack(torch.tensor([[0, edge + beyond]], dtype=torch.int16), bits)


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        pack(torch.zeros(1, 1, dtype=torch.int16), 6)
    with pytest.raises(FormatError, match="bit width 6 is unknown"):
        unpack(torch.zeros(1, 6, dtype=torch.uint8), 6, 8)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(2, 4, dtype=torch.int8),
    ],
    ids=["short", "long", "flat", "signed"],
)
def test_sizes_that_do_not_match_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=r"does not hold rows of 8 4-bit weights \(4 bytes each\)"):
        unpack(packed, 4, 8)
