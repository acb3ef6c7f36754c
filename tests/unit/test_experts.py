"""Mixtures of experts: every expert is quantized with the tokens that reach it, and comes back as itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import HEADS
from mixtures import ALL, LOCAL, MORE, SOME, config_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_babai.format.config import CheckpointConfig, layer_name
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.complete import check_complete
from vllm_babai.offline.model.dense import stored_linears
from vllm_babai.offline.model.experts import Expert, check_experts, find_experts, layout_of, routed
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.solver.shrink import shrunk
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.inspect import inspect

FAMILIES = [*SOME, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
TRELLIS = {"format": "trellis", "target_bits": 4.5}


def options(text: Path, **changed: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"calibration": str(text), "samples": 8, "sequence_length": 32, "paths": 1} | changed)


def logits(folder: Path, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Of transformers' model; weights: to put in their place, by the linears' names in its quantized checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if weights is not None:
        streamed = open_streamed(open_checkpoint(folder), torch.device("cpu"), torch.float32)
        for index, block in enumerate(streamed.block_names):
            module = model.get_submodule(f"{streamed.decoder_name}.{streamed.list_name}.{index}")
            for name, linear in streamed.linears(block, module).items():
                linear.weight.data.copy_(weights.pop(name))
        assert not weights
    tokens = torch.randint(10, 4096, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_and_back(family: str, tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    there_and_back(family, {}, tmp_path, short_text, save_random_model)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("deepseek-v3", marks=pytest.mark.long)])
def test_quantized_to_a_trellis_and_back(family: str, tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    there_and_back(family, TRELLIS, tmp_path, short_text, save_random_model)


def there_and_back(
    family: str, changed: dict[str, Any], tmp_path: Path, short_text: Path, save_random_model: Any
) -> None:
    """Quantize and convert to dense: every expert comes back as itself, and the model as near as each was solved."""
    source = save_random_model(config_of(family), tmp_path / "source")
    out = quantize(source, tmp_path / "out", options(short_text, **changed))
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    points = {name: weight.dequantize() for name, weight, _, _ in stored_linears(open_checkpoint(out))}
    report = json.loads((out / "babai_report.json").read_text())
    assert points.keys() == {layer["name"] for layer in report["layers"]}
    errors = torch.tensor([layer["relative_error"] for layer in report["layers"]])
    assert errors.mean() < 0.1 and errors.max() < 0.3
    assert all(sum(layer["tokens"]) == 2 * 8 * 32 for layer in report["experts"])
    assert len(report["experts"]) >= 1

    original, found = logits(source), logits(dense)
    torch.testing.assert_close(found, logits(source, dict(points)), rtol=1e-4, atol=1e-5)
    assert 1e-4 < (original - found).norm() / original.norm() < 0.8


@pytest.mark.parametrize("family", ALL)
def test_an_expert_is_what_the_module_makes_of_it(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).eval()
    (name, module), *_ = find_experts(model).items()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.2)
    check_experts(module, name)
    Expert(module, 1).linears["down"].weight.data.zero_()
    hidden = Expert(module, 0).linears["up"].in_features
    index, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    with torch.no_grad():
        found = module(torch.randn(2, hidden), index, weights)
    layout = layout_of(module)
    assert layout is not None
    assert found[0].norm() > 0
    assert layout.biased or found[1].norm() == 0


def test_an_expert_without_tokens_has_the_layers_hessian(
    tmp_path: Path, short_text: Path, save_random_model: Any
) -> None:
    """The router never chooses expert 0; its bias says so in gpt-oss."""
    source = save_random_model(config_of("gpt-oss"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("router.bias")]:
        tensors[name] = torch.tensor([-1e4, 0.0, 0.0, 0.0])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = quantize(source, tmp_path / "out", options(short_text, target_bits=3.0))
    report = json.loads((out / "babai_report.json").read_text())
    for layer in report["experts"]:
        assert layer["tokens"][0] == 0
        assert layer["pooled"][0] == [1.0, 1.0]
        assert 0 in layer["starved"]
    assert "4 experts saw 0 to 256 tokens each" in inspect(out).experts[0].summary
    widths: dict[str, set[int]] = {}
    for layer in report["layers"]:
        kind = layer_name(layer["name"]).replace("gate_proj", "up_proj")
        widths.setdefault(kind, set()).add(layer["bits"])
    assert all(len(bits) == 1 for bits in widths.values())
    overrides = json.loads((out / "config.json").read_text())["quantization_config"]["overrides"]
    assert not any(".experts.0." in name for name in overrides)


def test_few_tokens_take_the_other_hessian() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.5, 2.0, 16)
    truth = torch.diag(scales.square())
    errors = {}
    for tokens in (1, 8, 64, 4096):
        x = torch.randn(tokens, 16, generator=generator) * scales
        own = x.T @ x / tokens
        mixed, share = shrunk(own, tokens, float(x.square().sum(1).square().mean()), torch.eye(16) * truth.mean() * 16)
        errors[tokens] = (share, float((own - truth).norm()), float((mixed - truth).norm()))
    shares = [share for share, _, _ in errors.values()]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.02
    assert errors[8][2] < errors[8][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.long)), "not supported"),
        ((torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(3, 2)), "not supported"),
        ((torch.zeros(3, 8), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2)), "not supported"),
    ],
)
def test_another_way_to_call_experts_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(QuantizationError, match=rf"experts \(Linear in .*linear\.py\).*{message}"):
        routed(nn.Linear(1, 1), "experts", arguments, {})


def test_unknown_experts_are_refused_before_calibration(
    tmp_path: Path, short_text: Path, save_random_model: Any
) -> None:
    config = transformers.Llama4TextConfig(
        **HEADS | LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1}
    )
    source = save_random_model(config, tmp_path / "source")
    with pytest.raises(QuantizationError, match=r"experts \(Llama4TextExperts in .*modeling_llama4\.py\)"):
        quantize(source, tmp_path / "out", options(short_text))


def test_experts_of_a_layer_go_together(tmp_path: Path, short_text: Path, save_random_model: Any) -> None:
    source = save_random_model(config_of("qwen3-moe"), tmp_path / "source")
    with pytest.raises(QuantizationError, match="experts go together"):
        quantize(source, tmp_path / "out", options(short_text, ignore=[r"experts\.3\."]))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.experts, up: .* no tensor of expert 5 of 8"):
        check_complete(open_checkpoint(source))
    with pytest.raises(QuantizationError, match=r"no tensor of expert 5 of 8"):
        quantize(source, tmp_path / "out", options(short_text))


def test_ignore_and_overrides_know_experts_by_layer() -> None:
    config = CheckpointConfig("ssqr", 4, ignore=["a.1.experts.w2"], overrides={"a.0.experts.w1": {"bits": 3}})
    assert config.scheme("a.0.experts.17.w1").bits == 3
    assert config.scheme("a.0.experts.17.w2").bits == 4
    assert not config.is_quantized("a.1.experts.2.w2")
    assert config.is_quantized("a.1.experts.2.w1")
    assert layer_name("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.up_proj"
