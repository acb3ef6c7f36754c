"""y = x Wᵀ for many tokens: the weight is dequantized to a workspace, then multiplied by the vendor's library.

Two launches write a workspace [rows, in_features]: the dense part, then the overflow over it. It holds all rows of most
linears; very large ones, an lm_head say, are multiplied in parts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.format import integer_range
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.arguments import UNITS, arguments
from vllm_babai.triton_kernels.layout import ROW_ALIGNMENT, TILE_ROWS, Geometry
from vllm_babai.triton_kernels.overflow import load_entry
from vllm_babai.triton_kernels.tokens import multiply_parts
from vllm_babai.triton_kernels.unpack import load_words, round_to, unpack_slot

WORKSPACE = 1 << 27  # weights


class Form(NamedTuple):
    """Compile-time constants of both kernels.

    bits: of a weight in the dense part. low, high: ends of the dense range. block_columns, words: of a column block.
    grouped: a row has several scales. backend: of `Target`.
    """

    bits: int
    low: int
    high: int
    block_columns: int
    words: int
    grouped: bool
    backend: str


@triton.jit(do_not_specialize=["first_tile"])
def dense_kernel(layer, weight_ptr, first_tile, sizes, FORM: tl.constexpr):
    """Dequantize one column block of one row tile.

    layer: `Layer`. sizes: `Sizes`. weight_ptr: [rows from row tile `first_tile` on, k].
    Grid: [column blocks, row tiles].
    """
    WORDS: tl.constexpr = FORM.words
    ROWS: tl.constexpr = UNITS.value.tile_rows
    PAIRS: tl.constexpr = UNITS.value.pairs
    TILE_WORDS: tl.constexpr = ROWS * PAIRS
    BLOCK_COLUMNS: tl.constexpr = FORM.block_columns
    tile_rows = tl.arange(0, ROWS)
    block = tl.program_id(0)
    row_tile = first_tile + tl.program_id(1)
    rows = row_tile * ROWS + tile_rows
    tile = row_tile * tl.cdiv(sizes.k, BLOCK_COLUMNS) + block
    word_ptrs = layer.dense + tile * (WORDS * TILE_WORDS) + tile_rows[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    words = load_words(word_ptrs, WORDS, TILE_WORDS)
    row_ptrs = weight_ptr + (tl.program_id(1) * ROWS + tile_rows).to(tl.int64) * sizes.k
    write_block(layer, words, row_ptrs, rows, rows < sizes.n, block, sizes, FORM)


@triton.jit
def write_block(layer, words, row_ptrs, rows, inside, block, sizes, FORM: tl.constexpr):
    """Dequantize one column block of the layer's `rows` and store those that are `inside`, each at its pointer.

    words: of the rows, as `load_words` gives them.
    """
    COLUMNS: tl.constexpr = UNITS.value.slot
    BLOCK_COLUMNS: tl.constexpr = FORM.block_columns
    for slot in tl.static_range(BLOCK_COLUMNS // COLUMNS):
        column = block * BLOCK_COLUMNS + slot * COLUMNS
        # padding has no group of its own
        group = tl.minimum(column, sizes.k - 1) // sizes.group_size if FORM.grouped else 0
        scale = tl.load(layer.scales + group * sizes.padded_rows + rows).to(tl.float32)
        value = unpack_slot(words, slot, FORM.bits, tl.bfloat16, FORM.backend).to(tl.float32) * scale[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        value = round_to(value, row_ptrs.dtype.element_ty, FORM.backend)
        tl.store(row_ptrs[:, None] + columns, value, mask=inside[:, None] & (columns < sizes.k))


@triton.jit(do_not_specialize=["first_tile"])
def overflow_kernel(layer, weight_ptr, first_tile, sizes, FORM: tl.constexpr):
    """Write the overflowing weights of one panel of a row tile.

    Arguments as of `dense_kernel`. Grid: [row tiles, panels].
    """
    ROWS: tl.constexpr = UNITS.value.tile_rows
    panel = tl.program_id(1)
    tile_rows = tl.arange(0, ROWS)
    rows = (first_tile + tl.program_id(0)) * ROWS + tile_rows
    row_ptrs = weight_ptr + (tl.program_id(0) * ROWS + tile_rows).to(tl.int64) * sizes.k
    end = tl.load(layer.starts + panel * sizes.padded_rows + rows + 1)
    write_entries(layer, row_ptrs, rows, end, panel, sizes, FORM)


@triton.jit
def write_entries(layer, row_ptrs, rows, end, panel, sizes, FORM: tl.constexpr):
    """Write the overflowing weights of one panel of the layer's `rows`, each at its pointer, before the entry `end`.

    A row belongs to one thread, entry after entry. An entry says by its sign at which end of the dense range the weight
    lies; further entries of the column add to it.
    """
    index = tl.load(layer.starts + panel * sizes.padded_rows + rows)
    previous = tl.full(rows.shape, -1, tl.int32)
    total = tl.zeros(rows.shape, tl.int32)
    for _ in range(tl.max(end - index, 0)):
        inside = index < end
        excess, column = load_entry(layer.entries, index, inside, panel)
        total = tl.where(column == previous, total, tl.where(excess > 0, FORM.high, FORM.low)) + excess
        group = column // sizes.group_size if FORM.grouped else 0
        scale = tl.load(layer.scales + group * sizes.padded_rows + rows, mask=inside, other=0.0).to(tl.float32)
        value = round_to(total.to(tl.float32) * scale, row_ptrs.dtype.element_ty, FORM.backend)
        tl.store(row_ptrs + column, value, mask=inside)
        previous = column
        index += 1


def dequantize_form(geometry: Geometry, groups: int, backend: str) -> Form:
    """Compile-time constants for a layer of `groups` scales a row."""
    low, high = integer_range(geometry.bits)
    return Form(geometry.bits, low, high, geometry.block_columns, geometry.words, groups > 1, backend)


def dequantize(layout: DeviceLayout, geometry: Geometry, dtype: torch.dtype, backend: str) -> Tensor:
    """The weight S ∘ Z [out_features, in_features], rounded once to bf16 or exact in fp32."""
    return torch.cat(list(dequantized_parts(layout, geometry, dtype, backend)))


def dequantized_parts(layout: DeviceLayout, geometry: Geometry, dtype: torch.dtype, backend: str) -> Iterator[Tensor]:
    """The weight as `dequantize` makes it, in parts [rows, in_features] of WORKSPACE weights at most.

    All but the last have a multiple of ROW_ALIGNMENT rows, and so many at least.
    """
    layer, sizes = arguments(layout, geometry)
    form = dequantize_form(geometry, len(layout.scales), backend)
    tiles = -(-sizes.n // TILE_ROWS)
    step = max(1, WORKSPACE // (ROW_ALIGNMENT * sizes.k)) * (ROW_ALIGNMENT // TILE_ROWS)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        rows = min(sizes.n - first * TILE_ROWS, count * TILE_ROWS)
        weight = torch.empty(rows, sizes.k, dtype=dtype, device=layout.dense.device)
        dense_kernel[(geometry.column_blocks, count)](
            layer, weight, first, sizes, FORM=form, num_warps=4, enable_fp_fusion=True
        )
        if layout.entries.numel():
            overflow_kernel[(count, geometry.panels)](
                layer, weight, first, sizes, FORM=form, num_warps=2, enable_fp_fusion=True
            )
        yield weight


def multiply_dequantized(x: Tensor, layout: DeviceLayout, geometry: Geometry, backend: str) -> Tensor:
    """See `tokens.multiply_parts`."""
    return multiply_parts(x, geometry.out_features, lambda dtype: dequantized_parts(layout, geometry, dtype, backend))
