"""LLVM instructions that llvmlite does not spell out: for the CPU kernels and the vector loop of the rANS decoder.

An address is a pointer, or a 64-bit integer as Python hands it over. Vectors need not be aligned.
"""

from llvmlite import ir

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """A function that LLVM knows by this name, most often an instruction of the processor."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name=name)


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """A vector with the same value in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def splat(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A vector with a scalar in every lane."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """What stands at an address: a scalar or a vector."""
    return builder.load(_pointer(builder, address, kind), align=2)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Write a scalar or a vector to an address."""
    builder.store(value, _pointer(builder, address, value.type), align=2)


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    cast = builder.inttoptr if isinstance(address.type, ir.IntType) else builder.bitcast
    return cast(address, kind.as_pointer())
