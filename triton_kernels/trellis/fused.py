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
    backend: of `Target`. biased: an expert's bias is added, see `experts.trellis`.
    """

    tokens: int
    stored_tokens: int
    shares_step: int
    low: int
    high: int
    dependent: bool
    backend: str
    biased: bool = False


@triton.jit(do_not_specialize=["m", "shares"])
def fused_kernel(layer, operands, sizes, m, shares, TILING: tl.constexpr):
    """One share of one block of rows for one tile of tokens; the last to arrive adds the shares up and writes y.

    layer: `Layer`. operands: `Operands`. sizes: `Sizes`. m: tokens. TILING: `Tiling`.
    Grid: [token tiles · blocks · shares].
    """
    TOKENS: tl.constexpr = TILING.tokens
    STORED: tl.constexpr = TILING.stored_tokens
    tile, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    block, first_token = tile % sizes.blocks, tile // sizes.blocks * STORED
    if TILING.dependent:
        tl.extra.cuda.gdc_wait()  # for x to be prepared
    x_rows = tl.minimum(first_token + lane_tokens(TOKENS), m - 1)
    total = share_sum(layer, operands.x, x_rows, sizes, (block, share, shares), TILING)
    tokens = first_token + tl.arange(0, TOKENS)
    stored = first_token + tl.arange(0, STORED)
    outputs = ((tokens, tokens, tokens < m), (stored, stored, stored < m))
    finish_block(layer, operands, sizes, (tile, shares, block, 0), outputs, total, TILING)


@triton.jit
def lane_tokens(TOKENS: tl.constexpr):
    """Which tokens of a matrix product each lane holds, [TOKENS / 8, lanes]."""
    lane = tl.arange(0, UNITS.value.lanes)
    return tl.arange(0, TOKENS // 8)[:, None] * 8 + (lane >> 2)[None, :]


@triton.jit
def share_sum(layer, x_ptr, x_rows, sizes, place, TILING: tl.constexpr):
    """The sum over a share of a block's tiles, without scales, fp32 [ROWS, tokens]; row 8 r + g is row 2 g + r.

    x_rows: of the tokens that `lane_tokens` says. place: block, share, shares.
    """
    ROWS: tl.constexpr = UNITS.value.rows
    RUN: tl.constexpr = UNITS.value.run
    TOKENS: tl.constexpr = TILING.tokens
    LOW: tl.constexpr = TILING.low
    HIGH: tl.constexpr = TILING.high
    block, share, shares = place
    lane = tl.arange(0, UNITS.value.lanes)
    x_offsets = x_rows * sizes.columns + ((lane & 3) * RUN)[None, :]
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
def finish_block(layer, operands, sizes, place, outputs, total, TILING: tl.constexpr):
    """Write a block of y, or this share of it, of which the last to arrive adds up all.

    place: tile, shares, block, and which row of the layer is the first of y. outputs: of the product's tokens and of
    those that are stored, rows of y, rows of x, and whether there is such a token.
    """
    ROWS: tl.constexpr = UNITS.value.rows
    STORED: tl.constexpr = TILING.stored_tokens
    tile, shares, block, first_row = place
    tokens, stored = outputs
    if shares == 1:
        _write(layer, operands, sizes, (block, first_row), tokens, total, TILING)
    else:
        token = tl.arange(0, TILING.tokens)[None, :]
        offsets = tl.arange(0, ROWS)[:, None] * STORED + token
        slot = tl.program_id(0) * (ROWS * STORED)
        tl.store(operands.partials + slot + offsets, total, mask=token < STORED)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(operands.counters + tile, 1, sem="acq_rel")
        if arrived == shares - 1:
            summed = _sum_shares(operands, tile, shares, TILING)
            _write(layer, operands, sizes, (block, first_row), stored, summed, TILING)


@triton.jit
def _sum_shares(operands, tile, shares, TILING: tl.constexpr):
    """The partial sums of a tile added up, fp32 [ROWS, stored tokens]; several at once for the sake of latency."""
    ROWS: tl.constexpr = UNITS.value.rows
    STORED: tl.constexpr = TILING.stored_tokens
    STEP: tl.constexpr = TILING.shares_step
    offsets = tl.arange(0, ROWS)[:, None] * STORED + tl.arange(0, STORED)[None, :]
    total = tl.zeros((ROWS, STORED), tl.float32)
    for first in range(0, shares, STEP):
        share = first + tl.arange(0, STEP)[:, None, None]
        ptrs = operands.partials + (tile * shares + share) * (ROWS * STORED) + offsets[None, :, :]
        total += tl.sum(tl.load(ptrs, mask=share < shares, other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def _write(layer, operands, sizes, place, tokens, total, TILING: tl.constexpr):
    """Scale sums [ROWS, tokens] and store them where their rows belong in y. place, tokens: see `finish_block`."""
    ROWS: tl.constexpr = UNITS.value.rows
    block, first_row = place
    y_rows, x_rows, inside = tokens
    rows = tl.arange(0, ROWS)
    own_rows = block * ROWS + (rows & 7) * 2 + (rows >> 3)  # of the product's rows
    place = tl.load(layer.places + own_rows)
    scale = tl.load(layer.scales + own_rows)
    factor = tl.load(operands.factors + x_rows, mask=inside, other=0.0)
    value = total * scale[:, None] * factor[None, :]
    if TILING.biased:
        first_bias = operands.bias + first_row // sizes.rows * sizes.n
        bias = tl.load(first_bias + place - first_row, mask=place >= 0, other=0.0)
        value += bias.to(tl.float32)[:, None]
    value = round_to(value, operands.y.dtype.element_ty, TILING.backend)
    y_ptrs = operands.y + y_rows.to(tl.int64)[None, :] * sizes.n + (place - first_row)[:, None]
    tl.store(y_ptrs, value, mask=inside[None, :] & (place >= 0)[:, None])


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
    shares = shares_of_block(tiles, len(trellis.tiles) // sizes.blocks // STEP, tokens, target)
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


def shares_of_block(tiles: int, turns: int, tokens: int, target: Target) -> int:
    """Shares of a block, so that the GPU is filled once. turns: of the loops, that a block of rows takes on average."""
    wanted = round(PROGRAMS_PER_PROCESSOR[tokens] * target.processors / tiles)
    return max(1, min(wanted, turns // SMALLEST_SHARE))
