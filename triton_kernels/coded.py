"""GPU backend of `babai::coded_matmul`: few tokens are multiplied while the weight is decoded, many after it is.

The fused kernel gives a segment of the code to a warp, as the decoder does. Lanes decode neighbouring columns; each
sums its own products, and the lanes are added up at the end of a row. Segments side by side write partial sums that
PyTorch adds in a fixed order: no atomics, the same result every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.coded import CodedTensors, multiply_decoded
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.entropy import WARP, decode, decode_step, load_segment

MAX_TOKENS = 4  # of the fused kernel: what a lane loads at once
COMPILED_FOR = (1, 2, MAX_TOKENS, MAX_TOKENS + 1)


def multiply_coded(x: Tensor, coded: CodedTensors) -> Tensor:
    """x [..., in_features] bf16, fp16 or fp32 → x Wᵀ [..., out_features] in x's dtype; accumulates in fp32."""
    tokens = x.reshape(-1, x.shape[-1])
    if not 0 < len(tokens) <= MAX_TOKENS:
        return multiply_decoded(x, coded, decode)
    return _multiply_fused(tokens, coded).to(x.dtype).view(*x.shape[:-1], -1)


def warm_up_coded(coded: CodedTensors, in_features: int, dtype: torch.dtype) -> None:
    """Launch every kernel that `multiply_coded` may choose for this layer once: nothing compiles while serving."""
    for tokens in COMPILED_FOR:
        multiply_coded(torch.zeros(tokens, in_features, dtype=dtype, device=coded.words.device), coded)


def _multiply_fused(x: Tensor, coded: CodedTensors) -> Tensor:
    """x [m ≤ MAX_TOKENS, columns] → fp32 [m, rows]."""
    rows, columns = len(coded.row_class), x.shape[1]
    tokens, groups = triton.next_power_of_2(len(x)), coded.scales.shape[1]
    by_column = torch.nn.functional.pad(x.float(), (0, 0, 0, tokens - len(x))).t().contiguous()
    partial = torch.zeros(coded.across, rows, tokens, dtype=torch.float32, device=x.device)
    multiply_kernel[(len(coded.segments),)](
        *coded.tensors,
        by_column,
        partial,
        rows,
        columns,
        groups,
        columns // groups,
        TOKENS=tokens,
        GROUPED=groups > 1,
        BACKEND=Target.of(x.device).backend,
        num_warps=1,
    )
    return partial.sum(0)[:, : len(x)].t()


@triton.jit(do_not_specialize=["groups", "group_size"])
def multiply_kernel(
    words_ptr,
    segments_ptr,
    states_ptr,
    row_class_ptr,
    column_class_ptr,
    table_ptr,
    scales_ptr,
    x_ptr,  # [columns, TOKENS]
    partial_ptr,  # [segments side by side, rows, TOKENS]
    all_rows,
    columns,
    groups,
    group_size,
    TOKENS: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Decode one segment and multiply it with its columns of x."""
    stream, state, rows, tile, code = load_segment(words_ptr, segments_ptr, states_ptr, tl.program_id(0))
    lane = tl.arange(0, WARP)
    token = tl.arange(0, TOKENS)
    position = tl.zeros_like(lane)
    for row in range(rows[0], rows[1]):
        row_class = tl.load(row_class_ptr + row).to(tl.int32)
        total = tl.zeros((WARP, TOKENS), tl.float32)
        for start in range(0, tile[1], code[0]):
            inside = lane < tl.minimum(tile[1] - start, code[0])
            context = row_class + tl.load(column_class_ptr + tile[2] + start + lane, mask=inside, other=0).to(tl.int32)
            integer, state, position = decode_step(
                stream, state, position, table_ptr, context, inside, lane, code, BACKEND
            )
            column = tile[0] + start + lane
            held = inside & (column >= 0) & (column < columns)
            value = integer.to(tl.float32)
            if GROUPED:
                value *= tl.load(scales_ptr + row * groups + column // group_size, mask=held, other=0.0)
            x = tl.load(x_ptr + column[:, None] * TOKENS + token[None, :], mask=held[:, None], other=0.0)
            total += value[:, None] * x
        y = tl.sum(total, 0)
        if not GROUPED:
            y *= tl.load(scales_ptr + row * groups)
        tl.store(partial_ptr + (tile[3] * all_rows + row) * TOKENS + token, y)
