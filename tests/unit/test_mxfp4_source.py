"""Checkpoints with experts in MXFP4, as gpt-oss is published: read exactly, and quantized like their dense twin."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import config_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.mxfp4 import dequantize_mxfp4
from vllm_babai.offline.model.source import open_source

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, the OCP Microscaling formats, version 1.0
EXPERTS = ("gate_up_proj", "down_proj")


def by_hand(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, rows, groups, 16] and [experts, rows, groups] → [experts, columns, rows], float32."""
    result = torch.empty(*blocks.shape[:2], blocks.shape[2] * 32)
    for expert, row, group, byte in torch.cartesian_prod(*(torch.arange(size) for size in blocks.shape)).tolist():
        both, exponent = int(blocks[expert, row, group, byte]), int(scales[expert, row, group]) - 127
        for place, code in enumerate((both & 15, both >> 4)):
            value = MAGNITUDES[code & 7] * 2.0**exponent
            result[expert, row, 32 * group + 2 * byte + place] = -value if code & 8 else value
    return result.mT


def random_mxfp4(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 122, (experts, rows, columns // 32), dtype=torch.uint8)


def test_every_code_and_scale_is_exact() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 8, 16, 16).contiguous()
    exponents = torch.tensor([1, 2, 60, 126, 127, 128, 200, 250], dtype=torch.uint8)
    scales = exponents[None, :, None].expand(1, 8, 16).contiguous()
    assert torch.equal(dequantize_mxfp4(blocks, scales).float(), by_hand(blocks, scales))


def as_mxfp4(source: Path) -> None:
    """Put random MXFP4 experts in the place of a checkpoint's own."""
    tensors, stored = load_file(source / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith(EXPERTS):
            experts, columns, rows = tensor.shape
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = random_mxfp4(experts, rows, columns)
        else:
            stored[name] = tensor
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))


def test_what_is_quantized_is_the_mxfp4_model(tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    source = save_random_model(config_of("gpt-oss"), tmp_path / "source")
    twin = save_random_model(config_of("gpt-oss"), tmp_path / "twin")
    as_mxfp4(source)
    opened = open_source(open_checkpoint(source))
    tensors = load_file(twin / "model.safetensors")
    packed = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(EXPERTS):
            assert opened.shape(name) == tensors[name].shape
            tensors[name] = by_hand(packed[f"{name}_blocks"], packed[f"{name}_scales"]).contiguous()
    assert opened.files.keys() == tensors.keys()
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})

    options = QuantizeOptions(
        calibration=str(short_text), samples=2, sequence_length=32, paths=1, sensitivity=False, drift=False
    )
    found, expected = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (quantize(each, tmp_path / f"{each.name}-out", options) for each in (source, twin))
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "up is in MXFP4, but .* has no up_scales for it"),
        ({"up_scales": torch.ones(2, 3, 2, dtype=torch.uint8)}, r"up: scales of shape \(2, 3, 2\) do not fit"),
        ({"up_scales": torch.ones(2, 3, 1)}, "up: blocks and scales of MXFP4 are uint8"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_scales_that_do_not_fit(scales: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    save_file({"up_blocks": random_mxfp4(2, 3, 32)[0]} | scales, tmp_path / "model.safetensors")
    with pytest.raises(QuantizationError, match=message):
        open_source(open_checkpoint(tmp_path)).read("up")
