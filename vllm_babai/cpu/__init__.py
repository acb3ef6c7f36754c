"""The CPU backend: kernels built as LLVM IR, which need no C compiler. Importing it imports numba."""

from vllm_babai.cpu.backend import device_layout, matmul, warm_up
from vllm_babai.cpu.entropy import multiply_coded, warm_up_coded
from vllm_babai.cpu.experts import (
    experts_layout,
    multiply_experts,
    multiply_trellis_experts,
    trellis_experts_layout,
    warm_up_experts,
    warm_up_trellis_experts,
)
from vllm_babai.cpu.lookup import look_up
from vllm_babai.cpu.trellis import multiply_trellis, trellis_layout, warm_up_trellis

__all__ = [
    "device_layout",
    "experts_layout",
    "look_up",
    "matmul",
    "multiply_coded",
    "multiply_experts",
    "multiply_trellis",
    "multiply_trellis_experts",
    "trellis_experts_layout",
    "trellis_layout",
    "warm_up",
    "warm_up_coded",
    "warm_up_experts",
    "warm_up_trellis",
    "warm_up_trellis_experts",
]
