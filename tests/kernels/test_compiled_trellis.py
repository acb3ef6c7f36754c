"""The kernels of the trellis form as they are compiled for NVIDIA GPUs, run on the CPU, see `test_compiled`.

Each case compiles the loops of the numbers of bits that its weight has, which takes a tenth as long as all of them.
"""

import pytest
import torch
from emulator.compiled import Compiled
from expert_cases import check as check_experts
from expert_cases import random_trellis_experts
from trellis_cases import check, layout_of, random_trellis

from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.experts import combine, dispatch, grouped, route
from vllm_babai.triton_kernels.experts import trellis as experts
from vllm_babai.triton_kernels.trellis import dequantize, fused, prepare

KERNELS = (
    (prepare, "prepare_kernel"),
    (fused, "fused_kernel"),
    (dequantize, "decode_kernel"),
    (experts, "experts_kernel"),
    (grouped, "product_kernel"),
    (route, "sort_kernel"),
    (combine, "combine_kernel"),
)


def compile_for(architecture: str, bits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all kernels as if tensors on the CPU were on a small GPU of this architecture."""
    torch.manual_seed(0)
    target = Target("cuda", architecture, architecture, 1)
    monkeypatch.setattr(Target, "of", lambda device: target)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), architecture))
    for module in (fused, dequantize):
        monkeypatch.setattr(module, "FEWEST_BITS", min(bits))
        monkeypatch.setattr(module, "MOST_BITS", max(bits))


@pytest.mark.parametrize(
    ("architecture", "bits", "dtype", "tokens"),
    [
        ("sm_80", (2, 3), torch.bfloat16, 1),
        ("sm_90", (4,), torch.bfloat16, 1),
        ("sm_90", (5, 6), torch.float16, 3),
        ("sm_80", (7,), torch.bfloat16, 16),
        ("sm_120", (8,), torch.bfloat16, 1),
        ("sm_90", (9, 10), torch.bfloat16, 1),
        pytest.param("sm_90", (4,), torch.bfloat16, 65, marks=pytest.mark.long),
    ],
)
def test_product(
    architecture: str, bits: tuple[int, ...], dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_for(architecture, bits, monkeypatch)
    monkeypatch.setattr(fused, "SMALLEST_SHARE", 1)
    monkeypatch.setattr(fused, "PROGRAMS_PER_PROCESSOR", dict.fromkeys(fused.PROGRAMS_PER_PROCESSOR, 12))
    check(random_trellis(50, 630, bits), torch.randn(tokens, 630).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_weight_is_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for("sm_90", (3, 4), monkeypatch)
    monkeypatch.setattr(dequantize, "WORKSPACE", 40 * 200)  # in parts
    weight = random_trellis(70, 200, (3, 4))
    dense = dequantize.dequantize(layout_of(weight), 200, dtype, "cuda")
    assert torch.equal(dense, weight.dequantize(dtype))


@pytest.mark.parametrize(
    ("architecture", "bits", "tokens"),
    [("sm_90", (4,), 1), ("sm_80", (3,), 5), pytest.param("sm_120", (5, 6), 40, marks=pytest.mark.long)],
)
def test_experts(architecture: str, bits: tuple[int, ...], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a block, and blocks of sorted rows; some visits are another rank's."""
    compile_for(architecture, bits, monkeypatch)
    mixture = random_trellis_experts(3, 200, 40, bits)
    if tokens > 1:
        mixture.biases = torch.randn(3, 80).bfloat16(), torch.randn(3, 200).bfloat16()
    check_experts(mixture, torch.randn(tokens, 200).bfloat16(), elsewhere=0.2)


@pytest.mark.long
def test_dequantized_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for("sm_80", (4,), monkeypatch)
    monkeypatch.setattr(dispatch, "goes_dequantized", lambda *_: True)
    monkeypatch.setattr(dequantize, "WORKSPACE", 128 * 80)
    check_experts(random_trellis_experts(2, 80, 72, (4,)), torch.randn(3, 80).bfloat16(), elsewhere=0.3)
