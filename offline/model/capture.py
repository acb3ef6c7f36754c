"""What a decoder block's linears see: groups that share an input, their Hessians, and the block's outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.solver.drift import Drift

BATCH_TOKENS = 2048
ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_)  # what + and += come to


class _Reached(Exception):
    """Ends a forward pass when the linear of interest has been called."""


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Outputs of a block for a batch of hidden states [sequences, length, hidden]."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def batches(hidden: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Cut hidden states [sequences, length, hidden] into batches of about BATCH_TOKENS tokens on `device`."""
    step = max(1, BATCH_TOKENS // hidden.shape[1])
    for start in range(0, len(hidden), step):
        window = slice(start, start + step)
        yield window, hidden[window].to(device)


@torch.no_grad()
def shared_inputs(
    block: nn.Module, linears: dict[str, nn.Linear], hidden: Tensor, arguments: dict[str, Any]
) -> list[list[str]]:
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
        run_block(block, hidden[:1], arguments)
    silent = linears.keys() - {name for group in groups.values() for name in group}
    if silent:
        raise QuantizationError(
            f"{', '.join(sorted(silent))}: not called when the block runs; exclude it with --ignore"
        )
    return list(groups.values())


@torch.no_grad()
def hessians(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: Tensor,
    arguments: dict[str, Any],
    token_weights: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """H = XᵀX / tokens of the inputs X of every linear given, float32 [in, in]; the block runs no further than they.

    token_weights: linear → how much each token counts, mean 1, [sequences, length]; none: all the same. float32 sums of
    products of a few thousand tokens each lose no more than 1e-6 of an entry's size, far below the damping. Raises
    QuantizationError when an activation is NaN or Inf.
    """
    totals = {n: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for n, m in linears.items()}
    seen: dict[str, Tensor] = {}

    def capture(name: str, _: nn.Module, args: tuple) -> None:
        seen[name] = args[0]
        if len(seen) == len(linears):
            raise _Reached

    with _hooked((linear, partial(capture, name)) for name, linear in linears.items()):
        for window, batch in batches(hidden, next(block.parameters()).device):
            seen.clear()
            with suppress(_Reached):
                run_block(block, batch, arguments)
            for name, inputs in seen.items():
                rows = inputs.reshape(-1, inputs.shape[-1]).float()
                weights = (token_weights or {}).get(name)
                if weights is not None:
                    rows = rows * weights[window].reshape(-1, 1).to(rows.device).sqrt()
                totals[name].addmm_(rows.T, rows)
    for name, total in totals.items():
        if not torch.isfinite(total.diagonal()).all():
            raise QuantizationError(f"{name}: its input activations have NaN or Inf on the calibration text")
        total /= hidden.shape[:2].numel()
    return totals


@dataclass(frozen=True)
class Seen:
    """What a linear sees of one batch: inputs [tokens, in], and the hidden states [tokens, out] that its output is
    added to, or None where it is not; float32. window: the sequences of the batch.
    """

    window: slice
    inputs: Tensor
    stream: Tensor | None


@torch.no_grad()
def seen_by(block: nn.Module, linear: nn.Linear, hidden: Tensor, arguments: dict[str, Any]) -> Iterator[Seen]:
    """Batch by batch, what `linear` sees; the block runs no further than needed.

    An output counts as added to hidden states where the very tensor is an operand of a sum with another of its shape.
    This holds for the output and down projections of pre-norm blocks, whatever they are called; it does not where a
    norm comes between, as in Gemma 2.
    """
    device = linear.weight.device
    probe = _Watch(is_added=True)
    probe.run(block, linear, hidden[:1].to(device), arguments)
    for window, batch in batches(hidden, device):
        watch = _Watch(is_added=probe.stream is not None)
        watch.run(block, linear, batch, arguments)
        stream = None if watch.stream is None else watch.stream.flatten(0, -2).float()
        yield Seen(window, watch.inputs.flatten(0, -2).float(), stream)


def moments(
    linear: str, quantized: Iterable[Seen], original: Iterable[Seen], token_weights: Tensor | None
) -> tuple[Tensor, Drift]:
    """H = E[w x̂x̂ᵀ], float32 [in, in], and the drift, from what a linear of both models sees of the same batches.

    token_weights: mean 1, [sequences, length]; None: all the same. Raises QuantizationError that names the linear when
    an activation is NaN or Inf.
    """
    totals: list[Tensor] = []
    tokens = 0
    for seen, wanted in zip(quantized, original, strict=True):
        gaps = [wanted.inputs - seen.inputs]
        if seen.stream is not None and wanted.stream is not None:
            gaps.append(wanted.stream - seen.stream)
        right = seen.inputs
        if token_weights is not None:
            right = right * token_weights[seen.window].reshape(-1, 1).to(right.device)
        features, middle = right.shape[1], len(right) // 2
        totals = totals or [right.new_zeros(features, features), *(g.new_zeros(2, g.shape[1], features) for g in gaps)]
        totals[0].addmm_(seen.inputs.T, right)
        for total, gap in zip(totals[1:], gaps, strict=True):
            for half, part in enumerate((slice(0, middle), slice(middle, None))):
                total[half].addmm_(gap[part].T, right[part])
        tokens += len(right)
    if not all(torch.isfinite(total).all() for total in totals):
        raise QuantizationError(f"{linear}: its input activations have NaN or Inf on the calibration text")
    inputs, *stream = (total / (tokens / 2) for total in totals[1:])
    return totals[0] / tokens, Drift(inputs, stream[0] if stream else None)


class _Watch(TorchFunctionMode):
    """Runs a block until a linear is called or, with `is_added`, until its output is an operand of a sum."""

    def __init__(self, is_added: bool) -> None:
        super().__init__()
        self.is_added = is_added
        self.inputs = self.output = torch.empty(0)
        self.stream: Tensor | None = None

    def run(self, block: nn.Module, linear: nn.Linear, batch: Tensor, arguments: dict[str, Any]) -> None:
        """Run the block; `inputs` and `stream` are then known."""
        handles = [linear.register_forward_pre_hook(self._reached), linear.register_forward_hook(self._called)]
        try:
            with self, suppress(_Reached):
                run_block(block, batch, arguments)
        finally:
            for handle in handles:
                handle.remove()

    def _reached(self, _: nn.Module, args: tuple) -> None:
        self.inputs = args[0]
        if not self.is_added:
            raise _Reached

    def _called(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        self.output = output

    def __torch_function__(self, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in ADDITIONS and len(args) == 2:
            for operand, other in (args, args[::-1]):
                if operand is self.output and isinstance(other, Tensor) and other.shape == operand.shape:
                    self.stream = other
                    raise _Reached
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def advance(block: nn.Module, hidden: Tensor, arguments: dict[str, Any], device: torch.device) -> None:
    """Replace the block's inputs by its outputs, batch by batch and in place."""
    for window, batch in batches(hidden, device):
        hidden[window] = run_block(block, batch, arguments).to(hidden.device)


@contextmanager
def _hooked(hooks: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
