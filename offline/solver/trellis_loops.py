"""The compiled loops of nearest plane over a trellis.

Importing this module imports numba: import it where it is used.
"""

from typing import NamedTuple

import numpy as np

from vllm_babai.compiled import compiled
from vllm_babai.format.trellis.code import UNIT
from vllm_babai.format.trellis.loops import half

DEFERRED = 16  # columns whose errors a path carries along before they go into its targets
UNIT32 = np.float32(UNIT)
NO_LIMIT, SMALLEST_WIDTH = np.float32(3e38), np.float32(1e-30)


class Panel(NamedTuple):
    """Columns that are decided row by row, and the code. upper_t: float32 [columns, columns], Uᵀ of U = R / diag(R).
    pivots: float32 [columns]. By the bits of a pair: multipliers: uint32, see `format.trellis.code`; paths: int64, how
    many are kept.
    """

    upper_t: np.ndarray
    pivots: np.ndarray
    multipliers: np.ndarray
    paths: np.ndarray


class Rows(NamedTuple):
    """Rows of one block, in the order of its factor, float32 or as said.

    carried: [rows, columns], weight plus what columns decided before have carried. weight: [rows, columns]. scales:
    [rows], of the code's values. bits: uint8 [rows, pairs], of each pair, from the first decided on. upper: [rows,
    rows], or empty where rows are alone.
    """

    carried: np.ndarray
    weight: np.ndarray
    scales: np.ndarray
    bits: np.ndarray
    upper: np.ndarray


class Found(NamedTuple):
    """symbols: uint16 [rows, pairs]. states: uint32 [rows], after the last pair decided. residual: float32 [rows,
    columns], weight less value.
    """

    symbols: np.ndarray
    states: np.ndarray
    residual: np.ndarray


@compiled
def decide(panel, rows, found):
    """Decide a panel's columns, row by row from the last to the first; `rows` and `found` are its part of the block."""
    count, columns = rows.weight.shape
    gaps = np.zeros((count, columns), np.float32)  # c − value of the rows decided
    from_rows = np.zeros(columns, np.float32)
    values = np.zeros(columns, np.float32)
    for i in range(count - 1, -1, -1):
        from_rows[:] = np.float32(0)
        for k in range(i + 1, len(rows.upper)):
            share = rows.upper[i, k]
            for j in range(columns):
                from_rows[j] += share * gaps[k, j]
        start = rows.carried[i] + from_rows
        weight, scale = rows.weight[i].copy(), rows.scales[i] * UNIT32
        state = found.states[i]
        found.states[i] = search(panel, start, weight, scale, rows.bits[i], state, found.symbols[i])
        spell(found.symbols[i], rows.bits[i], panel.multipliers, state, values)
        own = rows.carried[i].copy()
        for j in range(columns - 1, -1, -1):
            error = weight[j] - values[j] * scale
            found.residual[i, j] = error
            gaps[i, j] = own[j] - values[j] * scale
            for k in range(j):
                own[k] += panel.upper_t[j, k] * error


@compiled
def spell(symbols, bits, multipliers, state, values):
    """The values that symbols stand for, over UNIT, from the last column to the first."""
    column = len(values) - 1
    for pair in range(len(symbols)):
        state = np.uint32(np.uint32(state << np.uint32(bits[pair])) + np.uint32(symbols[pair]))
        word = np.int32(np.uint32(state * multipliers[bits[pair]]))
        values[column], values[column - 1] = half(word), half(word >> np.int32(16))
        column -= 2


@compiled
def search(panel, start, weight, scale, bits, state, symbols):
    """The symbols of one row, from the last column to the first, that the surviving paths lead to (M-algorithm).

    A path is a state of the code, a cost Σ D_j (t_j − value_j)², and targets of its own. At every pair it goes on with
    each of the 2^b symbols; about the cheapest `panel.paths[b]` of them survive. Its last DEFERRED errors wait in
    `errors`, and `reached` holds the targets without them, for the ancestor that `owner` names.
    start: float32 [columns], the targets before any of these columns is decided. symbols: to fill. Returns the state
    after the last pair.
    """
    columns, paths, room, before = len(start), np.int64(1), np.int64(1), np.int64(1)
    for b in bits:
        room = max(room, before << np.int64(b))
        before = panel.paths[b]
        paths = max(paths, before)
    reached, extended = np.empty((paths, columns), np.float32), np.empty((paths, columns), np.float32)
    costs, next_costs = np.zeros(paths, np.float32), np.zeros(paths, np.float32)
    states, next_states = np.zeros(paths, np.uint32), np.zeros(paths, np.uint32)
    owner, next_owner = np.zeros(paths, np.int64), np.zeros(paths, np.int64)
    errors, next_errors = np.zeros((paths, DEFERRED), np.float32), np.zeros((paths, DEFERRED), np.float32)
    offers = np.empty(room, np.float32)
    first_value, second_value = np.empty(room, np.float32), np.empty(room, np.float32)
    origins, taken = np.empty((len(bits), paths), np.int32), np.empty((len(bits), paths), np.uint16)
    reached[0] = start
    states[0] = state
    alive, width, high = 1, np.float32(1e-6), columns
    for pair in range(len(bits)):
        first, second = columns - 1 - 2 * pair, columns - 2 - 2 * pair
        b = np.uint32(bits[pair])
        choices, multiplier, survivors = 1 << np.int64(b), panel.multipliers[b], panel.paths[b]
        waiting = high - 1 - first
        link, pivot1, pivot2 = panel.upper_t[first, second], panel.pivots[first], panel.pivots[second]
        for path in range(alive):
            target1, target2 = reached[owner[path], first], reached[owner[path], second]
            for m in range(waiting):
                target1 += panel.upper_t[high - 1 - m, first] * errors[path, m]
                target2 += panel.upper_t[high - 1 - m, second] * errors[path, m]
            target2 += link * weight[first]
            at = path * choices
            base = np.uint32(np.uint32(states[path] << b) * multiplier)
            expand(base, multiplier, first_value[at : at + choices], second_value[at : at + choices])
            price(
                costs[path],
                (target1, target2, scale, link * scale, pivot1, pivot2),
                first_value[at : at + choices],
                second_value[at : at + choices],
                offers[at : at + choices],
            )
        limit = NO_LIMIT
        if alive * choices > survivors:
            limit, width = find_limit(offers[: alive * choices], survivors, width)
        kept = 0
        for path in range(alive):
            for symbol in range(choices):
                at = path * choices + symbol
                if offers[at] <= limit and kept < survivors:
                    next_costs[kept], next_owner[kept] = offers[at], owner[path]
                    next_states[kept] = np.uint32(np.uint32(states[path] << b) + np.uint32(symbol))
                    origins[pair, kept], taken[pair, kept] = path, symbol
                    next_errors[kept, :waiting] = errors[path, :waiting]
                    next_errors[kept, waiting] = weight[first] - first_value[at] * scale
                    next_errors[kept, waiting + 1] = weight[second] - second_value[at] * scale
                    kept += 1
        alive = kept
        costs, next_costs, states, next_states = next_costs, costs, next_states, states
        owner, next_owner, errors, next_errors = next_owner, owner, next_errors, errors
        costs[:alive] -= costs[:alive].min()
        if waiting + 2 == DEFERRED and second > 0:
            settle(panel.upper_t, high, second, alive, reached, owner, errors, extended)
            reached, extended = extended, reached
            high = second
    best = np.argmin(costs[:alive])
    state = states[best]
    for pair in range(len(bits) - 1, -1, -1):
        symbols[pair] = taken[pair, best]
        best = np.int64(origins[pair, best])
    return state


# Short loops that the compiler makes vector instructions of


@compiled
def expand(base, multiplier, first, second):
    """Values of a path's next pair by symbol, over UNIT. base: its state times the multiplier."""
    for symbol in range(len(first)):
        word = np.int32(np.uint32(base + np.uint32(np.uint32(symbol) * multiplier)))
        first[symbol], second[symbol] = half(word), half(word >> np.int32(16))


@compiled
def price(cost, geometry, first, second, offers):
    """What a path costs with each symbol."""
    target1, target2, scale, link, pivot1, pivot2 = geometry
    for symbol in range(len(first)):
        error1 = target1 - scale * first[symbol]
        error2 = target2 - link * first[symbol] - scale * second[symbol]
        offers[symbol] = cost + pivot1 * error1 * error1 + pivot2 * error2 * error2


@compiled
def find_limit(offers, paths, width):
    """A number that about `paths` offers do not exceed, seven eighths at least where it can be told, and never more;
    and how far it is from the least offer. width: a guess of that distance.
    """
    least = lowest(offers)
    few = paths - paths // 8
    low, high = least, least + width
    while True:
        found = count_within(offers, high)
        if found > paths:
            break
        if found >= few or found == len(offers) or not high < NO_LIMIT:
            return high, width
        low = high
        width *= np.float32(2)  # not the distance itself, which may round to 0
        high = least + width
    for _ in range(24):
        middle = np.float32(0.5) * (low + high)
        found = count_within(offers, middle)
        if found > paths:
            high = middle
        elif found >= few:
            return middle, max(middle - least, SMALLEST_WIDTH)
        else:
            low = middle
    return low, max(low - least, SMALLEST_WIDTH)


@compiled
def lowest(offers):
    """The least of numbers ≥ 0, whose bit patterns are in the same order."""
    patterns = offers.view(np.int32)
    least = patterns[0]
    for i in range(len(patterns)):
        least = min(least, patterns[i])
    return np.int32(least).view(np.float32)


@compiled
def count_within(offers, limit):
    """How many do not exceed a limit."""
    found = np.int32(0)
    for i in range(len(offers)):
        found += np.int32(offers[i] <= limit)
    return found


@compiled
def settle(upper_t, high, low, alive, reached, owner, errors, extended):
    """Targets of every path below column `low`, with the errors of the columns from there to `high`."""
    for path in range(alive):
        before, own = reached[owner[path]], extended[path]
        own[:low] = before[:low]
        for m in range(0, high - low, 4):
            a, b, c, d = errors[path, m], errors[path, m + 1], errors[path, m + 2], errors[path, m + 3]
            at = high - 1 - m
            for k in range(low):
                own[k] += upper_t[at, k] * a + upper_t[at - 1, k] * b + upper_t[at - 2, k] * c + upper_t[at - 3, k] * d
        owner[path] = path
