"""The bits that a run may spend."""

from dataclasses import dataclass

from vllm_babai.offline.scales.linear import LayerReport

MAX_CORRECTION = 0.005


@dataclass
class Budget:
    """Keeps a run at its planned bits: what one linear leaves over goes to the next.

    rate: bits per weight of linears without a plan. planned: linear → bits per weight.
    """

    rate: float
    planned: dict[str, float]
    left_over: float = 0.0

    def next_rate(self, name: str, weights: int) -> float:
        """Rate for a linear of so many weights; it corrects what came before as far as half a percent."""
        rate = self.planned.get(name, self.rate)
        correction = self.left_over / weights / rate
        return rate * (1 + min(max(correction, -MAX_CORRECTION), MAX_CORRECTION))

    def spend(self, report: LayerReport) -> None:
        """Account for a quantized linear."""
        rate = self.planned.get(report.name, self.rate)
        self.left_over += (rate - report.bits_per_weight) * report.rows * report.columns
