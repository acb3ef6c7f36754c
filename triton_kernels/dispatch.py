"""Which kernel multiplies: the entry that the custom op calls, and the warm-up that spares serving all compiling."""

import torch
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout, check_shapes
from vllm_babai.triton_kernels.configs import Target, bucket, config_for
from vllm_babai.triton_kernels.dequantize import multiply_dequantized
from vllm_babai.triton_kernels.fused import multiply_fused
from vllm_babai.triton_kernels.layout import Geometry, geometry_of
from vllm_babai.triton_kernels.tokens import aligned, goes_dequantized, warm_up_sizes


def matmul(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
) -> Tensor:
    """x Wᵀ: x [..., in_features] bf16, fp16 or fp32 → [..., out_features] in x's dtype.

    dense, scales, entries, offsets: the layer's `device_layout`. Accumulates in fp32; deterministic. The counters in
    `offsets` are used during the call and zero again after it, so one layer may not run on two streams at once.
    Raises ValueError when the layout is of other sizes than the arguments say.
    """
    layout = DeviceLayout(dense, scales, entries, offsets)
    geometry = geometry_of(bits, x.shape[-1], out_features)
    check_sizes(layout, geometry)
    return _multiply(aligned(x), layout, geometry).view(*x.shape[:-1], out_features)


def check_sizes(layout: DeviceLayout, geometry: Geometry) -> None:
    """Raise ValueError when a layout is not of this geometry."""
    dense, scales, offsets = geometry.shapes
    if (layout.dense.shape, layout.scales.shape[1:], layout.offsets.shape) == (dense, scales, offsets):
        return
    check_shapes(
        layout._asdict(),
        f"{geometry.out_features} × {geometry.in_features} with {geometry.bits} bits",
        dense=dense,
        scales=(layout.scales.shape[0], *scales),
        offsets=offsets,
    )


def _multiply(x: Tensor, layout: DeviceLayout, geometry: Geometry) -> Tensor:
    m = x.shape[0]
    if m == 0:
        return x.new_empty(0, geometry.out_features)
    target = Target.of(x.device)
    if goes_dequantized(m, x.dtype, target):
        return multiply_dequantized(x, layout, geometry, target.backend)
    tokens = bucket(m)
    shape = (geometry.out_features, geometry.in_features)
    config = config_for(target, geometry.bits, tokens, shape, layout.scales.shape[0])
    return multiply_fused(x, layout, geometry, config, tokens, target)


def warm_up(layout: DeviceLayout, bits: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """Launch every kernel that `matmul` may choose for this layer once, so that nothing compiles while serving."""
    for m in warm_up_sizes(Target.of(layout.dense.device)):
        x = torch.zeros(m, in_features, dtype=dtype, device=layout.dense.device)
        matmul(x, *layout, bits, out_features)
