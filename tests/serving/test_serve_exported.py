"""A checkpoint in the layout of compressed-tensors, served by vLLM without the plugin, against its dense twin."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_babai.format import SSQR, CheckpointConfig, LatticeWeight
from vllm_babai.offline.tools.convert import convert

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"
BITS = 4


def vllm_multiplies_it() -> bool:
    """Whether this build of vLLM has the CPU's matmul for that layout: it needs AVX-512."""
    import vllm._custom_ops  # noqa: F401  # it loads the compiled operators

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, every linear rounded to nearest at a scale that leaves no overflow."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(MODEL / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scales = (weight.float().abs().amax(1, keepdim=True) / 7.4).bfloat16()
        lattice = LatticeWeight((weight.float() / scales.float()).round().short(), scales)
        stored = SSQR.encode(lattice, BITS, name.removesuffix(".weight"))
        tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in stored.tensors().items()}
    folder = tmp_path_factory.mktemp("exported") / "quantized"
    shutil.copytree(MODEL, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = CheckpointConfig("ssqr", BITS, ignore=["lm_head"]).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_vllm_alone_serves_the_same_model(
    quantized: Path, start_servers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not vllm_multiplies_it():
        pytest.skip("vLLM's build for this CPU multiplies no packed integers")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    exported = convert(quantized, quantized.with_name("exported"), "compressed-tensors", torch.float32)
    dense = convert(quantized, quantized.with_name("dense"), "dense", torch.float32)
    tokens = AutoTokenizer.from_pretrained(dense)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    with start_servers((exported,)) as (server,):
        options: Any = {"temperature": 0, "extra_body": {"prompt_logprobs": 0}}
        answer = server.client.completions.create(model="babai", prompt=tokens[0].tolist(), max_tokens=1, **options)
        assert "compressed-tensors" in server.log.read_text()
    found = torch.tensor([next(iter(token.values()))["logprob"] for token in answer.choices[0].prompt_logprobs[1:]])
    # The server computes in bfloat16: single log probabilities differ by hundredths, without a direction.
    assert (found - expected).abs().max() < 0.5
    assert (found - expected).mean().abs() < 0.03
