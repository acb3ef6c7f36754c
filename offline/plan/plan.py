"""Where the bits go: every linear's rate, such that one more bit anywhere lowers the loss by the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.format import BIT_WIDTHS
from vllm_babai.offline.model.capture import advance, hessians, shared_inputs
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.forecast import OCTAVES, Forecast, forecast
from vllm_babai.offline.plan.fusion import fused_with
from vllm_babai.offline.plan.sensitivity import Sensitivity
from vllm_babai.offline.scales.column_steps import choose_column_steps
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.lattice import Lattice

LOWEST_RATE = 0.5
MOST_OVERFLOW = 0.05
EXCESS_BITS = {2: 1.8, 3: 2.75, 4: 3.55, 5: 4.45, 8: 7.2}  # of an entry, besides its position, where 4% overflow
SCALE_BITS = 16


@dataclass(frozen=True)
class PlannedLinear:
    """rate: bits per weight, everything counted. loss: nats per token that its error is expected to cost.
    bits, overflow: SSQR's dense bits and share of sparse weights; None in HPTQ.
    """

    name: str
    weights: int
    rate: float
    loss: float
    bits: int | None = None
    overflow: float | None = None


def forecast_model(
    model: StreamedModel,
    hidden: Tensor,
    arguments: list[dict[str, Any]],
    sensitivity: Sensitivity,
    options: QuantizeOptions,
) -> list[Forecast]:
    """Forecast every linear that is to be quantized, from the original model's activations; one block in memory.

    hidden, arguments: inputs of the first block, as `first_inputs` gives them.
    """
    hidden = hidden.clone()
    forecasts = []
    for index, block_arguments in enumerate(arguments):
        block, name = model.load_block(index), model.block_name(index)
        linears = {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        linears = {n: m for n, m in linears.items() if not options.ignores(n)}
        groups = shared_inputs(block, linears, hidden[:1].to(model.device), block_arguments)
        weights = {group[0]: sensitivity.shared_weights(group) for group in groups}
        covariances = hessians(block, {n: linears[n] for n in weights}, hidden, block_arguments, weights)
        for group in groups:
            factor = factorize(covariances.pop(group[0]), options.order, options.damping)
            originals = [linears[linear].weight for linear in group]
            errors = _errors_by_columns(originals, factor, options)
            for linear, weight, by_columns in zip(group, originals, errors, strict=True):
                lattice = Lattice(factor, sensitivity.row_geometry(linear), options.paths)
                forecasts.append(forecast(linear, weight, lattice, options.seed, by_columns))
        advance(block, hidden, block_arguments, model.device)
    return forecasts


def _errors_by_columns(weights: list[Tensor], factor: Factor, options: QuantizeOptions) -> list[float]:
    """Error of linears that share an input with steps by column, where these pay, over that with one step."""
    if options.format == "hptq" and options.column_steps:
        chosen = choose_column_steps(weights, factor, [options.rate] * len(weights), options.seed)
        if chosen is not None:
            return chosen.errors
    return [1.0] * len(weights)


def make_plan(forecasts: list[Forecast], options: QuantizeOptions) -> list[PlannedLinear]:
    """The plan that the options ask for. Raises QuantizationError when the bits are fewer than any plan needs."""
    rate = options.planned_rate
    assert rate is not None
    plan = plan_rates(forecasts, rate) if options.format == "hptq" else plan_widths(forecasts, rate)
    if mean_rate(plan) > rate * 1.01:
        raise QuantizationError(f"{rate} bits per weight cannot be met: the fewest are {mean_rate(plan):.3f}")
    return plan


def plan_rates(forecasts: list[Forecast], rate: float) -> list[PlannedLinear]:
    """HPTQ at `rate` bits per weight in all. With steps s ∝ 1/√pivot every linear's loss falls equally with the next
    bit; the common factor is found by bisection.
    """

    def at(octave: float) -> list[PlannedLinear]:
        steps = [2.0**octave / math.sqrt(max(linear.pivot, 1e-30)) for linear in forecasts]
        return [
            PlannedLinear(f.name, f.weights, max(f.rate(step), LOWEST_RATE), f.loss(step))
            for f, step in zip(forecasts, steps, strict=True)
        ]

    return _within(at, rate)


def plan_widths(forecasts: list[Forecast], rate: float) -> list[PlannedLinear]:
    """SSQR at `rate` bits per weight in all: widths, one for linears that vLLM fuses, and overflow of every linear.

    Each takes what costs least in loss + price · bits; the price is found by bisection. The next plan may be
    a whole width of some linear away, so what is then left goes into overflow.
    """
    groups: dict[tuple[str, ...], list[Forecast]] = {}
    for linear in forecasts:
        groups.setdefault(fused_with(linear.name), []).append(linear)
    scale = sum(float(linear.row_losses()[len(OCTAVES) // 2]) for linear in forecasts)

    def at(octave: float) -> list[PlannedLinear]:
        price = scale * 2.0**octave
        found: dict[str, PlannedLinear] = {}
        for group in groups.values():
            choices = [[_best_overflow(linear, bits, price) for linear in group] for bits in BIT_WIDTHS]
            best = min(choices, key=lambda planned: sum(p.loss + price * p.rate * p.weights for p in planned))
            found |= {planned.name: planned for planned in best}
        return [found[linear.name] for linear in forecasts]

    widths = {linear.name: linear.bits for linear in _within(at, rate)}

    def with_widths(octave: float) -> list[PlannedLinear]:
        return [_best_overflow(linear, widths[linear.name] or 0, scale * 2.0**octave) for linear in forecasts]

    return _within(with_widths, rate)


def _best_overflow(linear: Forecast, bits: int, price: float) -> PlannedLinear:
    table = linear.overflow[bits]
    overflow = table.shares.clamp(MOST_OVERFLOW / 100, 1.0)
    positions = (torch.special.entr(overflow) + torch.special.entr(1 - overflow)) / math.log(2)
    rates = bits + SCALE_BITS / linear.columns + positions + EXCESS_BITS[bits] * overflow
    losses = linear.row_losses()[:, None] * (1 + table.kept)
    cost = losses + price * linear.weights * rates
    cost[overflow > MOST_OVERFLOW] = torch.inf
    best = int(cost.argmin())
    rate, loss, share = (float(table.flatten()[best]) for table in (rates, losses, overflow))
    return PlannedLinear(linear.name, linear.weights, rate, loss, bits, share)


def _within(at: Callable[[float], list[PlannedLinear]], rate: float) -> list[PlannedLinear]:
    """The plan, among those that get coarser with the octave, that just keeps to `rate`."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_rate(at(middle)) > rate else (low, middle)
    return at(high)


def mean_rate(plan: list[PlannedLinear]) -> float:
    """Bits per weight of a whole plan."""
    return sum(linear.rate * linear.weights for linear in plan) / sum(linear.weights for linear in plan)
