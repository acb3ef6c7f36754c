"""What the CPU kernels are written with: LLVM's types and instructions, and the compiler for the processor at hand.

Addresses are 64-bit integers here, as Python and numba hand them over; vectors need not be aligned.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir

from vllm_babai.llvm import I16, I32, I64, declare

F32 = ir.FloatType()
I16x32, I32x16, F32x16 = ir.VectorType(I16, 32), ir.VectorType(I32, 16), ir.VectorType(F32, 16)


Arguments = TypeVar("Arguments", bound=Any)


class BfloatType(ir.Type):
    """bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BfloatType)

    def __hash__(self) -> int:
        return hash(BfloatType)


BF16x32 = ir.VectorType(BfloatType(), 32)


def new_function(name: str, arguments: type[Arguments]) -> tuple[ir.IRBuilder, Arguments]:
    """A function of integer arguments, addresses among them: a builder at its start, and the arguments by name.

    arguments: a NamedTuple whose fields are the arguments in their order.
    """
    function = ir.Function(ir.Module(name), ir.FunctionType(ir.VoidType(), [I64] * len(arguments._fields)), name)
    # Processors that would rather use 256-bit vectors must not split those of `Bfloat16`. llvmlite's `add` knows no
    # attributes that are strings.
    set.add(function.attributes, '"min-legal-vector-width"="512" "prefer-vector-width"="512"')
    return ir.IRBuilder(function.append_basic_block()), arguments(*function.args)


def loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    initial: Sequence[ir.Value],
    body: Callable[[ir.Value, Sequence[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """Run body(index, carried) → carried `count` times; returns what the last round carried."""
    before, head, inside, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    carried = [builder.phi(value.type) for value in initial]
    builder.cbranch(builder.icmp_unsigned("<", index, count), inside, end)
    builder.position_at_end(inside)
    results = body(index, carried)
    following = builder.add(index, I64(1))
    for phi, first, again in zip([index, *carried], [I64(0), *initial], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, builder.block)
    builder.branch(head)
    builder.position_at_end(end)
    return carried


def offset(builder: ir.IRBuilder, address: ir.Value, distance: int) -> ir.Value:
    """The address so many bytes after another."""
    return builder.add(address, I64(distance))


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch a cache line to read it soon; an address that does not exist does no harm."""
    pointer = ir.IntType(8).as_pointer()
    intrinsic = declare(builder, "llvm.prefetch.p0i8", ir.VoidType(), [pointer, I32, I32, I32])
    read, soon, data = I32(0), I32(3), I32(1)
    builder.call(intrinsic, [builder.inttoptr(address, pointer), read, soon, data])


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a · b + c of float32 vectors, rounded once."""
    intrinsic = declare(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a.type] * 3)
    return builder.call(intrinsic, [a, b, c])


@cache
def _compiler() -> tuple[llvm.TargetMachine, llvm.ExecutionEngine]:
    """The one compiler of this process; what it compiled lives as long as it does."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    return machine, llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def compile_function(module: ir.Module) -> int:
    """Address of the one function of a module."""
    machine, engine = _compiler()
    compiled = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(compiled, passes)
    engine.add_module(compiled)
    engine.finalize_object()
    return engine.get_function_address(module.name)
