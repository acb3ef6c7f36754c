"""The kernels of the trellis form in Triton's interpreter against the weight that the checkpoint stands for.

Collected by `test_interpreter.py`; by hand: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted_trellis.py`.
"""

import numpy as np
import pytest
import torch
from trellis_cases import check, layout_of, random_trellis

from vllm_babai.format.trellis.window import TrellisWindow
from vllm_babai.triton_kernels import multiply_trellis, trellis_layout, warm_up_trellis
from vllm_babai.triton_kernels.configs import BUCKETS, Target
from vllm_babai.triton_kernels.trellis import dequantize as dequantization
from vllm_babai.triton_kernels.trellis import dispatch

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("tokens", [1, 3, 17, 65])
def test_numbers_of_tokens(tokens: int) -> None:
    check(random_trellis(20, 320), torch.randn(tokens, 320).bfloat16())


@pytest.mark.parametrize("shape", [(1, 2), (33, 130)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_odd_shapes_and_types(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(random_trellis(*shape), torch.randn(2, shape[1], dtype=dtype))


@pytest.mark.parametrize("processors", [1, 1000])
def test_shares(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one share of a block to as many as may be, whose sums are added up."""
    target = Target("interpreter", "sm_90", "interpreter", processors)
    monkeypatch.setattr(Target, "of", lambda device: target)
    check(random_trellis(16, 1600, (3, 4, 7)), torch.randn(2, 1600).bfloat16())


@pytest.mark.parametrize("tokens", [2, 600])
def test_a_window_needs_no_more_than_its_tiles(tokens: int) -> None:
    """States of its first columns reach back into what another rank holds; blocks have rows of others."""
    check(random_trellis(48, 384), torch.randn(tokens, 128).bfloat16(), slice(16, 40), slice(128, 256))


def test_dequantized_weight_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_trellis(40, 330)
    expected = weight.dequantize()
    for dtype, workspace in ((torch.float32, 1 << 27), (torch.bfloat16, 9 * 330)):
        monkeypatch.setattr(dequantization, "WORKSPACE", workspace)
        assert torch.equal(dequantization.dequantize(layout_of(weight), 330, dtype, "interpreter"), expected.to(dtype))


@pytest.mark.parametrize("size", [1e-34, 1e4, 1e37])
def test_massive_activations(size: float) -> None:
    """However large or small the largest activation of a token is: it neither overflows nor costs the other tokens."""
    x = torch.randn(3, 256)
    x[0] *= size / 100
    x[0, 17] = size
    x = x.bfloat16()
    weight = random_trellis(16, 256)
    y = multiply_trellis(x, layout_of(weight))
    exact = x.double() @ weight.dequantize().double().t()
    assert ((y - exact).norm(dim=1) <= 0.004 * exact.norm(dim=1)).all()


def test_same_result_every_time_and_tokens_do_not_mix() -> None:
    layout, x = layout_of(random_trellis(32, 256)), torch.randn(4, 256).bfloat16()
    y = multiply_trellis(x, layout)
    assert torch.equal(y, multiply_trellis(x, layout))
    x[2] = torch.inf
    others = [0, 1, 3]
    assert torch.equal(y[others], multiply_trellis(x, layout)[others])


def test_no_tokens_odd_alignment_and_strides() -> None:
    layout = layout_of(random_trellis(16, 128))
    assert multiply_trellis(torch.empty(0, 128, dtype=torch.bfloat16), layout).shape == (0, 16)
    x = torch.randn(2 * 128 + 1).bfloat16()[1:].view(2, 128)
    expected = multiply_trellis(x.clone(), layout)
    for same in (x, x.t().contiguous().t(), x[:, None]):
        y = multiply_trellis(same, layout)
        assert torch.equal(y.view(2, 16), expected) and y.is_contiguous()


def test_warm_up_reaches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    for name in ("multiply_fused", "multiply_dequantized"):
        original = getattr(dispatch, name)

        def spy(x: torch.Tensor, *rest: object, name: str = name, original: object = original) -> torch.Tensor:
            launched.add((name, x.shape[0]))
            return original(x, *rest)

        monkeypatch.setattr(dispatch, name, spy)
    warm_up_trellis(layout_of(random_trellis(2, 2)), 2, torch.bfloat16)
    assert {m for name, m in launched if name == "multiply_fused"} == {*BUCKETS, BUCKETS[-1] + 1}
    assert any(name == "multiply_dequantized" for name, _ in launched)


def test_what_does_not_fit_is_refused() -> None:
    layout = layout_of(random_trellis(32, 128))
    with pytest.raises(ValueError, match="it has places"):
        multiply_trellis(torch.zeros(1, 128), layout._replace(places=layout.places[:1]))
    with pytest.raises(ValueError, match="its tiles have 128 columns"):
        multiply_trellis(torch.zeros(1, 130), layout)
    no_rows = np.zeros((1, 16))
    with pytest.raises(ValueError, match="8192 tiles in a row"):
        trellis_layout(TrellisWindow(1, np.full((1, 8192), 2), no_rows, no_rows, no_rows, no_rows), torch.device("cpu"))
