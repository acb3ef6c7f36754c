"""Column steps for HPTQ: water-filling, and where it pays.

With a step s_j for every column the error is Σ s_j² D_j / 12 and the rate Σ log₂(σ_j / s_j). Where every column has
bits to spare, s_j ∝ D_j^(−1/2) is best: the error is then the same in every column (water-filling; arXiv 2603.04956).
At two or three bits some columns have no bits to spare, and half that exponent does better.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.format import step_exponents
from vllm_babai.offline.scales.hptq import draft
from vllm_babai.offline.solver.factor import Factor

# Share of water-filling's exponent. ½ was better than 0 and 1 by the loss of the reference model:
# `python tests/benchmarks/constants.py EXPONENT`.
EXPONENT = 0.5
# Relative decrease of the error below which linears keep one step: serving has to scale the inputs for column steps.
# A choice: no GPU has measured what the scaling costs.
LEAST_GAIN = 0.01


def water_filling(factor: Factor) -> Tensor:
    """Exponents, int16 [n] in the order of the features, of steps ∝ D_j^(−EXPONENT/2); see `format.steps`."""
    steps = torch.empty_like(factor.pivots)
    steps[factor.order] = factor.pivots.clamp_min(torch.finfo(torch.float32).tiny) ** (-EXPONENT / 2)
    return step_exponents(steps)


@dataclass(frozen=True)
class ColumnSteps:
    """Column steps for linears that share an input.

    exponents: int16 [in], see `format.steps`. errors: of each linear at its rate, over that with one step.
    """

    exponents: Tensor
    errors: list[float]


def choose_column_steps(weights: list[Tensor], factor: Factor, rates: list[float], seed: int) -> ColumnSteps | None:
    """Column steps for linears that share an input, if predicted to pay; None where one step is as good.

    The bits of the steps themselves are counted, so linears of few rows keep one step. All linears get the same choice:
    vLLM may fuse them, and then scales one input. weights: [out, n] each. rates: bits per weight of each.
    """
    exponents = water_filling(factor)
    errors = []
    for weight, rate in zip(weights, rates, strict=True):
        basis = weight.float().T[factor.order].contiguous()
        alone, water_filled = (max(draft(basis, factor, rate, seed, e).error, 1e-300) for e in (None, exponents))
        errors.append(water_filled / alone)
    rows = [len(weight) for weight in weights]
    gain = -sum(count * math.log(error) for count, error in zip(rows, errors, strict=True)) / sum(rows)
    return ColumnSteps(exponents, errors) if gain > LEAST_GAIN else None
