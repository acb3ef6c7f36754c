"""What it takes to quantize on a GPU: `python tests/benchmarks/gpu_quantize.py FOLDER [--hidden 4096] [--blocks 1]`.

A Llama with random weights is quantized by the command with its defaults; meanwhile its memory, threads and disk are
watched. Minutes for models of 8 and 70 billion weights follow by the number of weights: the start counts as if every
block had one, and larger linears take somewhat longer a weight. Writes `quantize.json` there.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from harness import command_line, machine
from memory import save_model, write_text

from vllm_babai.files import write_atomically

SAMPLES, LENGTH = 128, 2048  # the command's defaults
LINEARS = {"8B": 6.98e9, "70B": 68.5e9}  # weights of all linears in decoder blocks, of Llama-3


def watch(process: subprocess.Popen, folder: Path) -> dict[str, float]:
    """Peaks of the host while the process and its children run: bytes of memory, threads, bytes below the folder."""
    peaks = {"memory": 0.0, "threads": 0.0, "disk": 0.0}
    while process.poll() is None:
        memory = threads = 0
        try:
            one = psutil.Process(process.pid)
            for member in (one, *one.children(recursive=True)):
                memory += member.memory_info().rss
                threads += member.num_threads()
        except psutil.NoSuchProcess:
            pass
        disk = sum(path.stat().st_size for path in list(folder.rglob("*")) if path.is_file())
        for name, value in (("memory", memory), ("threads", threads), ("disk", disk)):
            peaks[name] = max(peaks[name], value)
        time.sleep(0.5)
    return peaks


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    folder = options.folder / "quantize"
    shutil.rmtree(folder, ignore_errors=True)
    block, _ = save_model(folder / "model", options.hidden, options.blocks)
    write_text(folder / "text.txt", SAMPLES * LENGTH)
    command = [sys.executable, "-m", "vllm_babai.offline.cli", "quantize", folder / "model", folder / "out"]
    command += ["--calibration", folder / "text.txt", "--bits", "4", "--device", options.device]
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command)], cwd=folder)
    peaks = watch(process, folder)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"babai quantize ended with status {process.returncode}")
    weights = options.blocks * block / 4  # of float32
    found = {
        "weights": weights,
        "seconds": seconds,
        **peaks,
        "minutes": {name: count / weights * seconds / 60 for name, count in LINEARS.items()},
    }
    shutil.rmtree(folder)
    write_atomically(
        options.folder / "quantize.json", json.dumps({"machine": machine(), "results": found}, indent=1) + "\n"
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
