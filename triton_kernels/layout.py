"""The device layout: what the kernels read, made once at load from the hardware-neutral checkpoint.

dense: int32 [row tiles, column blocks, words, TILE_ROWS, PAIRS]. A column block is cut into slots of 32 consecutive
    input features; pair c of a slot (features 2c and 2c + 1) sits in the same bit field of the low and of the high
    half of word c, so that one logic operation yields two 16-bit floats side by side. Field f of a half-word is slot
    f. Odd widths: 16 // bits slots in each of as many words as a weight has bits, whose spare bits 15 and 31 together
    are the last slot, so that a weight takes 3.0 or 5.0 bits exactly. Fields hold z + 2^(bits − 1).
scales: bf16 [groups, padded out_features], so that neighbouring rows lie side by side.
entries: int16 or int32 [entries], sorted by panel (2048 columns), row and column: bits 0…10 are the column in its
    panel, the rest the excess. What five bits of excess cannot say is spread over several entries of the same column;
    whichever of the two widths takes fewer bytes is used.
offsets: int32 [counters + 16 · 16 + panels · padded out_features + 1]: first the arrival counters of the fused kernel,
    zero between launches, then a diagonal of −1 that it masks with, then where every row of every panel starts in
    `entries`.

Rows are padded to a multiple of ROW_ALIGNMENT with scale 0, columns to whole column blocks with z = 0.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from vllm_babai.format import FormatError, Overflow, integer_range, unpack
from vllm_babai.ops.layout import DeviceLayout

TILE_ROWS = 64  # of the dense part
PAIRS = 16  # of input features, in a slot
SLOT = 2 * PAIRS
HALF_WORD = 16  # bits
ROW_ALIGNMENT = 128
PANEL_BITS = 11  # of an overflow entry that say its column
PANEL = 1 << PANEL_BITS  # columns of the overflow that are sorted, and multiplied, together
DIAGONAL = 16  # rows of the mask in `offsets`: of a matrix instruction
SMALLEST_ROWS = 32  # of an output tile of the fused kernel
MAX_M_TILES = 8

_WORDS = {2: 1, 3: 3, 4: 1, 5: 5, 8: 1}  # by bits: int32 words that hold one pair of every slot of a column block
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer's device layout. Raises ValueError for a bit width that has no kernel."""

    bits: int
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        if self.bits not in _WORDS:
            raise ValueError(f"bits is {self.bits}; there are kernels for {tuple(_WORDS)}")

    @cached_property
    def words(self) -> int:
        """int32 words that hold one pair of every slot of a column block."""
        return _WORDS[self.bits]

    @cached_property
    def slots(self) -> int:
        """Runs of 32 input features in a column block."""
        return self.words * HALF_WORD // self.bits

    @cached_property
    def block_columns(self) -> int:
        """Input features of a column block."""
        return self.slots * SLOT

    @cached_property
    def column_blocks(self) -> int:
        """Column blocks that cover all input features."""
        return -(-self.in_features // self.block_columns)

    @cached_property
    def padded_rows(self) -> int:
        """Output features including padding."""
        return -(-self.out_features // ROW_ALIGNMENT) * ROW_ALIGNMENT

    @cached_property
    def panels(self) -> int:
        """Panels of columns that cover the overflow."""
        return -(-self.in_features // PANEL)

    @cached_property
    def counters(self) -> int:
        """Arrival counters: one for every output tile, were all of them as small as can be."""
        return self.padded_rows // SMALLEST_ROWS * MAX_M_TILES

    @cached_property
    def diagonal(self) -> int:
        """Where the mask of a diagonal begins in `offsets`."""
        return self.counters

    @cached_property
    def starts(self) -> int:
        """Where the starts of rows begin in `offsets`."""
        return self.diagonal + DIAGONAL**2

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of `dense`, of `scales` without its groups, and of `offsets`."""
        dense = (self.padded_rows // TILE_ROWS, self.column_blocks, self.words, TILE_ROWS, PAIRS)
        return dense, (self.padded_rows,), (self.starts + self.panels * self.padded_rows + 1,)


@cache
def geometry_of(bits: int, in_features: int, out_features: int) -> Geometry:
    """The geometry of a layer, kept with what it computes: a product would take longer to find that than to launch."""
    return Geometry(bits, in_features, out_features)


def device_layout(
    qweight: Tensor,
    scales: Tensor,
    overflow: Overflow,
    bits: int,
    in_features: int,
    device: torch.device | str,
) -> DeviceLayout:
    """Repack one linear layer for the kernels.

    qweight: uint8 [out_features, packed_bytes(in_features, bits)]. scales: bf16 [out_features, groups]. overflow: its
    excess over the dense range. Raises FormatError when qweight does not fit, ValueError when scales or groups do not.
    """
    out_features = qweight.shape[0]
    geometry = Geometry(bits, in_features, out_features)
    _check_scales(scales, geometry)
    tiles = [pack_rows(unpack(rows.to(device), bits, in_features), geometry) for rows in qweight.split(ROWS_AT_A_TIME)]
    scales = torch.nn.functional.pad(scales.to(device).t(), (0, geometry.padded_rows - out_features))
    entries, offsets = pack_overflow(overflow, geometry)
    return DeviceLayout(torch.cat(tiles), scales.contiguous(), entries.to(device), offsets.to(device))


def _check_scales(scales: Tensor, geometry: Geometry) -> None:
    rows, groups = scales.shape
    if rows != geometry.out_features or scales.dtype != torch.bfloat16:
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, not bfloat16 [{geometry.out_features}, …]")
    if geometry.in_features % groups or (groups > 1 and geometry.in_features // groups % SLOT):
        raise ValueError(
            f"{groups} scales per row cut {geometry.in_features} input features into groups that are not a multiple of"
            f" {SLOT}; the kernels need one scale per row or groups of 32, 64, 128 …"
        )


def pack_rows(integers: Tensor, geometry: Geometry) -> Tensor:
    """Integers int16 [rows, in_features] → int32 [row tiles, column blocks, words, TILE_ROWS, PAIRS]."""
    rows, columns = integers.shape
    padding = (0, geometry.column_blocks * geometry.block_columns - columns, 0, -rows % ROW_ALIGNMENT)
    fields = torch.nn.functional.pad(integers, padding).int() - integer_range(geometry.bits)[0]
    fields = fields.view(-1, TILE_ROWS, geometry.column_blocks, geometry.slots, PAIRS, 2)
    fields = fields.permute(3, 5, 0, 2, 1, 4)  # slot, half, row tile, column block, row, pair
    fields = fields[:, 0] | fields[:, 1] << 16
    whole = HALF_WORD // geometry.bits  # slots in one word
    words = [_combine(fields[whole * t : whole * (t + 1)], geometry.bits) for t in range(geometry.words)]
    if geometry.slots > whole * geometry.words:
        words = [word | ((fields[-1] >> t) & 0x00010001) << 15 for t, word in enumerate(words)]
    return torch.stack(words, dim=2)


def _combine(fields: Tensor, bits: int) -> Tensor:
    word = fields[0]
    for position in range(1, len(fields)):
        word = word | fields[position] << (bits * position)
    return word


def pack_overflow(overflow: Overflow, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Overflow in coordinate form → entries and offsets of the device layout."""
    row, column, excess = (axis.cpu().long() for axis in (overflow.rows, overflow.columns, overflow.excess))
    if len(row) and (row.max() >= geometry.out_features or column.max() >= geometry.in_features):
        raise FormatError(f"overflow leaves the matrix of {geometry.out_features} × {geometry.in_features} weights")
    order = torch.argsort((column // PANEL * geometry.padded_rows + row) * PANEL + column % PANEL)
    row, column, excess = row[order], column[order], excess[order]

    largest, smallest = 15, -16
    pieces = torch.where(excess > 0, (excess + largest - 1) // largest, (excess + smallest + 1) // smallest)
    dtype = torch.int16 if 2 * int(pieces.sum()) <= 4 * len(excess) else torch.int32
    if dtype == torch.int16:
        owner = torch.repeat_interleave(torch.arange(len(excess)), pieces)
        position = torch.arange(len(owner)) - (torch.cumsum(pieces, 0) - pieces)[owner]
        row, column, excess = row[owner], column[owner], excess[owner]
        excess = torch.where(
            excess > 0,
            (excess - largest * position).clamp(max=largest),
            (excess - smallest * position).clamp(min=smallest),
        )

    entries = (excess << PANEL_BITS | column % PANEL).to(dtype)
    starts = torch.arange(geometry.panels * geometry.padded_rows + 1)
    starts = torch.searchsorted(column // PANEL * geometry.padded_rows + row, starts)
    diagonal = -torch.eye(DIAGONAL, dtype=torch.int32).flatten()
    return entries, torch.cat([torch.zeros(geometry.counters, dtype=torch.int32), diagonal, starts.int()])
