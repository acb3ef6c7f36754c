"""The custom op `babai::matmul` and the choice of its backend by device. Importable without vllm.

A backend is a module with three functions:
- `device_layout(qweight, scales, overflow, bits, in_features, device) -> DeviceLayout`, once at load;
- `matmul(x, dense, scales, entries, offsets, bits, out_features) -> Tensor`, the op itself;
- `warm_up(layout, bits, in_features, out_features, dtype)`, which leaves nothing to compile while serving.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from vllm_babai.format import Overflow
from vllm_babai.ops.layout import DeviceLayout

BACKENDS = {"cpu": "vllm_babai.cpu.backend", "cuda": "vllm_babai.triton_kernels"}

library = torch.library.Library("babai", "FRAGMENT")  # the op lives as long as this object
library.define(
    "matmul(Tensor x, Tensor dense, Tensor scales, Tensor entries, Tensor offsets, int bits, int out_features)"
    " -> Tensor"
)


@cache
def backend(device_type: str) -> ModuleType:
    """The module that multiplies on this type of device. Raises NotImplementedError where there is none."""
    if device_type not in BACKENDS:
        raise NotImplementedError(f"babai has kernels for {', '.join(BACKENDS)}, not for {device_type}")
    return import_module(BACKENDS[device_type])


def device_layout(
    qweight: Tensor, scales: Tensor, overflow: Overflow, bits: int, in_features: int, device: torch.device
) -> DeviceLayout:
    """Arrange the stored tensors of one linear for the kernels of a device.

    qweight: uint8 [out, packed_bytes(in, bits)]. scales: bfloat16 [out, groups]. overflow: of the same out × in.
    """
    return backend(device.type).device_layout(qweight, scales, overflow, bits, in_features, device)


def warm_up(layout: DeviceLayout, bits: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """Compile and launch everything that serving this layer with activations of `dtype` will need."""
    backend(layout.dense.device.type).warm_up(layout, bits, in_features, out_features, dtype)


def _matmul_cpu(*arguments: Tensor | int) -> Tensor:
    return backend("cpu").matmul(*arguments)


def _matmul_cuda(*arguments: Tensor | int) -> Tensor:
    return backend("cuda").matmul(*arguments)


def _matmul_fake(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


library.impl("matmul", _matmul_cpu, "CPU")
library.impl("matmul", _matmul_cuda, "CUDA")
torch.library.register_fake("babai::matmul", _matmul_fake, lib=library)
