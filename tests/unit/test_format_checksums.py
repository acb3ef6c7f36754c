"""What a checkpoint's files and tensors were: every change is found and named, offline and when vLLM has loaded."""

import hashlib
import json
import shutil
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig

from vllm_babai.format import FormatError
from vllm_babai.format.checksums import (
    SUMS,
    changed_files,
    check_kept,
    digest_of,
    file_sums,
    kept_checksums,
    tensor_checksum,
    tensors_kept,
)
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.inspect import inspect, verify
from vllm_babai.plugin.kept import KeptTensors

TIED = {"tie_word_embeddings": True, "attention_bias": True}


@pytest.fixture(scope="module")
def quantized(save_random_llama: Any, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checksums")
    source = save_random_llama(folder / "source", num_hidden_layers=1, **TIED)
    options = QuantizeOptions(calibration=str(short_text), samples=4, sequence_length=32, paths=1, sensitivity=False)
    return quantize(source, folder / "quantized", options)


@pytest.fixture
def mine(quantized: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(quantized, tmp_path / "mine")


def kept(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["checksums"]


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Give a tensor another value, or remove it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            del tensors[name]
            save_file(tensors | ({} if value is None else {name: value}), path, metadata={"format": "pt"})


def test_digest_is_what_sha256sum_prints(tmp_path: Path) -> None:
    files = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    for path in files:
        path.write_bytes(path.name.encode() * 1000)
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(files))
    digest = digest_of(file_sums(tmp_path, files))
    assert digest == hashlib.sha256(lines.encode()).hexdigest()
    files[0].write_bytes(b"another")
    assert digest_of(file_sums(tmp_path, files)) != digest


def test_a_tensor_is_its_dtype_shape_and_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    content = b"bfloat16 2 3\n" + tensor.view(torch.uint8).numpy().tobytes()
    assert tensor_checksum(tensor) == f"{zlib.crc32(content):08x}"
    others = [tensor.reshape(3, 2), tensor.view(torch.int16), tensor.t().contiguous().t() + 0.25, tensor[:0], tensor[0]]
    assert len({tensor_checksum(other) for other in [tensor, *others, torch.tensor(1.0), torch.tensor(True)]}) == 8
    assert tensor_checksum(tensor.t().contiguous().t()) == tensor_checksum(tensor)


def test_parts_of_quantized_linears_are_not_kept() -> None:
    names = ["a.q.codes", "a.q.scales", "a.q.bias", "a.norm.weight", "b.scales", "codes"]
    assert tensors_kept(names, ("codes", "scales")) == {"a.q.bias", "a.norm.weight", "b.scales", "codes"}


def test_a_checkpoint_knows_all_that_was_left_as_it_was(quantized: Path) -> None:
    names = kept(quantized)
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= names.keys()
    assert not any(name.endswith((".qweight", ".scales", ".overflow")) for name in names)
    files = list(quantized.glob("*.safetensors"))
    assert kept_checksums(files, ("qweight", "scales", "overflow")) == names
    check_kept(files, names)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_another_value_is_named_by_every_command(name: str, mine: Path, tmp_path: Path) -> None:
    value = next(load_file(path)[name] for path in mine.glob("*.safetensors") if name in load_file(path)).clone()
    value.view(torch.uint8).view(-1)[-1] ^= 1  # the last byte: a sign or an exponent
    change(mine, name, value)
    with pytest.raises(QuantizationError, match=f"{name} is corrupt"):
        inspect(mine)
    with pytest.raises(QuantizationError, match=f"{name} is corrupt"):
        convert(mine, tmp_path / "dense", "dense", torch.float32)
    with pytest.raises(QuantizationError, match=f"{name} is corrupt"):
        convert(mine, tmp_path / "hptq", "hptq", torch.float32)
    assert not (tmp_path / "dense").exists() and not (tmp_path / "hptq").exists()


def test_a_tensor_without_a_checksum_is_named(mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    del config["quantization_config"]["checksums"]["model.norm.weight"]
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight is not among the tensors of which config\.json"):
        inspect(mine)


def test_sha256sum_checks_all_files(quantized: Path) -> None:
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=quantized).returncode == 0
    report = json.loads((quantized / "babai_report.json").read_text())
    digest = hashlib.sha256((quantized / SUMS).read_bytes()).hexdigest()
    assert report["digest"] == inspect(quantized).digest == verify(quantized) == digest
    covered = {path.name for path in quantized.iterdir()} - {SUMS, "babai_report.json", "README.md"}  # written after it
    assert set((quantized / SUMS).read_text().split()[1::2]) == covered


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_a_changed_file_is_named(name: str, mine: Path) -> None:
    with (mine / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(QuantizationError, match=f"mine is not as it was written: {name} changed; copy it again"):
        verify(mine)
    (mine / name).unlink()
    with pytest.raises(QuantizationError, match=f"{name} changed"):
        verify(mine)


def test_sums_of_another_checkpoint_are_refused(mine: Path) -> None:
    text = (mine / SUMS).read_text()
    (mine / SUMS).write_text("".join(line for line in text.splitlines(True) if "tokenizer" not in line))
    with pytest.raises(QuantizationError, match=r"babai_report\.json is of another checkpoint than .*SHA256SUMS"):
        verify(mine)
    (mine / SUMS).write_text(text.replace("config.json", "../config.json"))
    with pytest.raises(QuantizationError, match=r"\.\./config\.json, .*config\.json \(not in SHA256SUMS\)"):
        verify(mine)
    (mine / SUMS).write_text("nothing of the kind")
    with pytest.raises(FormatError, match="SHA256SUMS cannot be read"):
        verify(mine)
    (mine / SUMS).unlink()
    with pytest.raises(FormatError, match="SHA256SUMS cannot be read"):
        verify(mine)
    assert inspect(mine).digest is None


def test_a_converted_checkpoint_has_sums_of_its_own(quantized: Path, tmp_path: Path) -> None:
    converted = convert(quantized, tmp_path / "hptq", "hptq", torch.float32)
    assert verify(converted) != verify(quantized)
    assert changed_files(converted, file_sums(quantized, [quantized / "tokenizer.json"])) == []
    assert kept(converted) == kept(quantized)
    dense = convert(quantized, tmp_path / "dense", "dense", torch.float32)
    assert not (dense / SUMS).exists()


def serve(folder: Path, checksums: dict[str, str] | None, **load: str) -> KeptTensors:
    """Compare as vLLM's first layer does."""
    tensors = KeptTensors(checksums)
    tensors.check(SimpleNamespace(model=str(folder), revision=None), LoadConfig(**load))  # type: ignore[arg-type]
    return tensors


@pytest.mark.parametrize("value", [None, torch.zeros(64)])
def test_vllm_refuses_another_value_and_a_missing_tensor(value: torch.Tensor | None, mine: Path) -> None:
    checksums = kept(mine)
    change(mine, "model.norm.weight", value)
    message = "no tensor model.norm.weight" if value is None else "model.norm.weight is corrupt"
    with pytest.raises(FormatError, match=message):
        serve(mine, checksums)
    serve(mine, checksums, load_format="dummy")
    serve(mine, None)


def test_vllm_compares_once(mine: Path) -> None:
    tensors = serve(mine, kept(mine))
    change(mine, "model.norm.weight", torch.zeros(64))
    tensors.check(SimpleNamespace(model=str(mine), revision=None), LoadConfig())  # type: ignore[arg-type]


def test_vllm_says_what_it_cannot_compare(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (tmp_path, Path("nobody/has-such-a-model")):
        serve(folder, {"model.norm.weight": "0" * 8})
