"""The op `babai::coded_matmul` on the CPU: the dense product, for any integers, eagerly and compiled."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_babai.cpu import entropy as cpu_entropy
from vllm_babai.format import LatticeWeight
from vllm_babai.format.entropy.hptq import encode_integers, read_blob
from vllm_babai.format.entropy.segments import cut_segments
from vllm_babai.ops.backends import BACKENDS, Backend, backend
from vllm_babai.ops.coded import CodedTensors, coded_tensors


def random_weight(rows: int, columns: int, sigma: float = 1.5, groups: int = 1) -> LatticeWeight:
    integers = torch.randn(rows, columns).mul(sigma).clamp(-32767, 32767).round().short()
    return LatticeWeight(integers, torch.rand(rows, groups).add(0.5).bfloat16())


def tensors_of(weight: LatticeWeight) -> CodedTensors:
    rows, columns = weight.integers.shape
    segments = cut_segments(read_blob(encode_integers(weight.integers, 0)), slice(0, rows), slice(0, columns))
    return coded_tensors(segments, weight.scales, torch.device("cpu"))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    sigma=st.sampled_from([0.0, 0.4, 3.0, 3000.0]),
    lead=st.sampled_from([(), (1,), (2, 3), (0,)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_equals_the_dense_product(
    rows: int, columns: int, sigma: float, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = random_weight(rows, columns, sigma)
    x = torch.randn(*lead, columns).to(dtype)
    expected = torch.nn.functional.linear(x, weight.dequantize(dtype))
    assert torch.equal(torch.ops.babai.coded_matmul(x, *tensors_of(weight)), expected)


def test_several_tiles_and_groups() -> None:
    weight = random_weight(300, 2080, groups=65)
    assert len(tensors_of(weight).segments) > 40
    x = torch.randn(3, 2080)
    expected = torch.nn.functional.linear(x, weight.dequantize())
    assert torch.equal(torch.ops.babai.coded_matmul(x, *tensors_of(weight)), expected)


def test_decodes_the_integers() -> None:
    weight = random_weight(300, 70)
    out = torch.empty(300, 70, dtype=torch.int16)
    assert torch.equal(cpu_entropy.decode(tensors_of(weight), out), weight.integers)


def test_half_precision_has_room_for_large_integers() -> None:
    integers = torch.full((8, 32), 30_000, dtype=torch.int16)
    weight = LatticeWeight(integers, torch.full((8, 1), 1e-9).bfloat16())
    y = torch.ops.babai.coded_matmul(torch.full((1, 32), 1000.0, dtype=torch.float16), *tensors_of(weight))
    torch.testing.assert_close(y, torch.full((1, 8), 0.96, dtype=torch.float16), rtol=0.01, atol=0)


@pytest.mark.parametrize("lead", [(0,), (1,), (2,), (3,), (4,), (5,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_laid_out_as_the_fake_says(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = tensors_of(random_weight(96, 64))
    for x in (torch.randn(*lead, 64).to(dtype), torch.randn(64, *lead).to(dtype).movedim(0, -1)):
        y = torch.ops.babai.coded_matmul(x, *tensors)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = torch.ops.babai.coded_matmul(mode.from_tensor(x), *tensors)
        assert (y.shape, y.stride(), y.dtype, y.device) == (fake.shape, fake.stride(), fake.dtype, fake.device)


def test_opcheck() -> None:
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.babai.coded_matmul, (x, *tensors_of(random_weight(96, 64))))


def test_under_torch_compile() -> None:
    tensors = tensors_of(random_weight(96, 64))

    def forward(x: Tensor) -> Tensor:
        return torch.ops.babai.coded_matmul(x * 2, *tensors) + 1

    x = torch.randn(3, 64, dtype=torch.bfloat16)
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), forward(x))


def test_warm_up_meets_every_kernel_that_tokens_choose() -> None:
    """The fused kernel is compiled for powers of two; beyond them the decoder runs."""
    from vllm_babai.triton_kernels.coded import COMPILED_FOR, MAX_TOKENS

    fused = {1 << (tokens - 1).bit_length() for tokens in range(1, MAX_TOKENS + 1)}
    assert fused == {tokens for tokens in COMPILED_FOR if tokens <= MAX_TOKENS}
    assert max(COMPILED_FOR) > MAX_TOKENS


@pytest.mark.parametrize("name", [name for name in vars(Backend) if not name.startswith("_")])
@pytest.mark.parametrize("device_type", BACKENDS)
def test_backends_are_complete(device_type: str, name: str) -> None:
    given = list(inspect.signature(getattr(backend(device_type), name)).parameters)
    assert given == list(inspect.signature(getattr(Backend, name)).parameters)[1:]
