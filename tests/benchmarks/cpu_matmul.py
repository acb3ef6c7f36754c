"""Speed of one linear layer on the CPU: `python tests/benchmarks/cpu_matmul.py [--help]`.

Times `babai::matmul` with 1% overflow at 2, 3, 4 and 8 bits against a bfloat16 matmul, vLLM's own 4-bit kernel
(`cpu_gemm_wna16`) and PyTorch's (`_weight_int4pack_mm_for_cpu`), all with bfloat16 activations, alternating in one run;
the shortest time of each counts (CPU time on one thread, which other processes disturb least). Every result is checked
against float32 first. Speed-ups are against bfloat16.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

from vllm_babai.format import BIT_WIDTHS, SSQR, LatticeWeight, decode_overflow, integer_range
from vllm_babai.ops import matmul as ops

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # out, in
OVERFLOW = 0.01
GROUP_SIZE = 128  # of the peers
SECONDS = 0.2  # per kernel, at least three rounds

Kernel = Callable[[Tensor], Tensor]


def random_weight(out_features: int, in_features: int, bits: int, groups: int) -> LatticeWeight:
    low, high = integer_range(bits)
    integers = torch.randint(low, high + 1, (out_features, in_features), dtype=torch.int16)
    over = torch.rand(integers.shape) < OVERFLOW
    integers[over] = torch.where(integers[over] < 0, low - 1, high + 1).short()
    return LatticeWeight(integers, (torch.rand(out_features, groups) + 0.5).bfloat16())


def babai_kernel(weight: LatticeWeight, bits: int) -> Kernel:
    out_features, in_features = weight.integers.shape
    stored = SSQR.encode(weight, bits)
    overflow = decode_overflow(stored.overflow)
    layout = ops.device_layout(stored.qweight, stored.scales, overflow, bits, in_features, torch.device("cpu"))
    ops.warm_up(layout, bits, in_features, out_features, torch.bfloat16)
    return lambda x: torch.ops.babai.matmul(x, *layout, bits, out_features)


def vllm_kernel(fields: Tensor, scales: Tensor) -> Kernel:
    """fields: integers + 8, int32 [out, in]."""
    in_features = fields.shape[1]
    packed = pack_quantized_values_into_int32(fields.t().contiguous(), scalar_types.uint4b8, 1)
    blocks = packed.view(in_features, -1, 2).permute(1, 0, 2).reshape(-1, in_features * 2).contiguous()
    group_scales = _scales_of_peers(scales, in_features).contiguous()
    return lambda x: vllm_ops.cpu_gemm_wna16(x, blocks, group_scales, None, None, 8, "vec")


def torch_kernel(fields: Tensor, scales: Tensor) -> Kernel:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields, 2)
    group_scales = _scales_of_peers(scales, fields.shape[1])
    scales_and_zeros = torch.stack([group_scales, torch.zeros_like(group_scales)], -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales_and_zeros)


def _scales_of_peers(scales: Tensor, in_features: int) -> Tensor:
    """Scales [out, groups], of one group or of GROUP_SIZE → [in / GROUP_SIZE, out]."""
    return scales.t().expand(in_features // GROUP_SIZE, -1)


def kernels_for(out_features: int, in_features: int, groups: int) -> dict[str, tuple[Kernel, Tensor]]:
    """Name → kernel and the float32 weight that it stands for."""
    kernels = {}
    for bits in BIT_WIDTHS:
        weight = random_weight(out_features, in_features, bits, groups)
        kernels[f"babai {bits}"] = babai_kernel(weight, bits), weight.dequantize()
        if bits == 4:
            fields = weight.integers.clamp(-8, 7)
            clamped = LatticeWeight(fields, weight.scales).dequantize()
            kernels["bf16"] = partial(linear, weight=weight.dequantize(torch.bfloat16)), weight.dequantize()
            kernels["vllm 4"] = vllm_kernel(fields.int() + 8, weight.scales), clamped
            kernels["torch 4"] = torch_kernel(fields.int() + 8, weight.scales), clamped
    return kernels


def check(kernels: dict[str, tuple[Kernel, Tensor]], in_features: int) -> None:
    x = torch.randn(3, in_features, dtype=torch.bfloat16)
    for name, (kernel, weight) in kernels.items():
        expected = linear(x.float(), weight)
        error = (kernel(x).float() - expected).norm() / expected.norm()
        assert error < 0.01, f"{name}: relative error {error}"


def shortest_times(
    kernels: dict[str, tuple[Kernel, Tensor]], x: Tensor, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of each kernel's fastest round; rounds alternate so that all see the same machine."""
    best = dict.fromkeys(kernels, float("inf"))
    rounds, begin = 0, clock()
    while rounds < 3 or clock() - begin < SECONDS * len(kernels):
        for name, (kernel, _) in kernels.items():
            start = clock()
            kernel(x)
            best[name] = min(best[name], 1000 * (clock() - start))
        rounds += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--group-size", type=int, choices=(-1, GROUP_SIZE), default=-1, help="of babai; -1: a row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    results = []
    table = Table(title=f"milliseconds (speed-up against bf16), {options.threads} thread(s)")
    names = ["bf16", "vllm 4", "torch 4", *(f"babai {bits}" for bits in BIT_WIDTHS)]
    for heading in ("out × in", "tokens", *names):
        table.add_column(heading, justify="right")
    for out_features, in_features in SHAPES:
        groups = 1 if options.group_size == -1 else in_features // options.group_size
        kernels = kernels_for(out_features, in_features, groups)
        check(kernels, in_features)
        for tokens in options.tokens:
            times = shortest_times(kernels, torch.randn(tokens, in_features, dtype=torch.bfloat16), clock)
            cells = [f"{times[name]:.2f} ({times['bf16'] / times[name]:.2f}×)" for name in names]
            table.add_row(f"{out_features} × {in_features}", str(tokens), *cells)
            results.append({"shape": [out_features, in_features], "tokens": tokens, "milliseconds": times})
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
