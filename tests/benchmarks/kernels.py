"""Check and time the kernels against their peers: `python tests/benchmarks/kernels.py`.

Prints a table, writes `results/<gpu>.json` and `results/<gpu>.png` next to this file after every layer. Times are of
CUDA-graph replays with rotating weights, so that the cache is cold; peers that cannot be imported are left out. Kernels
are timed one after the other: replays of one graph differ little on a GPU that does nothing else.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, command_line, machine, panels, save_plot
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vllm_babai.files import write_atomically
from vllm_babai.format.trellis.code import TILE_COLUMNS, TILE_ROWS
from vllm_babai.format.trellis.window import NO_ROW, TrellisWindow
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels import matmul, multiply_trellis, trellis_layout
from vllm_babai.triton_kernels.configs import Target, file_name
from vllm_babai.triton_kernels.dequantize import dequantize
from vllm_babai.triton_kernels.layout import Geometry
from vllm_babai.triton_kernels.trellis.dequantize import dequantize as dequantize_trellis
from vllm_babai.triton_kernels.tuning.bench import random_layout
from vllm_babai.triton_kernels.tuning.timing import copies_needed, copy_bandwidth, seconds_per_call

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BITS = (2, 3, 4, 5, 8)
TRELLIS_BITS = (2.0, 2.5, 3.0, 4.0)
SHAPES = {  # output × input features
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B output": (4096, 4096),
    "Llama-3-8B gate-up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Qwen3-8B gate-up": (24576, 4096),
    "Qwen3-8B down": (4096, 12288),
}
BASELINE = "cuBLAS bf16"
ERROR_LIMIT = 1.5  # times the error of a bf16 product of the dequantized weight

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """One measured product. bytes: of the weight as the kernel reads it. error: times that of bf16; None for peers."""

    layer: str
    kernel: str
    out_features: int
    in_features: int
    tokens: int
    seconds: float
    bytes: int
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """All figures of one run on one GPU."""

    gpu: str
    copy_bandwidth: float
    timings: list[Timing]

    def speedup(self, timing: Timing) -> float:
        """Times faster than cuBLAS bf16 at the same layer and number of tokens."""
        key = (timing.layer, timing.tokens)
        return next(
            t.seconds / timing.seconds for t in self.timings if t.kernel == BASELINE and (t.layer, t.tokens) == key
        )

    def bandwidth(self, timing: Timing) -> float:
        """Fraction of the copy bandwidth at which the weight was read."""
        return timing.bytes / timing.seconds / self.copy_bandwidth


def cublas(weight: Tensor) -> tuple[Multiply, int]:
    """The product with the bf16 weight, and the weight's bytes; so all peers below."""
    return lambda x: x @ weight.t(), weight.nbytes


def int4_pack(weight: Tensor) -> tuple[Multiply, int]:
    """PyTorch's own int4 kernel, groups of 128."""
    rows, columns = weight.shape
    values = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=weight.device)
    packed = torch._convert_weight_to_int4pack(values, 8)
    scales = torch.ones(columns // 128, rows, 2, dtype=torch.bfloat16, device=weight.device)
    return lambda x: torch._weight_int4pack_mm(x, packed, 128, scales), packed.nbytes + scales.nbytes


def scaled_fp8(weight: Tensor) -> tuple[Multiply, int]:
    """PyTorch's fp8 product; activations are cast in the timed call, as serving does."""
    eight = weight.to(torch.float8_e4m3fn)
    one = torch.ones((), device=weight.device)

    def multiply(x: Tensor) -> Tensor:
        return torch._scaled_mm(x.to(torch.float8_e4m3fn), eight.t(), one, one, out_dtype=torch.bfloat16)

    return multiply, eight.nbytes


def gemlite(weight: Tensor) -> tuple[Multiply, int]:
    """gemlite's 4-bit kernel, groups of 128."""
    from gemlite.core import DType, GemLiteLinearTriton

    rows, columns = weight.shape
    layer = GemLiteLinearTriton(
        4, 128, columns, rows, input_dtype=DType.BF16, output_dtype=DType.BF16, scaled_activations=False
    )
    values = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=weight.device)
    scales = torch.ones(rows, columns // 128, dtype=torch.bfloat16, device=weight.device)
    layer.pack(values, scales, torch.full_like(scales, 8), None)
    return layer.forward, rows * columns // 2 + 2 * scales.nbytes


def marlin(weight: Tensor) -> tuple[Multiply, int]:
    """Marlin as vLLM 0.32 and later call it, 4 bits, groups of 128."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear, marlin_make_empty
    from vllm.scalar_type import scalar_types

    rows, columns = weight.shape
    device = weight.device
    packed = torch.randint(-(2**31), 2**31, (columns // 16, rows * 2), dtype=torch.int32, device=device)
    scales = torch.ones(columns // 128, rows, dtype=torch.bfloat16, device=device)
    no_zeros = marlin_make_empty(device)

    def multiply(x: Tensor) -> Tensor:
        return apply_gptq_marlin_linear(
            x,
            packed,
            scales,
            no_zeros,
            workspace=None,
            wtype=scalar_types.uint4b8,
            output_size_per_partition=rows,
            input_size_per_partition=columns,
        )

    return multiply, packed.nbytes + scales.nbytes


def humming(weight: Tensor) -> tuple[Multiply, int]:
    """Humming, on which vLLM depends from 0.32 on, 4 bits, groups of 128."""
    from vllm.model_executor.layers.quantization.utils.humming import (
        apply_humming_linear,
        get_humming_linear_compute_config,
        prepare_humming_linear_layer_config,
    )
    from vllm.utils.humming import create_humming_locks

    rows, columns = weight.shape
    device = weight.device
    layer = torch.nn.Module()
    layer.output_partition_sizes, layer.input_size_per_partition = [rows], columns
    layer.params_dtype, layer.has_bias = torch.bfloat16, False
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32, device=device)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    scales = torch.ones(rows, columns // 128, dtype=torch.bfloat16, device=device)
    layer.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    quantization = {"quant_method": "humming", "dtype": "int4", "group_size": 128, "has_zero_point": False}
    call = functools.partial(
        apply_humming_linear,
        layer,
        skip_bias_add=True,
        layer_config=prepare_humming_linear_layer_config(layer, quantization),
        compute_config=get_humming_linear_compute_config(),
        locks=create_humming_locks(device),
    )
    return call, packed.nbytes + scales.nbytes


PEERS = {
    BASELINE: cublas,
    "PyTorch int4": int4_pack,
    "PyTorch fp8": scaled_fp8,
    "gemlite int4": gemlite,
    "Marlin int4": marlin,
    "Humming int4": humming,
}


def relative_error(x: Tensor, layout: DeviceLayout, geometry: Geometry) -> float:
    """Error of the product, in units of that of a bf16 product of the dequantized weight."""
    weight = dequantize(layout, geometry, torch.float32, Target.of(x.device).backend)
    exact = x.double() @ weight.double().t()
    ours = matmul(x, *layout, geometry.bits, geometry.out_features) - exact
    return float(ours.norm() / (x @ weight.bfloat16().t() - exact).norm())


def time_babai(
    layer: str, geometry: Geometry, overflow: float, device: torch.device, tokens: tuple[int, ...]
) -> Iterator[Timing]:
    """Time one layer at every number of tokens, after a check of the result."""
    name = f"babai {geometry.bits} bits" + ("" if overflow else ", no overflow")
    layout = random_layout(geometry, overflow, device)
    bytes_each = sum(tensor.nbytes for tensor in layout)
    layouts = [layout, *(DeviceLayout(*(tensor.clone() for tensor in layout)) for _ in range(63))]
    layouts = layouts[: copies_needed(bytes_each, device)]
    for m in tokens:
        x = torch.randn(m, geometry.in_features, dtype=torch.bfloat16, device=device)
        error = relative_error(x, layout, geometry)
        if not error <= ERROR_LIMIT:
            raise SystemExit(f"{name}, {layer}, {m} tokens: error is {error:.2f} times that of bf16")
        calls = [functools.partial(matmul, x, *one, geometry.bits, geometry.out_features) for one in layouts]
        yield Timing(
            layer, name, geometry.out_features, geometry.in_features, m, seconds_per_call(calls), bytes_each, error
        )


def time_trellis(
    layer: str, bits: float, shape: tuple[int, int], device: torch.device, tokens: tuple[int, ...]
) -> Iterator[Timing]:
    """Time a trellis of random words, all of whose tiles have 2 · bits a pair, after a check of the result."""
    blocks, tiles = -(-shape[0] // TILE_ROWS), -(-shape[1] // TILE_COLUMNS)
    generator, name = np.random.default_rng(0), f"babai trellis {bits:g} bits"
    rates = np.full((blocks, tiles), round(2 * bits), np.uint8)
    places = np.arange(blocks * TILE_ROWS, dtype=np.int32).reshape(blocks, TILE_ROWS)
    window = TrellisWindow(
        shape[0],
        rates,
        generator.integers(0, 1 << 32, TILE_ROWS * int(rates.sum()), dtype=np.uint32),
        np.zeros((blocks, TILE_ROWS), np.uint32),
        np.where(places < shape[0], places, NO_ROW).astype(np.int32),
        np.full((blocks, TILE_ROWS), 100, np.float32),
    )
    first = trellis_layout(window, device)
    bytes_each = sum(tensor.nbytes for tensor in first.tensors)
    copies = range(copies_needed(bytes_each, device) - 1)
    layouts = [first, *(first._make([*(t.clone() for t in first.tensors), shape[0]]) for _ in copies)]
    weight = dequantize_trellis(first, shape[1], torch.float32, Target.of(device).backend)
    for m in tokens:
        x = torch.randn(m, shape[1], dtype=torch.bfloat16, device=device)
        exact = x.double() @ weight.double().t()
        bf16_error = (x @ weight.bfloat16().t() - exact).norm()
        error = float((multiply_trellis(x, first) - exact).norm() / bf16_error)
        if not error <= ERROR_LIMIT:
            raise SystemExit(f"{name}, {layer}, {m} tokens: error is {error:.2f} times that of bf16")
        seconds = seconds_per_call([functools.partial(multiply_trellis, x, one) for one in layouts])
        yield Timing(layer, name, *shape, m, seconds, bytes_each, error)


def time_peer(
    layer: str, name: str, shape: tuple[int, int], device: torch.device, tokens: tuple[int, ...], log: Console
) -> Iterator[Timing]:
    """Time a peer at every number of tokens; what it cannot do is reported and left out."""
    weight = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
    try:
        first, bytes_each = PEERS[name](weight)
        multiplies = [first, *(PEERS[name](weight.clone())[0] for _ in range(copies_needed(bytes_each, device) - 1))]
        for m in tokens:
            x = torch.randn(m, shape[1], dtype=torch.bfloat16, device=device)
            seconds = seconds_per_call([functools.partial(multiply, x) for multiply in multiplies])
            yield Timing(layer, name, *shape, m, seconds, bytes_each)
    except Exception as problem:  # peers come from anywhere; none of their failures may end the run
        log.print(f"[yellow]{name} left out at {layer}: {type(problem).__name__}: {problem}")


def measure(
    device: torch.device, log: Console, tokens: tuple[int, ...], bit_widths: tuple[int, ...]
) -> Iterator[Report]:
    """Time everything on this GPU; a report after every layer, of all until then."""
    timings: list[Timing] = []
    bandwidth = copy_bandwidth(device)
    for layer, shape in SHAPES.items():
        for name in PEERS:
            timings += time_peer(layer, name, shape, device, tokens, log)
        for bits in bit_widths:
            geometry = Geometry(bits, shape[1], shape[0])
            timings += time_babai(layer, geometry, 0.01, device, tokens)
            timings += time_babai(layer, geometry, 0.0, device, (1,))
        for rate in TRELLIS_BITS:
            timings += time_trellis(layer, rate, shape, device, tokens)
        log.print(f"timed {layer}")
        yield Report(torch.cuda.get_device_name(device), bandwidth, list(timings))


def table(report: Report) -> Table:
    """Speed-up over cuBLAS bf16, and at one token the fraction of the copy bandwidth."""
    tokens = sorted({timing.tokens for timing in report.timings})
    title = f"{report.gpu}: times cuBLAS bf16; at M = 1 also % of {report.copy_bandwidth / 1e12:.2f} TB/s"
    drawn = Table("layer", "kernel", *(f"M={m}" for m in tokens), title=title)
    rows = dict.fromkeys((timing.layer, timing.kernel) for timing in report.timings)
    for layer, kernel in rows:
        cells = dict.fromkeys(tokens, "")
        for timing in report.timings:
            if (timing.layer, timing.kernel) == (layer, kernel):
                share = f" {100 * report.bandwidth(timing):.0f}%" if timing.tokens == 1 else ""
                cells[timing.tokens] = f"{report.speedup(timing):.2f}{share}"
        drawn.add_row(layer, kernel, *cells.values())
    return drawn


def plot(report: Report, path: Path) -> None:
    """Two panels: speed-up against tokens on the largest layer, fraction of copy bandwidth against weights at M = 1."""
    largest = max(report.timings, key=lambda timing: timing.out_features * timing.in_features).layer
    figure, (left, right) = panels(2)
    for kernel in dict.fromkeys(timing.kernel for timing in report.timings):
        own = [timing for timing in report.timings if timing.kernel == kernel]
        across = sorted((timing.tokens, report.speedup(timing)) for timing in own if timing.layer == largest)
        sizes = sorted(
            (timing.out_features * timing.in_features, report.bandwidth(timing)) for timing in own if timing.tokens == 1
        )
        if len(across) > 1:
            left.plot(*zip(*across, strict=True), marker="o", label=kernel)
            right.plot(*zip(*sizes, strict=True), marker="o", label=kernel)
    left.set(xscale="log", xlabel="tokens", ylabel="times cuBLAS bf16", title=largest)
    right.set(xscale="log", xlabel="weights", ylabel="fraction of copy bandwidth", title="one token")
    right.legend()
    figure.suptitle(report.gpu)
    save_plot(figure, path)


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and plot")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, choices=BITS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU; without one only compile-time figures exist (tests/kernels).")
    log = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    for report in measure(torch.device("cuda"), log, tuple(options.tokens), tuple(options.bits)):
        stem = options.out / file_name(report.gpu)
        figures = json.dumps({"machine": machine(), **asdict(report)}, indent=1) + "\n"
        write_atomically(stem.with_name(stem.name + ".json"), figures)
        plot(report, stem.with_name(stem.name + ".png"))
    log.print(table(report))


if __name__ == "__main__":
    main()
