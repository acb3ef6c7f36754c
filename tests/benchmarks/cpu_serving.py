"""Tokens per second on the CPU: `python tests/benchmarks/cpu_serving.py [--bits N] [--json FILE]`.

Makes a random Llama of 450M parameters, serves it in bfloat16 and quantized with 1% overflow by `vllm serve`, one after
the other, and lets the `openai` client ask for completions at 1 and at 8 concurrent requests.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_babai.format import BIT_WIDTHS, SSQR, CheckpointConfig, LatticeWeight, integer_range

CONFIG = LlamaConfig(
    hidden_size=1536,
    intermediate_size=4608,
    num_hidden_layers=16,
    num_attention_heads=24,
    num_key_value_heads=8,
    vocab_size=8192,
    tie_word_embeddings=True,
    max_position_embeddings=512,
    dtype="bfloat16",
)
OVERFLOW = 0.01
PROMPT_TOKENS, NEW_TOKENS = 32, 64
CONCURRENT = (1, 8)
ROUNDS = 3
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def save_models(folder: Path, bits: int) -> int:
    """Save the model as `bf16` and as `babai` below the folder; returns its parameter count."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).bfloat16()
    model.save_pretrained(folder / "bf16")
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            for tensor_name, tensor in round_to_nearest(weight, bits).tensors().items():
                tensors[name.removesuffix("weight") + tensor_name] = tensor
        elif name != "lm_head.weight":
            tensors[name] = weight
    (folder / "babai").mkdir()
    save_file(tensors, folder / "babai" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "bf16" / "config.json").read_text())
    config["quantization_config"] = CheckpointConfig("ssqr", bits).to_dict()
    (folder / "babai" / "config.json").write_text(json.dumps(config))
    return model.num_parameters()


def round_to_nearest(weight: torch.Tensor, bits: int) -> SSQR:
    largest = weight.float().abs().quantile(1 - OVERFLOW, dim=1, keepdim=True)
    scales = (largest / (integer_range(bits)[1] + 0.5)).bfloat16()
    return SSQR.encode(LatticeWeight((weight.float() / scales.float()).round().short(), scales), bits)


@contextmanager
def serve(model: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--max-model-len", "512", "--gpu-memory-utilization", "0.2"]
    command += ["--skip-tokenizer-init", "--no-enable-prefix-caching"]
    log = model.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **ENVIRONMENT})
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server stopped:\n{log.read_text()[-3000:]}")
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)
    finally:
        process.terminate()
        process.wait()


def tokens_per_second(client: openai.OpenAI, concurrent: int) -> float:
    """Of the fastest round."""

    def ask(seed: int) -> None:
        prompt = torch.randint(CONFIG.vocab_size, (PROMPT_TOKENS,)).tolist()
        extra = {"ignore_eos": True, "detokenize": False}
        client.completions.create(model="model", prompt=prompt, max_tokens=NEW_TOKENS, seed=seed, extra_body=extra)

    best = 0.0
    with ThreadPoolExecutor(concurrent) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(ask, range(concurrent)))
            best = max(best, concurrent * NEW_TOKENS / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=BIT_WIDTHS, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server stops, too
    speeds: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_models(Path(folder), options.bits)
        for name in ("bf16", "babai"):
            with serve(Path(folder) / name) as client:
                tokens_per_second(client, max(CONCURRENT))  # warm up
                speeds[name] = {concurrent: tokens_per_second(client, concurrent) for concurrent in CONCURRENT}
    table = Table(title=f"tokens per second, {parameters / 1e6:.0f}M parameters")
    for heading in ("concurrent requests", "bf16", f"babai {options.bits} bits", "speed-up"):
        table.add_column(heading, justify="right")
    for concurrent in CONCURRENT:
        bf16, babai = speeds["bf16"][concurrent], speeds["babai"][concurrent]
        table.add_row(str(concurrent), f"{bf16:.1f}", f"{babai:.1f}", f"{babai / bf16:.2f}×")
    Console().print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"bits": options.bits, "parameters": parameters, "speeds": speeds}, indent=1)
        )


if __name__ == "__main__":
    main()
