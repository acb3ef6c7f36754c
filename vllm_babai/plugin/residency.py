"""How a rank holds the weight of a layer on its device: packed (dense + sparse), coded or tiled, each with the op."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_babai.format import Overflow, integer_range, pack
from vllm_babai.format.entropy.segments import SegmentedMatrix
from vllm_babai.format.trellis.window import TrellisWindow
from vllm_babai.ops.backends import backend
from vllm_babai.ops.coded import CodedTensors, coded_tensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.trellis import TrellisTensors

DUMMY_SCALE = 1e-3  # as large as vLLM's own dummy weights
DUMMY_SPACING = 100  # one weight of so many overflows


@dataclass(frozen=True)
class PackedWeight:
    """The part of a layer that a rank holds, dense + sparse.

    bits: of the dense part. qweight: uint8 [out, packed_bytes(in, bits)]. scales: bfloat16 [out, groups].
    overflow: of the same out × in. input_scales: bfloat16 [in], to multiply the inputs with, or None.
    """

    bits: int
    qweight: Tensor
    scales: Tensor
    overflow: Overflow
    input_scales: Tensor | None = None

    @classmethod
    def dummy(cls, bits: int, rows: int, columns: int, groups: int) -> "PackedWeight":
        """Random integers, 1% of them overflow: for measurements without a checkpoint."""
        low, high = integer_range(bits)
        dense = torch.randint(low, high + 1, (rows, columns), dtype=torch.int16)
        position = torch.arange(0, rows * columns - DUMMY_SPACING + 1, DUMMY_SPACING)
        position += torch.randint(DUMMY_SPACING, position.shape)
        dense.view(-1)[position] = high
        excess = torch.ones(len(position), dtype=torch.int32)
        overflow = Overflow((position // columns).int(), (position % columns).int(), excess)
        return cls(bits, pack(dense, bits), torch.full((rows, groups), DUMMY_SCALE, dtype=torch.bfloat16), overflow)


@dataclass(frozen=True)
class CodedWeight:
    """The part of a layer that a rank holds, entropy coded.

    scales: bfloat16 [out, groups]. input_scales: bfloat16 [in], to multiply the inputs with, or None.
    """

    matrix: SegmentedMatrix
    scales: Tensor
    input_scales: Tensor | None = None


@dataclass(frozen=True)
class TiledWeight:
    """The part of a layer that a rank holds, as tiles of a trellis. input_scales: None, there are no column steps."""

    window: TrellisWindow
    input_scales: Tensor | None = None


class Placed(NamedTuple):
    """A weight on its device: the tensors that the op takes after x, by parameter name, and the integers after them."""

    tensors: dict[str, Tensor]
    constants: tuple[int, ...]


class Residency(Protocol):
    """One way to hold weights.

    activity: what is done to a layer at load, for the progress bar. names: of the op's tensors as parameters of the
    layer; LoRA looks for `qweight`. may_shrink: those of which the op reads a part that another tensor names, so that
    they may be longer than they need be.
    """

    activity: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    may_shrink: ClassVar[frozenset[str]]

    def place(self, weight: Any, in_features: int, device: torch.device) -> Placed:
        """Arrange a weight of this residency for the device's backend. Raises ValueError for groups it cannot take."""

    def multiply(self, x: Tensor, tensors: list[Tensor], constants: tuple[int, ...]) -> Tensor:
        """x [..., in] → x Wᵀ [..., out] in the dtype of x, by the op."""

    def warm_up(self, placed: Placed, in_features: int, dtype: torch.dtype) -> None:
        """Compile all that multiplying with activations of `dtype` will need."""


class Packed:
    """Dense + sparse, multiplied by `babai::matmul`. constants: bits, out_features."""

    activity: ClassVar[str] = "Packing"
    names: ClassVar[tuple[str, ...]] = ("qweight", "scales", "overflow_entries", "overflow_offsets")
    may_shrink: ClassVar[frozenset[str]] = frozenset({"overflow_entries"})

    def place(self, weight: PackedWeight, in_features: int, device: torch.device) -> Placed:
        """See `Residency`."""
        layout = backend(device.type).device_layout(
            weight.qweight, weight.scales, weight.overflow, weight.bits, in_features, device
        )
        return Placed(dict(zip(self.names, layout, strict=True)), (weight.bits, len(weight.qweight)))

    def multiply(self, x: Tensor, tensors: list[Tensor], constants: tuple[int, ...]) -> Tensor:
        """See `Residency`."""
        return torch.ops.babai.matmul(x, *tensors, *constants)

    def warm_up(self, placed: Placed, in_features: int, dtype: torch.dtype) -> None:
        """See `Residency`."""
        layout, (bits, out_features) = DeviceLayout(*placed.tensors.values()), placed.constants
        backend(layout.dense.device.type).warm_up(layout, bits, in_features, out_features, dtype)


class Coded:
    """The checkpoint's own streams, decoded and multiplied by `babai::coded_matmul`. constants: segments across."""

    activity: ClassVar[str] = "Indexing"
    names: ClassVar[tuple[str, ...]] = (
        "qweight",
        "segments",
        "states",
        "row_class",
        "column_class",
        "table",
        "scales",
    )
    may_shrink: ClassVar[frozenset[str]] = frozenset({"qweight"})  # the words of all streams

    def place(self, weight: CodedWeight, in_features: int, device: torch.device) -> Placed:
        """See `Residency`."""
        coded = coded_tensors(weight.matrix, weight.scales, device)
        return Placed(dict(zip(self.names, coded.tensors, strict=True)), (coded.across,))

    def multiply(self, x: Tensor, tensors: list[Tensor], constants: tuple[int, ...]) -> Tensor:
        """See `Residency`."""
        return torch.ops.babai.coded_matmul(x, *tensors, *constants)

    def warm_up(self, placed: Placed, in_features: int, dtype: torch.dtype) -> None:
        """See `Residency`."""
        fields: tuple[Any, ...] = (*placed.tensors.values(), *placed.constants)
        coded = CodedTensors(*fields)
        backend(coded.words.device.type).warm_up_coded(coded, in_features, dtype)


class Tiled:
    """Tiles of a trellis as the checkpoint stores them, decoded and multiplied by `babai::trellis_matmul`.

    constants: out_features, columns of the tiles.
    """

    activity: ClassVar[str] = "Placing"
    names: ClassVar[tuple[str, ...]] = ("qweight", "starts", "tiles", "places", "scales")
    may_shrink: ClassVar[frozenset[str]] = frozenset({"qweight", "tiles"})  # the words of all tiles, and their list

    def place(self, weight: TiledWeight, in_features: int, device: torch.device) -> Placed:
        """See `Residency`."""
        trellis = backend(device.type).trellis_layout(weight.window, device)
        return Placed(dict(zip(self.names, trellis.tensors, strict=True)), (trellis.out_features, trellis.columns))

    def multiply(self, x: Tensor, tensors: list[Tensor], constants: tuple[int, ...]) -> Tensor:
        """See `Residency`."""
        return torch.ops.babai.trellis_matmul(x, *tensors, *constants)

    def warm_up(self, placed: Placed, in_features: int, dtype: torch.dtype) -> None:
        """See `Residency`."""
        fields: tuple[Any, ...] = (*placed.tensors.values(), *placed.constants)
        trellis = TrellisTensors(*fields)
        backend(trellis.words.device.type).warm_up_trellis(trellis, in_features, dtype)


RESIDENCIES: dict[str, Residency] = {"packed": Packed(), "coded": Coded(), "tiled": Tiled()}
