"""Visits, in blocks of one expert each, times that expert's weight in the trellis form.

Rows of all experts stand one expert below the other, as many blocks of each, so all kernels for a trellis take them as
a single tall linear. Few visits go through `trellis.fused` with other blocks, many through dequantized weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.format.trellis.code import TILE_ROWS
from vllm_babai.format.trellis.window import TrellisWindow, stack_windows, with_as_many_blocks
from vllm_babai.ops.trellis import TrellisTensors
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.experts import grouped
from vllm_babai.triton_kernels.experts.fused import visits_of
from vllm_babai.triton_kernels.experts.route import Routing
from vllm_babai.triton_kernels.layout import ROW_ALIGNMENT
from vllm_babai.triton_kernels.trellis.arguments import STEP, arguments
from vllm_babai.triton_kernels.trellis.dequantize import dequantized_parts
from vllm_babai.triton_kernels.trellis.fused import (
    finish_block,
    fused_tiling,
    lane_tokens,
    share_sum,
    shares_of_block,
)
from vllm_babai.triton_kernels.trellis.layout import trellis_layout
from vllm_babai.triton_kernels.trellis.prepare import prepare


class Operands(NamedTuple):
    """Pointers of one call. x: fp16 [visits / per_row, columns], and factors: fp32, see `trellis.prepare`.

    partials, counters: as of `trellis.fused.Operands`. y: [visits, n]. owners, visits: as of `Routing`. bias: [experts,
    n]; x again where there is none.
    """

    x: Tensor
    factors: Tensor
    partials: Tensor
    counters: Tensor
    y: Tensor
    owners: Tensor
    visits: Tensor
    bias: Tensor


class Sizes(NamedTuple):
    """Integers of a layer. n: out_features of an expert. blocks, rows: of the tall linear, that an expert has. columns:
    of prepared activations.
    """

    n: int
    blocks: int
    rows: int
    columns: int


class TrellisLinear(NamedTuple):
    """One linear of each of `experts` experts; see `dispatch.Linear`. out_features, in_features: of each.

    bias: [experts, out_features], or None.
    """

    trellis: TrellisTensors
    experts: int
    out_features: int
    in_features: int
    bias: Tensor | None

    @property
    def rows(self) -> int:
        """Of the tall linear, that an expert has."""
        return self.trellis.out_features // self.experts

    def fused(self, x: Tensor, per_row: int, routing: Routing, target: Target) -> Tensor:
        """See `multiply_routed`."""
        return multiply_routed(x, per_row, routing, self, target)

    def dequantized(self, dtype: torch.dtype, target: Target) -> Iterator[Tensor]:
        """The weights of all experts, some rows after the other."""
        return dequantized_parts(self.trellis, self.in_features, dtype, target.backend, ROW_ALIGNMENT)

    @property
    def product_sizes(self) -> grouped.Sizes:
        """Of the product with dequantized weights."""
        return grouped.Sizes(self.out_features, self.in_features, self.rows)


def trellis_experts_layout(windows: Sequence[TrellisWindow], device: torch.device) -> TrellisTensors:
    """Windows of one size, one an expert, as that of a tall linear; see `trellis.layout`.

    An expert's rows begin at a multiple of ROW_ALIGNMENT, which tiles of a product do not cross.
    """
    rows = -(-windows[0].rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
    aligned = [replace(window, rows=rows) for window in with_as_many_blocks(windows)]
    return trellis_layout(stack_windows(aligned), device)


@triton.jit(do_not_specialize=["blocks", "shares", "per_row"])
def experts_kernel(layer, operands, sizes, blocks, shares, per_row, TILING: tl.constexpr):
    """One share of one block of an expert's rows for one block of visits; see `trellis.fused.fused_kernel`.

    layer: `Layer` of the tall linear. operands, sizes: as above. blocks: of visits. per_row: visits that share a row of
    x. TILING: `trellis.fused.Tiling`. Grid: [row blocks of an expert · blocks · shares].
    """
    TOKENS: tl.constexpr = TILING.tokens
    STORED: tl.constexpr = TILING.stored_tokens
    tile, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    own_block, block = tile // blocks, tile % blocks  # those of one expert are neighbours, and share its words
    if TILING.dependent:
        tl.extra.cuda.gdc_wait()  # for x to be prepared
    owner = tl.load(operands.owners + block)
    if owner >= 0:
        lanes = block + 0 * lane_tokens(TOKENS)
        if STORED > 1:  # absent visits read what the first one does
            lanes = tl.maximum(tl.load(operands.visits + block * STORED + lane_tokens(TOKENS)), 0)
        row_block = owner * sizes.blocks + own_block
        total = share_sum(layer, operands.x, lanes // per_row, sizes, (row_block, share, shares), TILING)
        visits, present = visits_of(operands.visits, block, TOKENS, STORED)
        stored, exists = visits_of(operands.visits, block, STORED, STORED)
        outputs = ((visits, visits // per_row, present), (stored, stored // per_row, exists))
        place = (tile, shares, row_block, owner * sizes.rows)
        finish_block(layer, operands, sizes, place, outputs, total, TILING)


def multiply_routed(x: Tensor, per_row: int, routing: Routing, linear: TrellisLinear, target: Target) -> Tensor:
    """x [visits / per_row, in_features] bf16 or fp16 → y [visits, out_features] in x's dtype, a row a visit.

    per_row: visits that share a row of x. Rows of visits that belong to no expert here are left as they are.
    Deterministic.
    """
    trellis, tokens, blocks = linear.trellis, routing.rows, len(routing.owners)
    layer, tall = arguments(trellis, linear.in_features)
    own_blocks = tall.blocks // linear.experts
    bias = linear.bias
    tiling = fused_tiling(tokens, target)._replace(biased=bias is not None)
    tiles = own_blocks * blocks
    shares = shares_of_block(tiles, len(trellis.tiles) // tall.blocks // STEP, tokens, target)
    prepared = prepare(x, tall, tiles, target)
    y = x.new_empty(len(x) * per_row, linear.out_features)
    partials = x.new_empty(tiles * shares * TILE_ROWS * tokens if shares > 1 else 0, dtype=torch.float32)
    options = {"launch_pdl": True} if tiling.dependent else {}
    experts_kernel[(tiles * shares,)](
        layer,
        Operands(*prepared[:2], partials, prepared.counters, y, *routing, x if bias is None else bias),
        Sizes(linear.out_features, own_blocks, linear.rows, tall.columns),
        blocks,
        shares,
        per_row,
        TILING=tiling,
        num_warps=1,
        enable_fp_fusion=True,
        **options,
    )
    return y
