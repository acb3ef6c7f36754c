"""The processes of one run, as torchrun starts them: what each has of the work, and how they come together.

Every process, a rank, goes the whole way through the model with calibration sequences of its own. Moments are summed
over ranks; each linear is then quantized by one rank, its owner, which gives its weight to the others. The first rank
alone writes and speaks. Sums go in the order of ranks, so a run with as many ranks gives the same bytes again.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vllm_babai.errors import QuantizationError

Value = TypeVar("Value")

# Numbers that are summed at a time: with N ranks a sum takes N times as many besides. A choice: 64 MiB of float32.
PANEL = 1 << 24
# How long a rank waits for the others. A choice, longer than any linear takes: torchrun ends all when one has died.
PATIENCE = timedelta(days=1)
FAILED = "babai/failed"  # counts, in the store that torchrun keeps, the ranks that could not go on


class SaidElsewhere(QuantizationError):
    """Another rank has failed, and says why."""


@dataclass(frozen=True)
class Ranks:
    """number: of this rank. count: of all. on_host: of those on this machine, which share its memory."""

    number: int = 0
    count: int = 1
    on_host: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.number == 0

    def share(self, sequences: int) -> slice:
        """Which of so many sequences are this rank's."""
        return slice(sequences * self.number // self.count, sequences * (self.number + 1) // self.count)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a contiguous tensor, in its place and the same on each."""
        if self.count > 1:
            for panel in tensor.view(-1).split(PANEL):
                first, *others = parts = [torch.empty_like(panel) for _ in range(self.count)]
                with _others_needed():
                    dist.all_gather(parts, panel)
                for other in others:
                    first += other
                panel.copy_(first)
        return tensor

    def joined(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, one after the other along the first dimension, in which alone they may differ."""
        if self.count == 1:
            return tensor
        parts = [tensor.new_empty(length, *tensor.shape[1:]) for length in self.exchange(len(tensor))]
        parts[self.number].copy_(tensor)
        for owner, part in enumerate(parts):
            self.take(part, owner)
        return torch.cat(parts)

    def take(self, tensor: Tensor, owner: int) -> None:
        """Give a tensor the values that it has on its owner."""
        if self.count > 1:
            sent = tensor.detach().contiguous()
            with _others_needed():
                dist.broadcast(sent, owner)
            if self.number != owner and sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)

    def exchange(self, value: Value) -> list[Value]:
        """What each rank has given, by number; anything that can be pickled."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            with _others_needed():
                dist.all_gather_object(found, value)
        return found

    def collect(self, value: Value) -> list[Value]:
        """`exchange` for the first rank; the others get nothing."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.is_first else None
        with _others_needed():
            dist.gather_object(value, found)
        return found or []

    def once(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, for all. Where it fails, all do."""
        made: list[Any] = [None]
        with self.together():
            if self.is_first:
                made = [make()]
        if self.count > 1:
            with _others_needed():
                dist.broadcast_object_list(made)
        return made[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one rank raises QuantizationError all end, and none waits for it. No rank may need another within."""
        failure = None
        try:
            yield
        except QuantizationError as error:
            failure = error
        failed = self.exchange(failure is not None)
        if failure is not None:
            raise failure
        if any(failed):
            raise SaidElsewhere(f"rank {failed.index(True)} has failed, and the run with it")


ALONE = Ranks()


def owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Name → rank, of `count`, for work of these sizes: the largest first, each to the rank with the least to do."""
    loads, found = [0] * count, dict.fromkeys(sizes, 0)
    for name in sorted(sizes, key=lambda each: -sizes[each]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found


def speaks() -> bool:
    """Whether this process is the first rank, or the only one, as far as its environment tells."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def rank_device(device: torch.device) -> torch.device:
    """The device of this rank: where there are several each has a GPU of its own.

    Raises QuantizationError where there are too few, or one GPU is asked for by number.
    """
    if device.type != "cuda" or not dist.is_torchelastic_launched():
        return device
    if device.index is not None and int(os.environ["WORLD_SIZE"]) > 1:
        raise QuantizationError(f"--device {device} is one GPU, and every rank of torchrun needs its own: leave it out")
    own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= there:
        raise QuantizationError(
            f"there are {there} GPUs for {os.environ['LOCAL_WORLD_SIZE']} ranks: lower --nproc-per-node"
        )
    return torch.device("cuda", own)


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or this process alone. device: what this rank computes on.

    Of those that raise QuantizationError all but the first to do so raise SaidElsewhere.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield Ranks(number, count, int(os.environ["LOCAL_WORLD_SIZE"]))
    except SaidElsewhere:
        raise
    except QuantizationError as error:
        if store.add(FAILED, 1) > 1:
            raise SaidElsewhere(str(error)) from error
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_needed() -> Iterator[None]:
    """Say in one line that another rank has gone; the backends raise plain RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise QuantizationError(
            f"another rank has ended, and this run with it; the same command goes on with --resume ({reason})"
        ) from error
