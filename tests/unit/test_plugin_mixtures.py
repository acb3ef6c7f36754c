"""vLLM's own classes of mixtures of experts, loaded as any rank: their experts are those of the dense twin."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import MORE, SOME, config_of
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm_models import load_as_rank, load_as_stage, one_process

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.model.experts import count_experts, find_experts
from vllm_babai.offline.tools.convert import convert

# What vLLM does not serve quantized or not here, and why.
NOT_HERE = {
    "kimi-linear": "its attention imports cutlass, for CUDA alone",
    "minimax-m2": "its class reads e_score_correction_bias, which transformers does not write for the tiny model",
    "nemotron-h": "experts without a gate are for CUDA alone",
    "phi-moe": "transformers names its class otherwise than vLLM, which then takes a class that asks for other names",
    "qwen3.5-moe": "its class imports torchvision",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"format": "hptq", "rate": 4.0},
    "deepseek-v3": {"target_bits": 4.3},
    "gpt-oss": {"format": "hptq", "rate": 4.0},
}
SERVED = [*OPTIONS, *(name for name in (*SOME, *MORE) if name not in OPTIONS and name not in NOT_HERE)]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with one_process():
        yield


def quantized(family: str, folder: Path, text: Path, save: Callable[..., Path]) -> Path:
    source = save(config_of(family), folder / "source")
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "sequence_length": 32, "paths": 1}
    return quantize(source, folder / "out", QuantizeOptions(**options | OPTIONS.get(family, {})))


def routed_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def outputs(layers: list[Any], routing: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    x, ids, weights = routing
    with torch.inference_mode():
        return [layer.quant_method.apply(layer, x, weights, ids, None, None) for layer in layers]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "gpt-oss" else pytest.mark.long) for name in SERVED]
)
def test_ranks_add_up_to_the_dense_twin(
    family: str, tmp_path: Path, short_text: Path, save_random_model: Callable[..., Path]
) -> None:
    out = quantized(family, tmp_path, short_text, save_random_model)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    twin = list(find_experts(transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)).values())
    generator = torch.Generator().manual_seed(0)
    count = count_experts(twin[0])
    x = torch.randn(9, config_of(family).hidden_size, generator=generator)
    ids = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in x])
    routing = x, ids, torch.rand(ids.shape, generator=generator)
    with torch.inference_mode():
        expected = [module(*routing) for module in twin]

    for found in (
        outputs(routed_layers(load_as_rank(out)), routing),
        summed(out, routing, expert_parallel=False),
        summed(out, routing, expert_parallel=True),
        [layer for stage in range(2) for layer in outputs(routed_layers(load_as_stage(out, stage, 2)), routing)],
    ):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


def summed(out: Path, routing: tuple[Tensor, Tensor, Tensor], *, expert_parallel: bool) -> list[Tensor]:
    """What two ranks add up to, layer by layer."""
    ranks = [routed_layers(load_as_rank(out, rank, 2, expert_parallel=expert_parallel)) for rank in range(2)]
    return [torch.stack(layer).sum(0) for layer in zip(*(outputs(layers, routing) for layers in ranks), strict=True)]
