"""The lattice of one layer: what an error of its weight costs, and the solver for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.offline.factor import Factor
from vllm_babai.offline.joint_plane import RowGeometry, joint_error, joint_plane
from vllm_babai.offline.nearest_plane import NEAREST, NearestPlane, Rounding, mean_error, nearest_plane, squared_error


@dataclass(frozen=True)
class Lattice:
    """columns: factor of the Hessian. rows: geometry of the outputs, or None where all rows count alike and alone.

    An error is then ‖R(W − Ŵ)ᵀ‖² per calibration token; with a geometry it is twice the loss in nats per token.
    """

    columns: Factor
    rows: RowGeometry | None = None

    def row_pivots(self, out_features: int) -> Tensor:
        """How much the error of every row counts, float64 [out]."""
        return torch.ones(out_features, dtype=torch.float64) if self.rows is None else self.rows.pivots

    def solve(self, weight: Tensor, steps: Tensor, rounding: Rounding = NEAREST) -> NearestPlane:
        """Nearest plane; weight: [n, out] in the columns' order, steps broadcastable to it."""
        if self.rows is None:
            return nearest_plane(weight, self.columns.unit_upper, steps, rounding)
        return joint_plane(weight, self.columns, self.rows, steps, rounding)

    def error(self, residual: Tensor) -> float:
        """Squared error of a residual [n, out], damping included."""
        if self.rows is None:
            return float(squared_error(residual, self.columns).sum())
        return joint_error(residual, self.columns, self.rows)

    def mean_error(self, steps: Tensor, out_features: int) -> float:
        """Expected error ¹⁄₁₂ Σ s² D_j D_i of nearest plane; three times this is its bound."""
        by_row = mean_error(steps.expand(-1, out_features), self.columns)
        return float(by_row @ self.row_pivots(out_features).to(by_row.device))
