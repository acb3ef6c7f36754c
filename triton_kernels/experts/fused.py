"""Rows of x, in blocks of one expert each, times that expert's weight: `triton_kernels.fused` with other tiles.

A program is one split of an output tile [rows of a weight, rows of a block]. Counters of arrivals lie in a workspace of
the call, as large as the bound on blocks asks for; so one layer may run on two streams at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.arguments import arguments
from vllm_babai.triton_kernels.configs import Target, config_for
from vllm_babai.triton_kernels.experts.route import Routing
from vllm_babai.triton_kernels.fused import dense_sum, panels_sum, plan_launch, store_partial, sum_splits
from vllm_babai.triton_kernels.layout import Geometry, geometry_of
from vllm_babai.triton_kernels.overflow import overflow_sum
from vllm_babai.triton_kernels.transpose import transpose
from vllm_babai.triton_kernels.unpack import round_to


class Operands(NamedTuple):
    """Pointers of one call. x: [blocks · tokens, k]. xt: x transposed; x again where unused. partials: fp32, as of
    `fused.Operands`. y: [blocks · tokens, n]. owners: int32 [blocks]. counters: int32, zero, one an output tile.
    """

    x: Tensor
    xt: Tensor
    partials: Tensor
    y: Tensor
    owners: Tensor
    counters: Tensor


class Sizes(NamedTuple):
    """Integers of a layer. n: out_features of an expert. k: in_features. padded_rows: of all experts. group_size: input
    features that share a scale. own_rows: of one expert, with padding.
    """

    n: int
    k: int
    padded_rows: int
    group_size: int
    own_rows: int


@triton.jit(do_not_specialize=["blocks", "splits", "panels"])
def experts_kernel(layer, operands, sizes, blocks, splits, panels, TILING: tl.constexpr):
    """One split of one output tile; the last to arrive at the tile adds the splits up and writes y.

    layer: `Layer` of the tall linear. operands, sizes: as above. blocks: of rows of x. splits: of a tile. panels: of
    the overflow, 0 if there is none. TILING: `fused.Tiling`. Grid: [row blocks of an expert · blocks · splits].
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.tokens
    STORED: tl.constexpr = TILING.stored_tokens
    slot = tl.program_id(0)
    tile = slot // splits
    split = slot % splits
    row_block = tile // blocks
    block = tile % blocks  # those of one expert are neighbours, and read its weights from the cache
    owner = tl.load(operands.owners + block)
    if owner >= 0:
        first_token = block * STORED
        end = first_token + STORED
        corner = (owner * sizes.own_rows + row_block * ROWS, first_token)
        column_blocks = tl.cdiv(sizes.k, TILING.block_columns)
        per_split = tl.cdiv(column_blocks, splits)
        own_blocks = (split * per_split, tl.minimum((split + 1) * per_split, column_blocks))
        own_panels = (split * panels // splits, (split + 1) * panels // splits)
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        if own_panels[0] < own_panels[1]:
            if STORED == 1:
                x_ptr = operands.x + block.to(tl.int64) * sizes.k
                of_weight = corner[0] + tl.arange(0, ROWS)
                for panel in range(own_panels[0], own_panels[1]):
                    total += overflow_sum(layer, x_ptr, sizes, panel, of_weight, TILING.flush > 0, TILING.overflow_step)
            else:
                total = panels_sum(layer, operands, sizes, blocks * STORED, corner, own_panels, TILING)
        total = dense_sum(layer, operands.x, sizes, end, corner, own_blocks, total, TILING)
        rows = row_block * ROWS + tl.arange(0, ROWS)
        if splits == 1:
            tokens = first_token + tl.arange(0, TOKENS)[None, :]
            y_ptrs = operands.y + tokens.to(tl.int64) * sizes.n + rows[:, None]
            inside = (tokens < end) & (rows < sizes.n)[:, None]
            tl.store(y_ptrs, round_to(total, operands.y.dtype.element_ty, TILING.backend), mask=inside)
        else:
            store_partial(operands.partials, slot, total, STORED, TOKENS)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            arrived = tl.atomic_add(operands.counters + tile, 1, sem="acq_rel")
            if arrived == splits - 1:
                sum_splits(operands, sizes, end, first_token, rows, tile * splits, splits, TILING)


def multiply_routed(x: Tensor, routing: Routing, layout: DeviceLayout, geometry: Geometry, target: Target) -> Tensor:
    """x [rows, in_features] bf16 or fp16, as `routing` places them → y [rows, out_features] in x's dtype.

    layout: of all experts. geometry: of one. Rows of blocks without an owner are left as they are. Deterministic.
    """
    groups, tokens, blocks = layout.scales.shape[0], routing.tokens, len(routing.owners)
    config = config_for(target, geometry.bits, tokens, (geometry.out_features, geometry.in_features), groups)
    launch = plan_launch(geometry, config, groups, blocks, tokens, target)
    tiling = launch.tiling._replace(one_tile=False, dependent=False)
    panels = geometry.panels if layout.entries.numel() else 0
    transposed = x
    if panels and tokens > 1:
        # with several scales a row in bf16: fp16 has no room for small scales times large integers
        transposed = transpose(x, tiling.overflow_tokens, x.dtype if groups == 1 else torch.bfloat16, target)
    y = x.new_empty(len(x), geometry.out_features)
    partials = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
    tiles = launch.programs // launch.splits
    counters = torch.zeros(tiles if launch.splits > 1 else 1, dtype=torch.int32, device=x.device)
    layer, tall = arguments(layout, geometry_of(geometry.bits, geometry.in_features, layout.scales.shape[1]))
    experts_kernel[(launch.programs,)](
        layer,
        Operands(x, transposed, partials, y, routing.owners, counters),
        Sizes(geometry.out_features, geometry.in_features, tall.padded_rows, tall.group_size, geometry.padded_rows),
        blocks,
        launch.splits,
        panels,
        TILING=tiling,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
    return y
