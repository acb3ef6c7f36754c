"""The command `babai`, run as its users run it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_babai.offline.cli import app, main

BABAI = Path(sys.executable).with_name("babai")


def babai(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BABAI, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model(save_random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("cli") / "model", num_hidden_layers=1)


def test_quantize_inspect_eval(model: Path, short_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = ("--calibration", short_text, "--samples", "4", "--sequence-length", "64")
    done = babai("quantize", model, out, "--bits", "4", "--ignore", "down_proj", *text)
    assert done.returncode == 0, done.stderr
    assert "bits per quantized weight" in done.stdout
    assert f"serve it: vllm serve {out} --quantization babai" in done.stdout
    for line in ("measuring sensitivity: 0 of 3 passes, 0:00:00 elapsed", "quantizing model.layers.0: 6 of 6 linears"):
        assert line in done.stderr

    seen = json.loads(babai("inspect", out, "--plot", tmp_path / "integers.png", "--json").stdout)
    assert len(seen["linears"]) == 6
    assert 4 < seen["bits_per_weight"] < 5
    assert (tmp_path / "integers.png").stat().st_size > 1000
    assert "q_proj" in babai("inspect", out).stdout

    evaluation = babai(
        "eval", out, "--data", short_text, "--window", "64", "--samples", "4", "--against", model, "--card", "--json"
    )
    result = json.loads(evaluation.stdout)
    assert result["windows"] == 4
    assert abs(result["comparison"]["loss"]) < 0.1
    assert f"| {short_text.name}, 4 windows of 64 tokens |" in (out / "README.md").read_text()

    of_text = ("--data", short_text, "--window", "64", "--samples", "4")
    command = ["compare", out, model, *of_text, "--against", model, "--json"]
    beside = json.loads(CliRunner().invoke(app, [str(word) for word in command]).stdout)
    assert [each["model"] for each in beside] == [str(out), str(model)]
    assert beside[0]["bytes"] < beside[1]["bytes"]
    assert beside[0]["comparison"] == result["comparison"]
    assert beside[1]["comparison"]["divergence"] == pytest.approx(0, abs=1e-7)
    assert "--card needs --data" in babai("eval", model, "--data", short_text, "--card").stderr


def test_predict_draws_the_trade_off(model: Path, short_text: Path, tmp_path: Path) -> None:
    plot = tmp_path / "curve.png"
    text = ("--calibration", short_text, "--samples", "2", "--sequence-length", "32")
    done = babai("predict", model, "--target-bits", "3.5", "--format", "hptq", *text, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "no-such-folder"), "neither a folder nor a model on the hub"),
        (("quantize", "MODEL", "OUT", "--bits", "6"), "--bits must be one of"),
        (("convert", "MODEL", "OUT", "--to", "dense"), "not quantized"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    arguments: tuple[str, ...], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = babai(*({"MODEL": model, "OUT": tmp_path / "out"}.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_babai.offline.pipeline.quantize", interrupt)
    monkeypatch.setattr("sys.argv", ["babai", "quantize", "model", "out"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert "goes on where it stopped with --resume" in capfd.readouterr().err
