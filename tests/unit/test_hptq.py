"""HPTQ blobs: any integers survive, damage is noticed, and the size is that of the entropy."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_babai.format import (
    FORMATS,
    HPTQ,
    FormatError,
    LatticeWeight,
    column_factors,
    predicted_bytes,
    step_exponents,
)
from vllm_babai.format.entropy import tables
from vllm_babai.format.entropy.hptq import decode_integers, read_blob

ONE_SCALE = torch.ones(1, 1, dtype=torch.bfloat16)
VALUES = st.one_of(
    st.just(st.just(0)),
    st.just(st.just(-32767)),
    st.just(st.sampled_from([-3, 14])),
    st.just(st.integers(-3, 3)),
    st.just(st.integers(-32767, 32767)),
    st.just(st.one_of(st.integers(-2, 2), st.integers(-32767, 32767))),
)


def encoded(integers: torch.Tensor) -> HPTQ:
    return HPTQ.encode(LatticeWeight(integers.short(), ONE_SCALE))


def gaussian(rows: int, columns: int, sigma: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.round(sigma * torch.randn(rows, columns, generator=generator)).short()


def entropy(integers: torch.Tensor) -> float:
    counts = np.unique(integers.numpy(), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def bits_per_weight(integers: torch.Tensor) -> float:
    return 8 * len(encoded(integers).codes) / integers.numel()


@settings(deadline=None, max_examples=150)
@given(
    integers=VALUES.flatmap(
        lambda values: arrays.arrays(np.int16, st.tuples(st.integers(1, 70), st.integers(1, 70)), elements=values)
    )
)
def test_round_trip(integers: np.ndarray) -> None:
    z = torch.from_numpy(integers)
    assert torch.equal(encoded(z).decode().integers, z)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 5000), (5000, 1), (333, 1031), (130, 2100)])
def test_shapes(shape: tuple[int, int]) -> None:
    z = gaussian(*shape, sigma=2.0)
    assert torch.equal(encoded(z).decode().integers, z)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0, 30.0, 60.0, 500.0, 9000.0])
def test_round_trip_at_any_rate(sigma: float) -> None:
    z = gaussian(200, 300, sigma).clamp(-32767, 32767)
    assert torch.equal(encoded(z).decode().integers, z)


def test_scales_are_kept() -> None:
    scales = torch.rand(64, 2).bfloat16()
    weight = HPTQ.encode(LatticeWeight(gaussian(64, 96, 1.0), scales)).decode()
    assert torch.equal(weight.scales, scales)


def test_steps_of_columns_take_a_few_bits() -> None:
    exponents = step_exponents(torch.exp2(0.4 * torch.randn(256)))
    weight = LatticeWeight(gaussian(128, 256, 1.0), torch.rand(128, 2).bfloat16(), exponents)
    blob = HPTQ.encode(weight)
    decoded = blob.decode()
    assert decoded.column_exponents is not None
    assert torch.equal(decoded.column_exponents, exponents)
    assert torch.equal(decoded.dequantize(), weight.dequantize())
    without = HPTQ.encode(LatticeWeight(weight.integers, weight.scales))
    assert len(blob.codes) - len(without.codes) < 256 * 4 / 8 + 16
    added = predicted_bytes(weight.integers, exponents) - predicted_bytes(weight.integers)
    assert len(blob.codes) - len(without.codes) == pytest.approx(added, abs=6)


def test_steps_of_columns_are_kept_within_a_sixteenth_of_an_octave() -> None:
    steps = torch.exp2(3 * torch.randn(500))
    ratio = column_factors(step_exponents(steps)).float() * steps.max() / steps
    assert ratio.log2().abs().max() < 1 / 16 + 1 / 128
    with pytest.raises(ValueError, match="positive"):
        step_exponents(-steps)


def test_columns_with_steps_dequantize_to_the_product() -> None:
    integers, scales = gaussian(6, 8, 30.0), torch.rand(6, 2).bfloat16()
    exponents = torch.arange(8, dtype=torch.int16)
    weight = LatticeWeight(integers, scales, exponents)
    factors = column_factors(exponents).double()
    expected = integers.double() * scales.double().repeat_interleave(4, 1) * factors
    assert torch.equal(weight.dequantize().double(), expected)
    assert torch.equal(factors[::8], torch.ones(1).double())
    with pytest.raises(ValueError, match="each of 8 columns"):
        LatticeWeight(integers, scales, exponents[:7])


def test_cost_of_a_large_gaussian() -> None:
    z = gaussian(4096, 4096, 1.95)
    assert bits_per_weight(z) < entropy(z) + 0.01


@pytest.mark.parametrize(("shape", "most"), [((128, 256), 0.02), ((256, 256), 0.012), ((768, 256), 0.008)])
def test_cost_of_a_small_gaussian(shape: tuple[int, int], most: float) -> None:
    z = gaussian(*shape, sigma=0.95)
    assert bits_per_weight(z) < entropy(z) + most


def test_cost_at_high_rates() -> None:
    z = gaussian(1024, 1024, 62.0)
    assert bits_per_weight(z) < entropy(z) + 0.02


def test_zeros_cost_nothing() -> None:
    assert bits_per_weight(torch.zeros(1024, 1024)) < 0.01


def test_uniform_and_skewed_integers_cost_their_entropy() -> None:
    z = torch.randint(0, 16, (512, 512))
    assert bits_per_weight(z.short()) < 4.02
    z = torch.where(torch.rand(512, 512) < 0.1, 1000, 1003)
    assert bits_per_weight(z.short()) < entropy(z) + 0.02


def test_outliers_do_not_disturb_the_others() -> None:
    z = gaussian(512, 512, sigma=1.5)
    z[7, ::50] = 20000
    assert bits_per_weight(z) < entropy(z) + 0.02


def test_rows_and_columns_of_different_spread_are_coded_at_their_own() -> None:
    rows, columns = torch.linspace(-1.5, 1.5, 768).exp2(), torch.linspace(-1, 1, 512).exp2()[torch.randperm(512)]
    z = torch.round(2 * torch.randn(768, 512) * rows[:, None] * columns).short()
    oracle = torch.distributions.Normal(torch.zeros(768, 512), 2 * rows[:, None] * columns)
    probability = oracle.cdf(z + 0.5) - oracle.cdf(z - 0.5)
    assert bits_per_weight(z) < -probability.log2().mean() + 0.03
    assert bits_per_weight(z) < entropy(z) - 0.2


@pytest.mark.parametrize("sigma", [0.4, 2.0, 40.0])
def test_prediction(sigma: float) -> None:
    z = gaussian(300, 2000, sigma) * torch.arange(1, 2001).log2().ceil().short()
    assert predicted_bytes(z) == pytest.approx(len(encoded(z).codes), rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_windows(data: st.DataObject) -> None:
    z = gaussian(300, 2100, 1.5)
    blob = encoded(z)
    row, column = (sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in z.shape)
    window = blob.decode_window(slice(*row), slice(*column))
    assert torch.equal(window, z[slice(*row), slice(*column)])


@pytest.mark.parametrize(("shift", "crc"), [(0, 4083693733), (3, 144911755)])
def test_gaussians_never_change(shift: int, crc: int) -> None:
    """Blobs name their tables by one byte: another table on another machine or in another version cannot read them."""
    every = np.stack([tables.gaussian(code, shift) for code in tables.GAUSSIANS])
    assert (every.sum(axis=1) == tables.TOTAL).all()
    assert zlib.crc32(every.astype("<u2").tobytes()) == crc


def test_window_outside() -> None:
    with pytest.raises(ValueError, match="row window 0…9 leaves a matrix of 8 rows"):
        encoded(gaussian(8, 8, 1.0)).decode_window(slice(0, 9))


@settings(deadline=None, max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bits_are_detected(position: float, bit: int) -> None:
    blob = encoded(gaussian(48, 64, 1.5))
    codes = blob.codes.clone()
    codes[int(position * len(codes))] ^= 1 << bit
    with pytest.raises(FormatError):
        HPTQ(codes, blob.scales).decode()


@pytest.mark.parametrize("length", [0, 1, 33, 34, 100, -1])
def test_truncated_blobs_are_detected(length: int) -> None:
    blob = encoded(gaussian(48, 64, 1.5))
    with pytest.raises(FormatError):
        HPTQ(blob.codes[:length], blob.scales).decode()


def test_changed_scales_are_detected() -> None:
    blob = encoded(gaussian(8, 8, 1.0))
    with pytest.raises(FormatError, match="scales are corrupt"):
        HPTQ(blob.codes, blob.scales * 2).decode()


def test_streams_are_checked_even_where_the_crc_is_right() -> None:
    coded = read_blob(encoded(gaussian(48, 64, 1.5)).codes)
    coded.words[len(coded.words) // 2] ^= 1
    with pytest.raises(FormatError, match="damaged stream"):
        decode_integers(coded)


def test_processors_without_vector_instructions_decode_the_same() -> None:
    script = f"""if True:
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_hptq import encoded, gaussian
        z = gaussian(512, 1100, 1.5)
        z[3, ::70] = 20000
        sys.exit(not torch.equal(encoded(z).decode().integers, z))
    """
    generic = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert subprocess.run([sys.executable, "-c", script], env=generic).returncode == 0


def test_importing_the_format_does_not_import_numba() -> None:
    assert "hptq" in FORMATS
    script = "import sys, vllm_babai.format; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
