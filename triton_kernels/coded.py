"""GPU backend of `babai::coded_matmul`: few tokens are multiplied while the weight is decoded, many after it is.

The fused kernel gives a segment of the code to a warp, as the decoder does. Lanes decode neighbouring columns; each
sums its own products, and the lanes are added up at the end of a row. Segments side by side write partial sums that
PyTorch adds in a fixed order: no atomics, the same result every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.coded import CodedTensors, multiply_decoded
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.entropy import WARP, Streams, decode, decode_step, load_segment, load_states

MAX_TOKENS = 4  # of the fused kernel: what a lane loads at once
COMPILED_FOR = (1, 2, MAX_TOKENS, MAX_TOKENS + 1)


class Shape(NamedTuple):
    """Sizes of a coded matrix, or of the window of it that is held."""

    rows: int
    columns: int


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
        Streams(*coded.tensors),
        by_column,
        partial,
        Shape(rows, columns),
        groups,
        TOKENS=tokens,
        GROUPED=groups > 1,
        BACKEND=Target.of(x.device).backend,
        num_warps=1,
    )
    return partial.sum(0)[:, : len(x)].t().contiguous()


@triton.jit(do_not_specialize=["groups"])
def multiply_kernel(
    streams,
    x_ptr,
    partial_ptr,
    shape,
    groups,
    TOKENS: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Decode one segment and multiply it with its columns of x.

    streams: `Streams`. x_ptr: fp32 [columns, TOKENS]. partial_ptr: fp32 [segments side by side, rows, TOKENS], of which
    a segment writes its own rows. shape: `Shape`. groups: scales of a row. Grid: [segments].
    """
    segment = load_segment(streams, tl.program_id(0))
    state = load_states(streams, tl.program_id(0))
    lane = tl.arange(0, WARP)
    token = tl.arange(0, TOKENS)
    position = tl.zeros_like(lane)
    group_size = shape.columns // groups
    for row in range(segment.first_row, segment.last_row):
        row_class = tl.load(streams.row_class + row).to(tl.int32)
        total = tl.zeros((WARP, TOKENS), tl.float32)
        for start in range(0, segment.columns, segment.lanes):
            inside = lane < tl.minimum(segment.columns - start, segment.lanes)
            class_ptrs = streams.column_class + segment.classes + start + lane
            context = row_class + tl.load(class_ptrs, mask=inside, other=0).to(tl.int32)
            integer, state, position = decode_step(segment, state, position, streams.table, context, inside, BACKEND)
            column = segment.column + start + lane
            held = inside & (column >= 0) & (column < shape.columns)
            value = integer.to(tl.float32)
            if GROUPED:
                value *= tl.load(streams.scales + row * groups + column // group_size, mask=held, other=0.0)
            x = tl.load(x_ptr + column[:, None] * TOKENS + token[None, :], mask=held[:, None], other=0.0)
            total += value[:, None] * x
        y = tl.sum(total, 0)
        if not GROUPED:
            y *= tl.load(streams.scales + row * groups)
        tl.store(partial_ptr + (segment.left * shape.rows + row) * TOKENS + token, y)
