"""What a search for scales hands on: the scales, and the lattice point found with them."""

from dataclasses import dataclass

from torch import Tensor

from vllm_babai.offline.solver.nearest_plane import NearestPlane


@dataclass(frozen=True)
class Solution:
    """A solved linear.

    scales: bfloat16 [1 or out, groups], as stored. steps: the same, float32, broadcastable to [n, out] in the factor's
    order. passes: how often the search ran nearest plane.
    added_error: expected cost of rounding away from the nearest integer, as `Lattice` counts errors.
    """

    scales: Tensor
    steps: Tensor
    plane: NearestPlane
    passes: int
    added_error: float = 0.0
