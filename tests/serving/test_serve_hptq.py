"""An HPTQ checkpoint in both residencies, on one rank and on two, against transformers with its dense twin.

`coded` compiled, as vLLM serves by default; `packed` in eager mode: its op is SSQR's, which `test_serve.py` compiles.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from twins import MODEL, Answer, answer_of_twin, check_as_twin, save_with

from vllm_babai.format import HPTQ, CheckpointConfig, LatticeWeight, column_factors

STEPS_PER_SPREAD = 2.5  # integers of about 3.3 bits
WITH_COLUMN_STEPS = ("q_proj", "k_proj", "v_proj", "down_proj")
SERVERS = {
    "packed": (["--enforce-eager"], "Packing"),
    "coded": (["--hf-overrides", json.dumps({"babai_residency": "coded"})], "Indexing"),
    "packed, two ranks": (["--tensor-parallel-size", "2", "--enforce-eager"], "Packing"),
}


@pytest.fixture(scope="module")
def hptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, every linear rounded to nearest: with one step, or with a step for every column.

    Its lm_head, too, which no longer is the embedding.
    """
    tensors: dict[str, torch.Tensor] = {}
    original = load_file(MODEL / "model.safetensors")
    for name, weight in (original | {"lm_head.weight": original["model.embed_tokens.weight"]}).items():
        if not name.endswith(("_proj.weight", "lm_head.weight")):
            tensors[name] = weight
            continue
        step = (weight.float().std() / STEPS_PER_SPREAD).bfloat16().reshape(1, 1)
        exponents, steps = None, step.float()
        if name.removesuffix(".weight").endswith(WITH_COLUMN_STEPS):
            exponents = (torch.arange(weight.shape[1]) % 8).short()
            steps = steps * column_factors(exponents).float()
        stored = HPTQ.encode(LatticeWeight((weight.float() / steps).round().short(), step, exponents))
        tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in stored.tensors().items()}
    quantization = CheckpointConfig("hptq", overrides={"lm_head": {}}).to_dict()
    fields = {"tie_word_embeddings": False, "quantization_config": quantization}
    return save_with(tmp_path_factory.mktemp("hptq") / "quantized", tensors, fields)


@pytest.fixture(scope="module")
def expected(hptq: Path) -> Answer:
    return answer_of_twin(hptq)


@pytest.fixture(scope="module")
def servers(hptq: Path, start_servers: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    with start_servers(*((hptq, "--dtype", "float32", *options) for options, _ in SERVERS.values())) as running:
        yield dict(zip(SERVERS, running, strict=True))


@pytest.mark.parametrize("name", SERVERS)
def test_equals_the_dense_twin(name: str, servers: dict[str, Any], expected: Answer) -> None:
    check_as_twin(servers[name].client, expected)
    _, activity = SERVERS[name]
    assert f"{activity} linear layers: 100%" in servers[name].log.read_text()
