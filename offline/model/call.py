"""How a model calls its decoder blocks: noted once per sequence, repeated on any batch of the sequences.

Blocks are called with hidden states and much else: masks and positions, which are the same for every sequence of the
calibration text; embeddings of their own (Gemma 3n and 4), which are not; a dictionary in which a block leaves keys and
values for later ones. A `Call` holds all of this for all sequences.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vllm_babai.errors import QuantizationError

Path = tuple[Hashable, ...]  # of an argument: where it stands in the arguments


class Hidden(NamedTuple):
    """Stands for the hidden states among the arguments. batch: their dimension of sequences; the next is of tokens."""

    batch: int = 0


class Left(NamedTuple):
    """Stands for the dictionary in which blocks leave tensors for later ones."""


@dataclass(frozen=True)
class PerSequence:
    """A tensor of which every sequence has its own part. parts: [sequences, …]. batch: the dimension of a part that is
    of sequences.
    """

    parts: Tensor
    batch: int


@dataclass(frozen=True)
class Repeated:
    """A tensor that stands in the arguments once for every sequence, one after the other along dimension `batch`."""

    part: Tensor
    batch: int


@dataclass(frozen=True)
class Call:
    """Arguments of a block with stand-ins for what depends on the batch: see the classes above.

    left: what earlier blocks have left, key → tensors whose first dimension is of sequences.
    """

    positional: tuple[Any, ...] = (Hidden(),)
    keywords: dict[str, Any] = field(default_factory=dict)
    left: dict[Hashable, Any] = field(default_factory=dict)

    def at(self, window: slice) -> "Call":
        """The call for a batch of the sequences in `window`."""

        def cut(_: Path, leaf: Any) -> Any:
            return replace(leaf, parts=leaf.parts[window]) if isinstance(leaf, PerSequence) else leaf

        left = {key: tree_map_only(Tensor, lambda tensor: tensor[window], value) for key, value in self.left.items()}
        return Call(_mapped(self.positional, cut), _mapped(self.keywords, cut), left)

    def of(self, left: dict[Hashable, Any]) -> "Call":
        """The same call after other blocks have left `left`."""
        return replace(self, left=left)

    @property
    def hidden(self) -> Hidden:
        """Where the batch is in the hidden states as the block takes them."""
        leaves = (leaf for each in (self.positional, self.keywords) for _, leaf in leaves_of(each))
        return next(leaf for leaf in leaves if isinstance(leaf, Hidden))


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Outputs of a block for a batch of hidden states [sequences, length, …]; `call` is that for this batch.

    What the block leaves for later ones is in `call.left` afterwards.
    """

    def argument(_: Path, leaf: Any) -> Any:
        match leaf:
            case Hidden(batch):
                return hidden.movedim((0, 1), (batch, batch + 1))
            case Left():
                return left
            case PerSequence(parts, batch):
                return torch.cat(list(parts.to(hidden.device)), batch)
            case Repeated(part, batch):
                return torch.cat([part] * len(hidden), batch)
        return leaf

    left = tree_map_only(Tensor, lambda tensor: tensor.to(hidden.device), call.left)
    given, batch = dict(left), call.hidden.batch
    output = block(*_mapped(call.positional, argument), **_mapped(call.keywords, argument))
    call.left.update(newly_left(left, given))
    output = output[0] if isinstance(output, tuple) else output
    return output.movedim((batch, batch + 1), (0, 1))


def newly_left(now: dict[Hashable, Any], before: dict[Hashable, Any]) -> dict[Hashable, Any]:
    """What a block has left that was not there before, or was another."""
    return {key: value for key, value in now.items() if value is not before.get(key)}


class StandIn(nn.Module):
    """Stands in for a decoder block in its model: passes the hidden states on.

    outputs: how many outputs the block returns in a tuple, or None where it returns the hidden states alone.
    """

    def __init__(self, block: nn.Module, outputs: int | None = None) -> None:
        super().__init__()
        self.block = (block,)  # in a tuple, so that it is no module of the model
        self.outputs = outputs

    def __getattr__(self, name: str) -> Any:
        """What models read off their blocks: attributes of the block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned(hidden_states(args, kwargs))

    def returned(self, hidden: Tensor) -> Any:
        """Hidden states as the block returns them."""
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))


class Recorder(StandIn):
    """Notes what it is called with, too: `args` and `kwargs` are those of the last call."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        return super().forward(*args, **kwargs)


class Injector(StandIn):
    """Passes on `hidden` [sequences, length, …], whatever it is given. batch: see `Hidden`."""

    def __init__(self, block: nn.Module, outputs: int | None, batch: int) -> None:
        super().__init__(block, outputs)
        self.batch, self.hidden = batch, torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned(self.hidden.movedim((0, 1), (self.batch, self.batch + 1)))


def hidden_states(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first by position, or those of that name."""
    return args[0] if args else kwargs["hidden_states"]


def leaves_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All leaves of nested tuples, lists and dictionaries. Named tuples and empty dictionaries are leaves."""
    if type(tree) in (tuple, list):
        for index, value in enumerate(tree):
            yield from leaves_of(value, (*path, index))
    elif type(tree) is dict and (tree or not path):
        for key, value in tree.items():
            yield from leaves_of(value, (*path, key))
    else:
        yield path, tree


def _mapped(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The tree with other leaves."""
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(value, change, (*path, index)) for index, value in enumerate(tree))
    if type(tree) is dict and (tree or not path):
        return {key: _mapped(value, change, (*path, key)) for key, value in tree.items()}
    return change(path, tree)


class Recording:
    """Makes a `Call` of what a `Recorder` has noted of one block. block: its name.

    Arguments that are equal for every sequence are kept once, or a mask of 2048² would be there for each.
    """

    def __init__(self, block: str) -> None:
        self.block = block
        self.first: dict[Path, Any] = {}
        self.arguments: tuple[tuple, Mapping[str, Any]] = ((), {})
        self.doubled: dict[Path, Any] = {}
        self.others: dict[Path, list[Tensor]] = {}
        self.sequences = 0

    def note_doubled(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The call for a batch of the first sequence twice: it tells which dimensions are the batch's."""
        self.doubled = dict(leaves_of([args, kwargs]))

    def note(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The call for the next sequence alone; its hidden states, [1, length, …]."""
        leaves = dict(leaves_of([args, kwargs]))
        if not self.sequences:
            self.first, self.arguments = leaves, (args, kwargs)
        for path, leaf in leaves.items():
            if path != self._hidden_path and not _equal(leaf, self.first.get(path)):
                if not isinstance(leaf, Tensor):
                    raise self._error(path, "differs from sequence to sequence and is no tensor")
                self.others.setdefault(path, [self.first[path]] * self.sequences)
        for path, parts in self.others.items():
            parts.append(leaves[path])
        self.sequences += 1
        batch = self._batch(self._hidden_path)
        return hidden_states(args, kwargs).movedim((batch, batch + 1), (0, 1))

    def call(self, stacked: dict[tuple[int, ...], Tensor]) -> Call:
        """The call for all sequences. stacked: what was put together for other blocks, by identity of the parts."""

        def stand_in(path: Path, leaf: Any) -> Any:
            if path == self._hidden_path:
                return Hidden(self._batch(path))
            if isinstance(leaf, MutableMapping) and not leaf:
                return Left()
            if path in self.others:
                parts = self.others[path]
                key = tuple(map(id, parts))
                if key not in stacked:
                    stacked[key] = torch.stack(parts)
                return PerSequence(stacked[key], self._batch(path))
            if isinstance(leaf, Tensor) and leaf.shape != self.doubled[path].shape:
                batch = self._batch(path)
                if leaf.shape[batch] > 1:  # where it is 1 the block broadcasts it
                    if not torch.equal(self.doubled[path], torch.cat([leaf, leaf], batch)):
                        raise self._error(path, "is arranged by batch in a way that cannot be repeated")
                    return Repeated(leaf, batch)
            return leaf

        args, kwargs = _mapped(list(self.arguments), stand_in)
        return Call(args, kwargs)

    @property
    def _hidden_path(self) -> Path:
        return (0, 0) if self.arguments[0] else (1, "hidden_states")

    def _batch(self, path: Path) -> int:
        """The dimension that grows with the number of sequences."""
        sizes, doubled = self.first[path].shape, self.doubled[path].shape
        for dimension, (one, two) in enumerate(zip(sizes, doubled, strict=True)):
            if two == 2 * one:
                return dimension
        raise self._error(path, "differs from sequence to sequence, but has no dimension for a batch of them")

    def _error(self, path: Path, trouble: str) -> QuantizationError:
        argument = path[1] if path[0] == 1 else f"number {path[1]}"
        return QuantizationError(
            f"{self.block}: its argument {argument} {trouble}; this way of calling a block is not supported"
        )


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, bool | int | float | str | None):
        return one == other
    return type(one) is type(other)  # caches, configurations: objects of the model that know of no sequence
