"""Decode HPTQ's rANS streams on a GPU: one warp per segment, one lane of the code per thread.

See `vllm_babai.format.entropy.rans` for the code. Lanes that take words from the stream in the same step find theirs by
counting the lanes before them: a vote and a population count on NVIDIA, a prefix sum elsewhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.format.entropy.segments import FIELDS
from vllm_babai.format.entropy.tables import CENTRE, ESCAPE, PRECISION
from vllm_babai.ops.coded import CodedTensors
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.unpack import round_to

_PRECISION = tl.constexpr(PRECISION)
_FIELD = tl.constexpr((1 << PRECISION) - 1)
_CENTRE = tl.constexpr(CENTRE)
_ESCAPE = tl.constexpr(ESCAPE)
_FIELDS = tl.constexpr(len(FIELDS))
WARP = tl.constexpr(32)


def decode(coded: CodedTensors, out: Tensor) -> Tensor:
    """Decode into `out` [rows, columns], contiguous, and return it: int16 integers, or S ∘ Z in a floating type."""
    rows, columns = out.shape
    if rows != len(coded.row_class) or not out.is_contiguous():
        raise ValueError(f"need a contiguous workspace of {len(coded.row_class)} rows, got {tuple(out.shape)}")
    if out.dtype != torch.int16 and not out.is_floating_point():
        raise TypeError(f"can decode to int16 or to a floating type, not to {out.dtype}")
    groups = coded.scales.shape[1]
    decode_kernel[(len(coded.segments),)](
        *coded.tensors,
        out,
        columns,
        groups,
        columns // groups,
        DEQUANTIZE=out.is_floating_point(),
        GROUPED=groups > 1,
        BACKEND=Target.of(out.device).backend,
        num_warps=1,
    )
    return out


@triton.jit(do_not_specialize=["groups", "group_size"])
def decode_kernel(
    words_ptr,
    segments_ptr,
    states_ptr,
    row_class_ptr,
    column_class_ptr,
    table_ptr,
    scales_ptr,
    out_ptr,  # [rows, columns]
    columns,
    groups,
    group_size,
    DEQUANTIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Decode one segment."""
    stream, state, rows, tile, code = load_segment(words_ptr, segments_ptr, states_ptr, tl.program_id(0))
    lane = tl.arange(0, WARP)
    position = tl.zeros_like(lane)
    out_row = out_ptr + rows[0].to(tl.int64) * columns
    for row in range(rows[0], rows[1]):
        row_class = tl.load(row_class_ptr + row).to(tl.int32)
        if not GROUPED:
            scale = tl.load(scales_ptr + row * groups)
        for start in range(0, tile[1], code[0]):
            inside = lane < tl.minimum(tile[1] - start, code[0])
            context = row_class + tl.load(column_class_ptr + tile[2] + start + lane, mask=inside, other=0).to(tl.int32)
            integer, state, position = decode_step(
                stream, state, position, table_ptr, context, inside, lane, code, BACKEND
            )
            column = tile[0] + start + lane
            held = inside & (column >= 0) & (column < columns)
            if DEQUANTIZE:
                if GROUPED:
                    scale = tl.load(scales_ptr + row * groups + column // group_size, mask=held, other=0)
                value = round_to(integer.to(tl.float32) * scale, out_ptr.dtype.element_ty, BACKEND)
                tl.store(out_row + column, value, mask=held)
            else:
                tl.store(out_row + column, integer.to(tl.int16), mask=held)
        out_row += columns


@triton.jit
def load_segment(words_ptr, segments_ptr, states_ptr, index):
    """A segment, see `vllm_babai.format.entropy.segments`.

    Its stream; state of every lane, uint32; (first row, row behind the last); (first column, columns, where the first
    one's class is, segments to the left); (lanes, shift, integer of symbol 0).
    """
    field = segments_ptr + index.to(tl.int64) * _FIELDS
    stream = words_ptr + tl.load(field)
    state = tl.load(states_ptr + index.to(tl.int64) * WARP + tl.arange(0, WARP)).to(tl.uint32, bitcast=True)
    row = tl.load(field + 1)
    rows = (row, row + tl.load(field + 2))
    tile = (tl.load(field + 3), tl.load(field + 4), tl.load(field + 5), tl.load(field + 6))
    shift = tl.load(field + 8)
    code = (tl.load(field + 7), shift, tl.load(field + 9) - (_CENTRE << shift))
    return stream, state, rows, tile, code


@triton.jit
def decode_step(stream, state, position, table_ptr, context, inside, lane, code, BACKEND: tl.constexpr):
    """Decode one integer in every lane that is inside: the integers, int32, and the new states and position.

    code: see `load_segment`.
    """
    shift = code[1]
    slot = ((state >> shift) & _FIELD).to(tl.int32)
    entry = tl.load(table_ptr + (context << _PRECISION) + slot).to(tl.uint32, bitcast=True)
    symbol = (entry >> 24).to(tl.int32)
    low = state.to(tl.int32, bitcast=True) & ((1 << shift) - 1)
    left = ((entry & _FIELD) + 1) * (state >> (_PRECISION + shift))
    left += (entry >> _PRECISION) & _FIELD

    needs_word = inside & (left < 65536)
    escapes = inside & (symbol == _ESCAPE)
    words_before, words_taken = count_lanes(needs_word, lane, BACKEND)
    escapes_before, escapes_taken = count_lanes(escapes, lane, BACKEND)
    at = stream + position + words_before + escapes_before
    refilled = left << 16 | load_word(at, needs_word)
    literal = load_word(at + needs_word.to(tl.int32), escapes).to(tl.int16).to(tl.int32)
    state = tl.where(inside, tl.where(needs_word, refilled, left), state)
    integer = tl.where(escapes, literal, (symbol << shift) + low + code[2])
    return integer, state, position + words_taken + escapes_taken


@triton.jit
def load_word(pointer, mask):
    """Words of the stream, uint32; 0 where the mask is off."""
    return tl.load(pointer, mask=mask, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def count_lanes(flag, lane, BACKEND: tl.constexpr):
    """How many lanes before each have the flag set, and how many of all: two int32 [32]."""
    if BACKEND == "cuda":  # lane and thread are the same
        flags = tl.inline_asm_elementwise(
            "{ .reg .pred flag; setp.ne.s32 flag, $1, 0; vote.sync.ballot.b32 $0, flag, 0xffffffff; }",
            "=r,r",
            [flag.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        below = tl.full((WARP,), 1, tl.int32) << lane
        return population(flags & (below - 1)), population(flags)
    one = flag.to(tl.int32)
    return tl.cumsum(one, 0) - one, tl.sum(one, 0) + tl.zeros_like(one)


@triton.jit
def population(bits):
    """Number of bits set."""
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
