"""What a decoder block's linears see: groups that share an input, the moments of it, and the block's outputs."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import Call, newly_left, run_block
from vllm_babai.offline.ranks import ALONE, Ranks
from vllm_babai.offline.solver.drift import Drift

BATCH_TOKENS = 2048  # a choice: enough to fill a device, few enough that activations are small beside a block
ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_)  # what + and += come to


class _Reached(Exception):
    """Ends a forward pass when the linear of interest has been called."""


def batches(hidden: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Cut hidden states [sequences, length, hidden] into batches of about BATCH_TOKENS tokens on `device`."""
    step = max(1, BATCH_TOKENS // hidden.shape[1])
    for start in range(0, len(hidden), step):
        window = slice(start, start + step)
        yield window, hidden[window].to(device)


@torch.no_grad()
def of_mean_one(weights: Tensor) -> Tensor:
    """Weights ≥ 0 over their mean."""
    return weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)


def shared_inputs(block: nn.Module, linears: dict[str, nn.Linear], hidden: Tensor, call: Call) -> list[list[str]]:
    """Names of linears in groups that read the same tensor (q/k/v, gate/up), in the order in which they are called.

    Raises QuantizationError that names a linear which the block never calls.
    """
    if not linears:
        return []
    inputs: dict[int, Tensor] = {}  # holds the tensors, so that no two can have the same id
    groups: dict[int, list[str]] = {}

    def note(name: str, _: nn.Module, args: tuple) -> None:
        inputs[id(args[0])] = args[0]
        groups.setdefault(id(args[0]), []).append(name)

    with _hooked((linear, partial(note, name)) for name, linear in linears.items()):
        run_block(block, hidden[:1], call.at(slice(0, 1)))
    silent = linears.keys() - {name for group in groups.values() for name in group}
    if silent:
        raise QuantizationError(
            f"{', '.join(sorted(silent))}: not called when the block runs; exclude it with --ignore"
        )
    return list(groups.values())


@dataclass(frozen=True)
class Seen:
    """What a linear sees of one batch. window: the sequences of the batch. inputs: float32 [tokens, in]. stream: the
    hidden states that its output is added to, float32 [tokens, out], or None where they were not asked for.
    """

    window: slice
    inputs: Tensor
    stream: Tensor | None


@torch.no_grad()
def added_linears(block: nn.Module, linears: Mapping[str, nn.Linear], hidden: Tensor, call: Call) -> set[str]:
    """Names of the linears whose outputs the block adds to hidden states; found out on one sequence.

    An output counts as added where the very tensor is an operand of a sum with another of its shape. This holds for the
    output and down projections of pre-norm blocks, whatever they are called; it does not where a norm comes between, as
    in Gemma 2.
    """
    probe = _Watch(linears, linears.keys())
    probe.run(block, hidden[:1].to(next(block.parameters()).device), call.at(slice(0, 1)))
    return set(probe.streams)


@torch.no_grad()
def seen_by(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    hidden: Tensor,
    call: Call,
    added: Collection[str] = (),
) -> Iterator[dict[str, Seen]]:
    """Batch by batch, linear → what it sees; the block runs no further than needed.

    added: linears whose hidden states are asked for, see `added_linears`.
    """
    for window, batch in batches(hidden, next(block.parameters()).device):
        watch = _Watch(linears, added)
        watch.run(block, batch, call.at(window))
        streams = {name: stream.flatten(0, -2).float() for name, stream in watch.streams.items()}
        yield {n: Seen(window, x.flatten(0, -2).float(), streams.get(n)) for n, x in watch.inputs.items()}


class Moments(NamedTuple):
    """hessian: H = E[w x̂x̂ᵀ] of a linear's inputs x̂, float32 [in, in]. drift: how far x̂ is from what the original
    model has there, None where that was not captured.
    """

    hessian: Tensor
    drift: Drift | None


def moments(
    quantized: Iterable[Mapping[str, Seen]],
    original: Iterable[Mapping[str, Seen]] | None,
    token_weights: Mapping[str, Tensor | None],
    ranks: Ranks = ALONE,
) -> dict[str, Moments]:
    """Linear → moments of its inputs, from what `seen_by` gives of one model, or of both for the same batches.

    token_weights: linear → how much each token counts, w of mean 1, [sequences, length]; None: all the same. float32
    sums of products of a few thousand tokens each lose no more than 1e-6 of an entry's size, far below the damping.
    ranks: whose tokens count; each gives those of its own sequences, and gets the moments of all.
    Raises QuantizationError that names the linear when an activation is NaN or Inf.
    """
    sums = {linear: _Sums(weights) for linear, weights in token_weights.items()}
    pairs = ((seen, None) for seen in quantized) if original is None else zip(quantized, original, strict=True)
    for seen, wanted in pairs:
        for linear, own in sums.items():
            own.add(seen[linear], None if wanted is None else wanted[linear])
    return {linear: own.over(ranks).moments(linear) for linear, own in sums.items()}


class _Sums:
    """Sums of products of a linear's inputs, and of their gap to the original model's, over the tokens so far."""

    def __init__(self, token_weights: Tensor | None) -> None:
        self.token_weights = token_weights
        self.tokens = 0
        self.hessian = torch.empty(0)
        self.gaps: list[Tensor] = []  # of the inputs, and of the hidden states if there are any; [2, features, in] each

    def add(self, seen: Seen, wanted: Seen | None) -> None:
        """Add a batch; wanted: what the original model has of it."""
        left = right = seen.inputs
        if self.token_weights is not None:
            weights = self.token_weights[seen.window].reshape(-1, 1).to(right.device)
            if wanted is None:
                left = right = right * weights.sqrt()  # the product is then symmetric to the last bit
            else:
                right = right * weights  # which the gaps are multiplied with, too
        features = right.shape[1]
        if not self.tokens:
            self.hessian = right.new_zeros(features, features)
        self.hessian.addmm_(left.T, right)
        self.tokens += len(right)
        if wanted is not None:
            gaps = [wanted.inputs - seen.inputs]
            if seen.stream is not None and wanted.stream is not None:
                gaps.append(wanted.stream - seen.stream)
            self._add_gaps(gaps, right)

    def _add_gaps(self, gaps: list[Tensor], right: Tensor) -> None:
        """Half of a batch's tokens goes to one half of the drift's estimate, half to the other."""
        self.gaps = self.gaps or [right.new_zeros(2, gap.shape[1], right.shape[1]) for gap in gaps]
        middle = len(right) // 2
        for total, gap in zip(self.gaps, gaps, strict=True):
            for half, part in enumerate((slice(0, middle), slice(middle, None))):
                total[half].addmm_(gap[part].T, right[part])

    def over(self, ranks: Ranks) -> "_Sums":
        """These sums over the tokens of all ranks."""
        self.tokens = sum(ranks.exchange(self.tokens))
        for total in (self.hessian, *self.gaps):
            ranks.total(total)
        return self

    def moments(self, linear: str) -> Moments:
        """Means over the tokens. Raises QuantizationError that names the linear for NaN or Inf."""
        if not all(torch.isfinite(total).all() for total in (self.hessian.diagonal(), *self.gaps)):
            raise QuantizationError(f"{linear}: its input activations have NaN or Inf on the calibration text")
        hessian = self.hessian / self.tokens
        if not self.gaps:
            return Moments(hessian, None)
        inputs, *stream = (total / (self.tokens / 2) for total in self.gaps)
        return Moments(hessian, Drift(inputs, stream[0] if stream else None))


class _Watch(TorchFunctionMode):
    """Runs a block until all `linears` have been called and the outputs of those in `added` are operands of a sum.

    `inputs` and `streams` then hold, by name, what the linears read and what their outputs were to be added to.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], added: Collection[str]) -> None:
        super().__init__()
        self.linears = linears
        self.added = added
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}

    def run(self, block: nn.Module, batch: Tensor, call: Call) -> None:
        """Run the block on a batch [sequences, length, hidden]; `call` is that for this batch."""
        handles = [linear.register_forward_pre_hook(partial(self._reached, n)) for n, linear in self.linears.items()]
        handles += [self.linears[name].register_forward_hook(partial(self._called, name)) for name in self.added]
        try:
            with self, suppress(_Reached):
                run_block(block, batch, call)
        finally:
            for handle in handles:
                handle.remove()

    def _reached(self, name: str, _: nn.Module, args: tuple) -> None:
        self.inputs[name] = args[0]
        self._stop_if_complete()

    def _called(self, name: str, _: nn.Module, __: tuple, output: Tensor) -> None:
        self.outputs[name] = output

    def _stop_if_complete(self) -> None:
        if len(self.inputs) == len(self.linears) and len(self.streams) == len(self.added):
            raise _Reached

    def __torch_function__(self, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in ADDITIONS and len(args) == 2:
            for operand, other in (args, args[::-1]):
                for name, output in self.outputs.items():
                    if operand is output and isinstance(other, Tensor) and other.shape == operand.shape:
                        self.streams[name] = other
                        self._stop_if_complete()
                        self.streams[name] = other.clone()  # the block goes on, and the sum may be in place
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def advance(block: nn.Module, hidden: Tensor, call: Call, device: torch.device) -> None:
    """Replace the block's inputs by its outputs, batch by batch and in place; keep what it leaves in `call.left`."""
    left: dict[Hashable, Any] = {}
    for window, batch in batches(hidden, device):
        here = call.at(window)
        before = dict(here.left)
        hidden[window] = run_block(block, batch, here).to(hidden.device)
        for key, value in newly_left(here.left, before).items():
            if key not in left:
                left[key] = tree_map_only(
                    Tensor, lambda t: t.new_empty(len(hidden), *t.shape[1:]).to(hidden.device), value
                )
            tree_map(partial(_write, window), left[key], value)
    call.left.update(left)


def _write(window: slice, whole: Tensor, part: Tensor) -> None:
    whole[window] = part


@contextmanager
def _hooked(hooks: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
