"""`babai tune`: measure launch configurations on the GPU at hand and write its configuration table.

What is measured is kept as it comes in a file next to the table, so that an interrupted run goes on where it stopped.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_babai.errors import QuantizationError
from vllm_babai.format import BIT_WIDTHS
from vllm_babai.progress import counting_progress
from vllm_babai.triton_kernels.configs import BUCKETS, FOLDER, Config, Entry, Table, Target, file_name
from vllm_babai.triton_kernels.layout import MAX_M_TILES, Geometry
from vllm_babai.triton_kernels.tuning.bench import Bench
from vllm_babai.triton_kernels.tuning.search import kernels, search
from vllm_babai.triton_kernels.tuning.unfinished import Unfinished

# output × input features: small models, and the layers of Llama-3-8B (fused QKV, output, gate-up, down)
LAYER_SHAPES = ((1024, 1024), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
MANY_TOKENS = (65, 96, 128, 192, 256, 384, 512)
SPEED_PERIOD = 3600  # seconds over which speed is averaged: the first shape of a bit width compiles for the others


@dataclass(frozen=True)
class Step:
    """One thing to find out. tokens: a bucket to find a configuration for, or None for `dequantize_from`."""

    geometry: Geometry
    tokens: int | None

    @property
    def name(self) -> str:
        """What the progress bar and the file of an unfinished run call it."""
        what = "many tokens" if self.tokens is None else f"{self.tokens} tokens"
        return f"{self.geometry.bits} bits, {self.geometry.out_features} × {self.geometry.in_features}, {what}"


def tune(
    device: torch.device | str = "cuda",
    path: Path | None = None,
    shapes: Iterable[tuple[int, int]] = LAYER_SHAPES,
    bit_widths: Iterable[int] = BIT_WIDTHS,
    console: Console | None = None,
) -> Path:
    """Measure every bit width, bucket of tokens and shape (out_features, in_features); write the table of this GPU.

    path: where the table goes, by default among the package's own, where it is found at the next start. Goes on with
    an interrupted run to the same path. Raises QuantizationError without a GPU or where `path` cannot be written.
    """
    console = console or Console()
    device, target = _gpu(device)
    path = path or FOLDER / f"{file_name(target.name)}.json"
    layers = [Geometry(bits, columns, rows) for bits, (rows, columns) in product(bit_widths, tuple(shapes))]
    unfinished = Unfinished.open(path, target, console)
    steps = [step for layer in layers for step in _steps(layer)]
    known = sum(step.name in unfinished.results for step in steps)
    if known:
        console.out(f"going on with {unfinished.path}: {known} of {len(steps)} measurements are there", highlight=False)
    with counting_progress("measured", console=console, speed_estimate_period=SPEED_PERIOD) as progress:
        task = progress.add_task("", total=len(steps), completed=known)
        for layer in layers:
            bench = Bench(layer, device, target)
            for step in _steps(layer):
                if step.name not in unfinished.results:
                    progress.update(task, description=step.name)
                    unfinished.add(step.name, _find_out(step, bench, unfinished.results))
                    progress.advance(task)
    table = _table(layers, unfinished.results)
    unfinished.publish(table)
    console.out(f"dequantizing first from {table.dequantize_from} tokens on", highlight=False)
    return path


def _gpu(device: torch.device | str) -> tuple[torch.device, Target]:
    try:
        device = torch.device(device)
        return device, Target.of(device)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that a device of this number is there
        raise QuantizationError(f"--device {device}: {error}") from error


def _steps(layer: Geometry) -> list[Step]:
    return [Step(layer, tokens) for tokens in (*BUCKETS, None)]


def _find_out(step: Step, bench: Bench, results: dict[str, Any]) -> Any:
    """The result of a step as JSON has it; results: of the steps before."""
    tokens = step.tokens
    if tokens is None:
        return dequantize_from(bench, Config(**results[Step(step.geometry, BUCKETS[-1]).name]))
    usable = bench.usable(kernels(tokens), tokens)
    if not usable:
        raise QuantizationError(f"{step.name}: none of the kernels compiles for this GPU, {bench.target.name}")
    return asdict(search(usable, lambda config: bench.fused_seconds(config, tokens, tokens)))


def dequantize_from(bench: Bench, config: Config) -> int:
    """The first number of tokens at which dequantizing the whole weight is faster than the fused kernel."""
    for m in MANY_TOKENS:
        if bench.dequantized_seconds(m) < bench.fused_seconds(config, BUCKETS[-1], m):
            return m
    return MAX_M_TILES * BUCKETS[-1] + 1


def _table(layers: list[Geometry], results: dict[str, Any]) -> Table:
    entries = [
        Entry(layer.bits, tokens, layer.out_features, layer.in_features, Config(**results[Step(layer, tokens).name]))
        for layer, tokens in product(layers, BUCKETS)
    ]
    thresholds = sorted(results[Step(layer, None).name] for layer in layers)
    return Table(thresholds[len(thresholds) // 2], tuple(entries))
