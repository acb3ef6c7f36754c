"""Tiny random models of many architectures: what is quantized, what stays as published; blocks run as in one."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, configuration, save_random, tensors_of
from torch import Tensor, nn

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.model.capture import advance
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import load_dense, stored_linears
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.tools.convert import convert

# What runs always: wrappers and renamed blocks, hybrids, keys and values that blocks share, tuples and ALiBi.
ALWAYS = ("gemma3", "qwen3.5", "nemotron-h", "gemma4", "falcon")
NAMES = [*ALWAYS, *(pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES if name not in ALWAYS)]


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_random(configuration(request.param), tmp_path / "source")


def tokens() -> Tensor:
    return torch.randint(10, 4096, (3, 24), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("source", NAMES, indirect=True)
def test_quantized_and_back(source: Path, tmp_path: Path, short_text: Path) -> None:
    options = QuantizeOptions(calibration=str(short_text), samples=8, sequence_length=32, paths=1)
    out = quantize(source, tmp_path / "out", options)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)

    before, packed, after = tensors_of(source), tensors_of(out), tensors_of(dense)
    points = {name: weight.dequantize() for name, weight, _, _ in stored_linears(open_checkpoint(out))}
    layers = json.loads((out / "babai_report.json").read_text())["layers"]
    assert points.keys() == {layer["name"] for layer in layers}
    assert len(points) >= 4
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        linear = name.removesuffix(".weight")
        if linear in points:
            assert torch.equal(after[name], points[linear])
        else:
            assert tensor.dtype == packed[name].dtype
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), packed[name].reshape(-1).view(torch.uint8)), name
            assert torch.equal(tensor, after[name]), name
    assert all(layer["relative_error"] < 0.1 for layer in layers)

    named = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    expected = logits(named.from_pretrained(dense, dtype=torch.float32).eval())
    torch.testing.assert_close(logits(load_dense(out, torch.device("cpu"))), expected, rtol=1e-4, atol=1e-5)
    original = logits(named.from_pretrained(source, dtype=torch.float32).eval())
    assert 1e-4 < (original - expected).norm() / original.norm() < 0.8


@pytest.mark.parametrize("source", NAMES, indirect=True)
def test_blocks_one_by_one_are_the_model(source: Path) -> None:
    device = torch.device("cpu")
    model = open_streamed(open_checkpoint(source), device, torch.float32)
    hidden, calls = model.first_inputs(tokens())
    left: dict = {}
    for index, call in enumerate(calls):
        advance(model.load_block(index), hidden, call.of(left), device)
    head = model.load_head()
    with torch.no_grad():
        found = torch.cat([head(tokens()[i : i + 1], hidden[i : i + 1]) for i in range(len(hidden))])
    torch.testing.assert_close(found, logits(load_dense(source, device)), rtol=1e-4, atol=1e-4)
