"""The custom op `babai::coded_matmul`: x Wᵀ with a weight that stays entropy coded on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.entropy.code import padded
from vllm_babai.format.entropy.hptq import MAX_LANES
from vllm_babai.format.entropy.segments import FIELDS, SegmentedMatrix
from vllm_babai.ops.backends import backend
from vllm_babai.ops.register import register


class CodedTensors(NamedTuple):
    """The streams of one linear layer in device memory, see `vllm_babai.format.entropy.segments`.

    words: int16 [words], padded at the end. segments: int32 [segments, FIELDS]. states: int32 [segments, MAX_LANES].
    row_class: int16 [rows], column_class: uint8 [classes]. table: int32 [contexts · 2^PRECISION].
    scales: fp32 [rows, groups]. across: the largest number of segments side by side.
    """

    words: Tensor
    segments: Tensor
    states: Tensor
    row_class: Tensor
    column_class: Tensor
    table: Tensor
    scales: Tensor
    across: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order in which the GPU kernels take them."""
        return self[:-1]


def coded_tensors(matrix: SegmentedMatrix, scales: Tensor, device: torch.device) -> CodedTensors:
    """Place the streams of a layer and its scales, bfloat16 [rows, groups], on a device."""
    return CodedTensors(
        torch.from_numpy(padded(matrix.words, MAX_LANES).view("int16")).to(device),
        torch.from_numpy(matrix.segments.view(np.int32).reshape(-1, len(FIELDS))).to(device),
        torch.from_numpy(matrix.states.view("int32")).to(device),
        torch.from_numpy(matrix.row_class.astype("int16")).to(device),
        torch.from_numpy(matrix.column_class.astype("uint8")).to(device),
        torch.from_numpy(matrix.table.view("int32")).to(device),
        scales.to(device, torch.float32),
        matrix.across,
    )


def multiply_decoded(x: Tensor, coded: CodedTensors, decode: Callable[[CodedTensors, Tensor], Tensor]) -> Tensor:
    """x Wᵀ in the dtype of x, for many tokens: decode the weight into a workspace, then multiply with it.

    PyTorch's caching allocator makes it one workspace for all layers, also inside a captured CUDA graph.
    decode(coded, out) writes the weight into `out` [rows, columns] and returns it.
    """
    # fp16 has no room for small scales times large integers
    compute = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
    workspace = torch.empty(len(coded.row_class), x.shape[-1], dtype=compute, device=x.device)
    return torch.nn.functional.linear(x.to(compute), decode(coded, workspace)).to(x.dtype)


def _coded_matmul(x: Tensor, *fields: Any) -> Tensor:
    return backend(x.device.type).multiply_coded(x, CodedTensors(*fields))


def _coded_matmul_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], CodedTensors(*fields).row_class.shape[0])


library = register(
    "coded_matmul(Tensor x, Tensor words, Tensor segments, Tensor states, Tensor row_class, Tensor column_class,"
    " Tensor table, Tensor scales, int across) -> Tensor",
    _coded_matmul,
    _coded_matmul_fake,
)
