"""One linear: target weight and factored Hessian → lattice point, stored form and report."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import HPTQ, SSQR, LatticeWeight, Trellis, Weight, integer_range
from vllm_babai.format.lattice import share_beyond
from vllm_babai.offline.scales.hptq import search_rate
from vllm_babai.offline.scales.solution import Solution
from vllm_babai.offline.scales.ssqr import search_overflow
from vllm_babai.offline.scales.trellis import search_trellis
from vllm_babai.offline.solver.expected import error, expected_error
from vllm_babai.offline.solver.factor import Factor, Order
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.solve import paths_gain


@dataclass(frozen=True)
class LayerReport:
    """What is known about a quantized linear. Errors are as `Lattice` counts them, damping included; W is the target,
    which with drift correction is not quite the original weight.

    bits, group_size, overflow_share: None but in SSQR. damping: see `Factor`.
    predicted_error: ¹⁄₁₂ Σ s²D, less what several paths gain, plus the cost of rounding away from the nearest integer.
    A trellis: what the distortion of its code makes.
    measured_error: of W − Ŵ. relative_error: the same, over that of W.
    bound: ¼ Σ s²D; None where rounding is not to the nearest integer, and of a trellis.
    passes: how often the search for scales ran nearest plane. seconds: of the search and of encoding.
    """

    name: str
    rows: int
    columns: int
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    overflow_share: float | None
    order: Order
    damping: float
    predicted_error: float
    measured_error: float
    bound: float | None
    relative_error: float
    passes: int
    seconds: float


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear's tensors as stored, what they stand for, and its report."""

    tensors: dict[str, Tensor]
    weight: Weight
    report: LayerReport


def quantize_ssqr(
    name: str, weight: Tensor, lattice: Lattice, bits: int, group_size: int, overflow: float, seed: int
) -> QuantizedLinear:
    """Quantize `weight` [out, in] to SSQR with a share `overflow` of sparse weights; group_size −1: a scale per row.

    Raises QuantizationError that names the linear when the group size does not divide in_features.
    """
    started = time.perf_counter()
    columns = weight.shape[1]
    if group_size != -1 and columns % group_size:
        raise QuantizationError(f"{name}: --group-size {group_size} does not divide its {columns} input features")
    groups = 1 if group_size == -1 else columns // group_size
    basis_weight = _to_basis(weight, lattice.columns)
    solution = search_overflow(basis_weight, lattice, groups, bits, overflow, seed)
    point = _from_basis(solution, lattice.columns)
    tensors = SSQR.encode(point, bits, name).tensors()
    report = replace(
        _report(name, basis_weight, lattice, solution, tensors),
        bits=bits,
        group_size=group_size,
        overflow_share=share_beyond(solution.plane.integers, integer_range(bits)),
        seconds=time.perf_counter() - started,
    )
    return QuantizedLinear(tensors, point, report)


def quantize_hptq(
    name: str, weight: Tensor, lattice: Lattice, rate: float, seed: int, column_exponents: Tensor | None = None
) -> QuantizedLinear:
    """Quantize `weight` [out, in] to HPTQ at `rate` bits per weight, everything stored counted.

    column_exponents: int16 [in] of the column steps, see `format.steps`; None: one step for all columns.
    """
    started = time.perf_counter()
    basis_weight = _to_basis(weight, lattice.columns)
    solution = search_rate(basis_weight, lattice, rate, seed, column_exponents)
    point = replace(_from_basis(solution, lattice.columns), column_exponents=column_exponents)
    tensors = HPTQ.encode(point, linear=name).tensors()
    report = _report(name, basis_weight, lattice, solution, tensors)
    return QuantizedLinear(tensors, point, replace(report, seconds=time.perf_counter() - started))


def quantize_trellis(name: str, weight: Tensor, lattice: Lattice, rate: float, seed: int) -> QuantizedLinear:
    """Quantize `weight` [out, in] to the trellis form at `rate` bits per weight, everything stored counted.

    Raises QuantizationError that names the linear when its input features are odd in number.
    """
    started = time.perf_counter()
    rows, columns = weight.shape
    if columns % 2:
        raise QuantizationError(f"{name}: the trellis form takes columns in pairs, and there are {columns}")
    basis_weight = _to_basis(weight, lattice.columns)
    solution = search_trellis(basis_weight, lattice, rate, seed)
    tensors = Trellis.encode(solution.weight, linear=name).tensors()
    measured = error(solution.residual, lattice)
    report = LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        bits=None,
        group_size=None,
        bits_per_weight=8 * tensors["trellis"].nbytes / weight.numel(),
        overflow_share=None,
        order=lattice.columns.order_name,
        damping=lattice.columns.damping,
        predicted_error=solution.predicted,
        measured_error=measured,
        bound=None,
        relative_error=measured / max(error(basis_weight, lattice), 1e-300),
        passes=1,
        seconds=time.perf_counter() - started,
    )
    return QuantizedLinear(tensors, solution.weight, report)


def _to_basis(weight: Tensor, factor: Factor) -> Tensor:
    """Weight [out, in] → [in, out] in the factor's order, float32."""
    return weight.float().T[factor.order].contiguous()


def _from_basis(solution: Solution, factor: Factor) -> LatticeWeight:
    integers = torch.empty_like(solution.plane.integers, dtype=torch.int16)
    integers[factor.order] = solution.plane.integers.short()
    return LatticeWeight(integers.T.contiguous().cpu(), solution.scales.cpu())


def _report(name: str, weight: Tensor, lattice: Lattice, solution: Solution, tensors: dict[str, Tensor]) -> LayerReport:
    """The report but for what SSQR alone knows, and the seconds; weight: [n, out] in the columns' order."""
    columns, rows = weight.shape
    one_path = expected_error(solution.steps, lattice, rows)
    measured = error(solution.plane.residual, lattice)
    return LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        bits=None,
        group_size=None,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel(),
        overflow_share=None,
        order=lattice.columns.order_name,
        damping=lattice.columns.damping,
        predicted_error=paths_gain(lattice) * one_path + solution.added_error,
        measured_error=measured,
        bound=3 * one_path if solution.added_error == 0 else None,
        relative_error=measured / max(error(weight, lattice), 1e-300),
        passes=solution.passes,
        seconds=0.0,
    )
