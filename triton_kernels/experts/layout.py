"""The device layout of one linear of each of several experts: that of a single tall linear.

Their rows, padded as those of every linear, stand one expert below the other: row r of expert e is row e · padded + r.
So every kernel that takes rows of a linear takes them of experts, too. See `triton_kernels.layout`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.layout import DIAGONAL, MAX_M_TILES, SMALLEST_ROWS

MOST_WORDS = (1 << 31) - 1  # of the dense part: kernels count them in 32 bits


def experts_layout(layouts: Sequence[DeviceLayout]) -> DeviceLayout:
    """The layouts of linears of one size and width, one an expert, as that of a tall linear.

    Raises ValueError for more words than kernels can count.
    """
    words = sum(layout.dense.numel() for layout in layouts)
    if words > MOST_WORDS:
        raise ValueError(
            f"{len(layouts)} experts take {words} words of 32 bits, and the kernels count {MOST_WORDS} at most: share"
            " the experts among more GPUs, with --enable-expert-parallel or a larger --tensor-parallel-size"
        )
    entries, offsets = _overflow(layouts)
    dense = torch.cat([layout.dense for layout in layouts])
    return DeviceLayout(dense, torch.cat([layout.scales for layout in layouts], 1), entries, offsets)


def _overflow(layouts: Sequence[DeviceLayout]) -> tuple[Tensor, Tensor]:
    """Entries of all experts by panel, expert, row and column, and the offsets of the tall linear."""
    rows = layouts[0].scales.shape[1]
    head = _counters(rows) + DIAGONAL**2
    starts = [layout.offsets[head:].long() for layout in layouts]
    bounds = [own[::rows].tolist() for own in starts]  # of the panels
    widest = torch.int32 if any(layout.entries.dtype == torch.int32 for layout in layouts) else torch.int16
    entries = [
        layout.entries[own[panel] : own[panel + 1]].to(widest)
        for panel in range(len(bounds[0]) - 1)
        for layout, own in zip(layouts, bounds, strict=True)
    ]
    counts = torch.stack([own.diff().view(-1, rows) for own in starts], 1).flatten()  # by panel, expert, row
    ends = counts.cumsum(0).int()
    counters = ends.new_zeros(_counters(rows * len(layouts)))
    diagonal = layouts[0].offsets[_counters(rows) : head]
    return torch.cat(entries), torch.cat([counters, diagonal, ends.new_zeros(1), ends])


def _counters(rows: int) -> int:
    """Arrival counters in the offsets of a linear, see `layout.Geometry.counters`."""
    return rows // SMALLEST_ROWS * MAX_M_TILES
