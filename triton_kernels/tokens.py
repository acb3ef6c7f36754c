"""The tokens of a call, whatever form the weight has: what kernels take at a time, and what the rest goes through."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_babai.triton_kernels.configs import BUCKETS, Target, table_for
from vllm_babai.triton_kernels.layout import MAX_M_TILES

ALIGNMENT = 16  # bytes; Triton compiles a kernel again for a pointer that is less aligned
SMALLEST_DOT = {"cuda": 8, "hip": 16, "interpreter": 8}  # tokens that a matrix instruction takes at least


def aligned(x: Tensor) -> Tensor:
    """x [..., in_features] as kernels take it, [tokens, in_features]: one after the other from an aligned address."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    return tokens.clone() if tokens.data_ptr() % ALIGNMENT else tokens


def goes_dequantized(m: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether a product with `m` tokens goes through the dequantized weight, and not through a fused kernel."""
    return m >= table_for(target).dequantize_from or m > MAX_M_TILES * BUCKETS[-1] or dtype == torch.float32


def warm_up_sizes(target: Target) -> tuple[int, ...]:
    """Numbers of tokens that make use of every kernel there is for a layer."""
    return *BUCKETS, BUCKETS[-1] + 1, table_for(target).dequantize_from


def multiply_parts(x: Tensor, out_features: int, parts: Callable[[torch.dtype], Iterator[Tensor]]) -> Tensor:
    """x [m, in_features] bf16, fp16 or fp32 → y [m, out_features] in x's dtype, by the vendor's library.

    parts(dtype): the weight in that dtype, some rows after the other. fp16 goes through bf16: fp16 has no room for
    small scales times large integers.
    """
    compute = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
    inputs = x.to(compute)
    y = inputs.new_empty(x.shape[0], out_features)
    first = 0
    for part in parts(compute):
        torch.mm(inputs, part.t(), out=y[:, first : first + len(part)])
        first += len(part)
    return y.to(x.dtype)
