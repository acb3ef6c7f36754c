"""Conversions between the formats and to dense lose nothing."""

import filecmp
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_babai.format.checksums import digest_of, file_sums
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import dense_tensors
from vllm_babai.offline.tools.convert import convert, smallest_width


@pytest.fixture(scope="module", params=["ssqr", "hptq"])
def quantized(
    request: pytest.FixtureRequest,
    save_random_llama: Callable[..., Path],
    short_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    text = {"calibration": str(short_text), "samples": 4, "sequence_length": 64}
    options = QuantizeOptions(format=request.param, bits=3, rate=2.5, column_steps=False, **text)
    return quantize(save_random_llama(folder / "model"), folder / request.param, options)


def test_there_and_back_is_byte_identical(quantized: Path, tmp_path: Path) -> None:
    other = "hptq" if quantized.name == "ssqr" else "ssqr"
    there = convert(quantized, tmp_path / "there", other, torch.float32)
    back = convert(there, tmp_path / "back", quantized.name, torch.float32)
    for path in quantized.glob("*.safetensors"):
        assert filecmp.cmp(path, back / path.name, shallow=False), path.name
    digests = {}
    for folder in (quantized, there, back):
        digests[folder] = open_checkpoint(folder).config()["quantization_config"]["digest"]
        assert digests[folder] == digest_of(file_sums(folder, folder.glob("*.safetensors")))
    assert digests[quantized] == digests[back] != digests[there]


def test_all_forms_have_the_same_dense_weights(quantized: Path, tmp_path: Path) -> None:
    own = dict(dense_tensors(open_checkpoint(quantized)))
    for form in ("ssqr", "hptq", "dense"):
        other = dict(dense_tensors(open_checkpoint(convert(quantized, tmp_path / form, form, torch.float32))))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name].float(), other[name].float()) for name in own)


def test_dense_checkpoints_and_existing_folders_are_refused(quantized: Path, tmp_path: Path) -> None:
    dense = convert(quantized, tmp_path / "dense", "dense", torch.bfloat16)
    with pytest.raises(QuantizationError, match="not quantized"):
        convert(dense, tmp_path / "again", "ssqr", torch.float32)
    with pytest.raises(QuantizationError, match="--overwrite"):
        convert(quantized, dense, "dense", torch.float32)
    assert not (tmp_path / "again").exists()


def test_smallest_width_leaves_two_percent_out() -> None:
    integers = torch.zeros(10, 100, dtype=torch.int16)
    integers.view(-1)[:20] = 7
    assert smallest_width(integers) == 2
    integers.view(-1)[:21] = 7
    assert smallest_width(integers) == 4
