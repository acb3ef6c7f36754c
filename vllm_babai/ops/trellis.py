"""The custom op `babai::trellis_matmul`: x Wᵀ with a weight that the device holds as a trellis."""

from typing import Any, Final, NamedTuple

import numpy as np
from torch import Tensor

from vllm_babai.format.trellis.blob import block_starts
from vllm_babai.format.trellis.code import TILE_COLUMNS, TILE_ROWS
from vllm_babai.format.trellis.window import TrellisWindow
from vllm_babai.ops.backends import backend
from vllm_babai.ops.layout import check_shapes
from vllm_babai.ops.register import register

TENSORS: Final = 5  # of the fields below; integers follow


class TrellisTensors(NamedTuple):
    """The part of a layer that a rank holds, on its device. Each backend defines `starts` and `tiles` of its own.

    words: int32, see `words_in_lines`. starts: int32 [blocks, …], where the words of each block begin, at least. tiles:
    the bits of a pair in every tile, one block after the other. places: int32 [blocks, 16], the row that stands there,
    or NO_ROW. scales: fp32 [blocks, 16]. out_features: rows of the layer. columns: of its tiles, in_features and up
    to 63 more.
    """

    words: Tensor
    starts: Tensor
    tiles: Tensor
    places: Tensor
    scales: Tensor
    out_features: int
    columns: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return self[:TENSORS]


def check_sizes(x: Tensor, trellis: TrellisTensors, **shapes: tuple[int, ...]) -> None:
    """Compare a trellis with the activations it is to multiply, x [..., in_features], and with the shapes that its
    backend demands besides; see `check_shapes`.
    """
    layer = f"{trellis.out_features} × {x.shape[-1]} in the trellis form"
    if -(-x.shape[-1] // TILE_COLUMNS) * TILE_COLUMNS != trellis.columns:
        raise ValueError(f"the weight does not belong to a linear of {layer}: its tiles have {trellis.columns} columns")
    rows = (len(trellis.starts), TILE_ROWS)
    check_shapes(trellis._asdict(), layer, places=rows, scales=rows, **shapes)


def words_in_lines(window: TrellisWindow) -> tuple[np.ndarray, np.ndarray]:
    """The words of a window in lines of TILE_ROWS, int32 [lines, TILE_ROWS], and the first line of every block, int64.

    A block begins with the words before its first tile, where its states reach back to; then come its tiles, as they
    are in the file. The last line is zeros, for kernels that read one further than they need.
    """
    blocks = len(window.rates)
    firsts = block_starts(window.rates) // TILE_ROWS + np.arange(blocks + 1)
    lines = np.zeros((firsts[-1] + 1, TILE_ROWS), np.uint32)
    of_tiles = np.ones(len(lines), bool)
    of_tiles[firsts] = False
    lines[of_tiles] = window.words.reshape(-1, TILE_ROWS)
    lines[firsts[:-1]] = window.before
    return lines.view(np.int32), firsts[:-1]


def _trellis_matmul(x: Tensor, *fields: Any) -> Tensor:
    return backend(x.device.type).multiply_trellis(x, TrellisTensors(*fields))


def _trellis_matmul_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], TrellisTensors(*fields).out_features)


library = register(
    "trellis_matmul(Tensor x, Tensor words, Tensor starts, Tensor tiles, Tensor places, Tensor scales,"
    " int out_features, int columns) -> Tensor",
    _trellis_matmul,
    _trellis_matmul_fake,
)
