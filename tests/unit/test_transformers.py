"""Quantized checkpoints in transformers: they give what their dense twins give, and are refused without our import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXT, configuration, save_random
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
)

from vllm_babai.format import FormatError
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.complete import check_complete
from vllm_babai.offline.tools.convert import convert
from vllm_babai.transformers import BabaiLinear

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def quantized(name: str, folder: Path, text: Path, **options: Any) -> Path:
    config = MixtralConfig(**TEXT, **EXPERTS) if name == "mixtral" else configuration(name)
    source = save_random(config, folder / "source")
    fast = {"samples": 2, "sequence_length": 32, "paths": 1, "sensitivity": False, "drift": False}
    return quantize(source, folder / "out", QuantizeOptions(**{"calibration": str(text), **fast, **options}))


def load(folder: Path, **options: Any) -> nn.Module:
    wrapper = "vision_config" in AutoConfig.from_pretrained(folder).to_dict()
    kind = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    return kind.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(10, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


# Names as in transformers, of a wrapper, of a hybrid with a prefix of its own; experts; formats; a quantized head and
# embedding, tied and not.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {"bits": 3, "lm_head": 5}),
        ("gemma3", {"embedding": 4}),
        ("nemotron-h", {}),
        ("mixtral", {}),
        ("llama", {"format": "hptq", "rate": 3.0, "sensitivity": True, "lm_head": 5.0, "embedding": 4.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_equals_the_dense_twin(name: str, options: dict[str, Any], tmp_path: Path, short_text: Path) -> None:
    out = quantized(name, tmp_path, short_text, **options)
    dense = load(convert(out, tmp_path / "dense", "dense", torch.float32))
    model = load(out)
    layers = [module for module in model.modules() if isinstance(module, BabaiLinear)]
    linears = check_complete(open_checkpoint(out)).linears
    assert {layer.stored for layer in layers} == {
        n for n in linears if ".experts." not in n and "embed_tokens" not in n
    }
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)


def test_generates_what_the_dense_twin_generates(tmp_path: Path, short_text: Path) -> None:
    out = quantized("llama", tmp_path, short_text)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    prompt = AutoTokenizer.from_pretrained(out)("def parse(text):", return_tensors="pt")["input_ids"]
    found, expected = (load(folder).generate(prompt, max_new_tokens=12, do_sample=False) for folder in (out, dense))
    assert found.tolist() == expected.tolist()


def test_without_the_import_it_fails_and_says_what_to_do(tmp_path: Path, short_text: Path) -> None:
    out = quantized("llama", tmp_path, short_text)
    script = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "run `import vllm_babai.transformers` first" in run.stderr.splitlines()[-1]


def test_what_cannot_be_loaded_is_named(tmp_path: Path, short_text: Path) -> None:
    out = quantized("llama", tmp_path, short_text)
    (damaged,) = (path for path in out.glob("*.safetensors") if "00001" in path.name)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.\S+"):
        load(out)
    with pytest.raises(FormatError, match="from a folder or the hub"):
        LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(out), state_dict={})
    damaged.unlink()
    with pytest.raises((QuantizationError, OSError)):
        load(out)
