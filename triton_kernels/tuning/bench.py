"""What `babai tune` measures on a GPU: both ways to multiply with a random layer, all kernels compiled beforehand."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from vllm_babai.format import Overflow, integer_range
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.configs import Config, Target
from vllm_babai.triton_kernels.dequantize import multiply_dequantized
from vllm_babai.triton_kernels.fused import fused_kernel, multiply_fused
from vllm_babai.triton_kernels.layout import ROWS_AT_A_TIME, Geometry, pack_overflow, pack_rows
from vllm_babai.triton_kernels.tuning.timing import copies_needed, seconds_per_call

OVERFLOW_RATE = 0.01


@dataclass(frozen=True)
class Bench:
    """A random layer on the GPU, made when something is first measured."""

    geometry: Geometry
    device: torch.device
    target: Target

    def usable(self, configs: Sequence[Config], tokens: int) -> list[Config]:
        """Those whose kernels compile and fit the GPU. What is measured of them later compiles no more."""
        x, layout = self._activations(tokens), self.layouts[0]

        def launch(config: Config) -> None:
            with torch.cuda.device_of(x):  # every thread has a current device of its own
                multiply_fused(x, layout, self.geometry, config, tokens, self.target)

        return launchable(configs, launch)

    def fused_seconds(self, config: Config, tokens: int, m: int) -> float:
        """Time of the fused kernel for m tokens, in one tile or several of the bucket `tokens`."""
        return self._seconds(m, lambda x, one: multiply_fused(x, one, self.geometry, config, tokens, self.target))

    def dequantized_seconds(self, m: int) -> float:
        """Time for m tokens when the whole weight is dequantized first."""
        return self._seconds(m, lambda x, one: multiply_dequantized(x, one, self.geometry, self.target.backend))

    def _seconds(self, m: int, multiply: Callable[[Tensor, DeviceLayout], Tensor]) -> float:
        x = self._activations(m)

        def call(layout: DeviceLayout) -> Callable[[], Tensor]:
            return lambda: multiply(x, layout)

        with torch.cuda.device_of(x):
            return seconds_per_call([call(layout) for layout in self.layouts])

    @cached_property
    def layouts(self) -> list[DeviceLayout]:
        """Copies of the layer, as many as it takes to leave the cache cold."""
        layout = random_layout(self.geometry, OVERFLOW_RATE, self.device)
        copies = copies_needed(layout.dense.nbytes, self.device)
        return [layout, *(DeviceLayout(*(tensor.clone() for tensor in layout)) for _ in range(copies - 1))]

    def _activations(self, m: int) -> Tensor:
        return torch.randn(m, self.geometry.in_features, dtype=torch.bfloat16, device=self.device)


def launchable(configs: Sequence[Config], launch: Callable[[Config], object]) -> list[Config]:
    """Those of which a launch succeeds. They compile side by side, for the most part outside Python's lock.

    What fails is launched again alone before it is left out: in Python up to 3.11.7 and 3.12.1 `ast.parse`, with which
    Triton begins, fails at times when threads meet in it. A kernel's hash would stay wrong, hence it is made before.
    """
    fused_kernel.cache_key  # noqa: B018

    def succeeds(config: Config) -> bool:
        try:
            launch(config)
        except Exception:
            return False
        return True

    def succeeds_alone(config: Config) -> bool:
        try:
            launch(config)
        except (CompilationError, OutOfResources, PTXASError):
            return False
        return True

    with ThreadPoolExecutor() as pool:
        succeeded = list(pool.map(succeeds, configs))
    return [config for config, done in zip(configs, succeeded, strict=True) if done or succeeds_alone(config)]


def random_layout(
    geometry: Geometry, overflow_rate: float, device: torch.device, seed: int = 0, groups: int = 1
) -> DeviceLayout:
    """A layer of random integers with `groups` scales a row; overflow lies at the ends of the dense range."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = geometry.out_features, geometry.in_features
    low, high = integer_range(geometry.bits)
    place = torch.randint(rows * columns, (int(overflow_rate * rows * columns),), generator=generator).unique()
    excess = torch.randint(1, 4, place.shape, generator=generator)
    excess *= torch.randint(0, 2, place.shape, generator=generator).mul(2).sub(1)
    entries, offsets = pack_overflow(
        Overflow((place // columns).int(), (place % columns).int(), excess.int()), geometry
    )
    place, end = place.to(device), torch.where(excess > 0, high, low).short().to(device)
    tiles = []
    for first in range(0, rows, ROWS_AT_A_TIME):
        count = min(ROWS_AT_A_TIME, rows - first)
        integers = torch.randint(low, high + 1, (count, columns), dtype=torch.int16, device=device)
        own = (place >= first * columns) & (place < (first + count) * columns)
        integers.view(-1)[place[own] - first * columns] = end[own]
        tiles.append(pack_rows(integers, geometry))
    scales = torch.rand(groups, geometry.padded_rows, generator=generator).mul(0.02).bfloat16().to(device)
    return DeviceLayout(torch.cat(tiles), scales, entries.to(device), offsets.to(device))
