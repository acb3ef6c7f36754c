"""A run of every block on the meta device: what it returns, and which of its linears it calls, before anything is read.

The model around the blocks runs on a CPU with weights of zero, as masks and positions ask for the values of tensors.
"""

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import as_returned, hidden_states

TOKENS = 8  # enough for the short convolutions of hybrids


@dataclass(frozen=True)
class Tried:
    """What a block did. outputs: how many it returns in a tuple, None where it returns the hidden states alone.
    called: names in the block of the linears that it calls, in order.
    """

    outputs: int | None
    called: tuple[str, ...]


def try_blocks(decoder: nn.Module, list_name: str, name: str) -> list[Tried]:
    """Run all blocks of `decoder`, a module on the meta device, whose list of blocks is called `list_name` in it.

    name: of that list in the model, for errors. Raises QuantizationError that names a block which does not run.
    """
    blocks = decoder.get_submodule(list_name)
    assert isinstance(blocks, nn.ModuleList)
    tried: list[Tried] = []
    left: dict[int, dict] = {}
    trials = [_Trial(block, f"{name}.{index}", tried, left) for index, block in enumerate(blocks)]
    outer = copy.deepcopy(_without(decoder, list_name))
    outer.set_submodule(list_name, nn.ModuleList(trials))
    for module in outer.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(_zeros(parameter), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _zeros(buffer)
    with torch.no_grad():
        outer.eval()(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    if len(tried) != len(blocks):
        raise QuantizationError(
            f"{name}: the model runs {len(tried)} of its {len(blocks)} blocks, not each of them once"
        )
    return tried


class _Trial(nn.Module):
    """Stands in for a block: runs it on the meta device, and passes the hidden states on."""

    def __init__(self, block: nn.Module, name: str, tried: list[Tried], left: dict[int, dict]) -> None:
        super().__init__()
        self.state = (block, name, tried, left)  # in a tuple, so that the block is no module of the model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["state"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block, name, tried, left = self.state
        called: dict[str, None] = {}
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        hooks = [m.register_forward_pre_hook(lambda *_, n=n: called.setdefault(n)) for n, m in linears.items()]
        try:
            output = block(*_on_meta(args, left), **_on_meta(kwargs, left))
        except Exception as error:  # the model's own code, which may raise anything
            reason = " ".join(str(error).split())
            raise QuantizationError(
                f"{name} ({type(block).__name__}) does not run block by block, as quantizing needs it to: {reason}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        outputs = len(output) if isinstance(output, tuple) else None
        tried.append(Tried(outputs, tuple(called)))
        return as_returned(hidden_states(args, kwargs), outputs)


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


def _without(decoder: nn.Module, list_name: str) -> nn.Module:
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
