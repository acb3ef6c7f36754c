"""The code of the trellis form: its distortion on Gaussian numbers by bits and paths, and the search for multipliers.

    python tests/benchmarks/trellis_code.py            # decibels, seconds per million weights
    python tests/benchmarks/trellis_code.py --table    # errors by bits and by variance, for `scales/code_error.py`
    python tests/benchmarks/trellis_code.py --shaping  # errors with pivots that are uneven, for `scales/tiles.py`
    python tests/benchmarks/trellis_code.py --search   # draws multipliers, and ranks them

Numbers are independent here, so that there is nothing to carry: what is measured is the code and the paths alone, over
panels of 256 columns at whose end one path is left, as in a linear.
"""

import argparse
import time

import numpy as np

from vllm_babai.compiled import compiled
from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS, MULTIPLIERS, root_mean_square, values_of
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.scales.code_error import LEVELS
from vllm_babai.offline.solver.trellis import paths_by_bits
from vllm_babai.offline.solver.trellis_loops import Found, Panel, Rows, decide

COLUMNS = 256
GAINS = (0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35)
WINDOWS = (2, 8, 16, 32, 64)
DRAWN, CHOSEN = 1000, 24


def distortion(
    bits: int, paths: int, rows: int, gain: float, seed: int, multipliers: np.ndarray = MULTIPLIERS, spread: float = 0
) -> float:
    """Mean squared error on numbers of variance 1, with a scale of `gain` over the one of equal variance.

    spread: standard deviation of the logarithms of the columns' pivots, which weigh the errors.
    """
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, COLUMNS)).astype(np.float32)
    scale = gain * np.sqrt(1 - 2.0**-bits) / root_mean_square()
    geometry = Rows(
        weight.copy(),
        weight,
        np.full(rows, scale, np.float32),
        np.full((rows, COLUMNS // 2), bits, np.uint8),
        np.empty((0, 0), np.float32),
    )
    panel = Panel(np.eye(COLUMNS, dtype=np.float32), uneven_pivots(spread), multipliers, np.full(MOST_BITS + 1, paths))
    found = Found(np.zeros((rows, COLUMNS // 2), np.uint16), np.zeros(rows, np.uint32), np.zeros_like(weight))
    decide(panel, geometry, found)
    return float(np.mean(found.residual.astype(np.float64) ** 2 @ panel.pivots) / panel.pivots.sum())


def uneven_pivots(spread: float) -> np.ndarray:
    """Log-normal pivots, float32 [COLUMNS]."""
    return np.exp(spread * np.random.default_rng(7).standard_normal(COLUMNS)).astype(np.float32)


def measure_shaping(widths: list[int], rows: int) -> None:
    """Print a line for each number of bits and spread: the error over that with equal pivots, and what geometric means
    of the pivots over neighbours, instead of arithmetic ones, predict.
    """
    kept = paths_by_bits(4 * QuantizeOptions().paths)
    for bits in widths:
        for spread in (0.5, 1.0, 1.5):
            even, uneven = (
                min(distortion(bits, int(kept[bits]), rows, gain, 2, spread=own) for gain in GAINS[1::2])
                for own in (0.0, spread)
            )
            logs = np.log(uneven_pivots(spread).astype(np.float64))
            means = {size: np.exp(logs.reshape(-1, size).mean(1)).mean() / np.exp(logs).mean() for size in WINDOWS}
            shown = ", ".join(f"{mean:.3f} over {size}" for size, mean in means.items())
            print(f"{bits} bits a pair, spread {spread}: {uneven / even:.3f}; geometric means: {shown}", flush=True)


def measure(widths: list[int], paths: list[int], rows: int) -> None:
    """Print a line for each number of bits and paths: decibels at the best scale, that scale, seconds."""
    for bits in widths:
        for kept in paths:
            coarse = {gain: distortion(bits, min(kept, 16), max(4, rows // 8), gain, 1) for gain in GAINS}
            gain = min(coarse, key=lambda tried: coarse[tried])
            started = time.perf_counter()
            error = distortion(bits, kept, rows, gain, 2)
            seconds = (time.perf_counter() - started) / (rows * COLUMNS) * 1e6
            print(
                f"{bits} bits a pair, {kept} paths: error {error:.6f}, {-10 * np.log10(error):.2f} dB, "
                f"gain {gain:.2f}, {seconds:.2f} s per million",
                flush=True,
            )


def print_table(widths: list[int], rows: int) -> None:
    """Print a line for each number of bits: errors of numbers of variance 2^LEVELS, over the power of the code."""
    kept = paths_by_bits(4 * QuantizeOptions().paths)
    for bits in widths:
        errors = []
        for variance in 2.0**LEVELS:
            gain = 1 / np.sqrt(variance * (1 - 2.0**-bits))
            errors.append(variance * distortion(bits, int(kept[bits]), rows, gain, 2))
        print(f"({', '.join(f'{error:.5f}' for error in errors)}),  # {bits} bits, {kept[bits]} paths", flush=True)


@compiled
def greedy_error(pairs, states, bits, multiplier, first, second):
    """Mean squared error of the best symbol of each pair, from a state of its own. first, second: value by 16 bits."""
    total = 0.0
    for i in range(len(pairs)):
        best = np.inf
        for symbol in range(1 << bits):
            state = np.uint32(np.uint32(states[i] << np.uint32(bits)) + np.uint32(symbol))
            word = np.uint32(state * multiplier)
            error1 = pairs[i, 0] - first[word & np.uint32(0xFFFF)]
            error2 = pairs[i, 1] - second[word >> np.uint32(16)]
            best = min(best, error1 * error1 + error2 * error2)
        total += best
    return total / (2 * len(pairs))


def search(bits: int, paths: int, rows: int) -> int:
    """The best multiplier of DRAWN: the CHOSEN of least greedy error are tried with `paths`, at a gain of 1.15."""
    generator = np.random.default_rng(5)
    drawn = [int(m) | 1 for m in generator.integers(1 << 20, 1 << 32, DRAWN)]
    pairs = generator.standard_normal((400, 2)).astype(np.float32)
    states = generator.integers(0, 1 << 32, 400).astype(np.uint32)
    table = values_of(np.arange(1 << 16, dtype=np.uint32))[:, 0] / root_mean_square() * 1.15
    ranked = sorted(drawn, key=lambda m: greedy_error(pairs, states, bits, np.uint32(m), table, table))

    def error(multiplier: int) -> float:
        multipliers = MULTIPLIERS.copy()
        multipliers[bits] = multiplier
        return distortion(bits, paths, rows, 1.15, 3, multipliers)

    errors = {multiplier: error(multiplier) for multiplier in ranked[:CHOSEN]}
    best = min(errors, key=lambda multiplier: errors[multiplier])
    print(f"{bits} bits a pair: {best:#010x}, error {errors[best]:.6f}", flush=True)
    return best


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="search for multipliers")
    parser.add_argument("--table", action="store_true", help="print errors by variance")
    parser.add_argument("--shaping", action="store_true", help="print errors with uneven pivots")
    parser.add_argument("--bits", type=int, nargs="*", default=list(range(FEWEST_BITS, MOST_BITS + 1)))
    parser.add_argument("--paths", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    if options.search:
        for bits in options.bits:
            search(bits, options.paths[0], 8)
    elif options.table:
        print_table(options.bits, options.rows)
    elif options.shaping:
        measure_shaping(options.bits, options.rows)
    else:
        measure(options.bits, options.paths, options.rows)


if __name__ == "__main__":
    main()
