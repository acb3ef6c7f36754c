"""Tokens per second of vLLM on a GPU: `python tests/benchmarks/gpu_serving.py FOLDER`.

Models have the shapes of Llama-3-8B and made-up weights (`--load-format dummy`), so nothing is downloaded. vLLM runs as
by default: compiled, with CUDA graphs. One server after the other: bf16, SSQR of 4 and of 3 bits, GPTQ of 4 bits by
Marlin. Writes `serving.json` and `serving.png` after each, and leaves out what that file has.

With `--requantized`: the bundled model is quantized to 4 and then to 3 bits in the same folder, and served compiled;
log probabilities of a prompt must be those in eager mode, although vLLM's cache has the graph of the other checkpoint.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import DEMO, command_line, machine, panels, save_plot
from server import Request, seconds_to_answer, serve

from vllm_babai.files import write_atomically
from vllm_babai.format import CheckpointConfig

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
MODELS = {  # name → quantization_config, in order of value
    "SSQR 4 bits": CheckpointConfig("ssqr", 4).to_dict(),
    "bf16": None,
    "GPTQ-Marlin 4 bits": GPTQ,
    "SSQR 3 bits": CheckpointConfig("ssqr", 3).to_dict(),
}
OPTIONS = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "2048")
SHORT, LONG = Request(LLAMA_8B["vocab_size"], 128, 1), Request(LLAMA_8B["vocab_size"], 128, 257)
MANY, MANY_REQUEST = 64, Request(LLAMA_8B["vocab_size"], 512, 128)
REPETITIONS = 3
PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"
CLOSE = 0.05  # nats: bf16 rounds otherwise in eager mode


def measure(client: Any) -> dict[str, float]:
    """Milliseconds per output token of one request, and tokens per second of 64 at once; medians."""
    for request, concurrent in ((LONG, 1), (MANY_REQUEST, MANY)):  # warm up
        seconds_to_answer(client, concurrent, request)
    alone = [
        (seconds_to_answer(client, 1, LONG) - seconds_to_answer(client, 1, SHORT))
        / (LONG.new_tokens - SHORT.new_tokens)
        for _ in range(REPETITIONS)
    ]
    together = [seconds_to_answer(client, MANY, MANY_REQUEST) for _ in range(REPETITIONS)]
    return {
        "tpot_ms": 1000 * statistics.median(alone),
        "throughput": MANY * MANY_REQUEST.new_tokens / statistics.median(together),
    }


def write_model(folder: Path, quantization: dict[str, Any] | None) -> Path:
    """A folder with nothing but a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA_8B | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Bars: times the speed of bf16 where that was measured, else tokens per second."""
    drawn, (left, right) = panels(2)
    left.bar(list(figures), [1000 / figure["tpot_ms"] for figure in figures.values()])
    left.set(ylabel="tokens per second", title="one request")
    right.bar(list(figures), [figure["throughput"] for figure in figures.values()])
    right.set(ylabel="tokens per second", title=f"{MANY} requests")
    for panel in (left, right):
        panel.tick_params(axis="x", rotation=20)
    save_plot(drawn, path)


def serve_all(folder: Path) -> None:
    """Measure what `serving.json` does not have yet."""
    file = folder / "serving.json"
    figures = json.loads(file.read_text())["results"] if file.exists() else {}
    for name, quantization in MODELS.items():
        if name in figures:
            continue
        model = write_model(folder / "models" / name.replace(" ", "-"), quantization)
        with serve(model, OPTIONS) as client:
            figures[name] = measure(client)
        print(name, figures[name], flush=True)
        write_atomically(file, json.dumps({"machine": machine(), "results": figures}, indent=1) + "\n")
        plot(figures, folder / "serving.png")


def prompt_logprobs(model: Path, options: Iterable[str]) -> list[float]:
    """Log probabilities of the prompt's tokens, of a server with these options."""
    with serve(model, ("--max-model-len", "512", "--gpu-memory-utilization", "0.2", *options)) as client:
        answer = client.completions.create(
            model="model", prompt=PROMPT, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
    return [next(iter(token.values()))["logprob"] for token in answer.choices[0].prompt_logprobs[1:]]


def requantized(folder: Path) -> None:
    """Exits with a message when the compiled model is not the one in the folder."""
    from vllm_babai.offline import QuantizeOptions, quantize

    sys.path.insert(0, str(DEMO))
    from text import CALIBRATION_MODULES, write_jsonl

    write_jsonl(folder / "calibration.jsonl", CALIBRATION_MODULES)
    differences = {}
    for bits in (4, 3):
        text = str(folder / "calibration.jsonl")
        options = QuantizeOptions(bits=bits, calibration=text, samples=16, sequence_length=256)
        model = quantize(DEMO / "stdlib-6m", folder / "requantized", options, overwrite=True)
        compiled, eager = prompt_logprobs(model, ()), prompt_logprobs(model, ("--enforce-eager",))
        differences[bits] = max(abs(one - other) for one, other in zip(compiled, eager, strict=True))
        print(f"{bits} bits: the largest difference of a log probability is {differences[bits]:.4f}", flush=True)
    found = {"machine": machine(), "results": differences}
    write_atomically(folder / "requantized.json", json.dumps(found, indent=1) + "\n")
    if max(differences.values()) > CLOSE:
        sys.exit(f"compiled and eager mode differ by more than {CLOSE}: {differences}")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requantized", action="store_true", help="check instead of measuring, see above")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (requantized if options.requantized else serve_all)(options.folder)


if __name__ == "__main__":
    main()
