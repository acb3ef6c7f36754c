"""The custom op `babai::moe`: what the experts of a rank add to every token's hidden state.

One op for all, since the sizes within depend on the routing, which torch.compile cannot follow. It stands here and not
in `vllm_babai.ops`, as the activation between an expert's linears is vLLM's.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from vllm_babai.ops.backends import backend
from vllm_babai.ops.experts import ExpertTensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.register import register

FIELDS = len(DeviceLayout._fields)


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activation: str) -> Tensor:
    """x [tokens, hidden] → the weighted sum of its experts' outputs, in the dtype of x, by the op.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of this rank; −1: one of another rank.
    activation: a value of vLLM's MoEActivation.
    """
    gate_up, down, *sizes = experts
    return torch.ops.babai.moe(x, weights, ids, [*gate_up, *down], sizes, activation)


def _moe(x: Tensor, weights: Tensor, ids: Tensor, tensors: list[Tensor], sizes: list[int], activation: str) -> Tensor:
    experts = ExpertTensors(DeviceLayout(*tensors[:FIELDS]), DeviceLayout(*tensors[FIELDS:]), *sizes)
    kind = MoEActivation(activation)

    def activate(outputs: Tensor) -> Tensor:
        inner = outputs.new_empty(len(outputs), experts.inner)
        apply_moe_activation(kind, inner, outputs)
        return inner

    return backend(x.device.type).multiply_experts(x, weights, ids, experts, activate)


def _moe_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


library = register(
    "moe(Tensor x, Tensor weights, Tensor ids, Tensor[] tensors, int[] sizes, str activation) -> Tensor",
    _moe,
    _moe_fake,
)
