"""Nearest plane over a trellis: the values of a linear are those of a code, and every path of the search carries a
state of it.

Row by row as in `joint_plane`, a path already has targets of its own: what its errors carry into the columns to come,
and what the rows decided before carry into its row. Here it has a state of the code besides (`format.trellis.code`),
and at every pair of columns it goes on with each of the 2^b symbols. Babai's error feedback, the coupling of rows and
the search through the code are one search.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_babai.compiled import parallel_map
from vllm_babai.format.trellis.code import MOST_BITS, MULTIPLIERS
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.row_geometry import RowBlock, equal_rows

LEAF = 256  # columns decided row by row between matrix products; at their end one path is left
MOST_OFFERS = 2048  # of all paths at one pair
FEWEST_PATHS = 8


@dataclass(frozen=True)
class TrellisPlane:
    """What the search found. symbols: uint16 [out, n / 2], in the order of the stream. residual: weight less value,
    float32 [n, out] in the factor's order.
    """

    symbols: np.ndarray
    residual: Tensor


def paths_by_bits(paths: int) -> np.ndarray:
    """How many paths to keep by the bits of a pair, int64: with many bits fewer do, and time goes into symbols.

    Of 64 paths, 32, 16 and 8 are kept at 6, 7 and 8 bits. A choice: from 16 to 8 paths Gaussian numbers lose 0.2 to 0.3
    dB at 6 to 10 bits, in half of the time (`python tests/benchmarks/trellis_code.py --paths 8 16`).
    """
    kept = [max(min(FEWEST_PATHS, paths), min(paths, MOST_OFFERS >> bits)) for bits in range(MOST_BITS + 1)]
    return np.array(kept, np.int64)


def trellis_plane(weight: Tensor, lattice: Lattice, scales: Tensor, bits: np.ndarray) -> TrellisPlane:
    """Decide every symbol; blocks of rows run in parallel, on the CPU wherever the tensors are.

    weight: float32 [n, out] in the factor's order, n even; the last position is decided first and begins the stream.
    scales: float32 [out], of the code's values. bits: uint8 [out, n / 2], of each pair in the order of the stream.
    """
    factor, kept = lattice.columns, paths_by_bits(lattice.paths)
    rows = lattice.rows or equal_rows(weight.shape[1])
    host, host_scales = weight.T.contiguous().cpu(), scales.cpu().numpy()
    upper, pivots = factor.unit_upper.cpu(), factor.pivots.float().cpu().numpy()
    symbols, residual = np.empty((len(host), host.shape[1] // 2), np.uint16), torch.empty_like(host)

    def solve(block: RowBlock) -> None:
        chosen = block.rows.cpu().numpy()
        problem = _Block(host[chosen], host_scales[chosen], bits[chosen], block.unit_upper.cpu().contiguous().numpy())
        symbols[chosen], residual[chosen] = _solve_block(problem, upper, pivots, kept)

    parallel_map(solve, rows.blocks)
    return TrellisPlane(symbols, residual.T.contiguous().to(weight.device))


@dataclass(frozen=True)
class _Block:
    """Rows that are solved together, in the order of their factor; see `trellis_loops.Rows`."""

    weight: Tensor
    scales: np.ndarray
    bits: np.ndarray
    upper: np.ndarray


def _solve_block(block: _Block, upper: Tensor, pivots: np.ndarray, paths: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Symbols and residual [rows, n] of a block of rows, panel by panel from the last position."""
    from vllm_babai.offline.solver.trellis_loops import Found, Panel, Rows, decide  # numba takes a second to import

    carried = block.weight.clone()
    count, columns = carried.shape
    residual = torch.empty_like(carried)
    symbols, states = np.empty((count, columns // 2), np.uint16), np.zeros(count, np.uint32)
    for high in range(columns, 0, -LEAF):
        low = max(0, high - LEAF)
        panel = slice(low, high)
        pairs = slice((columns - high) // 2, (columns - low) // 2)
        here = np.empty((count, high - low), np.float32)
        found = Found(np.empty((count, (high - low) // 2), np.uint16), states, here)
        decide(
            Panel(upper[panel, panel].T.contiguous().numpy(), pivots[panel].copy(), MULTIPLIERS, paths),
            Rows(
                carried[:, panel].contiguous().numpy(),
                block.weight[:, panel].contiguous().numpy(),
                block.scales,
                np.ascontiguousarray(block.bits[:, pairs]),
                block.upper,
            ),
            found,
        )
        residual[:, panel] = torch.from_numpy(here)
        symbols[:, pairs] = found.symbols
        carried[:, :low].addmm_(residual[:, panel], upper[:low, panel].T)
    return symbols, residual
