"""An HPTQ checkpoint in both residencies, on one rank and on two, against transformers with its dense twin.

`coded` compiled, as vLLM serves by default; `packed` in eager mode: its op is SSQR's, which `test_serve.py` compiles.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_babai.format import HPTQ, CheckpointConfig, LatticeWeight, column_factors
from vllm_babai.offline.tools.convert import convert

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"
TOKENS = 16
STEPS_PER_SPREAD = 2.5  # integers of about 3.3 bits
WITH_COLUMN_STEPS = ("q_proj", "k_proj", "v_proj", "down_proj")
SERVERS = {
    "packed": (["--enforce-eager"], "Packing"),
    "coded": (["--hf-overrides", json.dumps({"babai_residency": "coded"})], "Indexing"),
    "packed, two ranks": (["--tensor-parallel-size", "2", "--enforce-eager"], "Packing"),
}

Answer = tuple[list[int], str, list[float]]  # prompt, greedy answer, log probabilities of the prompt's tokens


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
    folder = tmp_path_factory.mktemp("hptq") / "quantized"
    shutil.copytree(MODEL, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    config["tie_word_embeddings"] = False
    config["quantization_config"] = CheckpointConfig("hptq", overrides={"lm_head": {}}).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def expected(hptq: Path) -> Answer:
    """What the dense twin answers in transformers."""
    dense = convert(hptq, hptq.with_name("dense"), "dense", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        generated = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False)[0, tokens.shape[1] :]
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return tokens[0].tolist(), tokenizer.decode(generated, skip_special_tokens=True), logprobs.tolist()


@pytest.fixture(scope="module")
def servers(hptq: Path, start_servers: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    with start_servers(*((hptq, "--dtype", "float32", *options) for options, _ in SERVERS.values())) as running:
        yield dict(zip(SERVERS, running, strict=True))


def ask(client: openai.OpenAI, prompt: list[int]) -> Any:
    options: Any = {"temperature": 0, "extra_body": {"prompt_logprobs": 0}}
    return client.completions.create(model="babai", prompt=prompt, max_tokens=TOKENS, **options)


@pytest.mark.parametrize("name", SERVERS)
def test_equals_the_dense_twin(name: str, servers: dict[str, Any], expected: Answer) -> None:
    prompt, text, logprobs = expected
    (choice,) = ask(servers[name].client, prompt).choices
    assert choice.text == text
    served = [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]
    assert served == pytest.approx(logprobs, abs=1e-3)
    _, activity = SERVERS[name]
    assert f"{activity} linear layers: 100%" in servers[name].log.read_text()
