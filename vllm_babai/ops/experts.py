"""The tensors of all experts that a rank holds of a layer: what backends multiply with for `babai::moe` and
`babai::trellis_moe`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.trellis import TrellisTensors

Activate = Callable[[Tensor], Tensor]  # [rows, rows of gate_up] → [rows, inner]


class ExpertTensors(NamedTuple):
    """The linears of all experts, dense + sparse, in one layout for each kind of linear.

    gate_up: gate above up, or the only linear before the activation. down: the one after. Both are what the backend's
    `experts_layout` makes. gate_up_bits, down_bits: of their dense parts. gate_up_rows: of each expert. inner: columns
    of down, what `activate` leaves of them. biases: of both linears, [experts, rows] each, or none.
    """

    gate_up: DeviceLayout
    down: DeviceLayout
    gate_up_bits: int
    down_bits: int
    gate_up_rows: int
    inner: int
    biases: tuple[Tensor, ...] = ()


class TrellisExperts(NamedTuple):
    """The linears of all experts in the trellis form, in one layout for each kind of linear.

    gate_up, down: as of `ExpertTensors`, what the backend's `trellis_experts_layout` makes; each expert has as many
    blocks of rows. number: of experts. gate_up_rows, inner, biases: as of `ExpertTensors`.
    """

    gate_up: TrellisTensors
    down: TrellisTensors
    number: int
    gate_up_rows: int
    inner: int
    biases: tuple[Tensor, ...] = ()
