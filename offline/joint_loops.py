"""The compiled loops of joint nearest plane. Importing this module imports numba: import it where it is used."""

import numpy as np

from vllm_babai.format.rans import compiled


@compiled
def decide(
    low: int,
    high: int,
    carried: np.ndarray,
    weight: np.ndarray,
    steps: np.ndarray,
    inverse: np.ndarray,
    upper: np.ndarray,
    row_upper_t: np.ndarray,
    edges: np.ndarray,
    price: np.ndarray,
    integers: np.ndarray,
    residual: np.ndarray,
    targets: np.ndarray,
) -> None:
    """Decide columns high − 1 … low, the rows of each from the last to the first."""
    rows = weight.shape[1]
    for j in range(high - 1, low - 1, -1):
        column, target = carried[j], targets[j]
        for k in range(j + 1, high):
            share = upper[j, k]
            for i in range(rows):
                column[i] += share * residual[k, i]
        target[:] = column
        for i in range(rows - 1, -1, -1):
            integer = np.rint(target[i] * inverse[j, i])
            value = integer * steps[j, i]
            edge = min(max(integer, edges[0]), edges[1])
            if edge != integer:
                near, far = target[i] - value, target[i] - edge * steps[j, i]
                if far * far - near * near <= price[j, i]:
                    integer, value = edge, edge * steps[j, i]
            integers[j, i] = integer
            residual[j, i] = weight[j, i] - value
            error = column[i] - value
            for k in range(i):
                target[k] += row_upper_t[i, k] * error
