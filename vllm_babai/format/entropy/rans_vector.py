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

LANES = 16
FEATURES = {"+avx512vbmi2", "+avx512vl"}
I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
I1x16, I16x16, I32x16 = (ir.VectorType(integer, LANES) for integer in (I1, I16, I32))


@intrinsic
def decode_vector(typing_context, words, position, state, context, column_class, lut, shift, centre, out, lane, column):
    """Decode an integer in lanes `lane` … `lane` + 15, from `column` on in column_class and out: the position behind.

    −1, and nothing is changed, when one of them is escaped or when the processor lacks the instructions. Arrays are of
    the types that `rans.decode_rows` asks for, column_class int32. context, shift, centre: uint32. The rest: int64.
    """
    arguments = words, position, state, context, column_class, lut, shift, centre, out, lane, column
    return types.int64(*arguments), _generate


def _generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
    *_, features = context.codegen().magic_tuple()
    if not FEATURES.issubset(features.split(",")):
        return I64(-1)

    def data(argument: int, index: ir.Value) -> ir.Value:
        array = context.make_array(signature.args[argument])(context, builder, values[argument])
        return builder.gep(array.data, [index])

    _, position, _, row_context, _, _, shift, centre, _, lane, column = values
    shift, centre, row_context = (_splat(builder, scalar) for scalar in (shift, centre, row_context))
    field, low_mask = _constant(TOTAL - 1), builder.sub(builder.shl(_constant(1), shift), _constant(1))

    state_at = data(2, lane)
    state, of_columns = _load(builder, state_at, I32x16), _load(builder, data(4, column), I32x16)
    table = builder.shl(builder.add(row_context, of_columns), _constant(PRECISION))
    quotient = builder.lshr(state, shift)
    slot = builder.add(table, builder.and_(quotient, field))
    entry: ir.Value = ir.Constant(I32x16, ir.Undefined)
    for i in range(LANES):
        index = builder.zext(builder.extract_element(slot, I32(i)), I64)
        entry = builder.insert_element(entry, builder.load(data(5, index)), I32(i))

    escaped = builder.bitcast(builder.icmp_unsigned(">=", entry, _constant(ESCAPE << 24)), I16)
    result = cgutils.alloca_once_value(builder, I64(-1))
    with builder.if_then(builder.icmp_unsigned("==", escaped, I16(0)), likely=True):
        high = builder.shl(builder.lshr(entry, _constant(24)), shift)
        integers = builder.add(builder.add(high, builder.and_(state, low_mask)), centre)
        _store(builder, builder.trunc(integers, I16x16), data(8, column))

        frequency = builder.add(builder.and_(entry, field), _constant(1))
        inside = builder.and_(builder.lshr(entry, _constant(PRECISION)), field)
        left = builder.add(builder.mul(frequency, builder.lshr(quotient, _constant(PRECISION))), inside)
        needs_word = builder.icmp_unsigned("<", left, _constant(1 << 16))
        expand = _declare(builder, "llvm.x86.avx512.mask.expand.v16i16", I16x16, [I16x16, I16x16, I1x16])
        none = ir.Constant(I16x16, [0] * LANES)
        taken = builder.call(expand, [_load(builder, data(0, position), I16x16), none, needs_word])
        refilled = builder.or_(builder.shl(left, _constant(16)), builder.zext(taken, I32x16))
        _store(builder, builder.select(needs_word, refilled, left), state_at)

        count = builder.call(_declare(builder, "llvm.ctpop.i16", I16, [I16]), [builder.bitcast(needs_word, I16)])
        builder.store(builder.add(position, builder.zext(count, I64)), result)
    return builder.load(result)


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(I32x16, [value] * LANES)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(I32x16, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, _constant(0))


def _load(builder: ir.IRBuilder, address: ir.Value, vector: ir.VectorType) -> ir.Value:
    loaded = builder.load(builder.bitcast(address, vector.as_pointer()))
    loaded.align = vector.element.width // 8
    return loaded


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    stored = builder.store(value, builder.bitcast(address, value.type.as_pointer()))
    stored.align = value.type.element.width // 8
