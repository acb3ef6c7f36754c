"""`make demo`: quantize the bundled model, serve it with vLLM, talk to it over the OpenAI API, and show what it cost.

Runs in the root of the repository. Everything it makes stays in build/demo: the model can be served again from there.
`make demo MODEL=…` does the same with a folder, or a name on the hub.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from openai import BadRequestError, OpenAI
from rich.console import Console
from rich.table import Table
from server import ServerError, serving
from text import CALIBRATION_MODULES, EVALUATION_MODULES, write_jsonl

BUNDLED = "deploy/demo/stdlib-6m"
WORK = Path("build/demo")
BABAI = Path(sys.executable).with_name("babai")

COMPLETION_PROMPT = "import os\nimport sys\n\ndef walk(path):\n    for name in"
CHAT_MESSAGE = 'class Queue:\n    """A first-in, first-out queue."""\n\n    def __init__(self'
# Greedy, but kept from going round in circles as so small a model does.
SAMPLING = {"temperature": 0, "frequency_penalty": 0.8, "max_tokens": 80}

console = Console(highlight=False, soft_wrap=True)


def babai(*arguments: str) -> None:
    """Show a `babai` command and run it."""
    console.print(f"[bold]$ babai {shlex.join(arguments)}[/bold]")
    subprocess.run([BABAI, *arguments], check=True)


def babai_json(*arguments: str) -> dict:
    """Show a `babai` command, run it with --json, and give what it printed."""
    console.print(f"[bold]$ babai {shlex.join(arguments)}[/bold]")
    command = [BABAI, *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def quantize(model: str, quantized: Path, calibration: Path) -> None:
    """Quantize a model to 4 bits."""
    babai(
        *("quantize", model, str(quantized), "--format", "ssqr", "--bits", "4", "--overwrite"),
        *("--calibration", str(calibration), "--samples", "64", "--sequence-length", "512"),
    )


def talk(base_url: str, name: str) -> None:
    """Send one completion and one streaming chat request, and print the answers as they come. name: of the model."""
    client = OpenAI(base_url=base_url, api_key="none", max_retries=0)

    console.rule("completion")
    answer = client.completions.create(model=name, prompt=COMPLETION_PROMPT, **SAMPLING)
    console.print(COMPLETION_PROMPT, style="dim", end="", markup=False)
    console.print(answer.choices[0].text, markup=False)

    console.rule("chat, streamed")
    console.print(CHAT_MESSAGE, style="dim", end="", markup=False)
    messages = [{"role": "user", "content": CHAT_MESSAGE}]
    try:
        for chunk in client.chat.completions.create(model=name, messages=messages, stream=True, **SAMPLING):
            console.print(chunk.choices[0].delta.content or "", end="", markup=False)
    except BadRequestError as error:  # a model without a chat template
        console.print(f"no chat with this model: {error}", markup=False)
    console.print()
    console.rule()


def print_table(model: str, quantized: Path, evaluation: Path) -> None:
    """Measure both models and print how they compare."""
    measured = babai_json(
        *("eval", str(quantized), "--against", model),
        *("--data", str(evaluation), "--window", "512", "--samples", "160"),
    )
    stored = babai_json("inspect", str(quantized))

    table = Table("model", "format", "bits per weight", "checkpoint", "perplexity")
    original_bytes = json.loads((quantized / "babai_report.json").read_text())["base"]["bytes"]
    original_perplexity = measured["comparison"]["original_perplexity"]
    table.add_row("original", "bf16", "16", megabytes(original_bytes), f"{original_perplexity:.3f}")
    bits, size = f"{stored['bits_per_weight']:.3f}", megabytes(stored["checkpoint_bytes"])
    table.add_row("quantized", "babai SSQR, 4 bits", bits, size, f"{measured['perplexity']:.3f}")
    console.print(table)
    console.print("Bits per weight: all that the quantized layers take on disk. Embeddings and norms stay in bf16.")
    console.print(f"To serve it yourself: .venv/bin/vllm serve {quantized} --quantization babai")


def megabytes(size: int) -> str:
    """A number of bytes, to be read."""
    return f"{size / 1e6:.2f} MB"


def demonstrate(model: str) -> None:
    """All steps, one after the other; when serving fails, show the end of the server's log."""
    WORK.mkdir(parents=True, exist_ok=True)
    name = Path(model).name
    quantized = WORK / f"{name}-babai-4bit"
    calibration, evaluation, log = WORK / "calibration.jsonl", WORK / "evaluation.jsonl", WORK / "server.log"
    write_jsonl(calibration, CALIBRATION_MODULES)
    write_jsonl(evaluation, EVALUATION_MODULES)

    quantize(model, quantized, calibration)
    console.print(f"[bold]$ vllm serve {quantized} --quantization babai[/bold]    (its log: {log})")
    try:
        with serving(quantized, name, log) as base_url:
            talk(base_url, name)
    except Exception:
        console.print(f"The end of {log}:", *log.read_text(errors="replace").splitlines()[-40:], sep="\n", markup=False)
        raise
    print_table(model, quantized, evaluation)


def main() -> None:
    """Run the demonstration; ends with status 1 and a short message when a step fails or is interrupted."""
    # So small a model gains nothing from more threads, and on a busy machine they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends like Ctrl-C: through every `finally`
    try:
        demonstrate(sys.argv[1] if len(sys.argv) > 1 else BUNDLED)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is left running")
    except (ServerError, subprocess.CalledProcessError) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
