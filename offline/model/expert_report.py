"""What became of a layer's experts: tokens that each has seen, and whether all are stored in their order."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import Format, FormatError
from vllm_babai.offline.model.experts import Experts, differ, run_each
from vllm_babai.offline.model.routed import SeenByExpert


@dataclass(frozen=True)
class ExpertsReport:
    """A layer's experts, by number. name: of them in the checkpoint. tokens: of the calibration text that were routed
    to each. pooled: share of the Hessian of each that is the layer's, [gate and up, down]. starved: numbers of those
    whose Hessian is for the larger part the layer's.
    """

    name: str
    tokens: list[int]
    pooled: list[tuple[float, float]]
    starved: list[int]

    @property
    def summary(self) -> str:
        """The experts in one line."""
        seen = f"{self.name}: {len(self.tokens)} experts saw {min(self.tokens)} to {max(self.tokens)} tokens each"
        if not self.starved:
            return seen
        shown = ", ".join(map(str, self.starved[:8])) + (" …" if len(self.starved) > 8 else "")
        return f"{seen}; {len(self.starved)} were starved and took most of the layer's Hessian: {shown}"


def report_experts(experts: Experts, seen: Mapping[str, SeenByExpert]) -> ExpertsReport:
    """The report of a layer. seen: by full name of the linears."""
    tokens, pooled = [], []
    for names in experts.names:
        first, down = seen[names["up"]], seen[names["down"]]
        tokens.append(first.tokens)
        pooled.append((first.pooled, down.pooled))
    starved = [number for number, shares in enumerate(pooled) if max(shares) > 0.5]
    return ExpertsReport(experts.name, tokens, pooled, starved)


@torch.no_grad()
def check_stored(experts: Experts, stored: Mapping[str, Tensor], form: type[Format]) -> None:
    """Compare a module whose experts were quantized with what is stored of them: each expert gets a token of its own.

    stored: tensors of the part's file, by name. Raises QuantizationError that names an expert which is not the one that
    the module runs, or is not there.
    """
    linears = experts.linears
    tokens, together = run_each(experts.module)
    for number, names in enumerate(experts.names):
        expert = experts.expert(number)
        for role, name in names.items():
            try:
                parts = form.from_tensors({key: stored[f"{name}.{key}"] for key in form.dtypes})
                weight = parts.decode((linears[name].out_features, linears[name].in_features), name).dequantize()
            except (FormatError, KeyError) as error:
                raise QuantizationError(f"{name} was not stored as it was quantized ({error}): report this") from error
            expert.linears[role].weight = torch.nn.Parameter(weight.to(tokens), requires_grad=False)
        alone = expert(tokens[number : number + 1])[0]
        if differ(alone, together[number]):
            raise QuantizationError(f"{experts.name}: expert {number} was not stored as it was quantized: report this")
