"""Speed of one linear layer on the CPU: `python tests/benchmarks/cpu_matmul.py [--threads 2]`.

Times `babai::matmul` with 1% overflow at every width, and the trellis, against a bfloat16 matmul, vLLM's own 4-bit
kernel (`cpu_gemm_wna16`) and PyTorch's (`_weight_int4pack_mm_for_cpu`), all with bfloat16 activations: CPU time on one
thread, which other processes disturb least, else wall time. Every result is checked against float32 first. Speed-ups
are against bfloat16. vLLM's kernel is left out where its build for this CPU has none (without AVX-512).
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from harness import Median, command_line, ratio, report, table, time_rounds
from torch import Tensor
from torch.nn.functional import linear

from vllm_babai.format import BIT_WIDTHS, SSQR, LatticeWeight, TrellisWeight, decode_overflow, integer_range
from vllm_babai.format.trellis.code import TILE_COLUMNS, TILE_ROWS
from vllm_babai.format.trellis.window import cut_window
from vllm_babai.ops.backends import backend

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # out, in
OVERFLOW = 0.01
GROUP_SIZE = 128  # of the peers
TRELLIS_BITS = (2, 3)
SECONDS = 0.2  # for each kernel, if the rounds asked for take less

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
    layout = backend("cpu").device_layout(
        stored.qweight, stored.scales, overflow, bits, in_features, torch.device("cpu")
    )
    backend("cpu").warm_up(layout, bits, in_features, out_features, torch.bfloat16)
    return lambda x: torch.ops.babai.matmul(x, *layout, bits, out_features)


def trellis_kernel(out_features: int, in_features: int, bits: int) -> tuple[Kernel, Tensor]:
    """A trellis of any words with as many bits in each tile, and the float32 weight that it stands for."""
    rates = np.full((out_features // TILE_ROWS, in_features // TILE_COLUMNS), 2 * bits, np.uint8)
    words = np.random.default_rng(0).integers(0, 1 << 32, int(rates.sum(dtype=int)) * TILE_ROWS, np.uint32)
    exponents = np.zeros(out_features, np.uint8)
    weight = TrellisWeight((out_features, in_features), rates, np.arange(out_features), 0.02, exponents, words)
    window = cut_window(weight, slice(0, out_features), slice(0, in_features))
    layout = backend("cpu").trellis_layout(window, torch.device("cpu"))
    backend("cpu").warm_up_trellis(layout, in_features, torch.bfloat16)
    return partial(backend("cpu").multiply_trellis, trellis=layout), weight.dequantize()


def vllm_has_kernel() -> bool:
    """Whether this build of vLLM has a 4-bit kernel for this CPU."""
    from vllm import _custom_ops  # noqa: F401  # registers the operators; takes seconds, and --help needs none

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def vllm_kernel(fields: Tensor, scales: Tensor) -> Kernel:
    """fields: integers + 8, int32 [out, in]."""
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

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
            if vllm_has_kernel():
                kernels["vllm 4"] = vllm_kernel(fields.int() + 8, weight.scales), clamped
            kernels["torch 4"] = torch_kernel(fields.int() + 8, weight.scales), clamped
    for bits in TRELLIS_BITS:
        kernels[f"trellis {bits}"] = trellis_kernel(out_features, in_features, bits)
    return kernels


def check(kernels: dict[str, tuple[Kernel, Tensor]], in_features: int) -> None:
    x = torch.randn(3, in_features, dtype=torch.bfloat16)
    for name, (kernel, weight) in kernels.items():
        expected = linear(x.float(), weight)
        error = (kernel(x).float() - expected).norm() / expected.norm()
        assert error < 0.01, f"{name}: relative error {error}"


def main() -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--group-size", type=int, choices=(-1, GROUP_SIZE), default=-1, help="of babai; -1: a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    peers = ["bf16", *(["vllm 4"] if vllm_has_kernel() else []), "torch 4"]
    names = [*peers, *(f"babai {bits}" for bits in BIT_WIDTHS), *(f"trellis {bits}" for bits in TRELLIS_BITS)]
    title = f"milliseconds (speed-up against bf16), {options.threads} thread(s)"
    drawn = table(title, ("out × in", "tokens", *names))
    for out_features, in_features in SHAPES:
        groups = 1 if options.group_size == -1 else in_features // options.group_size
        kernels = kernels_for(out_features, in_features, groups)
        check(kernels, in_features)
        for tokens in options.tokens:
            x = torch.randn(tokens, in_features, dtype=torch.bfloat16)
            times = time_rounds({name: partial(kernels[name][0], x) for name in names}, options.rounds, SECONDS)
            seconds = {name: one.cpu if options.threads == 1 else one.wall for name, one in times.items()}
            medians = {name: Median.of(found) for name, found in seconds.items()}
            speedups = {name: ratio(seconds["bf16"], found) for name, found in seconds.items()}
            cells = [f"{1000 * medians[name].value:.2f} ({speedups[name].value:.2f}×)" for name in names]
            drawn.add_row(f"{out_features} × {in_features}", str(tokens), *cells)
            results.append(
                {"shape": [out_features, in_features], "tokens": tokens, "seconds": medians, "speedups": speedups}
            )
    report(results, [drawn], options.json)


if __name__ == "__main__":
    main()
