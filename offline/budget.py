"""The bits that a run may spend."""

from dataclasses import dataclass

from vllm_babai.offline.layer import LayerReport

MAX_CORRECTION = 0.005


@dataclass
class Budget:
    """Keeps the whole model at `rate` bits per weight: what one layer leaves over goes to the next."""

    rate: float
    left_over: float = 0.0

    def next_rate(self, weights: int) -> float:
        """Rate for a layer of so many weights; it corrects what came before as far as half a percent."""
        correction = self.left_over / weights / self.rate
        return self.rate * (1 + min(max(correction, -MAX_CORRECTION), MAX_CORRECTION))

    def spend(self, report: LayerReport) -> None:
        """Account for a quantized layer."""
        self.left_over += (self.rate - report.bits_per_weight) * report.rows * report.columns
