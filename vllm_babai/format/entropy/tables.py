"""Symbol frequencies of HPTQ's entropy code: a discretized Gaussian named by one byte, or a list of frequencies.

A symbol is an integer without its lowest `shift` bits, + CENTRE; ESCAPE stands for every integer that a table lacks.
Frequencies are integers that sum to 2^PRECISION. Encoder and decoder build a Gaussian's table each for itself, so it is
made of operations that IEEE 754 rounds the same everywhere (+ − × ÷ √), never of a mathematical library's exp or erf.
"""

import math
from functools import lru_cache

import numpy as np

from vllm_babai.format.exact import halved

PRECISION = 12
TOTAL = 1 << PRECISION
CENTRE = 127  # symbol of the integers around 0
ESCAPE = 255
GAUSSIANS = range(1, 256)  # codes of `gaussian`; code 0 announces an explicit table
CODES_PER_OCTAVE = 16
LOWEST_OCTAVE = -4  # σ of code c is 2^(c / 16 − 4)
LOG2_E = 1.4426950408889634
MAX_SHIFT = 16 - PRECISION  # more would need two words per symbol

_SAMPLES = 8  # midpoints that integrate the density over a symbol


def normalize(weights: np.ndarray) -> np.ndarray:
    """Weights, int64 ≥ 0 with at least one above 0 → frequencies, uint32, at least 1 where the weight is not 0."""
    total = int(weights.sum())
    exact = weights.astype(np.float64) / total * TOTAL
    frequency = np.where(weights > 0, np.maximum(np.floor(exact + 0.5), 1), 0).astype(np.int64)
    surplus = int(frequency.sum()) - TOTAL
    while surplus:
        largest = np.argsort(-frequency, kind="stable")[: min(abs(surplus), max(1, np.count_nonzero(frequency > 1)))]
        step = 1 if surplus > 0 else -1
        frequency[largest] -= step
        surplus -= step * len(largest)
    return frequency.astype(np.uint32)


@lru_cache(maxsize=1024)
def gaussian(code: int, shift: int) -> np.ndarray:
    """Frequencies, uint32 [ESCAPE + 1], of a Gaussian with σ = 2^(code / 16 − 4) rounded to integers."""
    precision = 0.5 * LOG2_E * float(halved(np.array(2 * code / CODES_PER_OCTAVE))) * 4.0**-LOWEST_OCTAVE
    symbol = np.arange(-CENTRE, ESCAPE - CENTRE, dtype=np.float64)
    density = np.zeros(ESCAPE)
    for sample in range(_SAMPLES):
        point = (symbol + (sample + 0.5) / _SAMPLES) * (1 << shift) - 0.5
        density = density + halved(point * point * precision)
    weights = (density * (1 << 40)).astype(np.int64)
    rare = weights * 4 * TOTAL < weights.sum()
    tail = int(weights[rare].sum())
    weights[rare] = 0
    return normalize(np.append(weights, max(tail, 1)))


def explicit(counts: np.ndarray) -> np.ndarray:
    """Frequencies, uint32 [ESCAPE + 1], for counts, int64 [ESCAPE + 1], of which some are above 0.

    Symbols so rare that escaping is cheaper than their entry become escapes.
    """
    worth = counts * (PRECISION + 16) >= 16 + counts.sum() / (TOTAL * math.log(2))
    worth[ESCAPE] = False
    weights = np.where(worth, counts, 0)
    weights[ESCAPE] = counts[~worth].sum()
    return normalize(weights)


def coded_bits(counts: np.ndarray, frequency: np.ndarray) -> float:
    """Bits that symbols with these counts, int64 [ESCAPE + 1], take, without the `shift` low bits of each."""
    known = frequency > 0
    known[ESCAPE] = False
    escapes = counts[~known].sum()
    if escapes and not frequency[ESCAPE]:
        return math.inf
    bits = float((counts[known] * (PRECISION - np.log2(frequency[known]))).sum())
    return bits + float(escapes * (16 + PRECISION - np.log2(frequency[ESCAPE]))) if escapes else bits


def best_gaussian(counts: np.ndarray, shift: int) -> tuple[int, float]:
    """Code of the Gaussian that spends the fewest bits on these counts, and those bits."""
    distance = (np.arange(ESCAPE) - CENTRE + (0.5 if shift else 0.0)) * (1 << shift)
    variance = (counts[:ESCAPE] * distance**2).sum() / max(1, counts[:ESCAPE].sum())
    centre = round((0.5 * math.log2(max(variance, 1e-3)) - LOWEST_OCTAVE) * CODES_PER_OCTAVE)
    near = sorted({min(max(code, GAUSSIANS[0]), GAUSSIANS[-1]) for code in range(centre - 14, centre + 9)})
    bits, code = min((coded_bits(counts, gaussian(code, shift)), code) for code in near)
    return code, bits


def decoder_table(frequencies: np.ndarray) -> np.ndarray:
    """Frequencies, uint32 [contexts, ESCAPE + 1] → what every slot decodes to, uint32 [contexts · TOTAL].

    An entry is (frequency − 1) | position within the symbol << 12 | symbol << 24.
    """
    symbol = np.repeat(np.tile(np.arange(ESCAPE + 1, dtype=np.uint32), len(frequencies)), frequencies.reshape(-1))
    context = np.repeat(np.arange(len(frequencies)), TOTAL)
    position = np.tile(np.arange(TOTAL, dtype=np.uint32), len(frequencies)) - cumulative(frequencies)[context, symbol]
    return (frequencies[context, symbol] - 1) | position << PRECISION | symbol << 24


def encoder_table(frequencies: np.ndarray) -> np.ndarray:
    """Frequencies, uint32 [contexts, ESCAPE + 1] → frequency | cumulative frequency << 16, of the same shape."""
    return frequencies | cumulative(frequencies) << 16


def cumulative(frequencies: np.ndarray) -> np.ndarray:
    """Sum of the frequencies of the symbols before each, uint32 [contexts, ESCAPE + 1]."""
    return np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
