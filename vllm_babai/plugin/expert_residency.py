"""How a rank holds the experts of a layer on its device: packed (dense + sparse) or tiled, each with the op."""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_babai.format import Overflow, integer_range, pack, unpack
from vllm_babai.ops.backends import backend
from vllm_babai.ops.experts import ExpertTensors, TrellisExperts
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.trellis import TENSORS, TrellisTensors
from vllm_babai.plugin.moe import multiply_experts, multiply_trellis_experts
from vllm_babai.plugin.residency import PackedWeight, Placed, TiledWeight


class HeldExperts(NamedTuple):
    """What a rank holds of a layer. number: of experts. gate_up_rows: of each. inner: columns of down. biases: of both
    linears, [experts, rows] each, or none.
    """

    gate_up: Placed
    down: Placed
    number: int
    gate_up_rows: int
    inner: int
    biases: tuple[Tensor, ...]


class ExpertsResidency(Protocol):
    """One way to hold experts. names: of the tensors that one kind of linear becomes, as parameters of the layer."""

    names: ClassVar[tuple[str, ...]]

    def place(self, weights: list[Any], columns: int, device: torch.device) -> Placed:
        """Arrange one kind of linear of all experts for the device's backend. columns: of each."""

    def experts(self, held: HeldExperts) -> Any:
        """The same, as the backend takes it."""

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor, experts: Any, activation: str) -> Tensor:
        """The weighted sum of the experts' outputs, by the op; see `plugin.moe`."""

    def warm_up(self, experts: Any, hidden: int, dtype: torch.dtype) -> None:
        """Compile all that multiplying with activations of `dtype` will need."""


class PackedExperts:
    """Dense + sparse, by `babai::moe`. constants: bits of the dense part, the most that an expert has."""

    names: ClassVar[tuple[str, ...]] = DeviceLayout._fields

    def place(self, weights: list[PackedWeight], columns: int, device: torch.device) -> Placed:
        """See `ExpertsResidency`."""
        bits, maker = max(weight.bits for weight in weights), backend(device.type)
        layouts = []
        for weight in (widened(weight, bits, columns) for weight in weights):
            parts = (weight.qweight, weight.scales, weight.overflow, bits, columns, device)
            layouts.append(maker.device_layout(*parts))
        return Placed(maker.experts_layout(layouts)._asdict(), (bits,))

    def experts(self, held: HeldExperts) -> ExpertTensors:
        """See `ExpertsResidency`."""
        gate_up, down = (DeviceLayout(*placed.tensors.values()) for placed in held[:2])
        (bits,), (down_bits,) = held.gate_up.constants, held.down.constants
        return ExpertTensors(gate_up, down, bits, down_bits, held.gate_up_rows, held.inner, held.biases)

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activation: str) -> Tensor:
        """See `ExpertsResidency`."""
        return multiply_experts(x, weights, ids, experts, activation)

    def warm_up(self, experts: ExpertTensors, hidden: int, dtype: torch.dtype) -> None:
        """See `ExpertsResidency`."""
        backend(experts.gate_up.dense.device.type).warm_up_experts(experts, hidden, dtype)


class TiledExperts:
    """Tiles of a trellis, by `babai::trellis_moe`. constants: see `TrellisTensors`, out_features and columns."""

    names: ClassVar[tuple[str, ...]] = TrellisTensors._fields[:TENSORS]

    def place(self, weights: list[TiledWeight], columns: int, device: torch.device) -> Placed:
        """See `ExpertsResidency`."""
        trellis = backend(device.type).trellis_experts_layout([weight.window for weight in weights], device)
        return Placed(dict(zip(self.names, trellis.tensors, strict=True)), (trellis.out_features, trellis.columns))

    def experts(self, held: HeldExperts) -> TrellisExperts:
        """See `ExpertsResidency`."""
        fields: list[tuple[Any, ...]] = [(*placed.tensors.values(), *placed.constants) for placed in held[:2]]
        gate_up, down = (TrellisTensors(*own) for own in fields)
        return TrellisExperts(gate_up, down, held.number, held.gate_up_rows, held.inner, held.biases)

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor, experts: TrellisExperts, activation: str) -> Tensor:
        """See `ExpertsResidency`."""
        return multiply_trellis_experts(x, weights, ids, experts, activation)

    def warm_up(self, experts: TrellisExperts, hidden: int, dtype: torch.dtype) -> None:
        """See `ExpertsResidency`."""
        backend(experts.gate_up.words.device.type).warm_up_trellis_experts(experts, hidden, dtype)


EXPERT_RESIDENCIES: dict[str, ExpertsResidency] = {"packed": PackedExperts(), "tiled": TiledExperts()}


def widened(weight: PackedWeight, bits: int, columns: int) -> PackedWeight:
    """The same weight with a dense part of `bits`, no fewer than it has; columns: of it."""
    if weight.bits == bits:
        return weight
    integers = weight.overflow.added_to(unpack(weight.qweight, weight.bits, columns))
    dense = integers.clamp(*integer_range(bits))
    rows, places = torch.where(integers != dense)
    rest = Overflow(rows.int(), places.int(), (integers - dense)[rows, places].int())
    return replace(weight, bits=bits, qweight=pack(dense, bits), overflow=rest)
