"""Activations as the fused kernel takes them: fp16, each token times a power of two of its own.

The values of the code are fp16, and a matrix instruction wants both operands of one type. The largest activation of a
token comes to lie between 2^14 and 2^15, so none overflows, whatever the others are, and what lies 2^29 below it is
still exact to 2^−11: as good as bfloat16 where it counts. `tests/benchmarks/trellis_activations.py` compares.
On GPUs that can (see `Target.overlaps_launches`) the fused kernel starts while this one runs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.trellis.arguments import Sizes

CHUNK = 2048  # columns at a time
WARPS = 8


class Prepared(NamedTuple):
    """What the fused kernel takes beside a layer.

    x: fp16 [m, columns], padded with zeros. factors: fp32 [m], powers of two that undo the scaling. counters: int32,
    zero.
    """

    x: Tensor
    factors: Tensor
    counters: Tensor


@triton.jit(do_not_specialize=["programs", "counters"])
def prepare_kernel(x_ptr, prepared, sizes, programs, counters, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Scale one token, pad it with zeros, and clear some of the arrival counters.

    x_ptr: [m, k]. prepared, sizes: `Prepared`, `Sizes`. programs: m. DEPENDENT: the next kernel may start at once.
    Grid: [m].
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    inside = tl.arange(0, CHUNK)
    for first in range(token * CHUNK, counters, programs * CHUNK):
        tl.store(prepared.counters + first + inside, 0, mask=first + inside < counters)
    x_ptr += token.to(tl.int64) * sizes.k
    largest = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, sizes.k, CHUNK):
        x = tl.load(x_ptr + first + inside, mask=first + inside < sizes.k, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    # biased exponents of fp32; 127 is that of 1, 141 of 2^14, and below 16 a factor would not be a normal number
    exponent = tl.maximum(tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23, 16)
    factor = ((127 + 141 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(prepared.factors + token, ((127 - 141 + exponent) << 23).to(tl.float32, bitcast=True))
    for first in range(0, sizes.columns, CHUNK):
        column = first + inside
        x = tl.load(x_ptr + column, mask=column < sizes.k, other=0.0).to(tl.float32) * factor
        tl.store(
            prepared.x + token.to(tl.int64) * sizes.columns + column, x.to(tl.float16), mask=column < sizes.columns
        )


def prepare(x: Tensor, sizes: Sizes, counters: int, target: Target) -> Prepared:
    """x [m, k] bf16 or fp16 → what the fused kernel takes, with so many counters."""
    m = x.shape[0]
    prepared = Prepared(
        x.new_empty(m, sizes.columns, dtype=torch.float16),
        x.new_empty(m, dtype=torch.float32),
        x.new_empty(counters, dtype=torch.int32),
    )
    prepare_kernel[(m,)](
        x, prepared, sizes, m, counters, CHUNK=CHUNK, DEPENDENT=target.overlaps_launches, num_warps=WARPS
    )
    return prepared
