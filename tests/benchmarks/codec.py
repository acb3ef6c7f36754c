"""Size and speed of the HPTQ codec: `python tests/benchmarks/codec.py [--model FOLDER] [--json FILE]`.

Sizes are whole blobs (header, tables, classes, tile index, states) in bits per weight, beside the zeroth-order entropy
and what a Huffman code of the whole matrix would take without its table. Speeds are of one core, in CPU time; compiling
is not counted.
"""

import argparse
import heapq
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vllm_babai.format.entropy.hptq import decode_integers as decode_coded
from vllm_babai.format.entropy.hptq import encode_integers, predicted_bytes, read_blob

RATES = (2.0, 3.0, 4.0)
REPEATS = 5


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


def seconds(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def size(name: str, integers: Tensor) -> dict[str, object]:
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


def speed(name: str, integers: Tensor) -> dict[str, object]:
    """Million weights per second and core."""
    blob = encode_integers(integers, 0)
    return {
        "name": name,
        "encode": integers.numel() / seconds(lambda: encode_integers(integers, 0)) / 1e6,
        "predict": integers.numel() / seconds(lambda: predicted_bytes(integers)) / 1e6,
        "decode": integers.numel() / seconds(lambda: decode_coded(read_blob(blob))) / 1e6,
    }


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a dense checkpoint whose linears are rounded and coded")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    matrices = list(synthetic())
    sizes = [size(name, integers) for name, integers in matrices]
    speeds = [speed(name, integers) for name, integers in matrices if integers.numel() >= 1 << 24]
    print(f"{'bits per weight':40} {'entropy':>8} {'Huffman':>8} {'coded':>8} {'predicted':>9}")
    for row in sizes:
        label = f"{row['name']} {row['shape'][0]}×{row['shape'][1]}"
        print(f"{label:40} {row['entropy']:8.4f} {row['huffman']:8.4f} {row['coded']:8.4f} {row['predicted']:9.4f}")
    if arguments.model:
        real = [size(name, integers) for name, integers in linears(arguments.model)]
        for rate in RATES:
            rows = [row for row in real if row["name"].endswith(f" {rate}")]
            figures = " ".join(f"{mean(rows, key):8.4f}" for key in ("entropy", "huffman", "coded", "predicted"))
            print(f"{f'{arguments.model.name}, {len(rows)} linears {rate}':40} {figures}")
        sizes += real
    print(f"\n{'million weights per second and core':40} {'encode':>8} {'decode':>8} {'predict':>8}")
    for row in speeds:
        print(f"{row['name']:40} {row['encode']:8.0f} {row['decode']:8.0f} {row['predict']:8.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"sizes": sizes, "speeds": speeds}, indent=1))


if __name__ == "__main__":
    main()
