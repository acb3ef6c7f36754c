"""Visits, in blocks of one expert each, times that expert's weight: `triton_kernels.fused` with other tiles.

A program is one split of an output tile [rows of a weight, rows of a block]. Counters of arrivals lie in a workspace of
the call, as large as the bound on blocks asks for; so one layer may run on two streams at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.arguments import arguments
from vllm_babai.triton_kernels.configs import Target, config_for
from vllm_babai.triton_kernels.dequantize import dequantized_parts
from vllm_babai.triton_kernels.experts import grouped
from vllm_babai.triton_kernels.experts.gather import gather
from vllm_babai.triton_kernels.experts.route import Routing
from vllm_babai.triton_kernels.fused import (
    dense_sum,
    panels_sum,
    plan_launch,
    share_of_split,
    store_partial,
    sum_splits,
)
from vllm_babai.triton_kernels.layout import Geometry, geometry_of
from vllm_babai.triton_kernels.overflow import overflow_sum
from vllm_babai.triton_kernels.unpack import round_to


class Operands(NamedTuple):
    """Pointers of one call. x: [visits / per_row, k]. xt: [k, rows of all blocks]; x again where unused. partials:
    fp32, as of `fused.Operands`. y: [visits, n]. owners, visits: as of `Routing`. counters: int32, zero, one a tile.
    bias: [experts, n]; x again where there is none.
    """

    x: Tensor
    xt: Tensor
    partials: Tensor
    y: Tensor
    owners: Tensor
    visits: Tensor
    counters: Tensor
    bias: Tensor


class Sizes(NamedTuple):
    """Integers of a layer. n: out_features of an expert. k: in_features. padded_rows: of all experts. group_size: input
    features that share a scale. own_rows: of one expert, with padding.
    """

    n: int
    k: int
    padded_rows: int
    group_size: int
    own_rows: int


@triton.jit(do_not_specialize=["blocks", "splits", "panels", "per_row"])
def experts_kernel(layer, operands, sizes, blocks, splits, panels, per_row, TILING: tl.constexpr):
    """One split of one output tile; the last to arrive at the tile adds the splits up and writes y.

    layer: `Layer` of the tall linear. operands, sizes: as above. blocks: of rows. splits: of a tile. panels: of the
    overflow, 0 if there is none. per_row: visits that share a row of x. TILING: `fused.Tiling`.
    Grid: [row blocks of an expert · blocks · splits].
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.tokens
    STORED: tl.constexpr = TILING.stored_tokens
    slot = tl.program_id(0)
    tile = slot // splits
    row_block = tile // blocks
    block = tile % blocks  # those of one expert are neighbours, and read its weights from the cache
    owner = tl.load(operands.owners + block)
    if owner >= 0:
        first_row = owner * sizes.own_rows + row_block * ROWS
        column_blocks, own_panels = share_of_split(sizes, slot % splits, splits, panels, TILING)
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        visits, present = visits_of(operands.visits, block, TOKENS, STORED)
        if STORED == 1:
            x_ptr = operands.x + (block // per_row).to(tl.int64) * sizes.k
            x_rows = x_ptr + tl.arange(0, TOKENS) * sizes.k  # of which all but the first are masked
            for panel in range(own_panels[0], own_panels[1]):
                rows = first_row + tl.arange(0, ROWS)
                total += overflow_sum(layer, x_ptr, sizes, panel, rows, TILING.flush > 0, TILING.overflow_step)
        else:
            x_rows = operands.x + visits // per_row * sizes.k
            if own_panels[0] < own_panels[1]:
                corner = (first_row, block * STORED)
                total = panels_sum(layer, operands, sizes, blocks * STORED, corner, own_panels, TILING)
        source = (x_rows[None, :], 0, present[None, :])  # with offsets registers spill here (sm_90, 4 bits, 1 row)
        total = dense_sum(layer, source, sizes, first_row, column_blocks, total, TILING)
        columns = row_block * ROWS + tl.arange(0, ROWS)
        bias_ptrs = operands.bias + owner * sizes.n + columns
        if splits == 1:
            visits, present = visits_of(operands.visits, block, TOKENS, STORED)
            y_ptrs = operands.y + visits.to(tl.int64)[None, :] * sizes.n + columns[:, None]
            inside = present[None, :] & (columns < sizes.n)[:, None]
            if TILING.biased:
                total += tl.load(bias_ptrs, mask=columns < sizes.n, other=0.0).to(tl.float32)[:, None]
            tl.store(y_ptrs, round_to(total, operands.y.dtype.element_ty, TILING.backend), mask=inside)
        else:
            store_partial(operands.partials, slot, total, STORED, TOKENS)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            arrived = tl.atomic_add(operands.counters + tile, 1, sem="acq_rel")
            if arrived == splits - 1:
                stored, exists = visits_of(operands.visits, block, STORED, STORED)
                inside = exists[:, None] & (columns < sizes.n)[None, :]
                sums = sum_splits(operands.partials, inside, tile * splits, splits, TILING)
                if TILING.biased:
                    sums += tl.load(bias_ptrs, mask=columns < sizes.n, other=0.0).to(tl.float32)[None, :]
                y_ptrs = operands.y + stored.to(tl.int64)[:, None] * sizes.n + columns[None, :]
                tl.store(y_ptrs, round_to(sums, operands.y.dtype.element_ty, TILING.backend), mask=inside)


@triton.jit
def visits_of(visits_ptr, block, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Visits of the first COUNT rows of a block of ROWS, int32 [COUNT], and which of them there are.

    COUNT is ROWS, unless that is 1. They are read before the sums and once more after them: kept meanwhile, they make
    registers spill (sm_90, 64 rows, Triton 3.7.1).
    """
    if ROWS == 1:
        rows = tl.arange(0, COUNT)
        return block + rows, rows == 0
    else:
        visits = tl.load(visits_ptr + block * ROWS + tl.arange(0, COUNT))
        return visits, visits >= 0


class PackedLinear(NamedTuple):
    """One linear of each expert, dense + sparse; see `dispatch.Linear`. layout: of all. geometry: of one.

    bias: [experts, out_features], or None.
    """

    layout: DeviceLayout
    geometry: Geometry
    bias: Tensor | None

    @property
    def tall(self) -> Geometry:
        """Of all experts' rows, one expert below the other."""
        return geometry_of(self.geometry.bits, self.geometry.in_features, self.layout.scales.shape[1])

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.layout.scales.shape[1] // self.geometry.padded_rows

    def fused(self, x: Tensor, per_row: int, routing: Routing, target: Target) -> Tensor:
        """See `multiply_routed`."""
        return multiply_routed(x, per_row, routing, self, target)

    def dequantized(self, dtype: torch.dtype, target: Target) -> Iterator[Tensor]:
        """The weights of all experts, some rows after the other."""
        return dequantized_parts(self.layout, self.tall, dtype, target.backend)

    @property
    def product_sizes(self) -> grouped.Sizes:
        """Of the product with dequantized weights."""
        return grouped.Sizes(self.geometry.out_features, self.geometry.in_features, self.geometry.padded_rows)


def multiply_routed(x: Tensor, per_row: int, routing: Routing, linear: PackedLinear, target: Target) -> Tensor:
    """x [visits / per_row, in_features] bf16 or fp16 → y [visits, out_features] in x's dtype, a row a visit.

    per_row: visits that share a row of x. Rows of visits that belong to no expert here are left as they are.
    Deterministic.
    """
    layout, geometry, bias = linear
    groups, rows, blocks = layout.scales.shape[0], routing.rows, len(routing.owners)
    config = config_for(target, geometry.bits, rows, (geometry.out_features, geometry.in_features), groups)
    launch = plan_launch(geometry, config, groups, blocks, rows, target)
    panels = geometry.panels if layout.entries.numel() else 0
    transposed = x
    if panels and rows > 1:
        # with several scales a row in bf16: fp16 has no room for small scales times large integers
        transposed = gather(x, routing, per_row, x.dtype if groups == 1 else torch.bfloat16, target)
    y = x.new_empty(len(x) * per_row, geometry.out_features)
    partials = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
    counters = routing.owners  # for want of any
    if launch.splits > 1:
        counters = torch.zeros(launch.programs // launch.splits, dtype=torch.int32, device=x.device)
    layer, tall = arguments(layout, linear.tall)
    experts_kernel[(launch.programs,)](
        layer,
        Operands(x, transposed, partials, y, routing.owners, routing.visits, counters, x if bias is None else bias),
        Sizes(geometry.out_features, geometry.in_features, tall.padded_rows, tall.group_size, geometry.padded_rows),
        blocks,
        launch.splits,
        panels,
        per_row,
        TILING=launch.tiling._replace(one_tile=False, dependent=False, biased=bias is not None),
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
    return y
