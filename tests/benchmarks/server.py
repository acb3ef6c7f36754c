"""`vllm serve` for benchmarks, with random tokens as prompts."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import torch

if TYPE_CHECKING:
    from openai import OpenAI


@dataclass(frozen=True)
class Request:
    """What is asked for. vocabulary: prompts are random tokens below it."""

    vocabulary: int
    prompt_tokens: int
    new_tokens: int


@contextmanager
def serve(model: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator["OpenAI"]:
    """Client of a server of the model in this folder, under the name `model`; its log lies next to the folder.

    Raises RuntimeError with the end of the log when the server does not come up.
    """
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--no-enable-prefix-caching", *options]
    log = model.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(environment or {})})
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server stopped:\n{log.read_text()[-3000:]}")
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(1)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)
    finally:
        process.terminate()
        process.wait()


def seconds_to_answer(client: "OpenAI", concurrent: int, request: Request) -> float:
    """Until so many requests, sent at once, are all answered. Needs a server with --skip-tokenizer-init."""

    def ask(seed: int) -> None:
        prompt = torch.randint(request.vocabulary, (request.prompt_tokens,)).tolist()
        extra = {"ignore_eos": True, "detokenize": False}
        client.completions.create(
            model="model", prompt=prompt, max_tokens=request.new_tokens, seed=seed, extra_body=extra
        )

    with ThreadPoolExecutor(concurrent) as pool:
        start = time.perf_counter()
        list(pool.map(ask, range(concurrent)))
        return time.perf_counter() - start


def tokens_per_second(client: "OpenAI", concurrent: int, request: Request) -> float:
    """New tokens of all requests together."""
    return concurrent * request.new_tokens / seconds_to_answer(client, concurrent, request)
