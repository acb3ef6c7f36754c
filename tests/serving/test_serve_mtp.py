"""`vllm serve` of a quantized model whose MTP layer, which is not quantized, drafts tokens, against its dense twin."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from architectures import TEXT, save_random, tensors_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DeepseekV3Config
from twins import LATENT, PROMPT, served_answer

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.tools.convert import convert

# The MTP layer is dense like the blocks.
CONFIG = DeepseekV3Config(
    **TEXT
    | LATENT
    | {
        "max_position_embeddings": 512,
        "first_k_dense_replace": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    }
)


def add_mtp(folder: Path) -> dict[str, torch.Tensor]:
    """Add an MTP layer under the names of DeepSeek-V3, and return its tensors.

    Its block is the last one's. Its projection keeps most of the hidden state, so that most drafts repeat the last
    token, as a random model often does.
    """
    path, size = folder / "model.safetensors", CONFIG.hidden_size
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.cat([0.02 * torch.randn(size, size, generator=generator), torch.eye(size)], 1)
    last, new = (f"model.layers.{CONFIG.num_hidden_layers - 1 + i}." for i in (0, 1))
    layer = {new + name.removeprefix(last): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    layer |= {
        f"{new}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{new}enorm.weight": torch.ones(size),
        f"{new}hnorm.weight": torch.ones(size),
        f"{new}eh_proj.weight": mixed,
        f"{new}shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        f"{new}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file(tensors | layer, path, {"format": "pt"})
    return layer


def counted(port: int, name: str) -> float:
    """A counter of a server."""
    found = re.search(rf"^vllm:{name}_total\{{.*\}} (\S+)$", httpx.get(f"http://127.0.0.1:{port}/metrics").text, re.M)
    assert found, name
    return float(found[1])


@pytest.mark.long
def test_drafts_are_accepted_as_of_the_dense_twin(tmp_path: Path, start_servers: Callable[..., Any]) -> None:
    source = save_random(CONFIG, tmp_path / "source")
    layer = add_mtp(source)
    text = tmp_path / "text.txt"
    text.write_text(Path(httpx.__file__).with_name("_client.py").read_text())
    some = QuantizeOptions(calibration=str(text), samples=4, sequence_length=32, paths=1, sensitivity=False)
    out = quantize(source, tmp_path / "out", some)
    stored = tensors_of(out)
    assert all(torch.equal(stored[name], tensor) for name, tensor in layer.items())
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    prompt = AutoTokenizer.from_pretrained(out)(PROMPT)["input_ids"]

    options = ("--dtype", "float32", "--enforce-eager")
    options += ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}')
    with start_servers((out, *options), (dense, *options)) as servers:
        answers = [served_answer(server.client, prompt, 48) for server in servers]
        drafts = [counted(server.port, "spec_decode_num_draft_tokens") for server in servers]
        accepted = [counted(server.port, "spec_decode_num_accepted_tokens") for server in servers]
    assert answers[0].text == answers[1].text
    assert answers[0].logprobs == pytest.approx(answers[1].logprobs, abs=1e-3)
    assert drafts[0] == drafts[1]
    assert 0 < accepted[0] == accepted[1], f"{accepted} of {drafts}"
