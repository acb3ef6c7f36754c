"""Placeholders for the stored tensors of a linear layer: they note which part of each tensor a rank needs.

What a checkpoint stores may have any shape (a blob per linear), so vLLM cannot slice it. These parameters take whole
stored tensors from vLLM's weight loaders, together with the window of the linear that belongs to this rank. When all
tensors are there, `vllm_babai.plugin.assemble` cuts the windows out. Until then a tensor is only referred to.

vLLM reloads weights layer by layer. It calls every loader twice: first with a parameter on the meta device, to count
elements that are copied, and when those of all the layer's parameters are complete, with real ones. A placeholder says
in `weight_loader_numel` that it awaits as many elements as the layer has rows, and copies an element per row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_babai.plugin.readers.reader import Window


@dataclass(frozen=True)
class Part:
    """A window of a stored linear, and where its rows go.

    tensor: as stored. window: of the linear, what this rank takes. shape: rows and columns that the layer expects; for
    linears fused on disk, rows of this part. destination: first row in the layer of this rank.
    """

    tensor: Tensor
    window: Window
    shape: tuple[int, int]
    destination: int

    @property
    def rows(self) -> int:
        """Rows of the window."""
        return self.window.rows.stop - self.window.rows.start


@dataclass(frozen=True)
class RowsOfTensor:
    """A stored tensor on its way through vLLM's weight loaders, which narrow it where linears are fused on disk.

    Only the rows that they ask for are noted: the bytes of a blob are not the rows of its linear.
    """

    tensor: Tensor
    first_row: int = 0

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.tensor.shape

    def narrow(self, dim: int, start: int, length: int) -> "RowsOfTensor":
        """The rows from `start` on."""
        return RowsOfTensor(self.tensor, self.first_row + start)


class StoredParameter(BasevLLMParameter):
    """Zero-size parameter that collects the parts of one kind of stored tensor (say, `scales`) of a linear layer.

    dtype: of the tensors to come. rows, columns: size of the layer on this rank. layer_loader: the layer's own weight
    loader (version 2), or None for a layer that takes its one stored tensor whole.
    """

    output_dim = 0  # vLLM narrows linears that are fused on disk along this one

    def __new__(cls, *, dtype: torch.dtype, **_: Any) -> "StoredParameter":
        return super().__new__(cls, data=torch.empty(0, dtype=dtype))

    def __init__(self, *, dtype: torch.dtype, rows: int, columns: int, layer_loader: Callable | None) -> None:
        super().__init__(data=self.data, weight_loader=load_stored)
        self.rows, self.columns, self.layer_loader = rows, columns, layer_loader
        self.weight_loader_numel = rows
        self.parts: list[Part] = []

    def load_whole(self, loaded_weight: RowsOfTensor) -> None:
        """Every rank holds the whole linear."""
        self._note_rows(loaded_weight, rank=0, ranks=1, rows=self.rows, destination=0)

    def load_column_parallel_weight(self, loaded_weight: RowsOfTensor) -> None:
        """Every rank holds some rows."""
        self._note_rows(loaded_weight, rank=self.tp_rank, ranks=self.tp_size, rows=self.rows, destination=0)

    def load_row_parallel_weight(self, loaded_weight: RowsOfTensor) -> None:
        """Every rank holds some columns."""
        first = self.tp_rank * self.columns
        window = Window(slice(0, self.rows), slice(first, first + self.columns))
        self._note(Part(loaded_weight.tensor, window, (self.rows, self.tp_size * self.columns), 0))

    def load_merged_column_weight(
        self, loaded_weight: RowsOfTensor, *, shard_offset: int, shard_size: int, **_: Any
    ) -> None:
        """Every rank holds some rows of each fused linear."""
        rank, ranks = self.tp_rank, self.tp_size
        self._note_rows(loaded_weight, rank=rank, ranks=ranks, rows=shard_size, destination=shard_offset)

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
        self._note_rows(loaded_weight, rank=rank, ranks=ranks, rows=shard_size, destination=shard_offset)

    def _note_rows(self, stored: RowsOfTensor, *, rank: int, ranks: int, rows: int, destination: int) -> None:
        first = stored.first_row + rank * rows
        window = Window(slice(first, first + rows), slice(0, self.columns))
        self._note(Part(stored.tensor, window, (ranks * rows, self.columns), destination))

    def _note(self, part: Part) -> None:
        if not self.is_meta:  # which vLLM's copies of this parameter share their `parts` with
            self.parts.append(part)
        elements = torch.empty(min(part.rows, self.rows), device="meta")
        elements.copy_(elements)  # what vLLM counts


class VocabularyParameter(StoredParameter):
    """The same for lm_head and embedding, whose rows are padded: a rank holds some of `vocabulary`, the last perhaps
    fewer.

    first_row: where this rank's begin.
    """

    def __init__(self, *, first_row: int, vocabulary: int, **options: Any) -> None:
        super().__init__(layer_loader=None, **options)
        self.first_row, self.vocabulary = first_row, vocabulary

    def load_whole(self, loaded_weight: RowsOfTensor) -> None:
        """Take this rank's rows."""
        window = Window(slice(self.first_row, self.first_row + self.rows), slice(0, self.columns))
        self._note(Part(loaded_weight.tensor, window, (self.vocabulary, self.columns), 0))


def load_stored(param: StoredParameter, loaded_weight: Tensor, *shard_id: Any) -> None:
    """The weight loader of every placeholder. It has a name and no closure, which vLLM's reloading needs."""
    if param.layer_loader is None:
        param.load_whole(RowsOfTensor(loaded_weight))
    else:
        param.layer_loader(param, RowsOfTensor(loaded_weight), *shard_id)
