"""Dense weights of quantized checkpoints: exact, complete, and errors that name the damaged linear."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_babai.format import SSQR
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import dense_tensors, load_dense
from vllm_babai.offline.tools.convert import convert

LINEAR = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Any) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def quantized(source: Path, short_text: Path) -> Path:
    options = QuantizeOptions(calibration=str(short_text), samples=8, sequence_length=32, bits=3, group_size=32)
    return quantize(source, source.with_name("quantized"), options)


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def decoded(stored: dict[str, Tensor], linear: str) -> Tensor:
    point = SSQR(*(stored[f"{linear}.{part}"] for part in ("qweight", "scales", "overflow"))).decode()
    return point.integers.float() * point.scales.float().repeat_interleave(32, 1)


def test_float32_twin_is_exact(source: Path, quantized: Path, tmp_path: Path) -> None:
    dense, stored, original = (
        all_tensors(folder)
        for folder in (convert(quantized, tmp_path / "dense", "dense", torch.float32), quantized, source)
    )
    assert dense.keys() == original.keys()
    for name, tensor in dense.items():
        linear = name.removesuffix(".weight")
        expected = decoded(stored, linear) if f"{linear}.qweight" in stored else original[name]
        assert torch.equal(tensor, expected), name
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").vocab_size == 4096


def test_twin_in_another_dtype_is_rounded_once(quantized: Path, tmp_path: Path) -> None:
    dense = all_tensors(convert(quantized, tmp_path / "dense", "dense", torch.bfloat16))
    assert torch.equal(dense[f"{LINEAR}.weight"], decoded(all_tensors(quantized), LINEAR).bfloat16())
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"


def test_twin_and_quantized_load_as_the_same_model(quantized: Path, tmp_path: Path) -> None:
    twin = convert(quantized, tmp_path / "dense", "dense", torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [load_dense(folder, torch.device("cpu"))(tokens).logits for folder in (quantized, twin)]
        plain = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(tokens).logits
    assert torch.equal(*logits)
    assert torch.equal(logits[0], plain)


def test_dense_tensors_of_a_dense_checkpoint_are_its_own(source: Path) -> None:
    tensors, original = dict(dense_tensors(open_checkpoint(source))), all_tensors(source)
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in tensors)


def test_only_quantized_checkpoints_convert(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="is not quantized: it has no quantization_config"):
        convert(source, tmp_path / "dense", "dense", torch.float32)


def test_an_existing_folder_is_only_replaced_when_told_to(quantized: Path, tmp_path: Path) -> None:
    out = convert(quantized, tmp_path / "dense", "dense", torch.float32)
    with pytest.raises(QuantizationError, match="exists: choose another folder, or pass --overwrite"):
        convert(quantized, out, "dense", torch.float32)
    convert(quantized, out, "dense", torch.float32, overwrite=True)
    assert len(all_tensors(out)) == len(dict(dense_tensors(open_checkpoint(quantized))))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("qweight", lambda tensor: tensor ^ 1, "qweight or scales are corrupt"),
        ("qweight", lambda tensor: tensor[:-1], "with 64 rows, but qweight has 63"),
        ("scales", lambda tensor: tensor * 2, "qweight or scales are corrupt"),
        ("overflow", lambda tensor: tensor[:-1], "overflow blob is truncated"),
        ("overflow", lambda tensor: tensor ^ 1, "overflow blob is truncated, or no overflow blob"),
    ],
    ids=["qweight bits", "qweight rows", "scales", "overflow length", "overflow bits"],
)
def test_a_damaged_linear_is_named(part: str, damage: Any, message: str, quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized, tmp_path / "damaged")
    path = open_checkpoint(folder).files[f"{LINEAR}.{part}"]
    tensors = load_file(path)
    tensors[f"{LINEAR}.{part}"] = damage(tensors[f"{LINEAR}.{part}"]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=f"{LINEAR}: .*{message}"):
        convert(folder, tmp_path / "dense", "dense", torch.float32)
    assert not (tmp_path / "dense").exists()


def test_a_missing_part_is_named(quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized, tmp_path / "damaged")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][f"{LINEAR}.overflow"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QuantizationError, match=f"has no tensor {LINEAR}.overflow"):
        load_dense(folder, torch.device("cpu"))


def test_an_unknown_format_version_is_named(quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match="format_version is 99"):
        load_dense(folder, torch.device("cpu"))
