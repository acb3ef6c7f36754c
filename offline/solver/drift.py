"""Drift: the target of a linear, corrected for the errors of the quantized linears before it.

In the original model a linear W reads x, and its output may be added to hidden states h. In the partly quantized model
it reads x̂ and meets ĥ instead. The weight that brings W'x̂ + ĥ closest to Wx + h over the calibration tokens, each
counted by its weight w, is a ridge regression with the damping λ of the Hessian H = E[w x̂x̂ᵀ]:

    W + (W E[w (x − x̂) x̂ᵀ] + E[w (h − ĥ) x̂ᵀ]) (H + λI)⁻¹

The cross moments are noisy: those of a few thousand tokens may hold nothing but noise. So they are measured on two
halves of the tokens. With the inner product S of the two corrections in the metric of H, and their mean square T, the
share of their mean that is not noise is 2S / (S + T) (Spearman-Brown); that share of it is applied.

Sources: arXiv 2603.04956 (WaterSIC) has both terms; arXiv 2602.05902 (CoreQ) has the share; arXiv 2505.11695 (Qronos)
and arXiv 2504.02692 (GPTAQ) have the first term at a share of 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.offline.solver.factor import Factor

# Rows of the weight that are corrected at a time. Their float64 intermediates are many times a head's size; results do
# not depend on it. A choice: 4096 rows of 4096 columns take 128 MiB for each of the two halves.
ROWS = 4096


@dataclass(frozen=True)
class Drift:
    """Cross moments of two halves of the tokens.

    inputs: E[w (x − x̂) x̂ᵀ], float32 [2, in, in].
    stream: E[w (h − ĥ) x̂ᵀ], float32 [2, out, in]; None where the output is not added to hidden states.
    """

    inputs: Tensor
    stream: Tensor | None

    def of_share(self, share: float) -> "Drift":
        """The drift by inputs where these tokens are a share of the Hessian, and of the other tokens none is known."""
        return Drift(share * self.inputs, self.stream)


def corrected(weight: Tensor, factor: Factor, drift: Drift) -> Tensor:
    """The weight [out, in] plus the share of its correction that is not noise, float32; factor: of H + λI.

    Rows are independent until the share is known, so ROWS of them are corrected at a time.
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
