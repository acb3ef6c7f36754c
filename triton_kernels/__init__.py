"""Triton kernels that multiply with lattice-quantized weights, and the function that chooses among them."""

if __name__ == "triton_kernels":
    raise ImportError("import vllm_babai.triton_kernels: a top-level triton_kernels would hide vLLM's own package")

from vllm_babai.triton_kernels.coded import multiply_coded, warm_up_coded
from vllm_babai.triton_kernels.dispatch import matmul, warm_up
from vllm_babai.triton_kernels.experts.dispatch import (
    multiply_experts,
    multiply_trellis_experts,
    warm_up_experts,
    warm_up_trellis_experts,
)
from vllm_babai.triton_kernels.experts.layout import experts_layout
from vllm_babai.triton_kernels.experts.trellis import trellis_experts_layout
from vllm_babai.triton_kernels.layout import device_layout
from vllm_babai.triton_kernels.lookup import look_up
from vllm_babai.triton_kernels.trellis.dispatch import multiply_trellis, warm_up_trellis
from vllm_babai.triton_kernels.trellis.layout import trellis_layout

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
