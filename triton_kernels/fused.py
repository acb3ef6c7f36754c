"""y = x Wᵀ for few tokens, straight from the packed weights: dense and overflow part at once.

A program is one split of an output tile [rows, tokens]: a run of column blocks of the dense part, and the panels of the
overflow that begin there. Where a tile has several, each writes its sums to a buffer of partial sums, and the program
that arrives last at the tile's counter adds them up in a fixed order: no output to clear, no float atomics, the same
result every time. For several tokens a small launch goes before, that transposes x for the overflow part.
Weights are the wide operand of the matrix product and tokens the narrow one, so that one token wastes little.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.arguments import UNITS, arguments
from vllm_babai.triton_kernels.configs import BUCKETS, Config, Target
from vllm_babai.triton_kernels.layout import SLOT, Geometry
from vllm_babai.triton_kernels.overflow import overflow_product, overflow_sum
from vllm_babai.triton_kernels.tokens import SMALLEST_DOT
from vllm_babai.triton_kernels.transpose import transpose
from vllm_babai.triton_kernels.unpack import load_words, matrix_product, round_to, unpack_slot

OVERFLOW_FEATURES = 1 << 14  # that a program's overflow part gathers ahead, at most
SUM_ELEMENTS = 4096  # partial sums that are loaded at a time, at most


class Operands(NamedTuple):
    """Pointers of one call. x: [m, k]. xt: x transposed, [k, token tiles · overflow_tokens]; x again where unused.

    partials: fp32 [row blocks, token tiles, splits, tokens, rows]; empty for one split. y: [m, n].
    """

    x: Tensor
    xt: Tensor
    partials: Tensor
    y: Tensor


class Tiling(NamedTuple):
    """Compile-time constants of the fused kernel.

    bits: of a weight in the dense part. block_columns, words: of a column block. flush: slots from one change of scale
    to the next, 0 if a row has one scale. even_k: the column blocks have no padding. rows, tokens: of an output tile.
    one_tile: of tokens, for every m of this bucket. stored_tokens: tokens of a tile that may exist, the bucket.
    sum_step: partial sums of an element that are loaded at a time. overflow_tokens, overflow_step, overflow_stages:
    tokens, entries of a row at a time, and depth of the pipeline, of the overflow part. dependent: may start before the
    transposition of x has ended. stages: depth of the dense part's pipeline. backend: of `Target`. biased: of experts,
    whether each row has a bias.
    """

    bits: int
    block_columns: int
    words: int
    flush: int
    even_k: bool
    rows: int
    tokens: int
    one_tile: bool
    stored_tokens: int
    sum_step: int
    overflow_tokens: int
    overflow_step: int
    overflow_stages: int
    dependent: bool
    stages: int
    backend: str
    biased: bool = False


@triton.jit(do_not_specialize=["m", "splits", "panels"])
def fused_kernel(layer, operands, sizes, m, splits, panels, TILING: tl.constexpr):
    """One split of one output tile; the last to arrive at the tile adds the splits up and writes y.

    layer: `Layer`. operands: `Operands`. sizes: `Sizes`. m: tokens. splits: of a tile. panels: of the overflow, 0 if
    there is none. TILING: `Tiling`. Grid: [row blocks · token tiles · splits].
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.tokens
    slot = tl.program_id(0)
    tile = slot // splits
    if TILING.one_tile:
        row_block, first_token = tile, 0
    else:
        token_tiles = tl.cdiv(m, TOKENS)  # those of the same rows are neighbours, and read the weights from the cache
        row_block, first_token = tile // token_tiles, tile % token_tiles * TOKENS
    first_row = row_block * ROWS
    rows = first_row + tl.arange(0, ROWS)
    blocks, own_panels = share_of_split(sizes, slot % splits, splits, panels, TILING)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    if own_panels[0] < own_panels[1]:  # first, so that the registers hold one set of sums at a time
        total = panels_sum(layer, operands, sizes, m, (first_row, first_token), own_panels, TILING)
    tokens = first_token + tl.arange(0, TOKENS)[None, :]
    total = dense_sum(layer, (operands.x, tokens * sizes.k, tokens < m), sizes, first_row, blocks, total, TILING)
    if splits == 1:
        y_ptrs = operands.y + tokens.to(tl.int64) * sizes.n + rows[:, None]
        inside = (tokens < m) & (rows < sizes.n)[:, None]
        tl.store(y_ptrs, round_to(total, operands.y.dtype.element_ty, TILING.backend), mask=inside)
    else:
        store_partial(operands.partials, slot, total, m - first_token, TOKENS)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(layer.counters + tile, 1, sem="acq_rel")
        if arrived == splits - 1:
            stored = first_token + tl.arange(0, TILING.stored_tokens)
            inside = (stored < m)[:, None] & (rows < sizes.n)[None, :]
            sums = sum_splits(operands.partials, inside, tile * splits, splits, TILING)
            y_ptrs = operands.y + stored.to(tl.int64)[:, None] * sizes.n + rows[None, :]
            tl.store(y_ptrs, round_to(sums, operands.y.dtype.element_ty, TILING.backend), mask=inside)
            tl.store(layer.counters + tile, 0)


@triton.jit
def share_of_split(sizes, split, splits, panels, TILING: tl.constexpr):
    """First and end of the column blocks of a split, and of the panels of the overflow, of which there are `panels`."""
    column_blocks = tl.cdiv(sizes.k, TILING.block_columns)
    per_split = tl.cdiv(column_blocks, splits)
    blocks = (split * per_split, tl.minimum((split + 1) * per_split, column_blocks))
    return blocks, (split * panels // splits, (split + 1) * panels // splits)


@triton.jit
def panels_sum(layer, operands, sizes, m, corner, panels, TILING: tl.constexpr):
    """The sum over the overflow of the panels from panels[0] to before panels[1], fp32 [rows, tokens].

    Scaled only if a row has several scales. corner: first row and first token of the tile. Of one token all columns of
    the sum are alike.
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    if TILING.stored_tokens == 1:
        rows = corner[0] + tl.arange(0, ROWS)
        for panel in range(panels[0], panels[1]):
            total += overflow_sum(layer, operands.x, sizes, panel, rows, TILING.flush > 0, TILING.overflow_step)
    else:
        if TILING.dependent:
            tl.extra.cuda.gdc_wait()  # for x to be transposed
        token_stride = tl.cdiv(m, TOKENS) * TILING.overflow_tokens
        for panel in range(panels[0], panels[1]):
            sums = overflow_product(layer, operands.xt, token_stride, sizes, panel, corner[0], corner[1], TILING)
            if TILING.overflow_tokens == TOKENS:
                total += sums
            else:  # the tokens beyond those of the tile are zero
                total += tl.sum(sums.reshape(ROWS, TILING.overflow_tokens // TOKENS, TOKENS), 1)
    return total


@triton.jit
def sum_splits(partials_ptr, inside, first_slot, splits, TILING: tl.constexpr):
    """A tile's partial sums added up, fp32 [stored tokens, ROWS]: several at once for the sake of latency.

    inside: [stored tokens, ROWS], which of them there are. first_slot: of the `splits` that follow each other.
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.stored_tokens
    STEP: tl.constexpr = TILING.sum_step
    tokens = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, splits, STEP):
        split = first + tl.arange(0, STEP)
        offsets = ((first_slot + split)[:, None] * TILING.tokens + tokens[None, :]) * ROWS
        ptrs = partials_ptr + offsets[:, :, None] + tl.arange(0, ROWS)[None, None, :]
        mask = (split < splits)[:, None, None] & inside[None, :, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def dense_sum(layer, source, sizes, first_row, blocks, total, TILING: tl.constexpr):
    """`total` and the sum over the column blocks from blocks[0] to before blocks[1], scaled, fp32 [rows, tokens].

    source: pointer to x, where the first feature of each token is, [1, tokens], and which tokens there are; or pointers
    to the tokens, and 0. Either spills registers where the other does not (sm_80, 2 bits; experts on sm_90, 4 bits).
    first_row: of the tile. total: as of `panels_sum`.
    """
    ROWS: tl.constexpr = TILING.rows
    TOKENS: tl.constexpr = TILING.tokens
    WORDS: tl.constexpr = TILING.words
    FLUSH: tl.constexpr = TILING.flush
    BLOCK_COLUMNS: tl.constexpr = TILING.block_columns
    DTYPE: tl.constexpr = source[0].dtype.element_ty
    TILE_ROWS: tl.constexpr = UNITS.value.tile_rows
    PAIRS: tl.constexpr = UNITS.value.pairs
    COLUMNS: tl.constexpr = UNITS.value.slot
    TILE_WORDS: tl.constexpr = TILE_ROWS * PAIRS
    column_blocks = tl.cdiv(sizes.k, BLOCK_COLUMNS)
    rows = first_row + tl.arange(0, ROWS)
    features = tl.arange(0, COLUMNS)[:, None]
    x_ptrs = source[0] + (source[1] + features)
    word_ptrs = (
        layer.dense
        + (rows // TILE_ROWS * column_blocks * (WORDS * TILE_WORDS) + rows % TILE_ROWS * PAIRS)[:, None]
        + tl.arange(0, PAIRS)[None, :]
    )
    group_total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in tl.range(blocks[0], blocks[1], num_stages=TILING.stages):
        words = load_words(word_ptrs + block * (WORDS * TILE_WORDS), WORDS, TILE_WORDS)
        for slot in tl.static_range(BLOCK_COLUMNS // COLUMNS):
            column = block * BLOCK_COLUMNS + slot * COLUMNS
            inside = source[2]
            if not TILING.even_k:
                inside = inside & (column + features < sizes.k)
            x = tl.load(x_ptrs + column, mask=inside, other=0.0, cache_modifier=".ca")
            weight = unpack_slot(words, slot, TILING.bits, DTYPE, TILING.backend)
            if FLUSH == 0:
                total = matrix_product(weight, x, total, TILING.backend)
            else:
                group_total = matrix_product(weight, x, group_total, TILING.backend)
                if (slot + 1) % FLUSH == 0:
                    group = tl.minimum(column, sizes.k - 1) // sizes.group_size  # padding has no group of its own
                    scale = tl.load(layer.scales + group * sizes.padded_rows + rows).to(tl.float32)
                    total += group_total * scale[:, None]
                    group_total = tl.zeros((ROWS, TOKENS), tl.float32)
    if FLUSH == 0:
        total = total * tl.load(layer.scales + rows).to(tl.float32)[:, None]
    return total


@triton.jit
def store_partial(partials_ptr, slot, total, present, TOKENS: tl.constexpr):
    """Store sums [rows, tokens] as a partial [TOKENS, rows]; only the first `present` tokens exist."""
    tokens = tl.arange(0, total.shape[1])[None, :]
    ptrs = partials_ptr + (slot * TOKENS + tokens) * total.shape[0] + tl.arange(0, total.shape[0])[:, None]
    tl.store(ptrs, total, mask=tokens < present)


def fused_tiling(geometry: Geometry, config: Config, groups: int, tokens: int, target: Target) -> Tiling:
    """Compile-time constants of `fused_kernel` for a bucket of `tokens` tokens."""
    block = geometry.block_columns
    group_size = geometry.in_features // groups
    gathered = max(tokens, 16)  # of tokens, by the overflow part: what a matrix instruction takes
    step = 16 if tokens == 1 else min(4, OVERFLOW_FEATURES // (config.rows * gathered))
    return Tiling(
        bits=geometry.bits,
        block_columns=block,
        words=geometry.words,
        flush=0 if groups == 1 else math.gcd(group_size, block) // SLOT,
        even_k=geometry.in_features % block == 0,
        rows=config.rows,
        tokens=max(tokens, SMALLEST_DOT[target.backend]),
        one_tile=tokens < BUCKETS[-1],
        stored_tokens=tokens,
        sum_step=max(1, min(32, SUM_ELEMENTS // (config.rows * tokens))),
        overflow_tokens=gathered,
        overflow_step=step,
        overflow_stages=min(config.stages, 1 + OVERFLOW_FEATURES // (config.rows * gathered * step)),
        dependent=tokens > 1 and target.overlaps_launches,
        stages=config.stages,
        backend=target.backend,
    )


class Launch(NamedTuple):
    """How `fused_kernel` is launched for a number of token tiles. partials: fp32 sums that it needs."""

    tiling: Tiling
    programs: int
    splits: int
    partials: int


@cache
def plan_launch(geometry: Geometry, config: Config, groups: int, m_tiles: int, tokens: int, target: Target) -> Launch:
    """The launch for `m_tiles` tiles of the bucket `tokens`; kept, since making it takes longer than the launch.

    groups: scales of a row.
    """
    tiling = fused_tiling(geometry, config, groups, tokens, target)
    tiles = geometry.padded_rows // config.rows * m_tiles
    splits = _splits(geometry, tiles, config, target)
    programs = tiles * splits
    return Launch(tiling, programs, splits, 0 if splits == 1 else programs * tiling.tokens * config.rows)


def multiply_fused(
    x: Tensor, layout: DeviceLayout, geometry: Geometry, config: Config, tokens: int, target: Target
) -> Tensor:
    """x [m, in_features] bf16 or fp16 → y [m, out_features] in x's dtype.

    tokens: the bucket, m or more, or what one tile of tokens holds where m is larger. Deterministic.
    """
    m = x.shape[0]
    groups = layout.scales.shape[0]
    panels = geometry.panels if layout.entries.numel() else 0
    m_tiles = -(-m // max(tokens, SMALLEST_DOT[target.backend]))
    launch = plan_launch(geometry, config, groups, m_tiles, tokens, target)
    tiling = launch.tiling
    y = x.new_empty(m, geometry.out_features)
    partials = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
    transposed, options = x, {}
    if panels and tokens > 1:
        # with several scales a row in bf16: fp16 has no room for small scales times large integers
        transposed = transpose(x, tiling.overflow_tokens, x.dtype if groups == 1 else torch.bfloat16, target)
        options = {"launch_pdl": True} if tiling.dependent else {}
    layer, sizes = arguments(layout, geometry)
    fused_kernel[(launch.programs,)](
        layer,
        Operands(x, transposed, partials, y),
        sizes,
        m,
        launch.splits,
        panels,
        TILING=tiling,
        num_warps=config.warps,
        enable_fp_fusion=True,
        **options,
    )
    return y


def _splits(geometry: Geometry, tiles: int, config: Config, target: Target) -> int:
    """Runs that the column blocks are cut into, so that the GPU is filled once, with none of them empty."""
    wanted = max(1, min(geometry.column_blocks, round(config.programs_per_sm * target.processors / tiles)))
    per_split = -(-geometry.column_blocks // wanted)
    return -(-geometry.column_blocks // per_split)
