"""The device layout of a dense + sparse weight: the tensors that the custom op `babai::matmul` takes for one linear."""

from typing import NamedTuple

from torch import Tensor


class DeviceLayout(NamedTuple):
    """Made once at load from the hardware-neutral checkpoint. Each backend defines shapes and dtypes of its own.

    dense: the packed integers of the dense part. scales: their scales. entries, offsets: the overflow.
    """

    dense: Tensor
    scales: Tensor
    entries: Tensor
    offsets: Tensor
