"""What a mixture of experts makes of its tokens: the entry that `babai::moe` calls, and the warm-up."""

import torch
from torch import Tensor

from vllm_babai.ops.experts import Activate, ExpertTensors
from vllm_babai.triton_kernels.configs import BUCKETS, Target
from vllm_babai.triton_kernels.experts.combine import combine
from vllm_babai.triton_kernels.experts.fused import multiply_routed
from vllm_babai.triton_kernels.experts.grouped import PRODUCT_BLOCK, multiply_grouped
from vllm_babai.triton_kernels.experts.route import SMALLEST_BLOCK, block_rows, route
from vllm_babai.triton_kernels.layout import geometry_of
from vllm_babai.triton_kernels.tokens import aligned, goes_dequantized


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activate: Activate) -> Tensor:
    """x [tokens, hidden] bf16, fp16 or fp32 → for every token the weighted sum of its experts' outputs, in x's dtype.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of `experts`; −1: none of them. Deterministic, and
    nothing waits for the host.
    """
    if not len(x):
        return torch.empty_like(x)
    number = _number(experts, x.shape[1])
    dequantized = goes_dequantized(ids.numel() // number, x.dtype, Target.of(x.device))
    rows = PRODUCT_BLOCK if dequantized else block_rows(ids.numel(), len(x), number)
    return _multiply(aligned(x), weights.contiguous(), ids.int().contiguous(), experts, activate, rows)


def _multiply(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activate: Activate, rows: int) -> Tensor:
    """Blocks of PRODUCT_BLOCK rows go through dequantized weights, smaller ones through the fused kernel."""
    hidden, target = x.shape[1], Target.of(x.device)
    routing = route(ids, _number(experts, hidden), rows)
    first = geometry_of(experts.gate_up_bits, hidden, experts.gate_up_rows)
    second = geometry_of(experts.down_bits, experts.inner, hidden)
    multiply = multiply_grouped if rows == PRODUCT_BLOCK else multiply_routed
    biases = experts.biases or (None, None)
    outputs = multiply(x, ids.shape[1], routing, experts.gate_up, first, biases[0], target)
    found = multiply(aligned(activate(outputs)), 1, routing, experts.down, second, biases[1], target)
    return combine(found, weights, ids, target)


def _number(experts: ExpertTensors, hidden: int) -> int:
    """How many experts there are."""
    return (
        experts.gate_up.scales.shape[1] // geometry_of(experts.gate_up_bits, hidden, experts.gate_up_rows).padded_rows
    )


def warm_up_experts(experts: ExpertTensors, hidden: int, dtype: torch.dtype) -> None:
    """Launch every kernel that `multiply_experts` may choose for this layer once: nothing compiles while serving."""
    device = experts.gate_up.dense.device
    x, ids = torch.zeros(1, hidden, dtype=dtype, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)

    def activate(outputs: Tensor) -> Tensor:  # any will do: it is not among the kernels
        return outputs[:, : experts.inner].contiguous()

    fused = (1, *(tokens for tokens in BUCKETS if tokens >= SMALLEST_BLOCK))
    for rows in (PRODUCT_BLOCK,) if dtype == torch.float32 else (*fused, PRODUCT_BLOCK):
        _multiply(x, torch.ones(1, 1, device=device), ids, experts, activate, rows)
