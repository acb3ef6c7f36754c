"""The lattice point that a quantized linear layer is: integers Z and scales S, with W ≈ S ∘ Z."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.format.steps import column_factors

MAX_INTEGER = 2**15 - 1
BIT_WIDTHS = (2, 3, 4, 5, 8)  # of dense integers
# HPTQ becomes dense + sparse, on disk or in memory, with the fewest bits that leave no larger share of overflow.
# A choice: what the kernels multiply at next to no cost.
MOST_OVERFLOW = 0.02


@dataclass(frozen=True)
class LatticeWeight:
    """Integers and scales of one linear layer; every format stores exactly this.

    integers: int16 [out_features, in_features], |z| ≤ 2¹⁵ − 1.
    scales: bfloat16 [rows, groups]; rows is out_features, or 1 when one scale serves the whole matrix, and groups
        divides in_features into equal runs of consecutive input features.
    column_exponents: int16 [in_features] of the factors by which the scales of columns differ besides, see
        `format.steps`; or None. HPTQ alone stores them.
    """

    integers: Tensor
    scales: Tensor
    column_exponents: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.integers.shape
        rows, groups = self.scales.shape
        if self.integers.dtype != torch.int16 or self.scales.dtype != torch.bfloat16:
            raise TypeError(f"need int16 integers and bfloat16 scales, got {self.integers.dtype}, {self.scales.dtype}")
        if rows not in (1, out_features) or groups < 1 or in_features % groups:
            raise ValueError(f"scales {tuple(self.scales.shape)} do not divide integers {tuple(self.integers.shape)}")
        exponents = self.column_exponents
        if exponents is not None and (exponents.dtype != torch.int16 or exponents.shape != (in_features,)):
            raise ValueError(f"need an int16 exponent for each of {in_features} columns, got {exponents.shape}")

    @property
    def input_scales(self) -> Tensor | None:
        """Factors of the columns, bfloat16 [in_features], or None: a multiplication may as well scale its inputs."""
        return None if self.column_exponents is None else column_factors(self.column_exponents)

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        out_features, in_features = self.integers.shape
        return out_features, in_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S ∘ Z as a dense matrix [out_features, in_features]; rounded once where float32 does not hold it."""
        groups = self.scales.shape[1]
        scales = self.scales.float().unsqueeze(-1)
        if (factors := self.input_scales) is not None:
            scales = scales * factors.float().view(groups, -1)
        grouped = self.integers.unflatten(1, (groups, -1)).float() * scales
        return grouped.flatten(1).to(dtype)


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer that `bits` dense bits hold: −2^(bits−1) … 2^(bits−1) − 1."""
    half = 1 << (bits - 1)
    return -half, half - 1


def share_beyond(integers: Tensor, dense_range: tuple[int, int]) -> float:
    """Share of overflow: of integers beyond the smallest and largest of the dense range."""
    low, high = dense_range
    return float(((integers < low) | (integers > high)).float().mean())
