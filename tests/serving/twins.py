"""A quantized folder of the bundled model, and what its dense twin answers in transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_babai.format import CheckpointConfig
from vllm_babai.offline.tools.convert import convert

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"
TOKENS = 16
# Sizes of latent attention as in the published models: vLLM has kernels for no others.
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


class Answer(NamedTuple):
    """tokens: of the prompt. text: the greedy answer. logprobs: of the prompt's tokens but the first."""

    tokens: list[int]
    text: str
    logprobs: list[float]


def store_linears(folder: Path, config: CheckpointConfig, encode: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """Save the bundled model with the linears of its blocks as `encode` makes them of name and weight."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(MODEL / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            linear = name.removesuffix(".weight")
            tensors |= {f"{linear}.{key}": tensor for key, tensor in encode(linear, weight).items()}
        else:
            tensors[name] = weight
    return save_with(folder, tensors, {"quantization_config": config.to_dict()})


def save_with(folder: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Path:
    """Save the bundled model with other tensors and other fields of its configuration."""
    shutil.copytree(MODEL, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def answer_of_twin(quantized: Path) -> Answer:
    """What the dense twin of a folder answers, which is made beside it."""
    return answer_in_transformers(convert(quantized, quantized.with_name("dense"), "dense", torch.float32))


def answer_in_transformers(dense: Path) -> Answer:
    """What a model answers in float32."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        generated = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False)[0, tokens.shape[1] :]
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return Answer(tokens[0].tolist(), tokenizer.decode(generated, skip_special_tokens=True), logprobs.tolist())


def served_answer(client: Any, prompt: list[int], new_tokens: int = TOKENS, model: str = "babai") -> Answer:
    """What a server answers. model: the name of an adapter, if not the server's own."""
    options: Any = {"temperature": 0, "extra_body": {"prompt_logprobs": 0}}
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=new_tokens, **options)
    (choice,) = answer.choices
    logprobs = [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]
    return Answer(prompt, choice.text, logprobs)


def check_as_twin(client: Any, expected: Answer, model: str = "babai") -> None:
    """A server in float32 answers as the dense twin does."""
    found = served_answer(client, expected.tokens, model=model)
    assert found.text == expected.text
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
