"""The streams of a blob as many short segments that decode on their own, without coding anything anew.

Each stream is decoded once, and what the decoder has in front of some rows is noted: its position and its states. From
there decoding can start as well as at the head of the tile, so that thousands of warps of a GPU find work in tiles that
are large for the sake of the disk. Their states and places take 0.08 bit per weight of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError
from vllm_babai.format.entropy.hptq import MAX_LANES, Coded
from vllm_babai.format.entropy.tables import TOTAL

SEGMENT_WEIGHTS = 1 << 14  # about: a segment is whole rows of a tile
FIELDS = ("word", "row", "rows", "column", "columns", "classes", "left", "lanes", "shift", "offset")
SEGMENT = np.dtype([(field, np.int32) for field in FIELDS])


@dataclass(frozen=True)
class Segments:
    """A coded matrix, or a window of one.

    words: uint16 [words], the streams of all segments.
    table: SEGMENT [segments]. Of each its first `word`; first `row`, how many `rows`; first `column`, how many
        `columns`, index of the first one's class in column_class; how many segments are `left` of it; `lanes`, `shift`
        and `offset` of its code. Where a window cuts through a tile, some of its columns are outside of the window.
    states: uint32 [segments, MAX_LANES], the decoder's in front of each.
    row_class: int32 [rows], column_class: int32 [classes]. Their sum is the context.
    lut: uint32 [contexts · TOTAL], see `tables.decoder_table`.
    across: most segments side by side.
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
    from vllm_babai.format.entropy import rans

    shape, model = coded.shape, coded.model
    height = max(1, SEGMENT_WEIGHTS // shape.tile_columns)

    def seek(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows where the segments of a tile begin and the last one ends, and position and states in front of each."""
        row_start, row_stop, column_start, column_stop = shape.tile(index)
        top, bottom = max(window_rows.start, row_start), min(window_rows.stop, row_stop)
        cuts = np.array([*range(top, bottom, height), bottom])
        positions, states = np.empty(len(cuts), np.int64), np.zeros((len(cuts), MAX_LANES), np.uint32)
        classes = model.classes.rows[row_start:row_stop], model.classes.columns[column_start:column_stop]
        code = (*classes, coded.lut, model.offset, model.shift, shape.lanes)
        if not rans.seek_rows(coded.words, *coded.span(index), *code, cuts - row_start, positions, states):
            raise FormatError(f"codes blob has a damaged stream (tile {index})")
        return cuts, positions, states

    tiles = shape.overlapping(window_rows, window_columns)
    cuts, positions, states = zip(*parallel_map(seek, tiles), strict=True)
    words = [coded.words[at[0] : at[-1]] for at in positions]
    starts = np.cumsum([0, *map(len, words)])[:-1]
    tile = np.repeat(np.arange(len(tiles)), [len(rows) - 1 for rows in cuts])  # of each segment
    bounds = np.array([shape.tile(index) for index in tiles])[tile]
    left = window_columns.start // shape.tile_columns

    table = np.empty(len(tile), SEGMENT)
    table["word"] = np.concatenate([at[:-1] - at[0] for at in positions]) + starts[tile]
    table["row"] = np.concatenate([rows[:-1] for rows in cuts]) - window_rows.start
    table["rows"] = np.concatenate([np.diff(rows) for rows in cuts])
    table["column"] = bounds[:, 2] - window_columns.start
    table["columns"] = bounds[:, 3] - bounds[:, 2]
    table["left"] = bounds[:, 2] // shape.tile_columns - left
    table["classes"] = table["left"] * shape.tile_columns
    table["lanes"], table["shift"], table["offset"] = shape.lanes, model.shift, model.offset
    return Segments(
        np.concatenate(words),
        table,
        np.concatenate([of_tile[:-1] for of_tile in states]),
        model.classes.rows[window_rows],
        model.classes.columns[left * shape.tile_columns :],
        coded.lut,
        across=-(-window_columns.stop // shape.tile_columns) - left,
    )


def stack_segments(parts: Sequence[Segments]) -> Segments:
    """Put matrices of as many columns below each other."""
    tables, row_classes = [], []
    words = rows = classes = contexts = 0
    for part in parts:
        table = part.table.copy()
        table["word"] += words
        table["row"] += rows
        table["classes"] += classes
        tables.append(table)
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
