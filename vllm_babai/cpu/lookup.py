"""Rows of a dense + sparse weight on the CPU, dequantized: no more than the rows asked for are read."""

from functools import partial

import numba
import torch
from numba import prange
from torch import Tensor

from vllm_babai.compiled import compiled
from vllm_babai.cpu.backend import FIELD_WIDTH, arrays, check_sizes, group_shift
from vllm_babai.cpu.kernel import BLOCK_COLUMNS, TILE_ROWS, weights_per_word
from vllm_babai.cpu.loops import PLACES
from vllm_babai.ops.layout import DeviceLayout


def look_up(ids: Tensor, layout: DeviceLayout, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """See `Backend`. Raises ValueError when the layout is of another shape, IndexError for an id that has no row."""
    check_sizes(layout, bits, shape[1], shape[0])
    flat = ids.reshape(-1).long()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < shape[0]:
        raise IndexError(f"ids are {int(flat.min())} to {int(flat.max())}, and the embedding has {shape[0]} rows")
    out = torch.empty(len(flat), shape[1], dtype=torch.float32)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    width = FIELD_WIDTH[bits]
    fields = (width, weights_per_word(width))
    _dequantize_rows(flat.numpy(), arrays(layout), fields, group_shift(layout.scales, shape[1]), out.numpy())
    return out.to(dtype).view(*ids.shape, shape[1])


@partial(compiled, parallel=True)
def _dequantize_rows(ids, layout, fields, shift, out):
    """out[token] = the row ids[token]. ids: int64 [tokens]. layout: arrays of a `DeviceLayout`. out: float32.

    fields: bits of a field, fields in a word. shift: column >> it is the column's group.
    """
    dense, scales, entries, offsets = layout
    width, per_word = fields
    blocks = (len(offsets) - 1) // dense.shape[0]
    for token in prange(len(ids)):
        tile, lane = ids[token] // TILE_ROWS, ids[token] % TILE_ROWS
        row = out[token]
        for column in range(len(row)):
            word, k = dense[tile, column // per_word, lane], column % per_word
            field = (word >> (16 * (k % 2) + width * (k // 2))) & ((1 << width) - 1)
            row[column] = field - (1 << (width - 1))
        for block in range(blocks):
            for i in range(offsets[tile * blocks + block], offsets[tile * blocks + block + 1]):
                place = entries[i] & PLACES
                if place % TILE_ROWS == lane:
                    row[block * BLOCK_COLUMNS + place // TILE_ROWS] += entries[i] >> 16
        for column in range(len(row)):
            row[column] *= scales[column >> shift, ids[token]]
