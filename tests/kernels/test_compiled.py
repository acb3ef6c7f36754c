"""The kernels as they are compiled for NVIDIA GPUs, run instruction by instruction on the CPU (`emulator`).

What the interpreter cannot see: inline assembly, layouts of matrix operands, asynchronous copies, constants that are
compiled in. Without blocks side by side, though, and without caches.
"""

from typing import Any

import numpy as np
import pytest
import torch
from emulator.compiled import Compiled
from emulator.operations import run
from emulator.ptx import Fault, Memory, Shape, parse
from expert_cases import check as check_experts
from expert_cases import random_experts
from interpreted import check, layout_of, random_weight
from test_hptq_decode import check_decoder, small_segments
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_babai.triton_kernels import coded, dequantize, entropy, fused, lookup, matmul, multiply_experts, transpose
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.experts import combine, gather, grouped, route
from vllm_babai.triton_kernels.experts import dispatch as experts_dispatch
from vllm_babai.triton_kernels.experts import fused as experts_fused
from vllm_babai.triton_kernels.layout import Geometry

KERNELS = (
    (fused, "fused_kernel"),
    (transpose, "transpose_kernel"),
    (dequantize, "dense_kernel"),
    (dequantize, "overflow_kernel"),
    (lookup, "dense_rows_kernel"),
    (lookup, "overflow_rows_kernel"),
    (entropy, "decode_kernel"),
    (coded, "multiply_kernel"),
    (route, "sort_kernel"),
    (gather, "gather_kernel"),
    (experts_fused, "experts_kernel"),
    (grouped, "product_kernel"),
    (combine, "combine_kernel"),
)
BF16, FP16 = torch.bfloat16, torch.float16


def compile_for(architecture: str, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Run all kernels as if tensors on the CPU were on a small GPU of this architecture."""
    torch.manual_seed(0)
    target = Target("cuda", architecture, architecture, 4)
    monkeypatch.setattr(Target, "of", lambda device: target)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), architecture))
    return target


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("architecture", "dtype", "columns", "groups", "tokens"),
    [
        ("sm_80", BF16, 333, 1, 1),
        ("sm_80", FP16, 640, 5, 11),
        ("sm_90", FP16, 640, 5, 1),
        ("sm_90", BF16, 333, 1, 16),
        ("sm_90", BF16, 640, 1, 64),
    ],
)
def test_product(
    architecture: str,
    bits: int,
    dtype: torch.dtype,
    columns: int,
    groups: int,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_for(architecture, monkeypatch)
    check(random_weight(bits, 96, columns, groups, overflow=0.05), bits, torch.randn(tokens, columns).to(dtype))


@pytest.mark.parametrize(
    ("architecture", "tokens"), [("sm_90", 3), ("sm_90", 17), ("sm_90", 65), ("sm_120", 1), ("sm_120", 16)]
)
def test_heavy_overflow(architecture: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of 32 bits, beyond what 16-bit floats hold, in two segments of columns; several tiles of tokens, too."""
    compile_for(architecture, monkeypatch)
    weight = random_weight(4, 40, 2100, overflow=0.05, spread=3000)
    assert layout_of(weight, 4).entries.dtype == torch.int32
    check(weight, 4, torch.randn(tokens, 2100).bfloat16())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("dtype", "groups"), [(torch.bfloat16, 1), (torch.float32, 9)])
def test_dequantized_weight_is_exact(
    bits: int, dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = compile_for("sm_90", monkeypatch)
    weight = random_weight(bits, 70, 288, groups, overflow=0.05, spread=40)
    dense = dequantize.dequantize(layout_of(weight, bits), Geometry(bits, 288, 70), dtype, target.backend)
    assert torch.equal(dense, weight.dequantize(dtype))


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 9), (4, 1), (5, 9), (8, 1)])
def test_rows_that_are_looked_up_are_exact(bits: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for("sm_90", monkeypatch)
    weight = random_weight(bits, 70, 288, groups, overflow=0.05, spread=40)
    ids = torch.randint(70, (3, 7))
    found = lookup.look_up(ids, layout_of(weight, bits), bits, (70, 288), torch.bfloat16)
    assert torch.equal(found, weight.dequantize(torch.bfloat16)[ids])


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_coded(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for(architecture, monkeypatch)
    small_segments(monkeypatch)
    check_decoder(11, 100, slice(0, 100), 1.5, 0.7, torch.rand(1, 1).bfloat16())
    check_decoder(6, 350, slice(30, 300), 5.0, 0.0, torch.rand(6, 3).bfloat16())


@pytest.mark.parametrize(
    ("architecture", "dtype", "groups", "tokens"),
    [
        ("sm_90", BF16, 1, 5),
        pytest.param("sm_90", BF16, 1, 1, marks=pytest.mark.long),
        pytest.param("sm_80", FP16, 2, 1, marks=pytest.mark.long),
        pytest.param("sm_80", FP16, 2, 5, marks=pytest.mark.long),
        pytest.param("sm_120", BF16, 1, 40, marks=pytest.mark.long),
    ],
)
def test_experts(
    architecture: str, dtype: torch.dtype, groups: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row a block, and blocks of sorted rows; some visits are another rank's."""
    compile_for(architecture, monkeypatch)
    spread = 3000 if dtype == BF16 else 40  # gate times up stays within fp16
    mixture = random_experts(3, 256, 64, 4, groups, spreads=(6, spread))
    if tokens != 5:
        mixture.biases = torch.randn(3, 128).to(dtype), torch.randn(3, 256).to(dtype)
    check_experts(mixture, torch.randn(tokens, 256).to(dtype), elsewhere=0.2)


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "dtype"), [("sm_80", BF16), ("sm_90", torch.float32), ("sm_120", FP16)])
def test_dequantized_experts(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of the workspace, with columns that fill no turn."""
    compile_for(architecture, monkeypatch)
    monkeypatch.setattr(experts_dispatch, "goes_dequantized", lambda *_: True)
    monkeypatch.setattr(dequantize, "WORKSPACE", 128 * 80)
    mixture = random_experts(2, 80, 72, 4)
    mixture.biases = torch.randn(2, 144).to(dtype), torch.randn(2, 80).to(dtype)
    check_experts(mixture, torch.randn(3, 80).to(dtype), elsewhere=0.3)


@pytest.mark.parametrize(
    ("tokens", "launches"),
    [
        (1, ["experts_kernel", "experts_kernel", "combine_kernel"]),
        (
            9,
            ["sort_kernel", "gather_kernel", "experts_kernel", "gather_kernel", "experts_kernel", "combine_kernel"],
        ),
    ],
)
def test_experts_launch_nothing_of_pytorch(tokens: int, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for counters, where a tile has several splits: a launch takes longer than an expert's weights."""
    compile_for("sm_90", monkeypatch)
    launched: list[str] = []
    experts, _ = random_experts(3, 256, 64, 4).tensors()

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if not str(function).startswith(("aten.empty", "aten.new_empty", "aten.view", "aten.slice", "aten.zeros")):
                launched.append(str(function))
            return function(*arguments, **(options or {}))

    monkeypatch.setattr(Compiled, "_launch", lambda self, *_: launched.append(self.kernel.__name__))
    x, weights, ids = torch.randn(tokens, 256).bfloat16(), torch.rand(tokens, 2), torch.zeros(tokens, 2).int()
    with Recorded():
        multiply_experts(x, weights, ids, experts, lambda outputs: outputs.view(-1, 64)[: 2 * tokens])
    assert launched == launches


def test_accesses_are_checked() -> None:
    load = """.entry load(.param .u64 load_param_0) {
        ld.param.b64 %rd1, [load_param_0];
        ld.global.b32 {%r1}, [%rd1 + OFFSET];
        ret;
    \n}"""
    memory = Memory(1 << 14)
    address = memory.map(np.arange(8, dtype=np.uint8))
    for offset, problem in (("4", None), ("2", "not aligned"), ("8", "outside of every tensor")):
        program = parse(load.replace("OFFSET", offset))
        if problem is None:
            run(program, [address], memory, [(0,)], Shape(32, 0))
            continue
        with pytest.raises(Fault, match=f"{problem}.* in block .*ld.global"):
            run(program, [address], memory, [(0,)], Shape(32, 0))


@pytest.mark.parametrize(
    ("architecture", "tokens", "overflow", "launches"),
    [
        ("sm_90", 1, 0.05, [("fused_kernel", False)]),
        ("sm_90", 8, 0.0, [("fused_kernel", False)]),
        ("sm_90", 8, 0.05, [("transpose_kernel", False), ("fused_kernel", True)]),
        ("sm_80", 8, 0.05, [("transpose_kernel", False), ("fused_kernel", False)]),
    ],
)
def test_overlaps_nothing_but_the_transposition(
    architecture: str,
    tokens: int,
    overflow: float,
    launches: list[tuple[str, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that starts before the one before it has ended waits for the transposition alone, so no other may be."""
    compile_for(architecture, monkeypatch)
    launched = []

    def record(self: Compiled, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        launched.append((self.kernel.__name__, options.get("launch_pdl", False)))

    monkeypatch.setattr(Compiled, "_launch", record)
    weight = random_weight(4, 64, 256, overflow=overflow)
    matmul(torch.randn(tokens, 256).bfloat16(), *layout_of(weight, 4), 4, 64)
    assert launched == launches
