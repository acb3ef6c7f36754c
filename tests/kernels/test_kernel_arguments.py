"""What Triton makes of the arguments of a launch: groups, and nothing that compiles again while serving."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trellis_cases import layout_of, random_trellis
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vllm_babai.triton_kernels import coded, dequantize, entropy, fused, lookup, overflow, transpose, unpack
from vllm_babai.triton_kernels.configs import BUCKETS, Config, Target
from vllm_babai.triton_kernels.experts import combine, gather, grouped, route
from vllm_babai.triton_kernels.experts import fused as experts_fused
from vllm_babai.triton_kernels.experts import trellis as experts_trellis
from vllm_babai.triton_kernels.layout import Geometry
from vllm_babai.triton_kernels.trellis import decode, prepare
from vllm_babai.triton_kernels.trellis import dequantize as trellis_dequantize
from vllm_babai.triton_kernels.trellis import fused as trellis_fused
from vllm_babai.triton_kernels.trellis.arguments import arguments as trellis_arguments
from vllm_babai.triton_kernels.tuning.bench import random_layout

MODULES = (coded, dequantize, entropy, fused, lookup, overflow, transpose, unpack)
MODULES += (decode, trellis_dequantize, trellis_fused, prepare, experts_fused, grouped)
MODULES += (route, gather, combine, experts_trellis)
FUNCTIONS = {
    f"{module.__name__.removeprefix('vllm_babai.triton_kernels.')}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if isinstance(function, JITFunction) and function.__module__ == module.__name__
}
CONFIG = Config(64, 2, 4, 4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_have_few_parameters_and_a_docstring(name: str) -> None:
    assert len(FUNCTIONS[name].arg_names) <= 8, f"{name}: {FUNCTIONS[name].arg_names}"
    assert inspect.getdoc(FUNCTIONS[name].fn), f"{name} has no docstring"


def specialization(
    kernel: JITFunction, monkeypatch: pytest.MonkeyPatch, launch: Callable[[], Any], module: Any = fused
) -> list[Any]:
    """What Triton distinguishes launches of `kernel`, of a module, by, for the one that `launch` makes."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound: list[Any] = []

    def record(*arguments: Any, **options: Any) -> None:
        bound.append(bind(*arguments, **options)[1])

    with monkeypatch.context() as patch:
        patch.setattr(module, kernel.__name__, _Launcher(record))
        launch()
    return bound[0]


class _Launcher:
    """Stands in for a kernel: `kernel[grid](…)` calls `record`."""

    def __init__(self, record: Callable[..., None]) -> None:
        self.record = record

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record


@pytest.mark.parametrize("tokens", BUCKETS)
def test_the_number_of_tokens_compiles_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what follows from it, how many splits a tile has."""
    geometry = Geometry(4, 4096, 512)
    layout = random_layout(geometry, 0.01, torch.device("cpu"))
    monkeypatch.setattr(fused, "transpose", lambda x, padded, dtype, target: x)
    seen = []
    for processors in (1, 16, 132):
        target = Target("cuda", "sm_90", "of no GPU", processors)
        for m in sorted({1 + tokens // 2, max(1, tokens - 1), tokens, tokens + 16 * (tokens == BUCKETS[-1])}):
            x = torch.zeros(m, 4096, dtype=torch.bfloat16)
            seen.append(
                specialization(
                    fused.fused_kernel,
                    monkeypatch,
                    lambda x=x, target=target: fused.multiply_fused(x, layout, geometry, CONFIG, tokens, target),
                )
            )
    assert all(one == seen[0] for one in seen)


def test_multiples_of_16_in_groups_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it loads would not be wide: every pointer, and the sizes of most layers."""
    geometry = Geometry(4, 4096, 512)
    layout = random_layout(geometry, 0.01, torch.device("cpu"))
    x, target = torch.zeros(1, 4096, dtype=torch.bfloat16), Target("cuda", "sm_90", "of no GPU", 16)
    layer, operands, sizes, *_ = specialization(
        fused.fused_kernel, monkeypatch, lambda: fused.multiply_fused(x, layout, geometry, CONFIG, 1, target)
    )
    assert layer[1] == ("D",) * 6
    assert operands[1] == ("D",) * 4
    assert sizes[1] == ("D",) * 4


@pytest.mark.parametrize("tokens", BUCKETS)
def test_nor_does_it_for_a_trellis(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel that prepares activations, and of the one that multiplies."""
    layout = layout_of(random_trellis(64, 2048))
    seen: dict[Any, list[Any]] = {prepare: [], trellis_fused: []}
    for processors in (1, 16, 132):
        target = Target("cuda", "sm_90", "of no GPU", processors)
        for m in sorted({1 + tokens // 2, max(1, tokens - 1), tokens, tokens + 16 * (tokens == BUCKETS[-1])}):
            x = torch.zeros(m, 2048, dtype=torch.bfloat16)
            with monkeypatch.context() as patch:
                patch.setattr(prepare, "prepare_kernel", _Launcher(lambda *arguments, **options: None))

                def launch(x: torch.Tensor = x, target: Target = target) -> Any:
                    return trellis_fused.multiply_fused(x, layout, tokens, target)

                found = specialization(trellis_fused.fused_kernel, monkeypatch, launch, trellis_fused)
                seen[trellis_fused].append(found)
            sizes = trellis_arguments(layout, 2048)[1]
            kernel = prepare.prepare_kernel
            seen[prepare].append(
                specialization(
                    kernel,
                    monkeypatch,
                    lambda x=x, target=target, s=sizes: prepare.prepare(x, s, len(x), target),
                    prepare,
                )
            )
    assert all(one == of_kernel[0] for of_kernel in seen.values() for one in of_kernel)
