"""What the kernels of dense + sparse take: groups of pointers and of integers, which Triton passes as named tuples.

Triton 3.7.1, 3.8 and 3.9 treat a tuple's members as they treat arguments of their own (a multiple of 16 is noted, 1 is
compiled in), but for one thing: `do_not_specialize` does not reach into a tuple. An integer that depends on the number
of tokens is therefore an argument of its own, else a kernel would be compiled again while serving.
`tests/kernels/test_kernel_arguments.py` holds this. Compile-time constants are one `tl.constexpr` argument, a named
tuple of plain values.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.layout import DIAGONAL, PAIRS, PANEL_BITS, SLOT, TILE_ROWS, Geometry


class Units(NamedTuple):
    """Sizes of the device layout that are the same for every layer, see `layout`."""

    tile_rows: int
    pairs: int
    slot: int
    panel_bits: int
    diagonal: int


# One global of the kernels rather than five: Triton 3.9 compares each at every launch, which takes 3 µs a constant.
# `.value` is for the interpreter, where a constexpr has no members.
UNITS = tl.constexpr(Units(TILE_ROWS, PAIRS, SLOT, PANEL_BITS, DIAGONAL))


class Layer(NamedTuple):
    """Pointers to one layer's tensors; `layout` says what they hold.

    dense: int32 [row tiles, column blocks, words, TILE_ROWS, PAIRS]. scales: bf16 [groups, padded rows].
    entries: int16 or int32 [entries]. starts: int32 [panels · padded rows + 1]. diagonal: int32 [DIAGONAL, DIAGONAL].
    counters: int32, of arrivals, one an output tile.
    """

    dense: Tensor
    scales: Tensor
    entries: Tensor
    starts: Tensor
    diagonal: Tensor
    counters: Tensor


class Sizes(NamedTuple):
    """Integers of one layer. n: out_features. k: in_features. group_size: input features that share a scale."""

    n: int
    k: int
    padded_rows: int
    group_size: int


def arguments(layout: DeviceLayout, geometry: Geometry) -> tuple[Layer, Sizes]:
    """The groups that kernels take for a layer."""
    offsets = layout.offsets
    layer = Layer(
        layout.dense,
        layout.scales,
        layout.entries,
        offsets[geometry.starts :],
        offsets[geometry.diagonal :],
        offsets,
    )
    group_size = geometry.in_features // layout.scales.shape[0]
    return layer, Sizes(geometry.out_features, geometry.in_features, geometry.padded_rows, group_size)
