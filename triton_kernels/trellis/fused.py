"""y = x Wᵀ for few tokens, straight from the words of a trellis.

A program is one warp: a share of the tiles of one block of rows, for a tile of tokens. It goes through the block's list
(`layout`), which is sorted by bits, with one loop for each number of bits that decodes and multiplies STEP tiles a
turn. Their words were loaded a turn before, into registers of their own: nothing is moved, and no shared memory is
waited for. Where a block has several shares, each is written to a buffer of partial sums, and the program that arrives
last adds them in a fixed order: no float atomics, the same result every time.
Weights are the wide operand of the matrix product and tokens the narrow one. Lanes of tokens that do not exist read the
last one that does.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS, TILE_ROWS
from vllm_babai.ops.trellis import TrellisTensors
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.tokens import SMALLEST_DOT
from vllm_babai.triton_kernels.trellis.arguments import STEP, UNITS, arguments
from vllm_babai.triton_kernels.trellis.decode import activations, decode_run, fragment, lane_start, load_run
from vllm_babai.triton_kernels.trellis.prepare import prepare
from vllm_babai.triton_kernels.unpack import matrix_product, round_to

SUM_ELEMENTS = 1024  # partial sums that a program loads at a time, at most
# Programs of one warp that a processor holds: 32 on data-centre GPUs, but fewer where they need many registers
# (`registers` in `tests/kernels/gate.json`). A choice: no GPU has timed it.
PROGRAMS_PER_PROCESSOR = {1: 24, 8: 24, 16: 20, 32: 16, 64: 12}
SMALLEST_SHARE = 4  # turns of a loop


class Operands(NamedTuple):
    """Pointers of one call. x: fp16 [m, columns], and factors: fp32 [m], see `prepare`.

    partials: fp32 [token tiles, blocks, shares, TILE_ROWS, stored tokens]. counters: int32 [token tiles, blocks], of
    arrivals, zero. y: [m, n].
    """

    x: Tensor
    factors: Tensor
    partials: Tensor
    counters: Tensor
    y: Tensor


class Tiling(NamedTuple):
    """Compile-time constants of the fused kernel.

    tokens: of a matrix product. stored_tokens: of these that may exist, the bucket. shares_step: partial sums of an
    element that are loaded at a time. low, high: bits that tiles may have. dependent: may start before x is prepared.
    backend: of `Target`.
    """

    tokens: int
    stored_tokens: int
    shares_step: int
    low: int
    high: int
    dependent: bool
    backend: str


@triton.jit(do_not_specialize=["m", "shares"])
def fused_kernel(layer, operands, sizes, m, shares, TILING: tl.constexpr):
    """One share of one block of rows for one tile of tokens; the last to arrive adds the shares up and writes y.

    layer: `Layer`. operands: `Operands`. sizes: `Sizes`. m: tokens. TILING: `Tiling`.
    Grid: [token tiles · blocks · shares].
    """
    ROWS: tl.constexpr = UNITS.value.rows
    PRODUCT_TOKENS: tl.constexpr = TILING.tokens
    TOKENS: tl.constexpr = TILING.stored_tokens
    tile, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    block, first_token = tile % sizes.blocks, tile // sizes.blocks * TOKENS
    if TILING.dependent:
        tl.extra.cuda.gdc_wait()  # for x to be prepared
    total = _share_sum(layer, operands.x, sizes, m, (block, share, shares, first_token), TILING)
    rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, PRODUCT_TOKENS)
    if shares == 1:
        _write(layer, operands, sizes, m, block, first_token + tokens[None, :], total, TILING)
    else:
        offsets = rows[:, None] * TOKENS + tokens[None, :]
        slot = tl.program_id(0) * (ROWS * TOKENS)
        tl.store(operands.partials + slot + offsets, total, mask=tokens[None, :] < TOKENS)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(operands.counters + tile, 1, sem="acq_rel")
        if arrived == shares - 1:
            _sum_shares(layer, operands, sizes, m, (tile, shares, block, first_token), TILING)


@triton.jit
def _share_sum(layer, x_ptr, sizes, m, place, TILING: tl.constexpr):
    """The sum over a share of a block's tiles, without scales, fp32 [ROWS, tokens]; row 8 r + g is row 2 g + r.

    place: block, share, shares, first token.
    """
    ROWS: tl.constexpr = UNITS.value.rows
    LANES: tl.constexpr = UNITS.value.lanes
    RUN: tl.constexpr = UNITS.value.run
    TOKENS: tl.constexpr = TILING.tokens
    LOW: tl.constexpr = TILING.low
    HIGH: tl.constexpr = TILING.high
    block, share, shares, first_token = place
    lane = tl.arange(0, LANES)
    tokens = first_token + tl.arange(0, TOKENS // 8)[:, None] * 8 + (lane >> 2)[None, :]
    x_offsets = tl.minimum(tokens, m - 1) * sizes.columns + ((lane & 3) * RUN)[None, :]
    x_ptrs = x_ptr + x_offsets[:, :, None] + tl.arange(0, RUN // 2)[None, None, :]
    starts = layer.starts + block * UNITS.value.starts
    own = layer.words + tl.load(starts + UNITS.value.starts - 1).to(tl.int64) * ROWS
    begin = tl.load(starts)
    end = tl.load(starts + UNITS.value.starts - 2)
    turns = tl.cdiv(tl.cdiv(end - begin, UNITS.value.step), shares)
    share_begin = tl.minimum(begin + share * turns * UNITS.value.step, end)
    share_end = tl.minimum(share_begin + turns * UNITS.value.step, end)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for BITS in tl.static_range(LOW, HIGH + 1):
        first = tl.maximum(share_begin, tl.load(starts + BITS - UNITS.value.fewest_bits))
        last = tl.minimum(share_end, tl.load(starts + BITS - UNITS.value.fewest_bits + 1))
        if first < last:
            total = _run_sum(layer.tiles, own, x_ptrs, (first, last), total, BITS, TILING.backend)
    return total


@triton.jit
def _run_sum(tiles_ptr, own, x_ptrs, run, total, BITS: tl.constexpr, BACKEND: tl.constexpr):
    """total and the products of the tiles from entry run[0] to before run[1], which all have BITS bits a pair."""
    STEP: tl.constexpr = UNITS.value.step
    lane_words = lane_start(BITS)
    entries, words = (), ()
    for i in tl.static_range(STEP):
        entries += (tl.load(tiles_ptr + run[0] + i),)  # type: ignore[assignment]
        words += (load_run(own, entries[i], lane_words, BITS),)  # type: ignore[assignment]
    for turn in tl.range(run[0], run[1], STEP, num_stages=1):
        after = tl.minimum(turn + STEP, run[1] - STEP)  # the last turn loads its own again
        next_entries, next_words = (), ()
        for i in tl.static_range(STEP):
            x = activations(x_ptrs + (entries[i] >> UNITS.value.line_bits) * UNITS.value.columns)
            next_entries += (tl.load(tiles_ptr + after + i),)  # type: ignore[assignment]
            weight = fragment(decode_run(words[i], BITS))
            next_words += (load_run(own, next_entries[i], lane_words, BITS),)  # type: ignore[assignment]
            total = matrix_product(weight, x, total, BACKEND)
        entries, words = next_entries, next_words
    return total


@triton.jit
def _sum_shares(layer, operands, sizes, m, place, TILING: tl.constexpr):
    """Add up the partial sums of a tile, several at once for the sake of latency. place: tile, shares, block, token."""
    ROWS: tl.constexpr = UNITS.value.rows
    TOKENS: tl.constexpr = TILING.stored_tokens
    STEP: tl.constexpr = TILING.shares_step
    tile, shares, block, first_token = place
    tokens = tl.arange(0, TOKENS)[None, :]
    offsets = tl.arange(0, ROWS)[:, None] * TOKENS + tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, shares, STEP):
        share = first + tl.arange(0, STEP)[:, None, None]
        ptrs = operands.partials + (tile * shares + share) * (ROWS * TOKENS) + offsets[None, :, :]
        total += tl.sum(tl.load(ptrs, mask=share < shares, other=0.0, cache_modifier=".cg"), 0)
    _write(layer, operands, sizes, m, block, first_token + tokens, total, TILING)


@triton.jit
def _write(layer, operands, sizes, m, block, tokens, total, TILING: tl.constexpr):
    """Scale sums [ROWS, …] of tokens [1, …] and store them where their rows belong in y."""
    ROWS: tl.constexpr = UNITS.value.rows
    rows = tl.arange(0, ROWS)
    own_rows = block * ROWS + (rows & 7) * 2 + (rows >> 3)  # of the product's rows
    place = tl.load(layer.places + own_rows)
    scale = tl.load(layer.scales + own_rows)
    inside = tokens < m
    factor = tl.load(operands.factors + tokens, mask=inside, other=0.0)
    value = round_to(total * scale[:, None] * factor, operands.y.dtype.element_ty, TILING.backend)
    tl.store(operands.y + tokens.to(tl.int64) * sizes.n + place[:, None], value, mask=inside & (place >= 0)[:, None])


def fused_tiling(tokens: int, target: Target) -> Tiling:
    """Compile-time constants of `fused_kernel` for a bucket of `tokens` tokens."""
    return Tiling(
        tokens=max(tokens, SMALLEST_DOT[target.backend]),
        stored_tokens=tokens,
        shares_step=max(1, min(32, SUM_ELEMENTS // (TILE_ROWS * tokens))),
        low=FEWEST_BITS,
        high=MOST_BITS,
        dependent=target.overlaps_launches,
        backend=target.backend,
    )


def multiply_fused(x: Tensor, trellis: TrellisTensors, tokens: int, target: Target) -> Tensor:
    """x [m, in_features] bf16 or fp16 → y [m, out_features] in x's dtype.

    tokens: the bucket, m or more, or what one tile of tokens holds where m is larger. Deterministic.
    """
    m, in_features = x.shape
    layer, sizes = arguments(trellis, in_features)
    tiling = fused_tiling(tokens, target)
    tiles = -(-m // tokens) * sizes.blocks
    shares = _shares(tiles, len(trellis.tiles) // sizes.blocks // STEP, tokens, target)
    prepared = prepare(x, sizes, tiles, target)
    y = x.new_empty(m, sizes.n)
    partials = x.new_empty(tiles * shares * TILE_ROWS * tokens if shares > 1 else 0, dtype=torch.float32)
    options = {"launch_pdl": True} if tiling.dependent else {}
    fused_kernel[(tiles * shares,)](
        layer,
        Operands(prepared.x, prepared.factors, partials, prepared.counters, y),
        sizes,
        m,
        shares,
        TILING=tiling,
        num_warps=1,
        enable_fp_fusion=True,
        **options,
    )
    return y


def _shares(tiles: int, turns: int, tokens: int, target: Target) -> int:
    """Shares of a block, so that the GPU is filled once. turns: of the loops, that a block of rows takes on average."""
    wanted = round(PROGRAMS_PER_PROCESSOR[tokens] * target.processors / tiles)
    return max(1, min(wanted, turns // SMALLEST_SHARE))
