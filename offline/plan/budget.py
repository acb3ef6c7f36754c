"""What every linear of a run is asked to be, and the bits that are left for the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.model.walk import Part, bits_outside
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.plan import PlannedLinear, ssqr_rate
from vllm_babai.offline.scales.linear import LayerReport

MAX_CORRECTION = 0.005  # of a rate; a choice, not measured: no linear is to pay for all that others went over


@dataclass(frozen=True)
class Target:
    """What a linear is asked to be. bits, overflow: SSQR's dense bits and share of sparse weights. rate: HPTQ's or
    the trellis's bits per weight, everything counted.
    """

    bits: int
    overflow: float
    rate: float


def targets(
    linears: list[str], outside: Mapping[str, float], plan: list[PlannedLinear], options: QuantizeOptions
) -> dict[str, Target]:
    """Linear → target: the planned one, or the options' where there is no plan. outside: bits of head and embedding."""
    common = Target(options.bits, options.overflow, options.rate)
    found = {
        linear.name: Target(linear.bits or common.bits, linear.overflow or common.overflow, linear.rate)
        for linear in plan
    } or dict.fromkeys(linears, common)
    return found | {name: Target(int(bits), options.overflow, bits) for name, bits in outside.items()}


def bytes_beside(model: StreamedModel, parts: Sequence[Part], options: QuantizeOptions) -> int:
    """Bytes of all that no plan counts: tensors that stay as they are, and about those of head and embedding with the
    bits asked for. parts: what is quantized, see `parts_of`.
    """
    stored, outside = model.checkpoint, bits_outside(model, options)
    replaced = {name for part in parts for name in part.replaced if name in stored.files}
    total = stored.bytes() - sum(stored.size(name) for name in replaced)
    for part in parts:
        if part.name in outside:
            bits = outside[part.name]
            if options.format == "ssqr":
                _, columns = model.checkpoint.shape(f"{part.name}.weight")
                per_scale = columns if options.group_size == -1 else options.group_size
                bits = float(ssqr_rate(int(bits), torch.tensor(options.overflow), per_scale))
            total += round(bits / 8 * part.weights(model))
    return total


@dataclass
class Budget:
    """Keeps HPTQ or a trellis at its bits: what one linear leaves over goes to the next. apart: linears that keep
    their own.
    """

    targets: dict[str, Target]
    apart: set[str] = field(default_factory=set)
    left_over: float = 0.0

    def next_rate(self, name: str, weights: int) -> float:
        """Rate for a linear of so many weights; it corrects what came before as far as half a percent."""
        rate = self.targets[name].rate
        if name in self.apart:
            return rate
        correction = self.left_over / weights / rate
        return rate * (1 + min(max(correction, -MAX_CORRECTION), MAX_CORRECTION))

    def share(self, ranks: int) -> "Budget":
        """What one of so many ranks starts from that quantize side by side."""
        return replace(self, left_over=self.left_over / ranks)

    def spend(self, report: LayerReport) -> None:
        """Account for a quantized linear."""
        if report.name not in self.apart:
            rate = self.targets[report.name].rate
            self.left_over += (rate - report.bits_per_weight) * report.rows * report.columns
