"""What a reader is, and what it gets: one linear as the checkpoint stores it, with the windows that a rank takes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from vllm_babai.format import Format, FormatError, LayerScheme

Piece = TypeVar("Piece")
Weight = TypeVar("Weight")


class Window(NamedTuple):
    """Rows and columns of a stored linear that a rank takes."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class StoredLinear:
    """One linear as it lies in the checkpoint: its tensors by name, its size, and the windows that this rank takes.

    name: in the checkpoint; "" where vLLM has names for parts of it only, because they are fused on disk.
    """

    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    windows: list[Window]
    name: str = ""

    @property
    def taken_whole(self) -> bool:
        """Whether the windows cover the linear."""
        rows, columns = self.shape
        taken = sum(w.rows.stop - w.rows.start for w in self.windows)
        return taken == rows and all(w.columns == slice(0, columns) for w in self.windows)


@dataclass(frozen=True)
class Reader(ABC, Generic[Piece, Weight]):
    """Reads linears of one format and scheme into the weight that a rank holds.

    form: the format. residency: how the rank holds the weight, a key of `residency.RESIDENCIES`. Between `read` and
    `stack`, a piece is what one window of a linear became.
    """

    scheme: LayerScheme
    form: ClassVar[type[Format]]
    residency: ClassVar[str]

    @property
    @abstractmethod
    def column_multiple(self) -> int:
        """Where columns are divided among ranks, each takes a multiple of this. Raises FormatError."""

    @abstractmethod
    def read(self, linear: StoredLinear) -> list[Piece]:
        """Check the tensors against the layer and each other, then cut out a piece per window. Raises FormatError."""

    @abstractmethod
    def stack(self, pieces: Sequence[Piece]) -> Weight:
        """Put the pieces of a layer below each other: what the rank holds. Raises FormatError."""

    @abstractmethod
    def dummy(self, rows: int, columns: int) -> Weight:
        """A random weight of this size, for `--load-format dummy`."""

    def groups(self, window: Window) -> slice:
        """Which scales of a row belong to the columns of a window."""
        if self.scheme.group_size == -1:
            return slice(1)
        return slice(self.scheme.groups(window.columns.start), self.scheme.groups(window.columns.stop))


def check_dtypes(tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> None:
    """Raise FormatError for a tensor of another dtype than the format's."""
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype:
            raise FormatError(f"{name} has dtype {tensors[name].dtype}, but the format needs {dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """Raise FormatError for a tensor of another shape than the layer's."""
    if tensor.shape != shape:
        raise FormatError(f"{name} has shape {tuple(tensor.shape)}, but the layer needs {shape}")
