"""What a checkpoint format is: one small class, listed in `format.registry`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from vllm_babai.errors import FormatError


class Weight(Protocol):
    """What a format stores exactly: a lattice point (`format.lattice`), or a trellis (`trellis.blob`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features]."""


Stored = TypeVar("Stored", bound=Weight)


class Format(ABC, Generic[Stored]):
    """One linear as a checkpoint stores it. A subclass is a frozen dataclass whose fields are the stored tensors.

    name: in `quantization_config` and on the command line. dtypes: of the stored tensors, by name, in the order of the
    fields. bit_widths: what `bits` may be, or None where the format has no dense bits. residencies: how vLLM may hold
    such a linear in memory.
    """

    name: ClassVar[str]
    dtypes: ClassVar[dict[str, torch.dtype]]
    bit_widths: ClassVar[tuple[int, ...] | None] = None
    residencies: ClassVar[tuple[str, ...]] = ("packed",)

    @classmethod
    @abstractmethod
    def encode(cls, weight: Stored, bits: int | None = None, linear: str = "") -> Self:
        """Store a weight exactly. Raises ValueError for one that the format cannot hold.

        linear: its full name; tensors that end up below another name are then refused.
        """

    @abstractmethod
    def decode(self, shape: tuple[int, int] | None = None, linear: str = "") -> Stored:
        """The stored weight. Raises FormatError for anything truncated or corrupt.

        shape: [out, in] that the model expects, which is checked before anything is allocated. linear: the name under
        which the tensors are stored. None and "" where these are not known.
        """

    @property
    def dense_range(self) -> tuple[int, int] | None:
        """Smallest and largest integer of the dense part; None where the format has none. Raises FormatError."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, as stored in safetensors below the linear's own name."""
        return {name: getattr(self, name) for name in self.dtypes}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The reverse of `tensors`. Raises FormatError for a tensor that is missing or of another dtype."""
        for name, dtype in cls.dtypes.items():
            if name not in tensors:
                raise FormatError(f"the checkpoint lacks {name}")
            if tensors[name].dtype != dtype:
                raise FormatError(f"{name} has dtype {tensors[name].dtype}, but the format needs {dtype}")
        return cls(**{name: tensors[name] for name in cls.dtypes})
