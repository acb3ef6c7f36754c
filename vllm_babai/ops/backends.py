"""Which package multiplies on which type of device: the one registry of backends.

To add a device, write a package whose `__init__` has the functions of `Backend` and name it in `BACKENDS`; then add
the device's dispatch key to `ops.register`.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from vllm_babai.format import Overflow

if TYPE_CHECKING:
    from vllm_babai.format.trellis.window import TrellisWindow
    from vllm_babai.ops.coded import CodedTensors
    from vllm_babai.ops.experts import Activate, ExpertTensors, TrellisExperts
    from vllm_babai.ops.layout import DeviceLayout
    from vllm_babai.ops.trellis import TrellisTensors

BACKENDS = {"cpu": "vllm_babai.cpu", "cuda": "vllm_babai.triton_kernels"}


class Backend(Protocol):
    """What a backend gives, as functions of its package."""

    def device_layout(
        self, qweight: Tensor, scales: Tensor, overflow: Overflow, bits: int, in_features: int, device: torch.device
    ) -> "DeviceLayout":
        """Arrange one linear for `matmul`, once at load.

        qweight: uint8 [out, packed_bytes(in, bits)]. scales: bfloat16 [out, groups]. overflow: of the same out × in.
        """

    def matmul(
        self, x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
    ) -> Tensor:
        """x [..., in] bf16, fp16 or fp32 → x Wᵀ [..., out], contiguous, in the dtype of x."""

    def warm_up(
        self, layout: "DeviceLayout", bits: int, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        """Compile everything that `matmul` may use for this linear and activations of `dtype`."""

    def look_up(
        self, ids: Tensor, layout: "DeviceLayout", bits: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Rows of a linear, dequantized and rounded once: ids int [...] → [..., in]. shape: out, in."""

    def experts_layout(self, layouts: "list[DeviceLayout]") -> "DeviceLayout":
        """The layouts of linears of one size and width, one an expert, as one."""

    def multiply_experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: "ExpertTensors", activate: "Activate"
    ) -> Tensor:
        """x [tokens, hidden] → for every token the sum of what its experts make of it, weighted, in the dtype of x.

        weights: float32 [tokens, k]. ids: int [tokens, k], which expert of `experts`; −1: none of them.
        """

    def warm_up_experts(self, experts: "ExpertTensors", hidden: int, dtype: torch.dtype) -> None:
        """Compile everything that `multiply_experts` may use for activations of `dtype`."""

    def trellis_experts_layout(self, windows: "list[TrellisWindow]", device: torch.device) -> "TrellisTensors":
        """Arrange linears of one size in the trellis form, one an expert, as one."""

    def multiply_trellis_experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: "TrellisExperts", activate: "Activate"
    ) -> Tensor:
        """As `multiply_experts`, with experts in the trellis form."""

    def warm_up_trellis_experts(self, experts: "TrellisExperts", hidden: int, dtype: torch.dtype) -> None:
        """Compile everything that `multiply_trellis_experts` may use for activations of `dtype`."""

    def multiply_coded(self, x: Tensor, coded: "CodedTensors") -> Tensor:
        """As `matmul`, for a linear that stays entropy coded."""

    def warm_up_coded(self, coded: "CodedTensors", in_features: int, dtype: torch.dtype) -> None:
        """Compile everything that `multiply_coded` may use for this linear and activations of `dtype`."""

    def trellis_layout(self, window: "TrellisWindow", device: torch.device) -> "TrellisTensors":
        """Arrange a linear in tiles of a trellis for `multiply_trellis`, once at load."""

    def multiply_trellis(self, x: Tensor, trellis: "TrellisTensors") -> Tensor:
        """As `matmul`, for a linear in tiles of a trellis."""

    def warm_up_trellis(self, trellis: "TrellisTensors", in_features: int, dtype: torch.dtype) -> None:
        """Compile everything that `multiply_trellis` may use for this linear and activations of `dtype`."""


@cache
def backend(device_type: str) -> Backend:
    """The backend for a type of device, imported on first use. Raises NotImplementedError where there is none."""
    if device_type not in BACKENDS:
        raise NotImplementedError(f"babai has kernels for {', '.join(BACKENDS)}, not for {device_type}")
    return cast(Backend, import_module(BACKENDS[device_type]))
