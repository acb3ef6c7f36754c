"""Checkpoints under the names of transformers' modules: renamed, merged, split and transposed tensors; unknown ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MROPE, VISION, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    LlamaConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
)

from vllm_babai.offline import QuantizationError
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.view import CheckpointView, view_checkpoint

TEXT = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TEXT),
    "gemma3": Gemma3Config(
        text_config=TEXT,
        vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "qwen2.5-vl": Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    ),
    "nemotron-h": NemotronHConfig(
        **TEXT,
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
    ),
    "olmo-hybrid": OlmoHybridConfig(**TEXT, layer_types=["linear_attention", "full_attention"]),
    "qwen3-moe": Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "deepseek-v3": DeepseekV3Config(
        **TEXT | {"num_key_value_heads": 2, "head_dim": 8},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
    ),
}
BLOCKS = {  # name of the first block: transformers', the checkpoint's
    "llama": ("model.layers.0", "model.layers.0"),
    "gemma3": ("model.language_model.layers.0", "language_model.model.layers.0"),
    "qwen2.5-vl": ("model.language_model.layers.0", "model.layers.0"),
    "nemotron-h": ("model.layers.0", "backbone.layers.0"),
    "olmo-hybrid": ("model.layers.0", "model.layers.0"),
    "qwen3-moe": ("model.layers.0", "model.layers.0"),
    "deepseek-v3": ("model.layers.0", "model.layers.0"),
}


def save(config: PreTrainedConfig, folder: Path) -> Any:
    """A random model in `folder` as its authors would publish it: transformers undoes its conversions on saving."""
    model = random_model(config)
    model.save_pretrained(folder)
    return model


def view(folder: Path, model: nn.Module) -> CheckpointView:
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    return view_checkpoint(open_checkpoint(folder), skeleton)


def change(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_read_as_transformers_loads_it(name: str, tmp_path: Path) -> None:
    model = save(MODELS[name], tmp_path)
    found, tied = view(tmp_path, model), model.all_tied_weights_keys
    wanted = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    assert wanted.keys() <= found.sources.keys()
    assert all(torch.equal(found.read(key), tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("name", MODELS)
def test_names_in_the_checkpoint(name: str, tmp_path: Path) -> None:
    found, stored = view(tmp_path, save(MODELS[name], tmp_path)), load_file(tmp_path / "model.safetensors")
    module, published = BLOCKS[name]
    assert found.stored_module(module) == published
    copies = {key: found.stored_name(key) for key in found.sources}
    assert all(torch.equal(stored[other], found.read(key)) for key, other in copies.items() if other)
    assert all(
        key.endswith(("experts.gate_up_proj", "experts.down_proj", "conv1d.weight"))
        for key in copies
        if not copies[key]
    )


def test_a_tensor_of_several_targets(tmp_path: Path) -> None:
    from transformers import HrmTextConfig

    model = save(HrmTextConfig(**TEXT), tmp_path)
    found = view(tmp_path, model)
    wanted = model.state_dict()
    split = [key for key, source in found.sources.items() if len(source.targets) > 1]
    assert {key.rpartition("mlp.")[2] for key in split if ".mlp." in key} == {"gate_proj.weight", "up_proj.weight"}
    assert all(torch.equal(found.read(key), wanted[key]) for key in split)


def test_what_the_model_has_no_place_for(tmp_path: Path) -> None:
    model = save(MODELS["llama"], tmp_path)
    mtp = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4), "model.layers.2.eh_proj.weight": torch.ones(4, 8)}
    change(tmp_path, mtp)
    found = view(tmp_path, model)
    read = {name for source in found.sources.values() for names in source.stored.values() for name in names}
    assert not read & mtp.keys()
    with pytest.raises(QuantizationError, match=r"has no tensor for model\.layers\.2"):
        found.read("model.layers.2.eh_proj.weight")
