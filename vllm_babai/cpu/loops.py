"""Loops over the tiles of a linear layer, spread over the processor's threads, around the compiled kernels.

Arguments come in plain tuples: at every call numba takes 10 µs to recognize a NamedTuple, and less than 1 µs for a
tuple, where an op on one token takes about 20.
"""

from functools import partial

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic, overload

from vllm_babai.compiled import compiled
from vllm_babai.cpu.arguments import (
    DenseArguments,
    DequantizeArguments,
    ExpandArguments,
    InsertArguments,
    OverflowArguments,
)
from vllm_babai.cpu.kernel import BLOCK_COLUMNS, LANES, MOST_TOKENS, TILE_ROWS

WORD_BYTES = 4 * TILE_ROWS  # of a tile, one word of each row
TOKENS_AT_ONCE = 64  # decoding: their activations should stay in the cache; a multiple of LANES
EXPANDED_TOKENS_AT_ONCE = 256  # expanding: their sums should stay in the cache
PLACES = BLOCK_COLUMNS * TILE_ROWS - 1  # mask of an overflow entry's place in its block


@intrinsic
def _call(typing_context, address, arguments):
    """Call the compiled kernel at an address with its arguments, a type of `vllm_babai.cpu.arguments`."""

    def generate(context, builder, signature, values):
        integer = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [integer] * len(arguments))
        pointer = builder.inttoptr(values[0], kernel.as_pointer())
        builder.call(pointer, [builder.extract_value(values[1], i) for i in range(len(arguments))])
        return context.get_dummy_value()

    return types.void(address, arguments), generate


@partial(compiled, parallel=True)
def run_tiles(kernels, activations, layout, group_shift, y):
    """y[token, row] = x Wᵀ for few tokens.

    kernels: dense kernels by tokens, overflow kernel. activations: address of x, its stride in bytes, and x by columns
    as `tokens_in_lanes` makes it. layout: arrays of a `DeviceLayout`. group_shift: column >> it is the column's group.
    y: float32, or bfloat16 as uint16, [tokens, rows].
    """
    dense_kernels, overflow_kernel = kernels
    x, x_stride, x_by_column = activations
    dense, scales, entries, offsets = layout
    tiles, words, _ = dense.shape
    _, columns, lanes = x_by_column.shape
    groups, scale_stride = scales.shape[0], 4 * scales.shape[1]
    all_tokens, out_features = y.shape
    blocks = (len(offsets) - 1) // tiles
    for start in range(0, all_tokens, TOKENS_AT_ONCE):
        tokens = min(TOKENS_AT_ONCE, all_tokens - start)
        for tile in prange(tiles):
            first_row = tile * TILE_ROWS
            rows = min(TILE_ROWS, out_features - first_row)
            words_at = dense.ctypes.data + tile * words * WORD_BYTES
            scales_at = scales.ctypes.data + first_row * 4
            total = _zeros(tokens)
            scaling = (scales_at, scale_stride, groups, words // groups)
            _multiply(dense_kernels, (x + start * x_stride, x_stride), words_at, scaling, total)
            if offsets[tile * blocks] < offsets[(tile + 1) * blocks]:
                offsets_at = offsets.ctypes.data + tile * blocks * 4
                for token in range(0, tokens, lanes):
                    sums = np.zeros((TILE_ROWS, lanes), np.float32)
                    arguments = OverflowArguments(
                        x=x_by_column.ctypes.data + (start + token) * columns * 4,
                        entries=entries.ctypes.data,
                        offsets=offsets_at,
                        blocks=blocks,
                        scales=scales_at,
                        scale_stride=scale_stride,
                        group_shift=group_shift,
                        out=sums.ctypes.data,
                    )
                    _call(overflow_kernel, arguments)
                    for lane in range(min(lanes, tokens - token)):
                        for row in range(rows):
                            total[token + lane, row] += sums[row, lane]
            _store(total[:, :rows], y[start : start + tokens, first_row : first_row + rows])


@partial(compiled, parallel=True)
def run_expanded_tiles(kernels, fields, x, layout, y):
    """y[token, row] = x Wᵀ for many tokens: expands a block to pairs of bfloat16 integers with the overflow in place.

    kernels: dense kernels by tokens, for expanding, for insertion. fields: of one half of a word. layout: arrays of a
    `DeviceLayout`. x [blocks, tokens, BLOCK_COLUMNS] and y [tokens, rows]: bfloat16 as uint16.
    """
    dense_kernels, expand_kernel, insert_kernel = kernels
    dense, scales, entries, offsets = layout
    tiles, words, _ = dense.shape
    blocks, all_tokens, _ = x.shape
    groups, scale_stride = scales.shape[0], 4 * scales.shape[1]
    words_per_group, words_per_block = words // groups, BLOCK_COLUMNS // (2 * fields)
    for start in range(0, all_tokens, EXPANDED_TOKENS_AT_ONCE):
        tokens = min(EXPANDED_TOKENS_AT_ONCE, all_tokens - start)
        for tile in prange(tiles):
            first_row = tile * TILE_ROWS
            rows = min(TILE_ROWS, y.shape[1] - first_row)
            total = _zeros(tokens)
            expanded = _zeros(BLOCK_COLUMNS // 2).view(np.uint16)
            for block in range(blocks):
                first_word = block * words_per_block
                words_here = min(words_per_block, words - first_word)
                words_at = dense.ctypes.data + (tile * words + first_word) * WORD_BYTES
                _call(expand_kernel, ExpandArguments(words=words_at, count=words_here, pairs=expanded.ctypes.data))
                index = tile * blocks + block
                first, last = offsets[index], offsets[index + 1]
                entries_at = entries.ctypes.data + 4 * first
                _call(
                    insert_kernel, InsertArguments(entries=entries_at, count=last - first, pairs=expanded.ctypes.data)
                )
                scales_at = scales.ctypes.data + first_word // words_per_group * scale_stride + first_row * 4
                groups_here = max(1, words_here // words_per_group)
                scaling = (scales_at, scale_stride, groups_here, words_here * fields // groups_here)
                x_at = x.ctypes.data + (block * all_tokens + start) * 2 * BLOCK_COLUMNS
                _multiply(dense_kernels, (x_at, 2 * BLOCK_COLUMNS), expanded.ctypes.data, scaling, total)
            _store(total[:, :rows], y[start : start + tokens, first_row : first_row + rows])


@compiled
def tokens_in_lanes(x):
    """x float32 [tokens, in] → [⌈tokens / lanes⌉, in, lanes], for up to LANES tokens the next power of two of lanes."""
    tokens, columns = x.shape
    lanes = 1
    while lanes < min(tokens, LANES):
        lanes *= 2
    by_column = np.zeros((-(-tokens // lanes), columns, lanes), np.float32)
    for token in range(tokens):
        by_column[token // lanes, :, token % lanes] = x[token]
    return by_column


@compiled
def _zeros(count):
    """float32 [count, TILE_ROWS], from the start of a cache line on: vectors that straddle two take twice as long."""
    memory = np.zeros((count + 1) * TILE_ROWS, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + count * TILE_ROWS].reshape(count, TILE_ROWS)


@compiled
def _multiply(dense_kernels, activations, words, scaling, total):
    """total[token, row] += x Wᵀ for one tile.

    activations: address and stride of x. scaling: address and stride of the scales, groups, words per group.
    """
    x, x_stride = activations
    scales, scale_stride, groups, words_per_group = scaling
    tokens = len(total)
    calls = -(-tokens // MOST_TOKENS)
    for call in range(calls):
        token, end = tokens * call // calls, tokens * (call + 1) // calls
        arguments = DenseArguments(
            x=x + token * x_stride,
            words=words,
            scales=scales,
            y=total.ctypes.data + token * WORD_BYTES,
            x_stride=x_stride,
            scale_stride=scale_stride,
            y_stride=WORD_BYTES,
            groups=groups,
            words_per_group=words_per_group,
        )
        _call(dense_kernels[end - token - 1], arguments)


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


@compiled
def _bfloat16(value):
    """The bits of a float32, rounded to the nearest bfloat16."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@partial(compiled, parallel=True)
def dequantize_tiles(kernel, layout, group_shift, weight):
    """weight[column, row] = W in float32. layout: arrays of a `DeviceLayout`, of these tiles alone."""
    dense, scales, entries, offsets = layout
    tiles, words, _ = dense.shape
    groups, row_stride, weight_stride = scales.shape[0], scales.strides[0], weight.strides[0]
    blocks = (len(offsets) - 1) // tiles
    for tile in prange(tiles):
        first_row = tile * TILE_ROWS
        words_at = dense.ctypes.data + tile * words * WORD_BYTES
        arguments = DequantizeArguments(
            words=words_at,
            scales=scales.ctypes.data + first_row * 4,
            weight=weight.ctypes.data + first_row * 4,
            scale_stride=row_stride,
            weight_stride=weight_stride,
            groups=groups,
            words_per_group=words // groups,
        )
        _call(kernel, arguments)
        for block in range(blocks):
            for i in range(offsets[tile * blocks + block], offsets[tile * blocks + block + 1]):
                place = entries[i] & PLACES
                row = first_row + place % TILE_ROWS
                column = block * BLOCK_COLUMNS + place // TILE_ROWS
                weight[column, row] += (entries[i] >> 16) * scales[column >> group_shift, row]
