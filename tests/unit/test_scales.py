"""SSQR's search for scales: the layer overflows as often as asked for, whatever its weights and inputs look like."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import integer_range
from vllm_babai.offline.scales.linear import QuantizedLinear, quantize_ssqr
from vllm_babai.offline.scales.ssqr import overflow_scales
from vllm_babai.offline.solver.expected import error, expected_targets
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import nearest_plane
from vllm_babai.offline.solver.solve import solve


def random_layer(rows: int = 192, columns: int = 256, seed: int = 0) -> tuple[Tensor, Factor]:
    """Weight, [rows, columns], whose rows differ in size, and factor of correlated inputs whose sizes differ, too."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(1000, columns, generator=generator) @ mix * 10 ** torch.rand(columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * (1 + 3 * torch.rand(rows, 1, generator=generator))
    return weight, factorize(inputs.T @ inputs / 1000, "activation", 0.01)


def quantized(
    weight: Tensor, factor: Factor, bits: int = 4, overflow: float = 0.01, group_size: int = -1
) -> QuantizedLinear:
    return quantize_ssqr("layer", weight, Lattice(factor), bits, group_size, overflow, seed=0)


def overflow_of(result: QuantizedLinear, bits: int) -> float:
    low, high = integer_range(bits)
    return float(((result.weight.integers < low) | (result.weight.integers > high)).float().mean())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("overflow", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_overflow_share_is_met(bits: int, overflow: float, group_size: int) -> None:
    weight, factor = random_layer(rows=384)
    result = quantized(weight, factor, bits, overflow, group_size)
    assert abs(overflow_of(result, bits) - overflow) <= 0.1 * overflow
    assert result.report.overflow_share == pytest.approx(overflow_of(result, bits))
    assert result.report.passes <= 3
    assert result.weight.scales.shape == (384, 1 if group_size == -1 else 256 // group_size)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("seed", range(3))
def test_overflow_share_is_met_at_two_bits(seed: int, group_size: int) -> None:
    weight, factor = random_layer(seed=seed)
    result = quantized(weight, factor, bits=2, group_size=group_size)
    assert overflow_of(result, 2) == pytest.approx(0.01, rel=0.1)
    assert result.report.relative_error < 0.4  # grows fast as the rate falls
    assert result.report.passes <= 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_overflow_share_is_met_on_captured_hessians(captured: dict[str, tuple[Tensor, Tensor]], bits: int) -> None:
    for name, (weight, hessian) in captured.items():
        report = quantized(weight, factorize(hessian, "activation", 0.01), bits).report
        assert report.passes <= 3
        assert report.overflow_share == pytest.approx(0.01, rel=0.1), name


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("alike", [True, False])
def test_overflow_share_is_met_by_groups_of_other_sizes(bits: int, alike: bool) -> None:
    weight, factor = random_layer()
    generator = torch.Generator().manual_seed(1)
    larger = torch.rand(1 if alike else 192, 8, generator=generator) < 0.5
    weight *= torch.where(larger, 50.0, 1.0).repeat_interleave(32, 1)
    result = quantized(weight, factor, bits, group_size=32)
    assert overflow_of(result, bits) == pytest.approx(0.01, rel=0.1)


def test_groups_of_zeros_leave_the_others_their_scales() -> None:
    weight, factor = random_layer()
    usual = quantized(weight, factor, group_size=32).weight.scales[:, 1:]
    weight[:, :32] = 0
    scales = quantized(weight * 2**-10, factor, group_size=32).weight.scales[:, 1:] * 2**10
    assert float((scales / usual).abs().log2().abs().mean()) < 0.5


@pytest.mark.parametrize("last", [1.0, 50.0])
def test_expected_targets_spread_as_the_true_ones(last: float) -> None:
    weight, factor = random_layer(rows=4000, columns=128)
    rows, steps = weight.T[factor.order].contiguous() * 100, torch.full((1, 4000), 2.0)
    if last > 1:
        steps = steps * torch.where(torch.arange(128) < 96, 1.0, last)[:, None]
    carried = nearest_plane(rows, Lattice(factor), steps).targets - rows
    for draw in expected_targets(rows, steps, factor, seed=0):
        torch.testing.assert_close((draw - rows).std(1), carried.std(1), rtol=0.3, atol=1e-3)  # of 128 probes


def test_without_overflow_everything_fits() -> None:
    weight, factor = random_layer(rows=64, columns=64)
    result = quantized(weight, factor, bits=4, overflow=0.0)
    assert overflow_of(result, 4) < 0.005
    assert result.report.passes <= 3


def test_rows_of_zeros_stay_zero() -> None:
    weight, factor = random_layer()
    weight[[0, 100]] = 0
    result = quantized(weight, factor)
    assert torch.all(result.weight.dequantize()[[0, 100]] == 0)
    assert torch.isfinite(result.weight.scales).all()
    assert abs(overflow_of(result, 4) - 0.01) <= 0.001


def test_a_layer_of_zeros() -> None:
    weight, factor = random_layer(rows=16, columns=32)
    result = quantized(torch.zeros_like(weight), factor)
    assert torch.all(result.weight.dequantize() == 0)
    assert result.report.measured_error == 0


def test_one_huge_row_has_a_scale_of_its_own() -> None:
    weight, factor = random_layer()
    usual = quantized(weight, factor).report
    weight[7] *= 10_000
    result = quantized(weight, factor)
    assert abs(overflow_of(result, 4) - 0.01) <= 0.001
    errors = (result.weight.dequantize() - weight).square().sum(1)
    assert float(errors[7]) < 0.2 * float(weight[7].square().sum())
    assert result.report.relative_error < 3 * usual.relative_error


def test_one_huge_weight_overflows_rather_than_stretching_its_row() -> None:
    weight, factor = random_layer()
    usual = quantized(weight, factor).weight.scales[7]
    weight[7, 30] = 1000.0
    result = quantized(weight, factor)
    assert abs(float(result.weight.scales[7] / usual)) < 2
    assert float(result.weight.dequantize()[7, 30]) == pytest.approx(1000.0, abs=10)


def test_integers_stay_within_int16_beside_the_hugest_weight() -> None:
    weight, factor = random_layer()
    weight[7, 30] = 1e8
    result = quantized(weight, factor)
    assert result.weight.integers.abs().max() <= 32767
    assert float(result.weight.dequantize()[7, 30]) == pytest.approx(1e8, rel=0.01)


def test_scales_are_independent_of_the_units_of_weights_and_inputs() -> None:
    weight, factor = random_layer()
    larger = replace(factor, pivots=factor.pivots * 2.0**20)
    expected, found = quantized(weight, factor), quantized(weight * 2**-10, larger)
    assert torch.equal(found.weight.integers, expected.weight.integers)
    assert torch.equal(found.weight.scales, expected.weight.scales * 2**-10)


def test_groups_share_consecutive_input_features() -> None:
    weight, factor = random_layer()
    weight[:, 64:128] *= 5
    result = quantized(weight, factor, group_size=64)
    sizes = result.weight.scales.abs()
    assert torch.all(sizes[:, 1] > 2 * sizes[:, 0])
    assert result.report.relative_error < quantized(weight, factor).report.relative_error


def test_a_group_size_that_does_not_divide_is_an_error() -> None:
    weight, factor = random_layer(rows=8, columns=80)
    with pytest.raises(QuantizationError, match="layer: --group-size 32 does not divide its 80 input features"):
        quantized(weight, factor, group_size=32)


def test_report_holds_the_errors_of_the_layer() -> None:
    weight, factor = random_layer(rows=64)
    result = quantized(weight, factor, group_size=32)
    report, basis = result.report, factor.order
    upper = factor.unit_upper.double() * factor.pivots.sqrt()[:, None]
    residual = (weight - result.weight.dequantize()).double()[:, basis]
    steps = result.weight.scales.double().repeat_interleave(32, 1)[:, basis]
    assert report.measured_error == pytest.approx(float((upper @ residual.T).square().sum()), rel=1e-3)
    rounding = float((steps.square() * factor.pivots).sum() / 12)
    assert rounding < report.predicted_error < 1.3 * rounding
    assert report.predicted_error == pytest.approx(report.measured_error, rel=0.04)
    assert report.bound is None  # as targets are kept within the range
    energy = float((upper @ weight.double()[:, basis].T).square().sum())
    assert report.relative_error == pytest.approx(report.measured_error / energy, rel=1e-3)
    assert (report.name, report.rows, report.columns, report.bits, report.group_size) == ("layer", 64, 256, 4, 32)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.9), (4, 0.97), (5, 0.98)])
def test_keeping_targets_within_the_range_lowers_the_error(bits: int, share: float) -> None:
    weight, factor = random_layer()
    report = quantized(weight, factor, bits).report
    plain = plain_error(weight, factor, bits, report.overflow_share)
    assert report.measured_error < share * plain


def plain_error(weight: Tensor, factor: Factor, bits: int, overflow: float) -> float:
    """Error of Babai's rounding, with the scales of rows in proportion to each other's sizes, found by bisection."""
    rows, lattice, (low, high) = weight.T[factor.order].contiguous(), Lattice(factor), integer_range(bits)
    smaller, larger = 2.0**-10, 2.0
    for _ in range(20):
        factor_of_size = (smaller * larger) ** 0.5
        plane = solve(rows, lattice, factor_of_size * rows.square().mean(0, keepdim=True).sqrt())
        often = float(((plane.integers < low) | (plane.integers > high)).float().mean()) > overflow
        smaller, larger = (factor_of_size, larger) if often else (smaller, factor_of_size)
    return error(plane.residual, lattice)


def test_a_mirrored_row_has_the_mirrored_scale() -> None:
    weight, factor = random_layer()
    scales, price = overflow_scales(weight.T, *cells_and_pivots(weight, factor), bits=3, share=0.02)
    mirrored, same = overflow_scales(-weight.T, *cells_and_pivots(weight, factor), bits=3, share=0.02)
    assert torch.equal(mirrored, -scales)
    assert same == pytest.approx(price, rel=1e-5)
    assert 0.3 < float((scales > 0).float().mean()) < 0.7


def cells_and_pivots(weight: Tensor, factor: Factor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(weight.shape[1])[None], factor.pivots.float(), torch.ones(len(weight))


def test_the_seed_fixes_the_result() -> None:
    weight, factor = random_layer(rows=32)
    first, second = quantized(weight, factor), quantized(weight, factor)
    assert torch.equal(first.weight.integers, second.weight.integers)
    assert torch.equal(first.weight.scales, second.weight.scales)
