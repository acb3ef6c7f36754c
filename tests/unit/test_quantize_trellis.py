"""A whole model in the trellis form: quantized at the bits asked for, inspected, made dense, and not made integers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_babai.errors import QuantizationError
from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.cli import app
from vllm_babai.offline.model.dense import load_dense
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.inspect import inspect, integer_counts
from vllm_babai.offline.tools.predict import predict

TARGET = 3.0


@pytest.fixture(scope="module")
def model(save_random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="module")
def options(short_text: Path) -> QuantizeOptions:
    return QuantizeOptions(
        format="trellis",
        target_bits=TARGET,
        calibration=str(short_text),
        samples=8,
        sequence_length=64,
        paths=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def quantized(model: Path, options: QuantizeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(model, tmp_path_factory.mktemp("quantized") / "trellis", options)


def test_the_bits_are_met(quantized: Path) -> None:
    found = inspect(quantized)
    assert found.format == "trellis"
    assert found.bits_per_weight == pytest.approx(TARGET, rel=0.005)
    assert len(found.linears) == 14
    assert all(linear.entropy is None and linear.relative_error is not None for linear in found.linears)


def test_inspect_shows_a_table(quantized: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(quantized)])
    assert shown.exit_code == 0
    assert "trellis: " in shown.output


def test_the_dense_twin_is_the_same_model(quantized: Path, tmp_path: Path) -> None:
    dense = convert(quantized, tmp_path / "dense", "dense", torch.float32)
    tokens = torch.arange(32)[None]
    own, twin = (load_dense(folder, torch.device("cpu"))(tokens).logits for folder in (quantized, dense))
    assert torch.equal(own, twin)


def test_outputs_are_near_the_original_ones(quantized: Path) -> None:
    layers = json.loads((quantized / "babai_report.json").read_text())["layers"]
    assert max(layer["relative_error"] for layer in layers) < 0.25


@pytest.mark.parametrize("to", ["ssqr", "hptq"])
def test_it_has_no_integers(to: str, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="no integers"):
        convert(quantized, tmp_path / to, to, torch.float32)
    with pytest.raises(QuantizationError, match="no integers"):
        integer_counts(quantized)


def test_integers_do_not_become_a_trellis(model: Path, short_text: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(calibration=str(short_text), samples=2, sequence_length=32, sensitivity=False)
    other = quantize(model, tmp_path / "ssqr", options)
    with pytest.raises(QuantizationError, match="cannot hold integers"):
        convert(other, tmp_path / "trellis", "trellis", torch.float32)


def test_a_resumed_run_makes_the_same_files(
    model: Path, quantized: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    out = tmp_path / "again"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vllm_babai.offline.run_folder.RunFolder.finish", stop)
        quantize(model, out, options)
    folder = quantize(model, out, options, resume=True)
    for file in quantized.glob("*.safetensors"):
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_predict_knows_bits_and_errors(model: Path, quantized: Path, options: QuantizeOptions) -> None:
    found = predict(model, options)
    assert found.rate == pytest.approx(TARGET, rel=0.005)
    layers = json.loads((quantized / "babai_report.json").read_text())["layers"]
    measured = sum(layer["measured_error"] for layer in layers) / 2
    assert found.loss == pytest.approx(measured, rel=0.5)
    assert "trellis" in found.curves


def test_a_trellis_has_a_rate_without_being_asked() -> None:
    assert QuantizeOptions(format="trellis").planned_rate == 3.125


@pytest.mark.parametrize("target", [1.0, 6.0])
def test_bits_that_a_trellis_does_not_have_are_refused(target: float) -> None:
    with pytest.raises(QuantizationError, match=r"--target-bits must be from 1\.25 to 5"):
        QuantizeOptions(format="trellis", target_bits=target)
