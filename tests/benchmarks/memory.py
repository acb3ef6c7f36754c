"""Peak memory of quantization against one decoder block and the calibration activations.

    python tests/benchmarks/memory.py [--hidden 512] [--blocks 24] [--experts 64] [--samples 32] [--sequence-length 512]

A Llama with random weights is made on the spot, or a Qwen3-MoE whose tokens go to two of `--experts` each. In each
round a process of its own quantizes a tiny model first, so that imports, compiled code and thread pools are there
before the measurement, and then this one; the rise of its peak is the figure.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import DEMO, alternate, command_line, report, table

from vllm_babai import offline

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = command_line(__doc__, rounds=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--experts", type=int, default=0, help="in every block, each of as many features as --hidden")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the other process: folder with models
    options = parser.parse_args()
    if options.measure:
        print(rise_of_peak(options.measure, options.samples, options.sequence_length))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "tiny", hidden=64, blocks=1, experts=min(options.experts, 2))
        block, model = save_model(folder / "model", options.hidden, options.blocks, options.experts)
        write_text(folder / "text.txt", options.samples * options.sequence_length)
        peaks = alternate({"peak": lambda: measured_rise(folder)}, options.rounds)["peak"]
    activations = 4 * options.samples * options.sequence_length * options.hidden
    figures = {
        "model_bytes": model,
        "block_bytes": block,
        "activation_bytes": activations,
        "peak_bytes": int(statistics.median(peaks)),
    }
    drawn = table("memory to quantize", ("of", "MiB"))
    for label, value in figures.items():
        drawn.add_row(label.removesuffix("_bytes"), f"{value / 2**20:.1f}")
    drawn.add_row("peak / (block + activation)", f"{figures['peak_bytes'] / (block + activations):.2f}")
    report(figures, [drawn], options.json)


def measured_rise(folder: Path) -> int:
    """`rise_of_peak` in a process of its own, with the options of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for path in ("out", "tiny-out"):
        shutil.rmtree(folder / path)
    return int(output.split()[-1])


def save_model(folder: Path, hidden: int, blocks: int, experts: int = 0) -> tuple[int, int]:
    """Save a random Llama, or a Qwen3-MoE; bytes of a block and of all weights in float32, in which they are computed
    with.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig  # takes seconds; --help needs none

    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    }
    routing = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    config = Qwen3MoeConfig(**sizes, **routing) if experts else LlamaConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        (folder / file).write_bytes((DEMO / "stdlib-6m" / file).read_bytes())
    return 4 * sum(p.numel() for p in model.model.layers[0].parameters()), 4 * model.num_parameters()


def write_text(path: Path, tokens: int) -> None:
    """More text than `tokens` tokens."""
    path.write_text("".join(f"def function_{i}(a, b):\n    return a * {i} + b\n" for i in range(tokens // 4)))


def rise_of_peak(folder: Path, samples: int, length: int) -> int:
    """Bytes by which this process's peak memory rises when it quantizes a model after a tiny one."""
    text = str(folder / "text.txt")
    tiny = offline.QuantizeOptions(calibration=text, samples=2, sequence_length=32)
    offline.quantize(folder / "tiny", folder / "tiny-out", tiny)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = offline.QuantizeOptions(calibration=text, samples=samples, sequence_length=length)
    offline.quantize(folder / "model", folder / "out", options)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    main()
