"""The custom op `babai::matmul`: x Wᵀ with a weight that the device holds dense + sparse."""

from torch import Tensor

from vllm_babai.ops.backends import backend
from vllm_babai.ops.register import register


def _matmul(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
) -> Tensor:
    return backend(x.device.type).matmul(x, dense, scales, entries, offsets, bits, out_features)


def _matmul_fake(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


library = register(
    "matmul(Tensor x, Tensor dense, Tensor scales, Tensor entries, Tensor offsets, int bits, int out_features)"
    " -> Tensor",
    _matmul,
    _matmul_fake,
)
