"""Tiny configurations of the architectures that the tests quantize and serve, and what tests do with such models."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

BUNDLED = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

TEXT = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT = {"vocab_size": 4096, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
HEADS = TEXT | {"head_dim": 16}
SLIDING = HEADS | {"sliding_window": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
QWEN_VISION = {
    "depth": 2,  # as many blocks as the language model has
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
LINEAR_ATTENTION = HEADS | {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = TEXT | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
NO_EXPERTS = {
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
SHARED_KV = SLIDING | {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 4096,
}
# Name → configuration class and its fields.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", TEXT),
    "arcee": ("ArceeConfig", TEXT),
    "bamba": ("BambaConfig", TEXT | MAMBA | {"attn_layer_indices": [1], "mamba_expand": 2}),
    "bloom": ("BloomConfig", {"vocab_size": 4096, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "cohere": ("CohereConfig", TEXT),
    "cohere2": ("Cohere2Config", TEXT | {"sliding_window": 16}),
    "deepseek-v2": ("DeepseekV2Config", LATENT | NO_EXPERTS | {"q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", LATENT | NO_EXPERTS | {"q_lora_rank": 32}),
    "diffllama": ("DiffLlamaConfig", TEXT),
    "ernie4.5": ("Ernie4_5Config", HEADS),
    "exaone4": ("Exaone4Config", TEXT | {"sliding_window": 16, "sliding_window_pattern": 2}),
    "falcon": (
        "FalconConfig",
        TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True, "bias": False},
    ),
    "falcon-h1": (
        "FalconH1Config",
        HEADS | MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_conv": 4},
    ),
    "gemma": ("GemmaConfig", HEADS),
    "gemma2": ("Gemma2Config", SLIDING),
    "gemma3": ("Gemma3Config", {"text_config": SLIDING, "vision_config": SIGLIP, "mm_tokens_per_image": 4}),
    "gemma3-text": ("Gemma3TextConfig", SLIDING),
    "gemma3n": (
        "Gemma3nTextConfig",
        SHARED_KV
        | {
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "intermediate_size": [96] * 4,
        },
    ),
    "gemma4": ("Gemma4TextConfig", SHARED_KV | {"global_head_dim": 16}),
    "glm": ("GlmConfig", HEADS),
    "glm4": ("Glm4Config", HEADS),
    "gpt-neox": ("GPTNeoXConfig", {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}),
    "gptj": ("GPTJConfig", GPT | {"n_positions": 64, "rotary_dim": 8}),
    "granite": ("GraniteConfig", TEXT),
    "granite4": (
        "GraniteMoeHybridConfig",
        TEXT
        | MAMBA
        | {
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["mamba", "attention"],
            "mamba_expand": 2,
        },
    ),
    "helium": ("HeliumConfig", HEADS),
    "hunyuan": ("HunYuanDenseV1Config", HEADS),
    "jamba": (
        "JambaConfig",
        TEXT
        | {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        TEXT
        | {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "block_ff_dim": 96,
            "block_dim": 64,  # vLLM reads it, and published configurations have it
            "conv_dim": 64,
            "conv_dim_out": 64,
        },
    ),
    "llama": ("LlamaConfig", TEXT),
    "llava": (
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 5,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": 4096,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "minicpm3": ("MiniCPM3Config", LATENT | {"q_lora_rank": 32}),
    "ministral3": ("Ministral3Config", HEADS),
    "mistral": ("MistralConfig", TEXT | {"sliding_window": 16}),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": HEADS | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16, "image_size": 28, "patch_size": 14},
            "image_token_index": 5,
        },
    ),
    "nanochat": ("NanoChatConfig", TEXT),
    "nemotron": ("NemotronConfig", HEADS),
    "nemotron-h": (
        "NemotronHConfig",
        HEADS
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "olmo-hybrid": ("OlmoHybridConfig", TEXT | {"layer_types": ["linear_attention", "full_attention"]}),
    "olmo2": ("Olmo2Config", TEXT),
    "olmo3": ("Olmo3Config", TEXT | {"sliding_window": 16}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 4096,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "ffn_dim": 96,
            "max_position_embeddings": 64,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
        },
    ),
    "phi": ("PhiConfig", TEXT),
    "phi3": ("Phi3Config", TEXT),
    "qwen2": ("Qwen2Config", TEXT),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        },
    ),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen3-next": ("Qwen3NextConfig", LINEAR_ATTENTION | {"num_experts": 0}),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {
            "text_config": HEADS | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0, 1]},
            **QWEN_TOKENS,
        },
    ),
    "qwen3.5": (
        "Qwen3_5Config",
        {
            "text_config": LINEAR_ATTENTION
            | {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
            "vision_config": QWEN_VISION,
            **QWEN_TOKENS,
        },
    ),
    "qwen3.5-text": ("Qwen3_5TextConfig", LINEAR_ATTENTION),
    "recurrent-gemma": ("RecurrentGemmaConfig", TEXT | {"num_hidden_layers": 3, "lru_width": 64}),
    "seed-oss": ("SeedOssConfig", HEADS),
    "smollm3": ("SmolLM3Config", TEXT | {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", TEXT),
    "starcoder2": ("Starcoder2Config", TEXT),
}


def configuration(name: str) -> PreTrainedConfig:
    """The tiny configuration of that name."""
    kind, fields = ARCHITECTURES[name]
    return getattr(transformers, kind)(**fields)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, float32."""
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # transformers starts them at 0 and 1, which would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_random(config: PreTrainedConfig, folder: Path, **options: Any) -> Path:
    """Save a random model as its authors would publish it (transformers undoes its conversions), with the bundled
    tokenizer. options: of `save_pretrained`.
    """
    random_model(config).save_pretrained(folder, **options)
    for file in TOKENIZER_FILES:
        shutil.copyfile(BUNDLED / file, folder / file)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, under the names in it."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
