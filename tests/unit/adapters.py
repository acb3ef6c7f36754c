"""LoRA adapters as PEFT saves them, with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 8


def save_adapter(folder: Path, weights: dict[str, Tensor], size: float = 0.3) -> dict[str, Tensor]:
    """Save an adapter of some linears and embeddings; returns what it adds to each weight, by its name.

    weights: [out, in] by name in the checkpoint, an embedding's [vocabulary, hidden]. size: norm of what is added, for
    a weight of norm one.
    """
    generator = torch.Generator().manual_seed(1)
    stored, added = {}, {}
    for name, weight in weights.items():
        down = torch.randn(RANK, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], RANK, generator=generator)
        up *= size * weight.float().norm() / (up @ down).norm() * RANK / ALPHA
        added[name] = ALPHA / RANK * up @ down
        module = "base_model.model." + name.removesuffix(".weight")
        if "embed" in name:  # looked up in A, transposed: PEFT swaps the two
            stored |= {f"{module}.lora_embedding_A": up.T, f"{module}.lora_embedding_B": down.T}
        else:
            stored |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-2] for name in weights})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added
