"""Where the bits go: every linear's rate, such that one more bit anywhere lowers the loss by the same."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import BIT_WIDTHS
from vllm_babai.format.config import layer_name
from vllm_babai.format.trellis.blob import stored_bits
from vllm_babai.offline.model.served import fused_with
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.model.walk import Group, Inputs, Part, Stage, rounds, walk
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.forecast import OCTAVES, Forecast, forecast
from vllm_babai.offline.plan.sensitivity import Sensitivity
from vllm_babai.offline.ranks import ALONE, Ranks
from vllm_babai.offline.scales.column_steps import choose_column_steps
from vllm_babai.offline.scales.tiles import allocate
from vllm_babai.offline.solver.factor import Factor
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.progress import Tick, uncounted

LOWEST_RATE = 0.5  # bits per weight that HPTQ is asked for at least; a choice, not measured
MOST_PLANNED_OVERFLOW = 0.05  # share of a linear's weights; a choice, not measured
# Bits per overflow entry excluding its position, by dense bits, measured at 4% overflow on the reference model; the
# script was not kept. `babai quantize --bits B --overflow 0.04`, then `babai inspect`, gives them anew: bits per weight
# less B, the scales and the entropy of the positions, over the share.
EXCESS_BITS = {2: 1.8, 3: 2.75, 4: 3.55, 5: 4.45, 8: 7.2}
SCALE_BITS = 16  # of a bfloat16


@dataclass(frozen=True)
class PlannedLinear:
    """rate: bits per weight, everything counted. loss: nats per token that its error is expected to cost.
    bits, overflow: SSQR's dense bits and share of sparse weights; None in the other formats.
    """

    name: str
    weights: int
    rate: float
    loss: float
    bits: int | None = None
    overflow: float | None = None


def forecast_model(
    model: StreamedModel,
    blocks: Sequence[Part],
    inputs: Inputs,
    sensitivity: Sensitivity,
    options: QuantizeOptions,
    tick: Tick = uncounted,
    ranks: Ranks = ALONE,
) -> list[Forecast]:
    """Forecast every linear that is to be quantized, from the original model's activations; one block in memory.

    tick: called once for every linear. ranks: each forecasts the linears that it would quantize, and gets all.
    """
    own: dict[str, Forecast] = {}
    order: list[str] = []

    def add(group: Group, owners: dict[str, int]) -> None:
        weights = [linear.weight for linear in group.linears.values()]
        errors = [1.0] * len(weights)
        if group.expert is None:
            errors = _errors_by_columns(weights, group.factor, options)
        for name, weight, by_columns in zip(group.linears, weights, errors, strict=True):
            if owners[name] == ranks.number:
                lattice = Lattice(group.factor, sensitivity.row_geometry(name), options.paths)
                own[name] = forecast(name, weight, lattice, options.seed, by_columns)
                tick()

    def visit(_: Part, stage: Stage) -> None:
        for each in rounds(stage, None, sensitivity.shared_weights, options, ranks, at_once=True):
            order.extend(each.linears)
            for group in each.groups:
                add(group, each.owners)

    walk(model, blocks, inputs, [inputs.hidden.clone()], visit)
    every = {name: found for of_rank in ranks.exchange(own) for name, found in of_rank.items()}
    return [every[name] for name in order]


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
    plan = PLANNERS[options.format](forecasts, rate)
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
    """SSQR at `rate` bits per weight in all: widths, one for linears that vLLM fuses, and overflow of every linear. All
    experts of a layer have one width for gate and up, and one for down.

    Each takes what costs least in loss + price · bits; the price is found by bisection. The next plan may be
    a whole width of some linear away, so what is then left goes into overflow.
    """
    groups: dict[tuple[str, ...], list[Forecast]] = {}
    for linear in forecasts:
        groups.setdefault(fused_with(layer_name(linear.name)), []).append(linear)
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
    overflow = table.shares.clamp(MOST_PLANNED_OVERFLOW / 100, 1.0)
    rates = ssqr_rate(bits, overflow, linear.columns)
    losses = linear.row_losses()[:, None] * (1 + table.kept)
    cost = losses + price * linear.weights * rates
    cost[overflow > MOST_PLANNED_OVERFLOW] = torch.inf
    best = int(cost.argmin())
    rate, loss, share = (float(table.flatten()[best]) for table in (rates, losses, overflow))
    return PlannedLinear(linear.name, linear.weights, rate, loss, bits, share)


def ssqr_rate(bits: int, overflow: Tensor, columns: int) -> Tensor:
    """Bits per weight of SSQR, everything counted, with shares of overflow and one scale for so many columns."""
    positions = (torch.special.entr(overflow) + torch.special.entr(1 - overflow)) / math.log(2)
    return bits + SCALE_BITS / columns + positions + EXCESS_BITS[bits] * overflow


def plan_tiles(forecasts: list[Forecast], rate: float) -> list[PlannedLinear]:
    """Trellis at `rate` bits per weight in all: every linear gets what its tiles take at a common price of a bit."""
    tiles = [linear.tiles for linear in forecasts]
    return [
        PlannedLinear(linear.name, linear.weights, stored_bits(bits, own.shape) / linear.weights, own.error(bits) / 2)
        for linear, own, bits in zip(forecasts, tiles, allocate(tiles, rate), strict=True)
    ]


PLANNERS = {"hptq": plan_rates, "ssqr": plan_widths, "trellis": plan_tiles}


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
