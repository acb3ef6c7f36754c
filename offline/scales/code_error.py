"""How much the trellis code errs on Gaussian numbers, by the bits of a pair and by their variance."""

import numpy as np

from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS

CHOICES = np.arange(FEWEST_BITS, MOST_BITS + 1)
# Octaves of the numbers' variance, over the mean square of the code's values; denser where scales are chosen.
LEVELS = np.concatenate((np.arange(-7.0, -2), np.arange(-2, 1, 0.25), np.arange(1.0, 4)))
# Mean squared error over the mean square of the code's values, [CHOICES, LEVELS], with the paths that `paths_by_bits`
# keeps of 64: what `python tests/benchmarks/trellis_code.py --table --rows 192` prints. 16 paths err 5 to 8% more.
# fmt: off
ERRORS = np.array(
    [
        # 2 bits, 64 paths
        (0.00777, 0.01552, 0.03098, 0.06157, 0.10077, 0.12912, 0.13828, 0.14985, 0.16329, 0.17917,
         0.19827, 0.22362, 0.25318, 0.29219, 0.34076, 0.40628, 0.49440, 0.60572, 1.50136, 3.84580),
        # 3 bits, 64 paths
        (0.00777, 0.01552, 0.03111, 0.04406, 0.05080, 0.06390, 0.06909, 0.07474, 0.08170, 0.08987,
         0.09994, 0.11274, 0.12895, 0.15061, 0.18087, 0.22129, 0.27849, 0.35799, 1.06561, 3.11096),
        # 4 bits, 64 paths
        (0.00777, 0.01558, 0.02055, 0.02187, 0.02481, 0.03121, 0.03375, 0.03672, 0.04027, 0.04438,
         0.04972, 0.05644, 0.06560, 0.07833, 0.09684, 0.12461, 0.16376, 0.22286, 0.80453, 2.63215),
        # 5 bits, 64 paths
        (0.00789, 0.01032, 0.01046, 0.01089, 0.01225, 0.01557, 0.01677, 0.01832, 0.02020, 0.02238,
         0.02521, 0.02903, 0.03454, 0.04263, 0.05505, 0.07463, 0.10494, 0.15047, 0.64973, 2.32604),
        # 6 bits, 32 paths
        (0.00522, 0.00529, 0.00533, 0.00552, 0.00623, 0.00791, 0.00855, 0.00932, 0.01028, 0.01151,
         0.01319, 0.01540, 0.01909, 0.02484, 0.03440, 0.05023, 0.07544, 0.11514, 0.56787, 2.15241),
        # 7 bits, 16 paths
        (0.00279, 0.00279, 0.00278, 0.00285, 0.00321, 0.00410, 0.00443, 0.00489, 0.00542, 0.00612,
         0.00709, 0.00865, 0.01125, 0.01581, 0.02382, 0.03772, 0.06015, 0.09648, 0.52412, 2.04963),
        # 8 bits, 8 paths
        (0.00142, 0.00142, 0.00142, 0.00146, 0.00165, 0.00216, 0.00234, 0.00259, 0.00290, 0.00331,
         0.00398, 0.00513, 0.00727, 0.01124, 0.01839, 0.03099, 0.05204, 0.08606, 0.49666, 1.98276),
        # 9 bits, 8 paths
        (0.00071, 0.00071, 0.00071, 0.00073, 0.00084, 0.00108, 0.00118, 0.00130, 0.00147, 0.00172,
         0.00219, 0.00307, 0.00485, 0.00831, 0.01485, 0.02656, 0.04656, 0.07893, 0.47528, 1.92712),
        # 10 bits, 8 paths
        (0.00036, 0.00035, 0.00035, 0.00036, 0.00041, 0.00054, 0.00058, 0.00065, 0.00074, 0.00091,
         0.00127, 0.00201, 0.00359, 0.00678, 0.01292, 0.02408, 0.04321, 0.07440, 0.46085, 1.89017),
    ]
)
# fmt: on
_LOGARITHMS = np.log2(ERRORS)


def code_error(levels: np.ndarray, choice: int) -> np.ndarray:
    """Error over the mean square of the code's values, of numbers whose variance is 2^levels of it; of CHOICES[choice].

    Between and beyond LEVELS it is a power of the variance.
    """
    table = _LOGARITHMS[choice]
    beyond = np.maximum(levels - LEVELS[-1], 0) + np.minimum(levels - LEVELS[0], 0) * (table[1] - table[0])
    return np.exp2(np.interp(levels, LEVELS, table) + beyond)


# Where a code errs least for the variance, by CHOICES; and the error over the variance there.
BEST_LEVELS = LEVELS[(_LOGARITHMS - LEVELS).argmin(1)]
DISTORTION = np.exp2((_LOGARITHMS - LEVELS).min(1))
