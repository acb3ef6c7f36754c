"""A trellis checkpoint on one rank and on two, against transformers with its dense twin."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_babai.format import CheckpointConfig, Trellis
from vllm_babai.offline.scales.trellis import search_trellis
from vllm_babai.offline.solver.factor import factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.tools.convert import convert

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"
TOKENS = 16
SERVERS = {"one rank": [], "two ranks": ["--tensor-parallel-size", "2"]}


@pytest.fixture(scope="module")
def trellis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 4 bits per weight, every linear as if its inputs were white noise."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(MODEL / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        lattice = Lattice(factorize(torch.eye(weight.shape[1]), "reverse", 0.0), None, 4)
        solution = search_trellis(weight.float().T.flip(0).contiguous(), lattice, 4.0, 0)
        tensors[name.removesuffix("weight") + "trellis"] = Trellis.encode(solution.weight).trellis
    folder = tmp_path_factory.mktemp("trellis") / "quantized"
    shutil.copytree(MODEL, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = CheckpointConfig("trellis", ignore=["lm_head"], residency="tiled").to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def expected(trellis: Path) -> tuple[list[int], str, list[float]]:
    """Prompt, greedy answer and log probabilities of the prompt's tokens, of the dense twin in transformers."""
    dense = convert(trellis, trellis.with_name("dense"), "dense", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        generated = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False)[0, tokens.shape[1] :]
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return tokens[0].tolist(), tokenizer.decode(generated, skip_special_tokens=True), logprobs.tolist()


@pytest.fixture(scope="module")
def servers(trellis: Path, start_servers: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    with start_servers(*((trellis, "--dtype", "float32", *options) for options in SERVERS.values())) as running:
        yield dict(zip(SERVERS, running, strict=True))


@pytest.mark.parametrize("name", SERVERS)
def test_equals_the_dense_twin(
    name: str, servers: dict[str, Any], expected: tuple[list[int], str, list[float]]
) -> None:
    prompt, text, logprobs = expected
    options: Any = {"temperature": 0, "extra_body": {"prompt_logprobs": 0}}
    answer = servers[name].client.completions.create(model="babai", prompt=prompt, max_tokens=TOKENS, **options)
    (choice,) = answer.choices
    assert choice.text == text
    served = [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]
    assert served == pytest.approx(logprobs, abs=1e-3)
    assert "Placing linear layers: 100%" in servers[name].log.read_text()
