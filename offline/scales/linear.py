"""One linear layer: target weight and factored Hessian → lattice point, stored form and report."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import HPTQ, SSQR, LatticeWeight
from vllm_babai.offline.scales.hptq import search_rate
from vllm_babai.offline.scales.ssqr import overflow_rate, search_overflow
from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import Solution


@dataclass(frozen=True)
class LayerReport:
    """What is known about a quantized linear. Errors are as `Lattice` counts them, damping included; W is the target,
    which with drift correction is not quite the original weight.

    predicted_error: ¹⁄₁₂ Σ s²D, less what several paths gain, and what rounding otherwise than to the nearest integer
    adds. measured_error: of W − Ŵ.
    bound: ¼ Σ s²D, None with such rounding. relative_error: measured, over that of W. passes: runs of nearest plane
    that the search for scales took. bits, group_size, overflow_rate: None in HPTQ.
    """

    name: str
    rows: int
    columns: int
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    overflow_rate: float | None
    order: str
    damping: float
    predicted_error: float
    measured_error: float
    bound: float | None
    relative_error: float
    passes: int
    seconds: float


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear's tensors as stored, the lattice point itself, and its report."""

    tensors: dict[str, Tensor]
    weight: LatticeWeight
    report: LayerReport


def quantize_ssqr(
    name: str, weight: Tensor, lattice: Lattice, order: str, bits: int, group_size: int, overflow: float, seed: int
) -> QuantizedLinear:
    """Quantize `weight` [out, in] to SSQR with a share `overflow` of sparse weights.

    Raises QuantizationError that names the layer when the group size does not divide in_features.
    """
    started = time.perf_counter()
    columns = weight.shape[1]
    if group_size != -1 and columns % group_size:
        raise QuantizationError(f"{name}: --group-size {group_size} does not divide its {columns} input features")
    groups = 1 if group_size == -1 else columns // group_size
    basis_weight = _to_basis(weight, lattice.columns)
    solution = search_overflow(basis_weight, lattice, groups, bits, overflow, seed)
    point = _from_basis(solution, lattice.columns)
    stored = SSQR.encode(point, bits)
    rate = overflow_rate(solution.plane.integers, bits)
    report = _report(name, basis_weight, solution, lattice, order, stored.tensors(), started, bits, group_size, rate)
    return QuantizedLinear(stored.tensors(), point, report)


def quantize_hptq(
    name: str,
    weight: Tensor,
    lattice: Lattice,
    order: str,
    rate: float,
    seed: int,
    column_exponents: Tensor | None = None,
) -> QuantizedLinear:
    """Quantize `weight` [out, in] to HPTQ at `rate` bits per weight, everything stored counted.

    column_exponents: int16 [in] of the columns' relative steps, see `format.steps`; None: one step for all.
    """
    started = time.perf_counter()
    basis_weight = _to_basis(weight, lattice.columns)
    solution = search_rate(basis_weight, lattice, rate, seed, column_exponents)
    point = replace(_from_basis(solution, lattice.columns), column_exponents=column_exponents)
    stored = HPTQ.encode(point)
    report = _report(name, basis_weight, solution, lattice, order, stored.tensors(), started)
    return QuantizedLinear(stored.tensors(), point, report)


def _to_basis(weight: Tensor, factor: Factor) -> Tensor:
    """Weight [out, in] → [in, out] in the factor's order, float32."""
    return weight.float().T[factor.order].contiguous()


def _from_basis(solution: Solution, factor: Factor) -> LatticeWeight:
    integers = torch.empty_like(solution.plane.integers, dtype=torch.int16)
    integers[factor.order] = solution.plane.integers.short()
    return LatticeWeight(integers.T.contiguous().cpu(), solution.scales.cpu())


def _report(
    name: str,
    weight: Tensor,
    solution: Solution,
    lattice: Lattice,
    order: str,
    tensors: dict[str, Tensor],
    started: float,
    bits: int | None = None,
    group_size: int | None = None,
    rate: float | None = None,
) -> LayerReport:
    rounding, measured = lattice.mean_error(solution.steps, weight.shape[1]), lattice.error(solution.plane.residual)
    predicted = lattice.gain * rounding + solution.added_error
    return LayerReport(
        name=name,
        rows=weight.shape[1],
        columns=weight.shape[0],
        bits=bits,
        group_size=group_size,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel(),
        overflow_rate=rate,
        order=order,
        damping=lattice.columns.damping,
        predicted_error=predicted,
        measured_error=measured,
        bound=3 * rounding if solution.added_error == 0 else None,
        relative_error=measured / max(lattice.error(weight), 1e-300),
        passes=solution.passes,
        seconds=time.perf_counter() - started,
    )
