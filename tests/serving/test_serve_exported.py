"""A checkpoint in the layout of compressed-tensors, served by vLLM without the plugin, against its dense twin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import answer_of_twin, served_answer, store_linears

from vllm_babai.format import SSQR, CheckpointConfig, LatticeWeight
from vllm_babai.offline.tools.convert import convert

BITS = 4


def vllm_multiplies_it() -> bool:
    """Whether this build of vLLM has the CPU's matmul for that layout: it needs AVX-512."""
    import vllm._custom_ops  # noqa: F401  # it loads the compiled operators

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, every linear rounded to nearest at a scale that leaves no overflow."""

    def encode(linear: str, weight: Tensor) -> dict[str, Tensor]:
        scales = (weight.float().abs().amax(1, keepdim=True) / 7.4).bfloat16()
        lattice = LatticeWeight((weight.float() / scales.float()).round().short(), scales)
        return SSQR.encode(lattice, BITS, linear).tensors()

    config = CheckpointConfig("ssqr", BITS, ignore=["lm_head"])
    return store_linears(tmp_path_factory.mktemp("exported") / "quantized", config, encode)


def test_vllm_alone_serves_the_same_model(
    quantized: Path, start_servers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not vllm_multiplies_it():
        pytest.skip("vLLM's build for this CPU multiplies no packed integers")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    exported = convert(quantized, quantized.with_name("exported"), "compressed-tensors", torch.float32)
    expected = answer_of_twin(quantized)
    with start_servers((exported,)) as (server,):
        answer = served_answer(server.client, expected.tokens, 1)
        assert "compressed-tensors" in server.log.read_text()
    difference = torch.tensor(answer.logprobs) - torch.tensor(expected.logprobs)
    # The server computes in bfloat16: single log probabilities differ by hundredths, without a direction.
    assert difference.abs().max() < 0.5
    assert difference.mean().abs() < 0.03
