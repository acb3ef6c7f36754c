"""The target of a linear, corrected for what the quantized linears before it have done.

A linear W of the original model reads x and its output is added to hidden states h, if to any. When its turn comes, the
partly quantized model has x̂ and ĥ instead. The weight that brings W'x̂ + ĥ closest to Wx + h over the calibration
tokens, each counted by its weight w, is a ridge regression with the damping λ of the Hessian H = E[w x̂x̂ᵀ]:

    W + (W E[w (x − x̂) x̂ᵀ] + E[w (h − ĥ) x̂ᵀ]) (H + λI)⁻¹

Of this correction only a share is applied: all of it also meets errors that later linears mend, and fits the
calibration text too well. (arXiv 2603.04956, WaterSIC, has both terms; arXiv 2602.05902, CoreQ, on the share; arXiv
2505.11695, Qronos, and arXiv 2504.02692, GPTAQ, have the first term at a share of 1.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.offline.capture import Seen
from vllm_babai.offline.errors import QuantizationError
from vllm_babai.offline.factor import Factor


@dataclass(frozen=True)
class Drift:
    """inputs: E[w (x − x̂) x̂ᵀ], float32 [in, in]. stream: E[w (h − ĥ) x̂ᵀ], float32 [out, in], or None without an h."""

    inputs: Tensor
    stream: Tensor | None


def moments(
    linear: str, quantized: Iterable[Seen], original: Iterable[Seen], token_weights: Tensor | None
) -> tuple[Tensor, Drift]:
    """H = E[w x̂x̂ᵀ], float32 [in, in], and the drift, from what a linear of both models sees of the same batches.

    token_weights: mean 1, [sequences, length]; None: all the same. Raises QuantizationError that names the linear when
    an activation is NaN or Inf.
    """
    totals: list[Tensor] = []
    tokens = 0
    for seen, wanted in zip(quantized, original, strict=True):
        left = [seen.inputs, wanted.inputs - seen.inputs]
        if seen.stream is not None and wanted.stream is not None:
            left.append(wanted.stream - seen.stream)
        right = seen.inputs
        if token_weights is not None:
            right = right * token_weights[seen.window].reshape(-1, 1).to(right.device)
        totals = totals or [right.new_zeros(rows.shape[1], right.shape[1]) for rows in left]
        for total, rows in zip(totals, left, strict=True):
            total.addmm_(rows.T, right)
        tokens += len(right)
    if not all(torch.isfinite(total).all() for total in totals):
        raise QuantizationError(f"{linear}: its input activations have NaN or Inf on the calibration text")
    hessian, inputs, *stream = (total / tokens for total in totals)
    return hessian, Drift(inputs, stream[0] if stream else None)


def corrected(weight: Tensor, factor: Factor, drift: Drift, share: float) -> Tensor:
    """The weight [out, in] with a share of its correction, float32; factor: of H + λI."""
    gap = weight.double() @ drift.inputs.double()
    if drift.stream is not None:
        gap += drift.stream
    upper = factor.unit_upper * factor.pivots.sqrt()[:, None]
    correction = torch.empty_like(gap)
    correction[:, factor.order] = torch.cholesky_solve(gap[:, factor.order].T, upper, upper=True).T
    return (weight.double() + share * correction).float()
