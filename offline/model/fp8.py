"""Checkpoints published in FP8, read as floating point: what they hold is the model that is quantized.

A weight in float8_e4m3fn comes with scales called `…_scale_inv`, which multiply it in spite of their name: one for all
of it, or one for every block of `weight_block_size`. The last blocks of a row or column may be smaller, as in the
kv_a_proj_with_mqa of DeepSeek, of 576 rows. Products are made in float32, and rounded once there.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import Checkpoint, without_quantization

SCALE = "_scale_inv"
BESIDE_WEIGHTS = (SCALE, "activation_scale", "input_scale")  # what only a product in FP8 needs


@dataclass(frozen=True)
class Fp8Checkpoint(Checkpoint):
    """A checkpoint whose FP8 weights are dequantized as they are read; their scales are no tensors of it.

    scales: name of a weight → file that holds its scales. block: rows and columns of a block; None: one scale for all.
    """

    scales: dict[str, Path]
    block: tuple[int, int] | None

    @cached_property
    def stored(self) -> Checkpoint:
        """The checkpoint as it lies on disk."""
        return Checkpoint(self.folder, self.files | {f"{name}{SCALE}": file for name, file in self.scales.items()})

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU; FP8 becomes float32. Raises QuantizationError that names it."""
        tensor = self.stored.read(name)
        if tensor.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return tensor
        if name not in self.scales:
            raise QuantizationError(f"{name} is in FP8, but {self.folder} has no {name}{SCALE} for it")
        try:
            return dequantize_fp8(tensor, self.stored.read(f"{name}{SCALE}"), self.block)
        except ValueError as error:
            raise QuantizationError(f"{name}: {error}") from error

    def read_kept(self, name: str) -> Tensor:
        """As `read`; what was FP8 becomes bfloat16."""
        return self.read(name).bfloat16() if name in self.scales else self.read(name)

    def config(self) -> dict:
        """config.json without the quantization that `read` undoes."""
        return without_quantization(super().config())


def open_fp8(checkpoint: Checkpoint, block: list[int] | None) -> Fp8Checkpoint:
    """A checkpoint that holds weights in FP8. block: its `weight_block_size`."""
    scales = {name.removesuffix(SCALE): file for name, file in checkpoint.files.items() if name.endswith(SCALE)}
    files = {name: file for name, file in checkpoint.files.items() if not name.endswith(BESIDE_WEIGHTS)}
    return Fp8Checkpoint(checkpoint.folder, files, scales, None if block is None else (int(block[0]), int(block[1])))


def dequantize_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """FP8 weight [..., rows, columns] times its scales, float32.

    scales: one value, or [..., ⌈rows / block rows⌉, ⌈columns / block columns⌉]. Raises ValueError for another shape.
    """
    scales = scales.float()
    if scales.numel() == 1:
        return weight.float() * scales.reshape(())
    if block is None:
        raise ValueError(f"config.json has no weight_block_size, but its scales are {tuple(scales.shape)}")
    rows, columns = weight.shape[-2:]
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    if scales.shape != (*weight.shape[:-2], *grid):
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit {rows} × {columns} in blocks of {block}")
    by_weight = scales.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return weight.float() * by_weight
