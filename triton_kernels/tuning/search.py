"""The search for the fastest launch configuration: what is worth measuring, and in which order."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from vllm_babai.triton_kernels.configs import Config

FEW_TOKENS = 16  # for more, the sums of a tile need many warps
PROGRAMS = (1, 2, 3, 4, 6, 8, 12)  # a processor
FIRST_PROGRAMS = 4


def kernels(tokens: int) -> list[Config]:
    """Kernels worth compiling for a bucket of tokens, with FIRST_PROGRAMS: other numbers need no other kernel."""
    few = tokens <= FEW_TOKENS
    tiles = [(64, 1), (64, 2), (128, 2), (64, 4), (128, 4)] if few else [(64, 4), (128, 4)]
    stages = range(2, 6 if few else 5)
    return [Config(rows, warps, depth, FIRST_PROGRAMS) for (rows, warps), depth in product(tiles, stages)]


def search(candidates: Iterable[Config], measure: Callable[[Config], float]) -> Config:
    """The configuration of least time, found without measuring all of them.

    candidates: kernels as of `kernels`. For every tile (rows and warps) the best number of stages, with that the best
    number of programs; then everything of the best tile, for stages and programs share the memory of a processor.
    """
    measure = cache(measure)

    def fastest(configs: Iterable[Config]) -> Config:
        return min(configs, key=measure)

    by_tile = defaultdict(list)
    for kernel in candidates:
        by_tile[kernel.rows, kernel.warps].append(kernel)
    best = fastest(_launches(fastest(same_tile) for same_tile in by_tile.values()))
    return fastest(_launches(by_tile[best.rows, best.warps]))


def _launches(chosen: Iterable[Config]) -> Iterator[Config]:
    return (replace(kernel, programs_per_sm=programs) for kernel, programs in product(chosen, PROGRAMS))
