"""Tokens per second on the CPU: `python tests/benchmarks/cpu_serving.py [--bits N]`.

Makes a random Llama of 450M parameters and lets the `openai` client ask for completions at 1 and at 8 concurrent
requests. In each round `vllm serve` runs twice, one after the other: with the model in bfloat16, and quantized with 1%
overflow. A round takes one to two minutes.
"""

import json
import signal
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Median, alternate, command_line, ratio, report, table
from safetensors.torch import save_file
from server import Request, serve, tokens_per_second

from vllm_babai.format import BIT_WIDTHS, SSQR, CheckpointConfig, LatticeWeight, integer_range

CONFIG: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 4608,
    "num_hidden_layers": 16,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
OVERFLOW = 0.01
REQUEST = Request(CONFIG["vocab_size"], prompt_tokens=32, new_tokens=64)
CONCURRENT = (1, 8)
REPETITIONS = 3  # of every measurement while a server runs
OPTIONS = ("--max-model-len", "512", "--gpu-memory-utilization", "0.2", "--skip-tokenizer-init")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def save_models(folder: Path, bits: int) -> int:
    """Save the model as `bf16` and as `babai` below the folder; returns its parameter count."""
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds; --help needs none

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16()
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


def serve_and_ask(model: Path) -> dict[int, float]:
    """Tokens per second by number of concurrent requests, of one server: the median of a few repetitions."""
    with serve(model, OPTIONS, ENVIRONMENT) as client:
        tokens_per_second(client, max(CONCURRENT), REQUEST)  # warm up
        repeated = alternate({n: partial(tokens_per_second, client, n, REQUEST) for n in CONCURRENT}, REPETITIONS)
    return {concurrent: statistics.median(speeds) for concurrent, speeds in repeated.items()}


def main() -> None:
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--bits", type=int, choices=BIT_WIDTHS, default=4)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server stops, too
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_models(Path(folder), options.bits)
        models = {name: partial(serve_and_ask, Path(folder) / name) for name in ("bf16", "babai")}
        rounds = alternate(models, options.rounds)
    results = {}
    headings = ("concurrent requests", "bf16", f"babai {options.bits} bits", "speed-up")
    drawn = table(f"tokens per second, {parameters / 1e6:.0f}M parameters", headings, left=0)
    for concurrent in CONCURRENT:
        bf16, babai = ([speeds[concurrent] for speeds in rounds[name]] for name in ("bf16", "babai"))
        speedup = ratio(babai, bf16)
        drawn.add_row(str(concurrent), Median.of(bf16).text(1), Median.of(babai).text(1), f"{speedup.text()}×")
        results[concurrent] = {"bf16": Median.of(bf16), "babai": Median.of(babai), "speedup": speedup}
    report({"bits": options.bits, "parameters": parameters, "speeds": results}, [drawn], options.json)


if __name__ == "__main__":
    main()
