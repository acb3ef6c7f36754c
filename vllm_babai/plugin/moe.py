"""The custom ops `babai::moe` and `babai::trellis_moe`: what the experts of a rank add to every token's hidden state.

One op for all linears, since the sizes within depend on the routing, which torch.compile cannot follow. They stand here
and not in `vllm_babai.ops`, as the activation between an expert's linears is vLLM's.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)

from vllm_babai.ops.backends import backend
from vllm_babai.ops.experts import Activate, ExpertTensors, TrellisExperts
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.register import register
from vllm_babai.ops.trellis import TENSORS, TrellisTensors

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # gpt-oss's, as vLLM has them, too


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activation: str) -> Tensor:
    """x [tokens, hidden] → the weighted sum of its experts' outputs, in the dtype of x, by the op.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of this rank; −1: one of another rank.
    activation: a value of vLLM's MoEActivation.
    """
    gate_up, down, *sizes, biases = experts
    return torch.ops.babai.moe(x, weights, ids, [*gate_up, *down, *biases], sizes, activation)


def multiply_trellis_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: TrellisExperts, activation: str
) -> Tensor:
    """See `multiply_experts`."""
    gate_up, down, *sizes, biases = experts
    shapes = [gate_up.out_features, gate_up.columns, down.out_features, down.columns]
    tensors = [*gate_up.tensors, *down.tensors, *biases]
    return torch.ops.babai.trellis_moe(x, weights, ids, tensors, [*shapes, *sizes], activation)


def _moe(x: Tensor, weights: Tensor, ids: Tensor, tensors: list[Tensor], sizes: list[int], activation: str) -> Tensor:
    gate_up, down, biases = _parts(tensors, len(DeviceLayout._fields))
    gate_up_bits, down_bits, rows, inner = sizes
    experts = ExpertTensors(DeviceLayout(*gate_up), DeviceLayout(*down), gate_up_bits, down_bits, rows, inner, biases)
    return backend(x.device.type).multiply_experts(x, weights, ids, experts, _activate(activation, inner))


def _trellis_moe(
    x: Tensor, weights: Tensor, ids: Tensor, tensors: list[Tensor], sizes: list[int], activation: str
) -> Tensor:
    first, second, biases = _parts(tensors, TENSORS)
    fields: list[tuple[Any, ...]] = [(*first, *sizes[:2]), (*second, *sizes[2:4])]
    gate_up, down = (TrellisTensors(*own) for own in fields)
    number, gate_up_rows, inner = sizes[4:]
    experts = TrellisExperts(gate_up, down, number, gate_up_rows, inner, biases)
    return backend(x.device.type).multiply_trellis_experts(x, weights, ids, experts, _activate(activation, inner))


def _parts(tensors: list[Tensor], fields: int) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """Those of gate_up, of down, and the biases, if there are any."""
    return tensors[:fields], tensors[fields : 2 * fields], tuple(tensors[2 * fields :])


def _activate(activation: str, inner: int) -> Activate:
    kind = MoEActivation(activation)

    def activate(outputs: Tensor) -> Tensor:
        if kind is MoEActivation.SWIGLUOAI:
            return swiglu_of_gpt_oss(outputs)
        activated = outputs.new_empty(len(outputs), inner)
        apply_moe_activation(kind, activated, outputs)
        return activated

    return activate


def swiglu_of_gpt_oss(outputs: Tensor) -> Tensor:
    """[rows, 2 · inner], gate beside up → (up + 1) · gate · sigmoid(1.702 · gate), both clamped at 7.

    vLLM has a kernel for it on GPUs alone; the one it calls swigluoai wants gates and ups in turn, which ours are not.
    """
    if outputs.is_cuda:
        inner = outputs.new_empty(len(outputs), outputs.shape[1] // 2)
        how = ApplyMoEActivationConfig(clamp_limit=SWIGLU_LIMIT, alpha=SWIGLU_ALPHA, beta=1.0)
        return apply_moe_activation(MoEActivation.SWIGLUOAI_UNINTERLEAVE, inner, outputs, activation_config=how)
    gate, up = outputs.chunk(2, 1)
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


ARGUMENTS = "(Tensor x, Tensor weights, Tensor ids, Tensor[] tensors, int[] sizes, str activation) -> Tensor"
libraries = register(f"moe{ARGUMENTS}", _moe, _fake), register(f"trellis_moe{ARGUMENTS}", _trellis_moe, _fake)
