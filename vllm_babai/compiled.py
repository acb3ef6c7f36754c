"""Loops that numba compiles, and the threads that run them side by side.

numba takes a second to import, so it is imported when the first loop is defined.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def compiled(function: Any, parallel: bool = False) -> Any:
    """Compile without the GIL, cached on disk where any cache directory can be written.

    parallel: loops over `numba.prange` run on all threads.
    """
    from numba import njit

    try:
        return njit(nogil=True, parallel=parallel, cache=True)(function)
    except RuntimeError:  # numba: no directory for the cache
        return njit(nogil=True, parallel=parallel)(function)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], start_worker: Callable[[], object] | None = None
) -> list[Result]:
    """`[function(item) for item in items]`, on as many threads as this process may use cores.

    start_worker: called first in every thread; not called where there is one item or one core, and so no thread.
    """
    items = list(items)
    workers = min(available_cores(), len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers, initializer=start_worker) as pool:
        return list(pool.map(function, items))
