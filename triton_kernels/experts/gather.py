"""x of visits transposed, for the overflow part of the grouped kernel: `triton_kernels.transpose` with other tokens."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.experts.route import Routing
from vllm_babai.triton_kernels.transpose import COLUMNS, store_transposed


class Tile(NamedTuple):
    """Compile-time constants. rows: of a block. columns: of x, of a program. backend: of `Target`."""

    rows: int
    columns: int
    backend: str


@triton.jit(do_not_specialize=["blocks", "per_row"])
def gather_kernel(x_ptr, xt_ptr, routing, blocks, per_row, k, TILE: tl.constexpr):
    """Transpose some columns of the visits of a block with an owner; rows without a visit are zero.

    x_ptr: [visits / per_row, k]. xt_ptr: [k, blocks · rows]. routing: `Routing`. per_row: visits that share a row of x.
    TILE: `Tile`. Grid: [column tiles, blocks].
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    block = tl.program_id(1)
    if tl.load(routing.owners + block) >= 0:
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        rows = block * ROWS + tl.arange(0, ROWS)
        visits = tl.load(routing.visits + rows)
        x_rows = x_ptr + (visits // per_row).to(tl.int64) * k
        store_transposed(x_rows, visits >= 0, xt_ptr, blocks * ROWS, rows, columns, k, TILE.backend)


def gather(x: Tensor, routing: Routing, per_row: int, dtype: torch.dtype, target: Target) -> Tensor:
    """x [visits / per_row, k] → [k, rows of all blocks] in `dtype`; what has no owner is not written."""
    k, blocks = x.shape[1], len(routing.owners)
    transposed = x.new_empty(k, len(routing.visits), dtype=dtype)
    tile = Tile(routing.rows, COLUMNS, target.backend)
    gather_kernel[(-(-k // COLUMNS), blocks)](x, transposed, routing, blocks, per_row, k, TILE=tile, num_warps=4)
    return transposed
