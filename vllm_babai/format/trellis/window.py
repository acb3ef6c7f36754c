"""The part of a trellis that a rank takes, cut out without decoding, and parts of several linears below each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_babai.format.trellis.blob import TrellisWeight
from vllm_babai.format.trellis.code import FEWEST_BITS, TILE_COLUMNS, TILE_ROWS

NO_ROW = -1


@dataclass(frozen=True)
class TrellisWindow:
    """Blocks of TILE_ROWS rows, and what decodes them alone.

    rows: of the window. rates: uint8 [blocks, tiles], bits of a pair. words: uint32 [Σ rates · TILE_ROWS]. before:
    uint32 [blocks, TILE_ROWS], the word before the first tile of every row. places: int32 [blocks, TILE_ROWS], the row
    of the window that stands there, or NO_ROW. scales: float32 [blocks, TILE_ROWS], 0 where there is no row.
    """

    rows: int
    rates: np.ndarray
    words: np.ndarray
    before: np.ndarray
    places: np.ndarray
    scales: np.ndarray


def cut_window(weight: TrellisWeight, rows: slice, columns: slice) -> TrellisWindow:
    """The blocks that hold a window's rows, and its tiles of them; rows of a block that it lacks are NO_ROW.

    Raises ValueError where the columns are not whole tiles.
    """
    if columns.start % TILE_COLUMNS or (columns.stop % TILE_COLUMNS and columns.stop != weight.shape[1]):
        raise ValueError(f"columns {columns.start} to {columns.stop} are not whole tiles of {TILE_COLUMNS}")
    order = weight.order.reshape(-1, TILE_ROWS)
    inside = (order >= rows.start) & (order < min(rows.stop, weight.shape[0]))
    blocks = np.flatnonzero(inside.any(1))
    first, last = columns.start // TILE_COLUMNS, -(-columns.stop // TILE_COLUMNS)
    ends = weight.starts[:-1, None] + np.cumsum(weight.rates.astype(np.int64), 1) * TILE_ROWS
    starts = ends - weight.rates.astype(np.int64) * TILE_ROWS
    pieces = [weight.words[starts[block, first] : ends[block, last - 1]] for block in blocks]
    before = np.zeros((len(blocks), TILE_ROWS), np.uint32)
    if first:
        before[:] = [weight.words[starts[block, first] - TILE_ROWS : starts[block, first]] for block in blocks]
    return TrellisWindow(
        rows.stop - rows.start,
        np.ascontiguousarray(weight.rates[blocks, first:last]),
        np.concatenate(pieces),
        before,
        np.where(inside, order - rows.start, NO_ROW)[blocks].astype(np.int32),
        np.where(inside, weight.scales.reshape(-1, TILE_ROWS), 0)[blocks].astype(np.float32),
    )


def stack_windows(windows: Sequence[TrellisWindow]) -> TrellisWindow:
    """Windows of the same columns below each other."""
    firsts = np.cumsum([0, *(window.rows for window in windows)])
    moved = [
        replace(window, places=np.where(window.places == NO_ROW, NO_ROW, window.places + first).astype(np.int32))
        for window, first in zip(windows, firsts, strict=False)
    ]
    return join_blocks(moved, int(firsts[-1]))


def join_blocks(windows: Sequence[TrellisWindow], rows: int) -> TrellisWindow:
    """The blocks of windows of the same columns, one window after the other, as a window of `rows` rows."""
    rates, words, before, places, scales = (
        np.concatenate([getattr(window, name) for window in windows])
        for name in ("rates", "words", "before", "places", "scales")
    )
    return TrellisWindow(rows, rates, words, before, places, scales)


def with_as_many_blocks(windows: Sequence[TrellisWindow]) -> list[TrellisWindow]:
    """Windows of the same columns, each with as many blocks as the tallest; those added have no row."""
    most = max(len(window.rates) for window in windows)
    return [_with_blocks(window, most) for window in windows]


def _with_blocks(window: TrellisWindow, blocks: int) -> TrellisWindow:
    """The same window with so many blocks, those added without any row."""
    missing, tiles = blocks - len(window.rates), window.rates.shape[1]
    rows, none = (missing, TILE_ROWS), (0, 0)
    return replace(
        window,
        rates=np.pad(window.rates, ((0, missing), none), constant_values=FEWEST_BITS),
        words=np.pad(window.words, (0, missing * tiles * FEWEST_BITS * TILE_ROWS)),
        before=np.concatenate([window.before, np.zeros(rows, np.uint32)]),
        places=np.concatenate([window.places, np.full(rows, NO_ROW, np.int32)]),
        scales=np.concatenate([window.scales, np.zeros(rows, np.float32)]),
    )
