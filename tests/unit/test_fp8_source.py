"""Checkpoints in FP8: block and tensor scales, ragged grids; other formats are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import Checkpoint, open_checkpoint
from vllm_babai.offline.model.dense import load_dense
from vllm_babai.offline.model.fp8 import dequantize_fp8
from vllm_babai.offline.model.source import open_source


def by_hand(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    result = weight.double()
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            result[row, column] *= scales[row // block[0], column // block[1]].double()
    return result.float()


def random_fp8(rows: int, columns: int) -> Tensor:
    return (100 * torch.randn(rows, columns)).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (18, 24), (16, 21), (3, 5), (17, 9)])
def test_block_scales(rows: int, columns: int) -> None:
    weight, block = random_fp8(rows, columns), (8, 8)
    scales = torch.rand(-(-rows // 8), -(-columns // 8)) + 0.5
    found = dequantize_fp8(weight, scales, block)
    assert torch.equal(found, by_hand(weight, scales, block))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale(shape: tuple[int, ...]) -> None:
    weight = random_fp8(4, 6)
    assert torch.equal(dequantize_fp8(weight, torch.full(shape, 0.3), None), weight.float() * 0.3)


def test_experts_in_one_tensor() -> None:
    weight, scales = torch.stack([random_fp8(10, 12)] * 2), torch.rand(2, 2, 2)
    expected = torch.stack([by_hand(w, s, (8, 8)) for w, s in zip(weight, scales, strict=True)])
    assert torch.equal(dequantize_fp8(weight, scales, (8, 8)), expected)


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], quantization: dict | None, inner: bool = False
) -> Checkpoint:
    config: dict = {"model_type": "llama", "text_config": {"hidden_size": 8}}
    if quantization is not None:
        (config["text_config"] if inner else config)["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder)


@pytest.mark.parametrize("inner", [False, True], ids=["config", "text_config"])
def test_a_checkpoint_is_read_dequantized(inner: bool, tmp_path: Path) -> None:
    weight, scales, norm = random_fp8(12, 10), torch.rand(2, 2), torch.randn(10).bfloat16()
    tensors = {
        "up.weight": weight,
        "up.weight_scale_inv": scales,
        "up.activation_scale": torch.ones(()),
        "norm.weight": norm,
    }
    config = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    source = open_source(save_checkpoint(tmp_path, tensors, config, inner))
    expected = by_hand(weight, scales, (8, 8))
    assert source.files.keys() == {"up.weight", "norm.weight"}
    assert torch.equal(source.read("up.weight"), expected)
    assert torch.equal(source.read_kept("up.weight"), expected.bfloat16())
    assert torch.equal(source.read_kept("norm.weight"), norm)
    assert "quantization_config" not in json.dumps(source.config())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up.weight": random_fp8(12, 10)}, "up.weight is in FP8, but .* has no up.weight_scale_inv"),
        (
            {"up.weight": random_fp8(12, 10), "up.weight_scale_inv": torch.rand(3, 2)},
            r"up.weight: scales of shape \(3, 2\) do not fit 12 × 10 in blocks of \(8, 8\)",
        ),
    ],
    ids=["missing", "shape"],
)
def test_scales_that_do_not_fit(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    source = open_source(save_checkpoint(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [8, 8]}))
    with pytest.raises(QuantizationError, match=message):
        source.read("up.weight")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("awq", "AWQ"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
        ("gguf", "GGUF"),
        ("gptq", "GPTQ"),
        ("modelopt", r"ModelOpt \(FP8 or NVFP4\)"),
        ("modelopt_fp4", r"ModelOpt \(NVFP4\)"),
        ("new", "new"),
    ],
)
def test_other_formats_are_refused_by_name(method: str, name: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, {"up.qweight": torch.ones(2)}, {"quant_method": method})
    with pytest.raises(
        QuantizationError, match=rf"already quantized \({name}\); start from the original weights, in bf16"
    ):
        open_source(checkpoint)


def test_a_checkpoint_in_floating_point_stays_itself(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, {"up.weight": torch.ones(2)}, None)
    assert open_source(checkpoint) is checkpoint


def test_what_is_quantized_is_the_fp8_model(tmp_path: Path, short_text: Path, save_random_llama: Any) -> None:
    source, twin, block = save_random_llama(tmp_path / "fp8"), save_random_llama(tmp_path / "twin"), (48, 40)
    stored, dequantized = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored[name] = dequantized[name] = weight
        if name.endswith("_proj.weight"):
            scales = torch.rand(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])) / 448 + 1e-3
            stored[name], stored[f"{name}_scale_inv"] = (weight / scales.mean()).to(torch.float8_e4m3fn), scales
            dequantized[name] = by_hand(stored[name], scales, block)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(dequantized, twin / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))

    options = QuantizeOptions(
        calibration=str(short_text), samples=4, sequence_length=32, paths=1, sensitivity=False, ignore=["o_proj"]
    )
    found, expected = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (quantize(each, tmp_path / f"{each.name}-out", options) for each in (source, twin))
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        ignored = name.endswith("o_proj.weight")
        assert torch.equal(found[name], tensor.bfloat16() if ignored else tensor), name
    assert (
        json.loads((tmp_path / "fp8-out" / "config.json").read_text())["quantization_config"]["quant_method"] == "babai"
    )
    tokens = torch.arange(20)[None]
    models = (load_dense(each, torch.device("cpu")) for each in (source, twin))
    logits, reference = (model(tokens).logits for model in models)
    assert torch.equal(logits, reference)
