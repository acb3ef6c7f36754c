"""A quantized checkpoint on two ranks, in eager mode, against transformers with the dense twin."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"


@pytest.fixture(scope="module")
def server(checkpoints: Any, start_servers: Callable[..., Any]) -> Iterator[Any]:
    options = ("--tensor-parallel-size", "2", "--dtype", "float32", "--enforce-eager")
    with start_servers((checkpoints.quantized, *options)) as (running,):
        yield running


def test_two_ranks_equal_the_dense_twin(server: Any, checkpoints: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.dense)
    model = AutoModelForCausalLM.from_pretrained(checkpoints.dense, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        generated = model.generate(tokens, max_new_tokens=32, do_sample=False)[0, tokens.shape[1] :]
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]

    (choice,) = server.client.completions.create(
        model="babai", prompt=tokens[0].tolist(), max_tokens=32, temperature=0, extra_body={"prompt_logprobs": 0}
    ).choices
    assert choice.text == tokenizer.decode(generated, skip_special_tokens=True)
    served = [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]
    assert served == pytest.approx(logprobs.tolist(), abs=0.02)
    assert server.terminate() == 0
    assert server.wait_for_processes() == []
