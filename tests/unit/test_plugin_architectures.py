"""vLLM's own model classes, on the meta device: they ask for a method for each linear that was quantized, no other.

This is how the tables in `offline/model/served.py` are known to be right: a class of vLLM that fuses other linears, or
builds one without a method, fails here.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model

from vllm_babai.format import CheckpointConfig
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.served import FUSED, fused_with
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.pipeline import weights_left_alone
from vllm_babai.plugin.config import BabaiConfig
from vllm_babai.plugin.linear import BabaiLinearMethod

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
LATENT = TEXT | {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TEXT),
    "stablelm": ("StableLmConfig", TEXT),
    "deepseek-v3": (
        "DeepseekV3Config",
        LATENT | {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    ),
    "minicpm3": ("MiniCPM3Config", LATENT),
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
    "falcon-h1": (
        "FalconH1Config",
        TEXT
        | {
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 4096, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    ),
}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """vLLM's process groups, of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


def kinds(names: list[str], blocks: list[str]) -> set[tuple[int, str]]:
    """Number of the block and last part of the name of linears: classes of vLLM leave out what is between."""
    prefixes = {f"{name.rpartition('.')[0]}.": name for name in blocks}
    (start,) = prefixes
    return {(int(n.removeprefix(start).split(".")[0]), n.rpartition(".")[2]) for n in names}


@pytest.mark.parametrize("name", CASES)
def test_every_quantized_linear_has_a_method(name: str, tmp_path: Path, save_random_model: Any, one_rank: None) -> None:
    kind, fields = CASES[name]
    source = save_random_model(getattr(transformers, kind)(**fields), tmp_path)
    streamed = open_streamed(open_checkpoint(source), torch.device("cpu"), torch.float32)
    quantized = [linear for block in streamed.block_names for linear in streamed.linears(block)]
    ignored = weights_left_alone(streamed, quantized)
    arguments = EngineArgs(str(source), dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
    config = arguments.create_engine_config()
    config.quant_config = BabaiConfig(CheckpointConfig("ssqr", 4, ignore=ignored, scope=streamed.block_names))
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            model = initialize_model(config)

    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    served = [method.names for method in methods if isinstance(method, BabaiLinearMethod)]
    assert served
    blocks = streamed.block_names
    assert kinds([n for names in served for n in names], blocks) == kinds(quantized, blocks)
    for names in served:
        own = {n.rpartition(".")[2] for n in names}
        assert len(own) == 1 or {n.rpartition(".")[2] for n in fused_with(names[0])} == own
    mapping = config.quant_config.packed_modules_mapping
    fused = [set(parts) for parts in mapping.values() if len(parts) > 1]
    assert all(any(parts <= set(known) for known in FUSED) for parts in fused)
