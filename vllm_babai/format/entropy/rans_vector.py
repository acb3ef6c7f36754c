"""Sixteen lanes of the rANS decoder in vector instructions, built as LLVM IR.

No compiler finds this in a loop: lanes that need a word take consecutive ones, which AVX-512 has an instruction for.
Numba's cache, which keeps code for processors with other features apart, does not notice a change of this file: delete
`__pycache__` after one. Importing this module imports numba: import it where it is used.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_babai.format.entropy.tables import ESCAPE, PRECISION, TOTAL
from vllm_babai.llvm import I16, I32, I64, constant, declare, load, splat, store

LANES = 16
FEATURES = {"+avx512vbmi2", "+avx512vl"}
I1x16, I16x16, I32x16 = (ir.VectorType(integer, LANES) for integer in (ir.IntType(1), I16, I32))


@intrinsic
def decode_vector(typing_context, words, position, state, row, lookup, lane, column):
    """Decode an integer in lanes `lane` … `lane` + 15, those of columns from `column` on: the position after it.

    −1, and nothing is changed, when one of them is escaped or when the processor lacks the instructions. words: uint16.
    state: uint32. row, lookup: `rans.Row` and `rans.Lookup`. position, lane, column: int64.
    """
    return types.int64(words, position, state, row, lookup, lane, column), _generate


def _generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
    *_, features = context.codegen().magic_tuple()
    if not FEATURES.issubset(features.split(",")):
        return I64(-1)

    def at(array_type: Any, array: ir.Value, index: ir.Value) -> ir.Value:
        """Address of an element of an array."""
        return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])

    words, position, states, row, lookup, lane, column = values
    words_type, _, states_type, row_type, lookup_type, *_ = signature.args
    row_context, column_classes, integers_out = cgutils.unpack_tuple(builder, row)
    table, shift, centre = cgutils.unpack_tuple(builder, lookup)
    table_type, class_type, out_type = lookup_type.types[0], row_type.types[1], row_type.types[2]
    shift, centre, row_context = (splat(builder, scalar, I32x16) for scalar in (shift, centre, row_context))
    field, low_mask = _constant(TOTAL - 1), builder.sub(builder.shl(_constant(1), shift), _constant(1))

    state_at = at(states_type, states, lane)
    state = load(builder, state_at, I32x16)
    of_columns = load(builder, at(class_type, column_classes, column), I32x16)
    base = builder.shl(builder.add(row_context, of_columns), _constant(PRECISION))
    quotient = builder.lshr(state, shift)
    slot = builder.add(base, builder.and_(quotient, field))
    entry: ir.Value = ir.Constant(I32x16, ir.Undefined)
    for i in range(LANES):
        index = builder.zext(builder.extract_element(slot, I32(i)), I64)
        entry = builder.insert_element(entry, builder.load(at(table_type, table, index)), I32(i))

    escaped = builder.bitcast(builder.icmp_unsigned(">=", entry, _constant(ESCAPE << 24)), I16)
    result = cgutils.alloca_once_value(builder, I64(-1))
    with builder.if_then(builder.icmp_unsigned("==", escaped, I16(0)), likely=True):
        high = builder.shl(builder.lshr(entry, _constant(24)), shift)
        integers = builder.add(builder.add(high, builder.and_(state, low_mask)), centre)
        store(builder, builder.trunc(integers, I16x16), at(out_type, integers_out, column))

        frequency = builder.add(builder.and_(entry, field), _constant(1))
        inside = builder.and_(builder.lshr(entry, _constant(PRECISION)), field)
        left = builder.add(builder.mul(frequency, builder.lshr(quotient, _constant(PRECISION))), inside)
        needs_word = builder.icmp_unsigned("<", left, _constant(1 << 16))
        expand = declare(builder, "llvm.x86.avx512.mask.expand.v16i16", I16x16, [I16x16, I16x16, I1x16])
        none = ir.Constant(I16x16, [0] * LANES)
        taken = builder.call(expand, [load(builder, at(words_type, words, position), I16x16), none, needs_word])
        refilled = builder.or_(builder.shl(left, _constant(16)), builder.zext(taken, I32x16))
        store(builder, builder.select(needs_word, refilled, left), state_at)

        count = builder.call(declare(builder, "llvm.ctpop.i16", I16, [I16]), [builder.bitcast(needs_word, I16)])
        builder.store(builder.add(position, builder.zext(count, I64)), result)
    return builder.load(result)


def _constant(value: int) -> ir.Constant:
    return constant(I32x16, value)
