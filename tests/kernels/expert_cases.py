"""Random mixtures of experts, and what their results are held against."""

from dataclasses import dataclass

import torch
from interpreted import layout_of, random_weight
from torch import Tensor

from vllm_babai.format import LatticeWeight
from vllm_babai.ops.experts import ExpertTensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels import experts_layout, multiply_experts

NO_BIASES = (torch.zeros(1024, 1), torch.zeros(1024, 1))  # of any expert


@dataclass
class Mixture:
    """gate_up [2 · inner, hidden] and down [hidden, inner] of each expert."""

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


def check(mixture: Mixture, x: Tensor, k: int = 2, elsewhere: float = 0.0) -> None:
    """The result is no further from the float64 one than 1.5 times the same in bf16, from dequantized weights.

    elsewhere: share of visits that belong to no expert here.
    """
    experts = len(mixture.gate_up)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in x]).int()
    ids = torch.where(torch.rand(ids.shape) < elsewhere, -1, ids)
    weights = torch.rand(ids.shape)
    y = multiply_experts(x, weights, ids, mixture.tensors()[0], activate)
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
