"""SSQR in the layout of compressed-tensors: read back by that library, and by transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import dense_tensors, load_dense, stored_linears
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.export import clip


@pytest.fixture(scope="module")
def make(
    save_random_llama: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("export")
    model = save_random_llama(folder / "model", num_hidden_layers=1)

    def quantized(name: str, **options: object) -> Path:
        text = {"calibration": str(short_text), "samples": 2, "sequence_length": 32, "paths": 1}
        return quantize(model, folder / name, QuantizeOptions(**text, **options))

    return quantized


@pytest.fixture(scope="module", params=[-1, 32])
def without_overflow(request: pytest.FixtureRequest, make: Callable[..., Path]) -> Path:
    return make(f"groups {request.param}", overflow=0.0, group_size=request.param, ignore=["o_proj"])


def export(folder: Path, out: Path) -> Path:
    return convert(folder, out, "compressed-tensors", torch.float32, clip_overflow=True)


def clipped_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The dense model of 4 bits without its overflow: groups leave a little even where none is asked for."""
    checkpoint = open_checkpoint(folder)
    clipped = {f"{name}.weight": clip(weight, 4).dequantize() for name, weight, _, _ in stored_linears(checkpoint)}
    return dict(dense_tensors(checkpoint)) | clipped


def test_the_library_reads_the_same_weights(without_overflow: Path, tmp_path: Path) -> None:
    out = export(without_overflow, tmp_path / "out")
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    scheme = next(iter(config.config_groups.values()))
    stored: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        stored |= load_file(path)
    for name, weight in clipped_tensors(without_overflow).items():
        linear = name.removesuffix("weight")
        if f"{linear}weight_packed" in stored:
            parts = {key: stored[linear + key] for key in ("weight_packed", "weight_scale", "weight_shape")}
            parts["weight_scale"] = parts["weight_scale"].float()
            assert torch.equal(PackedQuantizationCompressor.decompress(parts, scheme)["weight"], weight), name
        else:
            assert torch.equal(stored[name].float(), weight.float()), name
    assert any("o_proj" in name for name in config.ignore)


def test_transformers_predicts_the_same(without_overflow: Path, tmp_path: Path) -> None:
    out = export(without_overflow, tmp_path / "out")
    tokens = torch.arange(24)[None]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    dense = load_dense(without_overflow, torch.device("cpu"))
    dense.load_state_dict(
        {name: tensor.float() for name, tensor in clipped_tensors(without_overflow).items()}, strict=False
    )
    with torch.inference_mode():
        found = model(tokens).logits
        expected = dense(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_overflow_is_refused_or_clipped(
    make: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make("overflow", overflow=0.02)
    with pytest.raises(QuantizationError, match=r"has integers beyond 4 bits.*--clip"):
        convert(folder, tmp_path / "out", "compressed-tensors", torch.float32)
    assert not any(tmp_path.iterdir())
    convert(folder, tmp_path / "out", "compressed-tensors", torch.float32, clip_overflow=True)
    assert "integers clipped (" in capfd.readouterr().err


def test_widths_of_no_whole_word_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("three", bits=3)
    with pytest.raises(QuantizationError, match="has 3 bits, and compressed-tensors takes"):
        convert(folder, tmp_path / "out", "compressed-tensors", torch.float32)
    assert not any(tmp_path.iterdir())
