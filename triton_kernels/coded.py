"""GPU backend of `babai::coded_matmul`: few tokens are multiplied while the weight is decoded, many after it is.

The fused kernel gives a tile of the code to a warp, as the decoder does. Lanes decode neighbouring columns; each sums
its own products, and the lanes are added up at the end of a row. Tiles side by side write partial sums that PyTorch
adds in a fixed order: no atomics, the same result every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.coded import CodedTensors, multiply_decoded
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.entropy import decode, decode_step, first_state

MAX_TOKENS = 4  # of the fused kernel: what a lane loads at once


def multiply_coded(x: Tensor, coded: CodedTensors) -> Tensor:
    """x [..., in_features] bf16, fp16 or fp32 → x Wᵀ [..., out_features] in x's dtype; accumulates in fp32."""
    tokens = x.reshape(-1, x.shape[-1])
    if not 0 < len(tokens) <= MAX_TOKENS:
        return multiply_decoded(x, coded, decode)
    return _multiply_fused(tokens, coded).to(x.dtype).view(*x.shape[:-1], -1)


def _multiply_fused(x: Tensor, coded: CodedTensors) -> Tensor:
    """x [m ≤ MAX_TOKENS, columns] → fp32 [m, rows]."""
    rows, columns = len(coded.row_class), len(coded.column_class)
    tokens = triton.next_power_of_2(len(x))
    by_column = torch.nn.functional.pad(x.float(), (0, 0, 0, tokens - len(x))).t().contiguous()
    partial = torch.empty(triton.cdiv(columns, coded.tile_columns), rows, tokens, dtype=torch.float32, device=x.device)
    scale_rows, groups = coded.scales.shape
    multiply_kernel[(len(coded.ends),)](
        coded.words,
        coded.ends,
        coded.row_class,
        coded.column_class,
        coded.table,
        coded.scales,
        by_column,
        partial,
        rows,
        columns,
        coded.tile_rows,
        coded.tile_columns,
        groups if scale_rows > 1 else 0,
        columns // groups,
        coded.offset,
        SHIFT=coded.shift,
        LANES=coded.lanes,
        TOKENS=tokens,
        GROUPED=groups > 1,
        BACKEND=Target.of(x.device).backend,
        num_warps=1,
    )
    return partial.sum(0)[:, : len(x)].t()


@triton.jit(do_not_specialize=["scale_stride", "group_size", "offset"])
def multiply_kernel(
    words_ptr,
    ends_ptr,
    row_class_ptr,
    column_class_ptr,
    table_ptr,
    scales_ptr,
    x_ptr,  # [columns, TOKENS]
    partial_ptr,  # [tiles across, rows, TOKENS]
    rows,
    columns,
    tile_rows,
    tile_columns,
    scale_stride,
    group_size,
    offset,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Decode one tile and multiply it with its columns of x."""
    tile = tl.program_id(0)
    across = tl.cdiv(columns, tile_columns)
    row_start = tile // across * tile_rows
    column_start = tile % across * tile_columns
    row_stop = tl.minimum(row_start + tile_rows, rows)
    column_stop = tl.minimum(column_start + tile_columns, columns)
    lane = tl.arange(0, LANES)
    token = tl.arange(0, TOKENS)
    stream = words_ptr + tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)
    state, position = first_state(stream, lane, LANES)
    for row in range(row_start, row_stop):
        row_class = tl.load(row_class_ptr + row).to(tl.int32)
        total = tl.zeros((LANES, TOKENS), tl.float32)
        for start in range(column_start, column_stop, LANES):
            column = start + lane
            inside = column < column_stop
            context = row_class + tl.load(column_class_ptr + column, mask=inside, other=0).to(tl.int32)
            integer, state, position = decode_step(
                stream, state, position, table_ptr, context, inside, lane, offset, SHIFT, LANES, BACKEND
            )
            value = integer.to(tl.float32)
            if GROUPED:
                value *= tl.load(scales_ptr + row * scale_stride + column // group_size, mask=inside, other=0.0)
            x = tl.load(x_ptr + column[:, None] * TOKENS + token[None, :], mask=inside[:, None], other=0.0)
            total += value[:, None] * x
        y = tl.sum(total, 0)
        if not GROUPED:
            y *= tl.load(scales_ptr + row * scale_stride)
        tl.store(partial_ptr + (tile % across * rows + row) * TOKENS + token, y)
