"""Tiny configurations of mixtures of experts."""

from typing import Any

import transformers
from architectures import HEADS, LATENT, LINEAR_ATTENTION, TEXT

LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = MANY | {"shared_expert_intermediate_size": 48}
GROUPED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# Name → configuration class and its fields. SOME are tried in every run of the tests, MORE in the long one.
SOME: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", TEXT | LOCAL),
    "deepseek-v3": ("DeepseekV3Config", LATENT | GROUPED | {"q_lora_rank": 32, "topk_method": "noaux_tc"}),
    "gpt-oss": ("GptOssConfig", HEADS | LOCAL | SLIDING),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2": ("DeepseekV2Config", LATENT | GROUPED | {"q_lora_rank": None, "topk_method": "greedy"}),
    "gemma4": (
        "Gemma4TextConfig",
        HEADS
        | SLIDING
        | {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "glm4": ("Glm4MoeConfig", HEADS | GROUPED),
    "granite": ("GraniteMoeConfig", TEXT | LOCAL),
    "kimi-linear": (
        "KimiLinearConfig",
        LATENT
        | {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "lfm2": ("Lfm2MoeConfig", HEADS | MANY | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "minimax-m2": ("MiniMaxM2Config", HEADS | LOCAL | {"rotary_dim": 16, "scoring_func": "sigmoid"}),
    "nemotron-h": (
        "NemotronHConfig",
        HEADS
        | {
            "layers_block_type": ["mamba", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "olmoe": ("OlmoeConfig", TEXT | {"num_experts": 8, "num_experts_per_tok": 2}),
    "phi-moe": ("PhimoeConfig", TEXT | LOCAL),
    "qwen2-moe": ("Qwen2MoeConfig", TEXT | SHARED),
    "qwen3-moe": ("Qwen3MoeConfig", HEADS | MANY),
    "qwen3-next": ("Qwen3NextConfig", LINEAR_ATTENTION | SHARED),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", LINEAR_ATTENTION | SHARED),
}
ALL = SOME | MORE


def config_of(family: str) -> transformers.PreTrainedConfig:
    """The configuration of a family."""
    kind, fields = ALL[family]
    return getattr(transformers, kind)(**fields)
