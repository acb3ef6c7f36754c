"""Seconds to quantize one linear layer: nearest plane beside GPTQ, in one run and with the same scales.

    python tests/benchmarks/solver.py [--size 4096] [--order activation]

Timed on both sides: from Hessian, weight and scales in memory to integers (damping, order, factorization, solver).
GPTQ is its usual form in PyTorch (float32; Cholesky, inverse, Cholesky; blocks of 128 columns, lazy updates); it goes
through the columns in the opposite order and clips nothing, so that both must find the same integers up to near ties.
Not part of the ratio: SSQR's search for scales, whose seconds (its passes of the solver included) stand below. torch
takes as many threads as there are physical cores.
"""

from dataclasses import dataclass

import torch
from harness import Median, Times, command_line, ratio, report, table, time_rounds
from torch import Tensor

from vllm_babai.offline.scales.solution import Solution
from vllm_babai.offline.scales.ssqr import search_overflow
from vllm_babai.offline.solver.factor import ORDERS, Order, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import nearest_plane

DAMPING = 0.01
BLOCK = 128


@dataclass
class Babai:
    """Ours, step by step: each step leaves what the next one takes."""

    weight: Tensor
    hessian: Tensor
    scales: Tensor
    order: Order

    def factorize(self) -> None:
        self.factor = factorize(self.hessian, self.order, DAMPING)

    def solve(self) -> None:
        """integers [out, in]"""
        order = self.factor.order
        integers = torch.empty_like(self.weight.T)
        integers[order] = nearest_plane(self.weight.T[order], Lattice(self.factor), self.scales.T).integers
        self.integers = integers.T


@dataclass
class GPTQ:
    """GPTQ (arXiv 2210.17323, algorithm 1) without clipping, with the same two steps."""

    weight: Tensor
    hessian: Tensor
    scales: Tensor
    order: Tensor

    def factorize(self) -> None:
        damped = self.hessian.clone()
        damped.diagonal().add_(DAMPING * self.hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[self.order][:, self.order]))
        self.upper = torch.linalg.cholesky(inverse, upper=True)

    def solve(self) -> None:
        """integers [out, in]"""
        rest = self.weight[:, self.order]
        integers = torch.empty_like(rest)
        for start in range(0, rest.shape[1], BLOCK):
            end = min(start + BLOCK, rest.shape[1])
            block, factor = rest[:, start:end].clone(), self.upper[start:end, start:end]
            errors = torch.empty_like(block)
            for i in range(end - start):
                column = block[:, i]
                integer = torch.round(column / self.scales[:, 0])
                errors[:, i] = (column - integer * self.scales[:, 0]) / factor[i, i]
                block[:, i:] -= errors[:, i : i + 1] @ factor[i : i + 1, i:]
                integers[:, start + i] = integer
            rest[:, end:] -= errors @ self.upper[start:end, end:]
        self.integers = torch.empty_like(integers)
        self.integers[:, self.order] = integers


def main() -> None:
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--order", choices=sorted(ORDERS), default="activation")
    options = parser.parse_args()
    weight, hessian = random_layer(options.size)
    scales = weight.abs().amax(1, keepdim=True) / 7.3
    factor = factorize(hessian, options.order, DAMPING)
    babai = Babai(weight, hessian, scales, options.order)
    gptq = GPTQ(weight, hessian, scales, factor.order.flip(0))

    times = time_rounds(
        {
            "babai factorize": babai.factorize,
            "babai solve": babai.solve,
            "gptq factorize": gptq.factorize,
            "gptq solve": gptq.solve,
        },
        options.rounds,
    )
    totals = {
        name: [sum(parts) for parts in zip(times[f"{name} factorize"].wall, times[f"{name} solve"].wall, strict=True)]
        for name in ("babai", "gptq")
    }
    search = Times([], [])
    found: list[Solution] = []
    basis_weight = weight.T[factor.order].contiguous()
    search.time(lambda: found.append(search_overflow(basis_weight, Lattice(factor), 1, 4, 0.01, 0)))
    drawn = table(f"seconds of one {options.size} × {options.size} layer, order {options.order}", ("step", "seconds"))
    for name, seconds in ({name: one.wall for name, one in times.items()} | totals).items():
        drawn.add_row(name, Median.of(seconds).text())
    drawn.add_row("SSQR's search for scales, 4 bits, once", f"{search.wall[0]:.2f}")
    same = float((babai.integers == gptq.integers).float().mean())
    errors = [relative_error(weight, one.integers * scales, hessian) for one in (babai, gptq)]
    speedup = ratio(totals["gptq"], totals["babai"])
    compared = table("nearest plane beside GPTQ", ("", "figure"))
    compared.add_row("times as fast", speedup.text())
    compared.add_row("same integers; the others follow near ties", f"{same:.4%}")
    compared.add_row("relative difference of the layer's error", f"{errors[1] / errors[0] - 1:+.2e}")
    figures = {
        "size": options.size,
        "order": options.order,
        "seconds": {name: Median.of(one.wall) for name, one in times.items()},
        "ratio": speedup,
        "same_integers": same,
        "relative_error_difference": errors[1] / errors[0] - 1,
        "search_seconds": search.wall[0],
        "search_passes": found[0].passes,
    }
    report(figures, [drawn, compared], options.json)


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


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Error of the layer's outputs over their energy."""
    residual = weight - quantized
    return float(((residual @ hessian) * residual).sum() / ((weight @ hessian) * weight).sum())


if __name__ == "__main__":
    main()
