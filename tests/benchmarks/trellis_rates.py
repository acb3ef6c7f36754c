"""What each part of the trellis's allocation of bits is worth: `python tests/benchmarks/trellis_rates.py [--bits 4]`.

Quantizes the bundled model with one number of bits in all tiles, then in as many bytes with bits for linears, chunks of
columns and blocks of rows, each added to those before. A line each, as `constants.py` prints it: bits per weight, the
expected loss that the solver ends at, loss and KL divergence as measured, seconds.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from constants import line, options_for
from harness import command_line

from vllm_babai.format.trellis.blob import stored_bits
from vllm_babai.offline.plan import forecast, plan
from vllm_babai.offline.plan.forecast import Forecast
from vllm_babai.offline.plan.plan import PlannedLinear
from vllm_babai.offline.run_folder import REPORT
from vllm_babai.offline.scales import tiles, trellis
from vllm_babai.offline.scales.tiles import RowEnergies, TileCosts, tile_costs

ROOM = 0.25  # bits for the tables of tiles and rows, at the first run, which takes what it takes
PARTS = (
    "nothing",
    "linears",
    "columns",
    "rows as they lie",
    "rows sorted",
)  # that bits are chosen by, each with those before


def averaged(costs: TileCosts, axes: tuple[int, ...]) -> TileCosts:
    """Costs that know no difference between blocks of rows (axis 0) or between tiles of columns (axis 1)."""
    energies = np.broadcast_to(costs.energies.mean(axes, keepdims=True), costs.energies.shape)
    found = replace(costs, energies=energies.astype(np.float32))
    if 0 in axes:
        found = replace(found, rows=_alike(costs.rows), row_spread=_alike(costs.row_spread))
    if 1 in axes:
        found = replace(found, columns=_alike(costs.columns), column_spread=_alike(costs.column_spread))
    return found


def _alike(values: np.ndarray) -> np.ndarray:
    return np.full_like(values, values.mean())


@contextmanager
def chosen_by(part: str, bits: int) -> Iterator[None]:
    """Runs inside choose bits by this one of PARTS and those before it. bits: of all pairs, by nothing."""
    at = PARTS.index(part)
    axes = tuple(axis for axis, needed in ((0, 3), (1, 2)) if at < needed)

    def costs(rows: RowEnergies) -> TileCosts:
        return averaged(tile_costs(rows), axes) if axes else tile_costs(rows)

    def alike(forecasts: list[Forecast], rate: float) -> list[PlannedLinear]:
        found = []
        for linear in forecasts:
            rates = np.full(linear.tiles.energies.shape, bits, np.uint8)
            size = stored_bits(rates, linear.tiles.shape) / linear.weights
            found.append(PlannedLinear(linear.name, linear.weights, size, linear.tiles.error(rates) / 2))
        return found

    with (
        patch.object(forecast, "tile_costs", costs),
        patch.object(trellis, "tile_costs", costs),
        patch.object(tiles, "SPAN", tiles.SPAN if part == PARTS[-1] else 1),
        patch.dict(plan.PLANNERS, {} if at else {"trellis": alike}),
    ):
        yield


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--bits", type=int, default=4, help="of a pair (default: %(default)s)")
    parser.add_argument("--calibrate", type=int, default=32, help="sequences of 256 tokens")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens to measure on; 0: do not")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        arguments.format, arguments.size = "trellis", arguments.bits / 2 + ROOM
        options = options_for(arguments, scratch)
        print("bits chosen by     bits     expected loss  measured loss     KL divergence     seconds")
        for part in PARTS:
            with chosen_by(part, arguments.bits):
                print(f"{part:16}   {line(options, scratch, arguments.windows)}", flush=True)
            if part == PARTS[0]:
                size = json.loads((scratch / "out" / REPORT).read_text())["bits_per_weight"]
                options = replace(options, target_bits=size)


if __name__ == "__main__":
    main()
