"""The end of a mixture of experts: what the experts of a token have found, weighted and added up."""

import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.unpack import round_to

COLUMNS = 512  # of a program; like the warps a choice
WARPS = 1


@triton.jit(do_not_specialize=["k"])
def combine_kernel(found_ptr, weights_ptr, ids_ptr, y_ptr, k, hidden, COLUMNS: tl.constexpr, BACKEND: tl.constexpr):
    """Some columns of one token: its visits in their order, each times its weight, added up in fp32.

    found_ptr: [tokens · k, hidden]. weights_ptr: fp32 [tokens, k]. ids_ptr: int32 [tokens, k]. y_ptr: [tokens, hidden].
    k: visits of a token. Grid: [tokens, column blocks].
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in range(k):
        visit = token * k + choice
        # what belongs to no expert here was never written
        end = tl.where(tl.load(ids_ptr + visit) >= 0, hidden, 0)
        found = tl.load(found_ptr + visit * hidden + columns, mask=columns < end, other=0.0)
        total += found.to(tl.float32) * tl.load(weights_ptr + visit)
    y = round_to(total, y_ptr.dtype.element_ty, BACKEND)
    tl.store(y_ptr + token * hidden + columns, y, mask=columns < hidden)


def combine(found: Tensor, weights: Tensor, ids: Tensor, target: Target) -> Tensor:
    """found [tokens · k, hidden], a row a visit → y [tokens, hidden] in its dtype.

    weights: float32 [tokens, k]. ids: int32 [tokens, k], −1 for visits of which nothing was found. Deterministic.
    """
    (tokens, k), hidden = ids.shape, found.shape[1]
    y = found.new_empty(tokens, hidden)
    combine_kernel[(tokens, -(-hidden // COLUMNS))](
        found, weights, ids, y, k, hidden, COLUMNS=COLUMNS, BACKEND=target.backend, num_warps=WARPS
    )
    return y
