"""Real runs on the bundled, trained model: what the report predicts is what is measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_babai.offline import QuantizeOptions, quantize

TOLERANCES = {1: (0.02, 0.003), 16: (0.04, 0.01)}  # of each error and of their mean; what paths gain is estimated


ONE_PATH, SIXTEEN_PATHS = pytest.param((3, 1), marks=pytest.mark.long), (4, 16)


@pytest.fixture(scope="module", params=[ONE_PATH, SIXTEEN_PATHS], ids=["3-bits-1-path", "4-bits-16-paths"])
def out(
    request: pytest.FixtureRequest,
    bundled_model: Path,
    calibration_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    bits, paths = request.param
    text = str(calibration_file)
    options = QuantizeOptions(bits=bits, paths=paths, calibration=text, samples=32, sequence_length=256)
    return quantize(bundled_model, tmp_path_factory.mktemp("bundled") / "out", options)


@pytest.fixture
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "babai_report.json").read_text())


def test_measured_errors_are_the_predicted_ones(report: dict[str, Any], record_property: Any) -> None:
    ratios = {layer["name"]: layer["measured_error"] / layer["predicted_error"] for layer in report["layers"]}
    assert len(ratios) == 42
    tolerance, of_mean = TOLERANCES[report["options"]["paths"]]
    furthest = max(ratios, key=lambda name: abs(ratios[name] - 1))
    record_property("furthest", f"{furthest} {ratios[furthest]:.4f}")
    assert {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > tolerance} == {}
    assert abs(sum(ratios.values()) / len(ratios) - 1) < of_mean


def test_overflow_is_what_was_asked_for(report: dict[str, Any]) -> None:
    for layer in report["layers"]:
        assert layer["overflow_share"] == pytest.approx(0.01, rel=0.1), layer["name"]
        assert layer["passes"] <= 3


def test_bits_per_weight_count_everything(report: dict[str, Any]) -> None:
    """1% overflow of about 10 bits, a scale of 16 bits for 256 or 768 weights, headers of some bytes."""
    bits = report["options"]["bits"]
    assert bits + 0.1 < report["bits_per_weight"] < bits + 0.2
