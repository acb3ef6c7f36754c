"""Which rows and columns of an integer matrix are coded alike: class of the row + class of the column = context.

Rows and columns of one step size spread differently, more so with steps per column. Model: the mean square of entry
(i, j) is a_i · b_j; half its binary logarithm, in units of `step`, is the sum of a row's and a column's class.
"""

from typing import NamedTuple

import numpy as np

MAX_CLASSES = 24  # of rows, and of columns
_ROUNDS = 4


class Classes(NamedTuple):
    """rows: int32 [rows], columns: int32 [columns], both ≥ 0 and with a smallest of 0."""

    rows: np.ndarray
    columns: np.ndarray

    @property
    def contexts(self) -> int:
        """One more than the largest sum of a row's and a column's class."""
        return int(self.rows.max(initial=0) + self.columns.max(initial=0)) + 1


def one_class(rows: int, columns: int) -> Classes:
    """Every row and every column in class 0."""
    return Classes(np.zeros(rows, np.int32), np.zeros(columns, np.int32))


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, columns] → log₂ of the root mean square of rows, float64, and of columns relative to it."""
    square = np.square(values)
    rows, columns = square.shape
    floor = 0.25 / max(square.shape)
    row = np.ones(rows, np.float32)
    for _ in range(_ROUNDS):
        column = np.maximum((1 / row) @ square / rows, floor)
        row = np.maximum(square @ (1 / column) / columns, floor)
    return np.log2(row.astype(np.float64)) / 2, np.log2(column.astype(np.float64)) / 2


def fit_classes(row_spread: np.ndarray, column_spread: np.ndarray, step: float) -> Classes:
    """Classes for the result of `spread`: the fewest bits for integers and class numbers together."""
    rows, columns = len(row_spread), len(column_spread)
    return Classes(_assign(row_spread, columns, step), _assign(column_spread, rows, step))


def _assign(spread: np.ndarray, weights: int, step: float) -> np.ndarray:
    """Classes of vectors of `weights` integers each: entropy-constrained quantization of their spread.

    A Gaussian coded as if its spread were `level` costs weights · (level + 4^(spread − level) / 2 ln 2) bits.
    """
    top = round(float(spread.max()) / step)
    bottom = max(round(float(spread.min()) / step), top - MAX_CLASSES + 1)
    level = np.arange(bottom, top + 1) * step
    error = np.clip(spread[:, None] - level, -20, 20)
    bits = weights * (4.0**error / (2 * np.log(2)) - error)
    length = np.zeros(len(level))
    for _ in range(_ROUNDS):
        chosen = np.argmin(bits + length, axis=1)
        length = -np.log2((np.bincount(chosen, minlength=len(level)) + 0.01) / len(spread))
    return (chosen - chosen.min()).astype(np.int32)
