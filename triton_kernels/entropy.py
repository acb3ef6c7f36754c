"""Decode HPTQ's rANS streams on a GPU: one warp per tile, one lane of the code per thread.

See `vllm_babai.format.rans` for the code. Lanes that take words from the tile's stream in the same step find theirs by
counting the lanes before them: a vote and a population count on NVIDIA, a prefix sum elsewhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.coded import CodedTensors
from vllm_babai.format.tables import CENTRE, ESCAPE, PRECISION
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.unpack import round_to

_PRECISION = tl.constexpr(PRECISION)
_FIELD = tl.constexpr((1 << PRECISION) - 1)
_CENTRE = tl.constexpr(CENTRE)
_ESCAPE = tl.constexpr(ESCAPE)
_WARP = tl.constexpr(32)


def decode(coded: CodedTensors, out: Tensor) -> Tensor:
    """Decode into `out` [rows, columns], contiguous, and return it: int16 integers, or S ∘ Z in a floating type."""
    rows, columns = len(coded.row_class), len(coded.column_class)
    if out.shape != (rows, columns) or not out.is_contiguous():
        raise ValueError(f"need a contiguous workspace of {rows} × {columns}, got {tuple(out.shape)}")
    if out.dtype != torch.int16 and not out.is_floating_point():
        raise TypeError(f"can decode to int16 or to a floating type, not to {out.dtype}")
    if len(coded.ends):
        scale_rows, groups = coded.scales.shape
        decode_kernel[(len(coded.ends),)](
            coded.words,
            coded.ends,
            coded.row_class,
            coded.column_class,
            coded.table,
            coded.scales,
            out,
            rows,
            columns,
            coded.tile_rows,
            coded.tile_columns,
            groups if scale_rows > 1 else 0,
            columns // groups,
            coded.offset,
            SHIFT=coded.shift,
            LANES=coded.lanes,
            DEQUANTIZE=out.is_floating_point(),
            GROUPED=groups > 1,
            BACKEND=Target.of(out.device).backend,
            num_warps=1,
        )
    return out


@triton.jit(do_not_specialize=["scale_stride", "group_size", "offset"])
def decode_kernel(
    words_ptr,
    ends_ptr,
    row_class_ptr,
    column_class_ptr,
    table_ptr,
    scales_ptr,
    out_ptr,  # [rows, columns]
    rows,
    columns,
    tile_rows,
    tile_columns,
    scale_stride,
    group_size,
    offset,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Decode one tile."""
    tile = tl.program_id(0)
    across = tl.cdiv(columns, tile_columns)
    row_start = tile // across * tile_rows
    column_start = tile % across * tile_columns
    row_stop = tl.minimum(row_start + tile_rows, rows)
    column_stop = tl.minimum(column_start + tile_columns, columns)
    lane = tl.arange(0, LANES)
    stream = words_ptr + tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)
    state, position = first_state(stream, lane, LANES)
    out_row = out_ptr + row_start.to(tl.int64) * columns
    for row in range(row_start, row_stop):
        row_class = tl.load(row_class_ptr + row).to(tl.int32)
        scale = tl.load(scales_ptr + row * scale_stride)
        for start in range(column_start, column_stop, LANES):
            column = start + lane
            inside = column < column_stop
            context = row_class + tl.load(column_class_ptr + column, mask=inside, other=0).to(tl.int32)
            integer, state, position = decode_step(
                stream, state, position, table_ptr, context, inside, lane, offset, SHIFT, LANES, BACKEND
            )
            if DEQUANTIZE:
                if GROUPED:
                    group = column // group_size
                    scale = tl.load(scales_ptr + row * scale_stride + group, mask=inside, other=0)
                value = round_to(integer.to(tl.float32) * scale, out_ptr.dtype.element_ty, BACKEND)
                tl.store(out_row + column, value, mask=inside)
            else:
                tl.store(out_row + column, integer.to(tl.int16), mask=inside)
        out_row += columns


@triton.jit
def first_state(stream, lane, LANES: tl.constexpr):
    """State of every lane, uint32, and position in the stream, int32 and the same in every lane."""
    state = load_word(stream + 2 * lane, lane >= 0) | load_word(stream + 2 * lane + 1, lane >= 0) << 16
    return state, tl.full((LANES,), 2 * LANES, tl.int32)


@triton.jit
def decode_step(
    stream,
    state,
    position,
    table_ptr,
    context,
    inside,
    lane,
    offset,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Decode one integer in every lane that is inside: the integers, int32, and the new states and position."""
    slot = ((state >> SHIFT) & _FIELD).to(tl.int32)
    entry = tl.load(table_ptr + (context << _PRECISION) + slot).to(tl.uint32, bitcast=True)
    symbol = (entry >> 24).to(tl.int32)
    low = (state & ((1 << SHIFT) - 1)).to(tl.int32)
    left = ((entry & _FIELD) + 1) * (state >> (_PRECISION + SHIFT))
    left += (entry >> _PRECISION) & _FIELD

    needs_word = inside & (left < 65536)
    escapes = inside & (symbol == _ESCAPE)
    words_before, words_taken = count_lanes(needs_word, lane, LANES, BACKEND)
    escapes_before, escapes_taken = count_lanes(escapes, lane, LANES, BACKEND)
    at = stream + position + words_before + escapes_before
    refilled = left << 16 | load_word(at, needs_word)
    literal = load_word(at + needs_word.to(tl.int32), escapes).to(tl.int16).to(tl.int32)
    state = tl.where(inside, tl.where(needs_word, refilled, left), state)
    integer = tl.where(escapes, literal, ((symbol - _CENTRE) << SHIFT) + low + offset)
    return integer, state, position + words_taken + escapes_taken


@triton.jit
def load_word(pointer, mask):
    """Words of the stream, uint32; 0 where the mask is off."""
    return tl.load(pointer, mask=mask, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def count_lanes(flag, lane, LANES: tl.constexpr, BACKEND: tl.constexpr):
    """How many lanes before each have the flag set, and how many of all: two int32 [LANES]."""
    if BACKEND == "cuda" and LANES == _WARP:  # lane and thread are the same
        flags = tl.inline_asm_elementwise(
            "{ .reg .pred flag; setp.ne.s32 flag, $1, 0; vote.sync.ballot.b32 $0, flag, 0xffffffff; }",
            "=r,r",
            [flag.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        below = tl.full((LANES,), 1, tl.int32) << lane
        return population(flags & (below - 1)), population(flags)
    one = flag.to(tl.int32)
    return tl.cumsum(one, 0) - one, tl.sum(one, 0) + tl.zeros_like(one)


@triton.jit
def population(bits):
    """Number of bits set."""
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
