"""Size and speed of the HPTQ codec: `python tests/benchmarks/codec.py [--model FOLDER]`.

Sizes are whole blobs (header, tables, classes, tile index, states) in bits per weight, beside the zeroth-order entropy
and what a Huffman code of the whole matrix would take without its table. Speeds are of one core, in CPU time; compiling
is not counted. Size and speed of made-up matrices; with `--model` sizes of a checkpoint's linears, too.
"""

import heapq
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Median, command_line, report, table, time_rounds
from safetensors import safe_open
from torch import Tensor

from vllm_babai.format.entropy.hptq import decode_integers as decode_coded
from vllm_babai.format.entropy.hptq import encode_integers, predicted_bytes, read_blob

RATES = (2.0, 3.0, 4.0)
SIZES = ("entropy", "huffman", "coded", "predicted")
TASKS = ("encode", "decode", "predict")


def symbol_counts(integers: Tensor) -> np.ndarray:
    return np.unique(integers.numpy(), return_counts=True)[1]


def entropy(integers: Tensor) -> float:
    share = symbol_counts(integers) / integers.numel()
    return float(-(share * np.log2(share)).sum())


def huffman(integers: Tensor) -> float:
    """Bits per weight of a Huffman code without its table: every merge adds its weight once."""
    serial = count()
    heap = [(int(weight), next(serial)) for weight in symbol_counts(integers)]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        bits += merged
        heapq.heappush(heap, (merged, next(serial)))
    return bits / integers.numel()


def rounded(weight: Tensor, rate: float) -> Tensor:
    """Weight rounded with the one step that gives integers of this entropy."""
    low, high = 1e-3, 1e3
    for _ in range(30):
        step = (low * high) ** 0.5
        integers = torch.round(weight / (step * weight.std())).clamp(-32767, 32767).short()
        reached = entropy(integers)
        if abs(reached - rate) < 1e-3:
            break
        low, high = (step, high) if reached > rate else (low, step)
    return integers


def size(name: str, integers: Tensor) -> dict[str, Any]:
    weights = integers.numel()
    return {
        "name": name,
        "shape": list(integers.shape),
        "weights": weights,
        "entropy": entropy(integers),
        "huffman": huffman(integers),
        "coded": 8 * len(encode_integers(integers, 0)) / weights,
        "predicted": 8 * predicted_bytes(integers) / weights,
    }


def speed(name: str, integers: Tensor, rounds: int) -> dict[str, Any]:
    """Million weights per second and core: the median over rounds, and its quartiles."""
    blob = encode_integers(integers, 0)
    times = time_rounds(
        {
            "encode": lambda: encode_integers(integers, 0),
            "decode": lambda: decode_coded(read_blob(blob)),
            "predict": lambda: predicted_bytes(integers),
        },
        rounds,
    )
    millions = integers.numel() / 1e6
    return {"name": name} | {task: Median.of([millions / cpu for cpu in times[task].cpu]) for task in TASKS}


def synthetic() -> Iterator[tuple[str, Tensor]]:
    """Gaussians, large and small, of one spread and of spreads that differ by row and column."""
    generator = torch.Generator().manual_seed(0)
    for rate in RATES:
        for rows, columns in ((4096, 4096), (128, 256), (256, 256), (768, 256)):
            weight = torch.randn(rows, columns, generator=generator)
            yield f"gaussian {rate}", rounded(weight, rate)
        spread = torch.exp2(0.4 * torch.randn(4096, 1, generator=generator))
        spread = spread * torch.exp2(0.4 * torch.randn(1, 4096, generator=generator))
        yield f"uneven {rate}", rounded(torch.randn(4096, 4096, generator=generator) * spread, rate)


def linears(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The linears of a checkpoint's decoder layers, rounded."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if ".layers." in name and name.endswith("_proj.weight")]  # noqa: SIM118
            for rate in RATES:
                for name in names:
                    yield f"{name.removesuffix('.weight')} {rate}", rounded(file.get_tensor(name).float(), rate)


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] * row["weights"] for row in rows) / sum(row["weights"] for row in rows)


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--model", type=Path, help="folder of a dense checkpoint whose linears are rounded and coded")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    matrices = list(synthetic())
    sizes = [size(name, integers) for name, integers in matrices]
    speeds = [speed(name, integers, options.rounds) for name, integers in matrices if integers.numel() >= 1 << 24]
    bits = table("bits per weight", ("matrix, rate", *SIZES))
    for row in sizes:
        shape = "×".join(map(str, row["shape"]))
        bits.add_row(f"{row['name']} {shape}", *(f"{row[key]:.4f}" for key in SIZES))
    if options.model:
        real = [size(name, integers) for name, integers in linears(options.model)]
        for rate in RATES:
            rows = [row for row in real if row["name"].endswith(f" {rate}")]
            bits.add_row(
                f"{options.model.name}, {len(rows)} linears {rate}", *(f"{mean(rows, key):.4f}" for key in SIZES)
            )
        sizes += real
    fast = table("million weights per second and core", ("matrix, rate", *TASKS))
    for row in speeds:
        fast.add_row(row["name"], *(row[task].text(0) for task in TASKS))
    report({"sizes": sizes, "speeds": speeds}, [bits, fast], options.json)


if __name__ == "__main__":
    main()
