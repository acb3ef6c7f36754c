"""The op `babai::matmul` on the CPU: against float64, in every width, grouping and dtype, eagerly and compiled."""

import ctypes
import runpy
import subprocess
import sys
from typing import Any

import numba.core.caching
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_babai.cpu import backend as cpu
from vllm_babai.cpu import loops as cpu_loops
from vllm_babai.cpu.arguments import DenseArguments, ExpandArguments, InsertArguments
from vllm_babai.cpu.kernel import Bfloat16, has_bfloat16
from vllm_babai.format import SSQR, LatticeWeight, decode_overflow, integer_range
from vllm_babai.ops.backends import backend
from vllm_babai.ops.layout import DeviceLayout

CPU = torch.device("cpu")
BITS = (2, 3, 4, 5, 8)


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int = -1, rate: float = 0.02
) -> LatticeWeight:
    """Integers that fill the dense range; a share `rate` of them overflows, some by much. Scales are of either sign."""
    low, high = integer_range(bits)
    integers = torch.randint(low, high + 1, (out_features, in_features), dtype=torch.int16)
    over = torch.rand(integers.shape) < rate
    integers[over] = (integers[over] * torch.randint(2, 100, (int(over.sum()),))).short()
    groups = 1 if group_size == -1 else in_features // group_size
    scales = 10 ** torch.empty(out_features, groups).uniform_(-6, -1)
    scales[torch.rand(scales.shape) < 0.5] *= -1
    return LatticeWeight(integers, scales.bfloat16())


def layout_of(weight: LatticeWeight, bits: int) -> DeviceLayout:
    stored = SSQR.encode(weight, bits)
    in_features = weight.integers.shape[1]
    return cpu.device_layout(stored.qweight, stored.scales, decode_overflow(stored.overflow), bits, in_features, CPU)


def multiply(x: Tensor, weight: LatticeWeight, bits: int) -> Tensor:
    return torch.ops.babai.matmul(x, *layout_of(weight, bits), bits, len(weight.integers))


def assert_close_to_exact(y: Tensor, x: Tensor, weight: LatticeWeight) -> None:
    """Error no larger than 1.5 times that of a matmul with the dequantized weight in the dtype of x."""
    dense = weight.dequantize()
    exact = x.double() @ dense.double().t()
    peer = torch.nn.functional.linear(x, dense.to(x.dtype)).double()
    assert y.dtype == x.dtype
    assert (y.double() - exact).norm() <= 1.5 * (peer - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 12, 17, 70])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", BITS)
def test_matches_float64(bits: int, group_size: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    weight = random_weight(96, 128, bits, group_size)
    x = torch.randn(tokens, 128, dtype=torch.bfloat16)
    x[:, 5] *= 100  # activations have outlier channels
    assert_close_to_exact(multiply(x, weight, bits), x, weight)


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(200, 300, -1), (70, 288, 32), (1, 17, -1)])
@pytest.mark.parametrize("bits", BITS)
def test_rows_that_are_looked_up_are_exact(bits: int, rows: int, columns: int, group_size: int) -> None:
    torch.manual_seed(bits)
    weight = random_weight(rows, columns, bits, group_size)
    layout = layout_of(weight, bits)
    for shape in ((7,), (2, 3), (0,)):
        ids = torch.randint(rows, shape)
        for dtype in (torch.float32, torch.bfloat16):
            found = torch.ops.babai.lookup(ids, *layout, bits, rows, columns, dtype)
            assert torch.equal(found, weight.dequantize(dtype)[ids])
    with pytest.raises(IndexError, match=f"the embedding has {rows} rows"):
        torch.ops.babai.lookup(torch.tensor([0, rows]), *layout, bits, rows, columns, torch.float32)
    with pytest.raises(ValueError, match=f"{rows + 64} × {columns} with {bits} bits"):
        torch.ops.babai.lookup(torch.tensor([0]), *layout, bits, rows + 64, columns, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_activation_dtypes(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = random_weight(64, 64, bits)
    x = torch.randn(5, 64).to(dtype)
    assert_close_to_exact(multiply(x, weight, bits), x, weight)


@settings(max_examples=30, deadline=None)
@given(
    out_features=st.integers(1, 140),
    in_features=st.integers(1, 140),
    bits=st.sampled_from(BITS),
    rate=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    lead=st.sampled_from([(), (1,), (2, 3), (0,)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_any_shape(
    out_features: int, in_features: int, bits: int, rate: float, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = random_weight(out_features, in_features, bits, rate=rate)
    x = torch.randn(*lead, in_features).to(dtype)
    y = multiply(x, weight, bits)
    assert y.shape == (*lead, out_features)
    assert_close_to_exact(y, x, weight)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", BITS)
def test_many_tokens(
    bits: int, group_size: int, dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    weight = random_weight(300, 96, bits, group_size)
    x = torch.randn(cpu.DEQUANTIZE_TOKENS + 5, 96).to(dtype)
    assert_close_to_exact(multiply(x, weight, bits), x, weight)


@pytest.mark.parametrize("group_size", [-1, 16, 64, 256])
@pytest.mark.parametrize("bits", BITS)
def test_groups_and_blocks_of_columns(bits: int, group_size: int) -> None:
    """Groups smaller and larger than a block, and a last block that is not full."""
    torch.manual_seed(0)
    weight = random_weight(70, 330 if group_size == -1 else 768 - group_size, bits, group_size)
    for tokens in (1, cpu.EXPAND_TOKENS[bits], 300):
        x = torch.randn(tokens, weight.integers.shape[1], dtype=torch.bfloat16)
        assert_close_to_exact(multiply(x, weight, bits), x, weight)


@pytest.mark.skipif(not has_bfloat16(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("bits", BITS)
def test_expanded_tiles_hold_the_lattice_point(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens: integers rounded to bfloat16, overflow included, then scaled and rounded."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    weight = random_weight(70, 300, bits, rate=0.1)
    expected = weight.integers.bfloat16().float() * weight.scales.float()
    y = multiply(torch.eye(300, dtype=torch.bfloat16), weight, bits)
    assert torch.equal(y.t(), expected.bfloat16())


def test_expanded_tiles_call_every_kernel_with_its_arguments() -> None:
    """The loop for many tokens on any processor, with kernels that only note how they are called."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def noting(name: str, arguments: int) -> Any:
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(lambda *given: calls.append((name, given)))

    dense, expand, insert = (noting(name, count) for name, count in (("dense", 9), ("expand", 3), ("insert", 3)))
    addresses = [ctypes.cast(kernel, ctypes.c_void_p).value for kernel in (dense, expand, insert)]
    words, entries = np.zeros((1, 32, 64), np.int32), np.zeros(3, np.int32)
    scales, offsets = np.zeros((1, 64), np.float32), np.array([0, 2, 3], np.int32)
    x, y = np.zeros((2, 2, 128), np.uint16), np.zeros((2, 64), np.uint16)
    kernels = ((addresses[0],) * 6, *addresses[1:])
    cpu_loops.run_expanded_tiles(kernels, 4, x, (words, scales, entries, offsets), y)

    assert [name for name, _ in calls] == ["expand", "insert", "dense"] * 2
    for block in range(2):
        expanding, inserting, multiplying = (given for _, given in calls[3 * block : 3 * block + 3])
        pairs = expanding[2]
        assert expanding == ExpandArguments(words.ctypes.data + 16 * block * 256, 16, pairs)
        assert inserting == InsertArguments(entries.ctypes.data + 8 * block, 2 - block, pairs)
        result = multiplying[3]
        x_at = x.ctypes.data + block * x[0].nbytes
        assert multiplying == DenseArguments(x_at, pairs, scales.ctypes.data, result, 256, 256, 256, 1, 64)


@pytest.mark.parametrize("bits", BITS)
def test_holds_the_lattice_point_exactly(bits: int) -> None:
    weight = random_weight(70, 100, bits, rate=0.1)
    assert torch.equal(multiply(torch.eye(100), weight, bits).t(), weight.dequantize())


def test_activations_need_not_be_contiguous() -> None:
    weight = random_weight(64, 64, 4)
    x = torch.randn(64, 6, dtype=torch.bfloat16).t()
    assert torch.equal(multiply(x, weight, 4), multiply(x.contiguous(), weight, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_one_token_need_not_be_contiguous(dtype: torch.dtype) -> None:
    weight = random_weight(64, 64, 4)
    x = torch.randn(1, 128).to(dtype)[:, ::2]
    assert torch.equal(multiply(x, weight, 4), multiply(x.contiguous(), weight, 4))


@pytest.mark.skipif(not has_bfloat16(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("bits", BITS)
def test_both_arithmetics_agree(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = random_weight(64, 128, bits, 32)
    x = torch.randn(min(cpu.EXPAND_TOKENS.values()) - 1, 128, dtype=torch.bfloat16)
    with_pairs = multiply(x, weight, bits)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    torch.testing.assert_close(multiply(x, weight, bits), with_pairs)
    assert Bfloat16.activation_bytes == 2


def test_default_dtype_does_not_matter() -> None:
    weight = random_weight(64, 64, 4)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = multiply(x, weight, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(multiply(x, weight, 4), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("lead", [(0,), (1,), (2,), (3,), (4,), (5,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_laid_out_as_the_fake_says(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = layout_of(random_weight(96, 64, 4), 4)
    for x in (torch.randn(*lead, 64).to(dtype), torch.randn(64, *lead).to(dtype).movedim(0, -1)):
        y = torch.ops.babai.matmul(x, *layout, 4, 96)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = torch.ops.babai.matmul(mode.from_tensor(x), *layout, 4, 96)
        assert (y.shape, y.stride(), y.dtype, y.device) == (fake.shape, fake.stride(), fake.dtype, fake.device)


@pytest.mark.parametrize(
    ("bits", "in_features", "out_features"), [(8, 128, 96), (2, 128, 96), (4, 256, 96), (4, 128, 160), (4, 128, 32)]
)
def test_a_layout_of_another_linear_is_refused(bits: int, in_features: int, out_features: int) -> None:
    """As a graph calls the op that was compiled for other weights: an error, not memory out of bounds."""
    layout = layout_of(random_weight(96, 128, 4), 4)
    with pytest.raises(ValueError, match=f"{out_features} × {in_features} with {bits} bits: it has .*compile_cache"):
        torch.ops.babai.matmul(torch.randn(3, in_features), *layout, bits, out_features)


@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits: int) -> None:
    weight = random_weight(64, 64, bits)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.babai.matmul, (x, *layout_of(weight, bits), bits, 64))


def test_under_torch_compile() -> None:
    weight = random_weight(64, 64, 4)
    layout = layout_of(weight, 4)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.babai.matmul(x * 2, *layout, 4, 64) + 1

    x = torch.randn(3, 64, dtype=torch.bfloat16)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), forward(x))


def test_thread_count_of_torch_stays() -> None:
    code = "import torch; torch.set_num_threads(1); import vllm_babai.cpu; print(torch.get_num_threads())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


def test_no_directory_for_compiled_code_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    runpy.run_path(cpu_loops.__file__)


@pytest.mark.parametrize("tokens", [1, 64])
def test_columns_beyond_16_bits(tokens: int) -> None:
    weight = random_weight(3, (1 << 16) + 70, 4)
    x = torch.randn(tokens, weight.integers.shape[1], dtype=torch.bfloat16)
    assert_close_to_exact(multiply(x, weight, 4), x, weight)


def test_odd_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        layout_of(random_weight(64, 72, 4, group_size=24), 4)


def test_devices_without_kernels_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="not for xpu"):
        backend("xpu")
