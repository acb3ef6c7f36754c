"""CPU backend of `babai::matmul`: device layout, the compiled kernels for few tokens, a dequantized matmul for many.

Layout: `dense` int32 [tiles, words, 64], see `vllm_babai.cpu_kernel`; `scales` float32 [groups, 64 · tiles]; `entries`
int32, column · 2¹⁶ + excess, sorted by row; `offsets` int32 [out + 1], first entry of every row. Three bits are stored
in fields of four, which then hold most of the overflow as well.
"""

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from vllm_babai.cpu_kernel import (
    LANES,
    TILE_ROWS,
    TOKEN_BLOCKS,
    Bfloat16,
    Float32,
    dense_kernels,
    dequantize_kernel,
    has_bfloat16,
    overflow_kernel,
    weights_per_word,
)
from vllm_babai.format import Overflow, integer_range, unpack
from vllm_babai.layout import DeviceLayout

FIELD_WIDTH = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of the checkpoint → bits of a field
TOKENS_AT_ONCE = 64  # their activations should stay in the cache
DEQUANTIZE_TOKENS = 512
DEQUANTIZE_TILES = 8  # tiles dequantized at a time: the copy should stay in the cache
COLUMN_BITS = 16

# numba counts the processors that its importer may use; vLLM binds that thread to one of those that torch uses.
numba.config.NUMBA_NUM_THREADS = max(numba.config.NUMBA_NUM_THREADS, torch.get_num_threads())


def device_layout(
    qweight: Tensor, scales: Tensor, overflow: Overflow, bits: int, in_features: int, device: torch.device
) -> DeviceLayout:
    """Arrange a linear for the kernels of this module.

    qweight: uint8 [out, packed_bytes(in, bits)]. scales: bfloat16 [out, groups]. overflow: of the same out × in.
    Raises ValueError for more than 2¹⁶ input features or a group size that is no multiple of 16.
    """
    if in_features > 1 << COLUMN_BITS:
        raise ValueError(f"the CPU kernels take at most {1 << COLUMN_BITS} input features, not {in_features}")
    width = FIELD_WIDTH[bits]
    integers = unpack(qweight, bits, in_features)
    integers[overflow.rows.long(), overflow.columns.long()] += overflow.excess.short()
    fields = integers.clamp(*integer_range(width))
    rows, columns = torch.nonzero(integers != fields, as_tuple=True)
    excess = integers[rows, columns].int() - fields[rows, columns].int()
    entries = columns.int() << COLUMN_BITS | excess & 0xFFFF
    offsets = torch.searchsorted(rows, torch.arange(len(qweight) + 1)).int()
    return DeviceLayout(_words(fields, width), _group_scales(scales, in_features), entries, offsets)


def matmul(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
) -> Tensor:
    """x [..., in_features] in bfloat16, float16 or float32 → x Wᵀ [..., out_features] in the same dtype."""
    width = FIELD_WIDTH[bits]
    tokens = x.reshape(-1, x.shape[-1])
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    multiply = _multiply_dequantized if len(tokens) >= DEQUANTIZE_TOKENS else _multiply_packed
    y = multiply(tokens, dense, scales, entries, offsets, width, out_features)
    return y.view(*x.shape[:-1], out_features)


def warm_up(layout: DeviceLayout, bits: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """Compile both ways to multiply with activations of `dtype`."""
    for tokens in (1, 2, DEQUANTIZE_TOKENS):
        matmul(torch.zeros(tokens, in_features, dtype=dtype), *layout, bits, out_features)


def _words(fields: Tensor, width: int) -> Tensor:
    """Integers [out, in] in range of `width` bits → int32 [tiles, words, 64], padded with zeros."""
    out_features, in_features = fields.shape
    per_word, half = weights_per_word(width), integer_range(width)[0]
    padded = torch.nn.functional.pad(fields, (0, -in_features % per_word, 0, -out_features % TILE_ROWS))
    grouped = padded.view(len(padded) // TILE_ROWS, TILE_ROWS, -1, per_word)
    words = torch.zeros(grouped.shape[:-1], dtype=torch.int32)
    for k in range(per_word):
        words |= (grouped[..., k].int() - half) << (16 * (k % 2) + width * (k // 2))
    return words.transpose(1, 2).contiguous()


def _group_scales(scales: Tensor, in_features: int) -> Tensor:
    """Scales [out, groups] → float32 [groups, 64 · tiles], the group size a power of two where there are several."""
    groups = scales.shape[1]
    if groups > 1:
        group_size = in_features // groups
        power = group_size & -group_size
        if power < LANES:
            raise ValueError(f"the CPU kernels need a group size that is a multiple of {LANES}, not {group_size}")
        scales = scales.repeat_interleave(group_size // power, dim=1)
    return torch.nn.functional.pad(scales.float().t(), (0, -len(scales) % TILE_ROWS)).contiguous()


def _group_shift(scales: Tensor, in_features: int) -> int:
    """Column >> shift is its group."""
    groups = len(scales)
    return COLUMN_BITS if groups == 1 else (in_features // groups).bit_length() - 1


def _multiply_packed(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, width: int, out_features: int
) -> Tensor:
    arithmetic = Bfloat16 if x.dtype == torch.bfloat16 and has_bfloat16() else Float32
    tokens, in_features = x.shape
    padded = torch.nn.functional.pad(x, (0, dense.shape[1] * weights_per_word(width) - in_features)).contiguous()
    activations = padded if arithmetic is Bfloat16 else padded.float()
    lanes = 1 if tokens == 1 else LANES
    y = torch.zeros(tokens, scales.shape[1], dtype=torch.float32)
    for start in range(0, tokens, TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        _run_tiles(
            dense_kernels(arithmetic, width),
            overflow_kernel(lanes),
            activations[some].data_ptr(),
            activations.stride(0) * activations.element_size(),
            dense.numpy(),
            scales.numpy(),
            _tokens_in_lanes(x[some], lanes).numpy(),
            entries.numpy(),
            offsets.numpy(),
            _group_shift(scales, in_features),
            y[some].numpy(),
        )
    return y[:, :out_features].to(x.dtype)


def _tokens_in_lanes(x: Tensor, lanes: int) -> Tensor:
    """x [tokens, in] → float32 [⌈tokens / lanes⌉, in, lanes]."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % lanes))
    return padded.unflatten(0, (-1, lanes)).transpose(1, 2).float().contiguous()


def _multiply_dequantized(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, width: int, out_features: int
) -> Tensor:
    in_features = x.shape[1]
    y = x.new_empty(len(x), out_features)
    for tile in range(0, len(dense), DEQUANTIZE_TILES):
        tiles = dense[tile : tile + DEQUANTIZE_TILES]
        weight = torch.empty(dense.shape[1] * weights_per_word(width), len(tiles) * TILE_ROWS, dtype=torch.float32)
        first_row = tile * TILE_ROWS
        _dequantize_tiles(
            dequantize_kernel(width),
            tiles.numpy(),
            scales[:, first_row:].numpy(),
            entries.numpy(),
            offsets[first_row:].numpy(),
            _group_shift(scales, in_features),
            weight.numpy(),
        )
        rows = min(weight.shape[1], out_features - first_row)
        y[:, first_row : first_row + rows] = x @ weight[:in_features, :rows].to(x.dtype)
    return y


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
def _run_tiles(
    dense_kernels, overflow_kernel, x, x_stride, dense, scales, x_by_column, entries, offsets, group_shift, y
):
    tiles, words, _ = dense.shape
    groups, row_stride = scales.shape[0], 4 * scales.shape[1]
    tokens = y.shape[0]
    blocks, columns, lanes = x_by_column.shape
    for tile in prange(tiles):
        first_row = tile * TILE_ROWS
        words_at = dense.ctypes.data + tile * words * TILE_ROWS * 4
        scales_at = scales.ctypes.data + first_row * 4
        y_at = y.ctypes.data + first_row * 4
        token = 0
        for i in range(len(TOKEN_BLOCKS)):
            while tokens - token >= TOKEN_BLOCKS[i]:
                arguments = (words_at, scales_at, y_at + token * row_stride, x_stride, row_stride, row_stride)
                _call(dense_kernels[i], (x + token * x_stride, *arguments, groups, words // groups))
                token += TOKEN_BLOCKS[i]
        rows = min(TILE_ROWS, len(offsets) - 1 - first_row)
        if offsets[first_row] < offsets[first_row + rows]:
            sums = np.empty((TILE_ROWS, lanes), np.float32)
            offsets_at = offsets.ctypes.data + first_row * 4
            for block in range(blocks):
                block_at = x_by_column.ctypes.data + block * columns * lanes * 4
                scaling = (scales_at, row_stride, group_shift, sums.ctypes.data)
                _call(overflow_kernel, (block_at, entries.ctypes.data, offsets_at, rows, *scaling))
                for lane in range(min(lanes, tokens - block * lanes)):
                    for row in range(rows):
                        y[block * lanes + lane, first_row + row] += sums[row, lane]


@njit(parallel=True, nogil=True, cache=True)
def _dequantize_tiles(kernel, dense, scales, entries, offsets, group_shift, weight):
    tiles, words, _ = dense.shape
    groups, row_stride, weight_stride = scales.shape[0], scales.strides[0], weight.strides[0]
    for tile in prange(tiles):
        first_row = tile * TILE_ROWS
        words_at = dense.ctypes.data + tile * words * TILE_ROWS * 4
        addresses = (words_at, scales.ctypes.data + first_row * 4, weight.ctypes.data + first_row * 4)
        _call(kernel, (*addresses, row_stride, weight_stride, groups, words // groups))
        for row in range(first_row, min(first_row + TILE_ROWS, len(offsets) - 1)):
            for i in range(offsets[row], offsets[row + 1]):
                column = (entries[i] >> COLUMN_BITS) & 0xFFFF
                weight[column, row] += np.int16(entries[i]) * scales[column >> group_shift, row]
