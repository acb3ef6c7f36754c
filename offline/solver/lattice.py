"""The lattice of one linear: what an error of its weight costs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.row_geometry import RowGeometry, independent_rows


@dataclass(frozen=True)
class Lattice:
    """The problem that `solve` solves, but for the weight and the steps.

    columns: factor of the Hessian of the inputs. rows: factored row covariance, or None where all rows are independent
    and count alike. paths: partial solutions that a row keeps until it is decided; 1 is Babai's algorithm.

    Errors are ‖R(W − Ŵ)ᵀ‖² per calibration token; with `rows` they are twice the loss in nats per token.
    """

    columns: Factor
    rows: RowGeometry | None = None
    paths: int = 1

    def row_pivots(self, out_features: int) -> Tensor:
        """How much the error of every row counts, float64 [out]."""
        return torch.ones(out_features, dtype=torch.float64) if self.rows is None else self.rows.pivots

    @property
    def has_independent_rows(self) -> bool:
        """Whether every row is a lattice of its own."""
        return self.rows is None or self.rows.is_diagonal

    def of_rows(self, chosen: slice) -> "Lattice":
        """The lattice of some of the rows, which must be independent."""
        return replace(self, rows=self.rows and independent_rows(self.rows.pivots[chosen]))
