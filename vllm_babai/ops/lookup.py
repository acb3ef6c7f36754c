"""The custom op `babai::lookup`: rows of a weight that the device holds dense + sparse, as an embedding gives them."""

from typing import Any

from torch import Tensor

from vllm_babai.ops.backends import backend
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.register import register


def _lookup(ids: Tensor, *arguments: Any) -> Tensor:
    *layout, bits, out_features, in_features, dtype = arguments
    return backend(ids.device.type).look_up(ids, DeviceLayout(*layout), bits, (out_features, in_features), dtype)


def _lookup_fake(ids: Tensor, *arguments: Any) -> Tensor:
    *_, in_features, dtype = arguments
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


library = register(
    "lookup(Tensor ids, Tensor dense, Tensor scales, Tensor entries, Tensor offsets, int bits, int out_features,"
    " int in_features, ScalarType dtype) -> Tensor",
    _lookup,
    _lookup_fake,
)
