"""The device layout: the tensors that the custom op `babai::matmul` takes for one linear layer."""

from typing import NamedTuple

from torch import Tensor


class DeviceLayout(NamedTuple):
    """Made once at load from the hardware-neutral checkpoint; what each tensor holds is its backend's own affair.

    dense: the packed integers. scales: their scales. entries, offsets: the overflow.
    """

    dense: Tensor
    scales: Tensor
    entries: Tensor
    offsets: Tensor
