"""What vLLM's LoRA layers need of a quantized layer. Those of linears take its device from `qweight`."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none


def show_weight(layer: Any, vllm_config: VllmConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Give a quantized head or embedding a `weight` of one number where adapters are served.

    vLLM's LoRA layers take dtype and device of it, and nothing else. It is no parameter, so that it is neither loaded
    nor saved; a product with it fails, and it equals no other, as vLLM shares the heads of drafts where they are equal.
    """
    if vllm_config.lora_config is not None:
        layer.weight = torch.full((1,), torch.nan, dtype=dtype, device=device)


def check_experts(prefix: str) -> None:
    """Raise NotImplementedError where vLLM would add adapters to the quantized experts of the layer `prefix`."""
    current = get_current_vllm_config_or_none()
    lora = None if current is None else current.lora_config
    if lora is None:
        return
    targets = getattr(lora, "target_modules", None)  # None: all
    if targets is None or {prefix, prefix.rpartition(".")[2]} & set(targets):
        raise NotImplementedError(
            f"{prefix}: quantized experts take no LoRA adapters. Serve those of the other linears with"
            " --enable-lora --lora-target-modules q_proj k_proj v_proj o_proj, or the model without --enable-lora"
        )
