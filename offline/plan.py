"""Where the bits go: every linear's rate, such that one more bit anywhere lowers the loss by the same."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_babai.offline.capture import advance, hessians, shared_inputs
from vllm_babai.offline.factor import factorize
from vllm_babai.offline.forecast import Forecast, forecast
from vllm_babai.offline.joint_plane import row_geometry
from vllm_babai.offline.lattice import Lattice
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.sensitivity import Sensitivity
from vllm_babai.offline.streamed_model import StreamedModel

LOWEST_RATE = 0.5


@dataclass(frozen=True)
class PlannedLinear:
    """rate: bits per weight. loss: nats per token that its error is expected to cost."""

    name: str
    weights: int
    rate: float
    loss: float


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
            for linear in group:
                lattice = Lattice(factor, row_geometry(sensitivity.row_covariance(linear)))
                forecasts.append(forecast(linear, linears[linear].weight, lattice, options.seed))
        advance(block, hidden, block_arguments, model.device)
    return forecasts


def plan_rates(forecasts: list[Forecast], rate: float) -> list[PlannedLinear]:
    """Rates that cost `rate` bits per weight in all. With steps s ∝ 1/√pivot every linear's loss falls
    equally with the next bit; the common factor is found by bisection.
    """
    wanted = rate * sum(linear.weights for linear in forecasts)

    def at(octave: float) -> list[PlannedLinear]:
        return [_planned(linear, _step(linear, octave)) for linear in forecasts]

    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        bits = sum(linear.rate * linear.weights for linear in at(middle))
        low, high = (middle, high) if bits > wanted else (low, middle)
    return at(high)


def _step(linear: Forecast, octave: float) -> float:
    return 2.0**octave / math.sqrt(max(linear.pivot, 1e-30))


def _planned(linear: Forecast, step: float) -> PlannedLinear:
    return PlannedLinear(linear.name, linear.weights, max(linear.rate(step), LOWEST_RATE), linear.loss(step))
