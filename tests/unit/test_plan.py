"""Plans keep to their bits, spend them where they count, and come true."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.tools.inspect import inspect
from vllm_babai.offline.tools.predict import predict


@pytest.fixture(scope="module")
def folder(save_random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def calibration(short_text: Path) -> dict:
    return {"calibration": str(short_text), "samples": 8, "sequence_length": 64}


@pytest.mark.parametrize("rate", [2.125, 3.5])
def test_hptq_meets_its_total_and_its_predicted_errors(
    folder: Path, calibration: dict, rate: float, tmp_path: Path
) -> None:
    options = QuantizeOptions(format="hptq", rate=rate, **calibration)
    prediction = predict(folder, options)
    assert prediction.rate == pytest.approx(rate, rel=1e-3)
    out = quantize(folder, tmp_path / "out", options)
    assert inspect(out).bits_per_weight == pytest.approx(rate, rel=0.003)
    planned = {linear.name: linear for linear in prediction.plan}
    for layer in json.loads((out / "babai_report.json").read_text())["layers"]:
        assert layer["bits_per_weight"] == pytest.approx(planned[layer["name"]].rate, rel=0.015, abs=0.05)
        assert layer["measured_error"] == pytest.approx(layer["predicted_error"], rel=0.16)  # of so few weights


def test_ssqr_keeps_within_its_total_with_one_width_for_fused_linears(
    folder: Path, calibration: dict, tmp_path: Path
) -> None:
    options = QuantizeOptions(target_bits=3.4, **calibration)
    out = quantize(folder, tmp_path / "out", options)
    assert 3.0 < inspect(out).bits_per_weight < 3.45
    layers = {layer["name"]: layer for layer in json.loads((out / "babai_report.json").read_text())["layers"]}
    for block in ("model.layers.0.", "model.layers.1."):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({layers[block + name]["bits"] for name in fused}) == 1


def test_more_bits_lose_less(folder: Path, calibration: dict) -> None:
    prediction = predict(folder, QuantizeOptions(format="hptq", rate=3.0, **calibration))
    for points in prediction.curves.values():
        rates, losses = zip(*sorted(points), strict=True)
        assert all(earlier > later for earlier, later in itertools.pairwise(losses)), (rates, losses)
    hptq, ssqr = (dict(prediction.curves[name]) for name in ("HPTQ", "SSQR"))
    assert min(hptq.values()) < min(ssqr.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 1.5}, "--target-bits"),
        ({"target_bits": 3.0, "group_size": 64}, "--group-size"),
        ({"target_bits": 3.0, "sensitivity": False}, "--sensitivity"),
        ({"format": "hptq", "rate": 0.5}, "--rate"),
    ],
)
def test_impossible_goals_are_refused(options: dict, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        QuantizeOptions(**options)
