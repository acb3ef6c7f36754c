"""HPTQ that stays coded in device memory: its streams as tensors, and the op `babai::coded_matmul` that decodes them.

Importable without vllm.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.entropy.code import padded
from vllm_babai.format.entropy.hptq import MAX_LANES
from vllm_babai.format.entropy.segments import FIELDS, SegmentedMatrix
from vllm_babai.ops.matmul import library

BACKENDS = {"cpu": "vllm_babai.cpu.entropy", "cuda": "vllm_babai.triton_kernels.coded"}


class CodedTensors(NamedTuple):
    """The streams of one linear layer in device memory, see `format.segments`.

    words: int16 [words], with room behind. segments: int32 [segments, FIELDS]. states: int32 [segments, MAX_LANES].
    row_class: int16 [rows], column_class: uint8 [classes]. table: int32 [contexts · 2^PRECISION].
    scales: fp32 [rows, groups]. across: most segments side by side.
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
    """Streams of a layer, and its scales, bfloat16 [rows, groups], on a device."""
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
    """x Wᵀ in the dtype of x, for many tokens: decode to a workspace, multiply with that.

    PyTorch's caching allocator makes it one workspace for all layers, also inside a captured CUDA graph.
    decode: decodes into its second argument and returns it.
    """
    # fp16 has no room for small scales times large integers
    compute = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
    workspace = torch.empty(len(coded.row_class), x.shape[-1], dtype=compute, device=x.device)
    return torch.nn.functional.linear(x.to(compute), decode(coded, workspace)).to(x.dtype)


@cache
def backend(device_type: str) -> ModuleType:
    """The module whose `multiply_coded(x, CodedTensors)` is for this type of device.

    Its COMPILED_FOR: numbers of tokens that between them use everything it compiles. Raises NotImplementedError where
    there is none.
    """
    if device_type not in BACKENDS:
        raise NotImplementedError(f"babai decodes on {', '.join(BACKENDS)}, not on {device_type}")
    return import_module(BACKENDS[device_type])


library.define(
    "coded_matmul(Tensor x, Tensor words, Tensor segments, Tensor states, Tensor row_class, Tensor column_class,"
    " Tensor table, Tensor scales, int across) -> Tensor"
)


def _coded_matmul(x: Tensor, *fields: Any) -> Tensor:
    return backend(x.device.type).multiply_coded(x, CodedTensors(*fields))


def _coded_matmul_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], CodedTensors(*fields).row_class.shape[0])


library.impl("coded_matmul", _coded_matmul, "CPU")
library.impl("coded_matmul", _coded_matmul, "CUDA")
torch.library.register_fake("babai::coded_matmul", _coded_matmul_fake, lib=library)
