"""A Hessian of few tokens, mixed with another that is like it and better known.

With S the mean of w x xᵀ over n tokens and T the other, the mixture (1 − ρ) S + ρ T that is nearest to the true Hessian
in the Frobenius norm has ρ = E‖S − H‖² / E‖S − T‖². The numerator is known from the spread of the summands over the
tokens, the denominator from S and T themselves (O. Ledoit, M. Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", Journal of Multivariate Analysis 88, 2004). So there is no constant to choose.
"""

from torch import Tensor


def shrunk(hessian: Tensor, tokens: int, fourth: float, other: Tensor) -> tuple[Tensor, float]:
    """The mixture and ρ, from 0 to 1.

    hessian: S, float32 [n, n]. fourth: mean of (w |x|²)² over the tokens. other: T, of the same shape.
    """
    if tokens < 2:  # nothing tells how far one token is from the mean
        return other, 1.0
    spread = max(fourth - float(hessian.square().sum()), 0.0) / (tokens - 1)
    distance = float((hessian - other).square().sum())
    share = min(spread / distance, 1.0) if distance > 0 else 0.0
    return hessian.lerp(other, share), share
