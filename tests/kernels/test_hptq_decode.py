"""The GPU decoder of HPTQ, alone and fused with a product, in Triton's interpreter; `gate.py` compiles it for GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_babai.format import LatticeWeight
from vllm_babai.format.entropy import hptq, segments
from vllm_babai.ops.coded import coded_tensors
from vllm_babai.triton_kernels.coded import multiply_coded
from vllm_babai.triton_kernels.entropy import decode


def test_interpreted_decoder_is_exact() -> None:
    """In a process of its own: the interpreter cannot be switched on after Triton's kernels were defined."""
    script = [sys.executable, __file__]
    child = subprocess.run(script, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


def check_decoder(rows: int, columns: int, window: slice, sigma: float, uneven: float, scales: torch.Tensor) -> None:
    """Two matrices of different codes below each other, of which a rank holds the columns of a window.

    scales: of the window, bfloat16 [1 or rows, groups].
    """
    parts, integers = [], []
    for scale in (1, 8):
        spread = scale * sigma * torch.exp2(uneven * torch.randn(rows, 1)) * torch.exp2(uneven * torch.randn(columns))
        matrix = torch.round(torch.randn(rows, columns) * spread).short()
        matrix[2, 33:35] = torch.tensor([20000, -20000], dtype=torch.int16)
        coded = hptq.read_blob(hptq.encode_integers(matrix, 0))
        parts.append(segments.cut_segments(coded, slice(0, rows), window))
        integers.append(matrix[:, window])
        print(coded.shape, "contexts", len(coded.model.codes), "shift", coded.model.shift)
    weight = LatticeWeight(torch.cat(integers), scales.expand(rows, -1).repeat(2, 1))
    tensors = coded_tensors(segments.stack_segments(parts), weight.scales, torch.device("cpu"))
    assert torch.equal(decode(tensors, torch.empty_like(weight.integers)), weight.integers)
    workspace = decode(tensors, torch.empty_like(weight.integers, dtype=torch.bfloat16))
    assert torch.equal(workspace, weight.dequantize(torch.bfloat16))
    for tokens in (1, 3, 5):
        x = torch.randn(tokens, window.stop - window.start)
        expected = x @ weight.dequantize().t()
        assert torch.allclose(multiply_coded(x, tensors), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lanes and many segments in matrices that an interpreter gets through."""
    monkeypatch.setattr(hptq, "LANE_WEIGHTS", 64)
    monkeypatch.setattr(hptq, "TILE_WEIGHTS", 8192)  # of 32 rows at the least
    monkeypatch.setattr(hptq, "TILE_COLUMNS", 256)
    monkeypatch.setattr(segments, "SEGMENT_WEIGHTS", 512)


if __name__ == "__main__":
    torch.manual_seed(0)
    small_segments(pytest.MonkeyPatch())
    check_decoder(11, 100, slice(0, 100), 1.5, 0.7, torch.rand(1, 1).bfloat16())
    check_decoder(6, 350, slice(30, 300), 5.0, 0.0, torch.rand(6, 3).bfloat16())
    check_decoder(4, 45, slice(0, 45), 1.0, 0.0, torch.rand(1, 45).bfloat16())
