"""Runs PTX on the CPU, so that inline assembly and compiled layouts are tried where there is no GPU.

As threads go in step and blocks one after the other, neither races nor missing barriers show. What does: wrong values,
use of what was never written, and any access outside of the tensors that were passed, or not aligned. Asynchronous
copies arrive as late as they may. Semantics are those of the PTX ISA; there is only what our kernels need of it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import numpy as np

from emulator.ptx import (
    WARP,
    Block,
    Fault,
    Instruction,
    Mask,
    Memory,
    Program,
    Shape,
    Values,
    decode,
    encode,
    width,
    words,
)

Operation = Callable[[Block, Instruction, Mask], None]
OPERATIONS: dict[str, Operation] = {}


def _operation(*names: str) -> Callable[[Operation], Operation]:
    """Register the function that carries out the instructions of these names."""

    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def _shift_left(value: Values, count: Values) -> Values:
    return np.where(count < 8 * value.itemsize, value << count, 0)


def _shift_right(value: Values, count: Values) -> Values:
    last = 8 * value.itemsize - 1  # shifting by more leaves copies of the sign, or zeros
    return np.where(count <= last, value >> count, value >> last >> 1)


def _extract(value: Values, first: Values, length: Values) -> Values:
    unused = 8 * value.itemsize - length
    return value << (unused - first) >> unused


_ARITHMETIC: dict[str, Callable[..., Values]] = {  # on numbers of one type, in every thread alike
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,  # the product is exact, so that it is rounded once
    "div": lambda a, b: np.trunc(a / b),  # of 32-bit integers: exact in float64
    "rem": np.fmod,  # with the sign of the dividend
    "min": lambda *values: reduce(np.minimum, values),  # of two, from sm_100 on also of three
    "max": lambda *values: reduce(np.maximum, values),
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _extract,
    "popc": np.bitwise_count,
    "lop3": lambda a, b, c, table: reduce(
        np.bitwise_or,
        ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) & -(table >> i & 1) for i in range(8)),
    ),
}


@_operation(*_ARITHMETIC)
def _arithmetic(block: Block, one: Instruction, active: Mask) -> None:
    function, kind = _ARITHMETIC[one.name], one.modifiers[-1]
    target, *sources = one.operands
    if "wide" in one.modifiers:  # factors of `kind`, the result and what is added twice as wide
        wide = f"{kind[0]}{16 * width(kind)}"
        factors = [block.values(word, kind).astype(decode(block.bits(word), wide).dtype) for word in sources[:2]]
        block.set(target, encode(function(*factors, *(block.values(word, wide) for word in sources[2:])), wide), active)
    elif kind.endswith("x2"):  # two numbers in a register
        kind = kind[:-2]
        upper = np.uint64(8 * width(kind))
        low = function(*(block.values(word, kind) for word in sources))
        high = function(*(decode(block.bits(word) >> upper, kind) for word in sources))
        block.set(target, encode(low, kind) | encode(high, kind) << upper, active)
    else:
        block.set(target, encode(function(*(block.values(word, kind) for word in sources)), kind), active)


@_operation("mov")
def _move(block: Block, one: Instruction, active: Mask) -> None:
    kind, (target, source) = one.modifiers[-1], one.operands
    if target.startswith("{"):  # unpack
        parts = words(target)
        size = 8 * width(kind) // len(parts)
        for i, part in enumerate(parts):
            block.set(part, block.bits(source) >> np.uint64(i * size) & np.uint64(2**size - 1), active)
    elif source.startswith("{"):
        parts = words(source)
        size = 8 * width(kind) // len(parts)
        undefined = np.full(block.shape.threads, 2**size - 1, np.uint64)  # compilers leave out what no one will read
        known = [block.bits(part) if part in block.registers else undefined for part in parts]
        packed = (bits << np.uint64(i * size) for i, bits in enumerate(known))
        block.set(target, reduce(np.bitwise_or, packed), active)
    else:
        block.set(target, encode(block.values(source, kind), kind), active)


@_operation("cvt")
def _convert(block: Block, one: Instruction, active: Mask) -> None:
    to, kind = one.modifiers[-2:]
    target, *sources = one.operands
    if to.endswith("x2"):  # the first source goes to the upper half
        upper, lower = (encode(block.values(word, kind), to[:-2]) for word in sources)
        block.set(target, upper << np.uint64(16) | lower, active)
    else:
        block.set(target, encode(block.values(sources[0], kind), to), active)


@_operation("setp")
def _compare(block: Block, one: Instruction, active: Mask) -> None:
    comparison, kind = one.modifiers
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
    compare["ge"] = np.greater_equal
    target, *sources = one.operands
    block.set(target, compare[comparison](*(block.values(word, kind) for word in sources)), active)


@_operation("selp")
def _select(block: Block, one: Instruction, active: Mask) -> None:
    target, chosen, other, condition = one.operands
    block.set(target, np.where(block.registers[condition], block.bits(chosen), block.bits(other)), active)


@_operation("prmt")
def _permute_bytes(block: Block, one: Instruction, active: Mask) -> None:
    target, low, high, selector = one.operands
    both = block.bits(low) | block.bits(high) << np.uint64(32)
    chosen = block.bits(selector)  # every thread may have a selector of its own
    if (chosen & np.uint64(0x8888)).any():
        raise Fault("a permutation that repeats signs is not implemented")
    eight, byte = np.uint64(8), np.uint64(0xFF)
    places = (chosen >> np.uint64(4 * i) & np.uint64(7) for i in range(4))
    moved = ((both >> eight * place & byte) << eight * np.uint64(i) for i, place in enumerate(places))
    block.set(target, reduce(np.bitwise_or, moved), active)


@_operation("shf")
def _funnel_shift(block: Block, one: Instruction, active: Mask) -> None:
    """Shift two words side by side, the second operand being the upper one, and keep the upper or the lower word."""
    if one.modifiers[1] != "wrap":
        raise Fault("a funnel shift that clamps is not implemented")
    target, lower, upper, count = one.operands
    both = block.bits(upper) << np.uint64(32) | block.bits(lower)
    shift = block.bits(count) & np.uint64(31)
    moved = both << shift >> np.uint64(32) if one.modifiers[0] == "l" else both >> shift
    block.set(target, moved & np.uint64(0xFFFFFFFF), active)


@_operation("createpolicy", "bar", "fence", "griddepcontrol")
def _nothing(block: Block, one: Instruction, active: Mask) -> None:
    """Threads go in step, kernels one after the other, and there is no cache."""
    if one.name == "createpolicy":
        block.set(one.operands[0], np.zeros(block.shape.threads, np.uint64), active)


@_operation("ld")
def _load(block: Block, one: Instruction, active: Mask) -> None:
    targets, address = words(one.operands[0]), one.operands[1]
    if one.modifiers[0] == "param":
        value = block.parameters[int(re.findall(r"\d+", address)[-1])]
        block.set(targets[0], np.full(block.shape.threads, value & (2**64 - 1), np.uint64), active)
        return
    memory, size = block.space(one), width(one.modifiers[-1])
    raw = memory.bytes[memory.places(block.bits(address)[active], size * len(targets))]
    for i, target in enumerate(targets):
        bits = np.zeros(block.shape.threads, np.uint64)
        bits[active] = np.ascontiguousarray(raw[:, i * size : (i + 1) * size]).view(f"u{size}")[:, 0]
        block.set(target, bits, active)


@_operation("st")
def _store(block: Block, one: Instruction, active: Mask) -> None:
    address, sources = one.operands[0], words(one.operands[1])
    memory, size = block.space(one), width(one.modifiers[-1])
    raw = np.stack([block.bits(word)[active].astype(f"u{size}") for word in sources], 1).view(np.uint8)
    memory.bytes[memory.places(block.bits(address)[active], size * len(sources))] = raw


@_operation("cp")
def _copy_to_shared(block: Block, one: Instruction, active: Mask) -> None:
    """cp.async: what is copied arrives when the thread waits for its group."""
    if one.modifiers[1] == "commit_group":
        block.copies.append([])
    elif one.modifiers[1] == "wait_group":
        arrived = max(0, len(block.copies) - 1 - int(one.operands[0]))
        for copy in [copy for group in block.copies[:arrived] for copy in group]:
            copy()
        block.copies = block.copies[arrived:]
    else:
        to, source, size, read = (block.bits(word)[active] for word in one.operands[:4])
        inside = np.arange(int(size[0])) < read[:, None].astype(int)
        raw = np.zeros(inside.shape, np.uint8)
        for i in np.flatnonzero(read):
            raw[i, : int(read[i])] = block.memory.bytes[block.memory.places(source[i : i + 1], int(read[i]))]
        places = block.shared.places(to, int(size[0]))
        block.copies[-1].append(lambda: block.shared.bytes.__setitem__(places, raw))


@_operation("atom")
def _atomic_add(block: Block, one: Instruction, active: Mask) -> None:
    target, address, value = one.operands
    kind = one.modifiers[-1]
    old = np.zeros(block.shape.threads, np.uint64)
    for thread in np.flatnonzero(active):
        place = block.memory.places(block.bits(address)[[thread]], width(kind))[0]
        before = block.memory.bytes[place].view(f"u{width(kind)}")
        old[thread] = before[0]
        block.memory.bytes[place] = (before + block.values(value, kind)[thread]).view(np.uint8)
    block.set(target, old, active)


@_operation("shfl")
def _shuffle(block: Block, one: Instruction, active: Mask) -> None:
    target, source, operand, segments = one.operands[:4]
    if segments != ("0" if one.modifiers[1] == "up" else "31"):
        raise Fault("shuffles within parts of a warp are not implemented")
    lane, lanes = np.arange(block.shape.threads) % WARP, block.bits(operand).astype(np.int64)
    below = np.where(lane >= lanes, lane - lanes, lane)  # who has no lane so far below keeps what it has
    chosen = {"bfly": lane ^ lanes, "idx": lanes, "up": below}[one.modifiers[1]] % WARP
    block.set(target, block.bits(source).reshape(-1, WARP)[np.arange(block.shape.threads) // WARP, chosen], active)


@_operation("redux")
def _reduce(block: Block, one: Instruction, active: Mask) -> None:
    operation, kind = one.modifiers[-2:]
    values = block.values(one.operands[1], kind).reshape(-1, WARP)
    result = {"max": np.max, "min": np.min, "add": np.sum}[operation](values, 1)
    block.set(one.operands[0], encode(np.repeat(result, WARP), kind), active)


@_operation("vote")
def _ballot(block: Block, one: Instruction, active: Mask) -> None:
    flags = block.registers[one.operands[1]].reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
    block.set(one.operands[0], np.repeat(flags.sum(1, dtype=np.uint64), WARP), active)


# Fragments of 16-bit matrices: the PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
_LANE = np.arange(WARP)
_ROW, _PAIR = _LANE // 4, 2 * (_LANE % 4)  # of an 8 × 8 matrix: the row, and the first of two columns, of each lane


def _fragment(block: Block, registers: Sequence[str], kind: str) -> Values:
    """Registers that hold two numbers each as [warps, lanes, registers, 2] in fp32."""
    bits = np.stack([block.bits(word) for word in registers], 1).astype(np.uint32).view(np.uint16)
    return decode(bits.astype(np.uint64), kind).astype(np.float32).reshape(-1, WARP, len(registers), 2)


def _left(block: Block, registers: Sequence[str], kind: str) -> Values:
    """Operand A [warps, 16, 16] of a matrix product."""
    fragment = _fragment(block, registers, kind)
    matrix = np.empty((len(fragment), 16, 16), np.float32)
    for register, half in np.ndindex(4, 2):
        matrix[:, _ROW + register % 2 * 8, _PAIR + half + register // 2 * 8] = fragment[:, :, register, half]
    return matrix


def _sums(block: Block, registers: Sequence[str]) -> Values:
    """Accumulators [warps, 16, columns]: four registers for eight columns."""
    numbers = np.stack([block.values(word, "f32") for word in registers], 1).reshape(-1, WARP, len(registers))
    matrix = np.empty((len(numbers), 16, 2 * len(registers)), np.float32)
    for i in range(len(registers)):
        matrix[:, _ROW + i % 4 // 2 * 8, _PAIR + i % 2 + i // 4 * 8] = numbers[:, :, i]
    return matrix


def _set_sums(block: Block, registers: Sequence[str], matrix: Values, active: Mask) -> None:
    for i, register in enumerate(registers):
        numbers = matrix[:, _ROW + i % 4 // 2 * 8, _PAIR + i % 2 + i // 4 * 8]
        block.set(register, encode(numbers.reshape(-1), "f32"), active)


@_operation("mma")
def _matrix_product(block: Block, one: Instruction, active: Mask) -> None:
    if one.modifiers[2:5] != ("m16n8k16", "row", "col"):
        raise Fault("a matrix product of another shape is not implemented")
    target, a, b, sums = map(words, one.operands)
    kind = one.modifiers[-3]
    fragment = _fragment(block, b, kind)
    right = np.empty((len(fragment), 16, 8), np.float32)
    for register, half in np.ndindex(2, 2):
        right[:, _PAIR + half + register * 8, _ROW] = fragment[:, :, register, half]
    _set_sums(block, target, _sums(block, sums) + _left(block, a, kind) @ right, active)


@_operation("wgmma")
def _group_matrix_product(block: Block, one: Instruction, active: Mask) -> None:
    """wgmma with A [64, 16] in registers of four warps, and B [16, N] in shared memory, columns one after the other."""
    if one.modifiers[0] != "mma_async":
        return
    target, a, descriptor, add, *signs = one.operands
    if not a.startswith("{") or signs != ["1", "1", "0"]:
        raise Fault("this form of wgmma is not implemented")
    kind, columns = one.modifiers[-1], len(words(target)) * 2
    fields = int(block.bits(descriptor)[0])
    start, stride, swizzle = (fields & 0x3FFF) << 4, (fields >> 32 & 0x3FFF) << 4, fields >> 62
    if swizzle == 0:
        raise Fault("wgmma without swizzling is not implemented")
    length = 256 >> swizzle  # bytes of one column, side by side
    column, row = np.arange(columns)[:, None], np.arange(16)[None, :]
    address = start + column // 8 * stride + column % 8 * length + 2 * row
    address ^= (address >> 7 & (length // 16 - 1)) << 4
    places = block.shared.places(address.reshape(-1).astype(np.uint64), 2)
    right = decode(block.shared.bytes[places].view(np.uint16)[:, 0].astype(np.uint64), kind).reshape(columns, 16).T
    product = _left(block, words(a), kind) @ right.astype(np.float32)
    if add == "1" or (add != "0" and block.registers[add].all()):
        product += _sums(block, words(target))
    _set_sums(block, words(target), product, active)


@_operation("ldmatrix", "stmatrix")
def _move_matrices(block: Block, one: Instruction, active: Mask) -> None:
    """Matrices of 8 × 8 16-bit numbers; lanes 8i … 8i + 7 hold the addresses of the rows of matrix i."""
    load = one.name == "ldmatrix"
    address, registers = one.operands[load], words(one.operands[not load])
    addresses = block.bits(address).reshape(-1, WARP)
    for i, register in enumerate(registers):
        for half in (0, 1):
            row, column = (_PAIR + half, _ROW) if "trans" in one.modifiers else (_ROW, _PAIR + half)
            at = addresses[:, 8 * i + row] + (2 * column).astype(np.uint64)
            places, upper = block.shared.places(at.reshape(-1), 2), np.uint64(16 * half)
            if load:
                number = block.shared.bytes[places].view(np.uint16)[:, 0].astype(np.uint64)
                block.set(register, number << upper | (block.bits(register) if half else np.uint64(0)), active)
            else:
                number = (block.bits(register) >> upper).astype(np.uint16)
                block.shared.bytes[places] = number[:, None].view(np.uint8)


def run(
    program: Program, parameters: Sequence[int], memory: Memory, grid: Iterable[Sequence[int]], shape: Shape
) -> None:
    """Run a kernel's blocks one after the other. parameters: addresses and integers. grid: indices of the blocks."""
    for index in grid:
        _run_block(Block(program, parameters, memory, index, shape))


def _run_block(block: Block) -> None:
    at = 0
    while True:
        one = block.program.instructions[at]
        at += 1
        try:
            active = block.active(one)
            if one.name == "ret":
                return
            if one.name == "bra":
                if active.any() != active.all():
                    raise Fault("threads of a block part ways")
                at = block.program.labels[one.operands[0]] if active.all() else at
                continue
            with np.errstate(all="ignore"):
                OPERATIONS[one.name](block, one, active)
        except (Fault, KeyError) as problem:
            raise Fault(f"{problem} in block {block.index}: {one.text}") from problem
