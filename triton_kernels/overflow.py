"""The overflow part of the fused kernel: what a tile's rows have beyond the dense range in one panel of columns."""

import triton
import triton.language as tl

from vllm_babai.triton_kernels.arguments import UNITS
from vllm_babai.triton_kernels.unpack import matrix_product, round_to


@triton.jit
def overflow_sum(layer, x_ptr, sizes, panel, rows, GROUPED: tl.constexpr, STEP: tl.constexpr):
    """One token's sum over the entries of every row of a tile, fp32 [rows, 1]; scaled if a row has several scales.

    x_ptr: [k]. rows: int32 [rows]. STEP: entries of a row that are read at a time.
    """
    first = panel * sizes.padded_rows + rows
    index = tl.load(layer.starts + first)
    end = tl.load(layer.starts + first + 1)
    longest = tl.max(end - index, 0)
    index = index[:, None] + tl.arange(0, STEP)[None, :]
    end = end[:, None]
    products = tl.zeros(index.shape, tl.float32)
    for step in range(0, longest, STEP):
        value, column = _entry(layer, sizes, panel, rows[:, None], index + step, end, GROUPED)
        x = tl.load(x_ptr + column, mask=index + step < end, other=0.0, eviction_policy="evict_last")
        products += value * x.to(tl.float32)
    return tl.sum(products, 1)[:, None]


@triton.jit
def overflow_product(layer, xt_ptr, token_stride, sizes, panel, first_row, first_token, TILING: tl.constexpr):
    """Several tokens' sums over the entries of every row of a tile, fp32 [ROWS, TOKENS]; scaled if a row has several.

    xt_ptr: [k, token_stride], x transposed. TILING: see `fused.Tiling`.
    STEP entries of each of 16 rows are the blocks of a block-diagonal matrix [16, 16 · STEP], which a matrix
    instruction multiplies with the features at their columns [16 · STEP, TOKENS]. `layer.diagonal` has the mask that
    blanks the other blocks: what is loaded, unlike what is computed, Triton brings straight into the layout of an
    operand, without going through shared memory. An infinite feature makes its token's sums NaN.
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.overflow_tokens
    STEP: tl.constexpr = TILING.overflow_step
    GROUPED: tl.constexpr = TILING.flush > 0
    BACKEND: tl.constexpr = TILING.backend
    DIAGONAL: tl.constexpr = UNITS.value.diagonal
    BLOCKS: tl.constexpr = ROWS // DIAGONAL
    PAIRS: tl.constexpr = STEP // 2  # of entries, of a row
    place = tl.arange(0, DIAGONAL * PAIRS)
    row_in_block = (place // PAIRS)[None, :]
    rows = first_row + tl.arange(0, BLOCKS)[:, None] * DIAGONAL + row_in_block
    first = panel * sizes.padded_rows + rows
    index = tl.load(layer.starts + first)
    end = tl.load(layer.starts + first + 1)
    longest = tl.max(tl.max(end - index, 1), 0)
    index += (place % PAIRS)[None, :]
    mask = tl.load(layer.diagonal + tl.arange(0, DIAGONAL)[:, None] * DIAGONAL + row_in_block)[None, :, :]
    tokens = first_token + tl.arange(0, TOKENS)[None, None, :]
    total = tl.zeros((BLOCKS, DIAGONAL, TOKENS), tl.float32)
    for step in tl.range(0, longest, STEP, num_stages=TILING.overflow_stages):
        low, low_column = _entry(layer, sizes, panel, rows, index + step, end, GROUPED)
        high, high_column = _entry(layer, sizes, panel, rows, index + (step + PAIRS), end, GROUPED)
        column = tl.join(low_column, high_column).reshape(BLOCKS, DIAGONAL * STEP)
        x_ptrs = xt_ptr + (column * token_stride)[:, :, None] + tokens
        x = tl.load(x_ptrs, cache_modifier=".ca")
        low_rounded = round_to(low, x.dtype, BACKEND)
        high_rounded = round_to(high, x.dtype, BACKEND)
        total = matrix_product(_blocks(low_rounded, high_rounded, mask), x, total, BACKEND)
        if GROUPED or layer.entries.dtype.element_ty != tl.int16:  # else 16 bits hold an entry exactly
            low_rest = round_to(low - low_rounded.to(tl.float32), x.dtype, BACKEND)
            high_rest = round_to(high - high_rounded.to(tl.float32), x.dtype, BACKEND)
            total = matrix_product(_blocks(low_rest, high_rest, mask), x, total, BACKEND)
    return total.reshape(ROWS, TOKENS)


@triton.jit
def load_entry(entries_ptr, index, inside, panel):
    """Excess and column, int32, of the entries at `index`; 0 and the panel's first column where not `inside`."""
    PANEL_BITS: tl.constexpr = UNITS.value.panel_bits
    entry = tl.load(entries_ptr + index, mask=inside, other=0).to(tl.int32)
    return entry >> PANEL_BITS, (panel << PANEL_BITS) + (entry & ((1 << PANEL_BITS) - 1))


@triton.jit
def _entry(layer, sizes, panel, rows, index, end, GROUPED: tl.constexpr):
    """Value, fp32, and column of the entries at `index`; 0 and the panel's first column from `end` on.

    The value is the excess, times its scale if a row has several.
    """
    inside = index < end
    excess, column = load_entry(layer.entries, index, inside, panel)
    value = excess.to(tl.float32)
    if GROUPED:
        scale_ptrs = layer.scales + column // sizes.group_size * sizes.padded_rows + rows
        value *= tl.load(scale_ptrs, mask=inside, other=0.0).to(tl.float32)
    return value, column


@triton.jit
def _blocks(low, high, mask):
    """Two 16-bit numbers a pair, [blocks, 16 · pairs], as block-diagonal matrices [blocks, 16, 32 · pairs]."""
    DIAGONAL: tl.constexpr = UNITS.value.diagonal
    low_bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high_bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    pairs = (low_bits | high_bits)[:, None, :] & mask
    low = pairs.to(tl.int16).to(low.dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(high.dtype, bitcast=True)
    return tl.join(low, high).reshape(pairs.shape[0], DIAGONAL, 2 * pairs.shape[2])
