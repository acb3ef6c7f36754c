"""`vllm serve` of quantized models that are no plain Llama, against transformers with the dense twin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, save_random
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.tools.convert import convert

DEMO_TEXT = Path(__file__).parents[2] / "deploy" / "demo" / "text.py"
# vLLM's attention on a CPU takes heads of 32 or more.
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"granite4": {"mamba_d_head": 32}, "nemotron-h": {"head_dim": 32, "mamba_head_dim": 32}, "llama": {}}
BLOCK = 32  # rows and columns for one scale of an FP8 source


def save_in_fp8(folder: Path) -> None:
    """Store the linears of the blocks as DeepSeek publishes them: FP8 with a scale for every block of a weight."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "fp8"),
    [
        ("granite4", False),
        pytest.param("nemotron-h", False, marks=pytest.mark.long),
        pytest.param("llama", True, marks=pytest.mark.long),
    ],
)
def test_served_as_the_dense_twin(name: str, fp8: bool, tmp_path: Path, start_servers: Callable[..., Any]) -> None:
    kind, fields = ARCHITECTURES[name]
    source = save_random(getattr(transformers, kind)(**fields | WIDE | HEADS[name]), tmp_path / "source")
    if fp8:
        save_in_fp8(source)
    text = tmp_path / "text.txt"
    text.write_text(DEMO_TEXT.read_text() * 20)
    options = QuantizeOptions(calibration=str(text), samples=4, sequence_length=32, paths=1, sensitivity=False)
    out = quantize(source, tmp_path / "out", options)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    tokens = torch.arange(20, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]

    with start_servers((out, "--dtype", "float32", "--max-model-len", "64")) as (server,):
        (choice,) = server.client.completions.create(
            model="babai", prompt=tokens[0].tolist(), max_tokens=4, temperature=0, extra_body={"prompt_logprobs": 0}
        ).choices
        served = [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]
        assert served == pytest.approx(logprobs.tolist(), abs=1e-3)
        assert server.terminate() == 0
