"""One linear layer: weight and factored Hessian → lattice point, stored form and report."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.format import SSQR, LatticeWeight, LayerScheme, integer_range
from vllm_babai.offline.errors import QuantizationError
from vllm_babai.offline.factor import Factor
from vllm_babai.offline.nearest_plane import NearestPlane, mean_error, nearest_plane, squared_error
from vllm_babai.offline.scales import expected_targets, overflow_scales

MAX_PASSES = 3
RATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class LayerReport:
    """What is known about a quantized linear. Errors are sums over output rows per calibration token, damping included.

    predicted_error: ¹⁄₁₂ Σ s²D. measured_error: ‖R(W − Ŵ)ᵀ‖². bound: ¼ Σ s²D. relative_error: measured, over the
    energy ‖RWᵀ‖² of the layer's outputs. passes: runs of nearest plane that the search for scales took.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int
    bits_per_weight: float
    overflow_rate: float
    order: str
    damping: float
    predicted_error: float
    measured_error: float
    bound: float
    relative_error: float
    passes: int
    seconds: float


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear as stored, the lattice point itself, and its report."""

    stored: SSQR
    weight: LatticeWeight
    report: LayerReport


def quantize_ssqr(
    name: str, weight: Tensor, factor: Factor, order: str, scheme: LayerScheme, overflow: float, seed: int
) -> QuantizedLinear:
    """Quantize `weight` [out, in] to SSQR with a share `overflow` of sparse weights.

    Raises QuantizationError that names the layer when the group size does not divide in_features.
    """
    started = time.perf_counter()
    rows, columns = weight.shape
    if scheme.group_size != -1 and columns % scheme.group_size:
        raise QuantizationError(
            f"{name}: --group-size {scheme.group_size} does not divide its {columns} input features"
        )
    basis_weight = weight.float().T[factor.order].contiguous()
    cells = _cells(factor.order, scheme.groups(columns))
    scales, solution, passes = _search_scales(basis_weight, factor, cells, scheme.bits, overflow, seed)
    steps = _steps(scales, cells)

    integers = torch.empty_like(solution.integers, dtype=torch.int16)
    integers[factor.order] = solution.integers.short()
    lattice = LatticeWeight(integers.T.contiguous().cpu(), scales.cpu())
    stored = SSQR.encode(lattice, scheme.bits)
    predicted, measured = float(mean_error(steps, factor).sum()), float(squared_error(solution.residual, factor).sum())
    report = LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        bits=scheme.bits,
        group_size=scheme.group_size,
        bits_per_weight=8 * sum(t.nbytes for t in stored.tensors().values()) / weight.numel(),
        overflow_rate=_overflow_rate(solution.integers, scheme.bits),
        order=order,
        damping=factor.damping,
        predicted_error=predicted,
        measured_error=measured,
        bound=3 * predicted,
        relative_error=measured / max(float(squared_error(basis_weight, factor).sum()), 1e-300),
        passes=passes,
        seconds=time.perf_counter() - started,
    )
    return QuantizedLinear(stored, lattice, report)


def _search_scales(
    weight: Tensor, factor: Factor, cells: Tensor, bits: int, overflow: float, seed: int
) -> tuple[Tensor, NearestPlane, int]:
    """Scales [out, groups] whose overflow rate is `overflow`, the solution there, and the passes that it took.

    Scales are chosen on a draw of the targets that nearest plane is expected to meet. Choosing favours rows that were
    lucky in the draw, so a second draw tells how much more than asked for overflows, and each pass tells it exactly.
    """
    pivots = factor.pivots.to(weight.dtype)
    scales = overflow_scales(weight, cells, pivots, bits, overflow)
    for attempt in range(2):
        targets, unseen = expected_targets(weight, _steps(scales, cells), factor, seed + attempt)
        scales = overflow_scales(targets, cells, pivots, bits, overflow)
    asked = overflow * _ratio(overflow, _overflow_rate(unseen / _steps(scales, cells), bits))
    passes, missed = 0, True
    while missed and passes < MAX_PASSES:
        scales = overflow_scales(targets, cells, pivots, bits, asked)
        solution = nearest_plane(weight, factor.unit_upper, _steps(scales, cells))
        reached = _overflow_rate(solution.integers, bits)
        missed = abs(reached - overflow) > RATE_TOLERANCE * overflow
        asked *= _ratio(overflow, reached)
        passes += 1
    return scales, solution, passes


def _ratio(wanted: float, reached: float) -> float:
    """Factor to correct a rate by, kept from running away where almost nothing overflows."""
    return min(max(wanted / reached, 0.5), 2.0) if reached > 0 else 1.0


def _cells(order: Tensor, groups: int) -> Tensor:
    """Positions of the input features that share a scale, int64 [groups, in / groups]."""
    return torch.argsort(order).view(groups, -1)


def _steps(scales: Tensor, cells: Tensor) -> Tensor:
    """Step of every position and output row: [in, out], or [1, out] for one scale per row."""
    if len(cells) == 1:
        return scales.T.float()
    steps = torch.empty(cells.numel(), len(scales), device=scales.device)
    steps[cells] = scales.T.float()[:, None]
    return steps


def _overflow_rate(integers: Tensor, bits: int) -> float:
    low, high = integer_range(bits)
    return float(((integers < low - 0.5) | (integers > high + 0.5)).float().mean())
