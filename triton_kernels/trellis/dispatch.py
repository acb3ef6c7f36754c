"""Which kernel multiplies with a trellis: the entry of the custom op, and the warm-up that spares serving compiling."""

import torch
from torch import Tensor

from vllm_babai.ops.trellis import TrellisTensors, check_sizes
from vllm_babai.triton_kernels.configs import Target, bucket
from vllm_babai.triton_kernels.tokens import aligned, goes_dequantized, warm_up_sizes
from vllm_babai.triton_kernels.trellis.arguments import STARTS
from vllm_babai.triton_kernels.trellis.dequantize import multiply_dequantized
from vllm_babai.triton_kernels.trellis.fused import multiply_fused


def multiply_trellis(x: Tensor, trellis: TrellisTensors) -> Tensor:
    """x [..., in_features] bf16, fp16 or fp32 → x Wᵀ [..., out_features] in x's dtype.

    Accumulates in fp32; deterministic. Raises ValueError when the tensors do not fit each other, or x.
    """
    check_sizes(x, trellis, starts=(len(trellis.starts), STARTS))
    return _multiply(aligned(x), trellis).view(*x.shape[:-1], trellis.out_features)


def _multiply(x: Tensor, trellis: TrellisTensors) -> Tensor:
    m = x.shape[0]
    if m == 0:
        return x.new_empty(0, trellis.out_features)
    target = Target.of(x.device)
    if goes_dequantized(m, x.dtype, target):
        return multiply_dequantized(x, trellis, target.backend)
    return multiply_fused(x, trellis, bucket(m), target)


def warm_up_trellis(trellis: TrellisTensors, in_features: int, dtype: torch.dtype) -> None:
    """Launch every kernel that `multiply_trellis` may choose for this layer once: nothing compiles while serving."""
    for m in warm_up_sizes(Target.of(trellis.words.device)):
        multiply_trellis(torch.zeros(m, in_features, dtype=dtype, device=trellis.words.device), trellis)
