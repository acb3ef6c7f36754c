"""`--lm-head`: the linear that makes logits, quantized after the last block on what it reads there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from vllm_babai.format import HPTQ, SSQR, CheckpointConfig
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model import walk
from vllm_babai.offline.model.calibration import calibration_tokens
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import load_dense, stored_linears
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.run_folder import RunFolder
from vllm_babai.offline.scales import ssqr
from vllm_babai.offline.scales.linear import LayerReport
from vllm_babai.offline.solver import drift as drift_correction
from vllm_babai.offline.solver.row_geometry import ROW_DAMPING
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.evaluate import evaluate
from vllm_babai.offline.tools.inspect import inspect

VOCABULARY = 4100  # no multiple of 64
CPU = torch.device("cpu")
BITS = {"ssqr": 3, "hptq": 3.5}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES = {"llama": LlamaConfig(**SIZES), "gemma2": Gemma2Config(**SIZES, sliding_window=16, pad_token_id=2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Callable[..., Path]) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model") / "source", vocab_size=VOCABULARY)


def options(text: Path, **changed: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"calibration": str(text), "samples": 8, "sequence_length": 64, **changed})


@pytest.fixture(scope="module", params=list(BITS))
def quantized(
    request: pytest.FixtureRequest, source: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Checkpoint in a folder called like its format."""
    form = request.param
    chosen = options(short_text, format=form, lm_head=BITS[form], rate=2.5, column_steps=False)
    return quantize(source, tmp_path_factory.mktemp("quantized") / form, chosen)


def config_of(folder: Path) -> CheckpointConfig:
    return CheckpointConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def reports(folder: Path) -> dict[str, LayerReport]:
    layers = json.loads((folder / "babai_report.json").read_text())["layers"]
    return {layer["name"]: LayerReport(**layer) for layer in layers}


def head_inputs(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """What lm_head reads, float32 [tokens, hidden]."""
    inputs: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return inputs[0]


def test_stored_like_any_linear_in_a_file_of_its_own(quantized: Path, source: Path) -> None:
    config, form = config_of(quantized), {"ssqr": SSQR, "hptq": HPTQ}[quantized.name]
    assert "lm_head" not in config.ignore
    assert config.overrides == {"lm_head": {"bits": 3} if form is SSQR else {}}
    with safe_open(quantized / "model-00003-of-00004.safetensors", framework="pt") as file:
        stored = form(**{name.removeprefix("lm_head."): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert stored.decode().integers.shape == (VOCABULARY, 64)
    assert (quantized / "model-00004-of-00004.safetensors").is_file()
    assert "lm_head.weight" not in open_checkpoint(quantized).files
    assert {path.name for path in quantized.glob("*.report.json")} == set()


def test_report_and_totals_count_it(quantized: Path) -> None:
    layers, whole = reports(quantized), json.loads((quantized / "babai_report.json").read_text())
    head = list(layers.values())[-1]
    assert (head.name, head.rows, head.columns) == ("lm_head", VOCABULARY, 64)
    assert whole["quantized_weights"] == sum(layer.rows * layer.columns for layer in layers.values())
    if quantized.name == "ssqr":
        assert (head.bits, layers["model.layers.0.mlp.up_proj"].bits) == (3, 4)
        assert head.overflow_share == pytest.approx(0.01, rel=0.2)
    else:
        assert head.bits_per_weight == pytest.approx(3.5, rel=0.01)
    found = {linear.name: linear for linear in inspect(quantized).linears}
    assert found["lm_head"].bits_per_weight == pytest.approx(head.bits_per_weight)


def test_error_is_as_reported_and_far_below_that_of_rounding(
    quantized: Path, source: Path, short_text: Path, tokenizer: Any
) -> None:
    """On the calibration tokens; the target, corrected for the blocks' errors, is not quite the original weight.

    A row counts as much as the loss minds its errors, p(1 − p) on average.
    """
    model, original = load_dense(quantized, CPU), load_dense(source, CPU)
    tokens = calibration_tokens(tokenizer, str(short_text), 8, 64, seed=0)
    inputs, wanted = head_inputs(model, tokens), head_inputs(original, tokens) @ original.lm_head.weight.T
    p = wanted.softmax(1)
    variances = (p - p.square()).mean(0)
    importance = variances + ROW_DAMPING * variances.mean()

    def loss(logits: Tensor) -> float:
        return float(((logits - wanted).square() * importance).sum(1).mean())

    error = loss(inputs @ model.lm_head.weight.T)
    weight, levels = original.lm_head.weight, 7 if quantized.name == "ssqr" else 11
    step = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / levels
    rounded = loss(inputs @ ((weight / step).round() * step).T)
    report = reports(quantized)["lm_head"]
    unavoidable = loss(inputs @ weight.T)
    assert report.relative_error < 0.03
    assert error < 1.3 * (report.measured_error + unavoidable)
    assert error - unavoidable < 0.6 * (rounded - unavoidable)


def test_evaluation_reads_it(quantized: Path, source: Path, short_text: Path) -> None:
    found = evaluate(quantized, short_text, window=64, samples=4, against=source).comparison
    assert found is not None
    assert 0 < found.divergence < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drift", [True, False])
def test_hessian_is_of_what_it_reads_after_the_quantized_blocks(
    family: str,
    drift: bool,
    tmp_path: Path,
    short_text: Path,
    save_random_model: Callable[[PreTrainedConfig, Path], Path],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    factorize = walk.factorize
    monkeypatch.setattr(walk, "factorize", lambda hessian, *rest: (seen.append(hessian), factorize(hessian, *rest))[1])
    source = save_random_model(FAMILIES[family], tmp_path / "source")
    chosen = options(short_text, bits=2, lm_head=8, drift=drift, sensitivity=False)
    out = quantize(source, tmp_path / "out", chosen)
    tokens = calibration_tokens(tokenizer, str(short_text), 8, 64, seed=0)
    inputs = head_inputs(load_dense(out, CPU), tokens)
    torch.testing.assert_close(seen[-1], inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4)


def test_no_logits_are_made(source: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    linear = torch.nn.functional.linear

    def watched(inputs: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        nonlocal most
        if len(weight) == VOCABULARY:
            most = max(most, inputs.shape[:-1].numel())
        return linear(inputs, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    quantize(source, tmp_path / "out", options(short_text, lm_head=4, sensitivity=False))
    assert most == 1


@pytest.mark.parametrize("form", BITS)
def test_it_can_be_all_that_is_quantized(form: str, source: Path, short_text: Path, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", options(short_text, format=form, lm_head=4, ignore=["."]))
    config = config_of(out)
    assert list(reports(out)) == ["lm_head"] == list(config.overrides)
    assert len(config.ignore) == 14
    assert "lm_head" not in config.ignore


def test_column_steps_serve_it_too(source: Path, short_text: Path, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", options(short_text, format="hptq", lm_head=4, ignore=["."]))
    original, head = load_dense(source, CPU).lm_head.weight, load_dense(out, CPU).lm_head.weight
    assert (head - original).norm() < 0.15 * original.norm()


@pytest.mark.parametrize("finished", [True, False], ids=["with-the-head", "without-the-head"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    finished: bool, source: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(short_text, lm_head=4)
    whole = quantize(source, tmp_path / "whole", chosen)
    owner, method = (RunFolder, "finish") if finished else (StreamedModel, "advance_to_head")
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", chosen)
    done = tmp_path / "out.partial" / "model-00003-of-00004.safetensors"
    assert done.exists() == finished
    written = done.stat().st_mtime_ns if finished else None
    resumed = quantize(source, tmp_path / "out", chosen, resume=True)
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in resumed.iterdir()}
    for name in names - {"babai_report.json"}:  # which has times
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert written in (None, (resumed / done.name).stat().st_mtime_ns)


def test_other_bits_for_it_are_another_run(
    source: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "advance_to_head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", options(short_text, lm_head=4))
    with pytest.raises(QuantizationError, match=r"had other --lm-head \(4\)"):
        quantize(source, tmp_path / "out", options(short_text, lm_head=5), resume=True)


def test_converted_it_is_the_same_head_and_still_named(quantized: Path, source: Path, tmp_path: Path) -> None:
    own = {name: weight for name, weight, _, _ in stored_linears(open_checkpoint(quantized))}
    other = "hptq" if quantized.name == "ssqr" else "ssqr"
    there = convert(quantized, tmp_path / "there", other, torch.float32)
    back = convert(there, tmp_path / "back", quantized.name, torch.float32)
    for folder in (there, back):
        config = config_of(folder)
        assert "lm_head" in config.overrides
        assert "lm_head" not in config.ignore
        points = {name: weight for name, weight, _, _ in stored_linears(open_checkpoint(folder))}
        assert torch.equal(points["lm_head"].integers, own["lm_head"].integers)
    assert (quantized / "model-00003-of-00004.safetensors").read_bytes() == (
        back / "model-00003-of-00004.safetensors"
    ).read_bytes()
    dense = load_dense(convert(quantized, tmp_path / "dense", "dense", torch.float32), CPU)
    assert torch.equal(dense.lm_head.weight, own["lm_head"].dequantize())


def test_a_head_of_the_common_width_is_named_after_conversion(source: Path, short_text: Path, tmp_path: Path) -> None:
    chosen = options(short_text, format="hptq", lm_head=4, column_steps=False, ignore=["."])
    ssqr = convert(quantize(source, tmp_path / "hptq", chosen), tmp_path / "ssqr", "ssqr", torch.float32)
    config = config_of(ssqr)
    assert config.overrides == {"lm_head": {"bits": config.bits}}


def test_a_tied_head_is_refused_before_any_work(bundled_model: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"--lm-head: model\.embed_tokens is head and embedding"):
        quantize(bundled_model, tmp_path / "out", QuantizeOptions(calibration="nowhere.txt", lm_head=4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "bits", "message"),
    [
        ("ssqr", 6, r"--lm-head must be one of \(2, 3, 4, 5, 8\) in SSQR, not 6"),
        ("ssqr", 3.5, "--lm-head must be one of"),
        ("hptq", 0.5, "--lm-head must be from 1 to 8, not 0.5"),
        ("hptq", 9, "--lm-head must be from 1 to 8, not 9"),
    ],
)
def test_bits_that_there_are_not_are_refused(form: Any, bits: float, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        QuantizeOptions(format=form, lm_head=bits)


@pytest.mark.parametrize("drift", [True, False])
def test_a_few_rows_at_a_time_make_hardly_another_head(
    drift: bool, source: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds the memory: SSQR's search and the drift correction take so many rows at a time."""
    chosen = options(short_text, lm_head=3, ignore=["."], drift=drift)
    whole = reports(quantize(source, tmp_path / "whole", chosen))["lm_head"]
    monkeypatch.setattr(ssqr, "ROWS_TOGETHER", 1024)
    monkeypatch.setattr(drift_correction, "ROWS", 500)
    parts = reports(quantize(source, tmp_path / "parts", chosen))["lm_head"]
    assert parts.overflow_share == pytest.approx(0.01, rel=0.15)
    assert parts.bits_per_weight == pytest.approx(whole.bits_per_weight, rel=0.01)
    assert parts.measured_error == pytest.approx(whole.measured_error, rel=0.05)
    assert parts.predicted_error == pytest.approx(parts.measured_error, rel=0.05)
