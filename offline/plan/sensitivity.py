"""How much the model's loss minds an error: one backward pass, block by block, over the calibration tokens.

Labels are drawn from the model's own predictions, so that products of gradients are the Fisher information. With g_t
the gradient of the loss by a linear's output at token t, x_t its input and E an error of its weight, the loss grows by

    ½ E[(g_tᵀ E x_t)²]  ≈  ½ tr(G E H Eᵀ),    G = E[g gᵀ],    H = E[|g|² x xᵀ] / E|g|²

(Kronecker factors as in arXiv 2505.22988). The pass keeps |g_t|² of every token, to weigh it in the Hessian, and G in
blocks of ROW_BLOCK rows. It holds one block of the model, its inputs and their gradient; the inputs of the other blocks
wait in memory or on disk, see `waiting`.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vllm_babai.offline.model.call import Call, newly_left, run_block
from vllm_babai.offline.model.capture import advance, batches, of_mean_one
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.model.walk import Inputs
from vllm_babai.offline.model.writing import save_atomically
from vllm_babai.offline.plan.expert_sensitivity import (
    ExpertGradients,
    expert_row_geometry,
    expert_token_weights,
    is_of_expert,
)
from vllm_babai.offline.plan.waiting import WaitingInputs
from vllm_babai.offline.ranks import ALONE, Ranks
from vllm_babai.offline.solver.row_geometry import ROW_DAMPING, RowGeometry, independent_rows, row_geometry
from vllm_babai.progress import Tick, uncounted

LeftGradients = dict[Hashable, list[Tensor]]  # by each tensor that a block has left under a key, [sequences, …]

ROW_BLOCK = 256
HEAD = "head.safetensors"


@dataclass(frozen=True)
class Sensitivity:
    """What the pass left in `folder`, a file for every decoder block and one for the head; read when asked for."""

    folder: Path
    blocks_name: str

    def shared_weights(self, linears: list[str]) -> Tensor | None:
        """Weights of the calibration tokens, mean 1, for linears of one input, float32 [sequences, length]; None: all
        count alike, as they do for the head.
        """
        if self._is_head(linears[0]):
            return None
        if is_of_expert(linears[0]):
            return expert_token_weights(partial(self._stored, linears[0]), linears[0])
        return of_mean_one(torch.stack([self._read(linear, "tokens") for linear in linears]).sum(0))

    def row_covariance(self, linear: str) -> Tensor:
        """G of a linear: row i's covariances with the rows of its own block, float32 [out, ROW_BLOCK]."""
        return self._read(linear, "rows")

    def row_geometry(self, linear: str) -> RowGeometry:
        """G of a linear, factored; of the head its diagonal alone, damped like the others."""
        if self._is_head(linear):
            variances = load_file(self.folder / HEAD)["rows"].double()
            return independent_rows(variances + ROW_DAMPING * variances.mean())
        if is_of_expert(linear):
            return expert_row_geometry(partial(self._stored, linear), linear)
        return row_geometry(self.row_covariance(linear))

    def _is_head(self, linear: str) -> bool:
        return not linear.startswith(f"{self.blocks_name}.")

    def _read(self, linear: str, kind: str) -> Tensor:
        return self._stored(linear, f"{linear}.{kind}")

    def _stored(self, linear: str, name: str) -> Tensor:
        """A tensor from the file of the block that a linear is in."""
        index = int(linear.removeprefix(f"{self.blocks_name}.").split(".")[0])
        with safe_open(_file(self.folder, index), framework="pt") as file:
            return file.get_tensor(name)


def measure_sensitivity(
    model: StreamedModel,
    inputs: Inputs,
    seed: int,
    folder: Path,
    tick: Tick = uncounted,
    note: Callable[[str], object] | None = None,
    ranks: Ranks = ALONE,
) -> Sensitivity:
    """Run the original model forwards and backwards over the calibration tokens; results go to `folder`.

    tick: called `sensitivity_passes` times, whenever a block or the head is done. note: called first with a line on the
    memory or disk that the pass will take. ranks: of each, `inputs` are its own; the first writes what they find
    together. Raises QuantizationError where there is too little of both.
    """
    hidden, calls = inputs.hidden.clone(), []
    left: dict[Hashable, Any] = {}  # by blocks for later ones
    with TemporaryDirectory(dir=folder) as spill:
        waiting = WaitingInputs.plan(hidden, len(model.blocks), Path(spill), ranks.on_host)
        if note is not None:
            note(str(waiting))
        for index in range(len(model.blocks)):
            waiting.put(index, hidden)
            calls.append(inputs.calls[index].of(dict(left)))
            advance(model.load_block(index), hidden, inputs.calls[index].of(left), model.device)
            tick()
        gradient, variances = _head_gradient(model, inputs.tokens, hidden, seed, ranks)
        if ranks.is_first:
            save_atomically(folder / HEAD, {"rows": variances})
        tick()
        left_gradients: LeftGradients = {}
        for index in reversed(range(len(model.blocks))):
            hidden = waiting.take(index)
            found = _block_backward(model, index, hidden, gradient, calls[index], left_gradients, ranks)
            if ranks.is_first:
                save_atomically(_file(folder, index), found)
            tick()
    return Sensitivity(folder, model.blocks_name)


def sensitivity_passes(model: StreamedModel) -> int:
    """Passes through a block or the head: the blocks forwards, the head, the blocks backwards."""
    return 2 * len(model.blocks) + 1


@contextmanager
def measured_in_passing(
    model: StreamedModel,
    inputs: Inputs,
    seed: int,
    tick: Tick = uncounted,
    note: Callable[[str], object] | None = None,
) -> Iterator[Sensitivity]:
    """`measure_sensitivity` into a folder that is gone afterwards."""
    with TemporaryDirectory(prefix="babai-") as folder:
        yield measure_sensitivity(model, inputs, seed, Path(folder), tick, note)


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.safetensors"


def _head_gradient(
    model: StreamedModel, tokens: Tensor, hidden: Tensor, seed: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss by the outputs of the last block, [sequences, length, hidden], and the mean square of
    that by every logit, p(1 − p) on average over labels, float32 [vocabulary].

    A sequence at a time: logits over a large vocabulary are the largest tensors of the pass. Labels do not depend on
    the number of ranks: each draws as often as the ranks before it, first.
    """
    before = sum(ranks.exchange(len(tokens))[: ranks.number])
    head = model.load_head()
    generator = torch.Generator(model.device).manual_seed(seed)
    gradient, variances = torch.empty_like(hidden), torch.zeros(())
    for index, sequence in enumerate(tokens):
        outputs = hidden[index : index + 1].to(model.device).requires_grad_()
        log_p = torch.log_softmax(head(sequence[None].to(model.device), outputs).float(), -1)[0]
        p = log_p.detach().exp()
        for _ in range(before if index == 0 else 0):
            torch.multinomial(p, 1, generator=generator)
        variances = variances + (p - p.square()).sum(0).cpu()
        labels = torch.multinomial(p, 1, generator=generator)
        (by_outputs,) = torch.autograd.grad(-log_p.gather(1, labels).sum(), outputs)
        gradient[index] = by_outputs[0].to(gradient.device)
    return gradient, ranks.total(variances) / sum(ranks.exchange(tokens.numel()))


def _block_backward(
    model: StreamedModel,
    index: int,
    hidden: Tensor,
    gradient: Tensor,
    call: Call,
    left_gradients: LeftGradients,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Take the gradients from a block's outputs to its inputs, in place; what `Sensitivity` reads of its linears.

    gradient: by the hidden states. left_gradients: by what blocks leave for later ones.
    """
    block, name = model.load_block(index), model.block_names[index]
    every_experts = [ExpertGradients(each, hidden.shape[:2], ROW_BLOCK) for each in model.experts(name, block)]
    of_experts = {linear for each in every_experts for linear in each.experts.linears}
    linears = {n: m for n, m in model.linears(name, block).items() if n not in of_experts}
    tokens = {linear: torch.zeros(hidden.shape[:2]) for linear in linears}
    rows = {n: torch.zeros(m.out_features, ROW_BLOCK, device=model.device) for n, m in linears.items()}
    window, written = slice(0), {}

    def note(linear: str, by_output: Tensor) -> None:
        by_row = by_output.float().flatten(0, -2)
        tokens[linear][window] = by_row.square().sum(-1).view(-1, hidden.shape[1]).cpu()
        for first in range(0, by_row.shape[1], ROW_BLOCK):
            part = by_row[:, first : first + ROW_BLOCK]
            rows[linear][first : first + ROW_BLOCK, : part.shape[1]].addmm_(part.T, part)

    def watch(linear: str, _: nn.Module, __: tuple, output: Tensor) -> None:
        output.register_hook(partial(note, linear))

    for linear, module in linears.items():
        module.register_forward_hook(partial(watch, linear))
    for each in every_experts:
        each.experts.module.forward = each.forward
    for window, batch in batches(hidden, model.device):
        for each in every_experts:
            each.first_token = window.start * hidden.shape[1]
        inputs, here = batch.requires_grad_(), call.at(window)
        here.left.update(tree_map_only(Tensor, lambda t: t.to(model.device).requires_grad_(), here.left))
        read = dict(here.left)
        outputs = run_block(block, inputs, here)
        written = newly_left(here.left, read)
        by_inputs, *by_read = torch.autograd.grad(
            [outputs, *tree_leaves(written)],
            [inputs, *tree_leaves(read)],
            [gradient[window].to(model.device), *_cut(left_gradients, written, window)],
            allow_unused=True,
        )
        gradient[window] = by_inputs.to(gradient.device)
        _add(left_gradients, read, by_read, window, len(hidden))
    for key in written:  # by the last batch, as by every one
        left_gradients.pop(key, None)
    count = sum(ranks.exchange(hidden.shape[:2].numel()))
    found = {f"{n}.tokens": t for n, t in tokens.items()} | {f"{n}.rows": (t / count).cpu() for n, t in rows.items()}
    for each in every_experts:
        found |= each.tensors(count)
    return {n: ranks.total(t) if n.endswith(".rows") else ranks.joined(t) for n, t in found.items()}


def _cut(gradients: LeftGradients, left: Mapping[Hashable, Any], window: slice) -> Iterator[Tensor]:
    """Gradients by the tensors in `left`, of the sequences in `window`; 0 where no later block has read them."""
    for key, value in left.items():
        for index, tensor in enumerate(tree_leaves(value)):
            yield gradients[key][index][window].to(tensor) if key in gradients else torch.zeros_like(tensor)


def _add(
    gradients: LeftGradients, left: Mapping[Hashable, Any], found: Sequence[Tensor | None], window: slice, count: int
) -> None:
    """Add what one of `count` sequences' batches has found; `found` is in the order of the tensors in `left`."""
    rest = iter(found)
    for key, value in left.items():
        leaves = tree_leaves(value)
        for index, (tensor, more) in enumerate(zip(leaves, rest, strict=False)):
            if more is not None:
                zeros = [torch.zeros(count, *leaf.shape[1:], dtype=leaf.dtype) for leaf in leaves]
                gradients.setdefault(key, zeros)[index][window] += more.to("cpu", tensor.dtype)
