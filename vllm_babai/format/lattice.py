"""The lattice point that a quantized linear layer is: integers Z and scales S, with W ≈ S ∘ Z."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_INTEGER = 2**15 - 1


@dataclass(frozen=True)
class LatticeWeight:
    """Integers and scales of one linear layer; every format stores exactly this pair.

    integers: int16 [out_features, in_features], |z| ≤ 2¹⁵ − 1.
    scales: bfloat16 [rows, groups]; rows is out_features, or 1 when one scale serves the whole matrix, and groups
        divides in_features into equal runs of consecutive input features.
    """

    integers: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        out_features, in_features = self.integers.shape
        rows, groups = self.scales.shape
        if self.integers.dtype != torch.int16 or self.scales.dtype != torch.bfloat16:
            raise TypeError(f"need int16 integers and bfloat16 scales, got {self.integers.dtype}, {self.scales.dtype}")
        if rows not in (1, out_features) or groups < 1 or in_features % groups:
            raise ValueError(f"scales {tuple(self.scales.shape)} do not divide integers {tuple(self.integers.shape)}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S ∘ Z as a dense matrix [out_features, in_features]; exact in float32."""
        groups = self.scales.shape[1]
        grouped = self.integers.unflatten(1, (groups, -1)).float() * self.scales.float().unsqueeze(-1)
        return grouped.flatten(1).to(dtype)


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer that `bits` dense bits hold: −2^(bits−1) … 2^(bits−1) − 1."""
    half = 1 << (bits - 1)
    return -half, half - 1
