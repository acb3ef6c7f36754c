"""PTX, the assembly that Triton makes for NVIDIA GPUs, and the state of threads that run it on the CPU.

All threads of a block go in step; a register is one numpy array over them. `operations.py` has the instructions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]  # a register: raw bits of every thread
Values = NDArray[Any]  # the same as numbers of some type
Mask = NDArray[np.bool_]

WARP = 32
GUARD = 4096  # bytes between tensors that nothing may touch


class Fault(Exception):
    """The program did what would be an error, or undefined, on a GPU; names the instruction."""


@dataclass(frozen=True)
class Instruction:
    """`@guard name.modifiers operands`; an operand is a word, a vector of words, or an address [word + offset]."""

    text: str
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """Instructions of one kernel, and the index of the instruction behind each label."""

    instructions: list[Instruction]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Read the only kernel in a PTX module."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", body[: body.index("\n}")], flags=re.MULTILINE)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r";|(\$\w+:)", body):
        text = " ".join((statement or "").split())
        if text.endswith(":"):
            labels[text[:-1]] = len(instructions)
            continue
        match = re.match(r"[{} ]*(?:@(!?[\w%]+) )?([a-z]\w*)([\w.:]*) ?(.*)", text)
        if match:
            guard, name, modifiers, operands = match.groups(default="")
            parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
            instructions.append(Instruction(text, guard, name, tuple(modifiers.split(".")[1:]), tuple(parts)))
    return Program(instructions, labels)


class Memory:
    """One address space, in which tensors lie apart from each other; tells which bytes belong to one."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN in every floating type
        self.mapped = np.zeros(size, bool)
        self.used = GUARD

    def map(self, raw: NDArray[np.uint8]) -> int:
        """Copy a tensor's bytes in; its address."""
        address, end = self.used, self.used + len(raw)
        if end + GUARD > len(self.bytes):
            raise MemoryError("tensors do not fit the memory")
        self.bytes[address:end], self.mapped[address:end] = raw, True
        self.used = (-(-end // GUARD) + 1) * GUARD
        return address

    def places(self, address: Bits, size: int) -> NDArray[np.int64]:
        """Indices [threads, size] of `size` bytes from each address. Raises Fault if any is not mapped or aligned."""
        if (address % np.uint64(size)).any():
            raise Fault(f"access of {size} bytes at {address[address % np.uint64(size) != 0][0]} is not aligned")
        places = address.astype(np.int64)[:, None] + np.arange(size)
        if places.size and (places.max() >= len(self.bytes) or not self.mapped[places].all()):
            raise Fault(f"access of {size} bytes outside of every tensor")
        return places


@dataclass(frozen=True)
class Shape:
    """Threads of a block, and its bytes of shared memory."""

    threads: int
    shared: int


@dataclass
class Block:
    """The state of a block of threads: registers, shared memory, copies on their way."""

    program: Program
    parameters: Sequence[int]
    memory: Memory
    index: Sequence[int]
    shape: Shape
    registers: dict[str, Values] = field(default_factory=dict)
    copies: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])  # groups, the last one is open

    def __post_init__(self) -> None:
        self.shared = Memory(self.shape.shared + 3 * GUARD)
        self.shared_base = self.shared.map(np.full(self.shape.shared, 0xFF, np.uint8))
        thread = np.arange(self.shape.threads, dtype=np.uint64)
        self.registers |= {"%tid.x": thread, "global_smem": np.full_like(thread, self.shared_base)}
        self.registers |= {
            f"%ctaid.{axis}": np.full_like(thread, i) for axis, i in zip("xyz", self.index, strict=False)
        }

    def active(self, one: Instruction) -> Mask:
        if not one.guard:
            return np.ones(self.shape.threads, bool)
        return self.registers[one.guard.lstrip("!")] ^ one.guard.startswith("!")

    def bits(self, word: str) -> Bits:
        """A register, a constant or an address [register + offset]."""
        if word.startswith("["):
            register, _, offset = word.strip("[] ").partition("+")
            return self.registers[register.strip()] + np.uint64(int(offset or 0))
        if re.match(r"-?\d", word):
            value = int(word[2:], 16) if word.startswith(("0f", "0d")) else int(word.rstrip("U"), 0)
            return np.full(self.shape.threads, value & (2**64 - 1), np.uint64)
        return self.registers[word].astype(np.uint64)

    def values(self, word: str, kind: str) -> Values:
        """An operand as numbers of a type."""
        return decode(self.bits(word), kind)

    def space(self, one: Instruction) -> Memory:
        """The memory that a load or store is for."""
        return self.shared if one.modifiers[0].startswith("shared") else self.memory

    def set(self, word: str, bits: Values, active: Mask) -> None:
        """Write a register where the guard allows it; a predicate if `bits` is boolean."""
        if word != "_":
            old = self.registers.get(word, np.zeros_like(bits))
            self.registers[word] = bits if active.all() else np.where(active, bits, old)


def words(operand: str) -> list[str]:
    """The words of a vector operand, or the operand itself."""
    return re.findall(r"[^{},\s]+", operand)


def width(kind: str) -> int:
    """Bytes of a type."""
    return int(re.sub(r"\D", "", kind)) // 8


def decode(bits: Bits, kind: str) -> Values:
    """Raw bits as numbers; bf16 as fp32."""
    if kind == "pred":
        return bits.astype(bool)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    raw = bits.astype(f"u{width(kind)}")
    return raw if kind[0] in "bu" else raw.view({"s": "i", "f": "f"}[kind[0]] + str(width(kind)))


def encode(values: Values, kind: str) -> Bits:
    """Numbers as raw bits of a type, floats to nearest even."""
    if kind == "pred":
        return values
    if kind == "bf16":
        raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (raw + 0x7FFF + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(values), np.uint64(0x7FFF), rounded)
    if kind[0] == "f":
        return values.astype(f"f{width(kind)}").view(f"u{width(kind)}").astype(np.uint64)
    if values.dtype.kind == "f":
        values = values.astype(np.int64)
    return values.astype(f"u{width(kind)}").astype(np.uint64)
