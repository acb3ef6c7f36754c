"""Joint nearest plane is Babai's algorithm on the Kronecker product of two lattices."""

import os
import threading
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.solver import paths
from vllm_babai.offline.solver.expected import error, expected_error
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.joint_plane import LEAF, joint_plane
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import Rounding, nearest_plane
from vllm_babai.offline.solver.row_geometry import RowGeometry, row_geometry
from vllm_babai.offline.solver.solve import paths_gain, solve


def covariance(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5).double()
    return inputs.T @ inputs / len(inputs)


def in_float64(factor: Factor) -> Factor:
    return replace(factor, unit_upper=factor.unit_upper.double())


def random_layer(n: int, out: int, block: int, seed: int = 0) -> tuple[Tensor, Lattice]:
    """Weight, [n, out], and lattice of n inputs and of outputs in blocks; float64."""
    columns = in_float64(factorize(covariance(n, seed), "activation", 0.01))
    blocks = torch.zeros(out, block, dtype=torch.float64)
    for first in range(0, out, block):
        size = min(block, out - first)
        blocks[first : first + size, :size] = covariance(size, seed + first + 1)
    rows = row_geometry(blocks)
    rows = RowGeometry([replace(b, unit_upper=b.unit_upper.double()) for b in rows.blocks], rows.pivots)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, out, generator=generator, dtype=torch.float64), Lattice(columns, rows)


def lattice_of(unit_upper: Tensor) -> Lattice:
    n = len(unit_upper)
    return Lattice(Factor(unit_upper, torch.ones(n, dtype=torch.float64), torch.arange(n), 0.0))


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), out=st.integers(1, 12), block=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_integers_are_those_of_the_kronecker_lattice(n: int, out: int, block: int, seed: int) -> None:
    weight, lattice = random_layer(n, out, block, seed)
    steps = 0.1 + torch.rand(1, out, dtype=torch.float64)
    found = solve(weight, lattice, steps)
    assert lattice.rows is not None
    for block in lattice.rows.blocks:
        rows = block.rows
        kronecker = lattice_of(torch.kron(lattice.columns.unit_upper, block.unit_upper))
        flat_weight, flat_steps = (t[:, rows].reshape(-1, 1) for t in (weight, steps.expand_as(weight)))
        expected = nearest_plane(flat_weight, kronecker, flat_steps)
        assert torch.equal(found.integers[:, rows].flatten(), expected.integers[:, 0])
        torch.testing.assert_close(found.targets[:, rows].flatten(), expected.targets[:, 0])


def test_error_and_its_bound() -> None:
    weight, lattice = random_layer(60, 20, 8)
    steps = torch.full((1, 20), 0.3, dtype=torch.float64)
    residual = solve(weight, lattice, steps).residual
    assert lattice.rows is not None
    upper = lattice.columns.pivots.sqrt()[:, None] * lattice.columns.unit_upper
    direct = 0.0
    for block in lattice.rows.blocks:
        part = upper @ residual[:, block.rows] @ (block.pivots.sqrt()[:, None] * block.unit_upper).T
        direct += float(part.square().sum())
    assert error(residual, lattice) == pytest.approx(direct)
    assert direct <= 3 * expected_error(steps, lattice, 20)


def test_mean_error_of_uniform_targets() -> None:
    weight, lattice = random_layer(200, 300, 100)
    steps = torch.linspace(0.8, 1.2, 300, dtype=torch.float64)[None]
    measured = error(solve(1000 * weight, lattice, steps).residual, lattice)
    assert measured == pytest.approx(expected_error(steps, lattice, 300), rel=0.02)


def test_independent_rows_are_plain_nearest_plane() -> None:
    weight, lattice = random_layer(50, 10, 1)
    steps = torch.full((1, 10), 0.3, dtype=torch.float64)
    plain = nearest_plane(weight, lattice, steps)
    assert torch.equal(solve(weight, lattice, steps).integers, plain.integers)


@pytest.mark.parametrize("share", [0.0, 1.0, 4.0])
def test_a_price_counts_as_in_the_kronecker_lattice(share: float) -> None:
    weight, lattice = random_layer(40, 12, 5)
    assert lattice.rows is not None
    steps = torch.where(torch.arange(12) % 2 == 0, 0.3, -0.3).double()[None]
    price = share * torch.rand(40, 12, dtype=torch.float64)
    found = solve(weight, lattice, steps, Rounding(low=-2, high=1, price=price))
    for block in lattice.rows.blocks:
        rows = block.rows
        kronecker = lattice_of(torch.kron(lattice.columns.unit_upper, block.unit_upper))
        flat_weight, flat_steps, flat_price = (
            t[:, rows].reshape(-1, 1) for t in (weight, steps.expand_as(weight), price)
        )
        expected = nearest_plane(flat_weight, kronecker, flat_steps, Rounding(low=-2, high=1, price=flat_price))
        assert torch.equal(found.integers[:, rows].flatten(), expected.integers[:, 0])
    if share == 0:
        assert torch.equal(found.integers, solve(weight, lattice, steps).integers)


def test_many_paths_find_the_closest_point() -> None:
    weight, lattice = random_layer(5, 20, 1)
    found = solve(weight, replace(lattice, rows=None, paths=500), torch.ones(1, 1, dtype=torch.float64))
    points = torch.tensor(list(product(range(-4, 5), repeat=5)), dtype=torch.float64).T
    for row in range(20):
        errors = ((weight[:, row, None] - points).T @ lattice.columns.unit_upper.T).square() @ lattice.columns.pivots
        assert torch.equal(found.integers[:, row], points[:, errors.argmin()])


@pytest.mark.parametrize("n", [60, LEAF + 44])
def test_error_of_several_paths(n: int) -> None:
    """It is less, as predicted, and within the bound of nearest plane."""
    weight, one = random_layer(n, 128, 32)
    several, steps = replace(one, paths=8), torch.linspace(0.01, 0.02, 128, dtype=torch.float64)[None]
    errors = [error(solve(weight, lattice, steps).residual, lattice) for lattice in (one, several)]
    expected = paths_gain(several) * expected_error(steps, several, 128)
    assert errors[1] < 0.98 * errors[0]
    assert errors[1] == pytest.approx(expected, rel=0.03)
    assert errors[1] <= 3 * expected_error(steps, several, 128)


def test_paths_of_independent_rows() -> None:
    weight, lattice = random_layer(50, 10, 1)
    steps = torch.full((1, 10), 0.3, dtype=torch.float64)
    alone = replace(lattice, rows=None, paths=4)
    several = replace(lattice, paths=4)
    assert torch.equal(solve(weight, alone, steps).integers, solve(weight, several, steps).integers)


def test_several_paths_weigh_what_one_weighs() -> None:
    """Shrinkage and prices count in what is made small."""
    weight, lattice = random_layer(60, 40, 1)
    pivots, steps = lattice.columns.pivots[:, None], torch.full((1, 40), 0.5, dtype=torch.float64)
    shrinkage = 0.5 + 0.5 * torch.rand(60, 40, dtype=torch.float64)
    price = 0.3 * torch.rand(60, 40, dtype=torch.float64)
    rounding = Rounding(shrinkage, low=-1, high=1, price=price)

    def cost(paths: int) -> float:
        found = solve(weight, replace(lattice, rows=None, paths=paths), steps, rounding)
        values = found.integers * steps
        each = (found.targets - values).square() + (1 / shrinkage - 1) * values.square()
        return float((pivots * (each + price * (found.integers.abs() > 1))).sum())

    assert cost(32) < cost(4) < cost(1)


def test_targets_shrunk_to_nothing_become_zeros() -> None:
    weight, lattice = random_layer(30, 8, 4)
    shrinkage = (torch.arange(30) % 3 > 0).double()[:, None].expand(30, 8)
    found = solve(weight, replace(lattice, paths=4), torch.full((1, 8), 0.3).double(), Rounding(shrinkage))
    assert torch.equal(found.integers.abs().amax(1) > 0, shrinkage[:, 0] > 0)


def test_an_integer_beyond_int16_is_an_error() -> None:
    weight, lattice = random_layer(5, 4, 4)
    assert lattice.rows is not None
    with pytest.raises(QuantizationError, match="more than 32767: the step is too small"):
        solve(weight, lattice, torch.full((1, 4), 1e-6, dtype=torch.float64))


def reference(weight: Tensor, lattice: Lattice, steps: Tensor, rounding: Rounding, price: Tensor) -> Tensor:
    """Integers of up to LEAF columns by the M-algorithm as one would write it down; steps, price: [n, out]."""
    assert lattice.rows is not None
    upper, pivots, integers = lattice.columns.unit_upper, lattice.columns.pivots, torch.zeros_like(weight)
    for block in lattice.rows.blocks:
        gaps = torch.zeros_like(weight)  # c − s∘z of the rows decided
        for i in reversed(range(len(block.rows))):
            row = block.rows[i]
            from_rows = gaps[:, block.rows[i + 1 :]] @ block.unit_upper[i, i + 1 :]
            survivors = [
                (0.0, torch.zeros(len(weight)).double(), from_rows + weight[:, row])
            ]  # cost, integers, targets
            for j in reversed(range(len(weight))):
                step, offers = steps[j, row], []
                for cost, z, targets in survivors:
                    inner = rounding.shrinkage * targets[j] / step
                    nearest = torch.round(inner)
                    edge = nearest.clamp(rounding.low, rounding.high)
                    other = edge if edge != nearest else nearest + (1 if inner >= nearest else -1)
                    for integer in (nearest, other)[: 2 if lattice.paths > 1 or edge != nearest else 1]:
                        spread = (1 / rounding.shrinkage - 1) * (step * integer) ** 2
                        beyond = price[j, row] * bool(integer < rounding.low or integer > rounding.high)
                        own = pivots[j] * ((targets[j] - step * integer) ** 2 + spread + beyond)
                        carried = upper[:j, j] * (weight[j, row] - step * integer)
                        after = torch.cat((targets[:j] + carried, targets[j:]))
                        offers.append((cost + float(own), z.index_fill(0, torch.tensor(j), float(integer)), after))
                survivors = sorted(offers, key=lambda offer: offer[0])[: lattice.paths]
            _, integers[:, row], targets = survivors[0]
            gaps[:, row] = targets - from_rows - steps[:, row] * integers[:, row]
    return integers


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 12),
    out=st.integers(1, 6),
    block=st.integers(1, 4),
    paths=st.integers(1, 5),
    shrinkage=st.floats(0.3, 1),
    price=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_compiled_loops_are_the_reference(
    n: int, out: int, block: int, paths: int, shrinkage: float, price: float, seed: int
) -> None:
    weight, lattice = random_layer(n, out, block, seed)
    lattice = replace(lattice, paths=paths)
    generator = torch.Generator().manual_seed(seed)
    steps = 0.3 + torch.rand(n, out, generator=generator, dtype=torch.float64)
    prices = price * torch.rand(n, out, generator=generator, dtype=torch.float64)
    rounding = Rounding(shrinkage, low=-1, high=1, price=prices)
    expected = reference(weight, lattice, steps, rounding, prices)
    found = joint_plane(weight, lattice, steps, rounding)
    assert torch.equal(found.integers, expected)
    torch.testing.assert_close(found.residual, weight - steps * expected)


class OnDevice(Tensor):
    """A tensor that says it is on a GPU, and counts its copies to the CPU."""

    copies = 0
    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

    def cpu(self) -> Tensor:  # type: ignore[override]
        OnDevice.copies += 1
        return self.as_subclass(Tensor)


def test_a_factor_on_a_device_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks of rows and however many solves use it."""
    monkeypatch.setattr(OnDevice, "copies", 0)
    weight, lattice = random_layer(20, 12, 3)
    elsewhere = replace(lattice.columns, unit_upper=lattice.columns.unit_upper.as_subclass(OnDevice))
    steps = torch.full((1, 12), 0.3, dtype=torch.float64)
    for rows in (lattice.rows, None):
        found = joint_plane(weight, Lattice(elsewhere, rows, paths=2), steps)
        expected = joint_plane(weight, replace(lattice, rows=rows, paths=2), steps)
        assert torch.equal(found.integers, expected.integers)
    assert OnDevice.copies == 1


@pytest.mark.parametrize(("cores", "threads", "each"), [(8, 8, 2), (4, 4, 1), (2, 8, 1), (8, 1, 1)])
def test_blocks_take_no_more_threads_than_cores(
    cores: int, threads: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(*_: object) -> None:
        seen.append(torch.get_num_threads())
        busy.wait(10)

    before, seen = torch.get_num_threads(), []
    busy = threading.Barrier(min(cores, 4))  # so that every worker takes its share of the four blocks
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(paths, "decide", note)
    weight, lattice = random_layer(20, 12, 3)
    try:
        torch.set_num_threads(threads)
        joint_plane(weight, lattice, torch.ones(1, 12, dtype=torch.float64))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [each] * 4
    assert each * min(cores, 4) <= cores
