"""Random mixtures of experts, and what their results are held against."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from interpreted import layout_of, random_weight
from torch import Tensor
from trellis_cases import EVERY, random_trellis

from vllm_babai.format import LatticeWeight, Weight
from vllm_babai.format.trellis.blob import TrellisWeight
from vllm_babai.format.trellis.window import cut_window
from vllm_babai.ops.experts import ExpertTensors, TrellisExperts
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels import (
    experts_layout,
    multiply_experts,
    multiply_trellis_experts,
    trellis_experts_layout,
)


class AnyMixture(Protocol):
    """gate_up [2 · inner, hidden] and down [hidden, inner] of each expert, and the product with them."""

    gate_up: list[Weight]
    down: list[Weight]
    biases: tuple[Tensor, ...]

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor: ...


NO_BIASES = (torch.zeros(1024, 1), torch.zeros(1024, 1))  # of any expert


@dataclass
class Mixture:
    """Dense + sparse."""

    gate_up: list[LatticeWeight]
    down: list[LatticeWeight]
    bits: int
    biases: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[ExpertTensors, list[DeviceLayout]]:
        """For the kernels; and the layouts of every expert's gate_up."""
        first = [layout_of(weight, self.bits) for weight in self.gate_up]
        second = [layout_of(weight, self.bits) for weight in self.down]
        rows = len(self.gate_up[0].integers)
        sizes = (self.bits, self.bits, rows, rows // 2)
        return ExpertTensors(experts_layout(first), experts_layout(second), *sizes, self.biases), first

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return multiply_experts(x, weights, ids, self.tensors()[0], activate)


@dataclass
class TrellisMixture:
    """In the trellis form."""

    gate_up: list[TrellisWeight]
    down: list[TrellisWeight]
    biases: tuple[Tensor, ...] = ()

    def tensors(self) -> TrellisExperts:
        """For the kernels."""
        layouts = []
        for weights in (self.gate_up, self.down):
            rows, columns = weights[0].shape
            windows = [cut_window(weight, slice(0, rows), slice(0, columns)) for weight in weights]
            layouts.append(trellis_experts_layout(windows, torch.device("cpu")))
        rows = self.gate_up[0].shape[0]
        return TrellisExperts(*layouts, len(self.down), rows, rows // 2, self.biases)

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return multiply_trellis_experts(x, weights, ids, self.tensors(), activate)


def random_trellis_experts(number: int, hidden: int, inner: int, bits: tuple[int, ...] = EVERY) -> TrellisMixture:
    """Tiles of any of these bits, other words for each expert."""

    def experts(rows: int, columns: int) -> list[TrellisWeight]:
        weight = random_trellis(rows, columns, bits)
        return [replace(weight, words=np.roll(weight.words, 37 * expert)) for expert in range(number)]

    return TrellisMixture(experts(2 * inner, hidden), experts(hidden, inner))


def random_experts(
    number: int, hidden: int, inner: int, bits: int, groups: int = 1, spreads: tuple[int, ...] = (6,)
) -> Mixture:
    """spreads: of the overflow of one expert after the other."""
    spread = [spreads[expert % len(spreads)] for expert in range(number)]
    gate_up = [random_weight(bits, 2 * inner, hidden, groups, 0.03, spread[e]) for e in range(number)]
    return Mixture(gate_up, [random_weight(bits, hidden, inner, groups, 0.03, spread[e]) for e in range(number)], bits)


def activate(outputs: Tensor) -> Tensor:
    gate, up = outputs.float().chunk(2, 1)
    return (gate * up).to(outputs.dtype)


def check(mixture: AnyMixture, x: Tensor, k: int = 2, elsewhere: float = 0.0) -> None:
    """The result is no further from the float64 one than 1.5 times the same in bf16, from dequantized weights.

    elsewhere: share of visits that belong to no expert here.
    """
    experts = len(mixture.gate_up)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in x]).int()
    ids = torch.where(torch.rand(ids.shape) < elsewhere, -1, ids)
    weights = torch.rand(ids.shape)
    y = mixture.multiply(x, weights, ids)
    exact, rounded = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(2))
    for token, choice in (ids >= 0).nonzero().tolist():
        first, second = (part[ids[token, choice]].dequantize() for part in (mixture.gate_up, mixture.down))
        one, weight = x[token : token + 1], weights[token, choice]
        before, after = (bias[ids[token, choice]] for bias in mixture.biases or NO_BIASES)
        inner = activate(one.double() @ first.double().t() + before).double()
        exact[token] += (inner @ second.double().t() + after)[0] * weight
        inner = activate(one.bfloat16() @ first.bfloat16().t() + before.bfloat16())
        rounded[token] += (inner @ second.bfloat16().t() + after.bfloat16())[0].double() * weight
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.isfinite(y).all()
    tolerance = 1.5 * (rounded.bfloat16().double() - exact).norm() + 1e-30
    assert (y - exact).norm() <= tolerance, f"error {(y - exact).norm():.3e}, allowed {tolerance:.3e}"
