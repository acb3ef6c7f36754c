"""Errors of nearest plane, measured and expected, and the targets that it is expected to meet."""

import torch
from torch import Tensor

from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.lattice import Lattice

# Random vectors by which `carried_variance` estimates a row sum of squares; its standard error is √(2/64), 18%, for
# each position, and errors average out over positions. `tests/unit/test_scales.py` compares it with nearest plane.
PROBES = 64
CHUNK = 256  # rows of R that `squared_error` multiplies at a time; each product skips the zeros to the left of it


def error(residual: Tensor, lattice: Lattice) -> float:
    """tr(G E H Eᵀ) of a residual E, [n, out] in the columns' order; damping of G and H included."""
    if lattice.rows is None:
        return float(squared_error(residual, lattice.columns).sum())
    total, columns = 0.0, lattice.columns
    for block in lattice.rows.blocks:
        part = (columns.unit_upper @ residual[:, block.rows.to(residual.device)]).double()
        if not block.is_independent:
            part = part @ block.unit_upper.double().to(part.device).T
        total += float(columns.pivots @ part.square() @ block.pivots.to(part.device))
    return total


def expected_error(steps: Tensor, lattice: Lattice, out_features: int) -> float:
    """Expected error ¹⁄₁₂ Σ s² D_j D_i with one path; three times this is the bound with any number of paths."""
    by_row = mean_error(steps.expand(-1, out_features), lattice.columns)
    return float(by_row @ lattice.row_pivots(out_features).to(by_row.device))


def squared_error(residual: Tensor, factor: Factor) -> Tensor:
    """‖R(w − s∘z)‖² of every output row, float64 [out]; per calibration token, damping included."""
    upper = factor.unit_upper
    total = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    for i in range(0, len(upper), CHUNK):
        rows = upper[i : i + CHUNK, i:] @ residual[i:]
        total += (rows.double().square() * factor.pivots[i : i + CHUNK, None]).sum(0)
    return total


def mean_error(steps: Tensor, factor: Factor) -> Tensor:
    """Expected squared error ¹⁄₁₂ Σ_j s_j² D_j of every output row, float64 [out] (or [1] for one step).

    Three times this is the bound that no row can exceed (arXiv 2507.18553, theorem 5).
    """
    steps = steps.expand(len(factor.pivots), -1)
    return factor.pivots @ steps.double().square() / 12


def carried_variance(factor: Factor, seed: int, steps: Tensor | float = 1.0) -> Tensor:
    """Variance of what nearest plane's errors add to the target of every position, [n, 1]; steps: by position, [n, 1].

    Rounding leaves t − s∘z = s∘u with u uniform, so the residual is w − s∘z = U⁻¹(s∘u), U being R with rows divided by
    its diagonal, and t_j − w_j has variance ¹⁄₁₂ Σ_{k>j} (U⁻¹)_jk² s_k². Random probes estimate these row sums without
    U⁻¹.
    """
    upper = factor.unit_upper
    generator = torch.Generator(upper.device).manual_seed(seed)
    probes = torch.randn(len(upper), PROBES, generator=generator, device=upper.device, dtype=upper.dtype) * steps
    carried = probes - torch.linalg.solve_triangular(upper, probes, upper=True, unitriangular=True)
    return carried.square().mean(1, keepdim=True) / 12


def expected_targets(weight: Tensor, steps: Tensor, factor: Factor, seed: int) -> tuple[Tensor, Tensor]:
    """Two draws of nearest plane's targets without running it: the weight plus and minus noise of the carried variance.

    weight: [n, out] in the factor's order; steps: broadcastable to it. A target carries the errors of other positions'
    steps. The steps are approximated by a row's times a position's, both root mean squares, as a variance for each row
    would cost as much as nearest plane itself.
    """
    row = steps.double().square().mean(0, keepdim=True).sqrt().to(steps.dtype)  # float32 has no squares of tiny steps
    position = (steps / row).square().mean(1, keepdim=True).sqrt()
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
    noise *= carried_variance(factor, seed, position).sqrt() * row
    return weight + noise, weight - noise
