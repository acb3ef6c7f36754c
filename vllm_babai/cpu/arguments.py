"""What the CPU kernels take: the fields of these types are the one statement of names and order.

All are 64-bit integers: values of LLVM where `cpu.kernel` builds a kernel, numbers where `cpu.loops` calls it. Strides
are in bytes, addresses those of one tile of a layer.
"""

from typing import Any, NamedTuple


class DenseArguments(NamedTuple):
    """Of a dense kernel: y[token, row] += Σ over groups of scale[group, row] · Σ x[token, k] · integer[row, k].

    x, words, scales, y: addresses, of the rows of one tile. words_per_group: of each row.
    """

    x: Any
    words: Any
    scales: Any
    y: Any
    x_stride: Any
    scale_stride: Any
    y_stride: Any
    groups: Any
    words_per_group: Any


class OverflowArguments(NamedTuple):
    """Of an overflow kernel: out[row, lane] += Σ of scale[column >> group_shift, row] · excess · x[column, lane].

    x: address of float32 [columns, lanes]. entries, offsets, blocks: see `vllm_babai.cpu.backend`; from the first block
    of the tile on. out: address of float32 [TILE_ROWS, lanes].
    """

    x: Any
    entries: Any
    offsets: Any
    blocks: Any
    scales: Any
    scale_stride: Any
    group_shift: Any
    out: Any


class ExpandArguments(NamedTuple):
    """Of an expansion kernel: `count` words of fields at `words` → pairs of bfloat16 integers at `pairs`."""

    words: Any
    count: Any
    pairs: Any


class InsertArguments(NamedTuple):
    """Of the insertion kernel: pairs of bfloat16 integers += `count` entries of their block, rounded to bfloat16."""

    entries: Any
    count: Any
    pairs: Any


class DequantizeArguments(NamedTuple):
    """Of a dequantization kernel: weight[k, row] = scale[group, row] · integer[row, k], float32, for a tile's rows."""

    words: Any
    scales: Any
    weight: Any
    scale_stride: Any
    weight_stride: Any
    groups: Any
    words_per_group: Any
