"""LoRA adapters on a quantized model, in vLLM's own LoRA layers: what they add is what they add to the dense twin."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from adapters import save_adapter
from architectures import BUNDLED, TEXT, save_random, tensors_of
from torch import Tensor
from transformers import LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import LogitsProcessorWithLoRA, LoRAMapping, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm_models import config_of, load, one_process

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.tools.convert import convert
from vllm_babai.plugin.embedding import BabaiEmbeddingMethod
from vllm_babai.plugin.linear import BabaiLinearMethod
from vllm_babai.plugin.lora import check_experts

TOKENS = 3


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with one_process():
        yield


def load_with_adapter(model: Path, adapter: Path, **options: Any) -> tuple[Any, VllmConfig]:
    """A model as vLLM's workers make it with --enable-lora, the adapter active for every token.

    options: of `EngineArgs`.
    """
    config = config_of(model, enable_lora=True, max_lora_rank=8, **options)
    loaded: Any = load(config)
    with set_current_vllm_config(config):
        manager = WorkerLoRAManager(config, torch.device("cpu"), loaded.embedding_modules)
        wrapped = manager.create_lora_manager(loaded, config)
        active = LoRAMapping(index_mapping=(1,) * TOKENS, prompt_mapping=(1,) * TOKENS, is_prefill=True)
        manager.set_active_adapters({LoRARequest("adapter", 1, str(adapter))}, active)
    return wrapped, config


def quantized(source: Path, text: Path, **options: Any) -> Path:
    short: dict[str, Any] = {"samples": 2, "sequence_length": 32, "paths": 1, "drift": False, "sensitivity": False}
    some = QuantizeOptions(calibration=str(text), **short | options)
    return quantize(source, source.with_name("out"), some)


def check_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), name


def check_linears(model: torch.nn.Module, twin: torch.nn.Module, number: int) -> None:
    """So many linears take adapters, and give with theirs what the twin's give, which is not what they give without."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseLinearLayerWithLoRA)}
    assert len(layers) == number
    for name, layer in layers.items():
        method = layer.base_layer.quant_method
        assert isinstance(method, BabaiLinearMethod)
        x = torch.randn(TOKENS, method.sizes.in_features)
        expected = twin.get_submodule(name).apply(x)
        check_close(layer.apply(x), expected, name)
        assert (expected - method.apply(layer.base_layer, x)).abs().max() > 0.1 * expected.abs().max(), name


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"embedding": 5, "lm_head": 5}),
        pytest.param(True, {"embedding": 5}, marks=pytest.mark.long),
        pytest.param(False, {"format": "hptq"}, marks=pytest.mark.long),
        pytest.param(False, {"format": "trellis", "target_bits": 3.0, "sensitivity": True}, marks=pytest.mark.long),
    ],
    ids=["head and embedding", "tied", "hptq", "trellis"],
)
def test_an_adapter_adds_what_it_adds_to_the_dense_twin(
    tied: bool, options: dict[str, Any], tmp_path: Path, short_text: Path, groups: None
) -> None:
    source = save_random(LlamaConfig(**TEXT, tie_word_embeddings=tied), tmp_path / "source")
    out = quantized(source, short_text, **options)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    matrices = {name: tensor for name, tensor in tensors_of(dense).items() if tensor.dim() == 2}
    save_adapter(tmp_path / "adapter", matrices)
    residency = {"hf_overrides": {"babai_residency": "coded"}} if options.get("format") == "hptq" else {}
    model, config = load_with_adapter(out, tmp_path / "adapter", **residency)
    twin, _ = load_with_adapter(dense, tmp_path / "adapter")

    check_linears(model, twin, 8)  # of two blocks: q/k/v and gate/up, which vLLM merges, o and down
    embedding, ids = model.model.embed_tokens, torch.arange(TOKENS)
    assert isinstance(embedding, VocabParallelEmbeddingWithLoRA)
    assert isinstance(embedding.base_layer.quant_method, BabaiEmbeddingMethod) == ("embedding" in options)
    check_close(embedding(ids), twin.model.embed_tokens(ids), "embed_tokens")
    assert isinstance(model.logits_processor, LogitsProcessorWithLoRA)
    x = torch.randn(TOKENS, TEXT["hidden_size"])
    with set_current_vllm_config(config):
        check_close(model.logits_processor(model.lm_head, x), twin.logits_processor(twin.lm_head, x), "lm_head")


def test_quantized_experts_are_refused_by_name() -> None:
    with (
        set_current_vllm_config(config_of(BUNDLED, enable_lora=True)),
        pytest.raises(NotImplementedError, match=r"^model\.layers\.0\.mlp\.experts: .*--lora-target-modules"),
    ):
        check_experts("model.layers.0.mlp.experts")


@pytest.mark.long
def test_the_attention_of_a_mixture_takes_adapters(tmp_path: Path, short_text: Path, groups: None) -> None:
    source = save_random(mixtures.config_of("qwen3-moe"), tmp_path / "source")
    out = quantized(source, short_text)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    save_adapter(
        tmp_path / "adapter", {n: w for n, w in tensors_of(source).items() if ".self_attn." in n and w.dim() == 2}
    )
    with pytest.raises(NotImplementedError, match="--lora-target-modules q_proj k_proj v_proj o_proj"):
        load_with_adapter(out, tmp_path / "adapter")
    options = {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (model, _), (twin, _) = (load_with_adapter(folder, tmp_path / "adapter", **options) for folder in (out, dense))
    check_linears(model, twin, 4)
