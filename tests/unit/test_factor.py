"""The factor of a Hessian: what it is, its orders, and what happens to Hessians that cannot be factored."""

import pytest
import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.solver.factor import ORDERS, Order, factorize, min_pivot_order

ALL_ORDERS = sorted(ORDERS)


def random_hessian(n: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank, n, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, n)
    inputs = mixed @ (torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5).double()
    return inputs.T @ inputs / rank


def minimal_pivots(hessian: Tensor) -> Tensor:
    """Min-pivot order by its definition: eliminate the feature whose remaining Schur diagonal is the smallest."""
    rest, features, chosen = hessian.clone(), list(range(len(hessian))), []
    while features:
        k = int(rest.diagonal().argmin())
        rest = rest - torch.outer(rest[:, k], rest[k]) / rest[k, k]
        remains = torch.arange(len(features)) != k
        rest = rest[remains][:, remains]
        chosen.append(features.pop(k))
    return torch.tensor(chosen)


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("n", [1, 5, 200])
def test_factor_is_that_of_the_damped_hessian_in_its_order(n: int, order: Order) -> None:
    hessian = random_hessian(n, rank=3 * n)
    factor = factorize(hessian, order, 0.01)
    assert factor.damping == 0.01
    assert torch.equal(factor.order.sort().values, torch.arange(n))
    assert torch.equal(factor.unit_upper, factor.unit_upper.triu())
    assert torch.all(factor.unit_upper.diagonal() == 1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n)
    upper = factor.unit_upper.double()
    product = upper.T @ (factor.pivots[:, None] * upper)
    torch.testing.assert_close(product, damped[factor.order][:, factor.order], rtol=1e-5, atol=1e-5)


def test_orders() -> None:
    hessian = random_hessian(200, rank=600)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(200)
    assert torch.equal(factorize(hessian, "natural", 0.01).order, torch.arange(200))
    assert torch.equal(factorize(hessian, "reverse", 0.01).order, torch.arange(199, -1, -1))
    assert torch.equal(factorize(hessian, "activation", 0.01).order, torch.argsort(hessian.diagonal()))
    assert torch.equal(factorize(hessian, "min-pivot", 0.01).order, minimal_pivots(damped))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 150])
def test_blocked_min_pivot_order_is_the_plain_one(n: int) -> None:
    hessian = random_hessian(n, rank=2 * n, seed=n)
    assert torch.equal(min_pivot_order(hessian), minimal_pivots(hessian))


def test_better_orders_have_the_smaller_trace_of_pivots(captured: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert len(captured) == 24
    for name, (_, hessian) in captured.items():
        natural, activation, least = (
            float(factorize(hessian, order, 0.01).pivots.sum()) for order in ("natural", "activation", "min-pivot")
        )
        assert least <= activation <= natural, name


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_damping_rises_where_a_hessian_lacks_rank(order: Order) -> None:
    factor = factorize(random_hessian(50, rank=10), order, 0.0)
    assert 0 < factor.damping <= 0.01
    assert torch.isfinite(factor.unit_upper).all()
    assert torch.all(factor.pivots > 0)


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_inputs_that_are_always_zero(order: Order) -> None:
    hessian = random_hessian(50, rank=100)
    hessian[[3, 20]] = hessian[:, [3, 20]] = 0
    factor = factorize(hessian, order, 0.01)
    assert factor.damping == 0.01
    dead = (factor.order == 3) | (factor.order == 20)
    torch.testing.assert_close(
        factor.unit_upper[dead], torch.eye(50)[dead]
    )  # nothing is carried into or out of a dead input
    torch.testing.assert_close(factor.unit_upper[:, dead], torch.eye(50)[:, dead])


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_are_constant_or_copies(order: Order, damping: float) -> None:
    inputs = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 4], inputs[:, 5], inputs[:, 11] = 2.0, -1.0, inputs[:, 12]
    factor = factorize(inputs.T @ inputs / 200, order, damping)
    assert factor.damping <= max(damping, 1e-3)
    assert torch.isfinite(factor.unit_upper).all()
    assert torch.all(factor.pivots > 0)


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_a_hessian_of_zeros(order: Order) -> None:
    factor = factorize(torch.zeros(6, 6), order, 0.01)
    assert torch.equal(factor.unit_upper, torch.eye(6))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_errors(value: float) -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = value
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        factorize(hessian, "activation", 0.01)


def test_what_no_damping_mends_is_an_error() -> None:
    hessian = torch.tensor([[1.0, 9.0], [9.0, 1.0]])  # indefinite: no XᵀX
    with pytest.raises(QuantizationError, match="cannot be factored, even with damping 1"):
        factorize(hessian, "activation", 0.01)
