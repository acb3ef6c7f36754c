"""Results and costs of the kernels on a GPU: `python tests/benchmarks/gpu_checks.py CHECK [--json FILE]`.

    machine     what Triton and vLLM need of the machine
    products    every width, group size and dtype at 1 to 8192 tokens, against the product with the dequantized weight
    coded       HPTQ that stays coded: values and strides
    replays     many replays of one graph give the same bits, and leave the arrival counters zero
    sanitized   few products of awkward shapes, to be run under compute-sanitizer
    profile     launches, device time and host time of a product

Exits with status 1 when a result is wrong. `gpu_day.py` runs them. With `--small` sizes are those for Triton's
interpreter (`TRITON_INTERPRET=1`), which has neither replays nor a profile.
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import command_line, machine
from torch import Tensor

from vllm_babai.files import write_atomically
from vllm_babai.format import BIT_WIDTHS, LatticeWeight
from vllm_babai.format.entropy.hptq import encode_integers, read_blob
from vllm_babai.format.entropy.segments import cut_segments
from vllm_babai.ops.coded import coded_tensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels import matmul, multiply_coded
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.dequantize import dequantize
from vllm_babai.triton_kernels.layout import Geometry
from vllm_babai.triton_kernels.tuning.bench import random_layout

ERROR_LIMIT = 1.5  # times the error of a bf16 product of the dequantized weight
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OVERFLOW = 0.01


@dataclass(frozen=True)
class Sizes:
    """What is checked. shapes: output × input features; their groups: of this many columns, 0 for a scale per row."""

    shapes: tuple[tuple[int, int], ...]
    group_sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    coded_tokens: tuple[int, ...]
    coded_shape: tuple[int, int]


FULL = Sizes(
    ((4096, 4096), (1001, 1792)),
    (0, 32, 128),
    (1, 2, 8, 9, 16, 17, 33, 64, 65, 128, 257, 600, 2048, 8192),
    (0, 1, 2, 3, 4, 5, 64),
    (768, 1024),
)
SMALL = Sizes(((33, 64),), (0, 32), (1, 3), (1,), (3, 32))


@dataclass(frozen=True)
class Check:
    """A product that was checked. error: in units of the error of a bf16 product; `right` if that is small."""

    what: str
    tokens: int
    error: float
    right: bool


def error_of(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Error of y = x Wᵀ in units of that of the same product in bf16; weight: fp32 [rows, columns]."""
    exact = x.double() @ weight.double().t()
    rounded = (x.bfloat16() @ weight.bfloat16().t()).double()
    return float((y.double() - exact).norm() / ((rounded - exact).norm() + 1e-30))


def products(bits: int, sizes: Sizes, device: torch.device) -> list[Check]:
    """All products of one width. Results have to be contiguous, in x's dtype."""
    checks = []
    for (rows, columns), group_size in product(sizes.shapes, sizes.group_sizes):
        geometry = Geometry(bits, columns, rows)
        layout = random_layout(geometry, OVERFLOW, device, groups=columns // group_size if group_size else 1)
        weight = dequantize(layout, geometry, torch.float32, Target.of(device).backend)
        for dtype, m in product(DTYPES, sizes.tokens):
            x = torch.randn(m, columns, dtype=dtype, device=device)
            y = matmul(x, *layout, bits, rows)
            error = error_of(y, x, weight)
            right = error <= ERROR_LIMIT and y.dtype == dtype and y.is_contiguous()
            what = f"{bits} bits, {rows} × {columns}, groups of {group_size or columns}, {dtype}"
            checks.append(Check(what, m, error, right))
    return checks


def check_products(sizes: Sizes, device: torch.device) -> list[Check]:
    """Every width in a process of its own, since compiling takes most of the time; in one where sizes are small."""
    one = partial(products, sizes=sizes, device=device)
    if sizes is SMALL:
        return [check for bits in BIT_WIDTHS for check in one(bits)]
    with ProcessPoolExecutor(len(BIT_WIDTHS), multiprocessing.get_context("spawn")) as pool:
        return [check for checks in pool.map(one, BIT_WIDTHS) for check in checks]


def check_coded(sizes: Sizes, device: torch.device) -> list[Check]:
    """The kernels that decode, by tokens and groups."""
    checks = []
    (rows, columns), generator = sizes.coded_shape, torch.Generator().manual_seed(0)
    integers = torch.randn(rows, columns, generator=generator).mul(2.5).round().short()
    segments = cut_segments(read_blob(encode_integers(integers, 0)), slice(0, rows), slice(0, columns))
    for groups in (1, columns // 32):
        weight = LatticeWeight(integers, torch.rand(rows, groups, generator=generator).bfloat16())
        coded = coded_tensors(segments, weight.scales, device)
        dense = weight.dequantize().to(device)
        for m, dtype in product(sizes.coded_tokens, DTYPES):
            x = torch.randn(m, columns, dtype=dtype, device=device)
            y = multiply_coded(x, coded)
            error = error_of(y, x, dense) if m else 0.0
            right = error <= ERROR_LIMIT and y.stride() == x.new_empty(m, rows).stride()
            checks.append(Check(f"coded, {groups} groups, {dtype}", m, error, right))
    return checks


def check_replays(sizes: Sizes, device: torch.device, replays: int = 100_000, glance: int = 1000) -> list[Check]:
    """A graph replayed again and again; the result is compared every `glance` replays."""
    checks = []
    for m in (1, 16, 64):
        geometry = Geometry(4, 4096, 4096)
        layout = random_layout(geometry, OVERFLOW, device)
        x = torch.randn(m, 4096, dtype=torch.bfloat16, device=device)
        first = matmul(x, *layout, 4, 4096)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = matmul(x, *layout, 4, 4096)
        differing = 0
        for _ in range(replays // glance):
            for _ in range(glance):
                graph.replay()
            differing += not torch.equal(y, first)
        counting = int(layout.offsets[: geometry.counters].count_nonzero())
        checks.append(Check(f"{replays} replays, {counting} counters left", m, differing, differing + counting == 0))
    return checks


def check_sanitized(sizes: Sizes, device: torch.device) -> list[Check]:
    """Awkward shapes and the smallest tokens of every path; what the sanitizer finds is its own exit status."""
    few = Sizes(((1001, 1792),), (0, 128), (1, 16, 64, 65, 257), (1,), (64, 96))
    chosen, widths = (sizes, (4,)) if sizes is SMALL else (few, (3, 4))
    return [check for bits in widths for check in products(bits, chosen, device)] + check_coded(chosen, device)


def profile(device: torch.device, calls: int = 200) -> Iterator[dict[str, Any]]:
    """Launches and microseconds of a product, in eager mode: of the device by kernel, of the host per call."""
    for (rows, columns), m in product(((4096, 4096), (4096, 14336), (28672, 4096)), (1, 16, 64, 256, 1024)):
        layout: DeviceLayout = random_layout(Geometry(4, columns, rows), OVERFLOW, device)
        call = partial(matmul, torch.randn(m, columns, dtype=torch.bfloat16, device=device), *layout, 4, rows)
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        host = (time.perf_counter() - started) / calls  # the device may be behind, and then the host waits for it
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        kernels = {event.key: event.device_time_total for event in profiled.key_averages() if event.device_time_total}
        yield {"shape": (rows, columns), "tokens": m, "host": 1e6 * host, "launches": len(kernels), "device": kernels}


def check_machine() -> dict[str, Any]:
    """Whether what Triton and vLLM need is there; every line that is missing counts as a failure."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return {
        "GPUs": gpus.splitlines(),
        "C compiler": shutil.which("gcc") or shutil.which("clang"),
        "Python.h": str(header) if header.exists() else None,
        "compute-sanitizer": shutil.which("compute-sanitizer") or "none: two steps are left out",
        "torch": torch.version.cuda or "built without CUDA",
    }


CHECKS: dict[str, Callable[[Sizes, torch.device], list[Check]]] = {
    "products": check_products,
    "coded": check_coded,
    "replays": check_replays,
    "sanitized": check_sanitized,
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("check", choices=("machine", "profile", *CHECKS))
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--small", action="store_true", help="sizes for Triton's interpreter, on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.small else "cuda")
    torch.manual_seed(0)
    if options.check == "machine":
        found: Any = check_machine()
        wrong = [f"no {what}" for what, value in found.items() if not value]
    elif options.check == "profile":
        found, wrong = list(profile(device)), []
    else:
        checks = CHECKS[options.check](SMALL if options.small else FULL, device)
        found = [asdict(check) for check in checks]
        wrong = [f"{check.what}, {check.tokens} tokens: {check.error:.2f}" for check in checks if not check.right]
        print(
            f"{len(checks)} checks, the largest error is {max(check.error for check in checks):.2f} times that of bf16"
        )
    if options.json:
        write_atomically(options.json, json.dumps({"machine": machine(), "results": found}, indent=1) + "\n")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
