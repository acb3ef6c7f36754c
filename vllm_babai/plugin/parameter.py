"""Placeholders for the stored tensors of a linear layer: they note which part of each tensor a rank needs.

What a checkpoint stores may have any shape (a blob per linear), so vLLM cannot slice it. These parameters take whole
stored tensors from vLLM's weight loaders together with the window of the linear that belongs to this rank;
`vllm_babai.plugin.reader` cuts the windows out when all tensors are there. Until then a tensor is only referred to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter


@dataclass(frozen=True)
class Part:
    """A window of a stored linear, and where its rows go.

    tensor: as stored. rows, columns: window of the linear that this rank takes.
    shape: rows and columns that the layer expects; for linears fused on disk, rows of this part.
    destination: first row in the layer of this rank.
    """

    tensor: Tensor
    rows: slice
    columns: slice
    shape: tuple[int, int]
    destination: int


@dataclass(frozen=True)
class RowsOfTensor:
    """A stored tensor on its way through vLLM's weight loaders, which narrow it where linears are fused on disk.

    Only the rows that they ask for are noted: the bytes of a blob are not the rows of its linear.
    """

    tensor: Tensor
    first_row: int = 0

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def narrow(self, dim: int, start: int, length: int) -> "RowsOfTensor":
        return RowsOfTensor(self.tensor, self.first_row + start)


class StoredParameter(BasevLLMParameter):
    """Zero-size parameter that collects the parts of one kind of stored tensor (say, `scales`) of a linear layer.

    dtype: of the tensors to come. rows, columns: size of the layer on this rank. weight_loader: the layer's own
    (version 2), or None for a layer that takes its one stored tensor whole.
    """

    output_dim = 0  # vLLM narrows linears that are fused on disk along this one

    def __new__(cls, *, dtype: torch.dtype, **_: Any) -> "StoredParameter":
        return super().__new__(cls, data=torch.empty(0, dtype=dtype))

    def __init__(self, *, dtype: torch.dtype, rows: int, columns: int, weight_loader: Callable | None) -> None:
        loader = _load_whole if weight_loader is None else partial(_load_rows, weight_loader)
        super().__init__(data=self.data, weight_loader=loader)
        self.rows, self.columns = rows, columns
        self.parts: list[Part] = []

    def load_whole(self, tensor: Tensor) -> None:
        """Every rank holds the whole linear."""
        self._note(RowsOfTensor(tensor), rank=0, ranks=1, rows=self.rows, destination=0)

    def load_column_parallel_weight(self, loaded_weight: RowsOfTensor) -> None:
        """Every rank holds some rows."""
        self._note(loaded_weight, rank=self.tp_rank, ranks=self.tp_size, rows=self.rows, destination=0)

    def load_row_parallel_weight(self, loaded_weight: RowsOfTensor) -> None:
        """Every rank holds some columns."""
        first = self.tp_rank * self.columns
        rows, columns = slice(0, self.rows), slice(first, first + self.columns)
        self.parts.append(Part(loaded_weight.tensor, rows, columns, (self.rows, self.tp_size * self.columns), 0))

    def load_merged_column_weight(
        self, loaded_weight: RowsOfTensor, *, shard_offset: int, shard_size: int, **_: Any
    ) -> None:
        """Every rank holds some rows of each fused linear."""
        self._note(loaded_weight, rank=self.tp_rank, ranks=self.tp_size, rows=shard_size, destination=shard_offset)

    def load_qkv_weight(
        self,
        loaded_weight: RowsOfTensor,
        *,
        shard_offset: int,
        shard_size: int,
        shard_id: str,
        num_heads: int,
        **_: Any,
    ) -> None:
        """As merged columns; `num_heads` ranks hold the same rows of k_proj and v_proj."""
        replicas = 1 if shard_id == "q" else num_heads
        rank, ranks = self.tp_rank // replicas, self.tp_size // replicas
        self._note(loaded_weight, rank=rank, ranks=ranks, rows=shard_size, destination=shard_offset)

    def load_vocabulary(self, stored: RowsOfTensor, first_row: int, vocabulary: int) -> None:
        """Every rank holds some rows of all `vocabulary`, the last one perhaps fewer than the others."""
        rows, columns = slice(first_row, first_row + self.rows), slice(0, self.columns)
        self.parts.append(Part(stored.tensor, rows, columns, (vocabulary, self.columns), 0))

    def _note(self, stored: RowsOfTensor, *, rank: int, ranks: int, rows: int, destination: int) -> None:
        first = stored.first_row + rank * rows
        window, columns = slice(first, first + rows), slice(0, self.columns)
        self.parts.append(Part(stored.tensor, window, columns, (ranks * rows, self.columns), destination))


def _load_rows(layer_loader: Callable, param: StoredParameter, loaded_weight: Tensor, *shard_id: Any) -> None:
    layer_loader(param, RowsOfTensor(loaded_weight), *shard_id)


def _load_whole(param: StoredParameter, loaded_weight: Tensor) -> None:
    param.load_whole(loaded_weight)
