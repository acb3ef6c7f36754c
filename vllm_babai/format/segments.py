"""The streams of a blob as many short segments that decode on their own, without coding anything anew.

Each stream is decoded once, and what the decoder has in front of some rows is noted: its position and its states. From
there decoding can start as well as at the head of the tile, so that thousands of warps of a GPU find work in tiles that
are large for the sake of the disk. It takes 0.08 bit per weight of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from vllm_babai.format.errors import FormatError
from vllm_babai.format.hptq import MAX_LANES, Coded
from vllm_babai.format.parallel import parallel_map
from vllm_babai.format.tables import TOTAL, decoder_table

SEGMENT_WEIGHTS = 1 << 14  # about: a segment is whole rows of a tile
BEGIN, ROW, CLASSES = 0, 1, 5  # what moves in a table when segments are put behind others


@dataclass(frozen=True)
class Segments:
    """A coded matrix, or a window of one.

    words: uint16 [words], the streams of all segments. states: uint32 [segments, MAX_LANES], of the decoder where they
    begin. row_class: int32 [rows] and column_class: int32 [classes], their sum is the context. lut: uint32 [contexts ·
    TOTAL], see `tables.decoder_table`. across: most segments side by side.
    table: int32 [segments, 10], of each segment: first word; first row, and how many; first column, and how many, the
    first one's index in `column_class`, and how many segments are left of it; lanes, shift and offset of its code.
    Where a window cuts through a tile, some columns of the tile are outside of 0 … columns − 1.
    """

    words: np.ndarray
    table: np.ndarray
    states: np.ndarray
    row_class: np.ndarray
    column_class: np.ndarray
    lut: np.ndarray
    across: int


def cut_segments(coded: Coded, window_rows: slice, window_columns: slice) -> Segments:
    """The segments of a window of a blob, with the words of that window alone.

    Raises FormatError when a stream is damaged.
    """
    from vllm_babai.format import rans

    shape, model = coded.shape, coded.model
    lut = decoder_table(model.frequencies)
    height = max(1, SEGMENT_WEIGHTS // shape.tile_columns)
    left = window_columns.start // shape.tile_columns

    def cut(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Words, table and states of the segments of one tile."""
        row_start, row_stop, column_start, column_stop = shape.tile(index)
        top, bottom = max(window_rows.start, row_start), min(window_rows.stop, row_stop)
        cuts = np.append(np.arange(top, bottom, height), bottom)
        positions, states = np.empty(len(cuts), np.int64), np.zeros((len(cuts), MAX_LANES), np.uint32)
        classes = model.classes.rows[row_start:row_stop], model.classes.columns[column_start:column_stop]
        code = (*classes, lut, model.offset, model.shift, shape.lanes)
        if not rans.seek_rows(coded.words, *coded.span(index), *code, cuts - row_start, positions, states):
            raise FormatError(f"codes blob has a damaged stream (tile {index})")
        slot = index % shape.across - left
        columns = column_start - window_columns.start, column_stop - column_start, slot * shape.tile_columns, slot
        rows = cuts[:-1] - window_rows.start, np.diff(cuts)
        fields = positions[:-1] - positions[0], *rows, *columns, shape.lanes, model.shift, model.offset
        table = np.stack(np.broadcast_arrays(*fields), axis=1).astype(np.int32)
        return coded.words[positions[0] : positions[-1]], table, states[:-1]

    tiles = parallel_map(cut, shape.overlapping(window_rows, window_columns))
    words, tables, states = zip(*tiles, strict=True)
    for table, begin in zip(tables, accumulate(map(len, words), initial=0), strict=False):
        table[:, BEGIN] += begin
    row_class, column_class = model.classes.rows[window_rows], model.classes.columns[left * shape.tile_columns :]
    across = -(-window_columns.stop // shape.tile_columns) - left
    return Segments(
        np.concatenate(words), np.concatenate(tables), np.concatenate(states), row_class, column_class, lut, across
    )


def stack_segments(parts: Sequence[Segments]) -> Segments:
    """Put matrices of as many columns below each other."""
    tables, row_classes = [], []
    words = rows = classes = contexts = 0
    for part in parts:
        tables.append(part.table.copy())
        tables[-1][:, [BEGIN, ROW, CLASSES]] += (words, rows, classes)
        row_classes.append(part.row_class + contexts)
        words, rows, classes = words + len(part.words), rows + len(part.row_class), classes + len(part.column_class)
        contexts += len(part.lut) // TOTAL
    return Segments(
        np.concatenate([part.words for part in parts]),
        np.concatenate(tables),
        np.concatenate([part.states for part in parts]),
        np.concatenate(row_classes),
        np.concatenate([part.column_class for part in parts]),
        np.concatenate([part.lut for part in parts]),
        max(part.across for part in parts),
    )
