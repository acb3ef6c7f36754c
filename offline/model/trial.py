"""A run of every block on the meta device: what it returns, and which of its linears it calls.

Before any tensor is read, so that a model that cannot be quantized is refused at once. The model around the blocks runs
on a CPU with weights of zero, as masks and positions ask for the values of tensors.
"""

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import StandIn, hidden_states
from vllm_babai.offline.model.experts import find_experts, routed

TOKENS = 8  # enough for the short convolutions of hybrids


@dataclass(frozen=True)
class Tried:
    """What a block did. outputs: how many it returns in a tuple, None where it returns the hidden states alone.
    called: names in the block of the linears that it calls. batch: dimension of its hidden states that is of sequences.
    """

    outputs: int | None
    called: frozenset[str]
    batch: int


def try_blocks(decoder: nn.Module, list_name: str, name: str) -> list[Tried]:
    """Run all blocks of `decoder`, a module on the meta device, whose list of blocks is called `list_name` in it.

    name: of that list in the model, for errors. Raises QuantizationError that names a block which does not run.
    """
    blocks = decoder.get_submodule(list_name)
    assert isinstance(blocks, nn.ModuleList)
    trials = [_Trial(block, f"{name}.{index}") for index, block in enumerate(blocks)]
    outer = copy.deepcopy(without(decoder, list_name))
    outer.set_submodule(list_name, nn.ModuleList(trials))
    for module in outer.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(_zeros(parameter), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _zeros(buffer)
    outer.eval()
    for sequences in (1, 2):
        left: dict[int, dict] = {}
        for trial in trials:
            trial.left = left
        with torch.no_grad():
            outer(torch.zeros(sequences, TOKENS, dtype=torch.long), use_cache=False)
    return [trial.result() for trial in trials]


class _Trial(StandIn):
    """Runs its block on the meta device, and passes the hidden states on. name: of the block.

    left: what the model's dictionaries, by identity, become there: blocks leave tensors in them for later ones.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__(block)
        self.name = name
        self.left: dict[int, dict] = {}
        self.called: set[str] = set()
        self.shapes: list[torch.Size] = []  # of the hidden states, for one sequence and for two

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (block,) = self.block
        experts = find_experts(block, self.name)
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        hooks = [module.register_forward_pre_hook(partial(self._note, name)) for name, module in linears.items()]
        for name, module in experts.items():
            module.forward = partial(_tried_experts, module, name)
        try:
            output = block(*_on_meta(args, self.left), **_on_meta(kwargs, self.left))
        except QuantizationError:
            raise
        except Exception as error:  # the model's own code, which may raise anything
            reason = " ".join(str(error).split())
            raise QuantizationError(
                f"{self.name} ({type(block).__name__}) does not run block by block, as quantizing needs it to: {reason}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for module in experts.values():
                del module.forward
        self.outputs = len(output) if isinstance(output, tuple) else None
        hidden = hidden_states(args, kwargs)
        self.shapes.append(hidden.shape)
        return self.returned(hidden)

    def result(self) -> Tried:
        """What was found. Raises QuantizationError for a block that was not called once for each batch."""
        if len(self.shapes) != 2:
            raise QuantizationError(
                f"{self.name} ({type(self.block[0]).__name__}): the model calls it {len(self.shapes) / 2:g} times for"
                " each token; only models that call every block once can be quantized"
            )
        batch = next(i for i, (one, two) in enumerate(zip(*self.shapes, strict=True)) if two == 2 * one)
        return Tried(self.outputs, frozenset(self.called), batch)

    def _note(self, linear: str, *_: Any) -> None:
        self.called.add(linear)


def _tried_experts(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a module of experts, whose way depends on values: checks how it is called."""
    return torch.empty_like(routed(module, name, args, kwargs).inputs)


def _on_meta(tree: Any, left: dict[int, dict]) -> Any:
    """Arguments on the meta device. left: dictionaries in which blocks leave tensors, by identity of the original."""
    if isinstance(tree, Tensor):
        return tree.to("meta")
    if type(tree) in (tuple, list):
        return type(tree)(_on_meta(value, left) for value in tree)
    if isinstance(tree, MutableMapping) and not tree:
        return left.setdefault(id(tree), {})
    if type(tree) is dict:
        return {key: _on_meta(value, left) for key, value in tree.items()}
    return tree


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device="cpu")


def without(decoder: nn.Module, list_name: str) -> nn.Module:
    """A shallow copy of the modules down to the list of blocks, which is empty in it."""
    parent_name, _, own = list_name.rpartition(".")
    result = copy.copy(decoder)
    result._modules = dict(decoder._modules)
    module = result
    for part in filter(None, parent_name.split(".")):
        inner = copy.copy(module._modules[part])
        assert inner is not None
        inner._modules = dict(inner._modules)
        module._modules[part] = inner
        module = inner
    module._modules[own] = nn.ModuleList()
    return result
