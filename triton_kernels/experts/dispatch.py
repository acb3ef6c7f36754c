"""What a mixture of experts makes of its tokens: the entries that the ops call, and the warm-up."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_babai.ops.experts import Activate, ExpertTensors, TrellisExperts
from vllm_babai.triton_kernels.configs import BUCKETS, Target
from vllm_babai.triton_kernels.experts import grouped
from vllm_babai.triton_kernels.experts.combine import combine
from vllm_babai.triton_kernels.experts.fused import PackedLinear
from vllm_babai.triton_kernels.experts.grouped import PRODUCT_BLOCK, multiply_grouped
from vllm_babai.triton_kernels.experts.route import SMALLEST_BLOCK, Routing, block_rows, route
from vllm_babai.triton_kernels.experts.trellis import TrellisLinear
from vllm_babai.triton_kernels.layout import geometry_of
from vllm_babai.triton_kernels.tokens import aligned, goes_dequantized


class Linear(Protocol):
    """One linear of each expert, in the layout of a tall one.

    experts: how many. product_sizes: of the product with dequantized weights. bias: [experts, out_features], or None.
    """

    @property
    def experts(self) -> int: ...

    @property
    def product_sizes(self) -> grouped.Sizes: ...

    @property
    def bias(self) -> Tensor | None: ...

    def fused(self, x: Tensor, per_row: int, routing: Routing, target: Target) -> Tensor:
        """x [visits / per_row, in] → [visits, out], straight from the stored weights."""

    def dequantized(self, dtype: torch.dtype, target: Target) -> Iterator[Tensor]:
        """Weights of all experts, multiples of ROW_ALIGNMENT rows after the other."""


class Linears(NamedTuple):
    """Those of a layer, before and after the activation."""

    gate_up: Linear
    down: Linear


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activate: Activate) -> Tensor:
    """x [tokens, hidden] bf16, fp16 or fp32 → for every token the weighted sum of its experts' outputs, in x's dtype.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of `experts`; −1: none of them. Deterministic, and
    nothing waits for the host.
    """
    return _through_experts(x, weights, ids, _packed(experts, x.shape[1]), activate)


def multiply_trellis_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: TrellisExperts, activate: Activate
) -> Tensor:
    """See `multiply_experts`."""
    return _through_experts(x, weights, ids, _tiled(experts, x.shape[1]), activate)


def warm_up_experts(experts: ExpertTensors, hidden: int, dtype: torch.dtype) -> None:
    """Launch every kernel that `multiply_experts` may choose for this layer once: nothing compiles while serving."""
    _warm_up(_packed(experts, hidden), (hidden, experts.inner), dtype, experts.gate_up.dense.device)


def warm_up_trellis_experts(experts: TrellisExperts, hidden: int, dtype: torch.dtype) -> None:
    """As `warm_up_experts`, for `multiply_trellis_experts`."""
    _warm_up(_tiled(experts, hidden), (hidden, experts.inner), dtype, experts.gate_up.words.device)


def _packed(experts: ExpertTensors, hidden: int) -> Linears:
    biases = experts.biases or (None, None)
    return Linears(
        PackedLinear(experts.gate_up, geometry_of(experts.gate_up_bits, hidden, experts.gate_up_rows), biases[0]),
        PackedLinear(experts.down, geometry_of(experts.down_bits, experts.inner, hidden), biases[1]),
    )


def _tiled(experts: TrellisExperts, hidden: int) -> Linears:
    biases = experts.biases or (None, None)
    return Linears(
        TrellisLinear(experts.gate_up, experts.number, experts.gate_up_rows, hidden, biases[0]),
        TrellisLinear(experts.down, experts.number, hidden, experts.inner, biases[1]),
    )


def _through_experts(x: Tensor, weights: Tensor, ids: Tensor, linears: Linears, activate: Activate) -> Tensor:
    if not len(x):
        return torch.empty_like(x)
    number = linears.down.experts
    dequantized = goes_dequantized(ids.numel() // number, x.dtype, Target.of(x.device))
    rows = PRODUCT_BLOCK if dequantized else block_rows(ids.numel(), len(x), number)
    return _multiply(aligned(x), weights.contiguous(), ids.int().contiguous(), linears, activate, rows)


def _multiply(x: Tensor, weights: Tensor, ids: Tensor, linears: Linears, activate: Activate, rows: int) -> Tensor:
    """Blocks of PRODUCT_BLOCK rows go through dequantized weights, smaller ones through the fused kernels."""
    target = Target.of(x.device)
    routing = route(ids, linears.down.experts, rows)
    inner = aligned(activate(_multiply_linear(x, ids.shape[1], routing, linears.gate_up, target)))
    return combine(_multiply_linear(inner, 1, routing, linears.down, target), weights, ids, target)


def _multiply_linear(x: Tensor, per_row: int, routing: Routing, linear: Linear, target: Target) -> Tensor:
    if routing.rows < PRODUCT_BLOCK:
        return linear.fused(x, per_row, routing, target)
    parts = partial(linear.dequantized, target=target)
    return multiply_grouped(x, per_row, routing, linear.product_sizes, linear.bias, parts)


def _warm_up(linears: Linears, columns: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """columns: of x, and of what the activation leaves."""
    hidden, inner = columns
    x, ids = torch.zeros(1, hidden, dtype=dtype, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)

    def activate(outputs: Tensor) -> Tensor:  # any will do: it is not among the kernels
        return outputs[:, :inner].contiguous()

    fused = (1, *(tokens for tokens in BUCKETS if tokens >= SMALLEST_BLOCK))
    for rows in (PRODUCT_BLOCK,) if dtype == torch.float32 else (*fused, PRODUCT_BLOCK):
        _multiply(x, torch.ones(1, 1, device=device), ids, linears, activate, rows)
