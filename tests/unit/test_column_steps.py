"""HPTQ with steps of columns: the rate is met, everything counted; the error falls; narrow linears keep one step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_babai.format import column_factors
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import dense_tensors, stored_linears
from vllm_babai.offline.scales.column_steps import choose_column_steps, water_filling
from vllm_babai.offline.scales.linear import QuantizedLinear, quantize_hptq
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.inspect import inspect

COLUMNS = 256


def skewed_layer(rows: int, octaves: float = 8) -> tuple[Tensor, Factor]:
    """Weight [rows, COLUMNS], and factor of inputs whose sizes span some octaves."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, COLUMNS, generator=generator)
    inputs *= torch.exp2(octaves * torch.rand(COLUMNS, generator=generator))
    return torch.randn(rows, COLUMNS, generator=generator), factorize(inputs.T @ inputs / 1000, "activation", 1e-4)


def quantized(weight: Tensor, factor: Factor, rate: float, exponents: Tensor | None) -> QuantizedLinear:
    return quantize_hptq("layer", weight, Lattice(factor), rate, 0, exponents)


@pytest.mark.parametrize("rate", [2.125, 3.125, 4.125])
def test_the_rate_is_met_at_a_smaller_error(rate: float) -> None:
    weight, factor = skewed_layer(rows=1024)
    alone, water_filled = (quantized(weight, factor, rate, e) for e in (None, water_filling(factor)))
    for result in (alone, water_filled):
        assert result.report.bits_per_weight == pytest.approx(rate, rel=0.003)
    assert water_filled.report.measured_error < 0.8 * alone.report.measured_error
    assert choose_column_steps([weight], factor, [rate], seed=0) is not None


def test_the_report_holds_the_errors_with_all_steps() -> None:
    weight, factor = skewed_layer(rows=512, octaves=4)
    result = quantized(weight, factor, 4.125, water_filling(factor))
    report, exponents = result.report, result.weight.column_exponents
    assert exponents is not None
    steps = (result.weight.scales.double() * column_factors(exponents).double())[0, factor.order]
    rounding = float(steps.square() @ factor.pivots) * 512 / 12
    assert rounding < report.predicted_error < 1.1 * rounding
    assert report.measured_error == pytest.approx(report.predicted_error, rel=0.03)
    residual = (weight - result.weight.dequantize()).double()[:, factor.order]
    upper = factor.unit_upper.double() * factor.pivots.sqrt()[:, None]
    assert report.measured_error == pytest.approx(float((upper @ residual.T).square().sum()), rel=1e-3)


def test_steps_follow_the_pivots() -> None:
    _, factor = skewed_layer(rows=1)
    steps = column_factors(water_filling(factor)).double()[factor.order]
    error = torch.log2(steps * factor.pivots**0.25)
    assert float(error.max() - error.min()) < 1 / 8 + 1 / 64


def test_one_step_where_columns_are_alike_or_rows_few() -> None:
    weight, factor = skewed_layer(rows=512)
    even = replace(factor, unit_upper=torch.eye(COLUMNS), pivots=torch.ones(COLUMNS, dtype=torch.float64))
    assert choose_column_steps([weight], even, [3.125], seed=0) is None
    assert choose_column_steps([weight[:2]], factor, [3.125], seed=0) is None


def test_linears_that_share_an_input_share_the_choice() -> None:
    weight, factor = skewed_layer(rows=512)
    chosen = choose_column_steps([weight, weight[:2]], factor, [3.125, 3.125], seed=0)
    assert chosen is not None
    assert torch.equal(chosen.exponents, water_filling(factor))
    assert chosen.errors[0] < chosen.errors[1]


@pytest.fixture(scope="module")
def folder(save_random_llama: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with steps of columns wherever inputs differ in size."""
    out = tmp_path_factory.mktemp("columns")
    model = save_random_llama(out / "model", num_hidden_layers=1, intermediate_size=1024)
    options = QuantizeOptions(
        format="hptq", rate=3.0, calibration=str(short_text), samples=8, sequence_length=64, sensitivity=False
    )
    return quantize(model, out / "quantized", options)


def test_everything_reads_them(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with_steps = {n for n, weight, _, _ in stored_linears(checkpoint) if weight.column_exponents is not None}
    assert with_steps
    assert inspect(folder).bits_per_weight == pytest.approx(3.0, rel=0.03)
    own, dense = (dict(dense_tensors(open_checkpoint(f))) for f in (folder, _dense(folder, tmp_path)))
    assert all(torch.equal(own[name].float(), dense[name]) for name in own)
    with pytest.raises(QuantizationError, match=rf"{min(with_steps)}: .*--no-column-steps"):
        convert(folder, tmp_path / "ssqr", "ssqr", torch.float32)
    again = convert(folder, tmp_path / "hptq", "hptq", torch.float32)
    assert all(torch.equal(own[name], tensor) for name, tensor in dense_tensors(open_checkpoint(again)))


def _dense(folder: Path, tmp_path: Path) -> Path:
    return convert(folder, tmp_path / "dense", "dense", torch.float32)
