"""What experts see: the block runs once up to its experts, then every expert has its turn with the tokens routed to it.

One Hessian is in memory at a time, however many experts there are. An expert that few tokens reach knows its inputs
badly; `solver.shrink` mixes what it saw with what all experts of the layer see.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import Call, run_block
from vllm_babai.offline.model.capture import BATCH_TOKENS, Moments, Seen, batches, moments, of_mean_one
from vllm_babai.offline.model.experts import Expert, Experts, Routed, routed
from vllm_babai.offline.ranks import ALONE, Ranks
from vllm_babai.offline.solver.shrink import shrunk

# Where an expert has seen this many tokens for each of its columns, its own Hessian is taken as it is, which saves the
# tokens of the layer a way through it. A choice that was not measured.
ENOUGH = 8
# Tokens of the layer that are sent through an expert which has seen too few, to know what its down projection reads of
# any text. A choice: as many as a batch.
SAMPLE = BATCH_TOKENS


class Pass(NamedTuple):
    """A block that runs: the block, its experts, its inputs [sequences, length, hidden] and how it is called."""

    block: nn.Module
    experts: Experts
    hidden: Tensor
    call: Call


@dataclass(frozen=True)
class SeenByExpert:
    """tokens: of the calibration text routed to the expert. pooled: share of its Hessian that is the layer's."""

    tokens: int
    pooled: float


class _Reached(Exception):
    """Ends a forward pass when the experts are called."""


TokenWeights = Callable[[list[str]], Tensor | None]
Found = tuple[dict[str, nn.Linear], Moments, SeenByExpert]


@torch.no_grad()
def routed_tokens(run: Pass) -> Routed:
    """What a block's experts are called with, of all tokens in order, on the device of the hidden states."""
    found: list[Routed] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = routed(module, run.experts.name, args, kwargs)
        found.append(Routed(*(one.to(run.hidden.device) for one in call)))
        raise _Reached

    handle = run.experts.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for window, batch in batches(run.hidden, next(run.block.parameters()).device):
            with suppress(_Reached):
                run_block(run.block, batch, run.call.at(window))
    finally:
        handle.remove()
    if sum(len(each.inputs) for each in found) != run.hidden.shape[:2].numel():
        raise QuantizationError(f"{run.experts.name}: not called once with every token when the block runs")
    return Routed(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def expert_moments(
    run: Pass, original: Pass | None = None, *, token_weights: TokenWeights, ranks: Ranks = ALONE
) -> Iterator[Found]:
    """Of each expert: its gate and up with the moments of their input, then its down; and what it has seen.

    The caller may have quantized gate and up when it asks for down, whose input is made with them. original: of the
    original model, to learn the drift from at the same tokens, whatever their way in it. token_weights: how much each
    token [sequences, length] counts for linears of one input; None: the square of the weight that the router gives it,
    as it stands in the loss. ranks: every one gets the tokens of all, and has some of the experts, see `expert_owner`.
    """
    here = Routed(*map(ranks.joined, routed_tokens(run)))
    there = None if original is None else ranks.joined(routed_tokens(original).inputs)
    device = next(run.block.parameters()).device
    squares = here.weights.float().square()
    pooled = _hessian(here.inputs, squares.sum(1), device)
    for number, names in enumerate(run.experts.names):
        if expert_owner(number, ranks.count) != ranks.number:
            continue
        expert = run.experts.expert(number)
        token, slot = torch.where(here.chosen == number)
        inputs = here.inputs[token]
        wanted = None if there is None else there[token]
        first = {name: expert.linears[role] for role, name in names.items() if role != "down"}
        weights = _weights(token_weights, list(first), token, squares[token, slot])
        own, share = _mixed(list(first), inputs, wanted, weights, lambda: pooled, device)
        yield first, own, SeenByExpert(len(token), share)

        down = {names["down"]: expert.linears["down"]}
        weights = _weights(token_weights, list(down), token, squares[token, slot])
        if wanted is not None and original is not None:
            wanted = _inner(original.experts.expert(number), wanted, device)
        inputs = _inner(expert, inputs, device)
        layer = partial(_pooled_inner, expert, here, device)
        own, share = _mixed(list(down), inputs, wanted, weights, layer, device)
        yield down, own, SeenByExpert(len(token), share)


def expert_owner(number: int, ranks: int) -> int:
    """The rank, of so many, that quantizes the expert of that number."""
    return number % ranks


def _weights(token_weights: TokenWeights, linears: list[str], token: Tensor, squares: Tensor) -> Tensor:
    """How much each of an expert's tokens counts, mean 1, float32 [tokens]."""
    known = token_weights(linears)
    return of_mean_one(squares if known is None else known.flatten()[token])


def _mixed(
    names: list[str],
    inputs: Tensor,
    wanted: Tensor | None,
    weights: Tensor,
    pooled: Callable[[], Tensor],
    device: torch.device,
) -> tuple[Moments, float]:
    """Moments of an expert's tokens, mixed with the layer's where they are few, and the layer's share."""
    tokens, columns = inputs.shape
    if tokens == 0:
        return Moments(pooled(), None), 1.0
    seen = ({names[0]: Seen(window, inputs[window].to(device).float(), None)} for window in _windows(tokens))
    originals = None
    if wanted is not None and tokens > 1:
        originals = ({names[0]: Seen(window, wanted[window].to(device).float(), None)} for window in _windows(tokens))
    own = moments(seen, originals, {names[0]: weights.to(device)})[names[0]]
    if tokens >= ENOUGH * columns:
        return own, 0.0
    norms = torch.cat([inputs[window].to(device).float().square().sum(1) for window in _windows(tokens)])
    fourth = float((weights.to(device) * norms).square().mean())
    hessian, share = shrunk(own.hessian, tokens, fourth, pooled())
    # In full, the drift of few tokens would be divided by a Hessian that hardly knows them.
    return Moments(hessian, own.drift and own.drift.of_share(1 - share)), share


def _hessian(inputs: Tensor, weights: Tensor, device: torch.device) -> Tensor:
    """E[w x xᵀ] of rows [tokens, features], w scaled to mean 1, float32."""
    windows = _windows(len(inputs))
    seen = ({"": Seen(window, inputs[window].to(device).float(), None)} for window in windows)
    return moments(seen, None, {"": of_mean_one(weights).to(device)})[""].hessian


def _inner(expert: Expert, inputs: Tensor, device: torch.device) -> Tensor:
    """What an expert's down projection reads, [tokens, intermediate], on the device of its inputs."""
    if not len(inputs):
        return inputs.new_empty(0, expert.linears["down"].in_features)
    parts = [expert.inner(inputs[window].to(device)).to(inputs.device) for window in _windows(len(inputs))]
    return torch.cat(parts)


def _pooled_inner(expert: Expert, layer: Routed, device: torch.device) -> Tensor:
    """Hessian of what an expert's down projection would read of the layer's tokens, some at even distances."""
    step = max(1, len(layer.inputs) // SAMPLE)
    inputs, squares = layer.inputs[::step], layer.weights[::step].float().square()
    return _hessian(_inner(expert, inputs, device), squares.sum(1), device)


def _windows(tokens: int) -> list[slice]:
    return [slice(first, min(first + BATCH_TOKENS, tokens)) for first in range(0, tokens, BATCH_TOKENS)]
