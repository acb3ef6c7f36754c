"""Dense + sparse made in bands: what `SSQR.encode` makes, with the smallest width for all bands together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.format import BIT_WIDTHS, SSQR, LatticeWeight, decode_overflow, integer_range
from vllm_babai.format.dense_sparse.split import SAMPLE, Band, split

RATE = 0.02


def overflow_rate(integers: Tensor, bits: int) -> float:
    low, high = integer_range(bits)
    return float(((integers < low) | (integers > high)).double().mean())


def check(integers: Tensor, rows: int) -> int:
    """Bits for a matrix in bands of so many rows."""
    bands = [Band(len(band), band.numpy) for band in integers.split(rows)]
    bits, dense, overflow = split(bands, integers.shape[1], RATE)
    assert bits == next((width for width in BIT_WIDTHS if overflow_rate(integers, width) < RATE), BIT_WIDTHS[-1])
    stored = SSQR.encode(LatticeWeight(integers, torch.ones(1, 1).bfloat16()), bits)
    expected = decode_overflow(stored.overflow)
    assert torch.equal(dense, stored.qweight)
    assert torch.equal(overflow.rows, expected.rows)
    assert torch.equal(overflow.columns, expected.columns)
    assert torch.equal(overflow.excess, expected.excess)
    return bits


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    band=st.integers(1, 90),
    sigma=st.sampled_from([0.2, 1.2, 2.5, 6.0, 25.0, 3000.0]),
)
def test_equals_ssqr(rows: int, columns: int, band: int, sigma: float) -> None:
    check(torch.round(sigma * torch.randn(rows, columns)).clamp(-32767, 32767).short(), band)


@pytest.mark.parametrize(("sampled", "others", "bits"), [(1, 100, 8), (100, 1, 8), (1, 3, 3), (-2, 0, 2)])
def test_width_is_that_of_all_bands(sampled: int, others: int, bits: int) -> None:
    integers = torch.full((3 * SAMPLE, 48), others, dtype=torch.int16)
    integers[::SAMPLE] = sampled
    assert check(integers, rows=1) == bits
