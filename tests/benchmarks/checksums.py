"""Checksums of what the quantizer makes of the bundled model: they show that a change of the code changes no byte.

    python tests/benchmarks/checksums.py > before.txt     # on the commit before
    python tests/benchmarks/checksums.py | diff before.txt -

A checksum covers every file but the report, which holds times. Compare runs of one machine with one number of threads:
sums of floating point numbers in another order may round an integer otherwise.
"""

import hashlib
import json
import runpy
import tempfile
from pathlib import Path

import torch
from harness import DEMO, command_line

from vllm_babai import offline

REPORT = "babai_report.json"
RUNS = {
    "ssqr-2": {"bits": 2},
    "ssqr-3": {"bits": 3},
    "ssqr-4": {"bits": 4},
    "ssqr-target-3.2": {"target_bits": 3.2},
    "hptq-2.125": {"format": "hptq", "rate": 2.125},
    "hptq-3.125": {"format": "hptq", "rate": 3.125},
}


def checksum(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files of a checkpoint, without its report."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != REPORT:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def main() -> None:
    """Print a line for each run."""
    command_line(__doc__).parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        text = runpy.run_path(str(DEMO / "text.py"))
        calibration = Path(scratch) / "calibration.jsonl"
        text["write_jsonl"](calibration, text["CALIBRATION_MODULES"])
        for name, how in RUNS.items():
            options = offline.QuantizeOptions(calibration=str(calibration), samples=32, sequence_length=256, **how)
            folder = offline.quantize(DEMO / "stdlib-6m", Path(scratch) / name, options)
            bits = json.loads((folder / REPORT).read_text())["bits_per_weight"]
            print(f"{name:16} {bits:.6f} {checksum(folder)}", flush=True)


if __name__ == "__main__":
    main()
