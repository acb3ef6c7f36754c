"""How much the loss minds errors of experts: gradients by their outputs, noted while they run one by one.

The output of an expert e for a token t enters the layer's output with the router's weight p, so the gradient by it has
p as a factor, and |g|² has p². What is kept of a layer does not grow with experts times tokens: |g|² of each token and
each of the k experts that it goes to; of gate and up the variance of the gradient by each row; of down one row
covariance G for the layer, as all experts write to the same hidden states, and each has its share of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_babai.offline.model.experts import NUMBERED, ROLE_OF, Expert, Experts, routed, shape_of
from vllm_babai.offline.solver.row_geometry import ROW_DAMPING, RowGeometry, equal_rows, independent_rows, row_geometry

# An expert that the calibration text hardly reaches gets at least this share of what an average one counts. A choice:
# other text may reach it, and bits taken from it are bits for one of many.
LEAST_SHARE = 0.1
Read = Callable[[str], Tensor]  # a tensor by its name


class ExpertGradients:
    """Runs a module's experts one by one in its place, and notes what the backward pass brings.

    tokens: [sequences, length] of the calibration text. row_block: rows of G that are kept together.
    """

    def __init__(self, experts: Experts, tokens: torch.Size, row_block: int) -> None:
        self.experts, self.tokens, self.row_block = experts, tokens, row_block
        self.first_token = 0  # of the batch that runs, among all
        hidden, inner = shape_of(experts.module, "down")
        roles = [role for role in experts.names[0] if role != "down"]
        self.squares: dict[str, Tensor] = {}  # index, and |g|² of first (gate and up) and down, [tokens, k]
        self.rows = {role: torch.zeros(len(experts), inner) for role in roles}
        self.down = torch.zeros(hidden, row_block, device=next(experts.module.parameters()).device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own."""
        call = routed(self.experts.module, self.experts.name, args, kwargs)
        if not self.squares:
            self.squares = {key: torch.zeros(self.tokens.numel(), call.chosen.shape[1]) for key in ("first", "down")}
            self.squares["index"] = torch.zeros(self.tokens.numel(), call.chosen.shape[1], dtype=torch.int32)
        last = self.first_token + len(call.inputs)
        self.squares["index"][self.first_token : last] = call.chosen.int().cpu()
        output = torch.zeros_like(call.inputs)
        for number in call.chosen.unique().tolist():
            token, slot = torch.where(call.chosen == number)
            place = (token.cpu() + self.first_token, slot.cpu())
            expert = self.experts.expert(number)
            found = self._run(expert, call.inputs[token], partial(self._note, number, place))
            output = output.index_add(0, token, (found * call.weights[token, slot, None]).to(output.dtype))
        return output

    def _run(self, expert: Expert, x: Tensor, note: Callable[..., None]) -> Tensor:
        outputs = []
        for role in self.rows:
            outputs.append(expert.linears[role](x))
            outputs[-1].register_hook(partial(note, role))
        down = expert.linears["down"](expert.activate(*outputs))
        down.register_hook(partial(note, "down"))
        return down

    def _note(self, number: int, place: tuple[Tensor, Tensor], role: str, by_output: Tensor) -> None:
        by_row = by_output.float()
        squares = by_row.square()
        self.squares["down" if role == "down" else "first"][place] += squares.sum(-1).cpu()
        if role != "down":
            self.rows[role][number] += squares.sum(0).cpu()
            return
        for first in range(0, by_row.shape[1], self.row_block):
            part = by_row[:, first : first + self.row_block]
            self.down[first : first + self.row_block, : part.shape[1]].addmm_(part.T, part)

    def tensors(self, count: int) -> dict[str, Tensor]:
        """What the functions below read, by names that begin with that of the experts; count: of all tokens."""
        name = self.experts.name
        found = {f"{name}.{key}": value.view(*self.tokens, -1) for key, value in self.squares.items()}
        found |= {f"{name}.{role}.rows": rows / count for role, rows in self.rows.items()}
        return found | {f"{name}.down.rows": (self.down / count).cpu()}


def is_of_expert(linear: str) -> bool:
    """Whether a linear is one of an expert's, by its full name."""
    return NUMBERED.fullmatch(linear) is not None


def expert_token_weights(stored: Read, linear: str) -> Tensor:
    """How much each token counts for the linears of one expert that share an input, float32 [sequences, length].

    stored: reads one of what `ExpertGradients.tensors` gave. Tokens that went to other experts, but may go to this one
    after linears before it were quantized, count as its tokens do on average.
    """
    name, number, role = _parsed(linear)
    chosen = stored(f"{name}.index") == number
    squares = stored(f"{name}.down" if role == "down" else f"{name}.first")
    weights, seen = (squares * chosen).sum(-1), chosen.any(-1)
    weights[~seen] = weights[seen].mean() if seen.any() else 1.0
    return weights


def expert_row_geometry(stored: Read, linear: str) -> RowGeometry:
    """G of a linear of an expert, factored: of gate and up the diagonal, of down the expert's share of the layer's."""
    name, number, role = _parsed(linear)
    if role == "down":
        index, squares = stored(f"{name}.index").flatten().long(), stored(f"{name}.down").flatten()
        experts = len(stored(f"{name}.up.rows"))
        shares = torch.zeros(experts).index_add(0, index, squares) / squares.sum().clamp_min(1e-30)
        return row_geometry(stored(f"{name}.down.rows") * shares[number].clamp_min(LEAST_SHARE / experts))
    every = stored(f"{name}.{role}.rows").double()
    mean, variances = every.mean(), every[number]
    if mean == 0:
        return equal_rows(len(variances))
    least = LEAST_SHARE * mean
    if variances.mean() < least:
        variances = variances + (least - variances.mean())
    return independent_rows(variances + ROW_DAMPING * variances.mean())


def _parsed(linear: str) -> tuple[str, int, str]:
    found = NUMBERED.fullmatch(linear)
    assert found is not None
    return found.group(1), int(found.group(2)), ROLE_OF[found.group(3)]
