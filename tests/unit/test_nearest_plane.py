"""Proofs of the solver: it is GPTQ in the opposite order, its error is bounded and predictable, and it is a good
solution of the closest-vector problem."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.solver.expected import mean_error, squared_error
from vllm_babai.offline.solver.factor import ORDERS, Factor, Order, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.nearest_plane import NearestPlane, Rounding, nearest_plane
from vllm_babai.offline.solver.solve import solve


def random_hessian(n: int, seed: int, condition: float = 1e3) -> Tensor:
    """XᵀX of correlated inputs whose variances spread over `condition`, float64 [n, n]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n, dtype=torch.float64) + 0.5 * torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    spread = condition ** torch.rand(n, generator=generator, dtype=torch.float64).sub(0.5).div(2)
    inputs = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) @ mix * spread
    return inputs.T @ inputs / len(inputs)


def random_weight(out: int, n: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(out, n, generator=generator, dtype=torch.float64)


def factorize64(hessian: Tensor, order: Order, damping: float) -> Factor:
    """The factor in float64 throughout. It is exactly that of `exact_hessian`, which differs by float32 rounding."""
    factor = factorize(hessian, order, damping)
    return replace(factor, unit_upper=factor.unit_upper.double())


def exact_hessian(factor: Factor) -> Tensor:
    """The Hessian whose factor this is exactly, float64 [n, n], features in the model's order."""
    back = torch.argsort(factor.order)
    return (factor.unit_upper.T @ (factor.pivots[:, None] * factor.unit_upper))[back][:, back]


def plane_of(weight: Tensor, factor: Factor, steps: Tensor) -> NearestPlane:
    """Nearest plane; weight, steps: [out, n], features in the model's order."""
    basis_weight, basis_steps = (tensor.T[factor.order].contiguous() for tensor in (weight, steps.expand_as(weight)))
    return nearest_plane(basis_weight, Lattice(factor), basis_steps)


def integers_of(solution: NearestPlane, factor: Factor) -> Tensor:
    """Integers [out, n], features in the model's order."""
    integers = torch.empty_like(solution.integers)
    integers[factor.order] = solution.integers
    return integers.T


def gptq(weight: Tensor, hessian: Tensor, steps: Tensor, order: Tensor) -> Tensor:
    """Integers that GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1) finds, without clipping and without blocks.

    weight, steps: [out, n]; hessian: damped, [n, n]; order: features, the first one quantized first. float64.
    """
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, steps = weight[:, order].clone(), steps.expand_as(weight)[:, order]
    integers = torch.empty_like(weight)
    for i, feature in enumerate(order):
        integers[:, feature] = torch.round(rest[:, i] / steps[:, i])
        error = (rest[:, i] - steps[:, i] * integers[:, feature]) / upper[i, i]
        rest[:, i:] -= torch.outer(error, upper[i, i:])
    return integers


def output_error(weight: Tensor, integers: Tensor, steps: Tensor, hessian: Tensor) -> Tensor:
    """Squared error of every output row by its definition, (w − s∘z) H (w − s∘z)ᵀ, [out]."""
    residual = weight - steps * integers
    return ((residual @ hessian) * residual).sum(1)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 150),
    order=st.sampled_from(sorted(ORDERS)),
    damping=st.sampled_from([0.0, 0.01]),
    groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32),
)
def test_integers_are_those_of_gptq_in_the_opposite_order(
    n: int, order: Order, damping: float, groups: int, seed: int
) -> None:
    n = n * groups
    factor = factorize64(random_hessian(n, seed), order, damping)
    weight = random_weight(20, n, seed + 1)
    steps = (0.05 + 0.3 * random_weight(20, groups, seed + 2).abs()).repeat_interleave(n // groups, 1)
    expected = gptq(weight, exact_hessian(factor), steps, factor.order.flip(0))
    assert torch.equal(integers_of(plane_of(weight, factor, steps), factor), expected)


def test_opposite_of_the_activation_order_is_act_order_of_gptq() -> None:
    hessian = random_hessian(100, seed=0)
    factor = factorize64(hessian, "activation", 0.01)
    assert torch.equal(factor.order.flip(0), torch.argsort(hessian.diagonal(), descending=True))


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_integers_on_captured_hessians(captured: dict[str, tuple[Tensor, Tensor]], order: Order) -> None:
    for weight, hessian in captured.values():
        factor = factorize64(hessian, order, 0.01)
        steps = weight.abs().amax(1, keepdim=True).double() / 4.3  # no target is half way between integers
        found = integers_of(plane_of(weight[:64].double(), factor, steps[:64]), factor)
        expected = gptq(weight[:64].double(), exact_hessian(factor), steps[:64], factor.order.flip(0))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 100.0])
def test_no_row_exceeds_the_bound(order: Order, spread: float) -> None:
    factor = factorize64(random_hessian(90, seed=3), order, 0.01)
    weight, steps = random_weight(200, 90, 1, spread), 0.1 + random_weight(200, 1, 2).abs()
    solution = plane_of(weight, factor, steps)
    error = output_error(weight, integers_of(solution, factor), steps, exact_hessian(factor))
    bound = steps[:, 0].square() * factor.pivots.sum() / 4
    assert torch.all(error <= bound * (1 + 1e-9))
    torch.testing.assert_close(3 * mean_error(steps.T, factor), bound)
    torch.testing.assert_close(squared_error(solution.residual, factor), error, rtol=1e-6, atol=1e-12)


def test_the_bound_holds_on_captured_hessians(captured: dict[str, tuple[Tensor, Tensor]]) -> None:
    for weight, hessian in captured.values():
        factor = factorize64(hessian, "activation", 0.01)
        steps = weight.abs().amax(1, keepdim=True).double() / 4.5
        solution = plane_of(weight.double(), factor, steps)
        error = output_error(weight.double(), integers_of(solution, factor), steps, exact_hessian(factor))
        assert torch.all(error <= 3 * mean_error(steps.T, factor) * (1 + 1e-9))


def test_the_bound_is_reached_half_way_between_planes() -> None:
    factor = factorize64(torch.diag(torch.tensor([1.0, 4.0, 9.0])), "natural", 0.0)
    weight, steps = torch.full((1, 3), 0.5, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    error = squared_error(plane_of(weight, factor, steps).residual, factor)
    torch.testing.assert_close(error, 3 * mean_error(steps, factor))


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 12), order=st.sampled_from(sorted(ORDERS)), seed=st.integers(0, 2**32))
def test_mean_error_of_uniform_targets(n: int, order: Order, seed: int) -> None:
    """Within 2%, more than five standard deviations of the mean of 150,000 squares of uniform numbers."""
    factor = factorize64(random_hessian(n, seed), order, 0.0)
    weight = random_weight(100_000, n, seed + 1, spread=1000.0)  # so wide that targets are uniform between integers
    steps = 0.8 + 0.4 * torch.rand(100_000, 1, dtype=torch.float64)
    measured = squared_error(plane_of(weight, factor, steps).residual, factor).sum()
    assert abs(float(measured / mean_error(steps.T, factor).sum()) - 1) < 0.02


def closest_point(weight: Tensor, hessian: Tensor, step: float, radius: float) -> float:
    """Least error of any integer point, all within `radius` being tried; all three are of one row."""
    reach = (radius * torch.linalg.inv(hessian).diagonal()).sqrt() + 1e-9
    low, high = torch.ceil((weight - reach) / step), torch.floor((weight + reach) / step)
    counts = (high - low + 1).clamp_min(0)
    assume(counts.prod() <= 50_000)
    axes = [torch.arange(a, b + 1, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    points = torch.tensor(list(product(*(axis.tolist() for axis in axes))), dtype=torch.float64)
    return float(output_error(weight, points, torch.tensor(step, dtype=torch.float64), hessian).min())


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 6), order=st.sampled_from(sorted(ORDERS)), seed=st.integers(0, 2**32), orthogonal=st.booleans())
def test_small_lattices_against_exhaustive_search(n: int, order: Order, seed: int, orthogonal: bool) -> None:
    hessian = random_hessian(n, seed, condition=10)
    hessian = hessian.diagonal().diag() if orthogonal else hessian
    factor = factorize64(hessian, order, 0.0)
    weight, steps = random_weight(1, n, seed + 1, spread=3.0), torch.full((1, 1), 1.3, dtype=torch.float64)
    found = float(squared_error(plane_of(weight, factor, steps).residual, factor))
    closest = closest_point(weight[0], exact_hessian(factor), 1.3, found)
    assert found >= closest * (1 - 1e-6)
    if orthogonal:
        assert found <= closest * (1 + 1e-6)


def test_targets_are_what_was_rounded() -> None:
    factor = factorize64(random_hessian(70, seed=1), "min-pivot", 0.01)
    weight, steps = random_weight(30, 70, 2).T[factor.order].contiguous(), 0.1 + torch.rand(1, 30, dtype=torch.float64)
    solution = nearest_plane(weight, Lattice(factor), steps)
    assert torch.equal(solution.integers, torch.round(solution.targets / steps))
    torch.testing.assert_close(solution.residual, weight - steps * solution.integers)
    carried = torch.triu(factor.unit_upper, 1) @ solution.residual
    torch.testing.assert_close(solution.targets, weight + carried)


def test_an_integer_beyond_int16_is_an_error() -> None:
    factor = factorize64(torch.eye(4), "natural", 0.0)
    with pytest.raises(QuantizationError, match="40000, more than 32767: the step is too small"):
        solve(torch.full((4, 2), 4.0).double(), Lattice(factor), torch.tensor([[1e-4]]))
    with pytest.raises(QuantizationError):
        solve(torch.full((4, 2), torch.nan).double(), Lattice(factor), torch.tensor([[1e-4]]))


def priced(low: int, high: int, price: Tensor) -> Rounding:
    return Rounding(low=low, high=high, price=price)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 60), seed=st.integers(0, 2**32), negative=st.booleans())
def test_without_a_price_or_a_range_rounding_is_to_the_nearest(n: int, seed: int, negative: bool) -> None:
    factor = factorize64(random_hessian(n, seed), "activation", 0.01)
    weight, steps = random_weight(20, n, seed).T.contiguous(), torch.full((1, 20), -0.3 if negative else 0.3)
    expected = nearest_plane(weight, Lattice(factor), steps.double())
    free, everything = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), torch.inf, dtype=torch.float64)
    for rounding in (priced(-1, 0, free), priced(-1000, 1000, everything)):
        found = nearest_plane(weight, Lattice(factor), steps.double(), rounding)
        assert torch.equal(found.integers, expected.integers)
        assert torch.equal(found.targets, expected.targets)


@settings(deadline=None, max_examples=40)
@given(price=st.floats(0, 10), low=st.integers(-4, 0), high=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_integers_beyond_the_range_are_worth_their_price(price: float, low: int, high: int, seed: int) -> None:
    """Target by target, against every integer."""
    factor = factorize64(random_hessian(20, seed), "activation", 0.01)
    weight = random_weight(10, 20, seed, spread=3.0).T.contiguous()
    steps = 0.5 + torch.rand(1, 10, dtype=torch.float64)
    found = nearest_plane(
        weight, Lattice(factor), steps, priced(low, high, torch.tensor([[price]], dtype=torch.float64))
    )
    integers = torch.arange(-200.0, 201.0, dtype=torch.float64)
    cost = (found.targets[..., None] - steps[..., None] * integers).square()
    cost += price * ((integers < low) | (integers > high))
    chosen = cost.gather(2, (found.integers + 200).long()[..., None]).squeeze(2)
    torch.testing.assert_close(chosen, cost.amin(2))


@pytest.mark.parametrize("price", [0.5, 2.0, 10.0])
def test_a_price_lowers_error_and_price_in_all(price: float) -> None:
    factor = factorize64(random_hessian(90, seed=5), "activation", 0.01)
    weight, steps = random_weight(100, 90, 6).T.contiguous(), torch.full((1, 100), 0.4, dtype=torch.float64)
    by_pivot = (price * factor.pivots.mean() / factor.pivots)[:, None]
    costs = []
    for rounding in (Rounding(), priced(-2, 1, by_pivot)):
        plane = nearest_plane(weight, Lattice(factor), steps, rounding)
        entries = int(((plane.integers < -2) | (plane.integers > 1)).sum())
        costs.append(float(squared_error(plane.residual, factor).sum() + price * factor.pivots.mean() * entries))
    assert costs[1] < costs[0]


def test_negative_steps_mirror_the_range() -> None:
    factor = factorize64(random_hessian(40, seed=7), "activation", 0.01)
    weight, steps = random_weight(30, 40, 8).T.contiguous(), torch.full((1, 30), 0.4, dtype=torch.float64)
    price = torch.full((1, 1), 0.3, dtype=torch.float64)
    found = nearest_plane(weight, Lattice(factor), -steps, priced(-2, 1, price))
    mirrored = nearest_plane(weight, Lattice(factor), steps, priced(-1, 2, price))
    assert torch.equal(found.integers, -mirrored.integers)
