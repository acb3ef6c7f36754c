"""How a matrix is cut into tiles, and windows of it: the rows × columns that one rank takes."""

from dataclasses import dataclass
from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of a matrix that are coded as one stream; the stops are exclusive."""

    row_start: int
    row_stop: int
    column_start: int
    column_stop: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index a matrix with."""
        return slice(self.row_start, self.row_stop), slice(self.column_start, self.column_stop)


@dataclass(frozen=True)
class Tiling:
    """A matrix of rows × columns in tiles, which follow each other row by row; its edges cut the last ones short."""

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int

    @property
    def down(self) -> int:
        """Tiles below each other."""
        return -(-self.rows // self.tile_rows)

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.columns // self.tile_columns)

    @property
    def count(self) -> int:
        """Tiles in all."""
        return self.down * self.across

    def tile(self, index: int) -> Tile:
        """Bounds of a tile."""
        row, column = index // self.across * self.tile_rows, index % self.across * self.tile_columns
        return Tile(row, min(row + self.tile_rows, self.rows), column, min(column + self.tile_columns, self.columns))

    def overlapping(self, rows: slice, columns: slice) -> list[int]:
        """The tiles that hold something of a window, row by row."""
        down = range(rows.start // self.tile_rows, -(-rows.stop // self.tile_rows))
        right = range(columns.start // self.tile_columns, -(-columns.stop // self.tile_columns))
        return [y * self.across + x for y in down for x in right]


def within(window: slice | None, size: int, axis: str) -> slice:
    """A window of one axis, `row` or `column`; None stands for the whole axis. Raises ValueError when it leaves it."""
    window = slice(0, size) if window is None else window
    if not 0 <= window.start <= window.stop <= size:
        raise ValueError(f"{axis} window {window.start}…{window.stop} leaves a matrix of {size} {axis}s")
    return window
