"""Decode HPTQ's rANS streams on a GPU: one warp per segment, one lane of the code per thread.

See `vllm_babai.format.entropy.rans` for the code. Lanes that take words from the stream in the same step find theirs by
counting the lanes before them: a vote and a population count on NVIDIA, a prefix sum elsewhere.
"""

from collections import namedtuple
from typing import Any, NamedTuple

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
_CENTRE = tl.constexpr(CENTRE)
_ESCAPE = tl.constexpr(ESCAPE)
WARP = tl.constexpr(32)
WORD_BITS = tl.constexpr(16)  # of a word of a stream; a state has twice as many
RECORD = tl.constexpr(namedtuple("Record", FIELDS)(*range(len(FIELDS))))  # where each field of a segment is


class Streams(NamedTuple):
    """Pointers to a coded layer, as `CodedTensors` says."""

    words: Tensor
    segments: Tensor
    states: Tensor
    row_class: Tensor
    column_class: Tensor
    table: Tensor
    scales: Tensor


class Segment(NamedTuple):
    """One segment, see `vllm_babai.format.entropy.segments`, as scalars of a kernel.

    stream: pointer to its words. first_row, last_row: its rows, the last one not included. column: its first one.
    columns: how many. classes: index of the first column's class. left: segments left of it. lanes, shift: of its code.
    smallest: integer of symbol 0.
    """

    stream: Any
    first_row: Any
    last_row: Any
    column: Any
    columns: Any
    classes: Any
    left: Any
    lanes: Any
    shift: Any
    smallest: Any


def decode(coded: CodedTensors, out: Tensor) -> Tensor:
    """Decode into `out` [rows, columns], contiguous, and return it: int16 integers, or S ∘ Z in a floating type."""
    rows, columns = out.shape
    if rows != len(coded.row_class) or not out.is_contiguous():
        raise ValueError(f"need a contiguous workspace of {len(coded.row_class)} rows, got {tuple(out.shape)}")
    if out.dtype != torch.int16 and not out.is_floating_point():
        raise TypeError(f"can decode to int16 or to a floating type, not to {out.dtype}")
    groups = coded.scales.shape[1]
    decode_kernel[(len(coded.segments),)](
        Streams(*coded.tensors),
        out,
        columns,
        groups,
        DEQUANTIZE=out.is_floating_point(),
        GROUPED=groups > 1,
        BACKEND=Target.of(out.device).backend,
        num_warps=1,
    )
    return out


@triton.jit(do_not_specialize=["groups"])
def decode_kernel(
    streams, out_ptr, columns, groups, DEQUANTIZE: tl.constexpr, GROUPED: tl.constexpr, BACKEND: tl.constexpr
):
    """Decode one segment.

    streams: `Streams`. out_ptr: [rows, columns]. groups: scales of a row. DEQUANTIZE: write S ∘ Z, else integers.
    GROUPED: there are several groups. Grid: [segments].
    """
    segment = load_segment(streams, tl.program_id(0))
    state = load_states(streams, tl.program_id(0))
    lane = tl.arange(0, WARP)
    position = tl.zeros_like(lane)
    group_size = columns // groups
    out_row = out_ptr + segment.first_row.to(tl.int64) * columns
    for row in range(segment.first_row, segment.last_row):
        row_class = tl.load(streams.row_class + row).to(tl.int32)
        if not GROUPED:
            scale = tl.load(streams.scales + row * groups)
        for start in range(0, segment.columns, segment.lanes):
            inside = lane < tl.minimum(segment.columns - start, segment.lanes)
            class_ptrs = streams.column_class + segment.classes + start + lane
            context = row_class + tl.load(class_ptrs, mask=inside, other=0).to(tl.int32)
            integer, state, position = decode_step(segment, state, position, streams.table, context, inside, BACKEND)
            column = segment.column + start + lane
            held = inside & (column >= 0) & (column < columns)
            if DEQUANTIZE:
                if GROUPED:
                    scale = tl.load(streams.scales + row * groups + column // group_size, mask=held, other=0)
                value = round_to(integer.to(tl.float32) * scale, out_ptr.dtype.element_ty, BACKEND)
                tl.store(out_row + column, value, mask=held)
            else:
                tl.store(out_row + column, integer.to(tl.int16), mask=held)
        out_row += columns


@triton.jit
def load_segment(streams, index):
    """The `Segment` of this index."""
    record = streams.segments + index.to(tl.int64) * len(RECORD.value)
    row = tl.load(record + RECORD.value.row)
    shift = tl.load(record + RECORD.value.shift)
    return Segment(
        streams.words + tl.load(record + RECORD.value.word),
        row,
        row + tl.load(record + RECORD.value.rows),
        tl.load(record + RECORD.value.column),
        tl.load(record + RECORD.value.columns),
        tl.load(record + RECORD.value.classes),
        tl.load(record + RECORD.value.left),
        tl.load(record + RECORD.value.lanes),
        shift,
        tl.load(record + RECORD.value.offset) - (_CENTRE << shift),
    )


@triton.jit
def load_states(streams, index):
    """The state of every lane before a segment, uint32 [32]."""
    pointers = streams.states + index.to(tl.int64) * WARP + tl.arange(0, WARP)
    return tl.load(pointers).to(tl.uint32, bitcast=True)


@triton.jit
def decode_step(segment, state, position, table_ptr, context, inside, BACKEND: tl.constexpr):
    """Decode one integer in every lane that is inside: the integers, int32, and the new states and position.

    state, position, context, inside: [32], of every lane; position: words taken from the stream so far.
    """
    FIELD: tl.constexpr = (1 << _PRECISION.value) - 1
    slot = ((state >> segment.shift) & FIELD).to(tl.int32)
    entry = tl.load(table_ptr + (context << _PRECISION) + slot).to(tl.uint32, bitcast=True)
    symbol = (entry >> (2 * _PRECISION.value)).to(tl.int32)
    low = state.to(tl.int32, bitcast=True) & ((1 << segment.shift) - 1)
    left = ((entry & FIELD) + 1) * (state >> (_PRECISION + segment.shift))
    left += (entry >> _PRECISION) & FIELD

    needs_word = inside & (left < (1 << WORD_BITS.value))
    escapes = inside & (symbol == _ESCAPE)
    words_before, words_taken = count_lanes(needs_word, BACKEND)
    escapes_before, escapes_taken = count_lanes(escapes, BACKEND)
    at = segment.stream + position + words_before + escapes_before
    refilled = left << WORD_BITS | load_word(at, needs_word)
    literal = load_word(at + needs_word.to(tl.int32), escapes).to(tl.int16).to(tl.int32)
    state = tl.where(inside, tl.where(needs_word, refilled, left), state)
    integer = tl.where(escapes, literal, (symbol << segment.shift) + low + segment.smallest)
    return integer, state, position + words_taken + escapes_taken


@triton.jit
def load_word(pointer, mask):
    """Words of the stream, uint32; 0 where the mask is off."""
    return tl.load(pointer, mask=mask, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def count_lanes(flag, BACKEND: tl.constexpr):
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
        below = tl.full((WARP,), 1, tl.int32) << tl.arange(0, WARP)
        return population(flags & (below - 1)), population(flags)
    one = flag.to(tl.int32)
    return tl.cumsum(one, 0) - one, tl.sum(one, 0) + tl.zeros_like(one)


@triton.jit
def population(bits):
    """Number of bits set."""
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
