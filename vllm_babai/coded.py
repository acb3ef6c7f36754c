"""HPTQ that stays coded in device memory: its streams as tensors, and the op `babai::coded_matmul` that decodes them.

Importable without vllm.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_babai.format import LatticeWeight
from vllm_babai.format.hptq import Coded, encode_integers, read_blob
from vllm_babai.format.tables import decoder_table
from vllm_babai.ops import library

TILE_WEIGHTS = 1 << 15  # a tile is a warp's: thousands in a large matrix, at 0.02 bit per weight
BACKENDS = {"cpu": "vllm_babai.cpu_entropy", "cuda": "vllm_babai.triton_kernels.coded"}


class CodedTensors(NamedTuple):
    """The streams of one linear layer in device memory.

    words: int16 [words]. ends: int64 [tiles], where each tile's stream ends. row_class: uint8 [rows], column_class:
    uint8 [columns], their sum is the context. table: int32 [contexts · 2^PRECISION], see `tables.decoder_table`.
    scales: fp32 [1 or rows, groups]. The integers are the fields of `hptq.Shape` and `model.Model`.
    """

    words: Tensor
    ends: Tensor
    row_class: Tensor
    column_class: Tensor
    table: Tensor
    scales: Tensor
    tile_rows: int
    tile_columns: int
    lanes: int
    offset: int
    shift: int


def coded_tensors(coded: Coded, scales: Tensor, device: torch.device) -> CodedTensors:
    """A blob that `read_blob` has checked, and its layer's scales, bfloat16 [1 or rows, groups], on a device."""
    shape, model = coded.shape, coded.model
    return CodedTensors(
        torch.from_numpy(coded.words.view("int16")).to(device),
        torch.from_numpy(coded.ends).to(device),
        torch.from_numpy(model.classes.rows.astype("uint8")).to(device),
        torch.from_numpy(model.classes.columns.astype("uint8")).to(device),
        torch.from_numpy(decoder_table(model.frequencies).view("int32")).to(device),
        scales.to(device, torch.float32),
        shape.tile_rows,
        shape.tile_columns,
        shape.lanes,
        model.offset,
        model.shift,
    )


def code(weight: LatticeWeight, device: torch.device) -> CodedTensors:
    """The part of a layer that a rank holds, as one matrix, on a device."""
    blob = encode_integers(weight.integers, scales_crc=0, tile_weights=TILE_WEIGHTS)
    return coded_tensors(read_blob(blob), weight.scales, device)


def multiply_decoded(x: Tensor, coded: CodedTensors, decode: Callable[[CodedTensors, Tensor], Tensor]) -> Tensor:
    """x Wᵀ in the dtype of x, for many tokens: decode to a workspace, multiply with that.

    PyTorch's caching allocator makes it one workspace for all layers, also inside a captured CUDA graph.
    decode: decodes into its second argument and returns it.
    """
    # fp16 has no room for small scales times large integers
    compute = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
    workspace = torch.empty(len(coded.row_class), len(coded.column_class), dtype=compute, device=x.device)
    return torch.nn.functional.linear(x.to(compute), decode(coded, workspace)).to(x.dtype)


@cache
def backend(device_type: str) -> ModuleType:
    """The module whose `multiply_coded(x, CodedTensors)` is for this type of device.

    Raises NotImplementedError where there is none.
    """
    if device_type not in BACKENDS:
        raise NotImplementedError(f"babai decodes on {', '.join(BACKENDS)}, not on {device_type}")
    return import_module(BACKENDS[device_type])


library.define(
    "coded_matmul(Tensor x, Tensor words, Tensor ends, Tensor row_class, Tensor column_class, Tensor table,"
    " Tensor scales, int tile_rows, int tile_columns, int lanes, int offset, int shift) -> Tensor"
)


def _coded_matmul(x: Tensor, *fields: Any) -> Tensor:
    return backend(x.device.type).multiply_coded(x, CodedTensors(*fields))


def _coded_matmul_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], CodedTensors(*fields).row_class.shape[0])


library.impl("coded_matmul", _coded_matmul, "CPU")
library.impl("coded_matmul", _coded_matmul, "CUDA")
torch.library.register_fake("babai::coded_matmul", _coded_matmul_fake, lib=library)
