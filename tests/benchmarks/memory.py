"""Peak memory of quantization against one decoder block and the calibration activations.

    python tests/benchmarks/memory.py [--hidden 512] [--blocks 24] [--samples 32] [--sequence-length 512] [--json]

A Llama with random weights is made on the spot. Another process quantizes a tiny model first, so that imports, compiled
code and thread pools are there before the measurement, and then this one; the rise of its peak is printed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_babai.offline import QuantizeOptions, quantize

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the other process: folder with models
    arguments = parser.parse_args()
    if arguments.measure:
        print(rise_of_peak(arguments.measure, arguments.samples, arguments.sequence_length))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "tiny", hidden=64, blocks=1)
        block, model = save_model(folder / "model", arguments.hidden, arguments.blocks)
        write_text(folder / "text.txt", arguments.samples * arguments.sequence_length)
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    activations = 4 * arguments.samples * arguments.sequence_length * arguments.hidden
    figures = {
        "model_bytes": model,
        "block_bytes": block,
        "activation_bytes": activations,
        "peak_bytes": int(output.split()[-1]),
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    for label, value in figures.items():
        print(f"{label.removesuffix('_bytes'):>12} {value / 2**20:9.1f} MiB")
    print(f"peak / (block + activations) = {figures['peak_bytes'] / (block + activations):.2f}")


def save_model(folder: Path, hidden: int, blocks: int) -> tuple[int, int]:
    """Save a random Llama; bytes of a block and of all weights in float32, in which they are computed with."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
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
    quantize(folder / "tiny", folder / "tiny-out", QuantizeOptions(calibration=text, samples=2, sequence_length=32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = QuantizeOptions(calibration=text, samples=samples, sequence_length=length)
    quantize(folder / "model", folder / "out", options)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    main()
