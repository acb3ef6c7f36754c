"""y = x Wᵀ for many tokens: a trellis is decoded to a workspace, then multiplied by the vendor's library."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS
from vllm_babai.ops.trellis import TrellisTensors
from vllm_babai.triton_kernels.dequantize import WORKSPACE
from vllm_babai.triton_kernels.tokens import multiply_parts
from vllm_babai.triton_kernels.trellis.arguments import STEP, UNITS, arguments
from vllm_babai.triton_kernels.trellis.decode import decode_run, halves, lane_start, load_run
from vllm_babai.triton_kernels.unpack import round_to

ENTRIES = 8 * STEP  # of a block's list, that a program decodes


@triton.jit(do_not_specialize=["first_row", "last_row"])
def decode_kernel(
    layer, weight_ptr, sizes, first_row, last_row, BITS: tl.constexpr, SHARE: tl.constexpr, BACKEND: tl.constexpr
):
    """Decode a share of one block's tiles, of the rows from first_row to before last_row.

    layer, sizes: `Layer`, `Sizes`. weight_ptr: [last_row − first_row, k]. BITS: the fewest and the most that tiles may
    have. SHARE: entries of a program. BACKEND: of `Target`. Grid: [blocks, shares].
    """
    LANES: tl.constexpr = UNITS.value.lanes
    STARTS: tl.constexpr = UNITS.value.starts
    LOW: tl.constexpr = BITS[0]
    HIGH: tl.constexpr = BITS[1]
    block = tl.program_id(0)
    starts = layer.starts + block * STARTS
    share_begin = tl.load(starts) + tl.program_id(1) * SHARE
    share_end = tl.minimum(share_begin + SHARE, tl.load(starts + STARTS - 2))
    lane_row = tl.arange(0, 2 * LANES)  # two rows of a lane
    row = block * UNITS.value.rows + lane_row // 8 * 2 + lane_row % 2
    place = tl.load(layer.places + row)
    scale = tl.load(layer.scales + row)
    inside = (place >= first_row) & (place < last_row)
    if tl.max(inside.to(tl.int32), 0) > 0:
        RUN: tl.constexpr = UNITS.value.run
        columns = (lane_row // 2 % 4 * RUN)[:, None] + tl.arange(0, RUN)[None, :]
        row_ptrs = weight_ptr + (place - first_row).to(tl.int64)[:, None] * sizes.k + columns
        own = layer.words + tl.load(starts + STARTS - 1).to(tl.int64) * UNITS.value.rows
        for bits in tl.static_range(LOW, HIGH + 1):
            first = tl.maximum(share_begin, tl.load(starts + bits - UNITS.value.fewest_bits))
            last = tl.minimum(share_end, tl.load(starts + bits - UNITS.value.fewest_bits + 1))
            lane_words = lane_start(bits)
            for index in tl.range(first, last, num_stages=1):
                entry = tl.load(layer.tiles + index)
                column = (entry >> UNITS.value.line_bits) * UNITS.value.columns
                values = halves(decode_run(load_run(own, entry, lane_words, bits), bits))
                values = values.permute(0, 1, 4, 3, 2, 5).reshape(2 * LANES, RUN).to(tl.float32) * scale[:, None]
                mask = inside[:, None] & (column + columns < sizes.k)
                tl.store(row_ptrs + column, round_to(values, weight_ptr.dtype.element_ty, BACKEND), mask=mask)


def dequantized_parts(
    trellis: TrellisTensors, in_features: int, dtype: torch.dtype, backend: str, multiple: int = 1
) -> Iterator[Tensor]:
    """The weight [out_features, in_features], rounded once to bf16 or exact in fp32, a multiple of `multiple` rows at a
    time: WORKSPACE weights at most, or so many rows. A block whose rows are in two parts is decoded twice.
    """
    layer, sizes = arguments(trellis, in_features)
    step = max(1, WORKSPACE // (sizes.k * multiple)) * multiple
    shares = -(-_longest_list(in_features) // ENTRIES)
    for first in range(0, sizes.n, step):
        last = min(sizes.n, first + step)
        weight = torch.empty(last - first, sizes.k, dtype=dtype, device=trellis.words.device)
        decode_kernel[(sizes.blocks, shares)](
            layer,
            weight,
            sizes,
            first,
            last,
            BITS=(FEWEST_BITS, MOST_BITS),
            SHARE=ENTRIES,
            BACKEND=backend,
            num_warps=1,
        )
        yield weight


def _longest_list(in_features: int) -> int:
    """Entries that a block may have: its tiles, and one for every number of bits."""
    return -(-in_features // UNITS.value.columns) + MOST_BITS - FEWEST_BITS + 1


def dequantize(trellis: TrellisTensors, in_features: int, dtype: torch.dtype, backend: str) -> Tensor:
    """The weight as `dequantized_parts` makes it, whole."""
    return torch.cat(list(dequantized_parts(trellis, in_features, dtype, backend)))


def multiply_dequantized(x: Tensor, trellis: TrellisTensors, backend: str) -> Tensor:
    """See `tokens.multiply_parts`."""
    return multiply_parts(x, trellis.out_features, lambda dtype: dequantized_parts(trellis, x.shape[1], dtype, backend))
