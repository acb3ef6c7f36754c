"""What a quantized model will be like, before it is quantized: the same plan, no rounding."""

import math
from dataclasses import dataclass
from pathlib import Path

from vllm_babai.offline.model.calibration import calibration_tokens, load_tokenizer
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.pipeline import sequence_length
from vllm_babai.offline.plan.forecast import Forecast
from vllm_babai.offline.plan.plan import PlannedLinear, forecast_model, make_plan, mean_rate, plan_rates, plan_widths
from vllm_babai.offline.plan.sensitivity import measured_in_passing

CURVES = {
    "HPTQ": (plan_rates, [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0]),
    "SSQR": (plan_widths, [2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0]),
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
        """Range by which the perplexity is expected to grow: losses add up to between half and one and a half of the
        second-order prediction, as errors of different linears cancel or add.
        """
        return math.exp(0.5 * self.loss), math.exp(1.5 * self.loss)


def predict(model: str | Path, options: QuantizeOptions) -> Prediction:
    """Plan a run without quantizing; `options` need a rate (HPTQ) or target_bits (SSQR).

    One pass forwards and backwards, and one factorization per group of linears. Raises QuantizationError like
    `pipeline.quantize`.
    """
    checkpoint = open_checkpoint(model)
    device = options.resolve_device()
    streamed = open_streamed(checkpoint, device, options.resolve_dtype(device))
    tokenizer = load_tokenizer(checkpoint.folder)
    length = sequence_length(options, checkpoint.config())
    tokens = calibration_tokens(tokenizer, options.calibration, options.samples, length, options.seed)
    hidden, arguments = streamed.first_inputs(tokens)
    with measured_in_passing(streamed, tokens, hidden, arguments, options.seed) as sensitivity:
        forecasts = forecast_model(streamed, hidden, arguments, sensitivity, options)
    plan = make_plan(forecasts, options)
    return Prediction(
        plan, mean_rate(plan), sum(p.loss for p in plan), _size(checkpoint.bytes(), plan), _curves(forecasts)
    )


def _size(original: int, plan: list[PlannedLinear]) -> int:
    weights = sum(linear.weights for linear in plan)
    return round(original - 2 * weights + sum(linear.rate * linear.weights for linear in plan) / 8)


def _curves(forecasts: list[Forecast]) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for name, (planner, rates) in CURVES.items():
        plans = [planner(forecasts, rate) for rate in rates]
        curves[name] = [(mean_rate(plan), sum(linear.loss for linear in plan)) for plan in plans]
    return curves
