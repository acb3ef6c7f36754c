"""The lattice of one layer: what an error of its weight costs, and the solver for it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.joint_plane import (
    RowGeometry,
    equal_rows,
    independent_rows,
    joint_error,
    joint_plane,
    paths_gain,
)
from vllm_babai.offline.solver.nearest_plane import (
    NEAREST,
    NearestPlane,
    Rounding,
    mean_error,
    nearest_plane,
    squared_error,
)


@dataclass(frozen=True)
class Lattice:
    """columns: factor of the Hessian. rows: geometry of the outputs, or None where all rows count alike and alone.

    paths: that nearest plane keeps in a row until it is decided; 1: Babai's algorithm.
    An error is then ‖R(W − Ŵ)ᵀ‖² per calibration token; with a geometry it is twice the loss in nats per token.
    """

    columns: Factor
    rows: RowGeometry | None = None
    paths: int = 1

    def row_pivots(self, out_features: int) -> Tensor:
        """How much the error of every row counts, float64 [out]."""
        return torch.ones(out_features, dtype=torch.float64) if self.rows is None else self.rows.pivots

    @property
    def has_single_rows(self) -> bool:
        """Whether every row is a lattice of its own."""
        return self.rows is None or self.rows.is_diagonal

    def of_rows(self, chosen: slice) -> "Lattice":
        """The lattice of some rows that are lattices of their own."""
        return replace(self, rows=self.rows and independent_rows(self.rows.pivots[chosen]))

    def solve(self, weight: Tensor, steps: Tensor, rounding: Rounding = NEAREST) -> NearestPlane:
        """Nearest plane; weight: [n, out] in the columns' order, steps broadcastable to it."""
        if self.rows is None and self.paths == 1:
            return nearest_plane(weight, self.columns.unit_upper, steps, rounding)
        rows = self.rows or equal_rows(weight.shape[1])
        return joint_plane(weight, self.columns, rows, steps, rounding, self.paths)

    def error(self, residual: Tensor) -> float:
        """Squared error of a residual [n, out], damping included."""
        if self.rows is None:
            return float(squared_error(residual, self.columns).sum())
        return joint_error(residual, self.columns, self.rows)

    @cached_property
    def gain(self) -> float:
        """Error with these paths over that with one, as expected for any weight."""
        return paths_gain(self.columns, self.paths)

    def mean_error(self, steps: Tensor, out_features: int) -> float:
        """Expected error ¹⁄₁₂ Σ s² D_j D_i with one path; three times this is the bound with any number of them."""
        by_row = mean_error(steps.expand(-1, out_features), self.columns)
        return float(by_row @ self.row_pivots(out_features).to(by_row.device))
