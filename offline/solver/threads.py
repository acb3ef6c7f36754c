"""Threads of blocks that multiply with torch: no more in all than there are cores."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from vllm_babai.compiled import available_cores, parallel_map

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_products(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`parallel_map` of a function that calls torch, whose products would take as many threads again in every worker.

    With at least as many items as cores each product runs on one thread, so results do not depend on the number of
    cores. The caller's number of threads is unchanged afterwards.
    """
    items = list(items)
    before = torch.get_num_threads()
    each = max(1, min(before, available_cores() // max(1, min(available_cores(), len(items)))))
    try:
        return parallel_map(function, items, lambda: torch.set_num_threads(each))
    finally:
        torch.set_num_threads(before)  # a worker's setting is also the default of threads that start later
