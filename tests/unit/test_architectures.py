"""Tiny random models of many architectures: what is quantized, what stays as published; blocks run as in one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.model.capture import advance
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import load_dense, stored_linears
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.tools.convert import convert

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
# Name → configuration class and its fields. The first ones run always: wrappers and renamed blocks, hybrids, keys and
# values that blocks share, tuples and ALiBi.
SOME: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3Config", {"text_config": SLIDING, "vision_config": SIGLIP, "mm_tokens_per_image": 4}),
    "qwen3.5": (
        "Qwen3_5Config",
        {
            "text_config": LINEAR_ATTENTION
            | {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
            "vision_config": QWEN_VISION,
            **QWEN_TOKENS,
        },
    ),
    "nemotron-h": (
        "NemotronHConfig",
        HEADS
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "gemma4": ("Gemma4TextConfig", SHARED_KV | {"global_head_dim": 16}),
    "falcon": (
        "FalconConfig",
        TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True, "bias": False},
    ),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
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
    "falcon-h1": (
        "FalconH1Config",
        HEADS | MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_conv": 4},
    ),
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
        TEXT | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "block_ff_dim": 96},
    ),
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
            "n_groups": 1,
            "chunk_size": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "minicpm3": ("MiniCPM3Config", LATENT | {"q_lora_rank": 32}),
    "ministral3": ("Ministral3Config", HEADS),
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
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        },
    ),
    "qwen3-next": ("Qwen3NextConfig", LINEAR_ATTENTION | {"num_experts": 0}),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {
            "text_config": HEADS | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0, 1]},
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
ALL = SOME | MORE
NAMES = [*SOME, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path, save_random_model: Any) -> Path:
    """A random model as transformers publishes it, beside it MTP layers that the model has no place for."""
    kind, fields = ALL[request.param]
    return save_random_model(getattr(transformers, kind)(**fields), tmp_path / "source")


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def tokens() -> Tensor:
    return torch.randint(10, 4096, (3, 24), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("source", NAMES, indirect=True)
def test_quantized_and_back(source: Path, tmp_path: Path, short_text: Path) -> None:
    options = QuantizeOptions(calibration=str(short_text), samples=8, sequence_length=32, paths=1)
    out = quantize(source, tmp_path / "out", options)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)

    before, packed, after = tensors(source), tensors(out), tensors(dense)
    points = {name: weight.dequantize() for name, weight, _, _ in stored_linears(open_checkpoint(out))}
    layers = json.loads((out / "babai_report.json").read_text())["layers"]
    assert points.keys() == {layer["name"] for layer in layers}
    assert len(points) >= 4
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        linear = name.removesuffix(".weight")
        if linear in points:
            assert torch.equal(after[name], points[linear])
        else:
            assert tensor.dtype == packed[name].dtype
            assert torch.equal(tensor.view(torch.uint8), packed[name].view(torch.uint8)), name
            assert torch.equal(tensor, after[name]), name
    assert all(layer["relative_error"] < 0.1 for layer in layers)

    named = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    expected = logits(named.from_pretrained(dense, dtype=torch.float32).eval())
    torch.testing.assert_close(logits(load_dense(out, torch.device("cpu"))), expected, rtol=1e-4, atol=1e-5)
    original = logits(named.from_pretrained(source, dtype=torch.float32).eval())
    assert 1e-4 < (original - expected).norm() / original.norm() < 0.8


@pytest.mark.parametrize("source", NAMES, indirect=True)
def test_blocks_one_by_one_are_the_model(source: Path) -> None:
    device = torch.device("cpu")
    model = open_streamed(open_checkpoint(source), device, torch.float32)
    hidden, calls = model.first_inputs(tokens())
    left: dict = {}
    for index, call in enumerate(calls):
        advance(model.load_block(index), hidden, call.of(left), device)
    head = model.load_head()
    with torch.no_grad():
        found = torch.cat([head(tokens()[i : i + 1], hidden[i : i + 1]) for i in range(len(hidden))])
    torch.testing.assert_close(found, logits(load_dense(source, device)), rtol=1e-4, atol=1e-4)
