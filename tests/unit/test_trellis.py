"""Nearest plane over a trellis: what is stored is what the search found, more paths and bits err less, bits are met."""

import itertools

import numpy as np
import pytest
import torch

from vllm_babai.format import Trellis
from vllm_babai.format.trellis.blob import stored_bits
from vllm_babai.format.trellis.code import MOST_BITS, MULTIPLIERS, root_mean_square, values_of
from vllm_babai.offline.scales.tiles import allocate, row_energies, tile_costs
from vllm_babai.offline.scales.trellis import search_trellis
from vllm_babai.offline.solver.expected import error
from vllm_babai.offline.solver.factor import factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.row_geometry import row_geometry
from vllm_babai.offline.solver.trellis import trellis_plane


def problem(out: int, n: int, paths: int, seed: int = 0) -> tuple[torch.Tensor, Lattice]:
    """A weight [n, out] in the order of the factor, and a lattice with coupled columns and rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    g = torch.randn(4 * out, out, generator=generator) * torch.logspace(-1, 1, out)
    rows = row_geometry((g.T @ g / len(g)).float())
    factor = factorize((x.T @ x / len(x)).double(), "reverse", 0.01)
    return torch.randn(out, n, generator=generator).T[factor.order].contiguous(), Lattice(factor, rows, paths)


@pytest.mark.parametrize(("out", "n"), [(16, 64), (40, 96), (300, 130), (5, 2)])
def test_the_stored_weight_is_what_the_search_found(out: int, n: int) -> None:
    weight, lattice = problem(min(out, 256), n, 8)
    solution = search_trellis(weight, lattice, 3.5, 0)
    dense = Trellis.encode(solution.weight).decode().dequantize()
    assert torch.equal(weight - dense.T[lattice.columns.order], solution.residual)


def test_with_all_paths_a_row_is_the_closest_of_all() -> None:
    """Four pairs of two bits: 256 rows of symbols, of which one has the least error."""
    weight, lattice = problem(1, 8, 256)
    scale = torch.tensor([float(weight.std()) / root_mean_square()])
    found = error(trellis_plane(weight, lattice, scale, np.full((1, 4), 2, np.uint8)).residual, lattice)
    states, values = np.zeros(256, np.uint32), []
    symbols = np.array(list(itertools.product(range(4), repeat=4)), np.uint32)
    for pair in range(4):
        states = states * np.uint32(4) + symbols[:, pair]
        values.append(values_of(states * MULTIPLIERS[2]))
    every = torch.from_numpy(np.stack(values, 1).reshape(256, 8)) * scale  # from the first column on
    residuals = weight[:, 0] - every.flip(1)
    least = min(error(residual[:, None], lattice) for residual in residuals)
    assert found == pytest.approx(least, rel=1e-4)


def test_more_paths_and_more_bits_err_less() -> None:
    errors = {}
    for paths, rate in ((1, 3.0), (16, 3.0), (64, 3.0), (16, 4.0)):
        weight, lattice = problem(64, 128, paths)
        errors[paths, rate] = error(search_trellis(weight, lattice, rate, 0).residual, lattice)
    assert errors[64, 3.0] < errors[16, 3.0] < errors[1, 3.0]
    assert errors[16, 4.0] < errors[16, 3.0] / 3


def test_the_same_twice() -> None:
    weight, lattice = problem(48, 64, 16)
    first, second = (search_trellis(weight, lattice, 2.5, 0).weight for _ in range(2))
    assert torch.equal(Trellis.encode(first).trellis, Trellis.encode(second).trellis)


@pytest.mark.parametrize("rate", [1.75, 2.125, 3.3, 4.6])
def test_rates_are_met_and_go_where_errors_count(rate: float) -> None:
    linears = []
    for seed, scale in ((0, 1.0), (1, 0.1), (2, 3.0)):
        weight, lattice = problem(200, 192, 1, seed)
        linears.append(tile_costs(row_energies(scale * weight, lattice, 0)))
    rates = allocate(linears, rate)
    weights = sum(200 * 192 for _ in linears)
    bits = sum(stored_bits(own, linear.shape) for own, linear in zip(rates, linears, strict=True))
    assert rate - 0.005 * rate <= bits / weights <= rate
    assert rates[1].mean() < rates[0].mean() < rates[2].mean()
    assert max(own.max() for own in rates) <= MOST_BITS


@pytest.mark.parametrize("rate", [1.5, 3.0])
@pytest.mark.parametrize("uneven", [0.0, 0.5])
def test_the_error_is_as_expected(rate: float, uneven: float) -> None:
    """Also where inputs, and so pivots, are uneven. uneven: standard deviation of the logarithms of their scales."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1024, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    x = torch.randn(1024, 256, generator=generator) * 20 + x  # correlated, but not so much that pivots tell little
    x *= (uneven * torch.randn(256, generator=generator)).exp()
    lattice = Lattice(factorize((x.T @ x / len(x)).double(), "reverse", 0.01), None, 64)
    weight = torch.randn(256, 64, generator=generator)
    solution = search_trellis(weight, lattice, rate, 0)
    assert error(solution.residual, lattice) == pytest.approx(solution.predicted, rel=0.1)


def test_coupled_rows_and_columns_err_as_expected() -> None:
    weight, lattice = problem(256, 256, 64)
    solution = search_trellis(weight, lattice, 3.0, 0)
    assert error(solution.residual, lattice) == pytest.approx(solution.predicted, rel=0.1)


def test_rows_and_columns_of_zeros_stay_zero() -> None:
    weight, lattice = problem(40, 96, 8)
    weight[:, 3], weight[5] = 0, 0
    dense = search_trellis(weight, lattice, 2.5, 0).weight.dequantize()
    assert not dense[3].any()
    assert dense.isfinite().all()
    assert not search_trellis(torch.zeros_like(weight), lattice, 2.5, 0).weight.dequantize().any()
