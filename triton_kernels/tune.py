"""`babai tune`: measure launch configurations on the GPU at hand and write its configuration table."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from vllm_babai.format import BIT_WIDTHS, Overflow
from vllm_babai.layout import DeviceLayout
from vllm_babai.triton_kernels.configs import BUCKETS, FOLDER, Config, Entry, Table, Target, file_name
from vllm_babai.triton_kernels.dequantize import multiply_dequantized
from vllm_babai.triton_kernels.fused import multiply_fused
from vllm_babai.triton_kernels.layout import MAX_M_TILES, PAIRS, TILE_ROWS, Geometry, pack_overflow
from vllm_babai.triton_kernels.timing import copies_needed, seconds_per_call

# output × input features: small models, and the layers of Llama-3-8B (fused QKV, output, gate-up, down)
LAYER_SHAPES = ((1024, 1024), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
OVERFLOW_RATE = 0.01
MANY_TOKENS = (65, 96, 128, 192, 256, 384, 512)

Measure = Callable[[Config], float]


@dataclass(frozen=True)
class Problem:
    """One product to find a configuration for."""

    geometry: Geometry
    tokens: int


def tune(
    device: torch.device | str = "cuda",
    path: Path | None = None,
    shapes: Iterable[tuple[int, int]] = LAYER_SHAPES,
    bit_widths: Iterable[int] = BIT_WIDTHS,
    report: Callable[[str], None] = print,
) -> Path:
    """Measure every bit width, bucket of tokens and shape (out_features, in_features); write the table of this GPU.

    path: where the table goes, by default among the package's own, where it is found at the next start. Raises
    RuntimeError without a GPU.
    """
    device = torch.device(device)
    target = Target.of(device)
    path = path or FOLDER / f"{file_name(target.name)}.json"
    shapes = tuple(shapes)
    entries, thresholds = [], []
    for bits, (out_features, in_features) in product(bit_widths, shapes):
        geometry = Geometry(bits, in_features, out_features)
        layouts = _layouts(geometry, device)
        for tokens in BUCKETS:
            problem = Problem(geometry, tokens)
            best = search(problem, _measure(problem, layouts, target))
            entries.append(Entry(bits, tokens, out_features, in_features, best))
            report(f"{bits} bits, {out_features} × {in_features}, {tokens} tokens: {best}")
        thresholds.append(_dequantize_from(geometry, layouts, entries[-1].config, target))
    threshold = sorted(thresholds)[len(thresholds) // 2]
    Table(threshold, tuple(entries)).write(path)
    report(f"dequantizing first from {threshold} tokens on; wrote {path}")
    return path


def candidates(problem: Problem) -> Iterator[Config]:
    """Configurations worth measuring."""
    few = problem.tokens <= 16
    for rows, warps, stages, programs in product((64, 128), (2, 4), (2, 3, 4, 5), (1, 2, 3, 4, 6, 8, 12)):
        if few or (warps == 4 and stages <= 4):
            yield Config(rows, warps, stages, programs)


def search(problem: Problem, measure: Measure) -> Config:
    """The candidate with the least time; those that do not compile or do not fit the GPU are left out."""
    timed = []
    for config in candidates(problem):
        try:
            timed.append((measure(config), config))
        except (CompilationError, OutOfResources, PTXASError):
            continue
    return min(timed, key=lambda pair: pair[0])[1]


def random_layout(geometry: Geometry, overflow_rate: float, device: torch.device, seed: int = 0) -> DeviceLayout:
    """A layer of random integers with one scale per row; any pattern of bits is a valid dense part."""
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.padded_rows // TILE_ROWS, geometry.column_blocks, geometry.words, TILE_ROWS, PAIRS)
    dense = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
    scales = torch.rand(1, geometry.padded_rows, generator=generator).mul(0.02).bfloat16().to(device)
    count = int(overflow_rate * geometry.out_features * geometry.in_features)
    place = torch.randint(geometry.out_features * geometry.in_features, (count,), generator=generator).unique()
    excess = torch.randint(1, 4, place.shape, generator=generator) * torch.randint(0, 2, place.shape).mul(2).sub(1)
    overflow = Overflow((place // geometry.in_features).int(), (place % geometry.in_features).int(), excess.int())
    entries, offsets = pack_overflow(overflow, geometry)
    return DeviceLayout(dense, scales, entries.to(device), offsets.to(device))


def _layouts(geometry: Geometry, device: torch.device) -> list[DeviceLayout]:
    """Copies of one random layer, as many as it takes to leave the cache cold."""
    layout = random_layout(geometry, OVERFLOW_RATE, device)
    copies = copies_needed(layout.dense.nbytes, device)
    return [DeviceLayout(*(tensor.clone() for tensor in layout)) for _ in range(copies)]


def _activations(geometry: Geometry, tokens: int, layouts: list[DeviceLayout]) -> Tensor:
    return torch.randn(tokens, geometry.in_features, dtype=torch.bfloat16, device=layouts[0].dense.device)


def _measure(problem: Problem, layouts: list[DeviceLayout], target: Target) -> Measure:
    geometry, tokens = problem.geometry, problem.tokens
    x = _activations(geometry, tokens, layouts)

    def measure(config: Config) -> float:
        def call(layout: DeviceLayout) -> Callable[[], Tensor]:
            return lambda: multiply_fused(x, layout, geometry, config, tokens, target)

        return seconds_per_call([call(layout) for layout in layouts])

    return measure


def _dequantize_from(geometry: Geometry, layouts: list[DeviceLayout], config: Config, target: Target) -> int:
    """The first number of tokens at which dequantizing the whole weight is faster than the fused kernel."""
    for m in MANY_TOKENS:
        x = _activations(geometry, m, layouts)

        def fused(layout: DeviceLayout, x: Tensor = x) -> Callable[[], Tensor]:
            return lambda: multiply_fused(x, layout, geometry, config, BUCKETS[-1], target)

        def dequantized(layout: DeviceLayout, x: Tensor = x) -> Callable[[], Tensor]:
            return lambda: multiply_dequantized(x, layout, geometry, target.backend)

        if seconds_per_call([dequantized(one) for one in layouts]) < seconds_per_call([fused(one) for one in layouts]):
            return m
    return MAX_M_TILES * BUCKETS[-1] + 1
