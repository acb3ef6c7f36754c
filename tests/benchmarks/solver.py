"""Seconds to quantize one linear layer: nearest plane beside GPTQ, in one run and with the same scales.

    python tests/benchmarks/solver.py [--size 4096] [--repeats 3] [--order activation] [--json]

Timed on both sides: from Hessian, weight and scales in memory to integers (damping, order, factorization, solver).
GPTQ is its usual form in PyTorch (float32; Cholesky, inverse, Cholesky; blocks of 128 columns, lazy updates); it goes
through the columns in the opposite order and clips nothing, so that both must find the same integers up to near ties.
Not part of the ratio: SSQR's search for scales, whose seconds (its passes of the solver included) stand below. The runs
alternate, the best of each counts. torch takes as many threads as there are physical cores.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_babai.offline.scales.ssqr import search_overflow
from vllm_babai.offline.solver.factor import ORDERS, Factor, Order, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import nearest_plane

DAMPING = 0.01
BLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--order", choices=sorted(ORDERS), default="activation")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    weight, hessian = random_layer(arguments.size)
    scales = weight.abs().amax(1, keepdim=True) / 7.3

    babai, ours = [], {"factorize": 1e9, "solve": 1e9}
    gptq, theirs = [], {"factorize": 1e9, "solve": 1e9}
    for _ in range(arguments.repeats):
        integers, seconds, factor = run_babai(weight, hessian, scales, arguments.order)
        expected, other_seconds = run_gptq(weight, hessian, scales, factor.order.flip(0))
        babai.append(sum(seconds.values()))
        gptq.append(sum(other_seconds.values()))
        ours = {part: min(ours[part], seconds[part]) for part in ours}
        theirs = {part: min(theirs[part], other_seconds[part]) for part in theirs}
    basis_weight = weight.T[factor.order].contiguous()
    solution, search = timed(lambda: search_overflow(basis_weight, Lattice(factor), 1, 4, 0.01, 0))
    figures = {
        "size": arguments.size,
        "order": arguments.order,
        "threads": torch.get_num_threads(),
        "babai_seconds": min(babai),
        "gptq_seconds": min(gptq),
        "ratio": min(gptq) / min(babai),
        "babai_parts": ours,
        "gptq_parts": theirs,
        "same_integers": float((integers == expected).float().mean()),
        "relative_error_difference": relative_error(weight, expected * scales, hessian)
        / relative_error(weight, integers * scales, hessian)
        - 1,
        "search_seconds": search,
        "search_passes": solution.passes,
    }
    print(json.dumps(figures) if arguments.json else as_text(figures))


def as_text(figures: dict[str, Any]) -> str:
    """The figures, one subject per line."""
    lines = [f"one {figures['size']} × {figures['size']} layer, order {figures['order']}, {figures['threads']} threads"]
    for name in ("babai", "gptq"):
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in figures[f"{name}_parts"].items())
        lines.append(f"{name:>6} {figures[f'{name}_seconds']:6.2f} s   ({parts})")
    lines.append(f" ratio {figures['ratio']:6.2f}")
    lines.append(f"{figures['same_integers']:.4%} of the integers are the same, the others follow near ties;")
    lines.append(f"the layer's error is {figures['relative_error_difference']:+.2e} apart, relatively")
    passes = figures["search_passes"]
    lines.append(
        f"SSQR's search for scales at 4 bits: {figures['search_seconds']:.2f} s, {passes} solver pass(es) included"
    )
    return "\n".join(lines)


def random_layer(size: int) -> tuple[Tensor, Tensor]:
    """Weight [size, size] and Hessian of correlated inputs of different sizes, float32."""
    generator = torch.Generator().manual_seed(0)
    hessian = torch.zeros(size, size)
    spread = 10 ** torch.rand(size, generator=generator)
    mix = torch.randn(64, size, generator=generator) / 8
    for _ in range(8):
        inputs = torch.randn(size // 4, size, generator=generator)
        inputs += torch.randn(size // 4, 64, generator=generator) @ mix
        inputs *= spread
        hessian.addmm_(inputs.T, inputs)
    return torch.randn(size, size, generator=generator) / size**0.5, hessian / (2 * size)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def run_babai(weight: Tensor, hessian: Tensor, scales: Tensor, order: Order) -> tuple[Tensor, dict[str, float], Factor]:
    """Integers [out, in], seconds by part, and the factor."""

    def solve() -> Tensor:
        integers = torch.empty_like(weight.T)
        integers[factor.order] = nearest_plane(weight.T[factor.order], factor.unit_upper, scales.T).integers
        return integers.T

    factor, factorization = timed(lambda: factorize(hessian, order, DAMPING))
    integers, solving = timed(solve)
    return integers, {"factorize": factorization, "solve": solving}, factor


def run_gptq(weight: Tensor, hessian: Tensor, scales: Tensor, order: Tensor) -> tuple[Tensor, dict[str, float]]:
    """GPTQ (arXiv 2210.17323, algorithm 1) without clipping: integers [out, in], and seconds by part."""

    def factorize_inverse() -> Tensor:
        damped = hessian.clone()
        damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
        return torch.linalg.cholesky(inverse, upper=True)

    def solve() -> Tensor:
        rest = weight[:, order]
        integers = torch.empty_like(rest)
        for start in range(0, rest.shape[1], BLOCK):
            end = min(start + BLOCK, rest.shape[1])
            block, factor = rest[:, start:end].clone(), upper[start:end, start:end]
            errors = torch.empty_like(block)
            for i in range(end - start):
                column = block[:, i]
                integer = torch.round(column / scales[:, 0])
                errors[:, i] = (column - integer * scales[:, 0]) / factor[i, i]
                block[:, i:] -= errors[:, i : i + 1] @ factor[i : i + 1, i:]
                integers[:, start + i] = integer
            rest[:, end:] -= errors @ upper[start:end, end:]
        restored = torch.empty_like(integers)
        restored[:, order] = integers
        return restored

    upper, factorization = timed(factorize_inverse)
    integers, solving = timed(solve)
    return integers, {"factorize": factorization, "solve": solving}


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Error of the layer's outputs over their energy."""
    residual = weight - quantized
    return float(((residual @ hessian) * residual).sum() / ((weight @ hessian) * weight).sum())


if __name__ == "__main__":
    main()
