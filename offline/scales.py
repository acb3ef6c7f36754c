"""Scales of SSQR: one per output row (or per row and group), so that the layer overflows at a given rate.

A target t at integer range low … high overflows unless its scale is at least max(t/(high + ½), t/(low − ½)). So in one
row the k-th largest of these thresholds is the scale at which k − 1 weights overflow. The squared error of a row grows
with s² ΣD; the rows share the layer's budget of overflow entries where an entry lowers that error most.
"""

import torch
from torch import Tensor

from vllm_babai.format.lattice import MAX_INTEGER, integer_range
from vllm_babai.offline.factor import Factor


def expected_targets(weight: Tensor, steps: Tensor, factor: Factor, seed: int) -> tuple[Tensor, Tensor]:
    """Two draws of nearest plane's targets without running it: the weight plus and minus noise as the carried error's.

    weight: [n, out] in the factor's order; steps: broadcastable to it. The error carried into position j has variance
    s²/12 Σ_{k>j} (R_jk/R_jj)².
    """
    carried = (factor.unit_upper.square().sum(1) - 1).clamp_min(0).div(12).sqrt()
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
    noise *= carried[:, None] * steps
    return weight + noise, weight - noise


def overflow_scales(targets: Tensor, cells: Tensor, pivots: Tensor, bits: int, rate: float) -> Tensor:
    """Scales, bfloat16 [out, groups], at which a share `rate` of all targets overflows at the least total error.

    targets: [n, out]. cells: int64 [groups, n / groups], positions that share a scale. pivots: D, [n].
    """
    low, high = integer_range(bits)
    thresholds = torch.maximum(targets / (high + 0.5), targets / (low - 0.5))
    weights = pivots[cells].sum(1).to(targets.dtype)
    depth = min(cells.shape[1], max(4, int(cells.shape[1] * min(1.0, 6 * rate)) + 2))
    largest = thresholds[cells].topk(depth, dim=1).values
    largest = torch.maximum(largest, largest[:, :1] * (integer_range(bits)[1] + 1) * 2 / MAX_INTEGER)
    cost = largest.square() * weights[:, None, None]
    count = torch.arange(depth, device=targets.device, dtype=targets.dtype)[:, None]
    price = _price_of_entry(cost, count, rate * targets.numel())
    best = (cost + price * count).argmin(1, keepdim=True)
    scales = largest.gather(1, best).squeeze(1).T
    return torch.where(scales > 0, scales, 1.0).to(torch.bfloat16).contiguous()


def _price_of_entry(cost: Tensor, count: Tensor, budget: float) -> float:
    """The error that one overflow entry must save, so that the entries worth it fit the budget. Bisection in log."""
    low, high = -60.0, 60.0
    unit = float(cost[:, 0].max()) or 1.0
    for _ in range(40):
        middle = (low + high) / 2
        entries = (cost + unit * 2.0**middle * count).argmin(1).sum()
        low, high = (middle, high) if entries > budget else (low, middle)
    return unit * 2.0**high
