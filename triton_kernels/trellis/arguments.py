"""What the kernels of the trellis form take: groups of pointers and integers, see `triton_kernels.arguments`."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from vllm_babai.format.trellis.code import FEWEST_BITS, MASK, MOST_BITS, TILE_COLUMNS, TILE_ROWS
from vllm_babai.ops.trellis import TrellisTensors

STEP = 2  # tiles that a turn of the loops takes
STARTS = MOST_BITS - FEWEST_BITS + 3  # integers of a block in `starts`: for every number of bits, an end, a line
LINE_BITS = 18  # of an entry of `tiles`


class Units(NamedTuple):
    """What is the same for every layer, see `layout` and `decode`. run: columns of a lane in a tile."""

    rows: int
    columns: int
    lanes: int
    run: int
    pair_mask: int
    fewest_bits: int
    step: int
    starts: int
    line_bits: int
    line_mask: int


UNITS = tl.constexpr(
    Units(
        rows=TILE_ROWS,
        columns=TILE_COLUMNS,
        lanes=32,
        run=TILE_COLUMNS // 4,
        pair_mask=MASK - (1 << 32),  # as int32
        fewest_bits=FEWEST_BITS,
        step=STEP,
        starts=STARTS,
        line_bits=LINE_BITS,
        line_mask=(1 << LINE_BITS) - 1,
    )
)


class Layer(NamedTuple):
    """Pointers to one layer's tensors; `layout` says what they hold."""

    words: Tensor
    starts: Tensor
    tiles: Tensor
    places: Tensor
    scales: Tensor


class Sizes(NamedTuple):
    """Integers of one layer. n: out_features. k: in_features. blocks: of rows. columns: of prepared activations."""

    n: int
    k: int
    blocks: int
    columns: int


def arguments(trellis: TrellisTensors, in_features: int) -> tuple[Layer, Sizes]:
    """The groups that kernels take for a layer."""
    columns = trellis.columns + TILE_COLUMNS  # the last tile is the one of zeros
    return Layer(*trellis.tensors), Sizes(trellis.out_features, in_features, len(trellis.starts), columns)
