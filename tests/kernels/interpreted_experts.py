"""The kernels for mixtures of experts in Triton's interpreter against the weights that the checkpoint stands for.

Collected by `test_interpreter.py`; by hand: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted_experts.py`.
"""

import pytest
import torch
from expert_cases import check, random_experts, random_trellis_experts

from vllm_babai.triton_kernels import dequantize, multiply_experts, warm_up_experts, warm_up_trellis_experts
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.experts import dispatch
from vllm_babai.triton_kernels.experts import layout as expert_layout
from vllm_babai.triton_kernels.experts.route import block_rows, route
from vllm_babai.triton_kernels.trellis import dequantize as trellis_dequantize
from vllm_babai.triton_kernels.trellis import fused as trellis_fused

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize(("bits", "tokens", "number"), [(3, 1, 4), (4, 2, 16), (4, 5, 4), (3, 40, 4)])
def test_numbers_of_tokens(bits: int, tokens: int, number: int) -> None:
    """One row a block, sorted blocks of 16 and 32 rows."""
    check(random_experts(number, 64, 48, bits), torch.randn(tokens, 64).bfloat16())


def test_panels_and_experts_of_other_ranks() -> None:
    """Columns in two panels, entries of both widths, visits that another rank answers."""
    mixture = random_experts(2, 2112, 16, 4, spreads=(4, 3000))
    check(mixture, torch.randn(3, 2112).bfloat16(), elsewhere=0.3)


@pytest.mark.parametrize("tokens", [1, 5])
def test_groups_and_fp16(tokens: int) -> None:
    check(random_experts(3, 128, 64, 4, groups=2), torch.randn(tokens, 128).half())


@pytest.mark.parametrize(("tokens", "processors", "dequantized"), [(1, 1000, False), (5, 4, False), (5, 4, True)])
def test_biases(tokens: int, processors: int, dequantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added once, whatever the number of splits."""
    target = Target("interpreter", "sm_90", "interpreter", processors)
    monkeypatch.setattr(Target, "of", lambda device: target)
    monkeypatch.setattr(dispatch, "goes_dequantized", lambda *_: dequantized)
    mixture = random_experts(3, 320, 32, 4)
    mixture.biases = torch.randn(3, 64).bfloat16(), torch.randn(3, 320).bfloat16()
    check(mixture, torch.randn(tokens, 320).bfloat16(), elsewhere=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a workspace that holds a tile of an expert; blocks that are not full, columns that fill no turn."""
    monkeypatch.setattr(dequantize, "WORKSPACE", 128 * 80)
    monkeypatch.setattr(dispatch, "goes_dequantized", lambda *_: True)
    check(random_experts(2, 80, 72, 4), torch.randn(3, 80).to(dtype), elsewhere=0.3)


@pytest.mark.parametrize(("tokens", "number"), [(1, 3), (5, 3), (40, 3)])
def test_trellis(tokens: int, number: int) -> None:
    """One row a block, sorted blocks of 16 and 32 rows; rows of an expert that fill no block."""
    check(random_trellis_experts(number, 72, 24, (3, 4)), torch.randn(tokens, 72).bfloat16(), elsewhere=0.2)


def test_trellis_in_shares_and_with_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("interpreter", "sm_90", "interpreter", 1000)
    monkeypatch.setattr(Target, "of", lambda device: target)
    monkeypatch.setattr(trellis_fused, "SMALLEST_SHARE", 1)
    mixture = random_trellis_experts(2, 320, 16, (3, 4))
    mixture.biases = torch.randn(2, 32).bfloat16(), torch.randn(2, 320).bfloat16()
    check(mixture, torch.randn(3, 320).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)])
def test_trellis_dequantized_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a workspace that holds a tile of an expert."""
    monkeypatch.setattr(trellis_dequantize, "WORKSPACE", 128 * 40)
    monkeypatch.setattr(dispatch, "goes_dequantized", lambda *_: True)
    check(random_trellis_experts(2, 40, 72, (3, 4)), torch.randn(3, 40).to(dtype), elsewhere=0.3)


def test_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("interpreter", "sm_90", "interpreter", 1000)
    monkeypatch.setattr(Target, "of", lambda device: target)
    for tokens in (1, 4):
        check(random_experts(2, 320, 32, 4), torch.randn(tokens, 320).bfloat16())


def test_every_visit_has_a_row_of_its_own_in_a_block_of_its_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, k, experts in ((1, 1, 1), (7, 2, 3), (64, 8, 16), (300, 4, 5)):
        ids = torch.randint(-1, experts, (tokens, k), generator=generator).int()
        for rows in {16, 64, max(16, block_rows(ids.numel(), tokens, experts))}:
            routing = route(ids, experts, rows)
            owned = routing.visits.view(-1, rows)[routing.owners >= 0]
            owners = routing.owners[routing.owners >= 0, None].expand_as(owned)[owned >= 0]
            visits = owned[owned >= 0].long()
            assert torch.equal(ids.flatten()[visits], owners)
            assert torch.equal(visits, ids.flatten().argsort(stable=True)[int((ids < 0).sum()) :])
            assert (owned >= 0).any(1).all()


def test_warm_up_no_tokens_and_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, layouts = random_experts(2, 64, 32, 4).tensors()
    warm_up_experts(experts, 64, torch.bfloat16)
    warm_up_trellis_experts(random_trellis_experts(2, 64, 32, (4,)).tensors(), 64, torch.bfloat16)
    nothing = torch.empty(0, 2)
    assert multiply_experts(torch.empty(0, 64).half(), nothing, nothing.int(), experts, torch.relu).shape == (0, 64)
    monkeypatch.setattr(expert_layout, "MOST_WORDS", 100)
    with pytest.raises(ValueError, match=r"2 experts take .* words .* --enable-expert-parallel"):
        expert_layout.experts_layout(layouts)
