"""Check and time mixtures of experts on a GPU beside vLLM's: `python tests/benchmarks/expert_kernels.py [--json FILE]`.

A call is all that the experts of a layer do: routing, gate and up, activation, down, weighted sum. Peers are vLLM's
kernels in bf16 and for GPTQ of 4 bits (Marlin); one that fails is left out. Times are of CUDA-graph replays over copies
that no cache holds together. Humming's experts are not among the peers: they take a whole layer of vLLM.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import command_line, report, table
from rich.console import Console
from torch import Tensor

from vllm_babai.ops.experts import ExpertTensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels import experts_layout, multiply_experts
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.dequantize import dequantize
from vllm_babai.triton_kernels.layout import geometry_of
from vllm_babai.triton_kernels.tuning.bench import random_layout
from vllm_babai.triton_kernels.tuning.timing import copies_needed, seconds_per_call

TOKENS = (1, 8, 32, 128, 512, 4096)
BITS = (3, 4)
OVERFLOW = 0.01
ERROR_LIMIT = 1.5  # times the error of the same in bf16, from dequantized weights
CHECKED_TOKENS = 8  # of a call, since a reference in float64 takes a product for every visit
GPTQ_GROUP = 128
BASELINE = "vLLM bf16"


@dataclass(frozen=True)
class Mixture:
    """Sizes of a layer. inner: columns of each down. k: experts of a token."""

    experts: int
    hidden: int
    inner: int
    k: int


MIXTURES = {
    "Qwen3-30B-A3B": Mixture(128, 2048, 768, 8),
    "gpt-oss-20b": Mixture(32, 2880, 2880, 4),  # its sizes; biases and its activation aside
    "GLM-4.6": Mixture(160, 5120, 1536, 8),
}

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [tokens, hidden], weights and ids [tokens, k]


@dataclass(frozen=True)
class Timing:
    """One measured call. bytes: of all experts. error: times that of bf16; None for peers."""

    mixture: str
    kernel: str
    tokens: int
    seconds: float
    bytes: int
    error: float | None = None


def silu_and_mul(outputs: Tensor) -> Tensor:
    """[rows, 2 · inner] → silu(gate) · up, by vLLM's kernel."""
    inner = outputs.new_empty(len(outputs), outputs.shape[1] // 2)
    torch.ops._C.silu_and_mul(inner, outputs)
    return inner


def random_experts(sizes: Mixture, bits: int, device: torch.device) -> ExpertTensors:
    """Experts of random integers."""

    def layout(rows: int, columns: int) -> DeviceLayout:
        geometry = geometry_of(bits, columns, rows)
        return experts_layout([random_layout(geometry, OVERFLOW, device, seed) for seed in range(sizes.experts)])

    gate_up = layout(2 * sizes.inner, sizes.hidden)
    return ExpertTensors(gate_up, layout(sizes.hidden, sizes.inner), bits, bits, 2 * sizes.inner, sizes.inner)


def random_routing(sizes: Mixture, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights float32 and ids int32, both [tokens, k]: other experts for every token, as many visits for each."""
    ids = torch.rand(tokens, sizes.experts, device=device).topk(sizes.k).indices.int()
    return torch.rand(tokens, sizes.k, device=device), ids


def relative_error(y: Tensor, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors) -> float:
    """Error of y, in units of that of the same in bf16, from dequantized weights."""
    hidden, backend = x.shape[1], Target.of(x.device).backend

    def dense(layout: DeviceLayout, bits: int, columns: int, rows: int) -> Tensor:
        own = geometry_of(bits, columns, rows).padded_rows
        tall = geometry_of(bits, columns, layout.scales.shape[1])
        return dequantize(layout, tall, torch.bfloat16, backend).view(-1, own, columns)[:, :rows]

    first = dense(experts.gate_up, experts.gate_up_bits, hidden, experts.gate_up_rows)
    second = dense(experts.down, experts.down_bits, experts.inner, hidden)

    def result(dtype: torch.dtype) -> Tensor:
        total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for token, chosen in enumerate(ids.tolist()):
            for place, expert in enumerate(chosen):
                gate, up = (x[token].to(dtype) @ first[expert].to(dtype).t()).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                total[token] += (inner @ second[expert].to(dtype).t()).double() * weights[token, place]
        return total

    exact = result(torch.float64)
    return float((y.double() - exact).norm() / (result(torch.bfloat16).to(x.dtype).double() - exact).norm())


def babai(sizes: Mixture, bits: int, device: torch.device) -> tuple[Multiply, int]:
    """The product with experts of ours, and their bytes; so all peers below."""
    experts = random_experts(sizes, bits, device)
    size = sum(tensor.nbytes for tensor in (*experts.gate_up, *experts.down))
    return functools.partial(multiply_experts, experts=experts, activate=silu_and_mul), size


def bf16(sizes: Mixture, device: torch.device) -> tuple[Multiply, int]:
    """vLLM's Triton kernel, with its configurations for this GPU where it has them."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    first = torch.randn(sizes.experts, 2 * sizes.inner, sizes.hidden, dtype=torch.bfloat16, device=device) * 0.02
    second = torch.randn(sizes.experts, sizes.hidden, sizes.inner, dtype=torch.bfloat16, device=device) * 0.02
    return lambda x, weights, ids: fused_experts(x, first, second, weights, ids), first.nbytes + second.nbytes


def marlin(sizes: Mixture, device: torch.device) -> tuple[Multiply, int]:
    """Marlin for GPTQ of 4 bits in groups of 128, as vLLM calls it."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    if sizes.inner % GPTQ_GROUP:
        raise ValueError(f"{sizes.inner} columns are no multiple of {GPTQ_GROUP}")

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        shape = (sizes.experts, columns // 16, rows * 2)
        packed = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
        return packed, torch.ones(sizes.experts, columns // GPTQ_GROUP, rows, dtype=torch.bfloat16, device=device)

    first, first_scales = weight(2 * sizes.inner, sizes.hidden)
    second, second_scales = weight(sizes.hidden, sizes.inner)

    def multiply(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return fused_marlin_moe(
            x,
            first,
            second,
            None,
            None,
            first_scales,
            second_scales,
            topk_weights=weights,
            topk_ids=ids,
            quant_type_id=scalar_types.uint4b8.id,
        )

    return multiply, sum(tensor.nbytes for tensor in (first, second, first_scales, second_scales))


PEERS = {BASELINE: bf16, "Marlin int4": marlin}


def time_calls(
    name: str, kernel: str, make: Callable[[], tuple[Multiply, int]], tokens: tuple[int, ...], device: torch.device
) -> Iterator[Timing]:
    """Time one kernel at every number of tokens; ours after a check of the result."""
    sizes = MIXTURES[name]
    multiply, size = make()
    multiplies = [multiply, *(make()[0] for _ in range(copies_needed(size, device) - 1))]
    for count in tokens:
        x = torch.randn(count, sizes.hidden, dtype=torch.bfloat16, device=device)
        routing = random_routing(sizes, count, device)
        error = None
        if isinstance(multiply, functools.partial):
            few = [tensor[:CHECKED_TOKENS] for tensor in (x, *routing)]
            error = relative_error(multiply(x, *routing)[:CHECKED_TOKENS], *few, multiply.keywords["experts"])
            if not error <= ERROR_LIMIT:
                raise SystemExit(f"{kernel}, {name}, {count} tokens: error is {error:.2f} times that of bf16")
        seconds = seconds_per_call([functools.partial(one, x, *routing) for one in multiplies])
        yield Timing(name, kernel, count, seconds, size, error)


def measure(device: torch.device, tokens: tuple[int, ...], log: Console) -> list[Timing]:
    """Everything on this GPU."""
    timings: list[Timing] = []
    for name, sizes in MIXTURES.items():
        for bits in BITS:
            make = functools.partial(babai, sizes, bits, device)
            timings += time_calls(name, f"babai {bits} bits", make, tokens, device)
        for peer, make_peer in PEERS.items():
            try:
                timings += time_calls(name, peer, functools.partial(make_peer, sizes, device), tokens, device)
            except Exception as problem:  # none of their failures may end the run
                log.print(f"{peer} left out at {name}: {type(problem).__name__}: {problem}")
    return timings


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU; without one only compile-time figures exist (tests/kernels).")
    timings = measure(torch.device("cuda"), tuple(options.tokens), Console(stderr=True))
    drawn = table("Experts of a layer, µs", ("mixture", "kernel", *(f"{m} tokens" for m in options.tokens)), 2)
    for mixture, kernel in dict.fromkeys((timing.mixture, timing.kernel) for timing in timings):
        own = [timing for timing in timings if (timing.mixture, timing.kernel) == (mixture, kernel)]
        drawn.add_row(mixture, kernel, *(f"{1e6 * timing.seconds:.1f}" for timing in own))
    report(timings, [drawn], options.json)


if __name__ == "__main__":
    main()
