"""y = x Wᵀ for few tokens, straight from the packed weights: dense and overflow part at once.

A program is one share of an output tile [ROWS, BM]: either a run of column blocks of the dense part, or one segment of
the overflow. Every share is written to a buffer of partial sums, and the program that arrives last at a tile's counter
adds them up in a fixed order: no output to clear, no float atomics, the same result every time. For several tokens a
small launch goes before, that transposes x for the overflow part.
Weights are the wide operand of the matrix product and tokens the narrow one, so that one token wastes little.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.configs import BUCKETS, Config, Target
from vllm_babai.triton_kernels.layout import SLOT, Geometry
from vllm_babai.triton_kernels.overflow import overflow_product, overflow_sum
from vllm_babai.triton_kernels.transpose import transpose
from vllm_babai.triton_kernels.unpack import load_words, matrix_product, round_to, unpack_slot

SMALLEST_DOT = {"cuda": 8, "hip": 16, "interpreter": 8}  # tokens that a matrix instruction takes at least
OVERFLOW_FEATURES = 1 << 14  # that a program's overflow part gathers ahead, at most
SUM_ELEMENTS = 4096  # partial sums that are loaded at a time, at most


@triton.jit(do_not_specialize=["m", "column_blocks", "splits", "segments"])
def fused_kernel(
    x_ptr,  # [m, k]
    xt_ptr,  # [k, m tiles · OVERFLOW_TOKENS]
    dense_ptr,
    scales_ptr,
    entries_ptr,
    diagonal_ptr,
    starts_ptr,
    counters_ptr,
    partials_ptr,  # fp32 [m tiles, row blocks, shares, BM, ROWS]
    y_ptr,  # [m, n]
    m,
    n,
    k,
    padded_rows,
    column_blocks,
    group_size,
    splits,
    segments,
    BITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    FLUSH: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    ONE_TILE: tl.constexpr,
    STORED_M: tl.constexpr,
    SHARES_STEP: tl.constexpr,
    OVERFLOW_TOKENS: tl.constexpr,
    OVERFLOW_STEP: tl.constexpr,
    OVERFLOW_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    STAGES: tl.constexpr,
    BACKEND: tl.constexpr,
):
    row_blocks = padded_rows // ROWS
    shares = segments + splits
    tile = tl.program_id(0) // shares  # all shares of a tile are neighbours, so that overflow and dense part overlap
    share = tl.program_id(0) % shares
    if ONE_TILE:
        row_block, first_token = tile, 0
    else:
        row_block, first_token = tile % row_blocks, tile // row_blocks * BM
    rows = row_block * ROWS + tl.arange(0, ROWS)
    slot, present = tile * shares + share, m - first_token
    if share >= segments:
        per_split = tl.cdiv(column_blocks, splits)
        first_block = (share - segments) * per_split
        last_block = tl.minimum(first_block + per_split, column_blocks)
        dense = _dense_sum(
            x_ptr, dense_ptr, scales_ptr, rows, first_token, first_block, last_block, m, k, padded_rows, column_blocks,
            group_size, BITS, BLOCK_COLUMNS, FLUSH, EVEN_K, ROWS, BM, STAGES, BACKEND,
        )  # fmt: skip
        _store_partial(partials_ptr, slot, dense, present, BM)
    elif STORED_M == 1:
        overflow = overflow_sum(
            x_ptr, scales_ptr, entries_ptr, starts_ptr, share, rows, padded_rows, group_size, FLUSH > 0, OVERFLOW_STEP
        )
        _store_partial(partials_ptr, slot, overflow, present, BM)
    else:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()  # for x to be transposed
        overflow = overflow_product(
            xt_ptr, diagonal_ptr, scales_ptr, entries_ptr, starts_ptr, share, row_block * ROWS, first_token,
            tl.cdiv(m, BM) * OVERFLOW_TOKENS, padded_rows, group_size, FLUSH > 0, ROWS, OVERFLOW_TOKENS, OVERFLOW_STEP,
            OVERFLOW_STAGES, BACKEND,
        )  # fmt: skip
        _store_partial(partials_ptr, slot, overflow, present, BM)

    tl.debug_barrier()  # all of this program's stores come before its arrival
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
    if arrived == shares - 1:
        _sum_shares(
            partials_ptr, y_ptr, tile * shares, rows, first_token, m, n, shares, ROWS, BM, STORED_M, SHARES_STEP,
            BACKEND,
        )  # fmt: skip
        tl.store(counters_ptr + tile, 0)


@triton.jit
def _sum_shares(
    partials_ptr, y_ptr, first_slot, rows, first_token, m, n, shares, ROWS: tl.constexpr, BM: tl.constexpr,
    STORED_M: tl.constexpr, SHARES_STEP: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """Add up a tile's partial sums, several at once for the sake of latency, and write the output."""
    tokens = tl.arange(0, STORED_M)
    inside = (first_token + tokens < m)[:, None] & (rows < n)[None, :]
    total = tl.zeros((STORED_M, ROWS), tl.float32)
    for first in range(0, shares, SHARES_STEP):
        share = first + tl.arange(0, SHARES_STEP)
        offsets = ((first_slot + share)[:, None] * BM + tokens[None, :]) * ROWS
        ptrs = partials_ptr + offsets[:, :, None] + tl.arange(0, ROWS)[None, None, :]
        mask = (share < shares)[:, None, None] & inside[None, :, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    y_ptrs = y_ptr + (first_token + tokens).to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(y_ptrs, round_to(total, y_ptr.dtype.element_ty, BACKEND), mask=inside)


@triton.jit
def _dense_sum(
    x_ptr, dense_ptr, scales_ptr, rows, first_token, first_block, last_block, m, k, padded_rows, column_blocks,
    group_size, BITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, FLUSH: tl.constexpr, EVEN_K: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """The sum over some column blocks, scaled, fp32 [ROWS, BM]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = BLOCK_COLUMNS * BITS // 512
    TILE_WORDS: tl.constexpr = 64 * 16
    tokens = first_token + tl.arange(0, BM)[None, :]
    features = tl.arange(0, 32)[:, None]
    x_ptrs = x_ptr + tokens * k + features
    word_ptrs = (
        dense_ptr
        + (rows // 64 * column_blocks * (WORDS * TILE_WORDS) + rows % 64 * 16)[:, None]
        + tl.arange(0, 16)[None, :]
    )
    total = tl.zeros((ROWS, BM), tl.float32)
    group_total = tl.zeros((ROWS, BM), tl.float32)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        words = load_words(word_ptrs + block * (WORDS * TILE_WORDS), WORDS, TILE_WORDS)
        for slot in tl.static_range(BLOCK_COLUMNS // 32):
            column = block * BLOCK_COLUMNS + slot * 32
            inside = tokens < m
            if not EVEN_K:
                inside = inside & (column + features < k)
            x = tl.load(x_ptrs + column, mask=inside, other=0.0, cache_modifier=".ca")
            weight = unpack_slot(words, slot, BITS, DTYPE, BACKEND)
            if FLUSH == 0:
                total = matrix_product(weight, x, total, BACKEND)
            else:
                group_total = matrix_product(weight, x, group_total, BACKEND)
                if (slot + 1) % FLUSH == 0:
                    group = tl.minimum(column, k - 1) // group_size  # padding has no group of its own
                    scale = tl.load(scales_ptr + group * padded_rows + rows).to(tl.float32)
                    total += group_total * scale[:, None]
                    group_total = tl.zeros((ROWS, BM), tl.float32)
    if FLUSH == 0:
        total = total * tl.load(scales_ptr + rows).to(tl.float32)[:, None]
    return total


@triton.jit
def _store_partial(partials_ptr, slot, total, present, BM: tl.constexpr):
    """Store sums [rows, tokens] as a partial [BM, rows]; tokens from `present` on do not exist."""
    tokens = tl.arange(0, total.shape[1])[None, :]
    ptrs = partials_ptr + (slot * BM + tokens) * total.shape[0] + tl.arange(0, total.shape[0])[:, None]
    tl.store(ptrs, total, mask=tokens < present)


def fused_constants(geometry: Geometry, config: Config, groups: int, tokens: int, target: Target) -> dict[str, Any]:
    """Compile-time constants of `fused_kernel` for a bucket of `tokens` tokens."""
    block = geometry.block_columns
    group_size = geometry.in_features // groups
    gathered = max(tokens, 16)  # of tokens, by the overflow part: what a matrix instruction takes
    step = 16 if tokens == 1 else min(4, OVERFLOW_FEATURES // (config.rows * gathered))
    return {
        "BITS": geometry.bits,
        "BLOCK_COLUMNS": block,
        "FLUSH": 0 if groups == 1 else math.gcd(group_size, block) // SLOT,
        "EVEN_K": geometry.in_features % block == 0,
        "ROWS": config.rows,
        "BM": max(tokens, SMALLEST_DOT[target.backend]),
        "ONE_TILE": tokens < BUCKETS[-1],  # of tokens
        "STORED_M": tokens,
        "SHARES_STEP": max(1, min(32, SUM_ELEMENTS // (config.rows * tokens))),
        "OVERFLOW_TOKENS": gathered,
        "OVERFLOW_STEP": step,
        "OVERFLOW_STAGES": min(config.stages, 1 + OVERFLOW_FEATURES // (config.rows * gathered * step)),
        "DEPENDENT": tokens > 1 and target.overlaps_launches,
        "STAGES": config.stages,
        "BACKEND": target.backend,
    }


def multiply_fused(
    x: Tensor, layout: DeviceLayout, geometry: Geometry, config: Config, tokens: int, target: Target
) -> Tensor:
    """x [m, in_features] bf16 or fp16 → y [m, out_features] in x's dtype.

    tokens: the bucket, m or more, or what one tile of tokens holds where m is larger. Deterministic.
    """
    m = x.shape[0]
    groups = layout.scales.shape[0]
    constants = fused_constants(geometry, config, groups, tokens, target)
    m_tiles = -(-m // constants["BM"])
    tiles = geometry.padded_rows // config.rows * m_tiles
    segments = geometry.segments if layout.entries.numel() else 0
    splits = 1 if m_tiles > 1 else _splits(geometry, tiles, config, target)
    y = x.new_empty(m, geometry.out_features)
    shares = segments + splits
    partials = torch.empty(tiles * shares * constants["BM"] * config.rows, dtype=torch.float32, device=x.device)
    gathered, options = x, {}
    if segments and tokens > 1:
        # with several scales a row in bf16: fp16 has no room for small scales times large integers
        gathered = transpose(x, constants["OVERFLOW_TOKENS"], x.dtype if groups == 1 else torch.bfloat16, target)
        options = {"launch_pdl": True} if constants["DEPENDENT"] else {}
    fused_kernel[(tiles * shares,)](
        x,
        gathered,
        layout.dense,
        layout.scales,
        layout.entries,
        layout.offsets[geometry.diagonal :],
        layout.offsets[geometry.starts :],
        layout.offsets,
        partials,
        y,
        m,
        geometry.out_features,
        geometry.in_features,
        geometry.padded_rows,
        geometry.column_blocks,
        geometry.in_features // groups,
        splits,
        segments,
        **constants,
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
