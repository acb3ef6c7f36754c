"""Checkpoints whose experts are published in MXFP4, as gpt-oss is, read as floating point.

`X_blocks` holds two numbers of four bits in a byte, 32 to a block, and `X_scales` the exponent of each block, biased by
127. The tensor X has rows and columns exchanged, as the module of transformers has them. Every product is exact in
bfloat16.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import Checkpoint, without_quantization

BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4Checkpoint(Checkpoint):
    """A checkpoint whose MXFP4 tensors are dequantized as they are read, under the names that they have unpacked.

    packed: name of a tensor → files that hold its blocks and its scales.
    """

    packed: dict[str, tuple[Path, Path]]

    @cached_property
    def stored(self) -> Checkpoint:
        """The checkpoint as it lies on disk."""
        files = {name: file for name, file in self.files.items() if name not in self.packed}
        for name, (blocks, scales) in self.packed.items():
            files |= {f"{name}{BLOCKS}": blocks, f"{name}{SCALES}": scales}
        return Checkpoint(self.folder, files)

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU; MXFP4 becomes bfloat16. Raises QuantizationError that names it."""
        if name not in self.packed:
            return self.stored.read(name)
        blocks, scales = self.stored.read(f"{name}{BLOCKS}"), self.stored.read(f"{name}{SCALES}")
        try:
            return dequantize_mxfp4(blocks, scales)
        except ValueError as error:
            raise QuantizationError(f"{name}: {error}; fetch the model again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor called `name` as it is read."""
        if name not in self.packed:
            return self.stored.shape(name)
        *experts, rows, groups, half = self.stored.shape(f"{name}{BLOCKS}")
        return (*experts, groups * half * 2, rows)

    def size(self, name: str) -> int:
        """Bytes of the tensor called `name` as it is read."""
        return 2 * math.prod(self.shape(name)) if name in self.packed else self.stored.size(name)

    def config(self) -> dict:
        """config.json without the quantization that `read` undoes."""
        return without_quantization(super().config())


def open_mxfp4(checkpoint: Checkpoint) -> Mxfp4Checkpoint:
    """A checkpoint that holds tensors in MXFP4. Raises QuantizationError that names blocks without scales."""
    names = [name.removesuffix(BLOCKS) for name in checkpoint.files if name.endswith(BLOCKS)]
    for name in names:
        if f"{name}{SCALES}" not in checkpoint.files:
            raise QuantizationError(f"{name} is in MXFP4, but {checkpoint.folder} has no {name}{SCALES} for it")
    packed = {name: (checkpoint.files[f"{name}{BLOCKS}"], checkpoint.files[f"{name}{SCALES}"]) for name in names}
    parts = {f"{name}{part}" for name in names for part in (BLOCKS, SCALES)}
    others = {name: file for name, file in checkpoint.files.items() if name not in parts}
    return Mxfp4Checkpoint(checkpoint.folder, others | {name: files[0] for name, files in packed.items()}, packed)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weights [experts, 32 · groups, rows] of some blocks and scales, bfloat16.

    blocks: [experts, rows, groups, 16] uint8. scales: [experts, rows, groups] uint8.
    Raises ValueError for other types and shapes.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales of MXFP4 are uint8, not {blocks.dtype} and {scales.dtype}")
    if blocks.ndim != 4 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit MXFP4 blocks of {tuple(blocks.shape)}")
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
