"""Loops over the tiles of a linear layer, spread over the processor's threads, around the compiled kernels."""

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

from vllm_babai.cpu_kernel import TILE_ROWS, TOKEN_BLOCKS

WORD_BYTES = 4 * TILE_ROWS  # of a tile, one word of each row
TOKENS_AT_ONCE = 64  # their activations should stay in the cache; a multiple of the lanes of the overflow kernel


@intrinsic
def _call(typing_context, address, arguments):
    """Call the compiled kernel at an address with a tuple of integers."""

    def generate(context, builder, signature, values):
        integer = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [integer] * len(arguments))
        pointer = builder.inttoptr(values[0], kernel.as_pointer())
        builder.call(pointer, [builder.extract_value(values[1], i) for i in range(len(arguments))])
        return context.get_dummy_value()

    return types.void(address, arguments), generate


@njit(parallel=True, nogil=True, cache=True)
def run_tiles(
    dense_kernels, overflow_kernel, x, x_stride, dense, scales, x_by_column, entries, offsets, group_shift, y
):
    """y[token, row] = x Wᵀ for few tokens.

    x: address of the activations. y: float32, or bfloat16 as uint16, [tokens, rows].
    """
    tiles, words, _ = dense.shape
    _, columns, lanes = x_by_column.shape
    groups, row_stride = scales.shape[0], 4 * scales.shape[1]
    all_tokens, out_features = y.shape
    for start in range(0, all_tokens, TOKENS_AT_ONCE):
        tokens = min(TOKENS_AT_ONCE, all_tokens - start)
        for tile in prange(tiles):
            first_row = tile * TILE_ROWS
            rows = min(TILE_ROWS, out_features - first_row)
            words_at = dense.ctypes.data + tile * words * WORD_BYTES
            scales_at = scales.ctypes.data + first_row * 4
            total = np.zeros((tokens, TILE_ROWS), np.float32)
            token = 0
            for i in range(len(TOKEN_BLOCKS)):
                while tokens - token >= TOKEN_BLOCKS[i]:
                    x_at = x + (start + token) * x_stride
                    total_at = total.ctypes.data + token * WORD_BYTES
                    strides = (x_stride, row_stride, WORD_BYTES)
                    _call(dense_kernels[i], (x_at, words_at, scales_at, total_at, *strides, groups, words // groups))
                    token += TOKEN_BLOCKS[i]
            if offsets[first_row] < offsets[first_row + rows]:
                sums = np.empty((TILE_ROWS, lanes), np.float32)
                offsets_at = offsets.ctypes.data + first_row * 4
                for token in range(0, tokens, lanes):
                    block_at = x_by_column.ctypes.data + (start + token) * columns * 4
                    scaling = (scales_at, row_stride, group_shift, sums.ctypes.data)
                    _call(overflow_kernel, (block_at, entries.ctypes.data, offsets_at, rows, *scaling))
                    for lane in range(min(lanes, tokens - token)):
                        for row in range(rows):
                            total[token + lane, row] += sums[row, lane]
            _store(total[:, :rows], y[start : start + tokens, first_row : first_row + rows])


def _store(total, y):
    """y = total, rounded to the format of y."""


@overload(_store)
def _store_as(total, y):
    def store_bfloat16(total, y):
        for token in range(total.shape[0]):
            for row in range(total.shape[1]):
                y[token, row] = _bfloat16(total[token, row])

    def store_float32(total, y):
        y[:] = total

    return store_bfloat16 if y.dtype == types.uint16 else store_float32


@njit(nogil=True, cache=True)
def _bfloat16(value):
    """The bits of a float32, rounded to the nearest bfloat16."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(parallel=True, nogil=True, cache=True)
def run_expanded_tiles(dense_kernels, expand_kernel, fields, x, x_stride, dense, scales, entries, offsets, buffers, y):
    """y[token, row] += x Wᵀ for many tokens: expands a tile to pairs of bfloat16 integers with the overflow in place.

    fields: of one half of a word. x: address of bfloat16 [tokens, in]. buffers: uint32 [threads, pairs, 64].
    """
    tiles, words, _ = dense.shape
    groups, row_stride = scales.shape[0], 4 * scales.shape[1]
    words_per_group = words // groups
    tokens = y.shape[0]
    at_once = min(buffers.shape[1] // fields, words_per_group)
    for tile in prange(tiles):
        first_row = tile * TILE_ROWS
        rows = max(0, min(TILE_ROWS, len(offsets) - 1 - first_row))
        cursors = offsets[first_row : first_row + rows].copy()
        pairs = buffers[numba.get_thread_id()]
        words_at = dense.ctypes.data + tile * words * WORD_BYTES
        for group in range(groups):
            scales_at = scales.ctypes.data + group * row_stride + first_row * 4
            for start in range(group * words_per_group, (group + 1) * words_per_group, at_once):
                count = min(at_once, (group + 1) * words_per_group - start)
                _call(expand_kernel, (words_at + start * WORD_BYTES, count, pairs.ctypes.data))
                _add_overflow(pairs, cursors, offsets[first_row + 1 :], entries, 2 * fields * start, 2 * fields * count)
                token = 0
                for i in range(len(TOKEN_BLOCKS)):
                    while tokens - token >= TOKEN_BLOCKS[i]:
                        x_at = x + token * x_stride + 4 * fields * start
                        y_at = y.ctypes.data + token * row_stride + first_row * 4
                        strides = (x_stride, row_stride, row_stride)
                        _call(dense_kernels[i], (x_at, pairs.ctypes.data, scales_at, y_at, *strides, 1, fields * count))
                        token += TOKEN_BLOCKS[i]


@njit(nogil=True, cache=True)
def _add_overflow(pairs, cursors, ends, entries, first_column, columns):
    """Add the entries from `cursors` on that lie in these columns to the expanded integers; moves the cursors."""
    for row in range(len(cursors)):
        entry = cursors[row]
        while entry < ends[row]:
            column = ((entries[entry] >> 16) & 0xFFFF) - first_column
            if column >= columns:
                break
            shift = np.uint32(16 * (column & 1))
            pair = pairs[column >> 1, row]
            dense = np.uint32(((pair >> shift) & np.uint32(0xFFFF)) << np.uint32(16)).view(np.float32)
            rounded = np.uint32(_bfloat16(dense + np.int16(entries[entry])))
            kept = pair & ~np.uint32(np.uint32(0xFFFF) << shift)
            pairs[column >> 1, row] = np.uint32(kept | np.uint32(rounded << shift))
            entry += 1
        cursors[row] = entry


@njit(parallel=True, nogil=True, cache=True)
def dequantize_tiles(kernel, dense, scales, entries, offsets, group_shift, weight):
    tiles, words, _ = dense.shape
    groups, row_stride, weight_stride = scales.shape[0], scales.strides[0], weight.strides[0]
    for tile in prange(tiles):
        first_row = tile * TILE_ROWS
        words_at = dense.ctypes.data + tile * words * WORD_BYTES
        addresses = (words_at, scales.ctypes.data + first_row * 4, weight.ctypes.data + first_row * 4)
        _call(kernel, (*addresses, row_stride, weight_stride, groups, words // groups))
        for row in range(first_row, min(first_row + TILE_ROWS, len(offsets) - 1)):
            for i in range(offsets[row], offsets[row + 1]):
                column = (entries[i] >> 16) & 0xFFFF
                weight[column, row] += np.int16(entries[i]) * scales[column >> group_shift, row]
