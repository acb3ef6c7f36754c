"""x transposed, for the overflow part: it gathers features, and wants those of all tokens side by side.

On GPUs that can (see `Target.overlaps_launches`) the fused kernel starts while this one runs; only its programs for the
overflow part wait for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.unpack import round_to

COLUMNS = 64  # of x, of a program


@triton.jit(do_not_specialize=["m"])
def transpose_kernel(
    x_ptr, xt_ptr, m, k, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr, BACKEND: tl.constexpr
):
    """Transpose [TOKENS, COLUMNS]; tokens from m on are zero.

    x_ptr: [m, k]. xt_ptr: [k, token tiles · TOKENS]. DEPENDENT: the next kernel may start at once, see above.
    Grid: [column tiles, token tiles].
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    store_transposed(x_ptr + tokens * k, tokens < m, xt_ptr, tl.cdiv(m, TOKENS) * TOKENS, tokens, columns, k, BACKEND)


@triton.jit
def store_transposed(x_rows, present, xt_ptr, stride, places, columns, k, BACKEND: tl.constexpr):
    """Some tokens' features at `columns`; tokens that are not present are zero.

    x_rows: pointers [tokens] to the first feature of each. xt_ptr: [k, stride]. places: [tokens], their columns of xt.
    """
    inside = present[:, None] & (columns < k)[None, :]
    x = tl.load(x_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    if x.dtype != xt_ptr.dtype.element_ty:
        x = round_to(x.to(tl.float32), xt_ptr.dtype.element_ty, BACKEND)
    xt_ptrs = xt_ptr + columns[:, None] * stride + places[None, :]
    tl.store(xt_ptrs, tl.trans(x), mask=(columns < k)[:, None])


def transpose(x: Tensor, tokens: int, dtype: torch.dtype, target: Target) -> Tensor:
    """x [m, k] → [k, m rounded up to `tokens`] in `dtype`, padded with zeros."""
    m, k = x.shape
    tiles = -(-m // tokens)
    transposed = x.new_empty(k, tiles * tokens, dtype=dtype)
    transpose_kernel[(-(-k // COLUMNS), tiles)](
        x,
        transposed,
        m,
        k,
        TOKENS=tokens,
        COLUMNS=COLUMNS,
        DEPENDENT=target.overlaps_launches,
        BACKEND=target.backend,
        num_warps=4,
    )
    return transposed
