"""All kernels in Triton's interpreter against the weight that the checkpoint stands for.

Collected by `test_interpreter.py`, each time in a process of its own; by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py`.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.format import SSQR, LatticeWeight, decode_overflow, integer_range
from vllm_babai.format.entropy.hptq import encode_integers, read_blob
from vllm_babai.format.entropy.segments import cut_segments
from vllm_babai.ops.coded import coded_tensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels import dequantize as dequantization
from vllm_babai.triton_kernels import device_layout, dispatch, look_up, matmul, multiply_coded, warm_up
from vllm_babai.triton_kernels.configs import BUCKETS, Target
from vllm_babai.triton_kernels.dequantize import dequantize
from vllm_babai.triton_kernels.layout import Geometry

BIT_WIDTHS = (2, 3, 4, 5, 8)


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def random_weight(
    bits: int, rows: int, columns: int, groups: int = 1, overflow: float = 0.01, spread: int = 6, scale: float = 0.01
) -> LatticeWeight:
    """Dense integers, of which the fraction `overflow` goes up to `spread` beyond the dense range."""
    low, high = integer_range(bits)
    integers = torch.randint(low, high + 1, (rows, columns))
    excess = torch.randint(1, spread + 1, (rows, columns))
    beyond = torch.where(torch.rand(rows, columns) < 0.5, high + excess, low - excess)
    integers = torch.where(torch.rand(rows, columns) < overflow, beyond, integers)
    scales = scale * (0.5 + torch.rand(rows, groups)) * torch.randint(2, (rows, groups)).mul(2).sub(1)  # of either sign
    return LatticeWeight(integers.short(), scales.bfloat16())


def layout_of(weight: LatticeWeight, bits: int) -> DeviceLayout:
    stored = SSQR.encode(weight, bits)
    overflow = decode_overflow(stored.overflow)
    return device_layout(stored.qweight, stored.scales, overflow, bits, weight.integers.shape[1], "cpu")


def check(weight: LatticeWeight, bits: int, x: Tensor) -> Tensor:
    """The product is no further from the float64 one than 1.5 times a bf16 product of the dequantized weight."""
    rows, columns = weight.integers.shape
    layout = layout_of(weight, bits)
    y = matmul(x, *layout, bits, rows)
    dense = weight.dequantize().double()
    exact = x.double() @ dense.t()
    bf16 = x.bfloat16() @ dense.bfloat16().t()
    assert y.shape == (*x.shape[:-1], rows) and y.dtype == x.dtype
    assert torch.isfinite(y).all()
    tolerance = 1.5 * (bf16 - exact).norm() + 1e-30
    assert (y - exact).norm() <= tolerance, f"error {(y - exact).norm():.3e}, allowed {tolerance:.3e}"
    assert not layout.offsets[: Geometry(bits, columns, rows).counters].any(), "an arrival counter is not zero again"
    return y


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64])
def test_widths_groups_and_tokens(bits: int, group_size: int, tokens: int) -> None:
    groups = 1 if group_size == -1 else 640 // group_size
    check(random_weight(bits, 96, 640, groups), bits, torch.randn(tokens, 640).bfloat16())


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("shape", [(1, 7), (64, 333), (130, 1000), (200, 2100)])
def test_odd_shapes(bits: int, shape: tuple[int, int]) -> None:
    check(random_weight(bits, *shape, overflow=0.05), bits, torch.randn(2, 3, shape[1]).bfloat16())


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("overflow", "spread", "entry"),
    [(0.0, 1, torch.int16), (0.3, 15, torch.int16), (0.05, 24, torch.int16), (1.0, 300, torch.int32)],
    ids=["none", "heavy", "two entries a weight", "all"],
)
def test_overflow(bits: int, tokens: int, overflow: float, spread: int, entry: torch.dtype) -> None:
    weight = random_weight(bits, 40, 2080, overflow=overflow, spread=spread)
    assert layout_of(weight, bits).entries.dtype == entry
    check(weight, bits, torch.randn(tokens, 2080).bfloat16())


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("largest", [100, 2**15 - 1])
def test_largest_integers(tokens: int, largest: int) -> None:
    weight = random_weight(4, 64, 256, overflow=0.05)
    weight.integers[0, 0], weight.integers[-1, -1], weight.integers[5] = largest, -largest, 0
    check(weight, 4, torch.randn(tokens, 256).bfloat16())


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 20])
def test_activation_types(bits: int, dtype: torch.dtype, tokens: int) -> None:
    check(random_weight(bits, 64, 512), bits, torch.randn(tokens, 512, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_tiles_of_tokens_and_prefill(dtype: torch.dtype) -> None:
    weight = random_weight(4, 64, 256)
    for tokens in (65, 300):
        check(weight, 4, torch.randn(tokens, 256).to(dtype))


def test_large_weights_are_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantization, "WORKSPACE", 2 * 64 * 300)
    weight = random_weight(3, 330, 300, overflow=0.05)
    dense = dequantize(layout_of(weight, 3), Geometry(3, 300, 330), torch.bfloat16, "interpreter")
    assert torch.equal(dense, weight.dequantize(torch.bfloat16))
    check(weight, 3, torch.randn(300, 300).bfloat16())


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_weight_is_exact(bits: int, dtype: torch.dtype) -> None:
    """Bit for bit the stored weight, rounded once; overflow of several entries a weight included."""
    for groups, columns in ((1, 2500), (9, 288)):
        weight = random_weight(bits, 100, columns, groups, overflow=0.05, spread=40)
        weight.integers[3, 5] = 2**15 - 1
        geometry = Geometry(bits, columns, 100)
        dense = dequantize(layout_of(weight, bits), geometry, dtype, "interpreter")
        assert torch.equal(dense, weight.dequantize(dtype))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_rows_that_are_looked_up_are_exact(bits: int) -> None:
    for groups, columns in ((1, 2100), (9, 288)):
        weight = random_weight(bits, 150, columns, groups, overflow=0.05, spread=40)
        weight.integers[3, 5] = 2**15 - 1
        ids = torch.tensor([[3, 149, 0], [3, 64, 130]])
        for dtype in (torch.bfloat16, torch.float32):
            found = look_up(ids, layout_of(weight, bits), bits, (150, columns), dtype)
            assert torch.equal(found, weight.dequantize(dtype)[ids])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bits=st.sampled_from(BIT_WIDTHS),
    rows=st.integers(1, 150),
    slots=st.integers(1, 20),
    tokens=st.integers(1, 20),
    exponent=st.integers(-6, 0),
    grouped=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_numerics(
    bits: int, rows: int, slots: int, tokens: int, exponent: int, grouped: bool, dtype: torch.dtype
) -> None:
    """Scales down to 1e-6, and activations with outliers; in fp16 neither may leave the range of the result."""
    columns = 32 * slots
    x = torch.randn(tokens, columns)
    x[:, torch.randint(columns, (1 + columns // 100,))] *= 100 if dtype == torch.float16 else 1000
    scale = max(10.0**exponent, 1e-3) if dtype == torch.float16 else 10.0**exponent
    weight = random_weight(bits, rows, columns, slots if grouped else 1, scale=min(scale, 0.01))
    check(weight, bits, x.to(dtype))


def test_same_result_every_time_and_tokens_do_not_mix() -> None:
    weight = random_weight(4, 128, 1024)
    layout = layout_of(weight, 4)
    x = torch.randn(5, 1024).bfloat16()
    y = matmul(x, *layout, 4, 128)
    assert torch.equal(y, matmul(x, *layout, 4, 128))
    x[2] = torch.inf
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], matmul(x, *layout, 4, 128)[others])


def test_no_tokens_odd_alignment_and_strides() -> None:
    weight = random_weight(4, 64, 256)
    layout = layout_of(weight, 4)
    assert matmul(torch.empty(0, 256, dtype=torch.bfloat16), *layout, 4, 64).shape == (0, 64)
    x = torch.randn(3 * 256 + 1).bfloat16()
    expected = matmul(x[1:].view(3, 256).clone(), *layout, 4, 64)
    assert torch.equal(expected, matmul(x[1:].view(3, 256), *layout, 4, 64))
    assert torch.equal(expected, matmul(x[1:].view(3, 256).t().contiguous().t(), *layout, 4, 64))


def test_warm_up_reaches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    for module, name in ((dispatch, "multiply_fused"), (dispatch, "multiply_dequantized")):
        original = getattr(module, name)

        def spy(x: Tensor, *rest: Any, name: str = name, original: Any = original) -> Tensor:
            launched.add((name, x.shape[0]))
            return original(x, *rest)

        monkeypatch.setattr(module, name, spy)
    warm_up(layout_of(random_weight(2, 64, 64), 2), 2, 64, 64, torch.bfloat16)
    assert {m for name, m in launched if name == "multiply_fused"} == {*BUCKETS, BUCKETS[-1] + 1}
    assert any(name == "multiply_dequantized" for name, _ in launched)


def test_splits_of_one_column_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of many processors cuts the columns finely: every split is one block, and all are added up."""
    wide = Target("interpreter", "sm_90", "interpreter", 1000)
    monkeypatch.setattr(Target, "of", lambda device: wide)
    for bits in BIT_WIDTHS:
        check(random_weight(bits, 64, 2500), bits, torch.randn(1, 2500).bfloat16())


@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (3, 1), (16, 4), (70, 1)])
def test_one_program_a_tile(tokens: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of one processor: no partial sums, and the overflow of several panels is added by one program."""
    small = Target("interpreter", "sm_90", "interpreter", 1)
    monkeypatch.setattr(Target, "of", lambda device: small)
    check(random_weight(4, 96, 4224, groups, overflow=0.02), 4, torch.randn(tokens, 4224).bfloat16())


@pytest.mark.parametrize(
    ("lead", "dtype"),
    [
        *(((tokens,), torch.bfloat16) for tokens in range(6)),
        ((2, 1, 2), torch.bfloat16),
        ((2,), torch.float16),
        ((2,), torch.float32),
    ],
)
def test_results_are_contiguous_as_the_fakes_say(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, columns = 3, 32  # the interpreter takes a step per weight of such a small code
    weight = LatticeWeight(torch.randint(-3, 4, (rows, columns), dtype=torch.int16), torch.ones(rows, 1).bfloat16())
    segments = cut_segments(read_blob(encode_integers(weight.integers, 0)), slice(0, rows), slice(0, columns))
    coded = coded_tensors(segments, weight.scales, torch.device("cpu"))
    x = torch.randn(columns, *lead).to(dtype).movedim(0, -1)
    for y in (matmul(x, *layout_of(weight, 4), 4, rows), multiply_coded(x, coded)):
        assert (y.shape, y.dtype) == ((*lead, rows), dtype)
        assert y.stride() == x.new_empty(*lead, rows).stride()
        torch.testing.assert_close(y.float(), x.float() @ weight.dequantize().t(), atol=0.3, rtol=0.02)


@pytest.mark.parametrize(
    ("bits", "columns", "rows"), [(3, 256, 96), (8, 256, 96), (4, 2304, 96), (4, 256, 160), (4, 512, 96)]
)
def test_a_layout_of_another_linear_is_refused(bits: int, columns: int, rows: int) -> None:
    """As a graph calls the op that was compiled for other weights: an error, not memory out of bounds."""
    layout = layout_of(random_weight(4, 96, 256), 4)
    with pytest.raises(ValueError, match=f"{rows} × {columns} with {bits} bits: it has .*compile_cache"):
        matmul(torch.randn(3, columns).bfloat16(), *layout, bits, rows)
