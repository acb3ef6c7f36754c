"""The target of a linear, corrected for what the quantized linears before it have done.

A linear W of the original model reads x and its output is added to hidden states h, if to any. When its turn comes, the
partly quantized model has x̂ and ĥ instead. The weight that brings W'x̂ + ĥ closest to Wx + h over the calibration
tokens, each counted by its weight w, is a ridge regression with the damping λ of the Hessian H = E[w x̂x̂ᵀ]:

    W + (W E[w (x − x̂) x̂ᵀ] + E[w (h − ĥ) x̂ᵀ]) (H + λI)⁻¹

The cross moments are noisy: a few thousand tokens may tell nothing but noise. So they are taken of two halves of the
tokens. With the inner product S of the two corrections in the metric of H, and their mean square T, the share of their
mean that is no noise is 2S / (S + T) (Spearman-Brown); so much of it is applied. (arXiv 2603.04956, WaterSIC, has both
terms; arXiv 2602.05902, CoreQ, on the share; arXiv 2505.11695, Qronos, and arXiv 2504.02692, GPTAQ, have the first term
at a share of 1.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.offline.capture import Seen
from vllm_babai.offline.errors import QuantizationError
from vllm_babai.offline.factor import Factor

ROWS = 4096


@dataclass(frozen=True)
class Drift:
    """Of two halves of the tokens each: inputs: E[w (x − x̂) x̂ᵀ], float32 [2, in, in]. stream: E[w (h − ĥ) x̂ᵀ], float32
    [2, out, in], or None without an h.
    """

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
        gaps = [wanted.inputs - seen.inputs]
        if seen.stream is not None and wanted.stream is not None:
            gaps.append(wanted.stream - seen.stream)
        right = seen.inputs
        if token_weights is not None:
            right = right * token_weights[seen.window].reshape(-1, 1).to(right.device)
        features, middle = right.shape[1], len(right) // 2
        totals = totals or [right.new_zeros(features, features), *(g.new_zeros(2, g.shape[1], features) for g in gaps)]
        totals[0].addmm_(seen.inputs.T, right)
        for total, gap in zip(totals[1:], gaps, strict=True):
            for half, part in enumerate((slice(0, middle), slice(middle, None))):
                total[half].addmm_(gap[part].T, right[part])
        tokens += len(right)
    if not all(torch.isfinite(total).all() for total in totals):
        raise QuantizationError(f"{linear}: its input activations have NaN or Inf on the calibration text")
    inputs, *stream = (total / (tokens / 2) for total in totals[1:])
    return totals[0] / tokens, Drift(inputs, stream[0] if stream else None)


def corrected(weight: Tensor, factor: Factor, drift: Drift) -> Tensor:
    """The weight [out, in] with the share of its correction that is no noise, float32; factor: of H + λI.

    ROWS rows at a time, as they are alone until the share is known, and their float64 is many times a head's size.
    """
    upper, inputs = factor.unit_upper.double() * factor.pivots.sqrt()[:, None], drift.inputs.double()
    correction = torch.empty_like(weight, dtype=torch.float32)
    common = own = 0.0
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        gaps = weight[rows].double() @ inputs
        if drift.stream is not None:
            gaps += drift.stream[:, rows]
        halves = torch.linalg.solve_triangular(upper.T, gaps[..., factor.order].mT, upper=False)
        common += float((halves[0] * halves[1]).sum())
        own += float(halves.square().sum()) / 2
        correction[rows, factor.order] = torch.linalg.solve_triangular(upper, halves.mean(0), upper=True).T.float()
    return correction.mul_(reliability(common, own)).add_(weight)


def reliability(common: float, own: float) -> float:
    """Share of the mean of two estimates that is not noise, from 0 to 1 (Spearman-Brown); common: their inner product.
    own: mean of their squared norms.
    """
    return min(max(2 * common / max(common + own, 1e-300), 0.0), 1.0)
