"""What a mixture of experts makes of its tokens: the entry that `babai::moe` calls, and the warm-up."""

import torch
from torch import Tensor

from vllm_babai.ops.experts import Activate, ExpertTensors
from vllm_babai.triton_kernels.configs import BUCKETS, Target
from vllm_babai.triton_kernels.experts.fused import multiply_routed
from vllm_babai.triton_kernels.experts.route import SMALLEST_BLOCK, Routing, block_rows, route
from vllm_babai.triton_kernels.layout import geometry_of
from vllm_babai.triton_kernels.tokens import aligned


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activate: Activate) -> Tensor:
    """x [tokens, hidden] bf16 or fp16 → for every token the weighted sum of what its experts make of it, in x's dtype.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of `experts`; −1: none of them. Deterministic, and
    nothing waits for the host. Raises NotImplementedError for fp32, of which there is no kernel.
    """
    _check_dtype(x.dtype)
    if not len(x):
        return torch.empty_like(x)
    routing = route(ids, _number(experts, x.shape[1]), block_rows(ids.numel(), len(x), _number(experts, x.shape[1])))
    return _multiply(aligned(x), weights, ids, routing, experts, activate)


def _multiply(
    x: Tensor, weights: Tensor, ids: Tensor, routing: Routing, experts: ExpertTensors, activate: Activate
) -> Tensor:
    hidden, target = x.shape[1], Target.of(x.device)
    rows = x.new_zeros(routing.rows, hidden).index_copy_(0, routing.places, x.repeat_interleave(ids.shape[1], 0))
    first = geometry_of(experts.gate_up_bits, hidden, experts.gate_up_rows)
    second = geometry_of(experts.down_bits, experts.inner, hidden)
    inner = aligned(activate(multiply_routed(rows, routing, experts.gate_up, first, target)))
    found = multiply_routed(inner, routing, experts.down, second, target)[routing.places].view(*ids.shape, hidden)
    # what belongs to no expert here was never written
    return torch.where(ids[..., None] < 0, 0.0, found.float() * weights[..., None]).sum(1).to(x.dtype)


def _number(experts: ExpertTensors, hidden: int) -> int:
    """How many experts there are."""
    return (
        experts.gate_up.scales.shape[1] // geometry_of(experts.gate_up_bits, hidden, experts.gate_up_rows).padded_rows
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        raise NotImplementedError("experts have no GPU kernel for float32: start vLLM with --dtype bfloat16")


def warm_up_experts(experts: ExpertTensors, hidden: int, dtype: torch.dtype) -> None:
    """Launch every kernel that `multiply_experts` may choose for this layer once: nothing compiles while serving.

    Raises NotImplementedError for fp32.
    """
    _check_dtype(dtype)
    device = experts.gate_up.dense.device
    x, ids = torch.zeros(1, hidden, dtype=dtype, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)

    def activate(outputs: Tensor) -> Tensor:  # any will do: it is not among the kernels
        return outputs[:, : experts.inner].contiguous()

    for tokens in (1, *(tokens for tokens in BUCKETS if tokens >= SMALLEST_BLOCK)):
        routing = route(ids, _number(experts, hidden), tokens)
        _multiply(x, torch.ones(1, 1, device=device), ids, routing, experts, activate)
