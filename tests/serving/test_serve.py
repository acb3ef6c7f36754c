"""A real `vllm serve` of a quantized checkpoint, asked through the real `openai` client, beside its dense twin.

Compiled, as vLLM serves by default; the twin in eager mode.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

PROMPTS = [
    "def main(",
    "import os\n\nclass Path",
    '"""Tools for',
    "    def __init__(self",
    "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n",
]


# float32 activations: in bfloat16 the twin's own rounding, of weights to 8 bits, already changes tokens.
@pytest.fixture(scope="module")
def servers(checkpoints: Any, start_servers: Callable[..., Any]) -> Iterator[list[Any]]:
    quantized = (checkpoints.quantized, "--quantization", "babai", "--dtype", "float32")
    with start_servers(quantized, (checkpoints.dense, "--dtype", "float32", "--enforce-eager")) as running:
        yield running


@pytest.fixture
def client(servers: list[Any]) -> openai.OpenAI:
    return servers[0].client


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "babai", "prompt": prompt, "max_tokens": 16, "temperature": 0, **options}
    )


def prompt_logprobs(client: openai.OpenAI, prompt: str) -> list[float]:
    (choice,) = complete(client, prompt, max_tokens=1, extra_body={"prompt_logprobs": 0}).choices
    return [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["babai"]


def test_the_compiled_graph_calls_the_ops(servers: list[Any]) -> None:
    saved = re.search(r"saved AOT compiled function to (\S+/torch_aot_compile/\w+)", servers[0].log.read_text())
    assert saved, "the model was not compiled"
    generated = "".join(path.read_text() for path in Path(saved[1]).rglob("*.py"))
    assert "torch.ops.babai.matmul" in generated
    assert "torch.ops.babai.lookup" in generated


def test_completion(client: openai.OpenAI) -> None:
    answer = complete(client, PROMPTS[0])
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_streaming(client: openai.OpenAI) -> None:
    pieces = [chunk.choices[0].text for chunk in complete(client, PROMPTS[0], stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == complete(client, PROMPTS[0]).choices[0].text


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "def add(a, b):"}]
    options: Any = {"model": "babai", "messages": messages, "max_tokens": 16, "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == answer.choices[0].message.content


def test_two_answers(client: openai.OpenAI) -> None:
    answer = complete(client, PROMPTS[0], n=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text


def test_logprobs(client: openai.OpenAI) -> None:
    (choice,) = complete(client, PROMPTS[0], logprobs=3).choices
    for chosen, best in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert len(best) >= 3
        assert chosen == max(best.values()) <= 0


def test_sixteen_at_once(client: openai.OpenAI) -> None:
    prompts = [f"{prompt}{suffix}" for prompt in PROMPTS for suffix in ("", "a", "b", "c")][:16]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts[:4]]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, prompts))
    assert together[:4] == alone
    assert all(together)


def test_wrong_model_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="mistake"):
        complete(client, PROMPTS[0], model="mistake")


def test_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        complete(client, "def main(): pass\n" * 200)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_the_dense_twin(servers: list[Any], prompt: str) -> None:
    quantized, dense = (server.client for server in servers)
    assert complete(quantized, prompt).choices[0].text == complete(dense, prompt).choices[0].text
    assert prompt_logprobs(quantized, prompt) == pytest.approx(prompt_logprobs(dense, prompt), abs=0.02)


def test_terminates_cleanly(servers: list[Any]) -> None:
    """Last: it ends the servers."""
    for server in servers:
        assert server.terminate() == 0
        assert server.wait_for_processes() == []
