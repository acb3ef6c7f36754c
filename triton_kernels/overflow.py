"""The overflow part of the fused kernel: what a tile's rows have beyond the dense range in one segment of columns."""

import triton
import triton.language as tl

from vllm_babai.triton_kernels.unpack import matrix_product, round_to


@triton.jit
def overflow_sum(
    x_ptr, scales_ptr, entries_ptr, starts_ptr, segment, rows, padded_rows, group_size, GROUPED: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One token's sum over the entries of every row of a tile, scaled, fp32 [rows, 1]; STEP entries a row at a time."""
    first = segment * padded_rows + rows
    index = tl.load(starts_ptr + first)
    end = tl.load(starts_ptr + first + 1)
    longest = tl.max(end - index, 0)
    index = index[:, None] + tl.arange(0, STEP)[None, :]
    end = end[:, None]
    products = tl.zeros(index.shape, tl.float32)
    for step in range(0, longest, STEP):
        value, column = _entry(
            entries_ptr, scales_ptr, index + step, end, segment, rows[:, None], padded_rows, group_size, GROUPED
        )
        x = tl.load(x_ptr + column, mask=index + step < end, other=0.0, eviction_policy="evict_last")
        products += value * x.to(tl.float32)
    total = tl.sum(products, 1)
    if not GROUPED:
        total *= tl.load(scales_ptr + rows).to(tl.float32)
    return total[:, None]


@triton.jit
def overflow_product(
    xt_ptr, diagonal_ptr, scales_ptr, entries_ptr, starts_ptr, segment, first_row, first_token, token_stride,
    padded_rows, group_size, GROUPED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """Several tokens' sums over the entries of every row of a tile, scaled, fp32 [ROWS, TOKENS].

    STEP entries of each of 16 rows are the blocks of a block-diagonal matrix [16, 16 · STEP], which a matrix
    instruction multiplies with the features at their columns [16 · STEP, TOKENS]. `diagonal_ptr` has the mask that
    blanks the other blocks, int32 [16, 16]: what is loaded, unlike what is computed, Triton brings straight into the
    layout of an operand, without going through shared memory. An infinite feature makes its token's sums NaN.
    """
    BLOCKS: tl.constexpr = ROWS // 16
    PAIRS: tl.constexpr = STEP // 2  # of entries, of a row
    place = tl.arange(0, 16 * PAIRS)
    row_in_block = (place // PAIRS)[None, :]
    rows = first_row + tl.arange(0, BLOCKS)[:, None] * 16 + row_in_block
    first = segment * padded_rows + rows
    index = tl.load(starts_ptr + first)
    end = tl.load(starts_ptr + first + 1)
    longest = tl.max(tl.max(end - index, 1), 0)
    index += (place % PAIRS)[None, :]
    mask = tl.load(diagonal_ptr + tl.arange(0, 16)[:, None] * 16 + row_in_block)[None, :, :]
    tokens = first_token + tl.arange(0, TOKENS)[None, None, :]
    total = tl.zeros((BLOCKS, 16, TOKENS), tl.float32)
    for step in tl.range(0, longest, STEP, num_stages=STAGES):
        low, low_column = _entry(
            entries_ptr, scales_ptr, index + step, end, segment, rows, padded_rows, group_size, GROUPED
        )
        high, high_column = _entry(
            entries_ptr, scales_ptr, index + (step + PAIRS), end, segment, rows, padded_rows, group_size, GROUPED
        )
        column = tl.join(low_column, high_column).reshape(BLOCKS, 16 * STEP)
        x_ptrs = xt_ptr + (column * token_stride)[:, :, None] + tokens
        x = tl.load(x_ptrs, cache_modifier=".ca")
        low_rounded = round_to(low, x.dtype, BACKEND)
        high_rounded = round_to(high, x.dtype, BACKEND)
        total = matrix_product(_blocks(low_rounded, high_rounded, mask), x, total, BACKEND)
        if GROUPED or entries_ptr.dtype.element_ty != tl.int16:  # else 16 bits hold an entry exactly
            low_rest = round_to(low - low_rounded.to(tl.float32), x.dtype, BACKEND)
            high_rest = round_to(high - high_rounded.to(tl.float32), x.dtype, BACKEND)
            total = matrix_product(_blocks(low_rest, high_rest, mask), x, total, BACKEND)
    total = total.reshape(ROWS, TOKENS)
    if not GROUPED:
        total *= tl.load(scales_ptr + first_row + tl.arange(0, ROWS)).to(tl.float32)[:, None]
    return total


@triton.jit
def load_entry(entries_ptr, index, inside, segment):
    """Excess and column, int32, of the entries at `index`; 0 and the segment's first column where not `inside`."""
    entry = tl.load(entries_ptr + index, mask=inside, other=0).to(tl.int32)
    return entry >> 11, segment * 2048 + (entry & 2047)


@triton.jit
def _entry(
    entries_ptr, scales_ptr, index, end, segment, rows, padded_rows, group_size, GROUPED: tl.constexpr
):  # fmt: skip
    """Value, fp32, and column of the entries at `index`; 0 and the segment's first column from `end` on.

    The value is the excess, times its scale if a row has several.
    """
    inside = index < end
    excess, column = load_entry(entries_ptr, index, inside, segment)
    value = excess.to(tl.float32)
    if GROUPED:
        scale_ptrs = scales_ptr + column // group_size * padded_rows + rows
        value *= tl.load(scale_ptrs, mask=inside, other=0.0).to(tl.float32)
    return value, column


@triton.jit
def _blocks(low, high, mask):
    """Two 16-bit numbers a pair, [blocks, 16 · pairs], as block-diagonal matrices [blocks, 16, 32 · pairs]."""
    low_bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high_bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    pairs = (low_bits | high_bits)[:, None, :] & mask
    low = pairs.to(tl.int16).to(low.dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(high.dtype, bitcast=True)
    return tl.join(low, high).reshape(pairs.shape[0], 16, 2 * pairs.shape[2])
