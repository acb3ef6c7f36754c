"""A kernel compiled for a GPU and run on the CPU by `operations.py`: stands in for one that Triton would launch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from gate import compile_kernel
from numpy.typing import NDArray
from torch import Tensor

from emulator.operations import run
from emulator.ptx import Memory, Program, Shape, parse

MEMORY = 1 << 24  # bytes
TYPES = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class Compiled:
    """`kernel[grid](…)` with tensors on the CPU, as on an NVIDIA GPU of some architecture."""

    kernel: Any
    architecture: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self._launch(grid, arguments, options)

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        named = dict(zip(self.kernel.arg_names, arguments, strict=False))
        unspecialized = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        types = {name: _type(value, name not in unspecialized) for name, value in named.items()}
        constants = {name: value for name, value in options.items() if name in self.kernel.arg_names}
        program, shape = _compile(
            self.kernel,
            tuple(types.items()),
            tuple(constants.items()),
            self.architecture,
            options.get("num_warps", 4),
        )
        passed = [value for name in named for value, kind in _members(named[name], types[name]) if kind != "1"]
        _run(program, shape, grid, passed)


def _type(value: Any, specialized: bool) -> Any:
    """The type of an argument as `compile_kernel` takes it, seen as Triton would."""
    if isinstance(value, tuple):  # Triton looks at members whatever the kernel says of the tuple
        return type(value)(*(_type(member, True) for member in value))
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if not specialized or (value != 1 and value % 16):
        return "i32"
    return "1" if value == 1 else "i32:16"


def _members(value: Any, kind: Any) -> list[tuple[Any, str]]:
    return list(zip(value, kind, strict=True)) if isinstance(value, tuple) else [(value, kind)]


@cache
def _compile(kernel, types, constants, architecture, warps) -> tuple[Program, Shape]:
    compiled = compile_kernel(kernel, dict(types), dict(constants), architecture, warps)
    return parse(compiled.asm["ptx"]), Shape(32 * warps, compiled.metadata.shared)


def _run(program: Program, shape: Shape, grid: tuple[int, ...], arguments: list[Tensor | int]) -> None:
    """Copy all tensors to a memory of their own, run the blocks, and copy them back."""
    memory = Memory(MEMORY)
    storages = {_storage(value): _bytes(value) for value in arguments if isinstance(value, Tensor)}
    bases = {storage: memory.map(raw) for storage, raw in storages.items()}

    def parameter(value: Tensor | int) -> int:
        if isinstance(value, Tensor):
            return bases[_storage(value)] + value.storage_offset() * value.itemsize
        return value

    blocks = [index[::-1] for index in np.ndindex(*grid[::-1])]
    scratch = [0, 0]  # pointers that Triton adds, and that our kernels do not need
    run(program, [*map(parameter, arguments), *scratch], memory, blocks, shape)
    for storage, raw in storages.items():
        raw[:] = memory.bytes[bases[storage] : bases[storage] + len(raw)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """All bytes of a tensor's storage, shared with it."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
