"""y = x Wᵀ for many tokens: the weight is dequantized to a workspace, then multiplied by the vendor's library.

Two launches write a workspace [rows, in_features]: the dense part, then the overflow over it. It holds all rows of most
linears; very large ones, an lm_head say, are multiplied in parts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.format import integer_range
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.layout import TILE_ROWS, Geometry
from vllm_babai.triton_kernels.overflow import load_entry
from vllm_babai.triton_kernels.unpack import load_words, round_to, unpack_slot

WORKSPACE = 1 << 27  # weights


@triton.jit(do_not_specialize=["first_tile"])
def dense_kernel(
    dense_ptr,
    scales_ptr,
    weight_ptr,  # [rows from tile `first_tile` on, k]
    first_tile,
    n,
    k,
    padded_rows,
    column_blocks,
    group_size,
    BITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Dequantize one column block of one row tile; row n is the first that there is not."""
    WORDS: tl.constexpr = BLOCK_COLUMNS * BITS // 512
    tile_rows = tl.arange(0, 64)
    block = tl.program_id(0)
    row_tile = first_tile + tl.program_id(1)
    rows = row_tile * 64 + tile_rows
    tile = row_tile * column_blocks + block
    words = load_words(
        dense_ptr + tile * (WORDS * 1024) + tile_rows[:, None] * 16 + tl.arange(0, 16)[None, :], WORDS, 1024
    )
    row_ptrs = weight_ptr + (tl.program_id(1) * 64 + tile_rows).to(tl.int64)[:, None] * k
    for slot in tl.static_range(BLOCK_COLUMNS // 32):
        column = block * BLOCK_COLUMNS + slot * 32
        group = tl.minimum(column, k - 1) // group_size if GROUPED else 0  # padding has no group of its own
        scale = tl.load(scales_ptr + group * padded_rows + rows).to(tl.float32)
        value = unpack_slot(words, slot, BITS, tl.bfloat16, BACKEND).to(tl.float32) * scale[:, None]
        columns = column + tl.arange(0, 32)[None, :]
        value = round_to(value, weight_ptr.dtype.element_ty, BACKEND)
        tl.store(row_ptrs + columns, value, mask=(rows[:, None] < n) & (columns < k))


@triton.jit(do_not_specialize=["first_tile"])
def overflow_kernel(
    scales_ptr,
    entries_ptr,
    starts_ptr,
    weight_ptr,  # [rows from tile `first_tile` on, k]
    first_tile,
    k,
    padded_rows,
    group_size,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Write the overflowing weights of one segment of a row tile; a row belongs to one thread, entry after entry.

    An entry says by its sign at which end of the dense range the weight lies; further entries of the column add to it.
    """
    segment = tl.program_id(1)
    tile_rows = tl.arange(0, 64)
    rows = (first_tile + tl.program_id(0)) * 64 + tile_rows
    index = tl.load(starts_ptr + segment * padded_rows + rows)
    end = tl.load(starts_ptr + segment * padded_rows + rows + 1)
    row_ptrs = weight_ptr + (tl.program_id(0) * 64 + tile_rows).to(tl.int64) * k
    previous = tl.full((64,), -1, tl.int32)
    total = tl.zeros((64,), tl.int32)
    for _ in range(tl.max(end - index, 0)):
        inside = index < end
        excess, column = load_entry(entries_ptr, index, inside, segment)
        total = tl.where(column == previous, total, tl.where(excess > 0, HIGH, LOW)) + excess
        group = column // group_size if GROUPED else 0
        scale = tl.load(scales_ptr + group * padded_rows + rows, mask=inside, other=0.0).to(tl.float32)
        value = round_to(total.to(tl.float32) * scale, weight_ptr.dtype.element_ty, BACKEND)
        tl.store(row_ptrs + column, value, mask=inside)
        previous = column
        index += 1


def dequantize(layout: DeviceLayout, geometry: Geometry, dtype: torch.dtype, backend: str) -> Tensor:
    """The weight S ∘ Z [out_features, in_features], rounded once to bf16 or exact in fp32."""
    return torch.cat(list(dequantized_parts(layout, geometry, dtype, backend)))


def dequantized_parts(layout: DeviceLayout, geometry: Geometry, dtype: torch.dtype, backend: str) -> Iterator[Tensor]:
    """The weight as `dequantize` makes it, in parts [rows, in_features] of WORKSPACE weights at most, or of a tile."""
    n, k = geometry.out_features, geometry.in_features
    groups = layout.scales.shape[0]
    tiles = -(-n // TILE_ROWS)
    step = max(1, WORKSPACE // (TILE_ROWS * k))
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        weight = torch.empty(min(n - first * TILE_ROWS, count * TILE_ROWS), k, dtype=dtype, device=layout.dense.device)
        dense_kernel[(geometry.column_blocks, count)](
            layout.dense,
            layout.scales,
            weight,
            first,
            n,
            k,
            geometry.padded_rows,
            geometry.column_blocks,
            k // groups,
            BITS=geometry.bits,
            BLOCK_COLUMNS=geometry.block_columns,
            GROUPED=groups > 1,
            BACKEND=backend,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if layout.entries.numel():
            low, high = integer_range(geometry.bits)
            overflow_kernel[(count, geometry.segments)](
                layout.scales,
                layout.entries,
                layout.offsets[geometry.starts :],
                weight,
                first,
                k,
                geometry.padded_rows,
                k // groups,
                LOW=low,
                HIGH=high,
                GROUPED=groups > 1,
                BACKEND=backend,
                num_warps=2,
                enable_fp_fusion=True,
            )
        yield weight


def multiply_dequantized(x: Tensor, layout: DeviceLayout, geometry: Geometry, backend: str) -> Tensor:
    """x [m, in_features] bf16, fp16 or fp32 → y [m, out_features] in x's dtype.

    fp16 goes through bf16: fp16 has no room for small scales times large integers.
    """
    compute = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
    inputs = x.to(compute)
    parts = [torch.mm(inputs, part.t()) for part in dequantized_parts(layout, geometry, compute, backend)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(x.dtype)
