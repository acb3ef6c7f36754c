"""y = x Wᵀ for few tokens, straight from the packed weights: dense and overflow part in one launch.

A program is one share of an output tile [ROWS, BM]: either a run of column blocks of the dense part, or one segment of
the overflow. Every share is written to a buffer of partial sums, and the program that arrives last at a tile's counter
adds them up in a fixed order: one launch, no output to clear, no float atomics, the same result every time.
Weights are the wide operand of the matrix product and tokens the narrow one, so that one token wastes little.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.layout import DeviceLayout
from vllm_babai.triton_kernels.configs import BUCKETS, Config, Target
from vllm_babai.triton_kernels.layout import SLOT, Geometry
from vllm_babai.triton_kernels.unpack import load_words, matrix_product, round_to, unpack_slot

SMALLEST_DOT = {"cuda": 8, "hip": 16, "interpreter": 8}  # tokens that a matrix instruction takes at least
OVERFLOW_PRODUCTS = 1024  # that a warp computes of the overflow part at a time, at most
SUM_ELEMENTS = 4096  # partial sums that are loaded at a time, at most


@triton.jit(do_not_specialize=["m", "column_blocks", "splits", "segments"])
def fused_kernel(
    x_ptr,  # [m, k]
    xt_ptr,  # [k, m tiles · BM], x itself when there is one token
    dense_ptr,
    scales_ptr,
    entries_ptr,
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
    OVERFLOW_M: tl.constexpr,
    OVERFLOW_STEP: tl.constexpr,
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
    if share < segments:
        _overflow_share(
            xt_ptr, scales_ptr, entries_ptr, starts_ptr, partials_ptr, tile * shares + share, share, rows,
            first_token, m, 1 if STORED_M == 1 else tl.cdiv(m, BM) * BM, padded_rows, group_size, FLUSH, ROWS, BM,
            OVERFLOW_M, OVERFLOW_STEP,
        )  # fmt: skip
    else:
        per_split = tl.cdiv(column_blocks, splits)
        first_block = (share - segments) * per_split
        last_block = tl.minimum(first_block + per_split, column_blocks)
        _dense_share(
            x_ptr, dense_ptr, scales_ptr, partials_ptr, tile * shares + share, rows, first_token, first_block,
            last_block, m, k, padded_rows, column_blocks, group_size, BITS, BLOCK_COLUMNS, FLUSH, EVEN_K, ROWS, BM,
            STAGES, BACKEND,
        )  # fmt: skip

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
def _dense_share(
    x_ptr, dense_ptr, scales_ptr, partials_ptr, slot_index, rows, first_token, first_block, last_block, m, k,
    padded_rows, column_blocks, group_size, BITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, FLUSH: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """Write the sum over some column blocks, scaled, to a partial [BM, ROWS]."""
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
            x = tl.load(x_ptrs + column, mask=inside, other=0.0, eviction_policy="evict_last")
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
    _store_partial(partials_ptr, slot_index, total, tl.arange(0, BM), m - first_token, ROWS, BM)


@triton.jit
def _overflow_share(
    xt_ptr, scales_ptr, entries_ptr, starts_ptr, partials_ptr, slot_index, segment, rows, first_token, m, token_stride,
    padded_rows, group_size, FLUSH: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, OVERFLOW_M: tl.constexpr,
    OVERFLOW_STEP: tl.constexpr,
):  # fmt: skip
    """Write the sum over the overflow entries of one segment, scaled, to a partial [BM, ROWS]."""
    start = tl.load(starts_ptr + segment * padded_rows + rows)
    end = tl.load(starts_ptr + segment * padded_rows + rows + 1)
    longest = tl.max(end - start, 0)
    end = end[:, None]
    first_index = start[:, None] + tl.arange(0, OVERFLOW_STEP)[None, :]
    for chunk in range(0, tl.minimum(BM, m - first_token), OVERFLOW_M):
        tokens = first_token + chunk + tl.arange(0, OVERFLOW_M)
        if OVERFLOW_M == 1:
            products = tl.zeros((ROWS, OVERFLOW_STEP), tl.float32)
        else:
            products = tl.zeros((ROWS, OVERFLOW_STEP, OVERFLOW_M), tl.float32)
        for step in range(0, longest, OVERFLOW_STEP):
            index = first_index + step
            inside = index < end
            entry = tl.load(entries_ptr + index, mask=inside, other=0).to(tl.int32)
            column = segment * 2048 + (entry & 2047)
            excess = (entry >> 11).to(tl.float32)
            if FLUSH > 0:
                scale_ptrs = scales_ptr + column // group_size * padded_rows + rows[:, None]
                excess = excess * tl.load(scale_ptrs, mask=inside, other=0.0).to(tl.float32)
            if OVERFLOW_M == 1:
                x = tl.load(xt_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last")
                products += excess * x.to(tl.float32)
            else:
                x_ptrs = xt_ptr + (column * token_stride)[:, :, None] + tokens[None, None, :]
                x = tl.load(x_ptrs, mask=inside[:, :, None], other=0.0, eviction_policy="evict_last")
                products += excess[:, :, None] * x.to(tl.float32)
        total = tl.sum(products, 1).reshape(ROWS, OVERFLOW_M)
        if FLUSH == 0:
            total = total * tl.load(scales_ptr + rows).to(tl.float32)[:, None]
        _store_partial(partials_ptr, slot_index, total, tokens - first_token, m - first_token, ROWS, BM)


@triton.jit
def _store_partial(partials_ptr, slot_index, total, tokens, present, ROWS: tl.constexpr, BM: tl.constexpr):
    """Store some tokens' columns of a partial [BM, ROWS]; tokens from `present` on do not exist."""
    ptrs = partials_ptr + (slot_index * BM + tokens)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(ptrs, total, mask=(tokens < present)[None, :])


def fused_constants(geometry: Geometry, config: Config, groups: int, tokens: int, backend: str) -> dict[str, Any]:
    """Compile-time constants of `fused_kernel` for a bucket of `tokens` tokens."""
    block = geometry.block_columns
    group_size = geometry.in_features // groups
    block_m = max(tokens, SMALLEST_DOT[backend])
    products = OVERFLOW_PRODUCTS * config.warps // config.rows  # of a row, at a time
    overflow_m = min(tokens, products)
    return {
        "BITS": geometry.bits,
        "BLOCK_COLUMNS": block,
        "FLUSH": 0 if groups == 1 else math.gcd(group_size, block) // SLOT,
        "EVEN_K": geometry.in_features % block == 0,
        "ROWS": config.rows,
        "BM": block_m,
        "ONE_TILE": tokens < BUCKETS[-1],  # of tokens
        "STORED_M": tokens,
        "SHARES_STEP": max(1, min(32, SUM_ELEMENTS // (config.rows * tokens))),
        "OVERFLOW_M": overflow_m,
        "OVERFLOW_STEP": min(16, products // overflow_m),
        "STAGES": config.stages,
        "BACKEND": backend,
    }


def multiply_fused(
    x: Tensor, layout: DeviceLayout, geometry: Geometry, config: Config, tokens: int, target: Target
) -> Tensor:
    """x [m, in_features] bf16 or fp16 → y [m, out_features] in x's dtype.

    tokens: the bucket, m or more, or what one tile of tokens holds where m is larger. Deterministic.
    """
    m = x.shape[0]
    groups = layout.scales.shape[0]
    constants = fused_constants(geometry, config, groups, tokens, target.backend)
    m_tiles = -(-m // constants["BM"])
    tiles = geometry.padded_rows // config.rows * m_tiles
    segments = geometry.segments if layout.entries.numel() else 0
    splits = 1 if m_tiles > 1 else _splits(geometry, tiles, config, target)
    y = x.new_empty(m, geometry.out_features)
    shares = segments + splits
    partials = torch.empty(tiles * shares * constants["BM"] * config.rows, dtype=torch.float32, device=x.device)
    fused_kernel[(tiles * shares,)](
        x,
        _token_minor(x, tokens, m_tiles * constants["BM"]) if segments else x,
        layout.dense,
        layout.scales,
        layout.entries,
        layout.offsets[geometry.counters :],
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
    )
    return y


def _splits(geometry: Geometry, tiles: int, config: Config, target: Target) -> int:
    """Runs that the column blocks are cut into, so that the GPU is filled once, with none of them empty."""
    wanted = max(1, min(geometry.column_blocks, round(config.programs_per_sm * target.processors / tiles)))
    per_split = -(-geometry.column_blocks // wanted)
    return -(-geometry.column_blocks // per_split)


def _token_minor(x: Tensor, tokens: int, columns: int) -> Tensor:
    """x transposed to [in_features, columns], for the overflow part gathers features; the last columns are not set."""
    if tokens == 1:
        return x
    transposed = x.new_empty(x.shape[1], columns)
    transposed[:, : x.shape[0]] = x.t()
    return transposed
