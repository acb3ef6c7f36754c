"""Matrix kernels for the CPU, built as LLVM IR and compiled for the processor at hand; no C compiler is needed.

The dense kernel works on a tile of 64 output rows, one row to a vector lane. A 32-bit word holds several weights of its
row: field p of its low half is weight 2p, field p of its high half is weight 2p + 1. One pass over the words of a
tile serves up to six tokens; products are summed in float32 and scaled once per group. Two kinds of arithmetic:

- `Bfloat16` (processors with AVX512-BF16): a shift brings one field of both halves to the bottom, a table look-up turns
  it into a pair of bfloat16 integers, and one instruction multiplies pairs and adds. Integers and products are exact.
- `Float32` (any processor): shift, mask, convert, multiply and add.

The overflow kernels take entry by entry, with tokens in the lanes. For many tokens, a block of a tile is expanded to
pairs of bfloat16 integers, words of width 16, for a dense kernel that has nothing to decode.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from vllm_babai.cpu.arguments import (
    DenseArguments,
    DequantizeArguments,
    ExpandArguments,
    InsertArguments,
    OverflowArguments,
)
from vllm_babai.cpu.ir import (
    F32,
    BF16x32,
    F32x16,
    I16x32,
    I32x16,
    compile_function,
    fma,
    loop,
    new_function,
    offset,
    prefetch,
)
from vllm_babai.llvm import I16, I32, I64, constant, declare, load, splat, store

TILE_ROWS = 64
BLOCK_COLUMNS = 128  # of a tile: the unit in which overflow is stored and tiles are expanded
LANES = 16  # of float32 in a vector
PREFETCH_BYTES = 8192  # how far ahead of the words a kernel fetches: the processor alone fetches too late
MOST_TOKENS = 6  # per call of a dense kernel: 6 × 4 sums fill the 32 vector registers best

VECTORS = TILE_ROWS // LANES


def weights_per_word(width: int) -> int:
    """How many fields of `width` bits a word holds: 2, 4 or 8, or 16 for expanded weights."""
    return 32 // width


class Field(NamedTuple):
    """A step of the dense kernel: shift a word right, decode, multiply with the activation at `offset` bytes.

    table: factors by what the field holds (only `Bfloat16` decodes by table).
    """

    shift: int
    offset: int
    table: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bfloat16:
    """Pairs of bfloat16 integers times pairs of bfloat16 activations, summed in float32."""

    name: ClassVar = "bf16"
    activation_bytes: ClassVar = 2

    def fields(self, width: int) -> Iterator[Field]:
        """An 8-bit field is taken as two of 4 bits, 16·high + low, because a table has 32 factors; 16 need no table."""
        if width == 8:
            low, high = tuple(range(16)), tuple(16 * (h - 8) for h in range(16))
            for p in range(2):
                yield Field(8 * p, 4 * p, low)
                yield Field(8 * p + 4, 4 * p, high)
            return
        half = 1 << (width - 1)
        for p in range(16 // width):
            yield Field(width * p, 4 * p, tuple(range(-half, half)) if width < 16 else ())

    def decode(self, builder: ir.IRBuilder, shifted: ir.Value, field: Field, width: int) -> ir.Value:
        if not field.table:
            return builder.bitcast(shifted, BF16x32)
        # The instruction looks at five bits of the index; repeating the table makes the surplus ones harmless.
        factors = np.resize(np.array(field.table, np.float32), 32)
        table = ir.Constant(I16x32, (factors.view(np.uint32) >> 16).tolist())
        lookup = declare(builder, "llvm.x86.avx512.permvar.hi.512", I16x32, [I16x32, I16x32])
        return builder.bitcast(builder.call(lookup, [table, builder.bitcast(shifted, I16x32)]), BF16x32)

    def activation(self, builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return builder.bitcast(splat(builder, load(builder, address, I32), I32x16), BF16x32)

    def multiply_add(self, builder: ir.IRBuilder, factor: ir.Value, x: ir.Value, total: ir.Value) -> ir.Value:
        dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32x16, [F32x16, BF16x32, BF16x32])
        return builder.call(dot, [total, factor, x])


@dataclass(frozen=True)
class Float32:
    """Integers converted to float32 times float32 activations."""

    name: ClassVar = "fp32"
    activation_bytes: ClassVar = 4

    def fields(self, width: int) -> Iterator[Field]:
        for p in range(16 // width):
            for half in range(2):
                yield Field(16 * half + width * p, 4 * (2 * p + half))

    def decode(self, builder: ir.IRBuilder, shifted: ir.Value, field: Field, width: int) -> ir.Value:
        unsigned = builder.and_(shifted, constant(I32x16, (1 << width) - 1))
        return builder.sitofp(builder.sub(unsigned, constant(I32x16, 1 << (width - 1))), F32x16)

    def activation(self, builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return splat(builder, load(builder, address, F32), F32x16)

    def multiply_add(self, builder: ir.IRBuilder, factor: ir.Value, x: ir.Value, total: ir.Value) -> ir.Value:
        return fma(builder, factor, x, total)


Arithmetic = Bfloat16 | Float32


@cache
def has_bfloat16() -> bool:
    """Whether this processor runs the `Bfloat16` kernels."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and bool(features.get("avx512bw"))


@cache
def dense_kernels(arithmetic: Arithmetic, width: int) -> tuple[int, ...]:
    """Addresses of the dense kernels for fields of `width` bits, for 1, 2, … MOST_TOKENS tokens."""
    return tuple(compile_function(_dense_module(arithmetic, width, tokens)) for tokens in range(1, MOST_TOKENS + 1))


@cache
def overflow_kernels() -> dict[int, int]:
    """Number of lanes → address of the overflow kernel for so many tokens."""
    return {lanes: compile_function(_overflow_module(lanes)) for lanes in (1, 2, 4, 8, LANES)}


@cache
def expand_kernel(width: int) -> int:
    """Address of the kernel that expands fields of `width` bits to pairs of bfloat16 integers."""
    return compile_function(_expand_module(width))


@cache
def insert_kernel() -> int:
    """Address of the kernel that adds overflow entries to expanded weights."""
    return compile_function(_insert_module())


@cache
def dequantize_kernel(width: int) -> int:
    """Address of the kernel that dequantizes a tile with fields of `width` bits."""
    return compile_function(_dequantize_module(width))


def _dense_module(arithmetic: Arithmetic, width: int, tokens: int) -> ir.Module:
    builder, args = new_function(f"dense_{arithmetic.name}_{width}_{tokens}", DenseArguments)
    x_bytes_per_word = weights_per_word(width) * arithmetic.activation_bytes
    x_rows = [builder.add(args.x, builder.mul(args.x_stride, I64(m))) for m in range(tokens)]
    y_rows = [builder.add(args.y, builder.mul(args.y_stride, I64(m))) for m in range(tokens)]
    sums_of_tile = [(m, i) for m in range(tokens) for i in range(VECTORS)]

    def one_group(group: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        first_word = builder.mul(group, args.words_per_group)

        def one_word(k: ir.Value, totals: Sequence[ir.Value]) -> list[ir.Value]:
            word = builder.add(first_word, k)
            word_at = builder.add(args.words, builder.mul(word, I64(4 * TILE_ROWS)))
            x_offset = builder.mul(word, I64(x_bytes_per_word))
            packed = [load(builder, offset(builder, word_at, 4 * LANES * i), I32x16) for i in range(VECTORS)]
            if width < 16:  # expanded words are in the cache already
                for i in range(VECTORS):
                    prefetch(builder, offset(builder, word_at, PREFETCH_BYTES + 4 * LANES * i))
            sums = dict(zip(sums_of_tile, totals, strict=True))
            for field in arithmetic.fields(width):
                shifted = [builder.lshr(w, constant(I32x16, field.shift)) for w in packed]
                factors = [arithmetic.decode(builder, w, field, width) for w in shifted]
                for m, x_row in enumerate(x_rows):
                    address = offset(builder, builder.add(x_row, x_offset), field.offset)
                    activation = arithmetic.activation(builder, address)
                    for i, factor in enumerate(factors):
                        sums[m, i] = arithmetic.multiply_add(builder, factor, activation, sums[m, i])
            return list(sums.values())

        totals = loop(builder, args.words_per_group, [constant(F32x16, 0.0)] * len(sums_of_tile), one_word)
        scale_at = builder.add(args.scales, builder.mul(group, args.scale_stride))
        scale = [load(builder, offset(builder, scale_at, 4 * LANES * i), F32x16) for i in range(VECTORS)]
        for (m, i), total in zip(sums_of_tile, totals, strict=True):
            address = offset(builder, y_rows[m], 4 * LANES * i)
            store(builder, fma(builder, total, scale[i], load(builder, address, F32x16)), address)
        return []

    loop(builder, args.groups, [], one_group)
    builder.ret_void()
    return builder.module


def _overflow_module(lanes: int) -> ir.Module:
    builder, args = new_function(f"overflow_{lanes}", OverflowArguments)
    vector = ir.VectorType(F32, lanes)

    def one_block(block: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        offset_at = builder.add(args.offsets, builder.mul(block, I64(4)))
        first = builder.sext(load(builder, offset_at, I32), I64)
        last = builder.sext(load(builder, offset(builder, offset_at, 4), I32), I64)
        first_column = builder.mul(block, I64(BLOCK_COLUMNS))

        def one_entry(k: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            entry_at = builder.add(args.entries, builder.mul(builder.add(first, k), I64(4)))
            entry = load(builder, entry_at, I32)
            excess = builder.sitofp(builder.ashr(entry, I32(16)), F32)
            place = builder.zext(entry, I64)
            row = builder.urem(place, I64(TILE_ROWS))
            column = builder.add(first_column, builder.urem(builder.udiv(place, I64(TILE_ROWS)), I64(BLOCK_COLUMNS)))
            scale_of_group = builder.add(
                args.scales, builder.mul(builder.lshr(column, args.group_shift), args.scale_stride)
            )
            scale = load(builder, builder.add(scale_of_group, builder.mul(row, I64(4))), F32)
            activation = load(builder, builder.add(args.x, builder.mul(column, I64(4 * lanes))), vector)
            factor = splat(builder, builder.fmul(excess, scale), vector)
            out_at = builder.add(args.out, builder.mul(row, I64(4 * lanes)))
            store(builder, fma(builder, factor, activation, load(builder, out_at, vector)), out_at)
            return []

        loop(builder, builder.sub(last, first), [], one_entry)
        return []

    loop(builder, args.blocks, [], one_block)
    builder.ret_void()
    return builder.module


def _expand_module(width: int) -> ir.Module:
    builder, args = new_function(f"expand_{width}", ExpandArguments)
    fields = 16 // width

    def one_word(word: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        word_at = builder.add(args.words, builder.mul(word, I64(4 * TILE_ROWS)))
        pairs_at = builder.add(args.pairs, builder.mul(word, I64(4 * TILE_ROWS * fields)))
        for i in range(VECTORS):
            prefetch(builder, offset(builder, word_at, PREFETCH_BYTES + 4 * LANES * i))
        for i in range(VECTORS):
            packed = load(builder, offset(builder, word_at, 4 * LANES * i), I32x16)
            for p, pair in enumerate(_expand(builder, packed, width)):
                store(builder, pair, offset(builder, pairs_at, 4 * (TILE_ROWS * p + LANES * i)))
        return []

    loop(builder, args.count, [], one_word)
    builder.ret_void()
    return builder.module


def _expand(builder: ir.IRBuilder, packed: ir.Value, width: int) -> list[ir.Value]:
    """Pairs of bfloat16 integers from the fields of packed words: by table, or for 8 bits by conversion."""
    if width < 8:
        pairs = Bfloat16()
        shifted = [(builder.lshr(packed, constant(I32x16, field.shift)), field) for field in pairs.fields(width)]
        return [pairs.decode(builder, word, field, width) for word, field in shifted]
    floats = []
    for field in Float32().fields(width):
        value = Float32().decode(builder, builder.lshr(packed, constant(I32x16, field.shift)), field, width)
        floats.append(builder.bitcast(value, I32x16))
    return [
        builder.or_(builder.lshr(even, constant(I32x16, 16)), builder.and_(odd, constant(I32x16, 0xFFFF0000)))
        for even, odd in zip(floats[::2], floats[1::2], strict=True)
    ]


def _insert_module() -> ir.Module:
    builder, args = new_function("insert", InsertArguments)

    def one_entry(k: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        entry_at = builder.add(args.entries, builder.mul(k, I64(4)))
        entry = load(builder, entry_at, I32)
        excess = builder.sitofp(builder.ashr(entry, I32(16)), F32)
        place = builder.zext(entry, I64)
        row = builder.urem(place, I64(TILE_ROWS))
        column = builder.urem(builder.udiv(place, I64(TILE_ROWS)), I64(BLOCK_COLUMNS))
        pair_at = builder.add(builder.mul(builder.udiv(column, I64(2)), I64(4 * TILE_ROWS)), builder.mul(row, I64(4)))
        weight_at = builder.add(args.pairs, builder.add(pair_at, builder.mul(builder.urem(column, I64(2)), I64(2))))
        dense = builder.shl(builder.zext(load(builder, weight_at, I16), I32), I32(16))
        total = builder.bitcast(builder.fadd(builder.bitcast(dense, F32), excess), I32)
        odd = builder.and_(builder.lshr(total, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(builder.add(total, I32(0x7FFF)), odd), I32(16))
        store(builder, builder.trunc(rounded, I16), weight_at)
        return []

    loop(builder, args.count, [], one_entry)
    builder.ret_void()
    return builder.module


def _dequantize_module(width: int) -> ir.Module:
    builder, args = new_function(f"dequantize_{width}", DequantizeArguments)
    arithmetic = Float32()

    def one_group(group: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        scale_at = builder.add(args.scales, builder.mul(group, args.scale_stride))
        scale = [load(builder, offset(builder, scale_at, 4 * LANES * i), F32x16) for i in range(VECTORS)]

        def one_word(k: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            word = builder.add(builder.mul(group, args.words_per_group), k)
            word_at = builder.add(args.words, builder.mul(word, I64(4 * TILE_ROWS)))
            line = builder.mul(args.weight_stride, I64(weights_per_word(width)))
            weight_at = builder.add(args.weight, builder.mul(word, line))
            for i in range(VECTORS):
                packed = load(builder, offset(builder, word_at, 4 * LANES * i), I32x16)
                for k_in_word, field in enumerate(arithmetic.fields(width)):
                    shifted = builder.lshr(packed, constant(I32x16, field.shift))
                    value = builder.fmul(arithmetic.decode(builder, shifted, field, width), scale[i])
                    row_at = builder.add(weight_at, builder.mul(args.weight_stride, I64(k_in_word)))
                    store(builder, value, offset(builder, row_at, 4 * LANES * i))
            return []

        loop(builder, args.words_per_group, [], one_word)
        return []

    loop(builder, args.groups, [], one_group)
    builder.ret_void()
    return builder.module
