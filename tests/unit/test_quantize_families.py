"""Every supported family of models: quantized linear by linear, and the result is the model with other weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXT, tensors_of
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from vllm_babai.format import SSQR, CheckpointConfig
from vllm_babai.format.config import REFUSAL, restored
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model import walk
from vllm_babai.offline.model.calibration import calibration_tokens
from vllm_babai.offline.model.dense import load_dense

SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
FAMILIES = {
    "llama": (LlamaConfig(**TEXT), SPLIT),
    "llama-tied": (LlamaConfig(**TEXT, tie_word_embeddings=True), SPLIT),
    "llama-biased": (LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True), SPLIT),
    "mistral": (MistralConfig(**TEXT, sliding_window=16), SPLIT),
    "qwen2": (Qwen2Config(**TEXT), SPLIT),
    "qwen3": (Qwen3Config(**TEXT, head_dim=16), SPLIT),
    "gemma": (GemmaConfig(**TEXT, head_dim=16), SPLIT),
    "gemma2": (Gemma2Config(**TEXT, head_dim=16, sliding_window=16), SPLIT),
    "gemma3": (Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=16), SPLIT),
    "phi3": (Phi3Config(**TEXT), FUSED),
}


def options(text: Path, **changed: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"calibration": str(text), "samples": 8, "sequence_length": 32, **changed})


def with_decoded_weights(source: Path, quantized: Path) -> tuple[torch.nn.Module, set[str]]:
    """transformers' model of `source`, the weights of quantized linears replaced; and the names of these."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = tensors_of(quantized)
    linears = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    for linear in linears:
        point = SSQR(*(tensors[f"{linear}.{part}"] for part in ("qweight", "scales", "overflow"))).decode()
        model.get_submodule(linear).weight.data = point.integers.float() * point.scales.float()
    return model, linears


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    config, kinds = FAMILIES[family]
    source = save_random_model(config, tmp_path / "source")
    out = quantize(source, tmp_path / "out", options(short_text, bits=4))
    expected, linears = with_decoded_weights(source, out)
    layers = json.loads((out / "babai_report.json").read_text())["layers"]
    assert {name.rpartition(".")[2] for name in linears} == kinds
    assert len(linears) == 2 * len(kinds)
    assert {layer["name"] for layer in layers} == linears
    assert all(layer["relative_error"] < 0.05 for layer in layers)

    tokens = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits, reference = load_dense(out, torch.device("cpu"))(tokens).logits, expected(tokens).logits
        change = (reference - original(tokens).logits).norm() / reference.norm()
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)
    assert 0.001 < change < 0.5


def hessian_of(model: torch.nn.Module, linear: str, tokens: Tensor) -> Tensor:
    """XᵀX / tokens of the inputs that a linear of the whole model sees."""
    inputs: list[Tensor] = []
    handle = model.get_submodule(linear).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return inputs[0].T @ inputs[0] / len(inputs[0])


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]),
        ("phi3", [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)]),
    ],
)
def test_every_linear_sees_what_the_quantized_ones_before_it_put_out(
    family: str,
    groups: list[tuple[str, ...]],
    tmp_path: Path,
    short_text: Path,
    save_random_model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def spy(hessian: Tensor, order: Any, damping: float) -> Any:
        seen.append(hessian)
        return factorize(hessian, order, damping)

    factorize = walk.factorize
    monkeypatch.setattr(walk, "factorize", spy)
    source = save_random_model(FAMILIES[family][0], tmp_path / "source")
    out = quantize(source, tmp_path / "out", options(short_text, bits=2, sensitivity=False))
    quantized, _ = with_decoded_weights(source, out)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    growing = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = calibration_tokens(tokenizer, str(short_text), 8, 32, seed=0)

    assert len(seen) == 2 * len(groups)
    for index, hessian in enumerate(seen):
        group = groups[index % len(groups)]
        names = [n for n, _ in original.named_modules() if f".{index // len(groups)}." in n and n.endswith(group)]
        expected, without = (hessian_of(model, names[0], tokens) for model in (growing, original))
        error = (hessian - expected).norm()
        assert error < 1e-4 * expected.norm(), names
        assert index == 0 or error < 0.01 * (hessian - without).norm(), names
        for name in names:
            growing.get_submodule(name).weight.data = quantized.get_submodule(name).weight.data


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "phi3"])
def test_what_is_no_linear_of_a_block_is_kept(
    family: str, tmp_path: Path, short_text: Path, save_random_model: Any
) -> None:
    source = save_random_model(FAMILIES[family][0], tmp_path / "source")
    before, after = (tensors_of(folder) for folder in (source, quantize(source, tmp_path / "out", options(short_text))))
    linears = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    replaced = {f"{linear}.weight" for linear in linears}
    stored = {f"{linear}.{part}" for linear in linears for part in ("qweight", "scales", "overflow")}
    assert after.keys() == before.keys() - replaced | stored
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - replaced)
    assert ("lm_head.weight" in after) == (family != "llama-tied")


def test_a_sharded_checkpoint_gives_the_same_tensors(tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    config = FAMILIES["llama"][0]
    sources = {
        "whole": save_random_model(config, tmp_path / "whole"),
        "sharded": save_random_model(config, tmp_path / "sharded", max_shard_size="200KB"),
    }
    assert len(list(sources["sharded"].glob("*.safetensors"))) > 3
    whole, sharded = (
        tensors_of(quantize(source, tmp_path / f"{name}-out", options(short_text))) for name, source in sources.items()
    )
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_output_is_a_complete_checkpoint(tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    source = save_random_model(FAMILIES["llama"][0], tmp_path / "source")
    published = json.loads((source / "config.json").read_text()) | {"attn_implementation": "eager"}
    (source / "config.json").write_text(json.dumps(published))
    out = quantize(source, tmp_path / "out", options(short_text, bits=3, group_size=32))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    scheme = CheckpointConfig.from_dict(config.pop("quantization_config"))
    assert config["attn_implementation"] == REFUSAL
    assert restored(config) == published
    assert (scheme.format, scheme.bits, scheme.group_size, scheme.ignore) == ("ssqr", 3, 32, ["lm_head"])

    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {}
    for file in files:
        with safe_open(out / file, framework="pt") as tensors:
            held |= dict.fromkeys(tensors.keys(), file)
    assert index["weight_map"] == held

    report = json.loads((out / "babai_report.json").read_text())
    tensors = tensors_of(out)
    quantized = sum(t.nbytes for n, t in tensors.items() if n.endswith((".qweight", ".scales", ".overflow")))
    weights = sum(layer["rows"] * layer["columns"] for layer in report["layers"])
    assert report["quantized_weights"] == weights
    assert report["bits_per_weight"] == pytest.approx(8 * quantized / weights)
    assert report["checkpoint_bytes"] == sum((out / file).stat().st_size for file in files)
    assert all(tensors[f"{layer['name']}.scales"].shape[1] == layer["columns"] // 32 for layer in report["layers"])


def test_ignored_linears_stay_as_they_are(tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    source = save_random_model(FAMILIES["llama"][0], tmp_path / "source")
    out = quantize(source, tmp_path / "out", options(short_text, ignore=["down_proj", r"layers\.1\..*k_proj"]))
    ignored = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == ["lm_head", *ignored]
    before, after = tensors_of(source), tensors_of(out)
    assert all(torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in ignored)
    assert sum(name.endswith(".qweight") for name in after) == 14 - 3
    with pytest.raises(QuantizationError, match="excludes every linear"):
        quantize(source, tmp_path / "none", options(short_text, ignore=["proj"]))
