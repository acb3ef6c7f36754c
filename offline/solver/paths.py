"""The compiled loops of `joint_plane`. Importing this module imports numba: import it where it is used.

They stand in one file because numba's cache does not notice when a function in another file has changed.
"""

from typing import NamedTuple

import numpy as np

from vllm_babai.compiled import compiled

FREE = -1


class Problem(NamedTuple):
    """A block of rows, all arrays in the order of decision: the last column and the last row are decided first.

    weight, steps, price: [n, rows]; inverse: shrinkage over step, [n, rows]. pivots: of the columns, [n].
    upper: unit upper triangular factor of H, [n, n]. row_upper: that of G, [rows, rows] or [0, 0]. edges: low and high.
    """

    weight: np.ndarray
    steps: np.ndarray
    inverse: np.ndarray
    price: np.ndarray
    pivots: np.ndarray
    upper: np.ndarray
    row_upper: np.ndarray
    edges: np.ndarray


class Found(NamedTuple):
    """What was found, [n, rows] each. targets: of columns that are not decided yet, what other columns have carried
    into them, c; of the others, t.
    """

    integers: np.ndarray
    residual: np.ndarray
    targets: np.ndarray


class Row(NamedTuple):
    """One row of a `Problem` over the columns of a leaf, [columns] each; upper_t: [columns, columns], transposed."""

    weight: np.ndarray
    steps: np.ndarray
    inverse: np.ndarray
    price: np.ndarray
    pivots: np.ndarray
    upper_t: np.ndarray
    edges: np.ndarray


@compiled
def decide(low: int, high: int, paths: int, problem: Problem, found: Found) -> None:
    """Decide columns low … high − 1, one row after the other from the last to the first."""
    count, rows = high - low, problem.weight.shape[1]
    dtype, row_upper = problem.weight.dtype, problem.row_upper
    upper_t = problem.upper[low:high, low:high].T.copy()
    gaps = np.zeros((rows, count), dtype)  # c − s∘z of the rows decided
    best = np.zeros((2, count), dtype)
    for i in range(rows - 1, -1, -1):
        from_rows = np.zeros(count, dtype)
        for k in range(i + 1, len(row_upper)):
            share = row_upper[i, k]
            for j in range(count):
                from_rows[j] += share * gaps[k, j]
        start = found.targets[low:high, i] + from_rows
        row = Row(
            problem.weight[low:high, i].copy(),
            problem.steps[low:high, i].copy(),
            problem.inverse[low:high, i],
            problem.price[low:high, i],
            problem.pivots[low:high],
            upper_t,
            problem.edges,
        )
        search(start, paths, row, best)
        for j in range(count):
            integer, target = best[0, j], best[1, j]
            found.integers[low + j, i] = integer
            found.targets[low + j, i] = target
            found.residual[low + j, i] = row.weight[j] - integer * row.steps[j]
            gaps[i, j] = target - from_rows[j] - integer * row.steps[j]


@compiled
def search(start: np.ndarray, paths: int, row: Row, best: np.ndarray) -> None:
    """The best integers of one row, from the last column to the first, that `paths` survivors lead to (M-algorithm).

    A path's cost is Σ D_j ((t_j − s z_j)² + a (s z_j)² + price where z_j is outside the edges), a = 1/shrinkage − 1.
    At every column each path goes on with the nearest integer and the second nearest, or the edge where the nearest is
    outside. start: targets before any of these columns is decided. best: [2, columns], integers and targets.
    """
    count, dtype = len(start), start.dtype
    reached, extended = np.empty((paths, count), dtype), np.empty((paths, count), dtype)
    costs, offers, integers = np.zeros(paths, dtype), np.zeros(2 * paths, dtype), np.zeros(2 * paths, dtype)
    chosen, met = np.empty((count, paths), dtype), np.empty((count, paths), dtype)
    origins, ranks = np.empty((count, paths), np.int32), np.empty(2 * paths, np.int32)
    reached[0] = start
    alive = 1
    for j in range(count - 1, -1, -1):
        step, pivot = row.steps[j], row.pivots[j]
        shrinkage = row.inverse[j] * step
        spread = 1 / shrinkage - 1 if shrinkage > 0 else np.inf
        for path in range(alive):
            target = reached[path, j]
            inner = target * row.inverse[j]
            nearest = np.rint(inner)
            edge = min(max(nearest, row.edges[0]), row.edges[1])
            integers[path], integers[alive + path] = nearest, edge
            if edge == nearest:
                integers[alive + path] = nearest + (1 if inner >= nearest else -1)
            for option in (path, alive + path):
                cost = cost_of(integers[option], target, step, spread, row.price[j], row.edges)
                offers[option] = costs[path] + pivot * cost
            if paths == 1 and edge == nearest:  # Babai's algorithm has no second nearest
                offers[alive + path] = np.inf
        rank(offers[: 2 * alive], ranks)
        kept = min(2 * alive, paths)
        origins[j] = FREE
        for option in range(2 * alive):
            place = ranks[option]
            while place < kept and origins[j, place] != FREE:  # taken by an equal
                place += 1
            if place < kept:
                origin = option % alive
                origins[j, place], met[j, place], chosen[j, place] = origin, reached[origin, j], integers[option]
                costs[place] = offers[option]
                error = row.weight[j] - chosen[j, place] * step
                for k in range(j):
                    extended[place, k] = reached[origin, k] + row.upper_t[j, k] * error
        reached, extended = extended, reached
        alive = kept
    path = 0
    for j in range(count):
        best[0, j], best[1, j] = chosen[j, path], met[j, path]
        path = origins[j, path]


@compiled
def cost_of(integer, target, step, spread, price, edges):
    """What an integer costs, without its pivot; see `search`."""
    value = integer * step
    cost = (target - value) ** 2
    if value != 0:
        cost += spread * value**2
    if integer < edges[0] or integer > edges[1]:
        cost += price
    return cost


@compiled
def rank(values, ranks):
    """How many of the values are less than each; comparing all pairs takes no branches."""
    for k in range(len(values)):
        less = np.int32(0)
        for i in range(len(values)):
            less += np.int32(values[i] < values[k])
        ranks[k] = less
