"""Load time and memory of HPTQ: `python tests/benchmarks/load_time.py [--rate BITS] [--json FILE]`.

Made-up matrices of a model of 8 billion weights go through what the plugin does with a stored linear: `packed` decodes
and splits into dense + sparse, `coded` decodes to find where segments begin. This and reading the blob from a disk of
1 GB/s are compared with reading the same matrices in bfloat16 from that disk. Making the device layout comes on top:
it happens on the device, and SSQR checkpoints take it as well. Compiling is not counted. Sizes are those of the tensors
on a GPU.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_babai.format import HPTQ, LatticeWeight, LayerScheme
from vllm_babai.ops.coded import CodedTensors, coded_tensors
from vllm_babai.plugin.reader import RankWeight, StoredLinear, Window, pack_windows, read_hptq, segment_windows
from vllm_babai.triton_kernels import device_layout

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
CPU = torch.device("cpu")
DISK = 1e9  # bytes per second
REPEATS = 3
COLUMNS = {
    "M weights/s/core": "million weights per second and core",
    "load time": "load time over bf16 at 1 GB/s",
    "cores for 1": "cores for the time of bf16",
    "bytes on disk": "disk over bf16",
    "bytes in memory": "memory over bf16",
}


def stored_linear(rows: int, columns: int, rate: float) -> StoredLinear:
    """Gaussian integers of about this entropy, with one step, spread by row and column as far as a dozen contexts."""
    sigma = 2**rate / (2 * torch.pi * torch.e) ** 0.5
    spread = torch.exp2(0.1 * torch.randn(rows, 1)) * torch.exp2(0.1 * torch.randn(columns))
    integers = torch.randn(rows, columns).mul_(sigma * spread).round_().short()
    stored = HPTQ.encode(LatticeWeight(integers, torch.ones(1, 1).bfloat16()))
    return StoredLinear(stored.tensors(), (rows, columns), [Window(slice(0, rows), slice(0, columns))])


def load_packed(linear: StoredLinear) -> RankWeight:
    return pack_windows(read_hptq(linear, LayerScheme(None)))


def load_coded(linear: StoredLinear) -> CodedTensors:
    weight = segment_windows(read_hptq(linear, LayerScheme(None)))
    return coded_tensors(weight.segments, weight.scales, CPU)


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall time and CPU time of all threads, each the smallest of several runs."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, cpu = zip(*times, strict=True)
    return min(wall), min(cpu)


def measure(rows: int, columns: int, rate: float) -> list[dict[str, Any]]:
    linear = stored_linear(rows, columns, rate)
    bf16 = 2 * rows * columns
    on_disk = sum(tensor.nbytes for tensor in linear.tensors.values())
    packed, streams = load_packed(linear), load_coded(linear)
    layout = device_layout(packed.qweight, packed.scales, packed.overflow, packed.bits, columns, CPU)
    results: list[dict[str, Any]] = []
    for residency, load, held in (("packed", load_packed, layout), ("coded", load_coded, streams)):
        wall, cpu = seconds(lambda load=load: load(linear))
        results.append(
            {
                "residency": residency,
                "shape": [rows, columns],
                "bits": packed.bits if residency == "packed" else None,
                "million weights per second and core": rows * columns / cpu / 1e6,
                "wall seconds": wall,
                "cpu seconds": cpu,
                "load time over bf16 at 1 GB/s": (wall + on_disk / DISK) / (bf16 / DISK),
                "cores for the time of bf16": cpu / ((bf16 - on_disk) / DISK),
                "disk over bf16": on_disk / bf16,
                "memory over bf16": sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) / bf16,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=3.125, help="bits per weight")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results = [result for shape in SHAPES for result in measure(*shape, arguments.rate)]
    print(f"{cores} cores, {arguments.rate} bits; time and bytes are over those of bf16")
    print(f"{'matrix':14} {'residency':10} " + " ".join(f"{heading:>16}" for heading in COLUMNS))
    for row in results:
        rows, columns = row["shape"]
        figures = " ".join(f"{row[key]:16.3f}" for key in COLUMNS.values())
        print(f"{f'{rows}×{columns}':14} {row['residency']:10} {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cores": cores, "matrices": results}, indent=1))


if __name__ == "__main__":
    main()
