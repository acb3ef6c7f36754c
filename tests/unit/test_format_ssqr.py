"""SSQR as a whole: encoding is exact for any lattice point, and tensors that do not belong together are noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_babai.format import BIT_WIDTHS, SSQR, FormatError, LatticeWeight, integer_range, packed_bytes

VALUES = st.one_of(
    st.just(st.just(0)),
    st.just(st.sampled_from([-32767, 32767])),
    st.just(st.integers(-2, 1)),
    st.just(st.integers(-32767, 32767)),
    st.just(st.one_of(st.integers(-9, 8), st.integers(-32767, 32767))),
)


def point(rows: int = 40, columns: int = 48, groups: int = 1, spread: float = 4.0) -> LatticeWeight:
    generator = torch.Generator().manual_seed(0)
    integers = (torch.randn(rows, columns, generator=generator) * spread).round().short()
    return LatticeWeight(integers, torch.rand(rows, groups, generator=generator).bfloat16())


@settings(deadline=None, max_examples=150)
@given(
    bits=st.sampled_from(BIT_WIDTHS),
    integers=VALUES.flatmap(
        lambda values: arrays.arrays(np.int16, st.tuples(st.integers(1, 70), st.integers(1, 40)), elements=values)
    ),
)
def test_round_trip_of_any_integers(bits: int, integers: np.ndarray) -> None:
    weight = LatticeWeight(torch.from_numpy(integers), torch.ones(len(integers), 1, dtype=torch.bfloat16))
    decoded = SSQR.encode(weight, bits).decode()
    assert torch.equal(decoded.integers, weight.integers)
    assert torch.equal(decoded.scales, weight.scales)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("groups", [1, 3])
def test_stored_tensors(bits: int, groups: int) -> None:
    weight = point(groups=groups)
    stored = SSQR.encode(weight, bits)
    assert stored.tensors().keys() == {"qweight", "scales", "overflow"}
    assert stored.qweight.shape == (40, packed_bytes(48, bits))
    assert torch.equal(stored.scales, weight.scales)
    expected = weight.integers.float() * weight.scales.float().repeat_interleave(48 // groups, 1)
    assert torch.equal(stored.decode().dequantize(), expected)


def test_no_overflow_costs_little_more_than_the_header() -> None:
    assert len(SSQR.encode(point(spread=0.1), 4).overflow) < 64


def test_one_scale_for_the_matrix_is_stored_for_every_row() -> None:
    weight = LatticeWeight(point().integers, torch.full((1, 1), 0.5, dtype=torch.bfloat16))
    decoded = SSQR.encode(weight, 4).decode()
    assert decoded.scales.shape == (40, 1)
    assert torch.equal(decoded.dequantize(), weight.dequantize())


def test_an_integer_too_large_for_int16_is_refused() -> None:
    integers = torch.full((1, 1), -(2**15), dtype=torch.int16)
    with pytest.raises(ValueError, match="32767"):
        SSQR.encode(LatticeWeight(integers, torch.ones(1, 1, dtype=torch.bfloat16)), 4)


@pytest.mark.parametrize("part", ["qweight", "scales"])
def test_every_flipped_bit_of_the_dense_part_is_noticed(part: str) -> None:
    stored = SSQR.encode(point(rows=3, columns=16), 4)
    tensor = getattr(stored, part)
    for bit in range(8 * tensor.nbytes):
        damaged = tensor.clone()
        damaged.view(torch.uint8).view(-1)[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="qweight or scales are corrupt"):
            replace(stored, **{part: damaged}).decode()


def test_tensors_of_another_size_are_noticed() -> None:
    stored = SSQR.encode(point(), 4)
    with pytest.raises(FormatError, match="layer with 40 rows, but qweight has 39"):
        replace(stored, qweight=stored.qweight[:39]).decode()
    with pytest.raises(FormatError, match="and scales 41"):
        replace(stored, scales=torch.cat((stored.scales, stored.scales[:1]))).decode()
    with pytest.raises(FormatError, match="does not hold rows of 48 4-bit weights"):
        replace(stored, qweight=stored.qweight[:, :-1]).decode()
    with pytest.raises(FormatError, match="corrupt"):
        replace(stored, scales=stored.scales.repeat(1, 2)).decode()


def test_tensors_of_two_layers_are_noticed() -> None:
    stored, other = (SSQR.encode(point(spread=spread), 4) for spread in (4.0, 5.0))
    with pytest.raises(FormatError, match="corrupt"):
        replace(stored, overflow=other.overflow).decode()


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_integer_range(bits: int) -> None:
    low, high = integer_range(bits)
    assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize(
    ("integers", "scales", "error"),
    [
        (torch.zeros(2, 6, dtype=torch.int32), torch.ones(2, 1, dtype=torch.bfloat16), TypeError),
        (torch.zeros(2, 6, dtype=torch.int16), torch.ones(2, 1), TypeError),
        (torch.zeros(2, 6, dtype=torch.int16), torch.ones(2, 4, dtype=torch.bfloat16), ValueError),
        (torch.zeros(2, 6, dtype=torch.int16), torch.ones(3, 1, dtype=torch.bfloat16), ValueError),
        (torch.zeros(2, 6, dtype=torch.int16), torch.ones(2, 0, dtype=torch.bfloat16), ValueError),
    ],
    ids=["integer dtype", "scale dtype", "groups", "rows", "no scale"],
)
def test_a_lattice_point_is_checked(integers: torch.Tensor, scales: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        LatticeWeight(integers, scales)
