"""What a quantized model will be like, before it is quantized: the same plan, no rounding."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.budget import bytes_beside
from vllm_babai.offline.plan.forecast import Forecast
from vllm_babai.offline.plan.plan import (
    PlannedLinear,
    forecast_model,
    make_plan,
    mean_rate,
    plan_rates,
    plan_tiles,
    plan_widths,
)
from vllm_babai.offline.plan.sensitivity import measured_in_passing, sensitivity_passes
from vllm_babai.offline.prepare import Prepared, prepare
from vllm_babai.progress import counting_progress

# Measured loss over the sum of the linears' second-order losses. That estimates the KL divergence, as sensitivity is
# of labels that the model draws; on real text the loss grew by 0.6 to 0.85 of it (`tests/benchmarks/forms.py` on the
# reference model, 1.75 to 3.125 bits). A choice, wide on purpose; `babai predict` and `babai eval --against` tell it of
# a model.
SPREAD = (0.5, 1.5)
CURVES = {
    "HPTQ": (plan_rates, [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0]),
    "SSQR": (plan_widths, [2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0]),
    "trellis": (plan_tiles, [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5]),
}


@dataclass(frozen=True)
class Prediction:
    """plan: of every linear. rate: bits per weight. loss: nats per token, all linears' together. checkpoint_bytes: size
    of the weight files. curves: format → (bits per weight, loss) pairs.
    """

    plan: list[PlannedLinear]
    rate: float
    loss: float
    checkpoint_bytes: int
    curves: dict[str, list[tuple[float, float]]]

    @property
    def perplexity_factor(self) -> tuple[float, float]:
        """Range by which the perplexity is expected to grow, see SPREAD."""
        return math.exp(SPREAD[0] * self.loss), math.exp(SPREAD[1] * self.loss)


def predict(model: str | Path, options: QuantizeOptions) -> Prediction:
    """Plan a run without quantizing; `options` need a rate (HPTQ) or target_bits (SSQR, trellis).

    One pass forwards and backwards, and one factorization per group of linears. Raises QuantizationError like
    `pipeline.quantize`.
    """
    prepared = prepare(model, options)
    streamed, inputs, blocks = prepared.model, prepared.inputs, prepared.blocks
    with counting_progress() as progress, ExitStack() as stack:
        with progress.phase("measuring sensitivity", sensitivity_passes(streamed), "passes") as phase:
            measured = measured_in_passing(streamed, inputs, options.seed, phase.advance, phase.note)
            sensitivity = stack.enter_context(measured)
        with progress.phase("planning", sum(len(part.linears) for part in blocks), "linears") as phase:
            forecasts = forecast_model(streamed, blocks, inputs, sensitivity, options, phase.advance)
    plan = make_plan(forecasts, options)
    return Prediction(
        plan,
        mean_rate(plan),
        sum(p.loss for p in plan),
        _size(prepared, plan, options),
        _curves(forecasts),
    )


def _size(prepared: Prepared, plan: list[PlannedLinear], options: QuantizeOptions) -> int:
    beside = bytes_beside(prepared.model, prepared.parts, options)
    return beside + round(sum(linear.rate * linear.weights for linear in plan) / 8)


def _curves(forecasts: list[Forecast]) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for name, (planner, rates) in CURVES.items():
        plans = [planner(forecasts, rate) for rate in rates]
        curves[name] = [(mean_rate(plan), sum(linear.loss for linear in plan)) for plan in plans]
    return curves
