"""Bits that a size asks for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from architectures import HEADS
from safetensors import safe_open
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen3_5TextConfig

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.fit import Sizes, cache_bytes, fit_device, fit_size, measure, read_bytes

SIZES = Sizes(kept=2_000_000_000, weights=8_000_000_000, cached=131_072)


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5e9), ("24GiB", 24 * 2**30), ("800 mb", 8e8), ("1.5g", 1.5e9), ("1000", 1000)]
)
def test_sizes_are_read(text: str, expected: float) -> None:
    assert read_bytes("--size", text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 GBit", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(QuantizationError, match="--size must be a size"):
        read_bytes("--size", text)


def test_bits_follow_from_a_size() -> None:
    assert fit_size(QuantizeOptions(), "6GB", SIZES).target_bits == pytest.approx(4 * 0.995, abs=0.001)
    assert fit_size(QuantizeOptions(format="hptq"), "6GB", SIZES).rate == pytest.approx(4 * 0.995, abs=0.001)
    assert fit_size(QuantizeOptions(), "100GB", SIZES).target_bits == 8.5
    with pytest.raises(QuantizationError, match=r"--size 3GB leaves 3.00 GB .* they need 4.06 GB"):
        fit_size(QuantizeOptions(), "3GB", SIZES)
    assert fit_size(QuantizeOptions(format="trellis"), "3.9GB", SIZES).target_bits == pytest.approx(1.89, abs=0.001)


def test_a_device_holds_the_cache_too() -> None:
    without = fit_device(QuantizeOptions(), "8GiB", 0, SIZES).target_bits
    cached = fit_device(QuantizeOptions(), "8GiB", 8192, SIZES).target_bits
    assert without is not None
    assert cached is not None
    assert 8192 * SIZES.cached * 8 / SIZES.weights == pytest.approx(without - cached, rel=0.01)
    with pytest.raises(QuantizationError, match="--format ssqr or trellis"):
        fit_device(QuantizeOptions(format="hptq"), "8GiB", 0, SIZES)


def test_cache_per_token() -> None:
    llama = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=512)
    assert cache_bytes(llama) == 4 * 2 * 2 * 64 * 2
    latent = DeepseekV3Config(num_hidden_layers=3, kv_lora_rank=16, qk_rope_head_dim=8)
    assert cache_bytes(latent) == 3 * (16 + 8) * 2
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    hybrid = Qwen3_5TextConfig(num_hidden_layers=4, layer_types=kinds, num_key_value_heads=2, head_dim=32)
    assert cache_bytes(hybrid) == 2 * 2 * 32 * 2


def test_experts_in_one_tensor_are_measured(save_random_model: Callable[..., Path], tmp_path: Path) -> None:
    kinds = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = GptOssConfig(**HEADS | kinds, num_local_experts=4, num_experts_per_tok=2)
    model = save_random_model(config, tmp_path / "model")
    sizes = measure(model, QuantizeOptions())
    (file,) = model.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        experts = tensors.get_tensor("model.layers.0.mlp.experts.down_proj")
    assert sizes.weights > 2 * 3 * experts.numel()
    assert sizes.kept + sizes.weights * experts.element_size() == file.stat().st_size


def test_a_rate_is_that_of_the_format() -> None:
    assert QuantizeOptions(format="hptq", rate=2.0, target_bits=3.0).planned_rate == 2.0


def test_a_checkpoint_has_the_size_asked_for(
    save_random_llama: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    model = save_random_llama(tmp_path / "model", num_hidden_layers=2)
    options = QuantizeOptions(calibration=str(short_text), samples=2, sequence_length=32, paths=1)
    sizes = measure(model, options)
    wanted = sizes.kept + sizes.weights * 4 // 8
    fitted = fit_size(options, str(wanted), sizes)
    assert fitted == replace(options, target_bits=fitted.target_bits)
    out = quantize(model, tmp_path / "out", fitted)
    report = json.loads((out / "babai_report.json").read_text())
    assert report["quantized_weights"] == sizes.weights
    assert 0.97 * wanted < report["checkpoint_bytes"] < 1.02 * wanted  # names and headers weigh something here
