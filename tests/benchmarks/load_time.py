"""Load time and memory of HPTQ: `python tests/benchmarks/load_time.py [--rate BITS]`.

Made-up matrices of a model of 8 billion weights go through what the plugin does with a stored linear: `packed` decodes
and splits into dense + sparse, `coded` decodes to find where segments begin. This and reading the blob from a disk of
1 GB/s are compared with reading the same matrices in bfloat16 from that disk. Making the device layout comes on top:
it happens on the device, and SSQR checkpoints take it as well. Compiling is not counted. Sizes are those of the tensors
on a GPU.
"""

import statistics
from functools import partial
from typing import Any

import torch
from harness import command_line, report, table, time_rounds

from vllm_babai.format import HPTQ, LatticeWeight, LayerScheme
from vllm_babai.ops.coded import CodedTensors, coded_tensors
from vllm_babai.plugin.readers import HPTQCodedReader, HPTQPackedReader
from vllm_babai.plugin.readers.reader import StoredLinear, Window
from vllm_babai.plugin.residency import PackedWeight
from vllm_babai.triton_kernels import device_layout

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
CPU = torch.device("cpu")
DISK = 1e9  # bytes per second
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


def load_packed(linear: StoredLinear) -> PackedWeight:
    reader = HPTQPackedReader(LayerScheme(None))
    return reader.stack(reader.read(linear))


def load_coded(linear: StoredLinear) -> CodedTensors:
    reader = HPTQCodedReader(LayerScheme(None))
    weight = reader.stack(reader.read(linear))
    return coded_tensors(weight.matrix, weight.scales, CPU)


def measure(rows: int, columns: int, rate: float, rounds: int) -> list[dict[str, Any]]:
    linear = stored_linear(rows, columns, rate)
    bf16 = 2 * rows * columns
    on_disk = sum(tensor.nbytes for tensor in linear.tensors.values())
    packed, streams = load_packed(linear), load_coded(linear)
    layout = device_layout(packed.qweight, packed.scales, packed.overflow, packed.bits, columns, CPU)
    times = time_rounds({"packed": partial(load_packed, linear), "coded": partial(load_coded, linear)}, rounds)
    results: list[dict[str, Any]] = []
    for residency, held in (("packed", layout), ("coded", streams)):
        wall, cpu = statistics.median(times[residency].wall), statistics.median(times[residency].cpu)
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
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--rate", type=float, default=3.125, help="bits per weight")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = [result for shape in SHAPES for result in measure(*shape, options.rate, options.rounds)]
    title = f"{options.rate} bits per weight; time and bytes are over those of bf16"
    drawn = table(title, ("matrix", "residency", *COLUMNS), left=2)
    for row in results:
        drawn.add_row(
            "×".join(map(str, row["shape"])), row["residency"], *(f"{row[key]:.3f}" for key in COLUMNS.values())
        )
    report(results, [drawn], options.json)


if __name__ == "__main__":
    main()
