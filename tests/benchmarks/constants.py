"""What a fitted constant of the quantizer is worth: quantizes the bundled model with several values of it.

    python tests/benchmarks/constants.py RELATIVE_PRICE 0 0.5 1 --format hptq --size 3.125
    python tests/benchmarks/constants.py SPANS "(0.5,)" "(0.5, 0.125)" --size 2
    python tests/benchmarks/constants.py            # the constants, and where each stands

`--size` is bits in SSQR, the rate in HPTQ and bits per weight in the trellis form. One line for each value: bits per
weight; the expected loss in nats per token that the solver ends at (half the sum of the measured errors of all
linears, nearly free of noise, but an expectation); loss and KL divergence as measured on text, with their standard
errors; and seconds. Compare values of one run: the size moves a little with the value, so a value wins where loss is
lower at no more bits. `--calibrate N` and `--windows N` set how much text is used.
"""

import argparse
import ast
import importlib
import json
import runpy
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from harness import DEMO, command_line

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.run_folder import REPORT
from vllm_babai.offline.tools.evaluate import evaluate

CONSTANTS = {
    "scales.ssqr": ("DRAWS", "SPANS", "CANDIDATES", "MOST_BEYOND", "MAX_PASSES", "SHARE_TOLERANCE"),
    "scales.hptq": ("RELATIVE_PRICE", "RATE_TOLERANCE", "GUESSES"),
    "scales.column_steps": ("EXPONENT", "LEAST_GAIN"),
    "solver.expected": ("PROBES",),
    "solver.joint_plane": ("LEAF",),
    "solver.row_geometry": ("ROW_DAMPING",),
    "plan.forecast": ("SAMPLE", "OCTAVES", "PRICES"),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("values", nargs="*", type=ast.literal_eval)
    parser.add_argument("--format", choices=("ssqr", "hptq", "trellis"), default="ssqr")
    parser.add_argument("--size", type=float, default=3)
    parser.add_argument("--calibrate", type=int, default=32, help="sequences of 256 tokens")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens to measure on; 0: do not")
    arguments = parser.parse_args()
    modules = {name: f"vllm_babai.offline.{module}" for module, names in CONSTANTS.items() for name in names}
    if arguments.name is None:
        for name, module in modules.items():
            print(f"{name:16} {module:40} {getattr(importlib.import_module(module), name)}")
        return
    target = f"{modules[arguments.name]}.{arguments.name}"
    with tempfile.TemporaryDirectory() as scratch:
        options = options_for(arguments, Path(scratch))
        print("value              bits     expected loss  measured loss     KL divergence     seconds")
        for value in arguments.values:
            with patch(target, torch.tensor(value) if arguments.name in ("OCTAVES", "PRICES") else value):
                print(f"{value!s:16} {line(options, Path(scratch), arguments.windows)}", flush=True)


def options_for(arguments: argparse.Namespace, scratch: Path) -> QuantizeOptions:
    """Options of all runs; texts go to `scratch`."""
    text = runpy.run_path(str(DEMO / "text.py"))
    for name in ("calibration", "evaluation"):
        text["write_jsonl"](scratch / f"{name}.jsonl", text[f"{name.upper()}_MODULES"])
    sizes = {"ssqr": {"bits": int(arguments.size)}, "hptq": {"rate": arguments.size}}
    size = (sizes | {"trellis": {"target_bits": arguments.size}})[arguments.format]
    return QuantizeOptions(
        format=arguments.format,
        calibration=str(scratch / "calibration.jsonl"),
        samples=arguments.calibrate,
        sequence_length=256,
        **size,
    )


def line(options: QuantizeOptions, scratch: Path, windows: int) -> str:
    """Quantize and measure once."""
    started = time.perf_counter()
    folder = quantize(DEMO / "stdlib-6m", scratch / "out", options, overwrite=True)
    seconds = time.perf_counter() - started
    report = json.loads((folder / REPORT).read_text())
    expected = sum(layer["measured_error"] for layer in report["layers"]) / 2
    measured = " " * 34
    if windows:
        c = evaluate(folder, scratch / "evaluation.jsonl", samples=windows, against=DEMO / "stdlib-6m").comparison
        assert c is not None
        measured = f"{c.loss:.4f} ± {c.loss_error:.4f}   {c.divergence:.4f} ± {c.divergence_error:.4f}"
    return f"{report['bits_per_weight']:.4f}   {expected:.5f}        {measured}   {seconds:.0f}"


if __name__ == "__main__":
    main()
