"""The compiled loops of joint nearest plane. Importing this module imports numba: import it where it is used."""

import numpy as np

from vllm_babai.compiled import compiled

FREE = -1


@compiled
def decide(
    low: int,
    high: int,
    paths: int,
    carried: np.ndarray,
    weight: np.ndarray,
    steps: np.ndarray,
    inverse: np.ndarray,
    price: np.ndarray,
    pivots: np.ndarray,
    upper: np.ndarray,
    row_upper: np.ndarray,
    edges: np.ndarray,
    integers: np.ndarray,
    residual: np.ndarray,
    targets: np.ndarray,
) -> None:
    """Decide columns low … high − 1, one row after the other from the last to the first."""
    count, rows = high - low, weight.shape[1]
    upper_t = upper[low:high, low:high].T.copy()
    gaps = np.zeros((rows, count), weight.dtype)  # c − s∘z of the rows decided
    found = np.zeros((2, count), weight.dtype)
    for i in range(rows - 1, -1, -1):
        from_rows = np.zeros(count, weight.dtype)
        for k in range(i + 1, len(row_upper)):
            share = row_upper[i, k]
            for j in range(count):
                from_rows[j] += share * gaps[k, j]
        own = carried[low:high, i] + from_rows
        wanted, step = weight[low:high, i].copy(), steps[low:high, i].copy()
        search(
            own, wanted, step, inverse[low:high, i], price[low:high, i], pivots[low:high], upper_t, edges, paths, found
        )
        for j in range(count):
            integer, target = found[0, j], found[1, j]
            integers[low + j, i] = integer
            targets[low + j, i] = target
            residual[low + j, i] = wanted[j] - integer * step[j]
            gaps[i, j] = target - from_rows[j] - integer * step[j]


@compiled
def search(start, weight, steps, inverse, price, pivots, upper_t, edges, paths, found):
    """The best integers of one row, from the last column to the first, that `paths` survivors lead to (M-algorithm).

    A path's cost is Σ D_j ((t_j − s z_j)² + a (s z_j)² + price where z_j is beyond the edges), a = 1/shrinkage − 1. At
    every column each path goes on with the nearest integer and the second nearest, and with the edge where the nearest
    is beyond it. start: targets before any of these columns is decided. found: [2, columns], integers and targets.
    """
    count, dtype = len(start), start.dtype
    reached, extended = np.empty((paths, count), dtype), np.empty((paths, count), dtype)
    costs, offers, integers = np.zeros(paths, dtype), np.zeros(2 * paths, dtype), np.zeros(2 * paths, dtype)
    chosen, met = np.empty((count, paths), dtype), np.empty((count, paths), dtype)
    origins, ranks = np.empty((count, paths), np.int32), np.empty(2 * paths, np.int32)
    reached[0] = start
    alive = 1
    for j in range(count - 1, -1, -1):
        step, pivot = steps[j], pivots[j]
        shrinkage = inverse[j] * step
        spread = 1 / shrinkage - 1 if shrinkage > 0 else np.inf
        for path in range(alive):
            target = reached[path, j]
            inner = target * inverse[j]
            nearest = np.rint(inner)
            edge = min(max(nearest, edges[0]), edges[1])
            integers[path], integers[alive + path] = nearest, edge
            if edge == nearest:
                integers[alive + path] = nearest + (1 if inner >= nearest else -1)
            for option in (path, alive + path):
                cost = cost_of(integers[option], target, step, spread, price[j], edges)
                offers[option] = costs[path] + pivot * cost
            if paths == 1 and edge == nearest:
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
                error = weight[j] - chosen[j, place] * step
                for k in range(j):
                    extended[place, k] = reached[origin, k] + upper_t[j, k] * error
        reached, extended = extended, reached
        alive = kept
    path = 0
    for j in range(count):
        found[0, j], found[1, j] = chosen[j, path], met[j, path]
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
