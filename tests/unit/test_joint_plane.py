"""Joint nearest plane is Babai's algorithm on the Kronecker product of two lattices."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.joint_plane import LEAF, RowGeometry, joint_plane, row_geometry
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import Rounding, nearest_plane


def covariance(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5).double()
    return inputs.T @ inputs / len(inputs)


def in_float64(factor: Factor) -> Factor:
    return Factor(factor.unit_upper.double(), factor.pivots, factor.order, factor.damping)


def random_layer(n: int, out: int, block: int, seed: int = 0) -> tuple[Tensor, Lattice]:
    """Weight, [n, out], and lattice of n inputs and of outputs in blocks; float64."""
    columns = in_float64(factorize(covariance(n, seed), "activation", 0.01))
    blocks = torch.zeros(out, block, dtype=torch.float64)
    for first in range(0, out, block):
        size = min(block, out - first)
        blocks[first : first + size, :size] = covariance(size, seed + first + 1)
    rows = row_geometry(blocks)
    rows = RowGeometry([(first, in_float64(factor)) for first, factor in rows.blocks], rows.pivots)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, out, generator=generator, dtype=torch.float64), Lattice(columns, rows)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), out=st.integers(1, 12), block=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_integers_are_those_of_the_kronecker_lattice(n: int, out: int, block: int, seed: int) -> None:
    weight, lattice = random_layer(n, out, block, seed)
    steps = 0.1 + torch.rand(1, out, dtype=torch.float64)
    found = lattice.solve(weight, steps)
    assert lattice.rows is not None
    for first, factor in lattice.rows.blocks:
        rows = first + factor.order
        upper = torch.kron(lattice.columns.unit_upper, factor.unit_upper)
        flat_weight, flat_steps = (t[:, rows].reshape(-1, 1) for t in (weight, steps.expand_as(weight)))
        expected = nearest_plane(flat_weight, upper, flat_steps)
        assert torch.equal(found.integers[:, rows].flatten(), expected.integers[:, 0])
        torch.testing.assert_close(found.targets[:, rows].flatten(), expected.targets[:, 0])


def test_error_and_its_bound() -> None:
    weight, lattice = random_layer(60, 20, 8)
    steps = torch.full((1, 20), 0.3, dtype=torch.float64)
    residual = lattice.solve(weight, steps).residual
    assert lattice.rows is not None
    upper = lattice.columns.pivots.sqrt()[:, None] * lattice.columns.unit_upper
    direct = 0.0
    for first, factor in lattice.rows.blocks:
        part = upper @ residual[:, first + factor.order] @ (factor.pivots.sqrt()[:, None] * factor.unit_upper).T
        direct += float(part.square().sum())
    assert lattice.error(residual) == pytest.approx(direct)
    assert direct <= 3 * lattice.mean_error(steps, 20)


def test_mean_error_of_uniform_targets() -> None:
    weight, lattice = random_layer(200, 300, 100)
    steps = torch.linspace(0.8, 1.2, 300, dtype=torch.float64)[None]
    measured = lattice.error(lattice.solve(1000 * weight, steps).residual)
    assert measured == pytest.approx(lattice.mean_error(steps, 300), rel=0.02)


def test_independent_rows_are_plain_nearest_plane() -> None:
    weight, lattice = random_layer(50, 10, 1)
    steps = torch.full((1, 10), 0.3, dtype=torch.float64)
    plain = nearest_plane(weight, lattice.columns.unit_upper, steps)
    assert torch.equal(lattice.solve(weight, steps).integers, plain.integers)


@pytest.mark.parametrize("share", [0.0, 1.0, 4.0])
def test_a_price_counts_as_in_the_kronecker_lattice(share: float) -> None:
    weight, lattice = random_layer(40, 12, 5)
    assert lattice.rows is not None
    steps = torch.where(torch.arange(12) % 2 == 0, 0.3, -0.3).double()[None]
    price = share * torch.rand(40, 12, dtype=torch.float64)
    found = lattice.solve(weight, steps, Rounding(low=-2, high=1, price=price))
    for first, factor in lattice.rows.blocks:
        rows = first + factor.order
        upper = torch.kron(lattice.columns.unit_upper, factor.unit_upper)
        flat_weight, flat_steps, flat_price = (
            t[:, rows].reshape(-1, 1) for t in (weight, steps.expand_as(weight), price)
        )
        expected = nearest_plane(flat_weight, upper, flat_steps, Rounding(low=-2, high=1, price=flat_price))
        assert torch.equal(found.integers[:, rows].flatten(), expected.integers[:, 0])
    if share == 0:
        assert torch.equal(found.integers, lattice.solve(weight, steps).integers)


def test_many_paths_find_the_closest_point() -> None:
    weight, lattice = random_layer(5, 20, 1)
    found = replace(lattice, rows=None, paths=500).solve(weight, torch.ones(1, 1, dtype=torch.float64))
    points = torch.tensor(list(product(range(-4, 5), repeat=5)), dtype=torch.float64).T
    for row in range(20):
        errors = ((weight[:, row, None] - points).T @ lattice.columns.unit_upper.T).square() @ lattice.columns.pivots
        assert torch.equal(found.integers[:, row], points[:, errors.argmin()])


@pytest.mark.parametrize("n", [60, LEAF + 44])
def test_error_of_several_paths(n: int) -> None:
    """It is less, as predicted, and within the bound of nearest plane."""
    weight, one = random_layer(n, 128, 32)
    several, steps = replace(one, paths=8), torch.linspace(0.01, 0.02, 128, dtype=torch.float64)[None]
    errors = [lattice.error(lattice.solve(weight, steps).residual) for lattice in (one, several)]
    expected = several.gain * several.mean_error(steps, 128)
    assert errors[1] < 0.98 * errors[0]
    assert errors[1] == pytest.approx(expected, rel=0.03)
    assert errors[1] <= 3 * several.mean_error(steps, 128)


def test_paths_of_independent_rows() -> None:
    weight, lattice = random_layer(50, 10, 1)
    steps = torch.full((1, 10), 0.3, dtype=torch.float64)
    alone = replace(lattice, rows=None, paths=4)
    assert torch.equal(alone.solve(weight, steps).integers, replace(lattice, paths=4).solve(weight, steps).integers)


def test_several_paths_weigh_what_one_weighs() -> None:
    """Shrinkage and prices count in what is made small."""
    weight, lattice = random_layer(60, 40, 1)
    pivots, steps = lattice.columns.pivots[:, None], torch.full((1, 40), 0.5, dtype=torch.float64)
    shrinkage = 0.5 + 0.5 * torch.rand(60, 40, dtype=torch.float64)
    price = 0.3 * torch.rand(60, 40, dtype=torch.float64)
    rounding = Rounding(shrinkage, low=-1, high=1, price=price)

    def cost(paths: int) -> float:
        found = replace(lattice, rows=None, paths=paths).solve(weight, steps, rounding)
        values = found.integers * steps
        each = (found.targets - values).square() + (1 / shrinkage - 1) * values.square()
        return float((pivots * (each + price * (found.integers.abs() > 1))).sum())

    assert cost(32) < cost(4) < cost(1)


def test_targets_shrunk_to_nothing_become_zeros() -> None:
    weight, lattice = random_layer(30, 8, 4)
    shrinkage = (torch.arange(30) % 3 > 0).double()[:, None].expand(30, 8)
    found = replace(lattice, paths=4).solve(weight, torch.full((1, 8), 0.3).double(), Rounding(shrinkage))
    assert torch.equal(found.integers.abs().amax(1) > 0, shrinkage[:, 0] > 0)


def test_an_integer_beyond_int16_is_an_error() -> None:
    weight, lattice = random_layer(5, 4, 4)
    assert lattice.rows is not None
    with pytest.raises(QuantizationError, match="more than 32767: the step is too small"):
        joint_plane(weight, lattice.columns, lattice.rows, torch.full((1, 4), 1e-6, dtype=torch.float64))
