"""The pair trellis: a row is a stream of bits, of which a window of 32 gives the values of a pair of columns.

A pair takes b more bits of its row's stream: state = state · 2^b + symbol, modulo 2³². One multiplication scrambles
the state, word = state · MULTIPLIERS[b] modulo 2³², and word & MASK is a pair of fp16 bit patterns: the low half is the
value of the even column, the high half that of the odd one. MASK keeps the sign, two bits of the exponent and the
mantissa, subnormal numbers included, so values are even up to 2⁻¹³ and get sparser up to 2⁻¹¹.

Computed codes on a sliding window are those of QTIP (arXiv 2406.11235); two values from one product, no table, and no
tiles are this project's.
"""

import numpy as np

MASK = 0x8FFF8FFF
UNIT = 2.0**-24  # of fp16's subnormal numbers; every value of the code is a whole number of them
FEWEST_BITS, MOST_BITS = 2, 10  # of a pair
TILE_ROWS, TILE_COLUMNS = 16, 64  # what has one number of bits: a vector of rows; whole 32-bit words of each

# By the bits of a pair; those of fewer than FEWEST_BITS are not used. Found by a search over 1000 random multipliers
# for each width, ranked by distortion with one path, of which the best were compared with 8 paths. Those of 9 and 10
# bits come from `python tests/benchmarks/trellis_code.py --search`, which ranks them in the same way and tries the best
# with 16 paths; the search for the others was not repeated with it.
MULTIPLIERS = np.array(
    [
        *(0, 0, 0x3BBD85A1, 0x6D7D2377, 0x41EE7ED1, 0xF25867C1),
        *(0x9394C293, 0x8FCB4199, 0xB303FCD9, 0xBB1EB813, 0xBB1EB813),
    ],
    np.uint32,
)


def values_of(words: np.ndarray) -> np.ndarray:
    """Scrambled states, uint32 [...] → values of their pairs, float32 [..., 2]; the even column's comes first."""
    masked = np.ascontiguousarray(words & np.uint32(MASK)).astype("<u4")
    return masked.view("<f2").reshape(*words.shape, 2).astype(np.float32)


def root_mean_square() -> float:
    """Of all values of the code."""
    return float(np.sqrt(np.mean(values_of(np.arange(1 << 16, dtype=np.uint32))[:, 0].astype(np.float64) ** 2)))
