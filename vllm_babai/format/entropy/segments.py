"""The streams of a blob as many short segments that decode on their own; nothing is encoded again.

A segment is a point in a stream where decoding can start, and the rows from there to the next such point. Each stream
is decoded once, and the decoder's position and states before some rows are noted. Tiles are large, to be small on disk;
segments are short, to give thousands of warps of a GPU work. They take 0.08 bit per weight of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError
from vllm_babai.format.entropy.classes import Classes
from vllm_babai.format.entropy.hptq import MAX_LANES, Coded
from vllm_babai.format.entropy.tables import TOTAL

SEGMENT_WEIGHTS = 1 << 14  # about: a segment is whole rows of a tile


class Field(IntEnum):
    """Positions of the numbers that describe a segment; a Triton kernel takes them as constants.

    Where a window cuts through a tile, some of the segment's columns are outside the window.
    """

    WORD = 0  # its first word
    ROW = 1  # its first row in the window
    ROWS = 2  # how many
    COLUMN = 3  # its first column in the window, below 0 where the window starts further right
    COLUMNS = 4  # how many
    CLASSES = 5  # where the class of its first column is in column_class
    LEFT = 6  # segments to the left of it
    LANES = 7  # of its `Code`, like the next two
    SHIFT = 8
    OFFSET = 9


FIELDS = tuple(field.name.lower() for field in Field)
SEGMENT = np.dtype([(field, np.int32) for field in FIELDS])


@dataclass(frozen=True)
class SegmentedMatrix:
    """A coded matrix, or a window of one, cut in segments.

    words: uint16 [words], the streams of all segments.
    segments: SEGMENT [segments].
    states: uint32 [segments, MAX_LANES], the decoder's before each.
    row_class: int32 [rows], column_class: int32 [classes]. Their sum is the context.
    table: uint32 [contexts · TOTAL], see `tables.decoder_table`.
    across: most segments side by side.
    """

    words: np.ndarray
    segments: np.ndarray
    states: np.ndarray
    row_class: np.ndarray
    column_class: np.ndarray
    table: np.ndarray
    across: int


def cut_segments(coded: Coded, window_rows: slice, window_columns: slice) -> SegmentedMatrix:
    """Segments of a window of a blob, with the words of that window alone.

    Raises FormatError when a stream is damaged.
    """
    from vllm_babai.format.entropy import rans

    shape, model = coded.shape, coded.model
    height = max(1, SEGMENT_WEIGHTS // shape.tile_columns)

    def seek(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows where the segments of a tile begin and the last one ends, and position and states before each."""
        row_start, row_stop, column_start, column_stop = shape.tile(index)
        top, bottom = max(window_rows.start, row_start), min(window_rows.stop, row_stop)
        cuts = np.array([*range(top, bottom, height), bottom])
        positions, states = np.empty(len(cuts), np.int64), np.zeros((len(cuts), MAX_LANES), np.uint32)
        classes = Classes(model.classes.rows[row_start:row_stop], model.classes.columns[column_start:column_stop])
        if not rans.seek_rows(coded.stream(index), classes, coded.code, cuts - row_start, positions, states):
            raise FormatError(f"codes blob has a damaged stream (tile {index})")
        return cuts, positions, states

    tiles = shape.overlapping(window_rows, window_columns)
    cuts, positions, states = zip(*parallel_map(seek, tiles), strict=True)
    words = [coded.words[at[0] : at[-1]] for at in positions]
    starts = np.cumsum([0, *map(len, words)])[:-1]
    tile = np.repeat(np.arange(len(tiles)), [len(rows) - 1 for rows in cuts])  # of each segment
    bounds = np.array([shape.tile(index) for index in tiles])[tile]
    left = window_columns.start // shape.tile_columns

    segments = np.empty(len(tile), SEGMENT)
    segments["word"] = np.concatenate([at[:-1] - at[0] for at in positions]) + starts[tile]
    segments["row"] = np.concatenate([rows[:-1] for rows in cuts]) - window_rows.start
    segments["rows"] = np.concatenate([np.diff(rows) for rows in cuts])
    segments["column"] = bounds[:, 2] - window_columns.start
    segments["columns"] = bounds[:, 3] - bounds[:, 2]
    segments["left"] = bounds[:, 2] // shape.tile_columns - left
    segments["classes"] = segments["left"] * shape.tile_columns
    segments["lanes"], segments["shift"], segments["offset"] = shape.lanes, model.shift, model.offset
    return SegmentedMatrix(
        np.concatenate(words),
        segments,
        np.concatenate([of_tile[:-1] for of_tile in states]),
        model.classes.rows[window_rows],
        model.classes.columns[left * shape.tile_columns :],
        coded.code.table,
        across=-(-window_columns.stop // shape.tile_columns) - left,
    )


def stack_segments(parts: Sequence[SegmentedMatrix]) -> SegmentedMatrix:
    """Put matrices of as many columns below each other."""
    every, row_classes = [], []
    words = rows = classes = contexts = 0
    for part in parts:
        segments = part.segments.copy()
        segments["word"] += words
        segments["row"] += rows
        segments["classes"] += classes
        every.append(segments)
        row_classes.append(part.row_class + contexts)
        words, rows, classes = words + len(part.words), rows + len(part.row_class), classes + len(part.column_class)
        contexts += len(part.table) // TOTAL
    return SegmentedMatrix(
        np.concatenate([part.words for part in parts]),
        np.concatenate(every),
        np.concatenate([part.states for part in parts]),
        np.concatenate(row_classes),
        np.concatenate([part.column_class for part in parts]),
        np.concatenate([part.table for part in parts]),
        max(part.across for part in parts),
    )
